//! One connection between a guest program and its peer, which is usually a host program.
//!
//! # Protocol
//!
//! A connection is named by the ports and CIDs of its two ends (virtio 1.2, 5.10.6). Either side begins one with REQUEST, and
//! the other accepts with RESPONSE or refuses with RST. RW packets carry the bytes, within the credit that the receiver
//! gives ([`Credit`]). SHUTDOWN ends one direction or both; a side that gets SHUTDOWN for both and has nothing more to do
//! with the bytes confirms with RST, which frees the ports. RST at any other time aborts.
//!
//! A guest's `connect`, a request, an answer, and its `close`:
//!
//! ```text
//! guest 4:40001                                     daemon, for 2:80           host program at <uds-path>_80
//! REQUEST   buf_alloc 262144                   ->   connect(2)            ->   accept(2)
//!           buf_alloc 262144   RESPONSE        <-
//! RW        len 15  "GET / HTTP/1.0\n"          ->   sendmsg(2)            ->
//!           len 1024  RW                       <-   recvmsg(2)            <-   write(2)
//! SHUTDOWN  flags 3                            ->
//!                      RST                     <-   close(2)              ->   end of the stream
//! ```
//!
//! # States
//!
//! ```text
//! guest's REQUEST --> Dialing --the peer answers--> Established        Dialing is skipped where connect(2) succeeds at once
//! client's CONNECT -> Requested --RESPONSE--------> Established
//! Established --SHUTDOWN 3 from the guest--> Flushing --all sent to the host program--> RST, closed
//! Established --the host program closes----> Closing (SHUTDOWN 3 sent) --RST from the guest--> closed
//! ```
//!
//! Packets and socket events go in. Operations for the guest come out ([`RxQueue`]), and with each call the [`Verdict`] whether
//! the connection goes on. It knows no ring, no epoll and no other connection.

pub mod credit;
mod dialing;
mod filling;
mod key;
mod mover;
mod readiness;
pub mod saved;
mod seqpacket_mover;
#[cfg(test)]
mod seqpacket_tests;
mod shutdown;
mod socket_events;
mod state;
mod stream_mover;
#[cfg(test)]
mod tests;

use std::io::IoSlice;
use std::net::Shutdown as Direction;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::host::connect_line;
use crate::host::socket::HostSocket;
use crate::metrics::counters::{CloseReason, ConnectionStats, Side};
use crate::packet::header::{Cid, Op, PacketType, ShutdownFlags, VsockHeader};
use crate::packet::{RxBatch, TxBatch, VsockPacket};
use crate::rxops::RxOps;
use crate::rxqueue::RxQueue;
use credit::Credit;
pub use dialing::Dialing;
pub use key::ConnKey;
use mover::{Delivered, Mover, Wants};
pub use readiness::Readiness;
use shutdown::Shutdown;
use state::State;

/// How long the guest has to answer a REQUEST, and the peer to answer the guest's.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the guest has to confirm SHUTDOWN with its RST. Linux gives its peer as long.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// Whether a connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// It does.
    Open,
    /// It is over, and the guest knows.
    Close(CloseReason),
    /// It is over, and the guest gets an RST.
    Reset(CloseReason),
}

/// What a client hears when the guest has accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Greeting {
    /// The line `OK` with its port.
    Ok,
    /// Nothing: what comes is the guest's.
    Nothing,
}

/// A connection.
#[derive(Debug)]
pub struct VsockConnection {
    guest_cid: Cid,
    key: ConnKey,
    state: State,
    greeting: Greeting,
    deadline: Option<Instant>,
    rx_queue: RxQueue,
    credit: Credit,
    /// A CREDIT_REQUEST was sent since there was last credit.
    credit_requested: bool,
    /// The client has closed before the guest has answered.
    client_left: bool,
    mover: Mover,
    shutdown: Shutdown,
}

