//! The model of one connection of the worker's: what its two ends have done, and what they were promised.

use std::cell::RefCell;
use std::io::{Error, ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vhost_user_vsock::packet::header::{MessageFlags, Op, PacketType, ShutdownFlags, VsockHeader};
use vhost_user_vsock::vsock_conn::ConnKey;

use super::super::borders::Borders;
use super::super::shutdown::Ended;
use super::super::stream::Stream;

/// The most that a host program reads at a time, in bytes.
pub(super) const MAX_READ: usize = 1 << 18;

thread_local! {
    /// Room for what host programs read.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_READ]);
}

/// Where a connection is in the eyes of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// A host program has asked for it, and the guest does not know it.
    Unknown,
    /// The guest has got a REQUEST.
    Asked,
    /// The guest has sent a REQUEST.
    Asking,
    /// Bytes flow.
    Open,
    /// It is over, for whatever reason.
    Over,
}

/// What is promised of a connection's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Promise {
    /// Every byte arrives, and each end learns when the other ends.
    All,
    /// What arrives is the beginning of what was sent, and no more is promised: somebody has aborted it.
    Prefix,
}

/// How far the guest's credit reaches. The packets of a turn may use any credit that the guest has given since it last knew
/// that the worker has taken everything.
#[derive(Debug, Default)]
struct Limits {
    settled: u32,
    pending: u32,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Conn {
    pub key: ConnKey,
    pub state: State,
    pub promise: Promise,
    pub by_host: bool,
    pub program: Option<UnixStream>,
    /// There was a program for it.
    pub is_accepted: bool,
    /// The program has seen the end of its stream.
    program_saw_end: bool,
    /// What the program reads before the guest's bytes.
    ok: Vec<u8>,
    pub to_host: Stream,
    pub to_guest: Stream,
    /// Where their messages end, if it carries messages.
    pub host_borders: Borders,
    guest_borders: Borders,
    /// The daemon's buffer, and how many of the guest's bytes have left it as far as the guest knows.
    window: u32,
    forwarded: u32,
    /// The guest's buffer, and how many of the program's bytes have left it.
    pub guest_window: u32,
    /// It was over for the guest when an RST came for a message that is too long.
    is_reset_late: bool,
    /// The smallest that the guest's buffer has been.
    least_window: u32,
    pub taken: u32,
    limits: Limits,
    pub guest_shutdown: ShutdownFlags,
    pub program_shutdown: ShutdownFlags,
    /// What of the program's the guest knows.
    pub sent_shutdown: ShutdownFlags,
    /// The guest has gone past its credit: it must be reset.
    pub overran: bool,
    /// The guest has sent for it what is out of place, perhaps an RST.
    is_garbled: bool,
    /// The program may have seen the end before the guest: the guest had no buffer for an RST.
    pub ends_early: bool,
}

impl Conn {
    pub(super) fn new(number: u32, key: ConnKey, state: State, window: u32) -> Self {
        Self {
            key,
            state,
            promise: Promise::All,
            by_host: state == State::Unknown,
            program: None,
            is_accepted: state == State::Unknown,
            program_saw_end: false,
            ok: Vec::new(),
            to_host: Stream::new(2 * number),
            to_guest: Stream::new(2 * number + 1),
            host_borders: Borders::default(),
            guest_borders: Borders::default(),
            window,
            forwarded: 0,
            guest_window: 8192,
            least_window: 8192,
            is_reset_late: false,
            taken: 0,
            limits: Limits::default(),
            guest_shutdown: ShutdownFlags::empty(),
            program_shutdown: ShutdownFlags::empty(),
            sent_shutdown: ShutdownFlags::empty(),
            overran: false,
            is_garbled: false,
            ends_early: false,
        }
    }

    pub(super) fn has_messages(&self) -> bool {
        self.key.packet_type == PacketType::Seqpacket
    }

    /// How many bytes the guest has sent of a message that it has not finished.
    fn unfinished(&self) -> u32 {
        if self.has_messages() {
            self.host_borders.unfinished(self.to_host.sent)
        } else {
            0
        }
    }

    /// The guest has sent so many bytes more. Where they end no message, they must leave room for its end. Returns whether they
    /// end one.
    pub(super) fn count_sent(&mut self, len: usize, ends: bool) -> bool {
        self.to_host.sent += len as u32;
        let ends = ends || self.unfinished() >= self.window;
        if ends {
            self.host_borders.end(self.to_host.sent);
        }
        ends
    }

    /// Whether the program's next message is longer than the guest's buffer was.
    pub(super) fn is_next_too_long(&self) -> bool {
        let len = self.guest_borders.next_message();
        self.has_messages() && len.is_some_and(|len| len > self.least_window)
    }

    /// Whether this is the first RST that comes after its end.
    pub(super) fn may_be_reset_late(&mut self) -> bool {
        // What the guest had sent since was for nobody.
        self.promise = Promise::Prefix;
        !std::mem::replace(&mut self.is_reset_late, true)
    }

