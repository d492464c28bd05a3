//! The table of connections between one guest and its peers.
//!
//! Every packet from the guest is consumed here, whatever it is: it goes to its connection, opens one, or is answered with
//! RST, as virtio 1.2, 5.10.6.4.2 asks of a device. What is pending for the guest is scheduled here too: resets first, then
//! the connections that have something to send, in turn. Connections are opened and closed nowhere else.
//!
//! Each concern has one owner, which forgets a connection with one `remove`:
//!
//! ```text
//! connections   the connections, by token and by ports        slots, slot_list   the tables and queues that these are made of
//! clients       host programs without a CONNECT line yet      event_source       what an epoll event belongs to
//! deadlines     when connections are reset
//! resets        RSTs for the guest
//! ```

mod clients;
mod connections;
mod deadlines;
pub mod event_source;
mod resets;
mod slot_list;
mod slots;
#[cfg(test)]
mod tests;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use log::{debug, trace};
use thiserror::Error;

use clients::{Client, Clients};
use connections::Connections;
use deadlines::Deadlines;
use event_source::{EventSource, Token};
use resets::Resets;
use slot_list::SlotList;

use crate::config::VmConfig;
use crate::host::connect_line::Progress;
use crate::host::routes::{DialError, Dialed, Routes};
use crate::host::socket::HostSocket;
use crate::metrics::counters::{CloseReason, Counters, Side, VmSnapshot};
use crate::packet::header::{Cid, GuestPort, Op, PacketType, PeerAddr, VsockHeader};
use crate::packet::{RxBatch, RxBuffer, TxBatch, VsockPacket};
use crate::rxops::RxOps;
use crate::vsock_conn::{ConnKey, Dialing, Readiness, Verdict, VsockConnection};

/// The first host port that is given out. From here on to 65535 a port has at most five digits, which is all that
/// some readers of the `OK` line expect.
const FIRST_HOST_PORT: u32 = 1024;
const HOST_PORTS: u32 = 65536 - FIRST_HOST_PORT;

/// How many connections are flushed without an event in one round.
const MAX_FLUSHES: usize = 8;

/// Where sockets are registered for readiness, once, for their whole life.
pub trait Registry: Send {
    /// Registers `socket`, or gives one that is registered another source: its events come back with `source`.
    fn register(&self, socket: BorrowedFd<'_>, source: EventSource) -> io::Result<()>;
}

/// Why a connection is not opened.
#[derive(Debug, Error)]
enum OpenError {
    #[error("at the limit of connections")]
    Limit,
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("can't watch the socket: {0}")]
    Register(#[from] io::Error),
}

/// The connections of one guest.
pub struct VsockThreadBackend {
    guest_cid: Cid,
    tx_buffer_size: u32,
    max_connections: usize,
    routes: Routes,
    registry: Box<dyn Registry>,
    connections: Connections,
    clients: Clients,
    deadlines: Deadlines,
    resets: Resets,
    /// Connections with something pending for the guest, in the order in which they are served.
    ready: SlotList,
    /// Connections that can flush without an event.
    flushable: SlotList,
    next_host_port: u32,
    counters: Counters,
}

impl VsockThreadBackend {
    /// An empty table for the guest of `config`. New sockets are registered with `registry`.
    pub fn new(config: &VmConfig, registry: Box<dyn Registry>) -> Self {
        Self {
            guest_cid: config.guest_cid,
            tx_buffer_size: config.tx_buffer_size,
            max_connections: config.max_connections,
            routes: Routes::new(&config.uds_path),
            registry,
            connections: Connections::default(),
            clients: Clients::default(),
            deadlines: Deadlines::default(),
            resets: Resets::default(),
            ready: SlotList::default(),
            flushable: SlotList::default(),
            next_host_port: RandomState::new().build_hasher().finish() as u32,
            counters: Counters::default(),
        }
    }

    /// The counters, for whoever else sees things happen.
    pub fn counters(&mut self) -> &mut Counters {
        &mut self.counters
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.connections.open()
    }

    /// The state at this moment.
    pub fn snapshot(&self, vmm_connected: bool) -> VmSnapshot {
        VmSnapshot {
            cid: self.guest_cid,
            vmm_connected,
            counters: self.counters.clone(),
            handshaking: self.clients.len(),
            connections: self
                .connections
                .iter()
                .map(|(_, conn)| conn.stats())
                .collect(),
        }
    }
}

// Between the guest and the connections.
impl VsockThreadBackend {
    /// Takes packets from the guest. Each is consumed, whatever it is.
    pub fn send_pkts(&mut self, batch: &TxBatch<'_>) {
        let mut rest = batch.packets();
        let len = |packet: &VsockPacket| u64::from(packet.header().len);
        self.counters.from_guest.packets += rest.len() as u64;
        self.counters.from_guest.bytes += rest.iter().map(len).sum::<u64>();
        while let Some(first) = rest.first() {
            let (packets, after) = rest.split_at(run_length(first.header(), rest));
            self.send_run(batch, packets);
            rest = after;
        }
    }

