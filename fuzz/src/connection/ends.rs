//! The model of a connection: what its two ends have done, and what the connection must do.

mod checks;
mod program;

use std::cell::RefCell;
use std::os::unix::net::UnixStream;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{setsockopt, sockopt};
use vhost_user_vsock::host::connect_line::{Line, Progress};
use vhost_user_vsock::host::socket::HostSocket;
use vhost_user_vsock::metrics::counters::CloseReason;
use vhost_user_vsock::packet::header::{
    Cid, GuestPort, MessageFlags, Op, PacketType, PeerAddr, ShutdownFlags, VsockHeader,
};
use vhost_user_vsock::vsock_conn::{
    ConnKey, Dialing, Greeting, Readiness, Verdict, VsockConnection,
};

use super::super::borders::Borders;
use super::super::connect_line::{Role, parse};
use super::super::guest::{self, Guest, MAX_BATCH, MAX_PAYLOAD};
use super::super::memory::Memory;
use super::super::ring::Layout;
use super::super::stream::{Stream, pair};
use super::{Input, Opening};

const CID: Cid = Cid::from_raw(4);
const GUEST: GuestPort = GuestPort(1234);
const PEER: PeerAddr = PeerAddr::host(40000);
const OK: &[u8] = b"OK 40000\n";

/// The most that one call sends of what is buffered, in bytes.
const MAX_FLUSH: usize = 256 * 1024;

/// What a message can't use of its socket's send buffer, in bytes.
const MESSAGE_OVERHEAD: usize = 32;

/// The most that a socket holds, in bytes.
const MAX_SOCKET: usize = 1 << 19;

thread_local! {
    /// Room for all that a socket holds.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_SOCKET]);
}

/// A connection between its guest and its host program.
pub(super) struct Ends<'m> {
    opening: Opening,
    key: ConnKey,
    guest: Guest<'m>,
    conn: Option<VsockConnection>,
    epoll: Epoll,
    program: Option<UnixStream>,
    /// How much of its answer the program has written.
    answered: usize,
    /// What the program reads before the guest's bytes.
    ok: &'static [u8],
    to_host: Stream,
    to_guest: Stream,
    /// Where their messages end, if it carries messages.
    host_borders: Borders,
    guest_borders: Borders,
    /// How many messages the program has written, and how many of them have no bytes.
    written: usize,
    empty: usize,
    /// The connection's buffer, and how many of the guest's bytes have left it as far as the guest knows.
    window: u32,
    forwarded: u32,
    /// The guest's buffer, and how many of the program's bytes have left it.
    guest_window: u32,
    taken: u32,
    is_established: bool,
    has_request: bool,
    has_response: bool,
    guest_shutdown: ShutdownFlags,
    program_shutdown: ShutdownFlags,
    /// What of the program's the guest knows.
    sent_shutdown: ShutdownFlags,
    is_over: bool,
    /// The guest knows it no more, and bytes for the program are left.
    is_lingering: bool,
}