    /// The guest sends what is out of place. It says that there is no buffer, too.
    pub(super) fn garble(&mut self) {
        self.is_garbled = true;
        self.least_window = 0;
        self.abort();
    }

    /// How much the guest may send.
    pub(super) fn credit(&self) -> u32 {
        self.window
            .saturating_sub(self.to_host.sent - self.forwarded)
    }

    /// The program still receives.
    pub(super) fn program_receives(&self) -> bool {
        !self.program_shutdown.contains(ShutdownFlags::RECEIVE)
    }

    /// Whether the guest may send bytes.
    pub(super) fn guest_may_write(&self) -> bool {
        self.state == State::Open && !self.guest_shutdown.contains(ShutdownFlags::SEND)
    }

    /// The guest has closed it properly.
    pub(super) fn guest_is_done(&self) -> bool {
        self.guest_shutdown.is_all()
    }

    /// The guest knows it and has closed it, and so waits for an RST.
    pub(super) fn awaits_reset(&self) -> bool {
        self.state == State::Open && self.guest_is_done() && !self.is_garbled
    }

    /// The guest gives credit with a packet.
    pub(super) fn give_credit(&mut self, header: &mut VsockHeader) {
        header.buf_alloc = self.guest_window;
        header.fwd_cnt = self.taken;
        self.least_window = self.least_window.min(self.guest_window);
        self.limits.pending = self.limits.pending.max(self.limit());
    }

    fn limit(&self) -> u32 {
        self.taken.saturating_add(self.guest_window)
    }

    /// The worker has taken everything that the guest has sent, and the guest has taken everything since: what comes from now
    /// on is within the last credit.
    pub(super) fn settle_credit(&mut self) {
        self.limits = Limits {
            settled: self.limit(),
            pending: 0,
        };
    }

    /// Somebody aborts it: no more is promised, unless the guest has closed it properly before.
    pub(super) fn abort(&mut self) {
        if !self.guest_is_done() {
            self.promise = Promise::Prefix;
        }
    }

    /// It was reset or refused.
    pub(super) fn end(&mut self) {
        self.state = State::Over;
    }

    /// Takes a packet to the guest, other than RST.
    pub(super) fn receive(&mut self, header: &VsockHeader, payload: &[u8]) {
        assert_eq!(header.buf_alloc, self.window);
        let forwarded = header.fwd_cnt;
        assert!(
            (self.forwarded..=self.to_host.sent).contains(&forwarded),
            "{forwarded} bytes have left the buffer of {self:?}"
        );
        self.forwarded = forwarded;
        let has_end = self.guest_shutdown.contains(ShutdownFlags::SEND);
        assert!(
            !self.has_messages()
                || !self.program_receives()
                || self
                    .host_borders
                    .may_have_left(forwarded, self.to_host.sent, has_end),
            "{forwarded} bytes are no whole messages: {self:?}"
        );
        assert!(!self.sent_shutdown.is_all() || header.op == Op::CreditUpdate);
        match header.op {
            Op::Request => {
                assert_eq!(self.state, State::Unknown);
                self.state = State::Asked;
                self.ok = format!("OK {}\n", header.peer.port.0).into_bytes();
            }
            Op::Response => {
                assert_eq!(self.state, State::Asking);
                self.state = State::Open;
            }
            Op::Rw => self.receive_payload(header, payload),
            Op::Shutdown => self.receive_shutdown(header),
            Op::CreditUpdate => assert!(matches!(self.state, State::Asked | State::Open)),
            Op::CreditRequest => assert_eq!(self.state, State::Open),
            Op::Rst | Op::Unknown(_) => panic!("{header:?}"),
        }
    }

    fn receive_payload(&mut self, header: &VsockHeader, payload: &[u8]) {
        assert!(
            self.state == State::Open && !payload.is_empty(),
            "{} bytes for {self:?}",
            payload.len()
        );
        assert!(
            !self.sent_shutdown.contains(ShutdownFlags::SEND),
            "bytes behind the end"
        );
        self.to_guest.check(payload);
        let limit = self.limits.settled.max(self.limits.pending);
        assert!(
            self.to_guest.received <= limit,
            "past the guest's credit: {self:?}"
        );
        if !self.has_messages() {
            return assert_eq!(header.flags, 0);
        }
        let is_last = header.flags == MessageFlags::EOM.bits();
        assert!(is_last || header.flags == 0);
        self.guest_borders
            .check_part(self.to_guest.received, is_last);
    }

    fn receive_shutdown(&mut self, header: &VsockHeader) {
        assert_eq!(self.state, State::Open);
        let ended = Ended {
            by_guest: self.guest_shutdown,
            by_program: self.program_shutdown,
            sent: self.sent_shutdown,
        };
        self.sent_shutdown = ended.check(header, self.to_guest.is_complete());
    }

