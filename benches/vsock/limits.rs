//! What this machine can do at best, without daemon and guest, measured beside the daemons.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::host;
use crate::measure::{GIB, MIB, Sample, Timing, key, own_cpu, percentiles};
use crate::messages;
use crate::pattern::REQUEST_LEN;
use crate::shared::Shared;

/// What is measured as the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// A Unix socket pair between two threads, with writes of so many bytes.
    SocketPair(usize),
    /// A Unix socket pair of messages of so many bytes.
    Messages(usize),
    /// A round trip through three threads: the first wakes the second with an eventfd, the second the third with a socket.
    RoundTrip,
}

impl Limit {
    /// Measures it once.
    pub fn measure(self, timing: &Timing) -> Result<Sample, String> {
        match self {
            Self::SocketPair(write) => {
                UnixStream::pair().and_then(|pair| socket_pair(pair, timing, write, host::drain))
            }
            Self::Messages(size) => {
                messages::pair().and_then(|pair| socket_pair(pair, timing, size, messages::drain))
            }
            Self::RoundTrip => round_trip(timing),
        }
        .map_err(|error| error.to_string())
    }
}

type Drain = fn(UnixStream, usize, &Shared) -> Result<(), String>;

fn socket_pair(
    (from, to): (UnixStream, UnixStream),
    timing: &Timing,
    write: usize,
    drain: Drain,
) -> io::Result<Sample> {
    let end = to.try_clone()?;
    let shared = Arc::new(Shared::default());
    let (writer, reader) = (shared.clone(), shared.clone());
    let threads = [
        thread::spawn(move || host::fill(from, write, &writer, |_| {})),
        thread::spawn(move || drain(to, write, &reader)),
    ];
    thread::sleep(timing.warm_up);
    let (begin, before) = (Instant::now(), shared.counts());
    let cpu_before = own_cpu()?;
    thread::sleep(timing.window);
    let bytes = shared.counts().since(before).bytes() as f64;
    let seconds = begin.elapsed().as_secs_f64();
    let cpu = (own_cpu()? - cpu_before).as_secs_f64();
    shared.end();
    // Wakes the threads up.
    let _ = end.shutdown(std::net::Shutdown::Both);
    for thread in threads {
        let _ = thread.join();
    }
    Ok(Sample::from([
        (key::MIB_PER_S, bytes / MIB / seconds),
        (key::OTHERS_CPU_S_PER_GIB, cpu * GIB / bytes),
    ]))
}

fn round_trip(timing: &Timing) -> io::Result<Sample> {
    let event = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
    let (kick, call) = (Arc::new(event()?), Arc::new(event()?));
    let (middle, mut far) = UnixStream::pair()?;
    let end = middle.try_clone()?;
    let (middle_kick, middle_call) = (kick.clone(), call.clone());
    let threads = [
        thread::spawn(move || relay(middle, &middle_kick, &middle_call)),
        thread::spawn(move || {
            let mut request = [0; REQUEST_LEN];
            loop {
                far.read_exact(&mut request)?;
                far.write_all(&request)?;
            }
        }),
    ];
    let mut latencies = Vec::new();
    let begin = Instant::now();
    while begin.elapsed() < timing.warm_up + timing.window {
        let started = Instant::now();
        kick.write(1)?;
        wait(&[call.as_fd()])?;
        call.read()?;
        if begin.elapsed() > timing.warm_up {
            latencies.push(started.elapsed().as_nanos() as u64);
        }
    }
    let _ = end.shutdown(std::net::Shutdown::Both);
    for thread in threads {
        let _: Result<io::Result<()>, _> = thread.join();
    }
    Ok(percentiles(&mut latencies))
}

/// The thread in the middle: eventfd to socket, socket to eventfd.
fn relay(mut socket: UnixStream, kick: &EventFd, call: &EventFd) -> io::Result<()> {
    let mut request = [0; REQUEST_LEN];
    loop {
        let [kicked, readable] = wait(&[kick.as_fd(), socket.as_fd()])?;
        if kicked {
            kick.read()?;
            socket.write_all(&request)?;
        }
        if readable {
            socket.read_exact(&mut request)?;
            call.write(1)?;
        }
    }
}

/// Waits until one of up to two descriptors is readable. Returns which are.
fn wait(fds: &[BorrowedFd<'_>]) -> io::Result<[bool; 2]> {
    let mut polled: Vec<PollFd<'_>> = fds
        .iter()
        .map(|&fd| PollFd::new(fd, PollFlags::POLLIN))
        .collect();
    poll(
        &mut polled,
        PollTimeout::from(Duration::from_secs(5).as_millis() as u16),
    )?;
    let ready = |i: usize| polled.get(i).and_then(PollFd::any) == Some(true);
    Ok([ready(0), ready(1)])
}