impl<'m> Ends<'m> {
    pub(super) fn new(input: &Input, memory: &'m Memory) -> Self {
        let key = ConnKey {
            packet_type: if input.has_messages() {
                PacketType::Seqpacket
            } else {
                PacketType::Stream
            },
            guest: GUEST,
            peer: PEER,
        };
        let (socket, program) = pair(key.packet_type);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let flags = EpollFlags::EPOLLIN
            | EpollFlags::EPOLLOUT
            | EpollFlags::EPOLLRDHUP
            | EpollFlags::EPOLLPRI
            | EpollFlags::EPOLLET;
        epoll.add(&socket, EpollEvent::new(flags, 0)).unwrap();
        let opening = input.opening();
        let socket = HostSocket::new(key.packet_type, socket);
        // The system may not grant room for messages that are as long as the buffer.
        let window = socket.reserve(input.window());
        let conn = open(opening, key, input.guest_window.into(), socket, window);
        if input.is_narrow() {
            // The kernel doubles it. A message may be as long as the buffer.
            let size = match key.packet_type {
                PacketType::Seqpacket => (window as usize + MESSAGE_OVERHEAD).div_ceil(2),
                _ => 1,
            };
            setsockopt(&conn.socket(), sockopt::SndBuf, &size).unwrap();
        }
        Self {
            opening,
            key,
            guest: Guest::new(memory),
            conn: Some(conn),
            epoll,
            program: Some(program),
            answered: 0,
            ok: if opening == Opening::Requested {
                OK
            } else {
                b""
            },
            to_host: Stream::new(1),
            to_guest: Stream::new(2),
            host_borders: Borders::default(),
            guest_borders: Borders::default(),
            written: 0,
            empty: 0,
            window,
            forwarded: 0,
            guest_window: input.guest_window.into(),
            taken: 0,
            is_established: opening == Opening::Accepted,
            has_request: false,
            has_response: false,
            guest_shutdown: ShutdownFlags::empty(),
            program_shutdown: ShutdownFlags::empty(),
            sent_shutdown: ShutdownFlags::empty(),
            is_over: false,
            is_lingering: false,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.is_over
    }

    fn has_messages(&self) -> bool {
        self.key.packet_type == PacketType::Seqpacket
    }

    fn is_dialing(&self) -> bool {
        !self.is_established && self.opening != Opening::Requested
    }

    /// The program still receives: otherwise what is on the way to it is nobody's.
    fn program_receives(&self) -> bool {
        !self.program_shutdown.contains(ShutdownFlags::RECEIVE)
    }

    /// How much the guest may send.
    fn credit(&self) -> usize {
        (self.window - (self.to_host.sent - self.forwarded)) as usize
    }

    /// How much more may be sent to the guest.
    fn guest_credit(&self) -> usize {
        let in_flight = self.to_guest.received - self.taken;
        self.guest_window.saturating_sub(in_flight) as usize
    }

    /// Checks what the connection says of itself.
    pub(super) fn check_state(&self) {
        let Some(conn) = self.conn.as_ref().filter(|_| !self.is_lingering) else {
            return;
        };
        let is_unknown = self.opening == Opening::Requested && !self.has_request;
        assert_eq!(conn.known_to_guest(), !is_unknown);
        let is_closing = self.sent_shutdown.is_all() && !self.guest_shutdown.is_all();
        assert_eq!(
            conn.deadline().is_some(),
            !self.is_established || is_closing,
            "who must answer has a deadline"
        );
    }

    /// What the table of connections does with a verdict: bytes that the guest has left to the program are still sent.
    fn settle_verdict(&mut self, verdict: Verdict) {
        if verdict == Verdict::Open {
            return;
        }
        let is_flushing = self.conn.as_ref().is_some_and(VsockConnection::is_flushing);
        self.is_lingering = is_flushing;
        self.is_over = !is_flushing;
        if self.is_over {
            self.conn = None;
        }
    }
}

fn open(
    opening: Opening,
    key: ConnKey,
    guest_window: u32,
    socket: HostSocket,
    window: u32,
) -> VsockConnection {
    let request = VsockHeader {
        packet_type: key.packet_type,
        buf_alloc: guest_window,
        ..VsockHeader::new(CID, key.guest, key.peer, Op::Request)
    };
    let dialing = match opening {
        Opening::Requested => {
            return VsockConnection::requested(CID, key, socket, Greeting::Ok, window);
        }
        Opening::Accepted => return VsockConnection::accepted(&request, socket, window),
        Opening::Connecting => Dialing::Connect,
        Opening::Answering(_) => Dialing::Answer(Line::answer()),
    };
    VsockConnection::dialing(&request, socket, dialing, window)
}

// What the guest sends.
impl Ends<'_> {
    fn header(&self, op: Op) -> VsockHeader {
        VsockHeader {
            buf_alloc: self.guest_window,
            fwd_cnt: self.taken,
            packet_type: self.key.packet_type,
            ..VsockHeader::new(CID, self.key.guest, self.key.peer, op)
        }
    }

    /// How many bytes the guest has sent of a message that it has not finished.
    fn unfinished(&self) -> u32 {
        if self.has_messages() {
            self.host_borders.unfinished(self.to_host.sent)
        } else {
            0
        }
    }

    fn guest_may_send(&self) -> bool {
        self.is_established && !self.guest_shutdown.contains(ShutdownFlags::SEND)
    }