impl VsockConnection {
    /// The connection that a guest's REQUEST has opened: the peer behind `socket` has it.
    pub fn accepted(request: &VsockHeader, socket: HostSocket, buf_alloc: u32) -> Self {
        let mut conn = Self::new(request.guest_cid, ConnKey::of(request), socket, buf_alloc);
        conn.credit.read_from(request);
        conn.accept();
        conn
    }

    /// The connection that a guest's REQUEST asks for, before the peer behind `socket` has answered.
    pub fn dialing(
        request: &VsockHeader,
        socket: HostSocket,
        dialing: Dialing,
        buf_alloc: u32,
    ) -> Self {
        let mut conn = Self::new(request.guest_cid, ConnKey::of(request), socket, buf_alloc);
        conn.credit.read_from(request);
        conn.state = State::Dialing(Box::new(dialing));
        conn.deadline = Some(Instant::now() + ANSWER_TIMEOUT);
        conn
    }

    /// The connection that the host program behind `socket` asks for.
    pub fn requested(
        guest_cid: Cid,
        key: ConnKey,
        socket: HostSocket,
        greeting: Greeting,
        buf_alloc: u32,
    ) -> Self {
        let mut conn = Self::new(guest_cid, key, socket, buf_alloc);
        conn.greeting = greeting;
        conn.deadline = Some(Instant::now() + ANSWER_TIMEOUT);
        conn.rx_queue.add(RxOps::Request);
        conn
    }

    fn new(guest_cid: Cid, key: ConnKey, socket: HostSocket, buf_alloc: u32) -> Self {
        // The guest may send messages as long as the buffer.
        let buf_alloc = socket.reserve(buf_alloc);
        Self {
            guest_cid,
            key,
            state: State::Requested,
            greeting: Greeting::Nothing,
            deadline: None,
            rx_queue: RxQueue::default(),
            credit: Credit::new(buf_alloc),
            credit_requested: false,
            client_left: false,
            mover: Mover::new(key.packet_type, socket, buf_alloc),
            shutdown: Shutdown::default(),
        }
    }

    /// What names it.
    pub fn key(&self) -> ConnKey {
        self.key
    }

