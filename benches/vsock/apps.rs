//! The programs that run in the simulated guest.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use crate::conns::ConnId;
use crate::guest::{App, CLOSED_PORT, DISCARD_PORT, Event, Guest};
use crate::pattern::{Checker, Marker, REQUEST_LEN};
use crate::shared::Shared;

/// A stream to the host, in writes of one size.
pub struct Sender {
    port: u32,
    conn: Option<ConnId>,
    marker: Marker,
    buffer: Vec<u8>,
    written: usize,
}

impl Sender {
    /// A stream to `port` in writes of `write` bytes.
    pub fn new(port: u32, write: usize) -> Self {
        Self {
            port,
            conn: None,
            marker: Marker::new(write),
            buffer: vec![0x5a; write],
            written: write,
        }
    }

    /// Whether it is the stream of this connection.
    pub fn has(&self, conn: ConnId) -> bool {
        self.conn == Some(conn)
    }

    /// Writes until it would block. The first time, it connects.
    pub fn run(&mut self, guest: &mut Guest) {
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

/// A stream to the host, one from it, or both.
pub struct Streams {
    shared: Arc<Shared>,
    sender: Option<Sender>,
    checker: Checker,
    /// The length of each message, if they are messages.
    message: Option<usize>,
}

impl Streams {
    /// Runs the `sender`, and checks a stream that the host writes in `write` bytes.
    pub fn new(shared: Arc<Shared>, sender: Option<Sender>, write: usize) -> Self {
        Self {
            shared,
            sender,
            checker: Checker::new(write),
            message: None,
        }
    }

    /// The same with messages of `size` bytes in place of streams.
    pub fn of_messages(shared: Arc<Shared>, sender: Option<Sender>, size: usize) -> Self {
        Self {
            message: Some(size),
            ..Self::new(shared, sender, size)
        }
    }
}

impl App for Streams {
    fn event(&mut self, _: &mut Guest, _: ConnId, event: Event<'_>) -> Result<(), String> {
        match event {
            Event::Read(bytes) if self.message.is_some_and(|len| len != bytes.len()) => {
                Err(format!("a message of {} bytes", bytes.len()))
            }
            Event::Read(bytes) => {
                self.shared.add_to_guest(bytes.len());
                self.checker.check(bytes)
            }
            Event::Ended => Err("a stream ended".into()),
            Event::Connected | Event::Accepted { .. } => Ok(()),
        }
    }

    fn run(&mut self, guest: &mut Guest) -> Result<(), String> {
        if let Some(sender) = self.sender.as_mut() {
            sender.run(guest);
        }
        Ok(())
    }
}

/// What a client does after a response.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Sends the next request on the same connection.
    Continue,
    /// Closes the connection and opens another.
    Reconnect,
}

/// A program that sends a request to the host and waits for the response.
pub struct Client {
    shared: Arc<Shared>,
    port: u32,
    after: After,
    conn: Option<ConnId>,
    started: Instant,
    number: u64,
    response: Vec<u8>,
    /// How long each operation of the measured window took, in nanoseconds.
    pub latencies: Vec<u64>,
}

impl Client {
    /// A client of `port`.
    pub fn new(shared: Arc<Shared>, port: u32, after: After) -> Self {
        Self {
            shared,
            port,
            after,
            conn: None,
            started: Instant::now(),
            number: 0,
            response: Vec::new(),
            latencies: Vec::new(),
        }
    }

    fn request(&self) -> [u8; REQUEST_LEN] {
        let mut request = [0x3c; REQUEST_LEN];
        request[..8].copy_from_slice(&self.number.to_le_bytes());
        request
    }

    fn send_request(&mut self, guest: &mut Guest, conn: ConnId) -> Result<(), String> {
        self.number += 1;
        self.response.clear();
        let sent = guest.write(conn, &self.request());
        if sent == REQUEST_LEN {
            Ok(())
        } else {
            Err(format!("only {sent} bytes of a request could be sent"))
        }
    }

    fn connect(&mut self, guest: &mut Guest) {
        self.started = Instant::now();
        self.conn = Some(guest.connect(self.port));
    }

