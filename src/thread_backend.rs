//! The table of connections between one guest and its host.
//!
//! Every packet from the guest is consumed here, whatever it is: it goes to its connection, opens one, or is answered
//! with an RST. What is owed to the guest waits here too: resets first, then the connections that have something to
//! send, one after the other. Connections are opened and closed nowhere else.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use log::{debug, trace};
use nix::sys::socket::{MsgFlags, recv};
use slab::Slab;

use crate::config::VmConfig;
use crate::host::connect_line::{Handshake, Progress};
use crate::host::listener;
use crate::metrics::counters::{CloseReason, Counters, Side, VmSnapshot};
use crate::packet::header::{Cid, GuestPort, HOST_CID, HostPort, Op, TYPE_STREAM, VsockHeader};
use crate::packet::{RxBatch, RxBuffer, TxBatch, VsockPacket};
use crate::rxops::RxOps;
use crate::syscalls::Syscall;
use crate::vsock_conn::{ConnKey, Readiness, Verdict, VsockConnection};

/// To read the `CONNECT` line, and no more.
pub(crate) const SYSCALLS: &[Syscall] = &[Syscall::any(libc::SYS_recvfrom)];

/// How long a host program has to say which port it wants. A person types the line by hand.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How many host programs may be about to say it. One more, and the oldest of them is dropped.
pub const MAX_HANDSHAKES: usize = 1024;

/// How many resets may wait for the guest's buffers. One more is dropped: a guest that provokes so many and takes none
/// of them has lost its own.
pub const MAX_RESETS: usize = 1024;

/// The first host port that is given out. From here on to 65535 a port has at most five digits, which is all that
/// readers of the `OK` line expect.
const FIRST_HOST_PORT: u32 = 1024;
const HOST_PORTS: u32 = 65536 - FIRST_HOST_PORT;

/// Names a socket in the event loop. Never used twice, so that an event for a closed socket finds nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token(pub u64);

/// Where sockets are registered for readiness, once, for their whole life.
pub trait Registry: Send {
    /// Registers `socket`: its readiness comes back with `token`.
    fn register(&self, socket: BorrowedFd<'_>, token: Token) -> io::Result<()>;
}

/// What the host's end of a socket is at the moment.
enum Peer {
    /// A host program that has not said yet which port it wants.
    Handshaking(UnixStream, Handshake),
    /// A connection.
    Connected(Box<VsockConnection>),
    /// On the way from the one to the other.
    Moving,
}

/// A place in the table.
struct Entry {
    token: Token,
    peer: Peer,
    /// It stands in the ready queue.
    is_ready: bool,
    deadline: Option<Instant>,
}

/// The connections of one guest.
pub struct VsockThreadBackend {
    guest_cid: Cid,
    uds_path: PathBuf,
    tx_buffer_size: u32,
    max_connections: usize,
    registry: Box<dyn Registry>,
    entries: Slab<Entry>,
    by_key: HashMap<ConnKey, usize>,
    /// Connections that owe the guest a packet, in the order in which they are served. May name closed ones.
    ready: VecDeque<Token>,
    resets: VecDeque<VsockHeader>,
    deadlines: BTreeSet<(Instant, usize)>,
    /// The entries that are handshaking, oldest first.
    handshakes: BTreeSet<Token>,
    /// The connections whose ports the guest has given up, and that only have bytes for the host program left.
    orphans: BTreeSet<Token>,
    next_serial: u32,
    next_host_port: u32,
    counters: Counters,
}

impl VsockThreadBackend {
    /// An empty table for the guest of `config`. New sockets are registered with `registry`.
    pub fn new(config: &VmConfig, registry: Box<dyn Registry>) -> Self {
        Self {
            guest_cid: config.guest_cid,
            uds_path: config.uds_path.clone(),
            tx_buffer_size: config.tx_buffer_size,
            max_connections: config.max_connections,
            registry,
            entries: Slab::new(),
            by_key: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            deadlines: BTreeSet::new(),
            handshakes: BTreeSet::new(),
            orphans: BTreeSet::new(),
            next_serial: 0,
            next_host_port: RandomState::new().build_hasher().finish() as u32,
            counters: Counters::default(),
        }
    }

    /// What was counted so far, for whoever else sees things happen.
    pub fn counters(&mut self) -> &mut Counters {
        &mut self.counters
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.by_key.len()
    }

