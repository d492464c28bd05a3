//! One connection between a guest and a host program that both do what they like.
//!
//! The socket's events are real ones, edge-triggered as the worker has them, and come as late as the input wants. The
//! model knows what each side has written, read and ended, and from that what the connection must answer.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use arbitrary::{Arbitrary, Unstructured};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use std::os::fd::AsRawFd;
use vhost_user_vsock::metrics::counters::CloseReason;
use vhost_user_vsock::packet::header::{
    Cid, GuestPort, HOST_CID, HostPort, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
    TYPE_STREAM, VsockHeader,
};
use vhost_user_vsock::vsock_conn::{ConnKey, Readiness, Verdict, VsockConnection};

use super::guest::{self, Guest, MAX_PAYLOAD};
use super::ring::{self, Layout};
use super::shutdown::Ended;
use super::stream::Stream;

const CID: Cid = Cid(4);
const KEY: ConnKey = ConnKey {
    guest: GuestPort(1234),
    host: HostPort(40000),
};

/// What happens next.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Step {
    /// The guest sends as much of this as it has credit for.
    GuestWrites {
        len: u16,
        pieces: u8,
        layout: Layout,
    },
    /// The guest sends this much more than it has credit for.
    GuestOverruns {
        more: u8,
    },
    GuestTakes {
        len: u16,
    },
    GuestBuffer {
        size: u16,
    },
    GuestShuts {
        flags: u8,
    },
    GuestSays {
        op: Say,
    },
    GuestReceives {
        buffers: u8,
        layout: Layout,
    },
    ProgramWrites {
        len: u16,
    },
    ProgramReads {
        len: u16,
    },
    ProgramShuts {
        how: Side,
    },
    ProgramCloses,
    /// The events that are there come through.
    Events,
    /// An event comes that says little.
    Rumour {
        readable: bool,
        halting: bool,
        writable: bool,
    },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Say {
    Request,
    Response,
    Rst,
    CreditRequest,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Side {
    Read,
    Write,
}

#[derive(Arbitrary, Debug)]
struct Input {
    by_host: bool,
    /// The socket holds little, so that the connection must.
    is_narrow: bool,
    window: u16,
    guest_window: u16,
    steps: Vec<Step>,
}

/// Runs the target.
pub fn run(bytes: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(bytes)) else {
        return;
    };
    let memory = ring::memory();
    let mut ends = Ends::new(&input, Guest::new(&memory));
    for step in input.steps.iter().take(200) {
        super::show(step);
        ends.take(*step);
        if ends.is_over {
            break;
        }
    }
    ends.settle();
}

/// A connection between its guest and its program, and what is known of it.
struct Ends<'m> {
    guest: Guest<'m>,
    conn: Option<VsockConnection>,
    epoll: Epoll,
    program: Option<UnixStream>,
    /// What the program still has to read before the guest's bytes.
    ok: Vec<u8>,
    to_host: Stream,
    to_guest: Stream,
    window: u32,
    /// The program's bytes that were taken out of our buffer, as the guest knows.
    told: u32,
    guest_window: u32,
    taken: u32,
    is_established: bool,
    request_is_out: bool,
    guest_shutdown: u32,
    told_shutdown: u32,
    /// What the program does no more.
    program_shutdown: u32,
    is_over: bool,
    /// The guest knows no more of it, and only bytes for the program are left.
    is_orphan: bool,
    /// A place for all that a socket holds.
    scratch: Vec<u8>,
}

