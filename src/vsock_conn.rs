//! One connection between a guest program and a host program.
//!
//! ```text
//!  host program        VsockConnection                         guest
//!  CONNECT 1234  ->    Connecting    -- REQUEST -->
//!             <- OK    Established   <-- RESPONSE --
//!                      Established   <-- REQUEST --   (accepted at once: RESPONSE)
//!        bytes  <->    Established   <-- RW -->
//!                      Flushing      <-- SHUTDOWN 3 -- bytes still wait for the host, then RST
//!        closes  ->    Finishing     -- SHUTDOWN 3 --> waits for the guest's RST
//! ```
//!
//! Packets and the socket's readiness go in; bytes to the socket, operations owed to the guest and the verdict whether
//! the connection goes on come out. It knows no ring, no epoll and no other connection.

pub mod credit;

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};

use crate::metrics::counters::{CloseReason, ConnectionStats, Side};
use crate::packet::header::{
    Cid, GuestPort, HostPort, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, VsockHeader,
};
use crate::packet::{Payload, Read, RxBatch, TxBatch, VsockPacket};
use crate::rxops::RxOps;
use crate::rxqueue::RxQueue;
use crate::syscalls::{Argument, Syscall};
use crate::txbuf::LocalTxBuf;
use crate::vsock_conn::credit::Credit;

/// For a larger socket buffer and the `OK` line, to look at what a socket holds and whether its other end is there, and to end one direction of it.
pub(crate) const SYSCALLS: &[Syscall] = &[
    Syscall::only(
        libc::SYS_setsockopt,
        &[
            Argument::Is(1, libc::SOL_SOCKET),
            Argument::Is(2, libc::SO_SNDBUF),
        ],
    ),
    Syscall::any(libc::SYS_write),
    Syscall::any(libc::SYS_recvfrom),
    Syscall::any(libc::SYS_sendto),
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_poll),
    Syscall::any(libc::SYS_ppoll),
    Syscall::any(libc::SYS_shutdown),
    Syscall::any(libc::SYS_close),
];

/// How long the guest has to answer a REQUEST.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the guest has to confirm our SHUTDOWN 3 with its RST. Linux gives its peer as long.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// The least and the most payload that is read from the host program in one go, in bytes.
const READ_RANGE: (usize, usize) = (4 * 1024, 256 * 1024);

/// What part of the guest's buffer one read may fill. Much more, and the stream becomes stop-and-wait: the guest's
/// program has nothing to read while the next batch is made, and we have no credit while it reads. A part
/// below the least of [`READ_RANGE`] is not worth a packet: Linux also counts some 600 bytes of its own for each packet
/// that waits to be read, and resets a connection whose buffer can't hold these.
const WINDOW_PART: usize = 4;

/// What the kernel is asked to hold on the way to a slow host program, in bytes. It doubles the number for its own
/// needs, up to twice `net.core.wmem_max`.
const SEND_BUFFER: usize = 256 * 1024;

/// The two ports that name a connection. Who began it does not matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnKey {
    /// The guest's port.
    pub guest: GuestPort,
    /// The host's port.
    pub host: HostPort,
}

impl ConnKey {
    /// The connection that a packet belongs to.
    pub fn of(header: &VsockHeader) -> Self {
        Self {
            guest: header.guest_port,
            host: header.host_port,
        }
    }
}

/// What a socket has become ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// There are bytes, or the end of the stream.
    pub readable: bool,
    /// A read may end before the last byte that is there, or before the end of the stream behind it.
    pub halting: bool,
    /// There is room.
    pub writable: bool,
    /// Both directions are over.
    pub gone: bool,
}

impl Readiness {
    /// Room, and nothing else.
    const WRITABLE: Self = Self {
        readable: false,
        halting: false,
        writable: true,
        gone: false,
    };
}

/// Whether a connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// It does.
    Open,
    /// It is over, and the guest knows.
    Close(CloseReason),
    /// It is over, and the guest must be told with an RST.
    Reset(CloseReason),
}

/// Where a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The guest has not answered our REQUEST.
    Connecting,
    /// Bytes flow.
    Established,
    /// The guest is done; what it sent still waits for the host program.
    Flushing,
    /// The host program is done and the guest was told so.
    Finishing,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Established => "established",
            Self::Flushing => "flushing",
            Self::Finishing => "finishing",
        }
    }
}

