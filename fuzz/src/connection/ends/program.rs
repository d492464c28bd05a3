//! What the host program does.

use std::io::{Error, ErrorKind, Read as _, Write as _};
use std::net::Shutdown;

use vhost_user_vsock::packet::header::ShutdownFlags;

use super::super::{Opening, Side};
use super::{Ends, MAX_SOCKET, SCRATCH};

impl Ends<'_> {
    /// Whether the program has written anything, a message of no bytes included.
    pub(super) fn has_written(&self) -> bool {
        self.to_guest.sent > 0 || self.written > 0
    }

    /// What the program has to write before its bytes. A message is written once.
    pub(super) fn unwritten_answer(&self) -> &'static [u8] {
        match self.opening {
            Opening::Answering(_) if self.has_messages() && self.answered > 0 => b"",
            Opening::Answering(answer) => &answer[self.answered..],
            _ => b"",
        }
    }

    /// The program writes as much of this as its socket takes. False when that is nothing.
    pub(in super::super) fn program_writes(&mut self, len: usize) -> bool {
        let Some(mut program) = self.program.as_ref() else {
            return false;
        };
        if self.has_messages() {
            return self.program_writes_message(len);
        }
        let mut bytes = self.unwritten_answer().to_vec();
        let before = bytes.len();
        bytes.extend(self.to_guest.next(len.saturating_sub(before)));
        bytes.truncate(len);
        let written = program.write(&bytes).unwrap_or(0);
        self.answered += written.min(before);
        self.to_guest.sent += written.saturating_sub(before) as u32;
        written > 0
    }

    /// The program writes a message of this length, or its answer. False when its socket does not take it.
    fn program_writes_message(&mut self, len: usize) -> bool {
        let Some(mut program) = self.program.as_ref() else {
            return false;
        };
        let answer = self.unwritten_answer();
        if !answer.is_empty() {
            let written = program.write(&answer[..len.clamp(1, answer.len())]);
            self.answered = written.unwrap_or(0);
            return self.answered > 0;
        }
        let Ok(written) = program.write(&self.to_guest.next(len)) else {
            return false;
        };
        assert_eq!(written, len, "a part of a message");
        self.to_guest.sent += len as u32;
        self.guest_borders.end(self.to_guest.sent);
        self.written += 1;
        self.empty += usize::from(len == 0);
        true
    }

    /// The program reads up to `len` bytes. False when there are none.
    pub(in super::super) fn program_reads(&mut self, len: usize) -> bool {
        // What is not read of a message is lost.
        let len = if self.has_messages() { MAX_SOCKET } else { len };
        SCRATCH.with_borrow_mut(|scratch| self.program_reads_into(&mut scratch[..len]))
    }

    fn program_reads_into(&mut self, scratch: &mut [u8]) -> bool {
        let Some(mut program) = self.program.as_ref() else {
            return false;
        };
        let mut read = program.read(scratch);
        let is_reset = |error: &Error| error.kind() == ErrorKind::ConnectionReset;
        if self.has_messages() && self.is_over && read.as_ref().is_err_and(is_reset) {
            // Messages may follow.
            read = program.read(scratch);
        }
        match read {
            Ok(0) => {
                let has_ended = self.is_over
                    || self.guest_shutdown.contains(ShutdownFlags::SEND)
                    || !self.program_receives();
                assert!(
                    scratch.is_empty() || has_ended,
                    "an end that nobody has made"
                );
                false
            }
            Ok(count) => {
                let (ok, rest) = self.ok.split_at(self.ok.len().min(count));
                assert_eq!(scratch[..ok.len()], *ok);
                assert!(self.is_established);
                self.to_host.check(&scratch[ok.len()..count]);
                if self.has_messages() {
                    if ok.is_empty() {
                        self.host_borders.check_whole(self.to_host.received);
                    } else {
                        assert!(rest.is_empty() && count == ok.len(), "OK is a message");
                    }
                }
                self.ok = rest;
                true
            }
            Err(error) => {
                let is_reset = self.is_over && error.kind() == ErrorKind::ConnectionReset;
                assert!(is_reset || error.kind() == ErrorKind::WouldBlock, "{error}");
                false
            }
        }
    }

    pub(in super::super) fn program_shuts(&mut self, side: Side) {
        let (how, flag) = match side {
            Side::Read => (Shutdown::Read, ShutdownFlags::RECEIVE),
            Side::Write => (Shutdown::Write, ShutdownFlags::SEND),
        };
        if let Some(program) = &self.program {
            let _ = program.shutdown(how);
            self.program_shutdown |= flag;
        }
    }

    pub(in super::super) fn program_closes(&mut self) {
        self.program = None;
        self.program_shutdown = ShutdownFlags::all();
    }

    pub(super) fn program_sees_end(&self) -> bool {
        let read = self
            .program
            .as_ref()
            .map(|mut program| program.read(&mut [0]));
        !matches!(read, Some(Err(error)) if error.kind() == ErrorKind::WouldBlock)
    }
}
