//! The table of connections between one guest and its peers.
//!
//! Every packet from the guest is consumed here, whatever it is: it goes to its connection, opens one, or is answered with
//! RST, as virtio 1.2, 5.10.6.4.2 asks of a device. Connections are opened and closed nowhere else. Who is served next is the
//! worker's choice; what that has cost is counted here.
//!
//! Each concern has one owner, which forgets a connection with one `remove`:
//!
//! ```text
//! connections   the connections, by token and by ports        opening            how they come into the table
//! clients       host programs without a connection yet        cost               what work costs
//! deadlines     when connections are reset                    slots, slot_list   the tables and queues that these are made of
//! pending       packets for the guest, by kind                event_source       what an epoll event belongs to
//! resets        RSTs for the guest                             siblings           how other guests come into the table
//! journal       the ports, for the daemon after a crash        saved              how all of it goes to another process
//! room          which sockets are watched for room
//! ```

mod clients;
mod connections;
pub mod cost;
mod deadlines;
pub mod event_source;
pub mod journal;
mod opening;
mod pending;
mod resets;
mod room;
pub mod saved;
mod siblings;
mod slot_list;
mod slots;
#[cfg(test)]
mod tests;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use log::{debug, trace, warn};

use clients::Clients;
use connections::{Connections, Places};
use deadlines::Deadlines;
use event_source::{EventSource, Token};
use journal::Journal;
use pending::Pending;
pub use pending::RxSource;
use resets::Held;
use room::{MAX_IN_VAIN, Unwatched};
use slot_list::SlotList;

use crate::config::VmConfig;
use crate::host::connect_line;
use crate::host::routes::Routes;
use crate::log_limit::LogLimit;
use crate::metrics::counters::{
    CallFailure, CloseReason, ConnectionStats, Counters, Side, VmSnapshot,
};
use crate::packet::header::{Cid, Op, PacketType, PeerAddr, VsockHeader};
use crate::packet::{RxBatch, RxBuffer, TxBatch, VsockPacket};
use crate::rxops::RxOps;
use crate::vsock_conn::{ConnKey, Readiness, Verdict};

/// How many packets [`VsockThreadBackend::send_pkts`] takes at most.
pub const MAX_BATCH: usize = 256;

/// Where sockets are registered for readiness, for their whole life.
pub trait Registry: Send {
    /// Registers `socket`, or gives one that is registered another source: its events come back with `source`.
    fn register(&self, socket: BorrowedFd<'_>, source: EventSource) -> io::Result<()>;

    /// Has events for room in a socket that is registered, or none any more. All other events stay, and what is there comes once
    /// more.
    fn watch_room(&self, socket: BorrowedFd<'_>, source: EventSource, watch: bool);
}

/// The types of connections that the guest's driver has (virtio 1.2, 5.10.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Types {
    /// Streams.
    pub stream: bool,
    /// Messages.
    pub seqpacket: bool,
}

impl Types {
    /// What a driver has that has negotiated nothing.
    pub const STREAM: Self = Self {
        stream: true,
        seqpacket: false,
    };