    /// What there is to tell now.
    pub fn snapshot(&self, vmm_connected: bool) -> VmSnapshot {
        // The ports of an orphan may be another connection's already.
        let connected = |(_, entry): (_, &Entry)| match &entry.peer {
            Peer::Connected(conn) if !self.orphans.contains(&entry.token) => Some(conn.stats()),
            _ => None,
        };
        VmSnapshot {
            cid: self.guest_cid,
            vmm_connected,
            handshaking: self.handshakes.len(),
            counters: self.counters.clone(),
            connections: self.entries.iter().filter_map(connected).collect(),
        }
    }

    /// Takes packets from the guest. Each is consumed, whatever it is.
    pub fn send_pkts(&mut self, batch: &TxBatch<'_>) {
        let mut rest = batch.packets();
        let len = |packet: &VsockPacket| u64::from(packet.header().len);
        self.counters.from_guest.packets += rest.len() as u64;
        self.counters.from_guest.bytes += rest.iter().map(len).sum::<u64>();
        while let Some(first) = rest.first() {
            let run = if self.op(first) == Some(Op::Rw) {
                let key = ConnKey::of(first.header());
                let same = |packet: &&VsockPacket| {
                    ConnKey::of(packet.header()) == key && self.op(packet) == Some(Op::Rw)
                };
                rest.iter().take_while(same).count()
            } else {
                1
            };
            let (packets, after) = rest.split_at(run);
            self.send_run(batch, packets);
            rest = after;
        }
    }

    /// How many bytes of payload the next packets for the guest can have; 0 for a packet without, none when nothing is
    /// owed.
    pub fn rx_demand(&mut self) -> Option<usize> {
        if !self.resets.is_empty() {
            return Some(0);
        }
        while let Some(token) = self.ready.front() {
            if let Some(slot) = self.slot(*token) {
                if let Some(demand) = self.connection(slot).and_then(|conn| conn.rx_demand()) {
                    return Some(demand);
                }
                self.entries[slot].is_ready = false;
            }
            self.ready.pop_front();
        }
        None
    }

    /// Puts what is owed next into `batch`, which was made for [`VsockThreadBackend::rx_demand`] and is not empty.
    pub fn recv_pkts(&mut self, batch: &mut RxBatch<'_>) {
        if let Some(reset) = self.resets.pop_front() {
            batch.fill_header(&reset);
        } else if let Some(slot) = self.ready.pop_front().and_then(|token| self.slot(token)) {
            self.entries[slot].is_ready = false;
            if let Some(conn) = self.connection(slot) {
                let is_stalled = conn.owes() == Some(RxOps::CreditRequest);
                let verdict = conn.recv_pkt(batch);
                self.counters.credit_stalls += u64::from(is_stalled);
                self.settle(slot, verdict);
            }
        }
        let filled = batch.filled();
        self.counters.to_guest.packets += filled.len() as u64;
        self.counters.to_guest.bytes += filled.iter().map(RxBuffer::payload).sum::<u64>();
    }

    /// Takes the readiness of the socket that was registered with `token`.
    pub fn socket_ready(&mut self, token: Token, ready: Readiness) {
        let Some(slot) = self.slot(token) else { return };
        match &mut self.entries[slot].peer {
            Peer::Connected(conn) => {
                let verdict = conn.socket_ready(ready);
                self.settle(slot, verdict);
            }
            Peer::Handshaking(..) => self.read_handshake(slot),
            Peer::Moving => {}
        }
    }

    /// Takes a host program that has just connected.
    pub fn add_client(&mut self, stream: UnixStream) {
        if self.handshakes.len() >= MAX_HANDSHAKES {
            debug!("{MAX_HANDSHAKES} clients have not named a port yet, dropping the oldest");
            let oldest = self.handshakes.first().and_then(|token| self.slot(*token));
            oldest
                .into_iter()
                .for_each(|slot| self.close(slot, CloseReason::Evicted, false));
        }
        self.counters.clients += 1;
        let peer = Peer::Handshaking(stream, Handshake::default());
        if let Some(slot) = self.insert(peer) {
            debug!("{} connected", self.entries[slot].name());
            self.handshakes.insert(self.entries[slot].token);
            self.set_deadline(slot, Some(Instant::now() + HANDSHAKE_TIMEOUT));
        }
    }