    /// How many bytes of payload the guest's next buffers are to hold: 0 for a packet without payload, none when nothing is
    /// pending.
    pub fn rx_size(&self) -> Option<usize> {
        if !self.resets.is_empty() {
            return Some(0);
        }
        let token = self.connections.token(self.ready.first()?)?;
        self.connections.get(token)?.conn.rx_size()
    }

    /// Puts what is pending first into `batch`, which was made for [`VsockThreadBackend::rx_size`] and is not empty.
    pub fn recv_pkts(&mut self, batch: &mut RxBatch<'_>) {
        if let Some(reset) = self.resets.pop() {
            batch.fill_header(&reset);
        } else if let Some(token) = self
            .ready
            .pop()
            .and_then(|slot| self.connections.token(slot))
            && let Some(entry) = self.connections.get_mut(token)
        {
            let is_stalled = entry.conn.pending() == Some(RxOps::CreditRequest);
            let verdict = entry.conn.recv_pkt(batch);
            self.counters.credit_stalls += u64::from(is_stalled);
            self.settle(token, verdict);
        }
        let filled = batch.filled();
        self.counters.to_guest.packets += filled.len() as u64;
        self.counters.to_guest.bytes += filled.iter().map(RxBuffer::payload).sum::<u64>();
    }

    /// The guest has got what [`VsockThreadBackend::recv_pkts`] has filled.
    pub fn rx_delivered(&mut self) {
        self.resets.close_sent();
    }

    /// The guest has no buffers now.
    pub fn rx_starved(&mut self) {
        self.resets.close_waiting();
    }

    /// Takes one packet, or consecutive RW packets of one connection.
    fn send_run(&mut self, batch: &TxBatch<'_>, packets: &[VsockPacket]) {
        let Some(first) = packets.first() else { return };
        let header = first.header();
        trace!("from the guest, {} times: {header:?}", packets.len());
        if header.guest_cid != self.guest_cid {
            self.counters.foreign += packets.len() as u64;
            let (cid, count) = (header.guest_cid, self.counters.foreign);
            return debug!("dropped a packet from CID {cid}, {count} from foreign CIDs so far");
        }
        let token = self.connections.find(&ConnKey::of(header));
        let token = token.filter(|_| header.packet_type == PacketType::Stream);
        if let Some(token) = token
            && let Some(entry) = self.connections.get_mut(token)
        {
            let verdict = match header.op {
                Op::Rw => entry.conn.send_payload(batch, packets),
                _ => entry.conn.send_pkt(header),
            };
            self.settle(token, verdict);
        } else if header.op == Op::Request {
            self.open(header);
        } else {
            self.refuse(header);
        }
    }

    /// Answers a packet that belongs to no connection.
    fn refuse(&mut self, header: &VsockHeader) {
        // An RST is never answered, or two ends could go on answering each other.
        if header.op != Op::Rst {
            self.push_reset(header.reset(), None);
        }
    }

    fn push_reset(&mut self, reset: VsockHeader, socket: Option<HostSocket>) {
        self.counters.resets += 1;
        if self.resets.push(reset, socket).is_err() {
            self.counters.resets_lost += 1;
            let lost = self.counters.resets_lost;
            debug!("{lost} resets lost so far: the guest takes none");
        }
    }
}

/// How many of the packets, which begin with `first`, are handled at once: consecutive RW packets of one connection.
fn run_length(first: &VsockHeader, packets: &[VsockPacket]) -> usize {
    if first.op != Op::Rw {
        return 1;
    }
    let key = ConnKey::of(first);
    let belongs = |packet: &&VsockPacket| {
        let header = packet.header();
        header.op == Op::Rw
            && header.packet_type == first.packet_type
            && header.guest_cid == first.guest_cid
            && ConnKey::of(header) == key
    };
    packets.iter().take_while(belongs).count()
}

// Between the host's sockets and the connections.
impl VsockThreadBackend {
    /// Takes an event of the socket that was registered with `token`.
    pub fn socket_ready(&mut self, token: Token, ready: Readiness) {
        if let Some(entry) = self.connections.get_mut(token) {
            let verdict = entry.conn.socket_ready(ready);
            self.settle(token, verdict);
        }
    }