/// A connection.
#[derive(Debug)]
pub struct VsockConnection {
    guest_cid: Cid,
    key: ConnKey,
    stream: UnixStream,
    state: State,
    deadline: Option<Instant>,
    rx_queue: RxQueue,
    credit: Credit,
    tx_buf: LocalTxBuf,
    /// The socket may have bytes: the last read did not say otherwise.
    readable: bool,
    /// What a read leaves behind has no event of its own any more: out-of-band data stops a read, and an end of the stream
    /// may have been seen together with the bytes before it. So reading goes on until there is really nothing.
    halting: bool,
    /// The socket may have room: the last write did not say otherwise.
    writable: bool,
    /// Both directions of the socket are over.
    gone: bool,
    /// Bytes of the guest's came after the host program had stopped reading, and were dropped.
    dropped: bool,
    /// What the guest will no more do, as flags of SHUTDOWN.
    guest_shutdown: u32,
    /// What the host program will no more do.
    host_shutdown: u32,
    /// What of it the guest was told.
    told_shutdown: u32,
    /// A CREDIT_REQUEST was sent since there was last credit.
    credit_asked: bool,
    /// How much to read next.
    read_size: usize,
}

impl VsockConnection {
    /// The connection that a guest's REQUEST has opened to the host program behind `stream`.
    pub fn accepted(request: &VsockHeader, stream: UnixStream, buf_alloc: u32) -> Self {
        let key = ConnKey::of(request);
        let mut conn = Self::new(request.guest_cid, key, stream, buf_alloc);
        conn.state = State::Established;
        conn.credit.learn(request);
        conn.rx_queue.add(RxOps::Response);
        conn
    }

    /// The connection that the host program behind `stream` wants.
    pub fn requested(guest_cid: Cid, key: ConnKey, stream: UnixStream, buf_alloc: u32) -> Self {
        let mut conn = Self::new(guest_cid, key, stream, buf_alloc);
        conn.deadline = Some(Instant::now() + ANSWER_TIMEOUT);
        conn.rx_queue.add(RxOps::Request);
        conn
    }

    fn new(guest_cid: Cid, key: ConnKey, stream: UnixStream, buf_alloc: u32) -> Self {
        // With the kernel's own choice it works as well, if more slowly.
        let _ = setsockopt(&stream, sockopt::SndBuf, &SEND_BUFFER);
        Self {
            guest_cid,
            key,
            stream,
            state: State::Connecting,
            deadline: None,
            rx_queue: RxQueue::default(),
            credit: Credit::new(buf_alloc),
            tx_buf: LocalTxBuf::new(buf_alloc),
            readable: true,
            // What happened before it became a connection was not for it to see.
            halting: true,
            writable: true,
            gone: false,
            dropped: false,
            guest_shutdown: 0,
            host_shutdown: 0,
            told_shutdown: 0,
            credit_asked: false,
            read_size: READ_RANGE.0,
        }
    }

    /// The ports that name it.
    pub fn key(&self) -> ConnKey {
        self.key
    }

