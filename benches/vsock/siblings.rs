//! The cases with two simulated guests that reach each other.

use crate::apps::{After, Client, Echo, Sender, Streams};
use crate::guest::GUEST_PORT;
use crate::measure::{Sample, Timing, Window, percentiles};
use crate::session::Session;
use crate::threads::join;

/// A stream from one guest to the other, in writes of `write` bytes.
pub fn stream(
    mut session: Session,
    write: usize,
    timing: &Timing,
    syscalls: bool,
) -> Result<Sample, String> {
    let shared = session.shared.clone();
    let sibling = session.start_sibling(Streams::new(shared.clone(), None, write))?;
    let sender = Some(Sender::new(GUEST_PORT, write));
    let guest = session.start_guest(Streams::new(shared, sender, write))?;
    let window = window(&mut session, timing, syscalls);
    session.end(guest)?;
    join(sibling)?;
    window?.per_byte()
}

/// A program of one guest that sends requests to a program of the other, one at a time.
pub fn round_trip(mut session: Session, timing: &Timing, syscalls: bool) -> Result<Sample, String> {
    let sibling = session.start_sibling(Echo::default())?;
    let client = Client::new(session.shared.clone(), GUEST_PORT, After::Continue);
    let guest = session.start_guest(client)?;
    let window = window(&mut session, timing, syscalls);
    let client = session.end(guest)?;
    join(sibling)?;
    let mut sample = window?.per_op()?;
    if let Some(mut client) = client {
        sample.extend(percentiles(&mut client.latencies));
    }
    Ok(sample)
}

/// Measures traffic, and whether it goes on: a stream between two guests has no program on the host that would notice an end.
fn window(session: &mut Session, timing: &Timing, syscalls: bool) -> Result<Window, String> {
    let mut probe = session.probe();
    let window = probe.window(timing, syscalls)?;
    probe.check_going_on()?;
    Ok(window)
}
