//! The simulated guest: one virtual CPU, that is one thread, which does what Linux 6.1 does with its two rings.
//!
//! It takes interrupts through `poll` on its call eventfds, and never spins. It asks for no interrupts while it empties a
//! ring, and asks for them again before its programs run. Every payload is copied: from the program into the TX buffer,
//! from the RX buffer into the program. RX buffers are put back when less than half are posted. A CREDIT_UPDATE goes out
//! when a program has read, and the free space the host knows of is less than 64 KiB. Each write or read of a program costs
//! one real system call that does nothing, for the one it would make.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::getppid;

use crate::conns::{ConnId, Conns, State};
use crate::memory::{Backing, GuestMemory};
use crate::packet::{HEADER_LEN, Header, MAX_PAYLOAD, SHUTDOWN_BOTH, op};
use crate::ring::{Notifications, Part, Ring, feature};
use crate::shared::Shared;
use crate::vhost_user::{F_PROTOCOL_FEATURES, Frontend, Request, protocol};

/// The CID that the daemons get.
pub const GUEST_CID: u64 = 4;

/// Descriptors per ring: QEMU's.
const RING_SIZE: u16 = 128;
/// The bytes of a RX buffer's payload part.
const RX_PAYLOAD: u32 = 4096;
/// The bytes one program reads at most, and what Linux keeps free before it tells its credit.
const READ_SIZE: usize = 64 * 1024;
const MEMORY: u64 = 24 << 20;
/// How often a sleeping guest looks whether the run is over, in milliseconds.
const STOP_CHECK: u16 = 50;

/// What a program in the guest is told.
pub enum Event<'a> {
    /// Its connection was accepted.
    Connected,
    /// Somebody connected to it.
    Accepted,
    /// It reads these bytes.
    Read(&'a [u8]),
    /// The connection is gone.
    Ended,
}

/// The programs in the guest.
pub trait App {
    /// Something happened to a connection.
    fn event(&mut self, guest: &mut Guest, conn: ConnId, event: Event<'_>) -> Result<(), String>;
    /// Runs until nothing can be done.
    fn run(&mut self, guest: &mut Guest) -> Result<(), String>;
}

/// The guest.
pub struct Guest {
    _frontend: Frontend,
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
    reading: Option<(ConnId, usize)>,
}

impl Guest {
    /// Connects to a daemon and starts the device.
    pub fn start(socket: &Path, notifications: &Arc<Notifications>) -> io::Result<Self> {
        let mut frontend = Frontend::connect(socket);
        let features = negotiate(&mut frontend);
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
            _frontend: frontend,
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
        };
        guest.start_rings();
        guest.refill();
        guest.rx_most = guest.rx_posted;
        Ok(guest)
    }

    fn start_rings(&mut self) {
        let frontend = &self._frontend;
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
        // Messages are handled in order: with this reply, the rings are started.
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

    /// Waits for an interrupt. Nothing else wakes the guest: a daemon that forgets one stalls.
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
            // Linux allocates its headers zeroed.
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
            return Err(format!("a packet of {used} bytes: {header:?}"));
        }
        let ports = (header.dst_port, header.src_port);
        let Some(id) = self.conns.find(ports) else {
            return self.unknown(app, ports, &header);
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
            (op::RESPONSE, State::Asked) => {
                conn.state = State::Open;
                app.event(self, id, Event::Connected)
            }
            (op::RW, State::Open) => self.read(app, id, payload_at, len),
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

    fn unknown(
        &mut self,
        app: &mut impl App,
        (guest_port, host_port): (u32, u32),
        header: &Header,
    ) -> Result<(), String> {
        if header.op != op::REQUEST {
            return Ok(());
        }
        let id = self.conns.insert(guest_port, host_port, State::Open);
        if let Some(conn) = self.conns.get(id) {
            (conn.peer_alloc, conn.peer_fwd) = (header.buf_alloc, header.fwd_cnt);
        }
        self.control(id, op::RESPONSE, 0);
        app.event(self, id, Event::Accepted)
    }

    /// Copies a payload to the program that reads; one `read` of it is 64 KiB, or what is there.
    fn read(&mut self, app: &mut impl App, id: ConnId, at: u64, len: usize) -> Result<(), String> {
        if !matches!(self.reading, Some((reader, held)) if reader == id && held + len <= READ_SIZE)
        {
            self.finish_read(app)?;
        }
        let held = self.reading.map_or(0, |(_, held)| held);
        self.rx.read(at, &mut self.read_buffer[held..held + len]);
        self.reading = Some((id, held + len));
        Ok(())
    }

    /// `virtio_transport_stream_do_dequeue`.
    fn finish_read(&mut self, app: &mut impl App) -> Result<(), String> {
        let Some((id, len)) = self.reading.take() else {
            return Ok(());
        };
        getppid();
        if let Some(conn) = self.conns.get(id)
            && conn.has_read(len as u32)
        {
            self.control(id, op::CREDIT_UPDATE, 0);
        }
        let buffer = std::mem::take(&mut self.read_buffer);
        let result = app.event(self, id, Event::Read(&buffer[..len]));
        self.read_buffer = buffer;
        result
    }

    /// Connects to a host port.
    pub fn connect(&mut self, host_port: u32) -> ConnId {
        self.next_port += 1;
        let id = self.conns.insert(self.next_port, host_port, State::Asked);
        self.control(id, op::REQUEST, 0);
        id
    }

    /// Closes: the device still owes an RST, which nobody waits for.
    pub fn close(&mut self, id: ConnId) {
        self.control(id, op::SHUTDOWN, SHUTDOWN_BOTH);
        if let Some(conn) = self.conns.get(id) {
            conn.state = State::Closing;
        }
    }

    /// Writes what credit and the ring take now; how much that was.
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
            let told_before = conn.told_fwd;
            let header = self.conns.header(id, op::RW, 0, len as u32);
            let sent = self.send(&header, &bytes[done..done + len]);
            if let Some(conn) = self.conns.get(id) {
                if !sent {
                    conn.told_fwd = told_before;
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
        if !self.control.is_empty() || !self.send(&header, &[]) {
            self.control.push_back(header);
        }
    }

    /// Puts a packet into the TX ring and kicks where the device asks; false when the ring is full.
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
        self.memory.write(head_at, &header.bytes(GUEST_CID));
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

fn negotiate(frontend: &mut Frontend) -> u64 {
    frontend.set_owner();
    let offered = frontend.features();
    let known = feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC;
    let accepted = offered & (known | F_PROTOCOL_FEATURES);
    let protocol_offered = frontend.protocol_features();
    frontend.set_protocol_features(protocol_offered & (protocol::MQ | protocol::CONFIG));
    frontend.set_features(accepted);
    accepted
}

/// Kicks and interrupts so far.
pub fn notifications(of: &Notifications) -> (u64, u64) {
    (
        of.kicks.load(Ordering::Relaxed),
        of.interrupts.load(Ordering::Relaxed),
    )
}