    fn handle_response(&mut self, guest: &mut Guest, conn: ConnId) -> Result<(), String> {
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
        self.send_request(guest, conn)
    }
}

impl App for Client {
    fn event(&mut self, guest: &mut Guest, conn: ConnId, event: Event<'_>) -> Result<(), String> {
        match event {
            Event::Connected => {
                if self.after == After::Continue {
                    self.started = Instant::now();
                }
                self.send_request(guest, conn)
            }
            Event::Read(bytes) => {
                self.response.extend(bytes);
                if self.response.len() < REQUEST_LEN {
                    return Ok(());
                }
                self.handle_response(guest, conn)
            }
            Event::Ended if Some(conn) == self.conn => {
                Err("a connection was refused or reset".into())
            }
            Event::Ended | Event::Accepted { .. } => Ok(()),
        }
    }

    fn run(&mut self, guest: &mut Guest) -> Result<(), String> {
        if self.conn.is_none() {
            self.connect(guest);
        }
        Ok(())
    }
}

/// A program that echoes what it reads, on any number of connections.
#[derive(Default)]
pub struct Echo {
    /// What could not be written yet.
    pending: HashMap<ConnId, Vec<u8>>,
    queue: VecDeque<ConnId>,
}

impl App for Echo {
    fn event(&mut self, guest: &mut Guest, conn: ConnId, event: Event<'_>) -> Result<(), String> {
        match event {
            Event::Read(bytes) => {
                if let Some(pending) = self.pending.get_mut(&conn) {
                    pending.extend(bytes);
                    return Ok(());
                }
                let sent = guest.write(conn, bytes);
                if sent < bytes.len() {
                    self.pending.insert(conn, bytes[sent..].to_vec());
                    self.queue.push_back(conn);
                }
                Ok(())
            }
            Event::Ended => {
                self.pending.remove(&conn);
                Ok(())
            }
            Event::Connected | Event::Accepted { .. } => Ok(()),
        }
    }

    fn run(&mut self, guest: &mut Guest) -> Result<(), String> {
        for _ in 0..self.queue.len() {
            let Some(conn) = self.queue.pop_front() else {
                break;
            };
            let Some(pending) = self.pending.get_mut(&conn) else {
                continue;
            };
            let sent = guest.write(conn, pending);
            pending.drain(..sent);
            if pending.is_empty() {
                self.pending.remove(&conn);
            } else {
                self.queue.push_back(conn);
            }
        }
        Ok(())
    }
}

/// REQUESTs that are refused, as many as the device takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requests {
    /// How many descriptors of the TX ring they may use.
    pub descriptors: u16,
    /// How many ports they go to, in turn.
    pub ports: u32,
}

/// A program beside a flood: connections to `DISCARD_PORT` are read and discarded, and REQUESTs to closed ports sent as
/// fast as the device takes them.
pub struct Flooded<A> {
    app: A,
    shared: Arc<Shared>,
    requests: Option<Requests>,
    next_port: u32,
    discarded: HashSet<ConnId>,
}

impl<A> Flooded<A> {
    /// Puts `app` beside a flood, which has these REQUESTs of the guest's.
    pub fn new(app: A, shared: Arc<Shared>, requests: Option<Requests>) -> Self {
        Self {
            app,
            shared,
            requests,
            next_port: 0,
            discarded: HashSet::new(),
        }
    }
}

impl<A: App> App for Flooded<A> {
    fn event(&mut self, guest: &mut Guest, conn: ConnId, event: Event<'_>) -> Result<(), String> {
        match event {
            Event::Accepted { port: DISCARD_PORT } => {
                self.discarded.insert(conn);
                Ok(())
            }
            Event::Ended if self.discarded.remove(&conn) => Ok(()),
            _ if self.discarded.contains(&conn) => Ok(()),
            _ => self.app.event(guest, conn, event),
        }
    }

    fn run(&mut self, guest: &mut Guest) -> Result<(), String> {
        // It runs first, and finds a place in the ring whenever the device has returned a buffer: what the flood costs it
        // beyond that is up to the device.
        self.app.run(guest)?;
        if let Some(requests) = self.requests
            && self.shared.flooding()
        {
            let mut sent = 0;
            while guest.request(CLOSED_PORT + self.next_port, requests.descriptors) {
                self.next_port = (self.next_port + 1) % requests.ports;
                sent += 1;
            }
            self.shared.add_flood_ops(sent);
            self.shared.set_flood_answers(guest.refused());
        }
        Ok(())
    }
}