impl<'m> Ends<'m> {
    fn new(input: &Input, guest: Guest<'m>) -> Self {
        let (stream, program) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        program.set_nonblocking(true).unwrap();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let flags = EpollFlags::EPOLLIN
            | EpollFlags::EPOLLOUT
            | EpollFlags::EPOLLRDHUP
            | EpollFlags::EPOLLPRI
            | EpollFlags::EPOLLET;
        epoll.add(&stream, EpollEvent::new(flags, 0)).unwrap();
        let (window, guest_window) = (u32::from(input.window) + 1, input.guest_window.into());
        let request = VsockHeader {
            buf_alloc: guest_window,
            ..VsockHeader::to_guest(CID, KEY.guest, KEY.host, Op::Request)
        };
        let conn = if input.by_host {
            VsockConnection::requested(CID, KEY, stream, window)
        } else {
            VsockConnection::accepted(&request, stream, window)
        };
        if input.is_narrow {
            setsockopt(&conn.stream(), sockopt::SndBuf, &1).unwrap();
        }
        Self {
            guest,
            conn: Some(conn),
            epoll,
            program: Some(program),
            ok: if input.by_host {
                b"OK 40000\n".to_vec()
            } else {
                Vec::new()
            },
            to_host: Stream::new(1),
            to_guest: Stream::new(2),
            window,
            told: 0,
            guest_window,
            taken: 0,
            is_established: !input.by_host,
            request_is_out: false,
            guest_shutdown: 0,
            told_shutdown: 0,
            program_shutdown: 0,
            is_over: false,
            is_orphan: false,
            scratch: vec![0; 1 << 19],
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::GuestWrites {
                len,
                pieces,
                layout,
            } => self.guest_writes(len.into(), pieces, layout),
            Step::GuestOverruns { more } => {
                let len = self.room() + 1 + u32::from(more);
                if len as usize <= 5 * MAX_PAYLOAD {
                    self.guest_sends(len as usize, 5, Layout::PLAIN);
                }
            }
            Step::GuestTakes { len } => {
                self.taken += (self.to_guest.received - self.taken).min(len.into());
                self.guest_says(Op::CreditUpdate, 0);
            }
            Step::GuestBuffer { size } => {
                self.guest_window = size.into();
                self.guest_says(Op::CreditUpdate, 0);
            }
            Step::GuestShuts { flags } => self.guest_says(Op::Shutdown, flags.into()),
            Step::GuestSays { op } => {
                let op = match op {
                    Say::Request => Op::Request,
                    Say::Response => Op::Response,
                    Say::Rst => Op::Rst,
                    Say::CreditRequest => Op::CreditRequest,
                };
                self.guest_says(op, 0);
            }
            Step::GuestReceives { buffers, layout } => {
                self.guest_receives(1 + usize::from(buffers) % 5, layout);
            }
            Step::ProgramWrites { len } => {
                let bytes = self.to_guest.next(len.into());
                let written = self
                    .program
                    .as_ref()
                    .and_then(|mut program| program.write(&bytes).ok());
                self.to_guest.sent += written.unwrap_or(0) as u32;
            }
            Step::ProgramReads { len } => {
                self.program_reads(len.into());
            }
            Step::ProgramShuts { how } => self.program_shuts(how),
            Step::ProgramCloses => {
                self.program = None;
                self.program_shutdown = SHUTDOWN_BOTH;
            }
            Step::Events => {
                self.events();
            }
            Step::Rumour {
                readable,
                halting,
                writable,
            } => self.socket_ready(Readiness {
                readable,
                halting,
                writable,
                gone: false,
            }),
        }
    }

    /// How much the guest may send.
    fn room(&self) -> u32 {
        self.window - (self.to_host.sent - self.told)
    }

    /// How much may be on the way to the guest besides what is.
    fn room_of_guest(&self) -> u32 {
        self.guest_window
            .saturating_sub(self.to_guest.received - self.taken)
    }

    /// The program takes no more bytes: those that are on the way to it are nobody's.
    fn is_deaf(&self) -> bool {
        self.program_shutdown & SHUTDOWN_RECEIVE != 0
    }

    fn header(&self, op: Op) -> VsockHeader {
        VsockHeader {
            buf_alloc: self.guest_window,
            fwd_cnt: self.taken,
            ..VsockHeader::to_guest(CID, KEY.guest, KEY.host, op)
        }
    }

