//! Accepts host programs.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use libc::{SOCK_CLOEXEC, SOCK_NONBLOCK};
use log::warn;
use socket2::{Socket, Type};

use super::epoll::Epoll;
use crate::host::entry::{Entry, EntrySocket};
use crate::host::socket::HostSocket;
use crate::packet::header::PacketType;
use crate::syscalls::Syscall;
use crate::thread_backend::event_source::EventSource;

/// To accept.
pub(super) const SYSCALLS: &[Syscall] = &[Syscall::any(libc::SYS_accept4)];

/// How long nobody is accepted after an error.
const PAUSE: Duration = Duration::from_millis(100);

/// What came of an attempt to accept.
#[derive(Debug)]
pub(super) enum Accepted {
    /// A host program has connected, to this entry.
    Client(Entry, HostSocket),
    /// Nobody is waiting.
    Nobody,
    /// The system refuses, for now, and did not before.
    Shortage,
}

/// The listening sockets of a VM. Each in its turn, so that no flood of one keeps the clients of another waiting.
#[derive(Debug)]
pub(super) struct Acceptors {
    all: Vec<Acceptor>,
    /// The one that is looked at first when the next client is accepted.
    next: usize,
}

impl Acceptors {
    /// Takes the sockets, and adds them to the epoll set with their numbers.
    pub(super) fn new(entries: Vec<EntrySocket>, epoll: &Epoll) -> io::Result<Self> {
        let all = entries.into_iter().map(Acceptor::new);
        let all = all.collect::<io::Result<Vec<_>>>()?;
        for (number, acceptor) in (0..).zip(&all) {
            epoll.add_input(acceptor, EventSource::Listener(number))?;
        }
        Ok(Self { all, next: 0 })
    }

    /// Closes the sockets. Clients that wait to be accepted are reset, unless another process has the socket too.
    pub(super) fn close(&mut self) {
        self.all.clear();
    }

    /// Somebody has connected to the socket of this number.
    pub(super) fn set_pending(&mut self, number: u32) {
        if let Some(acceptor) = self.all.get_mut(number as usize) {
            acceptor.set_pending();
        }
    }

    pub(super) fn is_pending(&self) -> bool {
        self.all.iter().any(|acceptor| acceptor.pending)
    }

    /// When to call [`Acceptors::resume`].
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.all.iter().filter_map(|acceptor| acceptor.again).min()
    }

    /// Ends the pauses after failures that are over.
    pub(super) fn resume(&mut self, now: Instant) {
        for acceptor in &mut self.all {
            acceptor.resume(now);
        }
    }

    /// Accepts one host program, from the next socket where somebody may be waiting.
    pub(super) fn accept(&mut self) -> Accepted {
        let (before, from) = self.all.split_at_mut(self.next);
        let at = from
            .iter()
            .chain(&*before)
            .position(|acceptor| acceptor.pending);
        let Some(at) = at else {
            return Accepted::Nobody;
        };
        let at = (self.next + at) % self.all.len();
        self.next = (at + 1) % self.all.len();
        self.all[at].accept()
    }
}

/// A listening socket, and whether it is worth trying.
#[derive(Debug)]
struct Acceptor {
    entry: Entry,
    /// That of the listening socket.
    packet_type: PacketType,
    listener: Socket,
    /// Somebody may be waiting.
    pending: bool,
    /// The last attempt failed, and the log says so.
    short: bool,
    /// When to try again after a failure.
    again: Option<Instant>,
}

impl Acceptor {
    fn new(socket: EntrySocket) -> io::Result<Self> {
        let listener = Socket::from(socket.listener);
        listener.set_nonblocking(true)?;
        Ok(Self {
            entry: socket.entry,
            packet_type: match listener.r#type()? {
                Type::SEQPACKET => PacketType::Seqpacket,
                _ => PacketType::Stream,
            },
            listener,
            pending: true,
            short: false,
            again: None,
        })
    }

    /// Somebody has connected.
    fn set_pending(&mut self) {
        self.pending = self.again.is_none();
    }

    fn resume(&mut self, now: Instant) {
        if self.again.is_some_and(|again| again <= now) {
            self.again = None;
            self.pending = true;
        }
    }

    fn accept(&mut self) -> Accepted {
        loop {
            match self.listener.accept4(SOCK_NONBLOCK | SOCK_CLOEXEC) {
                Ok((socket, _)) => {
                    self.short = false;
                    let socket = OwnedFd::from(socket);
                    let socket = match self.entry {
                        Entry::Vsock(_) => HostSocket::vsock(self.packet_type, socket),
                        Entry::Host | Entry::Port(_) | Entry::Sibling(_) => {
                            HostSocket::new(self.packet_type, socket)
                        }
                    };
                    return Accepted::Client(self.entry, socket);
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
    use std::os::unix::net::{UnixListener, UnixStream};
    use tempfile::TempDir;

    #[test]
    fn an_error_that_is_not_known_pauses_once() {
        // Not a listener at all: accept fails with EINVAL.
        let (socket, _other) = UnixStream::pair().unwrap();
        let mut acceptor = Acceptor::new(EntrySocket::new(Entry::Host, socket)).unwrap();
        assert!(matches!(acceptor.accept(), Accepted::Shortage));
        assert!(!acceptor.pending, "it must not be tried again at once");
        acceptor.set_pending();
        assert!(!acceptor.pending, "an event does not end the pause");
        acceptor.resume(Instant::now() + PAUSE);
        assert!(acceptor.pending);
        assert!(
            matches!(acceptor.accept(), Accepted::Nobody),
            "logged twice"
        );
    }

    #[test]
    fn clients_are_accepted_after_a_pause() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let entry = EntrySocket::new(Entry::Host, listener.try_clone().unwrap());
        let mut acceptor = Acceptor::new(entry).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        assert!(matches!(
            acceptor.accept(),
            Accepted::Client(Entry::Host, _)
        ));
        assert!(matches!(acceptor.accept(), Accepted::Nobody));
        assert!(!acceptor.pending);
        // Whoever shares the listener may shut it down.
        shutdown(listener.as_raw_fd(), Shutdown::Both).unwrap();
        acceptor.set_pending();
        assert!(matches!(
            acceptor.accept(),
            Accepted::Shortage | Accepted::Nobody
        ));
        assert!(!acceptor.pending);
    }
}
