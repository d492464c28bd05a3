//! The programs that run in the simulated guest.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use crate::conns::ConnId;
use crate::guest::{App, Event, Guest};
use crate::pattern::{Checker, Marker};
use crate::shared::Shared;

/// The bytes of a request, and of its response.
pub const REQUEST_LEN: usize = 64;

/// A stream to the host, in writes of one size.
pub struct Sender {
    port: u32,
    conn: Option<ConnId>,
    marker: Marker,
    buffer: Vec<u8>,
    written: usize,
}

impl Sender {
    /// Will connect to `port` and write `write` bytes at a time.
    pub fn new(port: u32, write: usize) -> Self {
        Self {
            port,
            conn: None,
            marker: Marker::new(write),
            buffer: vec![0x5a; write],
            written: write,
        }
    }

    fn run(&mut self, guest: &mut Guest) {
        let Some(conn) = self.conn else {
            self.conn = Some(guest.connect(self.port));
            return;
        };
        loop {
            if self.written == self.buffer.len() {
                self.marker.mark(&mut self.buffer);
                self.written = 0;
            }
            self.written += guest.write(conn, &self.buffer[self.written..]);
            if self.written < self.buffer.len() {
                break;
            }
        }
    }
}

/// Streams: perhaps one to the host, perhaps one from it.
pub struct Streams {
    shared: Arc<Shared>,
    sender: Option<Sender>,
    checker: Checker,
}

impl Streams {
    /// Sends where there is a `sender`, and takes a stream that the host writes in `write` bytes.
    pub fn new(shared: Arc<Shared>, sender: Option<Sender>, write: usize) -> Self {
        Self {
            shared,
            sender,
            checker: Checker::new(write),
        }
    }
}

impl App for Streams {
    fn event(&mut self, _: &mut Guest, _: ConnId, event: Event<'_>) -> Result<(), String> {
        match event {
            Event::Read(bytes) => {
                self.shared.add_bytes(bytes.len());
                self.checker.check(bytes)
            }
            Event::Ended => Err("a stream ended".into()),
            Event::Connected | Event::Accepted => Ok(()),
        }
    }

    fn run(&mut self, guest: &mut Guest) -> Result<(), String> {
        if let Some(sender) = self.sender.as_mut() {
            sender.run(guest);
        }
        Ok(())
    }
}

/// What a client does when its response is there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Asks again on the same connection.
    AskAgain,
    /// Closes, and connects anew.
    Reconnect,
}

/// A program that asks the host and waits for the answer.
pub struct Client {
    shared: Arc<Shared>,
    port: u32,
    after: After,
    conn: Option<ConnId>,
    started: Instant,
    asked: u64,
    response: Vec<u8>,
    /// How long the operations of the measured window took, in nanoseconds.
    pub latencies: Vec<u64>,
}

impl Client {
    /// Will ask at `port`.
    pub fn new(shared: Arc<Shared>, port: u32, after: After) -> Self {
        Self {
            shared,
            port,
            after,
            conn: None,
            started: Instant::now(),
            asked: 0,
            response: Vec::new(),
            latencies: Vec::new(),
        }
    }

    fn request(&self) -> [u8; REQUEST_LEN] {
        let mut request = [0x3c; REQUEST_LEN];
        request[..8].copy_from_slice(&self.asked.to_le_bytes());
        request
    }

    fn ask(&mut self, guest: &mut Guest, conn: ConnId) -> Result<(), String> {
        self.asked += 1;
        self.response.clear();
        let sent = guest.write(conn, &self.request());
        if sent == REQUEST_LEN {
            Ok(())
        } else {
            Err(format!("{sent} bytes of a request could be sent"))
        }
    }

    fn connect(&mut self, guest: &mut Guest) {
        self.started = Instant::now();
        self.conn = Some(guest.connect(self.port));
    }

    fn answered(&mut self, guest: &mut Guest, conn: ConnId) -> Result<(), String> {
        if self.response != self.request() {
            return Err("a wrong response".into());
        }
        if self.after == After::Reconnect {
            guest.close(conn);
        }
        if self.shared.add_op() {
            let took = self.started.elapsed().as_nanos() as u64;
            self.latencies.push(took);
        }
        if self.after == After::Reconnect {
            self.connect(guest);
            return Ok(());
        }
        self.started = Instant::now();
        self.ask(guest, conn)
    }
}

impl App for Client {
    fn event(&mut self, guest: &mut Guest, conn: ConnId, event: Event<'_>) -> Result<(), String> {
        match event {
            Event::Connected => {
                if self.after == After::AskAgain {
                    self.started = Instant::now();
                }
                self.ask(guest, conn)
            }
            Event::Read(bytes) => {
                self.response.extend(bytes);
                if self.response.len() < REQUEST_LEN {
                    return Ok(());
                }
                self.answered(guest, conn)
            }
            Event::Ended if Some(conn) == self.conn => {
                Err("a connection was refused or reset".into())
            }
            Event::Ended | Event::Accepted => Ok(()),
        }
    }

    fn run(&mut self, guest: &mut Guest) -> Result<(), String> {
        if self.conn.is_none() {
            self.connect(guest);
        }
        Ok(())
    }
}

/// A program that sends back whatever comes, on any number of connections.
#[derive(Default)]
pub struct Echo {
    late: HashMap<ConnId, Vec<u8>>,
    queue: VecDeque<ConnId>,
}

impl App for Echo {
    fn event(&mut self, guest: &mut Guest, conn: ConnId, event: Event<'_>) -> Result<(), String> {
        match event {
            Event::Read(bytes) => {
                if let Some(late) = self.late.get_mut(&conn) {
                    late.extend(bytes);
                    return Ok(());
                }
                let sent = guest.write(conn, bytes);
                if sent < bytes.len() {
                    self.late.insert(conn, bytes[sent..].to_vec());
                    self.queue.push_back(conn);
                }
                Ok(())
            }
            Event::Ended => {
                self.late.remove(&conn);
                Ok(())
            }
            Event::Connected | Event::Accepted => Ok(()),
        }
    }

    fn run(&mut self, guest: &mut Guest) -> Result<(), String> {
        for _ in 0..self.queue.len() {
            let Some(conn) = self.queue.pop_front() else {
                break;
            };
            let Some(late) = self.late.get_mut(&conn) else {
                continue;
            };
            let sent = guest.write(conn, late);
            late.drain(..sent);
            if late.is_empty() {
                self.late.remove(&conn);
            } else {
                self.queue.push_back(conn);
            }
        }
        Ok(())
    }
}
