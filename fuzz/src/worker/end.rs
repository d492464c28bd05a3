//! One connection of the worker's: what both its ends have done, and what they were promised.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vhost_user_vsock::packet::header::{
    Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, VsockHeader,
};
use vhost_user_vsock::vsock_conn::ConnKey;

use super::super::shutdown::Ended;
use super::super::stream::Stream;

/// What a guest knows of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing: a host program has asked for it.
    Unknown,
    /// It has got a REQUEST.
    Asked,
    /// It has sent a REQUEST.
    Asking,
    /// Bytes flow.
    Open,
    /// It is over, for whatever reason.
    Over,
}

/// What has become of a connection whose end was no proper one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Promise {
    /// Every byte arrives, and both ends learn of the other's.
    All,
    /// What arrives is the beginning of what was sent, and no more is promised.
    Prefix,
}

/// The packets of one turn may be counted with what the guest said at any time since the turn before.
#[derive(Debug, Default)]
struct Limits {
    settled: u32,
    pending: u32,
}

/// A connection.
#[derive(Debug)]
pub(super) struct End {
    pub key: ConnKey,
    pub state: State,
    pub promise: Promise,
    pub by_host: bool,
    pub program: Option<UnixStream>,
    /// There was a program for it.
    pub is_accepted: bool,
    /// The program has seen the end of its stream.
    program_saw_end: bool,
    /// What comes before the guest's bytes.
    ok: Vec<u8>,
    pub to_host: Stream,
    pub to_guest: Stream,
    /// Our buffer, and what of the guest's bytes we have said to be out of it.
    window: u32,
    told: u32,
    pub guest_window: u32,
    pub taken: u32,
    limits: Limits,
    pub guest_shutdown: u32,
    pub told_shutdown: u32,
    pub program_shutdown: u32,
    /// The guest has gone past its credit: it must be reset.
    pub overran: bool,
}