    /// The guest sends `len` bytes, as far as it has credit for them, in batches of so many packets.
    pub(super) fn guest_writes(&mut self, len: usize, pieces: u8, layout: Layout) {
        let may_send = self.guest_may_send();
        // Payload out of place ends the connection: with many of these, few inputs would get far.
        if !may_send && !pieces.is_multiple_of(16) {
            return;
        }
        // Bit by bit from the fourth on: the packet ends no message.
        let goes_on = pieces >> 3;
        let pieces = 1 + usize::from(pieces) % MAX_BATCH;
        let mut left = if may_send { len.min(self.credit()) } else { 0 };
        loop {
            let batch = left.min(pieces * MAX_PAYLOAD);
            self.guest_sends_payload(batch, pieces, goes_on, layout);
            left -= batch;
            if left == 0 {
                return;
            }
        }
    }

    pub(super) fn guest_overruns(&mut self, more: usize) {
        let len = self.credit() + 1 + more;
        if len <= MAX_BATCH * MAX_PAYLOAD {
            self.guest_sends_payload(len, MAX_BATCH, 0, Layout::PLAIN);
        }
    }

    /// The guest sends `len` bytes in so many packets. `goes_on` says bit by bit which of them end no message.
    fn guest_sends_payload(&mut self, len: usize, pieces: usize, goes_on: u8, layout: Layout) {
        if self.is_lingering {
            return;
        }
        let bytes = self.to_host.next(len);
        let chunks: Vec<&[u8]> = if len == 0 {
            vec![&[]]
        } else {
            bytes.chunks(len.div_ceil(pieces)).collect()
        };
        let mut credit = self.guest_may_send().then(|| self.credit());
        let mut packets = Vec::new();
        for (index, chunk) in chunks.into_iter().enumerate() {
            let ends = goes_on >> index & 1 == 0;
            let mut header = VsockHeader {
                len: chunk.len() as u32,
                ..self.header(Op::Rw)
            };
            if ends {
                header.flags = MessageFlags::EOM.bits();
            }
            packets.push(guest::bytes(&header, chunk));
            credit = credit.and_then(|credit| credit.checked_sub(chunk.len()));
            if credit.is_some() {
                self.to_host.sent += chunk.len() as u32;
                if ends {
                    self.host_borders.end(self.to_host.sent);
                }
            }
        }
        let is_too_long = self.has_messages() && self.unfinished() >= self.window;
        let Some(conn) = &mut self.conn else { return };
        let verdict = self.guest.send(&packets, layout, |batch| {
            conn.send_payload(batch, batch.packets())
        });
        let is_wrong = credit.is_none() || is_too_long;
        // Nobody counts what is dropped.
        let may_be_open = credit.is_some() && !self.program_receives();
        let expected = if is_wrong && !(may_be_open && verdict == Verdict::Open) {
            Verdict::Reset(CloseReason::Protocol)
        } else {
            Verdict::Open
        };
        assert_eq!(verdict, expected, "{len} bytes");
        self.settle_verdict(verdict);
    }

    pub(super) fn guest_takes(&mut self, len: u32) {
        self.taken += (self.to_guest.received - self.taken).min(len);
        self.guest_sends(Op::CreditUpdate);
    }

    pub(super) fn guest_resizes(&mut self, size: u32) {
        self.guest_window = size;
        self.guest_sends(Op::CreditUpdate);
    }

    pub(super) fn guest_shuts(&mut self, flags: u32) {
        let header = VsockHeader {
            flags,
            ..self.header(Op::Shutdown)
        };
        self.guest_sends_header(&header);
    }

    pub(super) fn guest_sends(&mut self, op: Op) {
        self.guest_sends_header(&self.header(op));
    }

    fn guest_sends_header(&mut self, header: &VsockHeader) {
        if self.is_lingering {
            return;
        }
        let Some(called) = self.call(|conn| conn.send_pkt(header)) else {
            return;
        };
        let is_done = self.guest_shutdown.is_all() || self.sent_shutdown.is_all();
        let expected = match header.op {
            Op::Request | Op::Unknown(_) => Verdict::Reset(CloseReason::Protocol),
            Op::Rst if is_done => Verdict::Close(CloseReason::Done),
            Op::Rst if self.is_established || self.is_dialing() => {
                Verdict::Close(CloseReason::GuestReset)
            }
            Op::Rst => Verdict::Close(CloseReason::Refused),
            Op::Shutdown if !self.is_established => Verdict::Reset(CloseReason::Protocol),
            Op::Shutdown => {
                self.guest_shutdown |= header.shutdown_flags();
                if self.guest_shutdown.is_all() && !called.is_flushing {
                    Verdict::Reset(CloseReason::Done)
                } else {
                    Verdict::Open
                }
            }
            Op::Response if self.has_request && !self.is_established => {
                self.is_established = true;
                // A program that is gone is of use only for the bytes that it has left.
                if self.program_receives() || self.has_written() {
                    Verdict::Open
                } else {
                    Verdict::Reset(CloseReason::HostGone)
                }
            }
            _ => called.flushed(),
        };
        assert_eq!(called.verdict, expected, "{header:?}");
        self.settle_verdict(called.verdict);
    }
}