    /// Its socket, for readiness.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.mover.socket().as_fd()
    }

    /// Its socket, when it is over.
    pub fn into_socket(self) -> HostSocket {
        self.mover.into_socket()
    }

    /// Lets the guest have no longer than until then for its answer.
    pub fn answer_by(&mut self, latest: Instant) {
        self.deadline = self.deadline.map(|deadline| deadline.min(latest));
    }

    /// When it is reset unless something happens before.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether the guest has closed it properly and bytes still wait for the host program, to which they belong.
    pub fn is_flushing(&self) -> bool {
        matches!(self.state, State::Flushing) && self.mover.waits_for_host()
    }

    /// How many bytes wait for the host program.
    pub fn buffered(&self) -> usize {
        self.mover.buffered()
    }

    /// How many whole messages wait for the host program. Streams have none.
    pub fn messages(&self) -> usize {
        self.mover.messages()
    }

    /// Whether payload waits for its socket to have room.
    pub fn waits_for_host(&self) -> bool {
        self.mover.waits_for_host()
    }

    /// Whether an event of its socket says only that there is room, for which nothing waits.
    pub fn is_in_vain(&self, ready: Readiness) -> bool {
        ready == Readiness::WRITABLE && !self.is_dialing() && !self.waits_for_host()
    }

    /// Whether its client has left, and it only goes on for what the guest knows of it or may still want to read.
    pub fn is_deserted(&self) -> bool {
        self.client_left && self.is_requested()
    }

    /// Whether our REQUEST has no answer yet.
    pub fn is_requested(&self) -> bool {
        matches!(self.state, State::Requested)
    }

    /// Whether the guest's REQUEST has no answer of the peer's yet.
    pub fn is_dialing(&self) -> bool {
        matches!(self.state, State::Dialing(_))
    }

    /// Whether the payload that is pending is a part of a stream of much more.
    pub fn is_stream(&self) -> bool {
        self.mover.receives_much()
    }

    /// Whether bytes wait for the host program although its socket may have room, so that [`VsockConnection::flush`] must
    /// be called without an event.
    pub fn can_flush(&self) -> bool {
        self.mover.can_flush()
    }

    /// Whether the guest has seen a packet of it: our REQUEST may still be pending.
    pub fn known_to_guest(&self) -> bool {
        !matches!(self.state, State::Requested) || self.rx_queue.peek() != Some(RxOps::Request)
    }

    /// The operation that is pending first.
    pub fn pending(&self) -> Option<RxOps> {
        self.rx_queue.peek()
    }

    /// How many bytes of payload the guest's next buffers are to hold: 0 for a packet without payload, none when nothing is
    /// pending.
    pub fn rx_size(&self) -> Option<usize> {
        self.pending().map(|op| match op {
            RxOps::Rw => self
                .mover
                .receive_size(self.credit.guest_window(), self.credit.ours()),
            _ => 0,
        })
    }

    /// The length of the host program's next message and the guest's receive buffer, where that is too small.
    pub fn too_long(&self) -> Option<(usize, usize)> {
        let window = self.credit.guest_window();
        match &self.mover {
            Mover::Stream(_) => None,
            Mover::Seqpacket(mover) => Some((mover.too_long(window)?, window)),
        }
    }

    /// What statistics show of it.
    pub fn stats(&self) -> ConnectionStats {
        let credit = self.credit.ours();
        ConnectionStats {
            guest_port: self.key.guest,
            peer: self.key.peer,
            seqpacket: self.key.packet_type == PacketType::Seqpacket,
            state: self.state.name().into(),
            from_guest: self.credit.received(),
            to_guest: self.credit.sent(),
            buffered: self.mover.buffered(),
            credit,
            waits_for: if self.mover.waits_for_host() || matches!(self.state, State::Dialing(_)) {
                Some(Side::Host)
            } else if matches!(self.state, State::Requested) || self.credit_requested {
                Some(Side::Guest)
            } else {
                None
            },
            age: None,
        }
    }

    /// The RST that ends it.
    pub fn reset_header(&self) -> VsockHeader {
        self.header(Op::Rst)
    }

    /// Takes a packet without payload from the guest.
    pub fn send_pkt(&mut self, header: &VsockHeader) -> Verdict {
        self.credit.read_from(header);
        let verdict = match header.op {
            Op::Rst => return Verdict::Close(self.reset_reason()),
            // A guest that asks again has lost the connection.
            Op::Request | Op::Unknown(_) => return Verdict::Reset(CloseReason::Protocol),
            Op::Response => self.take_response(),
            Op::Shutdown => self.take_shutdown(header.shutdown_flags()),
            Op::CreditRequest => self.take_credit_request(),
            Op::CreditUpdate | Op::Rw => Verdict::Open,
        };
        if verdict == Verdict::Open && self.mover.buffered() > 0 {
            // A full socket has no event for a host program that stops reading, so it is probed when anything happens.
            return self.socket_ready(Readiness::default());
        }
        self.update_pending();
        verdict
    }

    /// Takes consecutive RW packets of `batch`.
    pub fn send_payload(&mut self, batch: &TxBatch<'_>, packets: &[VsockPacket]) -> Verdict {
        let is_early = matches!(self.state, State::Requested | State::Dialing(_));
        if is_early || self.shutdown.guest.contains(ShutdownFlags::SEND) {
            return Verdict::Reset(CloseReason::Protocol);
        }
        let mut credit = self.credit.guests();
        let within = packets.iter().take_while(|packet| {
            let len = packet.header().len as usize;
            let fits = len <= credit;
            credit = credit.saturating_sub(len);
            fits
        });
        let (within, past) = packets.split_at(within.count());
        let mut verdict = if past.is_empty() {
            Verdict::Open
        } else {
            Verdict::Reset(CloseReason::Protocol)
        };
        if let Some(last) = within.last() {
            self.credit.read_from(last.header());
            let delivered = self.deliver(batch, within);
            if delivered != Verdict::Open {
                verdict = delivered;
            }
        }
        self.update_pending();
        verdict
    }

    /// Takes an event of the socket.
    pub fn socket_ready(&mut self, ready: Readiness) -> Verdict {
        if matches!(self.state, State::Dialing(_)) {
            let verdict = self.continue_dialing();
            if verdict != Verdict::Open || matches!(self.state, State::Dialing(_)) {
                return verdict;
            }
            // The event that brings the answer may also be the one that says that the peer has closed.
        }
        if ready.readable {
            self.mover.set_readable();
        }
        if ready.until_empty || ready.hung_up {
            self.mover.set_until_empty();
        }
        if ready.writable {
            self.mover.set_writable();
        }
        let was_waiting = self.mover.buffered() > 0;
        if (was_waiting && !ready.writable) || (!was_waiting && ready == Readiness::WRITABLE) {
            self.probe_receiver();
        }
        if matches!(self.state, State::Requested) {
            // A socket of AF_VSOCK does not hang up.
            if ready.hung_up || ready.until_empty && self.mover.socket().peer_closed() {
                return self.client_closed();
            }
        } else if ready.hung_up {
            self.host_closed();
        }
        let dropped = was_waiting && self.mover.buffered() == 0;
        let verdict = if dropped {
            // Nothing is left to be flushed, but what was to happen behind the last byte is.
            self.flush_buffered()
        } else {
            Verdict::Open
        };
        self.update_pending();
        verdict
    }

    /// Sends more of what waits for the host program.
    pub fn flush(&mut self) -> Verdict {
        let verdict = self.flush_buffered();
        self.update_pending();
        verdict
    }

    /// Puts what is pending first into `batch`, which was made for [`VsockConnection::rx_size`] and is not empty.
    pub fn recv_pkt(&mut self, batch: &mut RxBatch<'_>) -> Verdict {
        let Some(op) = self.rx_queue.peek() else {
            return Verdict::Open;
        };
        let verdict = match op {
            RxOps::Rw => self.fill_payload(batch),
            RxOps::Shutdown => self.fill_shutdown(batch),
            RxOps::Request => self.fill(batch, Op::Request),
            RxOps::Response => self.fill(batch, Op::Response),
            RxOps::CreditUpdate => self.fill(batch, Op::CreditUpdate),
            RxOps::CreditRequest => self.fill(batch, Op::CreditRequest),
        };
        self.rx_queue.remove(op);
        self.update_pending();
        verdict
    }
}