    fn contains(self, packet_type: PacketType) -> bool {
        match packet_type {
            PacketType::Stream => self.stream,
            PacketType::Seqpacket => self.seqpacket,
            PacketType::Unknown(_) => false,
        }
    }
}

/// The connections of one guest.
pub struct VsockThreadBackend {
    guest_cid: Cid,
    tx_buffer_size: u32,
    types: Types,
    routes: Routes,
    registry: Box<dyn Registry>,
    connections: Connections,
    clients: Clients,
    /// How long they wait for the guest.
    wait_for_guest: Duration,
    /// A VMM is connected.
    has_vmm: bool,
    /// The guest's driver has started the device.
    has_guest: bool,
    deadlines: Deadlines,
    pending: Pending,
    /// Connections that can flush without an event.
    flushable: SlotList,
    unwatched: Unwatched,
    /// Where nobody has listened for a REQUEST of the batch that is being taken. A guest that asks again and again is
    /// answered without asking the system as often.
    nobody_at: Option<(PeerAddr, PacketType)>,
    next_host_port: u32,
    too_long_log: LogLimit,
    /// What was done since the worker has asked.
    cost: usize,
    counters: Counters,
}

impl VsockThreadBackend {
    /// An empty table for the guest of `config`. New sockets are registered with `registry`.
    pub fn new(config: &VmConfig, registry: Box<dyn Registry>) -> Self {
        Self {
            guest_cid: config.guest_cid,
            tx_buffer_size: config.tx_buffer_size,
            types: Types::STREAM,
            routes: Routes::new(config),
            registry,
            connections: Connections::new(Places::new(config.max_connections)),
            clients: Clients::new(config.max_clients),
            wait_for_guest: config.wait_for_guest,
            has_vmm: false,
            has_guest: false,
            deadlines: Deadlines::default(),
            pending: Pending::default(),
            flushable: SlotList::default(),
            unwatched: Unwatched::default(),
            nobody_at: None,
            next_host_port: RandomState::new().build_hasher().finish() as u32,
            too_long_log: LogLimit::default(),
            cost: 0,
            counters: Counters::default(),
        }
    }

    /// Lists the ports of the connections in `journal`, from now on and those that there are.
    pub fn set_journal(&mut self, journal: Journal) {
        self.connections.set_journal(journal);
        self.list_resets();
    }

    fn list_resets(&mut self) {
        let connections = &self.connections;
        self.pending.resets.list_all(|key| connections.list(key));
    }

    /// Takes the types of connections that the driver has chosen.
    pub fn set_types(&mut self, types: Types) {
        self.types = types;
    }

    /// The counters, for whoever else sees things happen.
    pub fn counters(&mut self) -> &mut Counters {
        &mut self.counters
    }

    /// What was done since the last call, in the units of [`cost`].
    pub fn take_cost(&mut self) -> usize {
        std::mem::take(&mut self.cost)
    }

    /// Notes what others have done for it.
    pub fn add_cost(&mut self, cost: usize) {
        self.cost += cost;
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.connections.open()
    }

    /// The state at this moment.
    pub fn snapshot(&self) -> VmSnapshot {
        let now = Instant::now();
        VmSnapshot {
            cid: self.guest_cid,
            vmm_connected: self.has_vmm,
            driver_started: self.has_guest,
            counters: self.counters.clone(),
            handshaking: self.clients.handshaking(),
            waiting: self.clients.waiting(),
            connections: self
                .connections
                .iter()
                .map(|(token, conn)| ConnectionStats {
                    age: self.connections.age(token, now),
                    ..conn.stats()
                })
                .collect(),
        }
    }
}

// Between the guest and the connections.
impl VsockThreadBackend {
    /// Whether there is room for the answers to more packets from the guest. Where not, packets are to be left in the ring: the
    /// guest must take answers first.
    pub fn has_room(&self) -> bool {
        self.pending.resets.has_room()
    }

    /// Whether packets are to be taken although there is no room, if the guest has no buffers now: it has taken none for so long
    /// that it loses answers.
    pub fn gave_up(&self) -> bool {
        self.pending.resets.gave_up()
    }

    /// Takes packets from the guest, at most [`MAX_BATCH`]. Each is consumed, whatever it is.
    pub fn send_pkts(&mut self, batch: &TxBatch<'_>) {
        let mut rest = batch.packets();
        let len = |packet: &VsockPacket| u64::from(packet.header().len);
        self.counters.from_guest.packets += rest.len() as u64;
        self.counters.from_guest.bytes += rest.iter().map(len).sum::<u64>();
        self.nobody_at = None;
        while let Some(first) = rest.first() {
            let (packets, after) = rest.split_at(run_length(first.header(), rest));
            self.send_run(batch, packets);
            rest = after;
        }
        self.routes.rest();
    }

