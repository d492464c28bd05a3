//! The simulated guest: one virtual CPU, which is one thread, and drives the two rings as Linux 6.1 does.
//!
//! It waits for interrupts with `poll` on the call eventfds and never spins. It suppresses interrupts while it processes a
//! ring, and enables them again before its programs run. Every payload is copied: from the program to the TX buffer, from
//! the RX buffer to the program. The RX ring is refilled when less than half of its buffers are left. A CREDIT_UPDATE is
//! sent when a program has read and the host knows of less than 64 KiB of free space, and after each message. Each read or
//! write of a program makes one real system call that does nothing, in place of the one it would make.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::getppid;

use crate::common::memory::{Backing, GuestMemory};
use crate::common::vhost_user::{F_PROTOCOL_FEATURES, Frontend, Request, protocol};
use crate::conns::{ConnId, Conns, State};
use crate::packet::{
    BUF_ALLOC, END_OF_MESSAGE, HEADER_LEN, Header, Link, MAX_PAYLOAD, SHUTDOWN_BOTH, op,
};
use crate::ring::{Notifications, Part, Ring, feature};
use crate::shared::Shared;

/// The port on which the guest's programs listen.
pub const GUEST_PORT: u32 = 1234;
/// The port of a program that reads and discards, as in RFC 863.
pub const DISCARD_PORT: u32 = 9;
/// From this port on nobody listens, in the guest or on the host.
pub const CLOSED_PORT: u32 = 1_000_000;

/// The size of each ring, as in QEMU.
pub const RING_SIZE: u16 = 128;
/// The size of an RX buffer without the header, in bytes.
const RX_PAYLOAD: u32 = 4096;
/// The most bytes that a program reads at once.
const READ_SIZE: usize = 64 * 1024;
const MEMORY: u64 = 24 << 20;
/// Feature bit of the device: messages.
const F_SEQPACKET: u64 = 1 << 1;
/// How often a waiting guest checks whether the run is over, in milliseconds.
const STOP_CHECK: u16 = 50;

/// What happens to a connection.
pub enum Event<'a> {
    /// The host accepted it.
    Connected,
    /// The host opened it.
    Accepted {
        /// The guest's port.
        port: u32,
    },
    /// These bytes, or this message, were read.
    Read(&'a [u8]),
    /// It was reset or closed by the host.
    Ended,
}

/// The programs in the guest.
pub trait App {
    /// Handles an event of a connection.
    fn event(&mut self, guest: &mut Guest, conn: ConnId, event: Event<'_>) -> Result<(), String>;
    /// Runs until it would block.
    fn run(&mut self, guest: &mut Guest) -> Result<(), String>;
}

/// What a program is reading.
struct Reading {
    conn: ConnId,
    /// How many bytes there are.
    held: usize,
    /// The read can return: it is a stream's, or the message has ended.
    ready: bool,
}

/// The guest.
pub struct Guest {
    link: Link,
    frontend: Frontend,
    memory: Arc<GuestMemory>,
    rx: Ring,
    tx: Ring,
    rx_buffers: Vec<[Part; 2]>,
    rx_spare: Vec<u16>,
    rx_posted: usize,
    rx_most: usize,
    tx_buffers: Vec<[u64; 2]>,
    tx_spare: Vec<u16>,
    conns: Conns,
    control: VecDeque<Header>,
    next_port: u32,
    read_buffer: Vec<u8>,
    reading: Option<Reading>,
    refused: u64,
}

impl Guest {
    /// Connects to a daemon and starts the device.
    pub fn start(
        socket: &Path,
        notifications: &Arc<Notifications>,
        link: Link,
    ) -> io::Result<Self> {
        let mut frontend = Frontend::connect(socket);
        let features = negotiate(&mut frontend, &link)?;
        let memory = Arc::new(GuestMemory::new(&[MEMORY], Backing::Pages));
        frontend.set_mem_table(&memory);
        let ring = |write| {
            Ring::new(
                memory.clone(),
                notifications.clone(),
                RING_SIZE,
                features,
                write,
            )
        };
        let (rx, tx) = (ring(true)?, ring(false)?);
        let buffers = RING_SIZE;
        let header = |memory: &GuestMemory| memory.alloc(HEADER_LEN as u64, 64);
        let rx_buffers = (0..buffers)
            .map(|_| {
                let payload = memory.alloc(RX_PAYLOAD.into(), 4096);
                [(header(&memory), HEADER_LEN as u32), (payload, RX_PAYLOAD)]
            })
            .collect();
        let tx_buffers = (0..buffers)
            .map(|_| [header(&memory), memory.alloc(MAX_PAYLOAD as u64, 4096)])
            .collect();
        let mut guest = Self {
            link,
            frontend,
            memory,
            rx,
            tx,
            rx_buffers,
            rx_spare: (0..buffers).rev().collect(),
            rx_posted: 0,
            rx_most: 0,
            tx_buffers,
            tx_spare: (0..buffers).rev().collect(),
            conns: Conns::default(),
            control: VecDeque::new(),
            next_port: 0x1000_0000,
            read_buffer: vec![0; READ_SIZE],
            reading: None,
            refused: 0,
        };
        guest.start_rings();
        guest.refill();
        guest.rx_most = guest.rx_posted;
        Ok(guest)
    }