    /// The earliest time at which [`VsockThreadBackend::expire`] has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Ends what has not come to its end in time.
    pub fn expire(&mut self, now: Instant) {
        while let Some((deadline, slot)) = self.deadlines.first().copied() {
            if deadline > now {
                return;
            }
            self.close(slot, CloseReason::Timeout, true);
        }
    }

    /// The guest has lost all its connections: closes them. Bytes that belong to host programs are still kept for them.
    pub fn reset(&mut self) {
        self.close_all(|entry| matches!(entry.peer, Peer::Connected(_)));
        self.resets.clear();
        self.ready.clear();
    }

    /// There is no guest any more: closes the connections, and the clients that wait for one.
    pub fn disconnect(&mut self) {
        self.close_all(|entry| matches!(entry.peer, Peer::Handshaking(..)));
        self.reset();
    }

    fn close_all(&mut self, which: impl Fn(&Entry) -> bool) {
        let closing: Vec<usize> = self
            .entries
            .iter()
            .filter(|(_, entry)| which(entry) && !self.orphans.contains(&entry.token))
            .map(|(slot, _)| slot)
            .collect();
        for slot in closing {
            self.close(slot, CloseReason::DeviceReset, false);
        }
    }

    /// Whether a packet could belong to a stream connection of our guest's.
    fn is_ours(&self, header: &VsockHeader) -> bool {
        header.guest_cid == self.guest_cid
            && header.host_cid == HOST_CID
            && header.kind == TYPE_STREAM
    }

    /// The operation of a packet that could.
    fn op(&self, packet: &VsockPacket) -> Option<Op> {
        let header = packet.header();
        Op::from_raw(header.op).filter(|_| self.is_ours(header))
    }

    /// Takes one packet, or consecutive RW packets of one connection.
    fn send_run(&mut self, batch: &TxBatch<'_>, packets: &[VsockPacket]) {
        let Some(first) = packets.first() else { return };
        let header = first.header();
        trace!("from the guest, {} times: {header:?}", packets.len());
        if header.guest_cid != self.guest_cid {
            self.counters.foreign += packets.len() as u64;
            let (cid, count) = (header.guest_cid.0, self.counters.foreign);
            return debug!("dropped a packet of CID {cid}, {count} of foreign CIDs so far");
        }
        let slot = self.by_key.get(&ConnKey::of(header)).copied();
        match (self.op(first), slot.filter(|_| self.is_ours(header))) {
            (Some(op), Some(slot)) => {
                if let Some(conn) = self.connection(slot) {
                    let verdict = match op {
                        Op::Rw => conn.send_payload(batch, packets),
                        op => conn.send_pkt(op, header),
                    };
                    self.settle(slot, verdict);
                }
            }
            (None, Some(slot)) => self.close(slot, CloseReason::Protocol, true),
            (Some(Op::Request), None) => self.open(header),
            (_, None) => self.refuse(header),
        }
    }

    /// Answers a packet that belongs to nothing here.
    fn refuse(&mut self, header: &VsockHeader) {
        // An RST is never answered, or two ends could go on about it forever.
        if header.op != Op::Rst as u16 {
            self.push_reset(header.reset());
        }
    }

    fn push_reset(&mut self, reset: VsockHeader) {
        self.counters.resets += 1;
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(reset);
        } else {
            self.counters.resets_lost += 1;
            let lost = self.counters.resets_lost;
            debug!("{lost} resets lost so far: the guest takes none");
        }
    }

    /// Opens the connection that a guest's REQUEST asks for, or refuses it.
    fn open(&mut self, request: &VsockHeader) {
        // The host program is asked first: an orphan gives way to a connection, not to an attempt at one.
        let opened = self
            .check_room()
            .and_then(|()| self.connect_host(request.host_port));
        let slot = match opened {
            Ok(stream) => {
                self.make_room();
                let conn = VsockConnection::accepted(request, stream, self.tx_buffer_size);
                self.insert(Peer::Connected(Box::new(conn)))
            }
            Err(error) => {
                debug!("guest port {} refused: {error}", request.host_port.0);
                None
            }
        };
        match slot {
            Some(slot) => {
                self.by_key.insert(ConnKey::of(request), slot);
                self.counters.opened[Side::Guest as usize] += 1;
                debug!("{} opened by the guest", self.entries[slot].name());
                self.settle(slot, Verdict::Open);
            }
            None => {
                self.counters.refused += 1;
                self.refuse(request);
            }
        }
    }

