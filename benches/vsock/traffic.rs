//! The cases with traffic through the simulated guest.

use crate::apps::{After, Client, Echo, Sender, Streams};
use crate::echo_clients;
use crate::guest::GUEST_PORT;
use crate::host::{self, HOST_PORT};
use crate::measure::{MIB, Sample, Timing, key, percentiles};
use crate::messages;
use crate::session::Session;
use crate::shared::Counts;
use crate::threads::{join, join_all};

/// Where streams lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the guest to the host.
    ToHost,
    /// From the host to the guest.
    ToGuest,
    /// One stream each way.
    Both,
}

/// Streams, in writes of `write` bytes.
pub fn streams(
    mut session: Session,
    direction: Direction,
    write: usize,
    timing: &Timing,
    syscalls: bool,
) -> Result<Sample, String> {
    let mut threads = Vec::new();
    let mut sender = None;
    if direction != Direction::ToGuest {
        sender = Some(Sender::new(HOST_PORT, write));
        let listener = session.listen()?;
        threads.push(session.spawn(move |shared| host::accept_and_drain(&listener, write, shared)));
    }
    let guest = session.start_guest(Streams::new(session.shared.clone(), sender, write))?;
    if direction != Direction::ToHost {
        let path = session.daemon.uds_path();
        threads.push(session.spawn(move |shared| host::connect_and_fill(&path, write, shared)));
    }
    let mut probe = session.probe();
    let begun = match direction {
        Direction::Both => probe.wait_for(Counts::moved_both_ways),
        _ => Ok(()),
    };
    let window = begun.and_then(|()| probe.window(timing, syscalls));
    session.end(guest)?;
    join_all(threads)?;
    let window = window?;
    let mut sample = window.per_byte()?;
    if direction == Direction::Both {
        sample.extend(window.per_direction());
    }
    Ok(sample)
}

/// Messages of `size` bytes, of the guest's or for it.
pub fn messages(
    mut session: Session,
    direction: Direction,
    size: usize,
    timing: &Timing,
    syscalls: bool,
) -> Result<Sample, String> {
    let (sender, host) = if direction == Direction::ToHost {
        let listener = session.listen()?;
        let host = session.spawn(move |shared| messages::accept_and_drain(&listener, size, shared));
        (Some(Sender::new(HOST_PORT, size)), Some(host))
    } else {
        (None, None)
    };
    let guest = Streams::of_messages(session.shared.clone(), sender, size);
    let guest = session.start_guest(guest)?;
    let path = session.daemon.uds_path();
    let host = host.unwrap_or_else(|| {
        session.spawn(move |shared| {
            let socket = messages::connect(&path, GUEST_PORT).map_err(host::text)?;
            host::fill(socket, size, shared, |_| {})
        })
    });
    let window = session.probe().window(timing, syscalls);
    session.end(guest)?;
    join_all(vec![host])?;
    let mut sample = window?.per_byte()?;
    if let Some(&mib) = sample.get(key::MIB_PER_S) {
        sample.insert(key::OPS_PER_S, mib * MIB / size as f64);
    }
    Ok(sample)
}

/// A guest program that sends requests to a host program, one at a time.
pub fn client(
    mut session: Session,
    after: After,
    timing: &Timing,
    syscalls: bool,
) -> Result<Sample, String> {
    let listener = session.listen()?;
    let host = session.spawn(move |shared| host::answer(&listener, shared));
    let guest = session.start_guest(Client::new(session.shared.clone(), HOST_PORT, after))?;
    let window = session.probe().window(timing, syscalls);
    let client = session.end(guest)?;
    join_all(vec![host])?;
    let mut sample = window?.per_op()?;
    if let Some(mut client) = client {
        sample.extend(percentiles(&mut client.latencies));
    }
    Ok(sample)
}

/// Host programs on `count` connections that send messages and wait for their echoes.
pub fn echo(
    mut session: Session,
    count: usize,
    timing: &Timing,
    syscalls: bool,
) -> Result<Sample, String> {
    let guest = session.start_guest(Echo::default())?;
    let path = session.daemon.uds_path();
    let host = session.spawn(move |shared| echo_clients::run(&path, count, shared));
    let window = session.probe().window(timing, syscalls);
    session.shared.end();
    let counts = join(host)?;
    session.end(guest)?;
    let mut sample = window?.per_op()?;
    if let Some(counts) = counts {
        sample.insert(key::FAIRNESS, echo_clients::fairness(&counts));
    }
    Ok(sample)
}