    /// Its socket.
    pub fn stream(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// When it is reset unless something happens before.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether the guest has ended it properly and bytes still wait for the host program, whose they are.
    pub fn owes_host(&self) -> bool {
        self.state == State::Flushing && !self.tx_buf.is_empty()
    }

    /// Whether the guest has heard of it: our REQUEST may still wait for a buffer.
    pub fn guest_knows(&self) -> bool {
        self.state != State::Connecting || self.rx_queue.peek() != Some(RxOps::Request)
    }

    /// What it owes the guest first.
    pub fn owes(&self) -> Option<RxOps> {
        self.rx_queue.peek()
    }

    /// Whether it owes the guest a packet, and how many bytes of payload that packet and the ones right behind it can
    /// have.
    pub fn rx_demand(&self) -> Option<usize> {
        self.owes().map(|op| match op {
            RxOps::Rw => {
                let batch = (self.credit.guest_window() / WINDOW_PART).max(READ_RANGE.0);
                self.read_size.min(batch).min(self.credit.for_us())
            }
            _ => 0,
        })
    }

    /// What there is to tell of it.
    pub fn stats(&self) -> ConnectionStats {
        let credit = self.credit.for_us();
        ConnectionStats {
            guest_port: self.key.guest,
            host_port: self.key.host,
            state: self.state.name().into(),
            from_guest: self.credit.received(),
            to_guest: self.credit.sent(),
            buffered: self.tx_buf.len(),
            credit,
            waits_for: if !self.tx_buf.is_empty() {
                Some(Side::Host)
            } else if self.state == State::Connecting || (self.readable && credit == 0) {
                Some(Side::Guest)
            } else {
                None
            },
        }
    }

    /// The RST that ends it.
    pub fn reset_header(&self) -> VsockHeader {
        self.header(Op::Rst)
    }

    /// Takes a packet without payload from the guest.
    pub fn send_pkt(&mut self, op: Op, header: &VsockHeader) -> Verdict {
        self.credit.learn(header);
        let verdict = match op {
            // The guest has lost the connection that we still know.
            Op::Request => Verdict::Reset(CloseReason::Protocol),
            Op::Response if self.state == State::Connecting && self.guest_knows() => {
                self.establish()
            }
            Op::Rst => Verdict::Close(match self.state {
                State::Connecting => CloseReason::Refused,
                State::Established => CloseReason::GuestReset,
                State::Flushing | State::Finishing => CloseReason::Done,
            }),
            Op::Shutdown if self.state == State::Connecting => {
                Verdict::Reset(CloseReason::Protocol)
            }
            Op::Shutdown => self.shut_down(header.flags & SHUTDOWN_BOTH),
            Op::CreditRequest if self.state != State::Flushing => {
                self.rx_queue.add(RxOps::CreditUpdate);
                Verdict::Open
            }
            Op::Response | Op::CreditUpdate | Op::CreditRequest | Op::Rw => Verdict::Open,
        };
        if verdict == Verdict::Open && !self.tx_buf.is_empty() {
            // An occasion to look whether the host program still reads.
            return self.socket_ready(Readiness::default());
        }
        self.update_owed();
        verdict
    }

    /// Takes consecutive RW packets of `batch`.
    pub fn send_payload(&mut self, batch: &TxBatch<'_>, packets: &[VsockPacket]) -> Verdict {
        let ended = self.guest_shutdown & SHUTDOWN_SEND != 0;
        if self.state == State::Connecting || ended {
            return Verdict::Reset(CloseReason::Protocol);
        }
        let mut room = self.credit.for_guest();
        let fitting = packets.iter().take_while(|packet| {
            let len = packet.header().len as usize;
            let fits = len <= room;
            room = room.saturating_sub(len);
            fits
        });
        let (within, past) = packets.split_at(fitting.count());
        let mut verdict = if past.is_empty() {
            Verdict::Open
        } else {
            Verdict::Reset(CloseReason::Protocol)
        };
        if let Some(last) = within.last() {
            self.credit.learn(last.header());
            let delivered = self.deliver(&batch.payload(within));
            if delivered != Verdict::Open {
                verdict = delivered;
            }
        }
        self.update_owed();
        verdict
    }

    /// Takes what the socket has become ready for.
    pub fn socket_ready(&mut self, ready: Readiness) -> Verdict {
        self.readable |= ready.readable;
        self.halting |= ready.halting | ready.gone;
        self.writable |= ready.writable;
        let waiting = !self.tx_buf.is_empty();
        if (waiting && !ready.writable) || (!waiting && ready == Readiness::WRITABLE) {
            self.probe();
        }
        if ready.gone && self.state != State::Connecting {
            self.host_gone();
        }
        let dropped = waiting && self.tx_buf.is_empty();
        let verdict = if dropped || waiting && self.writable {
            self.flush()
        } else {
            Verdict::Open
        };
        self.update_owed();
        verdict
    }

    /// Puts what is owed to the guest first into `batch`, which was made for [`VsockConnection::rx_demand`].
    pub fn recv_pkt(&mut self, batch: &mut RxBatch<'_>) -> Verdict {
        let Some(op) = self.rx_queue.peek() else {
            return Verdict::Open;
        };
        match op {
            RxOps::Request => self.fill(batch, Op::Request),
            RxOps::Response => self.fill(batch, Op::Response),
            RxOps::CreditUpdate => self.fill(batch, Op::CreditUpdate),
            RxOps::CreditRequest => self.fill(batch, Op::CreditRequest),
            RxOps::Shutdown => self.fill_shutdown(batch),
            RxOps::Rw => self.fill_payload(batch),
        }
        self.rx_queue.remove(op);
        self.update_owed();
        Verdict::Open
    }

    /// The guest has accepted: the host program hears so.
    fn establish(&mut self) -> Verdict {
        self.state = State::Established;
        self.deadline = None;
        let line = format!("OK {}\n", self.key.host.0);
        match self.stream.write(line.as_bytes()) {
            Ok(written) if written == line.len() => Verdict::Open,
            // It is dead, but what it wrote before is still the guest's.
            _ if self.has_bytes() => {
                self.host_gone();
                Verdict::Open
            }
            _ => Verdict::Reset(CloseReason::HostGone),
        }
    }

    fn has_bytes(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        matches!(recv(self.stream.as_raw_fd(), &mut [0], flags), Ok(1))
    }

    /// The guest will no more receive, send, or both.
    fn shut_down(&mut self, flags: u32) -> Verdict {
        let new = flags & !self.guest_shutdown;
        self.guest_shutdown |= flags;
        if self.guest_shutdown == SHUTDOWN_BOTH {
            self.state = State::Flushing;
            self.deadline = None;
            self.rx_queue.clear();
            return self.flush();
        }
        if new & SHUTDOWN_RECEIVE != 0 {
            // An error here only says that the socket is gone already.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if new & SHUTDOWN_SEND != 0 {
            return self.flush();
        }
        Verdict::Open
    }

    /// Looks whether the host program has stopped reading. Nothing else tells: a socket with room seems to have got more,
    /// as when the program has read something, and a full one has no event at all. So that one is looked at when
    /// anything else happens to the connection.
    fn probe(&mut self) {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        // Behind the last byte, it is we who have ended this direction.
        let ours = self.guest_shutdown & SHUTDOWN_SEND != 0 && self.tx_buf.is_empty();
        if !ours && send(self.stream.as_raw_fd(), &[], flags) == Err(nix::Error::EPIPE) {
            self.stop_delivering();
        }
    }

    /// Both directions of the socket are over. What it holds can still be read.
    fn host_gone(&mut self) {
        self.gone = true;
        self.readable = true;
        self.stop_delivering();
    }

    /// The host program takes no more bytes: what comes for it is dropped from now on.
    fn stop_delivering(&mut self) {
        self.host_shutdown |= SHUTDOWN_RECEIVE;
        self.credit.count_forwarded(self.tx_buf.len());
        self.tx_buf.clear();
    }

    /// Sends payload to the host program, and keeps what it does not take yet.
    fn deliver(&mut self, payload: &Payload<'_>) -> Verdict {
        let len = payload.len();
        self.credit.count_received(len);
        let mut sent = 0;
        if self.writable && self.tx_buf.is_empty() && self.host_shutdown & SHUTDOWN_RECEIVE == 0 {
            match payload.send_to(&self.stream) {
                Ok(count) => sent = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if is_end(&error) => self.stop_delivering(),
                Err(_) => return Verdict::Reset(CloseReason::HostGone),
            }
            self.writable = sent == len;
        }
        if self.host_shutdown & SHUTDOWN_RECEIVE != 0 {
            self.credit.count_forwarded(len);
            self.dropped = true;
            return Verdict::Open;
        }
        self.credit.count_forwarded(sent);
        let kept = self.tx_buf.push(len - sent, |offset, place| {
            payload.copy_to(sent + offset, place);
        });
        // The guest's credit is the room in this buffer: only where the system has no memory are bytes lost.
        if kept {
            Verdict::Open
        } else {
            Verdict::Reset(CloseReason::HostGone)
        }
    }

    /// Writes what waits for the host program, and does what was to happen behind the last byte.
    fn flush(&mut self) -> Verdict {
        while !self.tx_buf.is_empty() {
            match self.tx_buf.flush_to(&self.stream) {
                Ok(written) => self.credit.count_forwarded(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.writable = false;
                    return Verdict::Open;
                }
                Err(error) if is_end(&error) => self.stop_delivering(),
                Err(_) => return Verdict::Reset(CloseReason::HostGone),
            }
        }
        if self.state == State::Flushing {
            return Verdict::Reset(CloseReason::Done);
        }
        if self.guest_shutdown & SHUTDOWN_SEND != 0 {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Verdict::Open
    }

    fn header(&self, op: Op) -> VsockHeader {
        VsockHeader::to_guest(self.guest_cid, self.key.guest, self.key.host, op)
    }

    fn fill(&mut self, batch: &mut RxBatch<'_>, op: Op) {
        let mut header = self.header(op);
        self.credit.tell(&mut header);
        batch.fill_header(&header);
    }

    fn fill_shutdown(&mut self, batch: &mut RxBatch<'_>) {
        let mut header = self.header(Op::Shutdown);
        header.flags = self.host_shutdown;
        self.credit.tell(&mut header);
        batch.fill_header(&header);
        self.told_shutdown = self.host_shutdown;
        if self.told_shutdown == SHUTDOWN_BOTH {
            self.state = State::Finishing;
            self.deadline = Some(Instant::now() + CLOSE_TIMEOUT);
        }
    }

    fn fill_payload(&mut self, batch: &mut RxBatch<'_>) {
        let capacity = batch.capacity();
        if capacity == 0 {
            return;
        }
        match batch.read_from(&self.stream) {
            Ok(Read { bytes: 0, .. }) => self.host_ended(),
            Ok(Read { bytes, is_all }) => {
                let mut header = self.header(Op::Rw);
                self.credit.tell(&mut header);
                self.credit.count_sent(bytes);
                batch.fill(&header, bytes);
                let next = if bytes == capacity {
                    4 * capacity
                } else {
                    2 * bytes
                };
                self.read_size = next.clamp(READ_RANGE.0, READ_RANGE.1);
                self.readable = !is_all || self.halting;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                self.halting = false;
            }
            // The host program has closed with bytes of the guest's unread.
            Err(_) => {
                self.host_gone();
                self.host_ended();
            }
        }
    }

    /// The last byte of the host program's was read. Whether it only stopped writing or closed is told by poll: the
    /// socket's event may not have come yet.
    fn host_ended(&mut self) {
        self.readable = false;
        self.host_shutdown |= SHUTDOWN_SEND;
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        let closed = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0);
        if closed && !self.gone {
            self.gone = true;
            self.stop_delivering();
        }
    }

    /// Brings the operations owed to the guest in line with the connection's state.
    fn update_owed(&mut self) {
        if matches!(self.state, State::Connecting | State::Flushing) {
            return;
        }
        if self.gone && self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            // What the host program wrote last has nobody to go to.
            self.host_shutdown |= SHUTDOWN_SEND;
        }
        self.rx_queue.remove(RxOps::Rw);
        let credit = self.credit.for_us();
        if credit > 0 {
            self.credit_asked = false;
        }
        let reading =
            (self.guest_shutdown & SHUTDOWN_RECEIVE) | (self.host_shutdown & SHUTDOWN_SEND) == 0;
        if reading && self.readable {
            if credit > 0 {
                self.rx_queue.add(RxOps::Rw);
            } else if !self.credit_asked {
                self.credit_asked = true;
                self.rx_queue.add(RxOps::CreditRequest);
            }
        }
        if self.credit.is_due() {
            self.rx_queue.add(RxOps::CreditUpdate);
        }
        // A host program that is gone ends both directions with one SHUTDOWN, behind the last byte it wrote. But a guest that
        // goes on sending is told first that nobody takes it: it may never read so far.
        let untold = self.host_shutdown & !self.told_shutdown;
        if untold != 0 && (self.dropped || !(self.gone && reading)) {
            self.rx_queue.add(RxOps::Shutdown);
        }
    }
}

/// Whether an error says that the other end is gone. Any other is a failure of the system, which has cost bytes.
fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected)
}

#[cfg(test)]
mod tests;