    fn guest_writes(&mut self, len: usize, pieces: u8, layout: Layout) {
        let may = self.is_established && self.guest_shutdown & SHUTDOWN_SEND == 0;
        // What must not be sent ends the connection: few inputs go on if that comes often.
        if !may && !pieces.is_multiple_of(16) {
            return;
        }
        let pieces = 1 + usize::from(pieces) % 5;
        let len = len.min(pieces * MAX_PAYLOAD).min(self.room() as usize);
        self.guest_sends(if may { len } else { 0 }, pieces, layout);
    }

    /// The guest sends `len` bytes in so many packets.
    fn guest_sends(&mut self, len: usize, pieces: usize, layout: Layout) {
        if self.is_orphan {
            return;
        }
        let stream = self.to_host.next(len);
        let part = len.div_ceil(pieces).max(1);
        let chunks: Vec<&[u8]> = if len == 0 {
            vec![&[]]
        } else {
            stream.chunks(part).collect()
        };
        let may = self.is_established && self.guest_shutdown & SHUTDOWN_SEND == 0;
        let mut room = if may {
            Some(self.room() as usize)
        } else {
            None
        };
        let mut packets = Vec::new();
        for chunk in chunks {
            let header = VsockHeader {
                len: chunk.len() as u32,
                ..self.header(Op::Rw)
            };
            packets.push(guest::bytes(&header, chunk));
            room = room.and_then(|room| room.checked_sub(chunk.len()));
            if room.is_some() {
                self.to_host.sent += chunk.len() as u32;
            }
        }
        let Some(conn) = &mut self.conn else { return };
        let verdict = self.guest.send(&packets, layout, |batch| {
            conn.send_payload(batch, batch.packets())
        });
        let expected = if room.is_some() {
            Verdict::Open
        } else {
            Verdict::Reset(CloseReason::Protocol)
        };
        assert_eq!(
            verdict,
            expected,
            "{} bytes for a room of {}",
            len,
            self.room()
        );
        self.close(verdict);
    }

    fn guest_says(&mut self, op: Op, flags: u32) {
        if self.is_orphan {
            return;
        }
        let header = VsockHeader {
            flags,
            ..self.header(op)
        };
        let Some(conn) = &mut self.conn else { return };
        let owed = conn.owes_host();
        let verdict = conn.send_pkt(op, &header);
        let owes_host = conn.owes_host();
        let expected = match op {
            Op::Request => Verdict::Reset(CloseReason::Protocol),
            Op::Rst if !self.is_established => Verdict::Close(CloseReason::Refused),
            Op::Rst
                if self.guest_shutdown == SHUTDOWN_BOTH || self.told_shutdown == SHUTDOWN_BOTH =>
            {
                Verdict::Close(CloseReason::Done)
            }
            Op::Rst => Verdict::Close(CloseReason::GuestReset),
            Op::Shutdown if !self.is_established => Verdict::Reset(CloseReason::Protocol),
            Op::Shutdown => {
                self.guest_shutdown |= flags & SHUTDOWN_BOTH;
                let is_done = self.guest_shutdown == SHUTDOWN_BOTH && !owes_host;
                if is_done {
                    Verdict::Reset(CloseReason::Done)
                } else {
                    Verdict::Open
                }
            }
            Op::Response if !self.is_established && self.request_is_out => {
                self.is_established = true;
                // A dead program is of use only for what it has left.
                let is_of_use = !self.is_deaf() || self.to_guest.sent > 0;
                if is_of_use {
                    Verdict::Open
                } else {
                    Verdict::Reset(CloseReason::HostGone)
                }
            }
            // It was noticed that the program reads no more.
            _ if owed && !owes_host => Verdict::Reset(CloseReason::Done),
            _ => Verdict::Open,
        };
        assert_eq!(verdict, expected, "{op:?}");
        self.close(verdict);
    }

    fn events(&mut self) -> bool {
        let mut events = [EpollEvent::empty()];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap();
        if count > 0 {
            let has = |wanted| events[0].events().intersects(wanted);
            self.socket_ready(Readiness {
                readable: has(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP),
                halting: has(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLPRI),
                writable: has(EpollFlags::EPOLLOUT),
                gone: has(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR),
            });
        }
        count > 0
    }