    /// Connects to the host program that listens for `port`, without waiting for it to accept.
    fn connect_host(&self, port: HostPort) -> io::Result<UnixStream> {
        listener::connect_at_once(&host_port_path(&self.uds_path, port))
    }

    /// Reads on at a host program's first line.
    fn read_handshake(&mut self, slot: usize) {
        while let Peer::Handshaking(stream, handshake) = &mut self.entries[slot].peer {
            // What follows the line is payload, and stays in the socket until there is a buffer of the guest's for it.
            let mut line = [0; 32];
            let fd = stream.as_raw_fd();
            let room = &mut line[..handshake.room()];
            let flags = MsgFlags::MSG_DONTWAIT;
            let progress = match recv(fd, room, flags | MsgFlags::MSG_PEEK) {
                Ok(0) => Progress::Invalid,
                Ok(count) => {
                    let progress = handshake.feed(&room[..count]);
                    let consumed = match progress {
                        Progress::Complete { consumed, .. } => consumed,
                        Progress::Incomplete | Progress::Invalid => count,
                    };
                    // They are there: they were just seen.
                    let _ = recv(fd, &mut room[..consumed], flags);
                    progress
                }
                Err(nix::Error::EAGAIN) => return,
                Err(_) => Progress::Invalid,
            };
            match progress {
                Progress::Incomplete => {}
                Progress::Complete { port, .. } => {
                    return self.connect_guest(slot, GuestPort(port));
                }
                Progress::Invalid => {
                    debug!("{}: no CONNECT line", self.entries[slot].name());
                    return self.close(slot, CloseReason::HostGone, false);
                }
            }
        }
    }

    /// Makes a connection to the guest's `port` of a host program that has asked for it.
    fn connect_guest(&mut self, slot: usize, port: GuestPort) {
        self.handshakes.remove(&self.entries[slot].token);
        let key = self.free_key(port).filter(|_| self.check_room().is_ok());
        let peer = std::mem::replace(&mut self.entries[slot].peer, Peer::Moving);
        let (Some(key), Peer::Handshaking(stream, _)) = (key, peer) else {
            debug!("guest port {}: no room for one more connection", port.0);
            return self.close(slot, CloseReason::Evicted, false);
        };
        self.make_room();
        let conn = VsockConnection::requested(self.guest_cid, key, stream, self.tx_buffer_size);
        self.entries[slot].peer = Peer::Connected(Box::new(conn));
        self.by_key.insert(key, slot);
        self.counters.opened[Side::Host as usize] += 1;
        debug!("{} asked for by a client", self.entries[slot].name());
        self.settle(slot, Verdict::Open);
    }

    /// A key for a new connection to the guest's `port`, with the next host port that is free with it.
    fn free_key(&mut self, port: GuestPort) -> Option<ConnKey> {
        (0..HOST_PORTS).find_map(|_| {
            self.next_host_port = self.next_host_port.wrapping_add(1);
            let key = ConnKey {
                guest: port,
                host: HostPort(FIRST_HOST_PORT + self.next_host_port % HOST_PORTS),
            };
            (!self.by_key.contains_key(&key)).then_some(key)
        })
    }

    /// Whether the limit leaves room for one more connection.
    fn check_room(&self) -> io::Result<()> {
        if self.by_key.len() < self.max_connections {
            Ok(())
        } else {
            Err(io::Error::other("at the limit of connections"))
        }
    }

    /// Closes the oldest orphan if it stands in the way of one more connection.
    fn make_room(&mut self) {
        if self.by_key.len() + self.orphans.len() < self.max_connections {
            return;
        }
        let oldest = self.orphans.first().and_then(|token| self.slot(*token));
        if let Some(slot) = oldest {
            self.close(slot, CloseReason::Evicted, false);
        }
    }