/// What came of a call.
struct Called {
    verdict: Verdict,
    was_flushing: bool,
    is_flushing: bool,
}

impl Called {
    /// The verdict of a call that has nothing else to do than to flush.
    fn flushed(&self) -> Verdict {
        if self.was_flushing && !self.is_flushing {
            Verdict::Reset(CloseReason::Done)
        } else {
            Verdict::Open
        }
    }
}

// The socket's events.
impl Ends<'_> {
    /// Calls the connection, which sends no more of what is buffered than one call may.
    fn call(&mut self, call: impl FnOnce(&mut VsockConnection) -> Verdict) -> Option<Called> {
        let conn = self.conn.as_mut()?;
        let (was_flushing, before) = (conn.is_flushing(), conn.stats().buffered);
        // A message is sent at once, and one that is not finished is dropped at once.
        let whole = match self.key.packet_type {
            PacketType::Seqpacket => self.window as usize,
            _ => 0,
        };
        let verdict = call(conn);
        let (is_flushing, after) = (conn.is_flushing(), conn.stats().buffered);
        assert!(
            before - after <= MAX_FLUSH + whole || !self.program_receives(),
            "a flush without a bound"
        );
        Some(Called {
            verdict,
            was_flushing,
            is_flushing,
        })
    }

    /// Passes the socket's events on. False when there are none.
    pub(super) fn events(&mut self) -> bool {
        let mut events = [EpollEvent::empty()];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap();
        if count > 0 {
            let has = |wanted| events[0].events().intersects(wanted);
            self.socket_ready(Readiness {
                readable: has(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP),
                until_empty: has(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLPRI),
                writable: has(EpollFlags::EPOLLOUT),
                hung_up: has(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR),
            });
        }
        count > 0
    }

    pub(super) fn socket_ready(&mut self, ready: Readiness) {
        let Some(called) = self.call(|conn| conn.socket_ready(ready)) else {
            return;
        };
        let is_requested = self.opening == Opening::Requested && !self.is_established;
        let expected = if self.is_dialing() {
            self.dialed()
        } else if is_requested && ready.hung_up && !self.has_request && !self.has_written() {
            // The guest knows nothing of it, and there is nothing for it.
            Verdict::Close(CloseReason::HostGone)
        } else {
            called.flushed()
        };
        assert_eq!(called.verdict, expected, "{ready:?}");
        self.settle_verdict(called.verdict);
    }

    /// What an event means while the guest's REQUEST waits for the peer.
    fn dialed(&mut self) -> Verdict {
        let answer = match self.opening {
            Opening::Answering(answer) => parse(Role::Server, &answer[..self.answered]),
            _ => Progress::Complete {
                port: 0,
                consumed: 0,
            },
        };
        let has_ended = self.program_shutdown.contains(ShutdownFlags::SEND);
        match answer {
            Progress::Complete { .. } => self.is_established = true,
            // An answer that is a message has all its bytes.
            Progress::Incomplete if self.has_messages() && self.answered > 0 => {
                return Verdict::Reset(CloseReason::Refused);
            }
            Progress::Incomplete if !has_ended => {}
            _ => return Verdict::Reset(CloseReason::Refused),
        }
        Verdict::Open
    }

    /// Goes on with a flush that has ended at its bound. False when there is none.
    pub(super) fn flush(&mut self) -> bool {
        if !self.conn.as_ref().is_some_and(VsockConnection::can_flush) {
            return false;
        }
        if let Some(called) = self.call(VsockConnection::flush) {
            assert_eq!(called.verdict, called.flushed());
            self.settle_verdict(called.verdict);
        }
        true
    }
}