    fn start_rings(&mut self) {
        let frontend = &self.frontend;
        for (index, ring) in [(0, &self.rx), (1, &self.tx)] {
            frontend.set_vring_num(index, ring.size().into());
            frontend.set_vring_base(index, 0);
            frontend.set_vring_addr(index, ring.addresses());
            frontend.set_vring_fd(Request::SetVringCall, index, ring.call());
            frontend.set_vring_fd(Request::SetVringKick, index, ring.kick_fd.as_fd());
        }
        for index in [0, 1] {
            frontend.set_vring_enable(index, true);
        }
        // Messages are handled in order: the rings have started when this reply is there.
        frontend.features();
    }

    /// Runs the guest and its programs until the run is over.
    pub fn serve(&mut self, app: &mut impl App, shared: &Shared) -> Result<(), String> {
        while !shared.stopped() {
            self.take_rx(app)?;
            self.take_tx();
            app.run(self)?;
            self.sleep(shared).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Waits for an interrupt. Nothing else wakes the guest up: the run stalls if the daemon misses one.
    fn sleep(&self, shared: &Shared) -> nix::Result<()> {
        let mut fds = [&self.rx, &self.tx].map(|ring| PollFd::new(ring.call(), PollFlags::POLLIN));
        while poll(&mut fds, PollTimeout::from(STOP_CHECK))? == 0 && !shared.stopped() {}
        for (fd, ring) in fds.iter().zip([&self.rx, &self.tx]) {
            if fd.any() == Some(true) {
                ring.take_interrupts();
            }
        }
        Ok(())
    }

    /// `virtio_transport_rx_work`.
    fn take_rx(&mut self, app: &mut impl App) -> Result<(), String> {
        loop {
            self.rx.disable_interrupts();
            while let Some((slot, len)) = self.rx.pop_used() {
                self.rx_posted -= 1;
                self.packet(app, slot, len)?;
                self.rx_spare.push(slot);
            }
            if !self.rx.enable_interrupts() {
                break;
            }
        }
        self.finish_read(app)?;
        if self.rx_posted < self.rx_most / 2 {
            self.refill();
        }
        Ok(())
    }

    fn refill(&mut self) {
        while let Some(slot) = self.rx_spare.pop() {
            let parts = &self.rx_buffers[usize::from(slot)];
            // Linux allocates them zeroed.
            self.memory.write(parts[0].0, &[0; HEADER_LEN]);
            if !self.rx.add(parts, slot) {
                self.rx_spare.push(slot);
                break;
            }
            self.rx_posted += 1;
        }
        self.rx.kick_if_needed();
    }

    /// `virtio_transport_tx_work`.
    fn take_tx(&mut self) {
        loop {
            self.tx.disable_interrupts();
            while let Some((slot, _)) = self.tx.pop_used() {
                self.tx_spare.push(slot);
            }
            if !self.tx.enable_interrupts() {
                break;
            }
        }
        while let Some(header) = self.control.pop_front() {
            if !self.send(&header, &[]) {
                self.control.push_front(header);
                break;
            }
        }
    }

    fn packet(&mut self, app: &mut impl App, slot: u16, used: u32) -> Result<(), String> {
        let [(head_at, _), (payload_at, _)] = self.rx_buffers[usize::from(slot)];
        let mut bytes = [0; HEADER_LEN];
        self.rx.read(head_at, &mut bytes);
        let header = Header::parse(&bytes);
        let len = header.len as usize;
        if (used as usize) < HEADER_LEN + len || header.len > RX_PAYLOAD {
            let room = HEADER_LEN + RX_PAYLOAD as usize;
            return Err(format!(
                "{used} bytes in a buffer of {room}, the packet's payload has {len}"
            ));
        }
        let ports = (header.dst_port, header.src_port);
        let Some(id) = self.conns.find(ports) else {
            return self.no_connection(app, ports, &header);
        };
        let Some(conn) = self.conns.get(id) else {
            return Ok(());
        };
        (conn.peer_alloc, conn.peer_fwd) = (header.buf_alloc, header.fwd_cnt);
        match (header.op, conn.state) {
            (op::RST, _) => {
                self.conns.remove(id);
                self.finish_read(app)?;
                app.event(self, id, Event::Ended)
            }
            (op::RESPONSE, State::Connecting) => {
                conn.state = State::Open;
                app.event(self, id, Event::Connected)
            }
            (op::RW, State::Open) => self.read(app, id, payload_at, &header),
            (op::CREDIT_REQUEST, State::Open) => {
                self.control(id, op::CREDIT_UPDATE, 0);
                Ok(())
            }
            (op::SHUTDOWN, State::Open) if header.flags == SHUTDOWN_BOTH => {
                self.finish_read(app)?;
                self.control(id, op::RST, 0);
                self.conns.remove(id);
                app.event(self, id, Event::Ended)
            }
            _ => Ok(()),
        }
    }

    /// A packet for no connection: a REQUEST, or the RST for one of `request`.
    fn no_connection(
        &mut self,
        app: &mut impl App,
        (guest_port, host_port): (u32, u32),
        header: &Header,
    ) -> Result<(), String> {
        self.refused += u64::from(header.op == op::RST);
        if header.op != op::REQUEST {
            return Ok(());
        }
        if ![GUEST_PORT, DISCARD_PORT].contains(&guest_port) {
            self.send_control(Header {
                src_port: guest_port,
                dst_port: host_port,
                op: op::RST,
                ..Header::default()
            });
            return Ok(());
        }
        let id = self.conns.insert(guest_port, host_port, State::Open);
        if let Some(conn) = self.conns.get(id) {
            (conn.peer_alloc, conn.peer_fwd) = (header.buf_alloc, header.fwd_cnt);
        }
        self.control(id, op::RESPONSE, 0);
        app.event(self, id, Event::Accepted { port: guest_port })
    }

    /// Copies a payload to the program. It reads up to 64 KiB at once: what follows without a packet for another connection
    /// in between, or one message.
    fn read(
        &mut self,
        app: &mut impl App,
        id: ConnId,
        at: u64,
        header: &Header,
    ) -> Result<(), String> {
        let len = header.len as usize;
        let messages = self.link.has_messages();
        let goes_on = self.reading.as_ref().is_some_and(|reading| {
            let fits = reading.held + len <= READ_SIZE;
            reading.conn == id && fits && !(messages && reading.ready)
        });
        if !goes_on {
            self.finish_read(app)?;
        }
        let held = match &self.reading {
            Some(_) if !goes_on => return Err("a message without an end".into()),
            reading => reading.as_ref().map_or(0, |reading| reading.held),
        };
        self.rx.read(at, &mut self.read_buffer[held..held + len]);
        self.reading = Some(Reading {
            conn: id,
            held: held + len,
            ready: !messages || header.flags & END_OF_MESSAGE != 0,
        });
        Ok(())
    }

    /// `virtio_transport_stream_do_dequeue`, `virtio_transport_seqpacket_do_dequeue`.
    fn finish_read(&mut self, app: &mut impl App) -> Result<(), String> {
        let Some(reading) = self.reading.take_if(|reading| reading.ready) else {
            return Ok(());
        };
        let (id, len) = (reading.conn, reading.held);
        getppid();
        let messages = self.link.has_messages();
        if let Some(conn) = self.conns.get(id) {
            conn.count_read(len as u32);
            if messages || conn.needs_credit_update() {
                self.control(id, op::CREDIT_UPDATE, 0);
            }
        }
        let buffer = std::mem::take(&mut self.read_buffer);
        let result = app.event(self, id, Event::Read(&buffer[..len]));
        self.read_buffer = buffer;
        result
    }

    /// Connects to a host port.
    pub fn connect(&mut self, host_port: u32) -> ConnId {
        self.next_port += 1;
        let id = self
            .conns
            .insert(self.next_port, host_port, State::Connecting);
        self.control(id, op::REQUEST, 0);
        id
    }

    /// Sends a REQUEST and keeps no connection for it, like a program that closes the socket at once. False when that many
    /// `descriptors` of the TX ring are in use, by whatever packets.
    pub fn request(&mut self, host_port: u32, descriptors: u16) -> bool {
        let in_use = usize::from(RING_SIZE) - self.tx_spare.len();
        if !self.control.is_empty() || in_use >= descriptors.into() {
            return false;
        }
        self.next_port += 1;
        let header = Header {
            src_port: self.next_port,
            dst_port: host_port,
            op: op::REQUEST,
            buf_alloc: BUF_ALLOC,
            ..Header::default()
        };
        self.send(&header, &[])
    }

    /// How many RSTs came for a `request`.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Closes a connection in both directions; the RST is not waited for.
    pub fn close(&mut self, id: ConnId) {
        self.control(id, op::SHUTDOWN, SHUTDOWN_BOTH);
        if let Some(conn) = self.conns.get(id) {
            conn.state = State::Closing;
        }
    }

    /// Writes as much as credit and the TX ring permit. Returns how many bytes. A message ends with the last of `bytes`.
    pub fn write(&mut self, id: ConnId, bytes: &[u8]) -> usize {
        getppid();
        let mut done = 0;
        while done < bytes.len() {
            let Some(conn) = self.conns.get(id) else {
                break;
            };
            let len = (bytes.len() - done)
                .min(conn.credit() as usize)
                .min(MAX_PAYLOAD);
            if conn.state != State::Open || len == 0 || !self.control.is_empty() {
                break;
            }
            let sent_fwd = conn.sent_fwd;
            let ends = self.link.has_messages() && done + len == bytes.len();
            let flags = if ends { END_OF_MESSAGE } else { 0 };
            let header = self.conns.header(id, op::RW, flags, len as u32);
            let sent = self.send(&header, &bytes[done..done + len]);
            if let Some(conn) = self.conns.get(id) {
                if !sent {
                    conn.sent_fwd = sent_fwd;
                    break;
                }
                conn.tx_cnt = conn.tx_cnt.wrapping_add(len as u32);
            }
            done += len;
        }
        done
    }

    fn control(&mut self, id: ConnId, op: u16, flags: u32) {
        let header = self.conns.header(id, op, flags, 0);
        self.send_control(header);
    }

    fn send_control(&mut self, header: Header) {
        if !self.control.is_empty() || !self.send(&header, &[]) {
            self.control.push_back(header);
        }
    }

    /// Puts a packet into the TX ring; false when the ring is full.
    fn send(&mut self, header: &Header, payload: &[u8]) -> bool {
        let Some(slot) = self.tx_spare.pop() else {
            return false;
        };
        let [head_at, payload_at] = self.tx_buffers[usize::from(slot)];
        let parts = [
            (head_at, HEADER_LEN as u32),
            (payload_at, payload.len() as u32),
        ];
        let count = if payload.is_empty() { 1 } else { 2 };
        self.memory.write(head_at, &header.bytes(&self.link));
        if count > 1 {
            self.memory.write(payload_at, payload);
        }
        if !self.tx.add(&parts[..count], slot) {
            self.tx_spare.push(slot);
            return false;
        }
        self.tx.kick_if_needed();
        true
    }
}

fn negotiate(frontend: &mut Frontend, link: &Link) -> io::Result<u64> {
    frontend.set_owner();
    let offered = frontend.features();
    let messages = if link.has_messages() { F_SEQPACKET } else { 0 };
    if offered & messages != messages {
        return Err(io::Error::new(ErrorKind::Unsupported, "no messages"));
    }
    let known = messages | feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC;
    let accepted = offered & (known | F_PROTOCOL_FEATURES);
    let protocol_offered = frontend.protocol_features();
    frontend.set_protocol_features(protocol_offered & (protocol::MQ | protocol::CONFIG));
    frontend.set_features(accepted);
    Ok(accepted)
}