impl End {
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
            window,
            told: 0,
            guest_window: 8192,
            taken: 0,
            limits: Limits::default(),
            guest_shutdown: 0,
            told_shutdown: 0,
            program_shutdown: 0,
            overran: false,
        }
    }

    /// How much the guest may send.
    pub(super) fn room(&self) -> u32 {
        self.window.saturating_sub(self.to_host.sent - self.told)
    }

    /// The program takes no more bytes.
    pub(super) fn is_deaf(&self) -> bool {
        self.program_shutdown & SHUTDOWN_RECEIVE != 0
    }

    /// Whether the guest may send bytes.
    pub(super) fn guest_may_write(&self) -> bool {
        self.state == State::Open && self.guest_shutdown & SHUTDOWN_SEND == 0
    }

    /// The guest ended it properly.
    pub(super) fn guest_is_done(&self) -> bool {
        self.guest_shutdown == SHUTDOWN_BOTH
    }

    /// The guest's word on its buffer goes out with a packet.
    pub(super) fn say(&mut self, header: &mut VsockHeader) {
        header.buf_alloc = self.guest_window;
        header.fwd_cnt = self.taken;
        self.limits.pending = self.limits.pending.max(self.limit());
    }

    fn limit(&self) -> u32 {
        self.taken.saturating_add(self.guest_window)
    }

    /// All that the guest has said was heard, and what it gets from now on minds the last of it.
    pub(super) fn was_heard(&mut self) {
        self.limits = Limits {
            settled: self.limit(),
            pending: 0,
        };
    }

    /// Nothing is promised any more, unless the guest has ended it properly before.
    pub(super) fn taint(&mut self) {
        if !self.guest_is_done() {
            self.promise = Promise::Prefix;
        }
    }

    /// It was reset or refused; only bytes that were sent before a proper end are still promised.
    pub(super) fn end(&mut self) {
        self.state = State::Over;
    }

    /// Takes a packet to the guest, other than RST.
    pub(super) fn receive(&mut self, header: &VsockHeader, payload: &[u8]) {
        assert_eq!(header.buf_alloc, self.window);
        let forwarded = header.fwd_cnt;
        assert!(
            (self.told..=self.to_host.sent).contains(&forwarded),
            "{forwarded} bytes are out of a buffer that had {self:?}"
        );
        self.told = forwarded;
        assert!(self.told_shutdown != SHUTDOWN_BOTH || header.op == Op::CreditUpdate as u16);
        match Op::from_raw(header.op) {
            Some(Op::Request) => {
                assert_eq!(self.state, State::Unknown);
                self.state = State::Asked;
                self.ok = format!("OK {}\n", header.host_port.0).into_bytes();
            }
            Some(Op::Response) => {
                assert_eq!(self.state, State::Asking);
                self.state = State::Open;
            }
            Some(Op::Rw) => self.receive_payload(payload),
            Some(Op::Shutdown) => self.receive_shutdown(header.flags),
            Some(Op::CreditUpdate) => assert!(matches!(self.state, State::Asked | State::Open)),
            Some(Op::CreditRequest) => assert_eq!(self.state, State::Open),
            Some(Op::Rst) | None => panic!("{header:?}"),
        }
    }

    fn receive_payload(&mut self, payload: &[u8]) {
        assert!(self.state == State::Open && !payload.is_empty());
        assert_eq!(
            self.told_shutdown & SHUTDOWN_SEND,
            0,
            "bytes behind the end"
        );
        self.to_guest.check(payload);
        let limit = self.limits.settled.max(self.limits.pending);
        assert!(
            self.to_guest.received <= limit,
            "past the guest's credit: {self:?}"
        );
    }

    fn receive_shutdown(&mut self, flags: u32) {
        assert_eq!(self.state, State::Open);
        assert_eq!(flags & !SHUTDOWN_BOTH, 0);
        let ended = Ended {
            by_guest: self.guest_shutdown,
            by_program: self.program_shutdown,
            told: self.told_shutdown,
        };
        ended.check(flags, self.to_guest.is_complete());
        self.told_shutdown = flags;
    }

    /// The program writes, as much as its socket takes.
    pub(super) fn program_writes(&mut self, len: usize) {
        let bytes = self.to_guest.next(len);
        let written = self
            .program
            .as_ref()
            .and_then(|mut program| program.write(&bytes).ok());
        self.to_guest.sent += written.unwrap_or(0) as u32;
    }

    /// The program reads, and answers how much there was.
    pub(super) fn program_reads(&mut self, scratch: &mut [u8]) -> usize {
        let Some(mut program) = self.program.as_ref() else {
            return 0;
        };
        match program.read(scratch) {
            Ok(0) => {
                self.program_saw_end |= !scratch.is_empty();
                0
            }
            Ok(count) => {
                let ok = self.ok.len().min(count);
                assert_eq!(scratch[..ok], self.ok[..ok], "in place of OK");
                assert!(
                    !self.by_host || !matches!(self.state, State::Unknown | State::Asked),
                    "bytes without an answer"
                );
                self.ok.drain(..ok);
                self.to_host.check(&scratch[ok..count]);
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
            (Shutdown::Read, SHUTDOWN_RECEIVE)
        } else {
            (Shutdown::Write, SHUTDOWN_SEND)
        };
        if let Some(program) = &self.program {
            let _ = program.shutdown(how);
            self.program_shutdown |= flag;
        }
    }

    pub(super) fn program_closes(&mut self) {
        if self.program.take().is_some() {
            self.program_shutdown = SHUTDOWN_BOTH;
        }
    }

    /// Both sides have taken all there was: what was promised has come.
    pub(super) fn check_settled(&self) {
        assert!(
            !self.overran || self.state == State::Over,
            "went past its credit and lives: {self:?}"
        );
        if self.promise == Promise::Prefix {
            return;
        }
        assert_ne!(
            self.state,
            State::Asking,
            "a request without an answer: {self:?}"
        );
        assert!(
            self.state != State::Unknown || self.program.is_none(),
            "a client without an answer: {self:?}"
        );
        let is_live = self.state == State::Open;
        if !self.is_deaf() && (is_live || self.guest_is_done()) {
            assert!(
                self.to_host.is_complete(),
                "bytes of the guest's are lost: {self:?}"
            );
            let is_ended = !is_live || self.guest_shutdown & SHUTDOWN_SEND != 0;
            assert_eq!(
                self.program_saw_end, is_ended,
                "the program's end of its stream: {self:?}"
            );
        }
        assert!(
            !self.guest_is_done() || !is_live,
            "its end was not confirmed: {self:?}"
        );
        let is_heard = self.guest_shutdown & SHUTDOWN_RECEIVE == 0;
        if is_heard && matches!(self.state, State::Open | State::Over) && !self.guest_is_done() {
            assert!(
                self.to_guest.is_complete(),
                "bytes of the program's are lost: {self:?}"
            );
        }
        if is_live {
            assert!(
                self.ok.is_empty() || self.is_deaf(),
                "the program was not told: {self:?}"
            );
            let window = self.window.min(self.guest_window);
            let left = window.saturating_sub(self.to_host.sent - self.told);
            assert!(
                left >= (window / 2).max(1) || self.told == self.to_host.sent || self.is_deaf(),
                "the guest does not know what it may send: {self:?}"
            );
            assert!(
                self.program.is_some(),
                "the guest does not know that the program is gone: {self:?}"
            );
            let ended = self.program_shutdown & SHUTDOWN_SEND;
            assert!(
                !is_heard || self.told_shutdown & SHUTDOWN_SEND == ended,
                "an end was not told: {self:?}"
            );
        }
    }
}