    /// Goes on flushing connections whose last flush has ended at its limit and not at a full socket. False when there was
    /// none.
    pub fn flush(&mut self) -> bool {
        let count = self.flushable.len().min(MAX_FLUSHES);
        for _ in 0..count {
            if let Some(token) = self
                .flushable
                .pop()
                .and_then(|slot| self.connections.token(slot))
                && let Some(entry) = self.connections.get_mut(token)
            {
                let verdict = entry.conn.flush();
                self.settle(token, verdict);
            }
        }
        count > 0
    }

    /// Takes a host program that has just connected.
    pub fn add_client(&mut self, socket: HostSocket) {
        self.counters.clients += 1;
        let mut client = Client::new(socket);
        // Most clients write their line right after connecting.
        match client.read_line() {
            Progress::Complete { port, .. } => self.connect_guest(client.socket, GuestPort(port)),
            Progress::Incomplete => self.await_line(client),
            Progress::Invalid => self.drop_client("no CONNECT line"),
        }
    }

    /// Takes an event of a client's socket.
    pub fn client_ready(&mut self, token: Token) {
        let Some(client) = self.clients.get_mut(token) else {
            return;
        };
        match client.read_line() {
            Progress::Incomplete => {}
            Progress::Invalid => {
                self.clients.remove(token);
                self.drop_client("no CONNECT line");
            }
            Progress::Complete { port, .. } => {
                if let Some(client) = self.clients.remove(token) {
                    self.connect_guest(client.socket, GuestPort(port));
                }
            }
        }
    }

    fn await_line(&mut self, client: Client) {
        if self.clients.is_full()
            && let Some(oldest) = self.clients.oldest()
        {
            self.clients.remove(oldest);
            self.drop_client("too many without a CONNECT line, this is the oldest");
        }
        let registry = &self.registry;
        let added = self.clients.try_insert(|token| {
            registry.register(client.socket.as_fd(), EventSource::Client(token))?;
            io::Result::Ok(client)
        });
        if let Err(error) = added {
            self.drop_client(&format!("can't watch the socket: {error}"));
        }
    }

    fn drop_client(&mut self, why: &str) {
        self.counters.clients_dropped += 1;
        debug!("a client was closed: {why}");
    }
}

// Opening connections.
impl VsockThreadBackend {
    /// Opens the connection that a guest's REQUEST asks for, or refuses it.
    fn open(&mut self, request: &VsockHeader) {
        match self.try_open(request) {
            Ok(token) => {
                self.counters.opened[Side::Guest as usize] += 1;
                debug!("{} opened by the guest", name(ConnKey::of(request)));
                self.settle(token, Verdict::Open);
            }
            Err(error) => {
                debug!("{} refused: {error}", name(ConnKey::of(request)));
                self.counters.refused += 1;
                self.refuse(request);
            }
        }
    }

    fn try_open(&mut self, request: &VsockHeader) -> Result<Token, OpenError> {
        self.check_limit()?;
        // The peer is asked first: a lingering connection makes room for a connection, not for an attempt at one.
        let dialed = self.routes.dial(request.peer, request.packet_type)?;
        self.make_room();
        let conn = match dialed {
            Dialed::Connected(socket) => {
                VsockConnection::accepted(request, socket, self.tx_buffer_size)
            }
            Dialed::Connecting(socket) => {
                let dialing = Dialing::Connect;
                VsockConnection::dialing(request, socket, dialing, self.tx_buffer_size)
            }
        };
        Ok(self.insert(conn)?)
    }

    /// Connects a host program to the guest's `port`, which it has asked for.
    fn connect_guest(&mut self, socket: HostSocket, port: GuestPort) {
        match self.try_connect_guest(socket, port) {
            Ok(token) => {
                self.counters.opened[Side::Host as usize] += 1;
                self.settle(token, Verdict::Open);
            }
            Err(error) => self.drop_client(&format!("guest port {}: {error}", port.0)),
        }
    }

    fn try_connect_guest(
        &mut self,
        socket: HostSocket,
        port: GuestPort,
    ) -> Result<Token, OpenError> {
        self.check_limit()?;
        let key = self.free_key(port).ok_or(OpenError::Limit)?;
        self.make_room();
        let conn = VsockConnection::requested(self.guest_cid, key, socket, self.tx_buffer_size);
        let token = self.insert(conn)?;
        debug!("{} requested by a client", name(key));
        Ok(token)
    }

    /// A key for a new connection to the guest's `port`, with the next host port that is free with it.
    fn free_key(&mut self, port: GuestPort) -> Option<ConnKey> {
        (0..HOST_PORTS).find_map(|_| {
            self.next_host_port = self.next_host_port.wrapping_add(1);
            let key = ConnKey {
                guest: port,
                peer: PeerAddr::host(FIRST_HOST_PORT + self.next_host_port % HOST_PORTS),
            };
            (!self.connections.contains(&key)).then_some(key)
        })
    }

