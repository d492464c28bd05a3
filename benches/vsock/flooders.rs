//! Host programs that flood the daemon.

use std::io::{self, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::guest::DISCARD_PORT;
use crate::host::{connect, request};
use crate::shared::Shared;

/// How many clients connect at the same time.
const CLIENTS: usize = 256;
/// How often a program checks whether the run is over, in milliseconds.
const STOP_CHECK: u16 = 50;
/// Few, so that no connection gets far ahead of the others.
const EVENTS: usize = 64;

/// A program that writes to many connections, in turn, as fast as they take it.
pub struct Writers {
    streams: Vec<UnixStream>,
    block: Vec<u8>,
}

impl Writers {
    /// Connects `count` times to the guest's `DISCARD_PORT`, for writes of `write` bytes.
    pub fn connect(uds_path: &Path, count: usize, write: usize) -> Result<Self, String> {
        let open = |_| {
            let stream = connect(uds_path, DISCARD_PORT)?;
            stream.set_nonblocking(true)?;
            Ok(stream)
        };
        let streams: io::Result<_> = (0..count).map(open).collect();
        Ok(Self {
            streams: streams.map_err(text)?,
            block: vec![0x42; write],
        })
    }

    /// Writes until the run is over.
    pub fn run(mut self, shared: &Shared) -> Result<(), String> {
        let interest = EpollFlags::EPOLLOUT;
        let epoll = watch(&self.streams, interest).map_err(text)?;
        let mut written = 0;
        while !shared.stopped() {
            for i in wait(&epoll)? {
                match self.streams[i].write(&self.block) {
                    Ok(len) => written += len,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(text(error)),
                }
            }
            shared.add_flood_ops((written / self.block.len()) as u64);
            written %= self.block.len();
        }
        Ok(())
    }
}

/// Clients that connect to a port of the guest, close as soon as they get an answer, and connect again, until the run is
/// over.
pub fn reconnect(uds_path: &Path, port: u32, shared: &Shared) -> Result<(), String> {
    let open = || request(uds_path, port).map_err(text);
    let mut clients = (0..CLIENTS)
        .map(|_| open())
        .collect::<Result<Vec<_>, _>>()?;
    let interest = EpollFlags::EPOLLIN;
    let epoll = watch(&clients, interest).map_err(text)?;
    while !shared.stopped() {
        let answered = wait(&epoll)?;
        for &i in &answered {
            // Closing the old one takes it out of the set.
            clients[i] = open()?;
            let event = EpollEvent::new(interest, i as u64);
            epoll
                .add(&clients[i], event)
                .map_err(|error| text(error.into()))?;
        }
        shared.add_flood_ops(answered.len() as u64);
    }
    Ok(())
}

fn watch(streams: &[UnixStream], interest: EpollFlags) -> io::Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for (i, stream) in streams.iter().enumerate() {
        epoll.add(stream, EpollEvent::new(interest, i as u64))?;
    }
    Ok(epoll)
}

/// The indices of the streams that are ready.
fn wait(epoll: &Epoll) -> Result<Vec<usize>, String> {
    let mut events = [EpollEvent::empty(); EVENTS];
    let ready = epoll.wait(&mut events, EpollTimeout::from(STOP_CHECK));
    let ready = ready.map_err(|error| text(error.into()))?;
    Ok(events[..ready]
        .iter()
        .map(|event| event.data() as usize)
        .collect())
}

fn text(error: io::Error) -> String {
    format!("flood: {error}")
}