    /// Whether something is pending for the guest.
    pub fn has_pending(&self, source: RxSource) -> bool {
        !self.pending.is_empty(source)
    }

    /// How many bytes of payload the guest's next buffers are to hold: 0 for a packet without payload, none when nothing of
    /// this source is pending.
    pub fn rx_size(&self, source: RxSource) -> Option<usize> {
        if source == RxSource::Resets {
            return self.has_pending(source).then_some(0);
        }
        let token = self.connections.token(self.pending.first(source)?)?;
        self.connections.get(token)?.conn.rx_size()
    }

    /// Puts what is pending first of `source` into `batch`, which was made for [`VsockThreadBackend::rx_size`] and is not
    /// empty.
    pub fn recv_pkts(&mut self, source: RxSource, batch: &mut RxBatch<'_>) {
        if source == RxSource::Resets {
            if let Some(reset) = self.pending.resets.pop() {
                batch.fill_header(&reset);
            }
        } else if let Some(token) = self
            .pending
            .pop(source)
            .and_then(|slot| self.connections.token(slot))
            && let Some(entry) = self.connections.get_mut(token)
        {
            let op = entry.conn.pending();
            let verdict = entry.conn.recv_pkt(batch);
            if op == Some(RxOps::Rw) {
                self.cost += cost::TRANSFER;
            }
            self.counters.credit_stalls += u64::from(op == Some(RxOps::CreditRequest));
            self.settle(token, verdict);
        }
        let filled = batch.filled();
        let bytes = filled.iter().map(RxBuffer::payload).sum::<u64>();
        self.counters.to_guest.packets += filled.len() as u64;
        self.counters.to_guest.bytes += bytes;
        self.cost += filled.len() * cost::PACKET + bytes as usize;
    }

    /// The guest has got what [`VsockThreadBackend::recv_pkts`] has filled.
    pub fn rx_delivered(&mut self) {
        self.pending.resets.close_sent();
    }