    fn check_limit(&self) -> Result<(), OpenError> {
        if self.connections.open() < self.max_connections {
            Ok(())
        } else {
            Err(OpenError::Limit)
        }
    }

    /// Closes the oldest lingering connection if one more connection would exceed the limit.
    fn make_room(&mut self) {
        if self.connections.len() < self.max_connections {
            return;
        }
        if let Some(oldest) = self.connections.oldest_lingering() {
            self.close(oldest, CloseReason::Evicted);
        }
    }

    /// Puts a connection into the table, and its socket into the event loop.
    fn insert(&mut self, conn: VsockConnection) -> io::Result<Token> {
        let registry = &self.registry;
        self.connections.try_insert(|token| {
            registry.register(conn.socket(), EventSource::Connection(token))?;
            Ok(conn)
        })
    }
}

// Closing connections.
impl VsockThreadBackend {
    /// The earliest time at which [`VsockThreadBackend::expire`] has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        let (connections, clients) = (self.deadlines.next(), self.clients.next_deadline());
        connections.into_iter().chain(clients).min()
    }

    /// Ends what has not come to its end in time.
    pub fn expire(&mut self, now: Instant) {
        while let Some(token) = self.deadlines.expired(now) {
            self.reset_connection(token, CloseReason::Timeout);
        }
        while let Some(token) = self.clients.expired(now) {
            self.clients.remove(token);
            self.drop_client("no CONNECT line in time");
        }
    }

    /// The device starts anew: the guest has lost all its connections. Bytes that belong to host programs are still kept for
    /// them.
    pub fn reset(&mut self) {
        let open: Vec<Token> = self.connections.iter().map(|(token, _)| token).collect();
        for token in open {
            self.close(token, CloseReason::DeviceReset);
        }
        self.resets.clear();
    }

    /// There is no guest any more: closes its connections, and the clients that wait for one.
    pub fn disconnect(&mut self) {
        while let Some(token) = self.clients.oldest() {
            self.clients.remove(token);
            self.drop_client("the VMM is gone");
        }
        self.reset();
    }

    /// Does what follows from anything that a connection was given. This is the only place that knows whether it is to be
    /// served, watched or closed.
    fn settle(&mut self, token: Token, verdict: Verdict) {
        match verdict {
            Verdict::Close(reason) => return self.close(token, reason),
            Verdict::Reset(reason) => return self.reset_connection(token, reason),
            Verdict::Open => {}
        }
        let Some(entry) = self.connections.get_mut(token) else {
            return;
        };
        let (old, new) = (entry.deadline, entry.conn.deadline());
        entry.deadline = new;
        self.deadlines.replace(token, old, new);
        if entry.conn.rx_size().is_some() {
            self.ready.push(token.slot);
        } else {
            self.ready.remove(token.slot);
        }
        if entry.conn.can_flush() {
            self.flushable.push(token.slot);
        } else {
            self.flushable.remove(token.slot);
        }
    }

    /// Closes a connection without a word to the guest.
    fn close(&mut self, token: Token, reason: CloseReason) {
        drop(self.release(token, reason));
    }

    /// Closes a connection with an RST, if the guest knows of it.
    fn reset_connection(&mut self, token: Token, reason: CloseReason) {
        let Some(entry) = self.connections.get(token) else {
            return;
        };
        // A guest that has sent what does not fit knows the ports, even where our REQUEST is still pending.
        let is_known = entry.conn.known_to_guest() || reason == CloseReason::Protocol;
        let header =
            (is_known && !self.connections.is_lingering(token)).then(|| entry.conn.reset_header());
        let socket = self.release(token, reason);
        if let Some(header) = header {
            self.push_reset(header, socket);
        }
    }

    /// Takes a connection out of the table, and returns its socket to be closed. One that has bytes for its host program
    /// stays and lingers until they are sent, or until it is released once more.
    fn release(&mut self, token: Token, reason: CloseReason) -> Option<HostSocket> {
        let entry = self.connections.get_mut(token)?;
        let deadline = entry.deadline.take();
        let (key, is_flushing) = (entry.conn.key(), entry.conn.is_flushing());
        let can_flush = entry.conn.can_flush();
        self.deadlines.remove(token, deadline);
        self.ready.remove(token.slot);
        self.flushable.remove(token.slot);
        if !self.connections.is_lingering(token) {
            debug!("{} closed: {}", name(key), reason.name());
            self.counters.ended[reason as usize] += 1;
            if is_flushing {
                self.connections.linger(token);
                if can_flush {
                    self.flushable.push(token.slot);
                }
                return None;
            }
        }
        let entry = self.connections.remove(token)?;
        Some(entry.conn.into_socket())
    }
}

/// A connection's name in the log.
fn name(key: ConnKey) -> String {
    format!("connection {} <-> {}", key.guest.0, key.peer)
}
