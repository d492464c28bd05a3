//! What a daemon without traffic costs.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use crate::apps::Echo;
use crate::daemon::Daemon;
use crate::guest::GUEST_PORT;
use crate::host::connect;
use crate::measure::{Sample, Timing, key};
use crate::pattern::REQUEST_LEN;
use crate::session::Session;

/// How long a daemon gets to settle before its memory and its CPU time are read.
pub const SETTLE: Duration = Duration::from_millis(300);
/// How long an exchange may take.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a daemon takes to start, and its memory before a VMM or a host program has connected.
pub fn start_up(daemon: &Daemon) -> Result<Sample, String> {
    sleep(SETTLE);
    let (anon, rss) = daemon.memory().map_err(|error| error.to_string())?;
    Ok(Sample::from([
        (key::START_UP_MS, daemon.start_up.as_secs_f64() * 1e3),
        (key::ANON_KIB, anon),
        (key::RSS_KIB, rss),
    ]))
}

/// Opens `count` connections that exchange 64 bytes each and are idle afterwards.
pub fn idle(mut session: Session, count: usize, timing: &Timing) -> Result<Sample, String> {
    let guest = session.start_guest(Echo::default())?;
    let result = measure(&session.daemon, count, timing).map_err(|error| error.to_string());
    session.daemon.check().map_err(|error| error.to_string())?;
    let failure = session.shared.failure();
    session.end(guest)?;
    failure.map_or(result, Err)
}

fn measure(daemon: &Daemon, count: usize, timing: &Timing) -> io::Result<Sample> {
    let uds_path = daemon.uds_path();
    // What is allocated once belongs to no connection.
    let _first = exchange(&uds_path)?;
    sleep(SETTLE);
    let (anon, rss) = daemon.memory()?;
    let mut open = Vec::new();
    for i in 1..=count {
        let stream = exchange(&uds_path);
        open.push(stream.map_err(|error| io::Error::other(format!("connection {i}: {error}")))?);
    }
    sleep(SETTLE);
    let (anon_now, rss_now) = daemon.memory()?;
    let per_conn = |grown: f64| grown / count as f64;
    let mut sample = Sample::from([
        (key::ANON_KIB_PER_CONN, per_conn(anon_now - anon)),
        (key::RSS_KIB_PER_CONN, per_conn(rss_now - rss)),
    ]);
    let before = daemon.cpu()?;
    sleep(timing.window);
    let cpu = (daemon.cpu()? - before).as_secs_f64();
    sample.insert(key::CPU_US_PER_S, cpu * 1e6 / timing.window.as_secs_f64());
    Ok(sample)
}

/// Opens a connection and has 64 bytes echoed.
pub fn exchange(uds_path: &Path) -> io::Result<UnixStream> {
    let mut stream = connect(uds_path, GUEST_PORT)?;
    stream.set_read_timeout(Some(EXCHANGE_TIMEOUT))?;
    echo(&mut stream)?;
    Ok(stream)
}

/// Has 64 bytes echoed.
pub fn echo(stream: &mut UnixStream) -> io::Result<()> {
    let request = [0x11; REQUEST_LEN];
    stream.write_all(&request)?;
    let mut response = [0; REQUEST_LEN];
    stream.read_exact(&mut response)?;
    if response == request {
        Ok(())
    } else {
        Err(io::Error::other("a wrong echo"))
    }
}
