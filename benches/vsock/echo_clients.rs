//! A host program with many connections to the guest, on each of which it sends 4 KiB and waits for the echo.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::guest::GUEST_PORT;
use crate::host::connect;
use crate::shared::Shared;

/// The size of a message in bytes.
const MESSAGE: usize = 4096;
/// How often it checks whether the run is over, in milliseconds.
const STOP_CHECK: u16 = 50;
const EVENTS: usize = 256;

struct Client {
    stream: UnixStream,
    number: u64,
    out: Vec<u8>,
    sent: usize,
    received: usize,
    buffer: Vec<u8>,
    /// Messages that were echoed within the measured window.
    counted: u64,
}

/// Connects `count` times, then sends and receives until the run is over. Returns how many messages each connection
/// exchanged within the measured window.
pub fn run(uds_path: &Path, count: usize, shared: &Shared) -> Result<Vec<u64>, String> {
    let mut clients = Vec::new();
    for i in 0..count {
        let client = Client::new(uds_path, i as u64 + 1);
        clients.push(client.map_err(|error| format!("connection {}: {error}", i + 1))?);
    }
    serve(&mut clients, shared)?;
    Ok(clients.iter().map(|client| client.counted).collect())
}

/// What the slowest of the connections exchanged, of what the fastest did.
pub fn fairness(counts: &[u64]) -> f64 {
    let slowest = counts.iter().min().copied().unwrap_or(0);
    let fastest = counts.iter().max().copied().unwrap_or(0).max(1);
    slowest as f64 / fastest as f64
}

fn serve(clients: &mut [Client], shared: &Shared) -> Result<(), String> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|error| error.to_string())?;
    for (i, client) in clients.iter_mut().enumerate() {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        let event = EpollEvent::new(flags, i as u64);
        epoll
            .add(&client.stream, event)
            .map_err(|error| error.to_string())?;
        client.begin();
    }
    let mut events = [EpollEvent::empty(); EVENTS];
    while !shared.stopped() {
        let ready = epoll.wait(&mut events, EpollTimeout::from(STOP_CHECK));
        let ready = ready.map_err(|error| error.to_string())?;
        for event in &events[..ready] {
            let number = event.data() as usize;
            let result = clients[number].work(shared);
            result.map_err(|error| format!("connection {}: {error}", number + 1))?;
        }
    }
    Ok(())
}

impl Client {
    fn new(uds_path: &Path, number: u64) -> Result<Self, String> {
        let stream = connect(uds_path, GUEST_PORT).map_err(|error| error.to_string())?;
        stream
            .set_nonblocking(true)
            .map_err(|error| error.to_string())?;
        Ok(Self {
            stream,
            number: number << 32,
            out: vec![0x77; MESSAGE],
            sent: MESSAGE,
            received: MESSAGE,
            buffer: vec![0; MESSAGE],
            counted: 0,
        })
    }

    /// Starts a new message, different from all others.
    fn begin(&mut self) {
        self.number += 1;
        let mark = self.number.to_le_bytes();
        self.out[..8].copy_from_slice(&mark);
        self.out[MESSAGE - 8..].copy_from_slice(&mark);
        (self.sent, self.received) = (0, 0);
    }

    fn work(&mut self, shared: &Shared) -> Result<(), String> {
        loop {
            self.send()?;
            if !self.receive()? {
                return Ok(());
            }
            let mark = self.number.to_le_bytes();
            if self.buffer[..8] != mark || self.buffer[MESSAGE - 8..] != mark {
                return Err("a wrong echo".into());
            }
            if shared.add_op() {
                self.counted += 1;
            }
            self.begin();
        }
    }

    fn send(&mut self) -> Result<(), String> {
        while self.sent < MESSAGE {
            match self.stream.write(&self.out[self.sent..]) {
                Ok(len) => self.sent += len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    }

    /// Returns whether the echo is complete.
    fn receive(&mut self) -> Result<bool, String> {
        while self.received < MESSAGE {
            match self.stream.read(&mut self.buffer[self.received..]) {
                Ok(0) => return Err("ended".into()),
                Ok(len) => self.received += len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(true)
    }
}