    fn socket_ready(&mut self, ready: Readiness) {
        let Some(conn) = &mut self.conn else { return };
        let owed = conn.owes_host();
        let verdict = conn.socket_ready(ready);
        let expected = if owed && !conn.owes_host() {
            Verdict::Reset(CloseReason::Done)
        } else {
            Verdict::Open
        };
        assert_eq!(verdict, expected, "{ready:?}");
        self.close(verdict);
    }

    /// Ends the connection as its table does: bytes that the guest has left to the program are still written.
    fn close(&mut self, verdict: Verdict) {
        let owes_host = self.conn.as_ref().is_some_and(VsockConnection::owes_host);
        if verdict != Verdict::Open && owes_host {
            self.is_orphan = true;
        } else if verdict != Verdict::Open {
            self.is_over = true;
            self.conn = None;
        }
    }

    /// The guest takes what is owed to it, in batches of so many buffers. True when there was something.
    fn guest_receives(&mut self, buffers: usize, layout: Layout) -> bool {
        let mut received = false;
        let mut without_payload = 0;
        while !self.is_orphan
            && let Some(conn) = &mut self.conn
            && let Some(demand) = conn.rx_demand()
        {
            let (verdict, packets) = self
                .guest
                .receive(demand, buffers, layout, |batch| conn.recv_pkt(batch));
            assert_eq!(verdict, Verdict::Open);
            let has_payload = packets.iter().any(|(header, _)| header.len > 0);
            without_payload = if has_payload { 0 } else { without_payload + 1 };
            assert!(without_payload < 10, "packets without end");
            assert!(
                demand <= self.room_of_guest() as usize,
                "{demand} bytes are no room for"
            );
            for (header, payload) in packets {
                received = true;
                self.check(&header, &payload);
            }
        }
        received
    }

    /// Checks a packet to the guest.
    fn check(&mut self, header: &VsockHeader, payload: &[u8]) {
        assert_eq!((header.guest_cid, header.host_cid), (CID, HOST_CID));
        assert_eq!((ConnKey::of(header), header.kind), (KEY, TYPE_STREAM));
        assert_eq!(header.buf_alloc, self.window);
        let forwarded = header.fwd_cnt;
        assert!(
            (self.told..=self.to_host.sent).contains(&forwarded),
            "{forwarded} of {}",
            self.to_host.sent
        );
        if let Some(program) = self.program.as_ref().filter(|_| !self.is_deaf()) {
            let unread =
                recv(program.as_raw_fd(), &mut self.scratch, MsgFlags::MSG_PEEK).unwrap_or(0);
            let unread = unread - self.ok.len().min(unread);
            assert_eq!(
                forwarded as usize,
                self.to_host.received as usize + unread,
                "what the program has, or will"
            );
        }
        self.told = forwarded;
        assert_eq!(header.flags & !SHUTDOWN_BOTH, 0);
        assert!(self.told_shutdown != SHUTDOWN_BOTH || header.op == Op::CreditUpdate as u16);
        match Op::from_raw(header.op).unwrap() {
            Op::Request => {
                assert!(!self.is_established && !self.request_is_out);
                self.request_is_out = true;
            }
            Op::Rw => {
                assert!(self.is_established && !payload.is_empty());
                assert!(
                    payload.len() <= self.room_of_guest() as usize,
                    "past the guest's credit"
                );
                assert_eq!(self.guest_shutdown & SHUTDOWN_RECEIVE, 0);
                assert_eq!(self.told_shutdown & SHUTDOWN_SEND, 0);
                self.to_guest.check(payload);
            }
            Op::Shutdown => self.check_shutdown(header.flags),
            Op::Response | Op::CreditRequest => assert!(self.is_established),
            Op::CreditUpdate => assert!(self.is_established || self.request_is_out),
            Op::Rst => panic!("a connection doesn't send {header:?}"),
        }
        if header.op != Op::Rw as u16 {
            assert!(payload.is_empty());
        }
    }

