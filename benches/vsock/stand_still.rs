//! How long traffic stands still when a daemon hands its VM over to a new one. The simulated VMM stays connected, and so do
//! guest and host programs: none of them does anything about it.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::daemon::{Binary, Daemon, Vms};
use crate::failure::Failure;
use crate::host::{self, text};
use crate::idle::{echo, exchange};
use crate::measure::{Probe, Sample, Timing, key};
use crate::mixed::Mixed;
use crate::packet::SocketType;
use crate::session::Session;
use crate::shared::Shared;
use crate::threads::{Running, join};

/// How many times the daemon is replaced in a run.
const HAND_OVERS: usize = 20;
/// How long traffic flows between two.
const PAUSE: Duration = Duration::from_millis(50);
/// The size of the stream's writes.
const WRITE: usize = 64 << 10;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measured {
    /// A stream from the guest to the host: the longest time between two reads of the host program.
    Stream,
    /// A host program that sends 64 bytes to the guest and waits for the echo: the longest round trip.
    RoundTrip,
}

/// Measures on one of `connections`; the others are idle, and have to work afterwards.
pub fn run(
    binary: &Binary,
    measured: Measured,
    connections: usize,
    timing: &Timing,
) -> Result<Sample, Failure> {
    let daemon = Daemon::start_replaceable(binary, Vms::One)?;
    let mut session = Session::begin(daemon, SocketType::Stream)?;
    let streams = usize::from(measured == Measured::Stream);
    let listener = session.listen()?;
    let app = Mixed::new(session.shared.clone(), streams, WRITE);
    let guest = session.start_guest(app)?;
    let path = session.daemon.uds_path();
    let mut idle = connect(&path, connections - 1)?;
    let host: Running<()> = session.spawn(move |shared| match measured {
        Measured::Stream => {
            host::accept(&listener, shared)?.map_or(Ok(()), |stream| drain(stream, shared))
        }
        Measured::RoundTrip => host::connect_and_request_echoes(&path, shared).map(drop),
    });
    let pauses = hand_overs(&mut session.probe(), timing);
    let idle_work = idle.iter_mut().try_for_each(echo);
    session.shared.end();
    let ended = session.end(guest);
    join(host)?;
    let pauses = pauses?;
    ended?;
    idle_work.map_err(|error| format!("an idle connection, after the hand-overs: {error}"))?;
    Ok(pauses.results())
}

fn connect(uds_path: &Path, count: usize) -> Result<Vec<UnixStream>, String> {
    let streams: io::Result<_> = (0..count).map(|_| exchange(uds_path)).collect();
    streams.map_err(text)
}

/// Drains a stream, and notes how long each read took to come.
fn drain(stream: UnixStream, shared: &Shared) -> Result<(), String> {
    let mut last = Instant::now();
    host::drain_noting(stream, WRITE, shared, || {
        shared.note_pause(last.elapsed());
        last = Instant::now();
    })
}

/// The longest pause of each stretch of time, in milliseconds.
#[derive(Default)]
struct Pauses {
    /// Over a hand-over.
    over: Vec<f64>,
    /// Between two.
    between: Vec<f64>,
    /// From the start of the successor to the predecessor's exit.
    took: Vec<f64>,
}

fn hand_overs(probe: &mut Probe<'_>, timing: &Timing) -> Result<Pauses, String> {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let mut pauses = Pauses::default();
    probe.wait_for_traffic()?;
    probe.sleep(timing.warm_up)?;
    for number in 1..=HAND_OVERS {
        probe.shared.take_pause();
        probe.sleep(PAUSE)?;
        pauses.between.push(ms(probe.shared.take_pause()));
        let took = probe.daemon.hand_over();
        let took = took.map_err(|error| format!("hand-over {number}: {error}"))?;
        pauses.took.push(ms(took));
        let going_on = probe.check_going_on();
        going_on.map_err(|failure| format!("after hand-over {number}: {failure}"))?;
        pauses.over.push(ms(probe.shared.take_pause()));
    }
    Ok(pauses)
}

impl Pauses {
    fn results(mut self) -> Sample {
        let mut sample = Sample::new();
        let lists = [
            (&mut self.over, key::STILL_P50_MS, key::STILL_WORST_MS),
            (&mut self.between, key::PAUSE_P50_MS, key::PAUSE_WORST_MS),
            (&mut self.took, key::TOOK_P50_MS, key::TOOK_WORST_MS),
        ];
        for (values, p50, worst) in lists {
            values.sort_by(f64::total_cmp);
            let median = values.get(values.len() / 2).copied();
            sample.extend(median.map(|value| (p50, value)));
            sample.extend(values.last().map(|&value| (worst, value)));
        }
        sample
    }
}
