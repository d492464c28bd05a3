//! Accepts host programs.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use log::warn;

use crate::syscalls::{Argument, Syscall};

/// To accept.
pub(super) const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_accept4),
    Syscall::only(libc::SYS_ioctl, &[Argument::Is(1, libc::FIONBIO as i32)]),
];

/// How long nobody is accepted after an error.
const PAUSE: Duration = Duration::from_millis(100);

/// What came of an attempt to accept.
#[derive(Debug)]
pub(super) enum Accepted {
    /// A host program has connected.
    Client(OwnedFd),
    /// Nobody is waiting.
    Nobody,
    /// The system refuses, for now, and did not before.
    Shortage,
}

/// The listener, and whether it is worth trying.
#[derive(Debug)]
pub(super) struct Acceptor {
    listener: UnixListener,
    /// Somebody may be waiting.
    pending: bool,
    /// The last attempt failed, and the log says so.
    short: bool,
    /// When to try again after a failure.
    again: Option<Instant>,
}

impl Acceptor {
    pub(super) fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            pending: true,
            short: false,
            again: None,
        })
    }

    /// Somebody has connected.
    pub(super) fn set_pending(&mut self) {
        self.pending = self.again.is_none();
    }

    pub(super) fn is_pending(&self) -> bool {
        self.pending
    }

    /// When to call [`Acceptor::resume`].
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.again
    }

    /// Ends the pause after a failure if it is over.
    pub(super) fn resume(&mut self, now: Instant) {
        if self.again.is_some_and(|again| again <= now) {
            self.again = None;
            self.pending = true;
        }
    }

    /// Accepts one host program.
    pub(super) fn accept(&mut self) -> Accepted {
        loop {
            let accepted = self.listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(OwnedFd::from(stream))
            });
            match accepted {
                Ok(socket) => {
                    self.short = false;
                    return Accepted::Client(socket);
                }
                Err(error) => match error.kind() {
                    // The client has left already, or a signal came.
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => {
                        self.pending = false;
                        self.short = false;
                        return Accepted::Nobody;
                    }
                    // No descriptor, no memory, a listener that somebody has shut down: whatever it is, it may last.
                    _ => return self.pause(&error),
                },
            }
        }
    }

    fn pause(&mut self, error: &io::Error) -> Accepted {
        self.pending = false;
        self.again = Some(Instant::now() + PAUSE);
        if std::mem::replace(&mut self.short, true) {
            return Accepted::Nobody;
        }
        warn!("clients must wait: {error}");
        Accepted::Shortage
    }
}

impl AsRawFd for Acceptor {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Shutdown, shutdown};
    use std::os::unix::net::UnixStream;
    use tempfile::TempDir;

    #[test]
    fn an_error_that_is_not_known_pauses_once() {
        // Not a listener at all: accept fails with EINVAL.
        let (socket, _other) = UnixStream::pair().unwrap();
        let listener = UnixListener::from(OwnedFd::from(socket));
        let mut acceptor = Acceptor::new(listener).unwrap();
        assert!(matches!(acceptor.accept(), Accepted::Shortage));
        assert!(!acceptor.is_pending(), "it must not be tried again at once");
        acceptor.set_pending();
        assert!(!acceptor.is_pending(), "an event does not end the pause");
        acceptor.resume(Instant::now() + PAUSE);
        assert!(acceptor.is_pending());
        assert!(matches!(acceptor.accept(), Accepted::Nobody), "logged twice");
    }

    #[test]
    fn clients_are_accepted_after_a_pause() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut acceptor = Acceptor::new(listener.try_clone().unwrap()).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        assert!(matches!(acceptor.accept(), Accepted::Client(_)));
        assert!(matches!(acceptor.accept(), Accepted::Nobody));
        assert!(!acceptor.is_pending());
        // Whoever shares the listener may shut it down.
        shutdown(listener.as_raw_fd(), Shutdown::Both).unwrap();
        acceptor.set_pending();
        assert!(matches!(
            acceptor.accept(),
            Accepted::Shortage | Accepted::Nobody
        ));
        assert!(!acceptor.is_pending());
    }
}