    /// The program writes, as much as its socket takes.
    pub(super) fn program_writes(&mut self, len: usize) {
        let bytes = self.to_guest.next(len);
        let written = self
            .program
            .as_ref()
            .and_then(|mut program| program.write(&bytes).ok());
        self.to_guest.sent += written.unwrap_or(0) as u32;
        if written.is_some() {
            self.guest_borders.end(self.to_guest.sent);
        }
    }

    /// The program reads, and returns how much there was.
    pub(super) fn program_reads(&mut self, len: usize) -> usize {
        // What is not read of a message is lost.
        let len = if self.has_messages() { MAX_READ } else { len };
        SCRATCH.with_borrow_mut(|scratch| self.program_reads_into(&mut scratch[..len]))
    }

    fn program_reads_into(&mut self, scratch: &mut [u8]) -> usize {
        let Some(mut program) = self.program.as_ref().filter(|_| !self.program_saw_end) else {
            return 0;
        };
        let mut read = program.read(scratch);
        let is_reset = |error: &Error| error.kind() == ErrorKind::ConnectionReset;
        if self.has_messages() && read.as_ref().is_err_and(is_reset) {
            // Messages may follow.
            read = program.read(scratch);
        }
        match read {
            Ok(0) => {
                self.program_saw_end |= !scratch.is_empty();
                0
            }
            Ok(count) => {
                let ok = self.ok.len().min(count);
                assert_eq!(scratch[..ok], self.ok[..ok], "in place of OK");
                assert!(
                    !self.by_host || !matches!(self.state, State::Unknown | State::Asked),
                    "bytes before the answer"
                );
                self.ok.drain(..ok);
                self.to_host.check(&scratch[ok..count]);
                if self.has_messages() && ok == 0 {
                    self.host_borders.check_whole(self.to_host.received);
                } else if self.has_messages() {
                    assert!(self.ok.is_empty() && count == ok, "OK is a message");
                }
                count
            }
            Err(error) => {
                let is_abort = error.kind() == ErrorKind::ConnectionReset;
                assert!(is_abort || error.kind() == ErrorKind::WouldBlock, "{error}");
                self.program_saw_end |= is_abort;
                0
            }
        }
    }

    pub(super) fn program_shuts(&mut self, reading: bool) {
        let (how, flag) = if reading {
            (Shutdown::Read, ShutdownFlags::RECEIVE)
        } else {
            (Shutdown::Write, ShutdownFlags::SEND)
        };
        if let Some(program) = &self.program {
            let _ = program.shutdown(how);
            self.program_shutdown |= flag;
        }
    }

    pub(super) fn program_closes(&mut self) {
        if self.program.take().is_some() {
            self.program_shutdown = ShutdownFlags::all();
        }
    }

    /// Both sides have taken everything: what was promised has come.
    pub(super) fn check_settled(&self) {
        assert!(
            !self.overran || self.state == State::Over,
            "went past its credit and goes on: {self:?}"
        );
        if self.promise == Promise::Prefix {
            return;
        }
        assert_ne!(self.state, State::Asking, "no answer: {self:?}");
        assert!(
            self.state != State::Unknown || self.program_shutdown.is_all(),
            "no answer: {self:?}"
        );
        let is_open = self.state == State::Open;
        if self.program_receives() && (is_open || self.guest_is_done()) {
            assert_eq!(
                self.to_host.received,
                self.to_host.sent - self.unfinished(),
                "bytes of the guest's are lost: {self:?}"
            );
            assert!(!self.has_messages() || self.host_borders.is_complete());
            let has_ended = !is_open || self.guest_shutdown.contains(ShutdownFlags::SEND);
            assert_eq!(self.program_saw_end, has_ended, "{self:?}");
        }
        assert!(!self.guest_is_done() || !is_open, "no RST: {self:?}");
        let guest_receives = !self.guest_shutdown.contains(ShutdownFlags::RECEIVE);
        if guest_receives && matches!(self.state, State::Open | State::Over) {
            assert!(
                self.to_guest.is_complete(),
                "bytes of the program's are lost: {self:?}"
            );
        }
        if is_open {
            self.check_open(guest_receives);
        }
    }

    /// What holds of a connection that goes on.
    fn check_open(&self, guest_receives: bool) {
        let program_receives = self.program_receives();
        assert!(self.ok.is_empty() || !program_receives, "no OK: {self:?}");
        let window = self.window.min(self.guest_window);
        let left = window.saturating_sub(self.to_host.sent - self.forwarded);
        assert!(
            left >= (window / 2).max(1)
                || self.forwarded >= self.to_host.sent - self.unfinished()
                || !program_receives,
            "the guest does not know what it may send: {self:?}"
        );
        assert!(
            self.program.is_some(),
            "the guest does not know that the program is gone: {self:?}"
        );
        let program_sends = !self.program_shutdown.contains(ShutdownFlags::SEND);
        let has_end = self.sent_shutdown.contains(ShutdownFlags::SEND);
        assert!(
            !guest_receives || has_end != program_sends,
            "the guest does not know whether the program still sends: {self:?}"
        );
    }
}