    /// Puts a socket into the table and the event loop.
    fn insert(&mut self, peer: Peer) -> Option<usize> {
        self.next_serial = self.next_serial.wrapping_add(1);
        let vacant = self.entries.vacant_entry();
        let slot = vacant.key();
        let token = Token(u64::from(self.next_serial) << 32 | slot as u64);
        let registered = match &peer {
            Peer::Handshaking(stream, _) => self.registry.register(stream.as_fd(), token),
            Peer::Connected(conn) => self.registry.register(conn.stream(), token),
            Peer::Moving => Ok(()),
        };
        if let Err(error) = registered {
            debug!("no room for a socket in the event loop: {error}");
            return None;
        }
        vacant.insert(Entry {
            token,
            peer,
            is_ready: false,
            deadline: None,
        });
        Some(slot)
    }

    fn slot(&self, token: Token) -> Option<usize> {
        let slot = token.0 as u32 as usize;
        self.entries
            .get(slot)
            .filter(|entry| entry.token == token)
            .map(|_| slot)
    }

    fn connection(&mut self, slot: usize) -> Option<&mut VsockConnection> {
        match &mut self.entries[slot].peer {
            Peer::Connected(conn) => Some(conn),
            _ => None,
        }
    }

    /// Does what follows from anything that a connection was given: the only place that knows whether it is to be
    /// served, watched or closed.
    fn settle(&mut self, slot: usize, verdict: Verdict) {
        match verdict {
            Verdict::Close(end) => return self.close(slot, end, false),
            Verdict::Reset(end) => return self.close(slot, end, true),
            Verdict::Open => {}
        }
        let entry = &mut self.entries[slot];
        let Peer::Connected(conn) = &entry.peer else {
            return;
        };
        let deadline = conn.deadline();
        if !entry.is_ready && conn.rx_demand().is_some() {
            entry.is_ready = true;
            let token = entry.token;
            self.push_ready(token);
        }
        self.set_deadline(slot, deadline);
    }

    fn push_ready(&mut self, token: Token) {
        // A guest without buffers for us lets nothing leave the queue, and may open and close forever.
        if self.ready.len() >= 2 * self.entries.len() + 64 {
            let mut ready = std::mem::take(&mut self.ready);
            ready.retain(|token| self.slot(*token).is_some());
            self.ready = ready;
        }
        self.ready.push_back(token);
    }

    fn set_deadline(&mut self, slot: usize, deadline: Option<Instant>) {
        let old = std::mem::replace(&mut self.entries[slot].deadline, deadline);
        if old != deadline {
            old.into_iter()
                .for_each(|old| _ = self.deadlines.remove(&(old, slot)));
            self.deadlines.extend(deadline.map(|new| (new, slot)));
        }
    }

    /// Takes an entry out of the table and closes its socket; with `reset`, the guest is told. A connection that has
    /// bytes for its host program stays as an orphan until they are gone, or until it is closed once more.
    fn close(&mut self, slot: usize, end: CloseReason, reset: bool) {
        self.set_deadline(slot, None);
        let entry = &self.entries[slot];
        let token = entry.token;
        debug!("{} closed: {}", entry.name(), end.name());
        if let Peer::Connected(conn) = &entry.peer {
            let (key, owes_host) = (conn.key(), conn.owes_host());
            let header = conn.reset_header();
            // A guest that has sent what does not fit knows the ports, even where our REQUEST still waits.
            let reset = reset && (conn.guest_knows() || end == CloseReason::Protocol);
            if !self.orphans.contains(&token) {
                self.counters.ended[end as usize] += 1;
                self.by_key.remove(&key);
                if reset {
                    self.push_reset(header);
                }
                if owes_host {
                    self.orphans.insert(token);
                    return;
                }
            }
        } else {
            self.counters.clients_dropped += 1;
        }
        self.orphans.remove(&token);
        self.handshakes.remove(&token);
        self.entries.remove(slot);
    }
}

impl Entry {
    /// Its name in the log.
    fn name(&self) -> String {
        match &self.peer {
            Peer::Handshaking(stream, _) => format!("client (fd {})", stream.as_raw_fd()),
            Peer::Connected(conn) => {
                let key = conn.key();
                format!(
                    "connection of guest port {} and host port {}",
                    key.guest.0, key.host.0
                )
            }
            Peer::Moving => "client".into(),
        }
    }
}

/// Where a host program listens for the guest's connections to `port`.
fn host_port_path(uds_path: &Path, port: HostPort) -> PathBuf {
    let mut path = uds_path.as_os_str().to_owned();
    path.push(format!("_{}", port.0));
    path.into()
}

#[cfg(test)]
mod tests;