// What the guest's packets do.
impl VsockConnection {
    fn reset_reason(&self) -> CloseReason {
        match self.state {
            State::Requested => CloseReason::Refused,
            State::Dialing(_) | State::Established => CloseReason::GuestReset,
            State::Flushing | State::Closing => CloseReason::Done,
        }
    }

    /// The guest has accepted, and a client that waits for `OK` gets it.
    fn take_response(&mut self) -> Verdict {
        if !matches!(self.state, State::Requested) || !self.known_to_guest() {
            return Verdict::Open;
        }
        self.state = State::Established;
        self.deadline = None;
        if self.greet() {
            Verdict::Open
        } else if self.mover.has_unread() {
            // It has left, but what it wrote before is still for the guest.
            self.host_closed();
            Verdict::Open
        } else {
            Verdict::Reset(CloseReason::HostGone)
        }
    }

    /// Sends the client's greeting. False when it has left.
    fn greet(&self) -> bool {
        let socket = self.mover.socket();
        match self.greeting {
            Greeting::Ok => {
                let line = connect_line::answer(self.key.peer.port.0);
                let sent = socket.send_bytes(&[IoSlice::new(line.as_bytes())]);
                matches!(sent, Ok(sent) if sent == line.len())
            }
            Greeting::Nothing => !socket.peer_closed(),
        }
    }

