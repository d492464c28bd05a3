//! The host programs of a round.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use super::common::daemon::{Daemon, PATIENCE};
use super::common::host::{Listener, try_connect};
use super::course::{Course, Fault};
use super::ends;
use super::plan::{Kind, Plan, Side};

/// A port where nobody listens, on either side, and one where a host program takes floods.
pub const NOBODY: u32 = 19_000;
pub const FLOODED: u32 = 19_001;

/// Who waits for the guest's connections, in the order of the plans.
pub struct Doors(Vec<Option<Listener>>);

impl Doors {
    pub fn open(daemon: &Daemon, plans: &[Plan]) -> Self {
        let door = |plan: &Plan| {
            let wanted = plan.opener == Side::Guest && plan.is_met();
            wanted.then(|| Listener::bind(daemon, plan.port()))
        };
        Self(plans.iter().map(door).collect())
    }
}

/// So many programs ask for a guest port where nobody listens, and leave without waiting for the answer.
pub fn desert(daemon: &Daemon, count: usize) {
    for _ in 0..count {
        let mut client = UnixStream::connect(daemon.uds_path()).unwrap();
        // Without a VMM the daemon closes first.
        let _ = client.write_all(format!("CONNECT {NOBODY}\n").as_bytes());
    }
}

/// Starts the host's ends of all connections.
pub fn start(daemon: &Arc<Daemon>, course: &Arc<Course>, doors: Doors) -> Vec<JoinHandle<()>> {
    let plans = course.round.plans.clone().into_iter();
    let ends = plans.zip(doors.0).map(|(plan, door)| {
        let (daemon, course) = (Arc::clone(daemon), Arc::clone(course));
        thread::spawn(move || {
            sleep(plan.delay);
            course.report(&plan, Side::Host, play(&daemon, &plan, &course, door));
        })
    });
    ends.collect()
}

fn play(
    daemon: &Daemon,
    plan: &Plan,
    course: &Course,
    door: Option<Listener>,
) -> Result<(), Fault> {
    match plan.kind {
        Kind::Refused => refused(daemon, plan),
        Kind::LineCut => cut_line(daemon, plan),
        Kind::HostRushes => rush(daemon, plan),
        _ => {
            let stream = match door {
                Some(door) => accept(&door, course),
                None => try_connect(daemon, plan.port()),
            };
            let stream = stream.ok_or_else(|| Fault::Cut("no connection".into()))?;
            ends::play(stream, plan, Side::Host, course)
        }
    }
}

fn accept(door: &Listener, course: &Course) -> Option<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline && !course.is_killed() {
        if let Some(stream) = door.try_accept() {
            return Some(stream);
        }
        sleep(Duration::from_millis(2));
    }
    None
}

fn refused(daemon: &Daemon, plan: &Plan) -> Result<(), Fault> {
    if plan.opener == Side::Host && try_connect(daemon, plan.port()).is_some() {
        return Err(Fault::Wrong("connected to nobody".into()));
    }
    Ok(())
}

/// Leaves within the line, at once or after a while.
fn cut_line(daemon: &Daemon, plan: &Plan) -> Result<(), Fault> {
    let line = format!("CONNECT {}", plan.port());
    let cut = plan.host.bytes % line.len();
    let mut client = UnixStream::connect(daemon.uds_path()).unwrap();
    // Without a VMM the daemon closes first.
    let _ = client.write_all(&line.as_bytes()[..cut]);
    if plan.host.bytes > plan.guest.bytes {
        sleep(plan.host.stall);
    }
    Ok(())
}

/// Writes all there is to write, as quickly as it is taken, and leaves.
fn rush(daemon: &Daemon, plan: &Plan) -> Result<(), Fault> {
    let mut client = UnixStream::connect(daemon.uds_path()).unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut message = format!("CONNECT {}\n", plan.port()).into_bytes();
    let mut sent = 0;
    while sent < plan.host.bytes {
        let size = (1 << 16).min(plan.host.bytes - sent);
        message.extend(ends::bytes(plan, Side::Host, sent, size));
        sent += size;
    }
    client
        .write_all(&message)
        .map_err(|error| Fault::Cut(format!("writing all at once: {error}")))
}