    fn check_shutdown(&mut self, flags: u32) {
        let ended = Ended {
            by_guest: self.guest_shutdown,
            by_program: self.program_shutdown,
            told: self.told_shutdown,
        };
        ended.check(flags, self.to_guest.is_complete());
        self.told_shutdown = flags;
    }

    fn program_reads(&mut self, len: usize) -> usize {
        let Some(mut program) = self.program.as_ref() else {
            return 0;
        };
        let bytes = &mut self.scratch[..len];
        match program.read(bytes) {
            Ok(0) if len > 0 => {
                let is_ended =
                    self.is_over || self.guest_shutdown & SHUTDOWN_SEND != 0 || self.is_deaf();
                assert!(is_ended, "an end that nobody made");
                0
            }
            Ok(count) => {
                let ok = self.ok.len().min(count);
                assert_eq!(bytes[..ok], self.ok[..ok]);
                assert!(ok == 0 || self.is_established);
                self.ok.drain(..ok);
                self.to_host.check(&bytes[ok..count]);
                count
            }
            Err(error) => {
                let expected = matches!(error.kind(), ErrorKind::WouldBlock)
                    || self.is_over && error.kind() == ErrorKind::ConnectionReset;
                assert!(expected, "{error}");
                0
            }
        }
    }

    fn program_shuts(&mut self, how: Side) {
        let (how, flag) = match how {
            Side::Read => (Shutdown::Read, SHUTDOWN_RECEIVE),
            Side::Write => (Shutdown::Write, SHUTDOWN_SEND),
        };
        if let Some(program) = &self.program {
            let _ = program.shutdown(how);
            self.program_shutdown |= flag;
        }
    }

    /// Both sides take all there is: then all that was promised has come.
    fn settle(&mut self) {
        self.guest_receives(5, Layout::PLAIN);
        if !self.is_established && !self.is_over {
            self.guest_says(Op::Response, 0);
        }
        loop {
            let mut progress = self.events();
            progress |= self.guest_receives(5, Layout::PLAIN);
            progress |= self.program_reads(1 << 18) > 0;
            let window = 1 << 16;
            if !self.is_over
                && (self.taken != self.to_guest.received || self.guest_window != window)
            {
                (self.taken, self.guest_window) = (self.to_guest.received, window);
                self.guest_says(Op::CreditUpdate, 0);
                progress = true;
            }
            if !progress {
                break;
            }
        }
        let guest_is_done = self.guest_shutdown == SHUTDOWN_BOTH;
        if !self.is_deaf() && (!self.is_over || guest_is_done) {
            assert!(
                self.to_host.is_complete(),
                "bytes of the guest's are lost: {:?}",
                self.to_host
            );
            let is_ended = self.is_over || self.guest_shutdown & SHUTDOWN_SEND != 0;
            assert_eq!(self.sees_end(), is_ended, "the program's end of the stream");
        }
        if self.is_over || self.is_orphan {
            return;
        }
        assert!(
            self.ok.is_empty() || self.is_deaf(),
            "the program was not told"
        );
        assert!(!guest_is_done, "there is nothing more to wait for");
        let window = self.window.min(self.guest_window);
        let left = window.saturating_sub(self.to_host.sent - self.told);
        assert!(
            left >= (window / 2).max(1) || self.told == self.to_host.sent || self.is_deaf(),
            "the guest does not know what it may send"
        );
        if self.guest_shutdown & SHUTDOWN_RECEIVE == 0 {
            assert!(
                self.to_guest.is_complete(),
                "bytes of the program's are lost: {:?}",
                self.to_guest
            );
            let ended = self.program_shutdown & SHUTDOWN_SEND;
            assert_eq!(
                self.told_shutdown & SHUTDOWN_SEND,
                ended,
                "the program's end was not told"
            );
        }
        if self.program.is_none() {
            assert_eq!(self.told_shutdown, SHUTDOWN_BOTH, "a program that is gone");
        }
    }

    fn sees_end(&self) -> bool {
        let read = self
            .program
            .as_ref()
            .map(|mut program| program.read(&mut [0]));
        !matches!(read, Some(Err(error)) if error.kind() == ErrorKind::WouldBlock)
    }
}