    /// The guest has no buffers now.
    pub fn rx_starved(&mut self) {
        self.pending.resets.starved();
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
        if let Some(token) = token
            && let Some(entry) = self.connections.get_mut(token)
        {
            let verdict = match header.op {
                Op::Rw => {
                    self.cost += cost::TRANSFER * transfers(packets);
                    entry.conn.send_payload(batch, packets)
                }
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
            self.push_reset(header.reset(), Held::default());
        }
    }

    fn push_reset(&mut self, reset: VsockHeader, mut held: Held) {
        self.counters.resets += 1;
        if !held.listed.is_some() {
            held.listed = self.connections.list(ConnKey::of(&reset));
        }
        if self.pending.resets.push(reset, held).is_err() {
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

/// How often consecutive RW packets of one connection are sent to its socket: messages one by one.
fn transfers(packets: &[VsockPacket]) -> usize {
    let ends = |packet: &&VsockPacket| {
        let header = packet.header();
        header.packet_type == PacketType::Seqpacket && header.ends_message()
    };
    packets.iter().filter(ends).count().max(1)
}

// Between the host's sockets and the connections.
impl VsockThreadBackend {
    /// Takes an event of the socket that was registered with `token`.
    pub fn socket_ready(&mut self, token: Token, ready: Readiness) {
        let Some(entry) = self.connections.get_mut(token) else {
            return;
        };
        let is_in_vain = entry.conn.is_in_vain(ready);
        let verdict = entry.conn.socket_ready(ready);
        if is_in_vain {
            entry.in_vain += 1;
            if entry.in_vain == MAX_IN_VAIN {
                self.watch_room(token, false);
            }
        }
        self.settle(token, verdict);
    }

    /// Watches the socket of a connection for room, or does no longer.
    fn watch_room(&mut self, token: Token, watch: bool) {
        let Some(entry) = self.connections.get_mut(token) else {
            return;
        };
        entry.in_vain = 0;
        if watch {
            self.unwatched.remove(token.slot);
        } else {
            self.unwatched.add(token.slot);
        }
        let source = EventSource::Connection(token);
        self.registry.watch_room(entry.conn.socket(), source, watch);
    }

    /// Whether [`VsockThreadBackend::flush`] has something to do.
    pub fn can_flush(&self) -> bool {
        self.flushable.len() > 0
    }

    /// Goes on flushing the connection that has waited longest.
    pub fn flush(&mut self) {
        if let Some(token) = self
            .flushable
            .pop()
            .and_then(|slot| self.connections.token(slot))
            && let Some(entry) = self.connections.get_mut(token)
        {
            let (bytes, messages) = (entry.conn.buffered(), entry.conn.messages());
            let verdict = entry.conn.flush();
            let transfers = (messages - entry.conn.messages()).max(1);
            self.cost += cost::TRANSFER * transfers + (bytes - entry.conn.buffered());
            self.settle(token, verdict);
        }
    }
}

// Closing connections.
impl VsockThreadBackend {
    /// The earliest time at which [`VsockThreadBackend::expire`] has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        let deadlines = [
            self.deadlines.next(),
            self.clients.next_deadline(),
            self.pending.resets.deadline(),
            self.unwatched.deadline(),
        ];
        deadlines.into_iter().flatten().min()
    }

    /// Ends what has not come to its end in time.
    pub fn expire(&mut self, now: Instant) {
        while let Some(token) = self.deadlines.expired(now) {
            self.reset_connection(token, CloseReason::Timeout);
        }
        while let Some(token) = self.clients.expired(now) {
            if !self.clients.retry(token, now) {
                let Some(client) = self.clients.remove(token) else {
                    continue;
                };
                if !client.has_line() {
                    self.drop_without_line(&client, "no CONNECT line in time");
                    continue;
                }
                // Where there is a guest, it has refused each of the REQUESTs.
                let failure = match self.has_guest {
                    true => CallFailure::NobodyListens,
                    false => self.no_guest(),
                };
                let why = "the guest has not accepted it in time";
                self.drop_client(client.side(), Some(&client.socket), failure, why);
            }
        }
        self.pending.resets.expire(now);
        while let Some(slot) = self.unwatched.expired(now) {
            match self.connections.token(slot) {
                Some(token) => self.watch_room(token, true),
                None => self.unwatched.remove(slot),
            }
        }
    }

    /// The device starts anew: the guest has lost all its connections. Bytes that belong to host programs are still kept for
    /// them.
    pub fn reset(&mut self) {
        self.has_guest = false;
        let open: Vec<Token> = self.connections.iter().map(|(token, _)| token).collect();
        for token in open {
            self.close(token, CloseReason::DeviceReset);
        }
        self.pending.resets.clear();
    }

    /// There is no guest any more: closes its connections, and the clients that do not wait for the next one.
    pub fn disconnect(&mut self) {
        self.has_vmm = false;
        while let Some(token) = self
            .clients
            .oldest_that_leaves(!self.wait_for_guest.is_zero())
        {
            if let Some(client) = self.clients.remove(token) {
                let (side, socket) = (client.side(), Some(&client.socket));
                self.drop_client(side, socket, CallFailure::NoVmm, "the VMM is gone");
            }
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
        if !entry.conn.is_requested() && entry.waiting.take().is_some() {
            self.clients.end_request();
        }
        let is_attempt = entry.waiting.is_some() || entry.conn.is_dialing();
        if !is_attempt && !std::mem::replace(&mut entry.is_counted, true) {
            self.counters.opened[entry.opened_by as usize] += 1;
        }
        self.pending.replace(token.slot, &entry.conn);
        if entry.conn.can_flush() {
            self.flushable.push(token.slot);
        } else {
            self.flushable.remove(token.slot);
        }
        let waits_for_room = entry.conn.waits_for_host();
        if entry.conn.is_deserted() {
            self.connections.desert(token);
        } else {
            self.connections.resume(token);
        }
        if waits_for_room && self.unwatched.contains(token.slot) {
            self.watch_room(token, true);
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
        if reason == CloseReason::MessageTooLong
            && let Some((len, window)) = entry.conn.too_long()
        {
            self.too_long_log.log(|| {
                let name = name(entry.conn.key());
                warn!("{name} is reset: a message of {len} bytes is longer than the guest's receive buffer of {window}");
            });
        }
        // A guest that has sent what does not fit knows the ports, even where our REQUEST is still pending.
        let is_known = entry.conn.known_to_guest() || reason == CloseReason::Protocol;
        let header =
            (is_known && !self.connections.is_lingering(token)).then(|| entry.conn.reset_header());
        let held = self.release(token, reason);
        if let Some(header) = header {
            self.push_reset(header, held);
        }
    }

    /// Takes a connection out of the table, and returns its socket to be closed, and its entry in the journal. One that has bytes for its host program
    /// stays and lingers until they are sent, or until it is released once more. The client of one that the guest has not accepted
    /// may wait on.
    fn release(&mut self, token: Token, reason: CloseReason) -> Held {
        if self.unwatched.contains(token.slot) {
            // Whoever has the socket next, it is as it was.
            self.watch_room(token, true);
        }
        let Some(entry) = self.connections.get_mut(token) else {
            return Held::default();
        };
        let deadline = entry.deadline.take();
        let listed = std::mem::take(&mut entry.listed);
        let (key, is_flushing) = (entry.conn.key(), entry.conn.is_flushing());
        let can_flush = entry.conn.can_flush();
        self.deadlines.remove(token, deadline);
        self.pending.remove(token.slot);
        self.flushable.remove(token.slot);
        if let Some(waiting) = self.waits_on(token, reason) {
            debug!("{} not accepted: {}", name(key), reason.name());
            if let Some(entry) = self.connections.remove(token) {
                self.await_guest(entry.conn.into_socket(), waiting);
            }
            return listed.into();
        }
        if !self.connections.is_lingering(token) {
            debug!("{} closed: {}", name(key), reason.name());
            self.count_end(token, reason);
            if is_flushing {
                self.connections.linger(token);
                if can_flush {
                    self.flushable.push(token.slot);
                }
                return listed.into();
            }
        }
        let entry = self.connections.remove(token);
        if self.connections.is_empty() {
            self.pending.give_back();
            self.flushable.give_back();
            self.unwatched.give_back();
        }
        let socket = entry.map(|entry| {
            let is_refused = entry.conn.is_requested();
            let socket = entry.conn.into_socket();
            if is_refused {
                connect_line::refuse(&socket, self.failure_of(reason));
            }
            socket
        });
        Held { socket, listed }
    }

    /// Counts the end of a connection. A guest's REQUEST that nobody has accepted was refused, and was none.
    fn count_end(&mut self, token: Token, reason: CloseReason) {
        let Some(entry) = self.connections.get(token) else {
            return;
        };
        if entry.conn.is_dialing() && matches!(reason, CloseReason::Refused | CloseReason::Timeout)
        {
            self.counters.refused += 1;
            let failure = self.failure_of(reason);
            self.counters.failed[Side::Guest as usize][failure as usize] += 1;
            return;
        }
        if entry.conn.is_requested() {
            let failure = self.failure_of(reason);
            self.counters.failed[entry.opened_by as usize][failure as usize] += 1;
        }
        if !entry.is_counted {
            self.counters.opened[entry.opened_by as usize] += 1;
        }
        self.counters.ended[reason as usize] += 1;
    }
}

/// A connection's name in the log.
fn name(key: ConnKey) -> String {
    format!("connection {} <-> {}", key.guest.0, key.peer)
}
