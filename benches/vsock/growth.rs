//! How the cost grows: with the number of connections, and with that of idle daemons.

use std::io;
use std::sync::Arc;
use std::thread::sleep;

use crate::apps::Echo;
use crate::daemon::{Binary, Daemon};
use crate::echo_clients;
use crate::failure::Failure;
use crate::guest::Guest;
use crate::idle::{SETTLE, exchange};
use crate::measure::{Sample, Timing, key};
use crate::packet::{GUEST_CID, HOST_CID, Link, SocketType};
use crate::ring::Notifications;
use crate::session::Session;
use crate::threads::join;

/// `count` connections that send messages and wait for their echoes: what a message takes, and what memory a connection
/// takes that is in use.
pub fn connections(
    mut session: Session,
    count: usize,
    timing: &Timing,
    syscalls: bool,
) -> Result<Sample, String> {
    let text = |error: io::Error| error.to_string();
    let guest = session.start_guest(Echo::default())?;
    let path = session.daemon.uds_path();
    // What is allocated once belongs to no connection.
    let first = exchange(&path).map_err(text)?;
    sleep(SETTLE);
    let (anon, rss) = session.daemon.memory().map_err(text)?;
    let host = session.spawn(move |shared| echo_clients::run(&path, count, shared));
    let window = session.probe().window(timing, syscalls);
    let memory = session.daemon.memory();
    session.shared.end();
    let counts = join(host)?;
    session.end(guest)?;
    drop(first);
    let mut sample = window?.per_op()?;
    let (anon_now, rss_now) = memory.map_err(text)?;
    let each = |grown: f64| grown / count as f64;
    sample.extend([
        (key::ANON_KIB_PER_CONN, each(anon_now - anon)),
        (key::RSS_KIB_PER_CONN, each(rss_now - rss)),
    ]);
    if let Some(&per_second) = sample.get(key::OPS_PER_S) {
        sample.insert(key::US_PER_OP, 1e6 / per_second);
    }
    if let Some(counts) = counts {
        sample.insert(key::FAIRNESS, echo_clients::fairness(&counts));
    }
    Ok(sample)
}

/// `count` daemons that start at the same time, then have a guest each and nothing to do.
pub fn daemons(binary: &Binary, count: usize, timing: &Timing) -> Result<Sample, Failure> {
    let (mut daemons, took) = Daemon::start_many(binary, count)?;
    let link = || Link {
        own: GUEST_CID,
        peer: HOST_CID,
        socket_type: SocketType::Stream,
    };
    let notifications = Arc::new(Notifications::default());
    let guests: io::Result<Vec<Guest>> = daemons
        .iter()
        .map(|daemon| Guest::start(&daemon.vhost_socket(), &notifications, link()))
        .collect();
    let guests = guests?;
    sleep(SETTLE);
    let (mut anon, mut rss) = (0.0, 0.0);
    for daemon in &daemons {
        let memory = daemon.memory()?;
        anon += memory.0;
        rss += memory.1;
    }
    let before = cpu_seconds(&daemons)?;
    sleep(timing.window);
    let cpu = cpu_seconds(&daemons)? - before;
    for daemon in &mut daemons {
        daemon.check()?;
    }
    drop(guests);
    let each = |sum: f64| sum / count as f64;
    let seconds = timing.window.as_secs_f64();
    Ok(Sample::from([
        (key::START_UP_MS, each(took.as_secs_f64() * 1e3)),
        (key::ANON_KIB, each(anon)),
        (key::RSS_KIB, each(rss)),
        (key::CPU_US_PER_S, each(cpu * 1e6 / seconds)),
    ]))
}

fn cpu_seconds(daemons: &[Daemon]) -> io::Result<f64> {
    let mut total = 0.0;
    for daemon in daemons {
        total += daemon.cpu()?.as_secs_f64();
    }
    Ok(total)
}