    /// The guest will no longer receive, send, or both.
    fn take_shutdown(&mut self, flags: ShutdownFlags) -> Verdict {
        if matches!(self.state, State::Requested | State::Dialing(_)) {
            return Verdict::Reset(CloseReason::Protocol);
        }
        let new = flags.difference(self.shutdown.guest);
        self.shutdown.guest |= flags;
        if new.contains(ShutdownFlags::SEND) {
            self.credit.count_forwarded(self.mover.drop_unfinished());
        }
        if self.shutdown.guest.is_all() {
            self.state = State::Flushing;
            self.deadline = None;
            self.rx_queue.clear();
            return self.flush_buffered();
        }
        if new.contains(ShutdownFlags::RECEIVE) {
            self.mover.socket().shutdown(Direction::Read);
        }
        if new.contains(ShutdownFlags::SEND) {
            return self.flush_buffered();
        }
        Verdict::Open
    }

    fn take_credit_request(&mut self) -> Verdict {
        if !matches!(self.state, State::Flushing | State::Dialing(_)) {
            self.rx_queue.add(RxOps::CreditUpdate);
        }
        Verdict::Open
    }

    /// Sends payload to the host program, and buffers what it does not take yet.
    fn deliver(&mut self, batch: &TxBatch<'_>, packets: &[VsockPacket]) -> Verdict {
        let len = packets
            .iter()
            .map(|packet| packet.header().len as usize)
            .sum();
        self.credit.count_received(len);
        if self.shutdown.host_receives() {
            let held = self.mover.buffered() + len;
            match self.mover.deliver(batch, packets) {
                Delivered::Sent(sent) => {
                    self.credit.count_forwarded(sent);
                    return Verdict::Open;
                }
                Delivered::Closed => {
                    // Some of them may be buffered, or sent.
                    self.mover.drop_buffered();
                    self.credit.count_forwarded(held);
                    self.shutdown.dropped = true;
                    self.receiver_closed();
                    return Verdict::Open;
                }
                Delivered::TooLong => return Verdict::Reset(CloseReason::Protocol),
                Delivered::Failed => return Verdict::Reset(CloseReason::HostGone),
            }
        }
        self.credit.count_forwarded(len);
        self.shutdown.dropped = true;
        Verdict::Open
    }
}

// What is pending for the guest.
impl VsockConnection {
    /// Brings the pending operations in line with the connection's state.
    fn update_pending(&mut self) {
        if !matches!(self.state, State::Established | State::Closing) {
            return;
        }
        if self.shutdown.host_closed && self.shutdown.guest.contains(ShutdownFlags::RECEIVE) {
            // Nobody receives what the host program wrote last.
            self.shutdown.host |= ShutdownFlags::SEND;
        }
        self.rx_queue.remove(RxOps::Rw);
        if self.shutdown.to_guest_open() {
            self.update_payload();
        } else {
            self.credit_requested = false;
        }
        if self.credit.update_is_due() {
            self.rx_queue.add(RxOps::CreditUpdate);
        }
        if self.shutdown.is_due() {
            self.rx_queue.add(RxOps::Shutdown);
        }
    }

    /// Lets the host program's payload wait for buffers, or for credit, which is asked for once.
    fn update_payload(&mut self) {
        let (window, credit) = (self.credit.guest_window(), self.credit.ours());
        let wants = self.mover.wants(window, credit);
        let was_requested = std::mem::replace(&mut self.credit_requested, wants == Wants::Credit);
        match wants {
            Wants::Nothing => {}
            Wants::Buffers => self.rx_queue.add(RxOps::Rw),
            Wants::Credit if was_requested => {}
            Wants::Credit => self.rx_queue.add(RxOps::CreditRequest),
            Wants::End => self.host_sends_no_more(),
            Wants::Reset | Wants::Failed => {
                self.host_closed();
                self.host_sends_no_more();
            }
        }
    }
}
