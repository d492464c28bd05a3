//! The host's end of a connection: a socket, and what a kernel socket does that a connection must not have to know.
//!
//! All sockets here are non-blocking, and registered edge-triggered: each change is reported once. AF_UNIX has habits of its
//! own that stay in this file:
//!
//! - A peer that calls `shutdown(SHUT_RD)` causes no event on our side, and an end that is full has none to cause. What
//!   tells is a send of no bytes, which fails with EPIPE and otherwise does nothing.
//! - Whether the peer has closed or has only ended its direction is told by POLLHUP, not by what `recv` returns.
//! - A peer that closes before it has read everything leaves ECONNRESET behind its last byte, in place of the end.
//! - A receive stops at descriptors that were sent along, and at out-of-band data, although more bytes follow.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, recv, send,
    sendmsg, setsockopt, shutdown, socket, sockopt,
};

use crate::packet::{Payload, Received, RxBatch};
use crate::syscalls::{Argument, Syscall};

/// To connect to a host program, to move bytes that are not in guest memory, and to look at a socket's state.
pub(super) const SYSCALLS: &[Syscall] = &[
    Syscall::only(
        libc::SYS_socket,
        &[
            Argument::Is(0, libc::AF_UNIX),
            Argument::Is(
                1,
                libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            ),
        ],
    ),
    Syscall::any(libc::SYS_connect),
    Syscall::only(
        libc::SYS_setsockopt,
        &[
            Argument::Is(1, libc::SOL_SOCKET),
            Argument::Is(2, libc::SO_SNDBUF),
        ],
    ),
    Syscall::only(
        libc::SYS_getsockopt,
        &[
            Argument::Is(1, libc::SOL_SOCKET),
            Argument::Is(2, libc::SO_ERROR),
        ],
    ),
    Syscall::only(
        libc::SYS_getsockopt,
        &[
            Argument::Is(1, libc::SOL_SOCKET),
            Argument::Is(2, libc::SO_PEERCRED),
        ],
    ),
    Syscall::any(libc::SYS_sendmsg),
    Syscall::any(libc::SYS_sendto),
    Syscall::any(libc::SYS_recvfrom),
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_poll),
    Syscall::any(libc::SYS_ppoll),
    Syscall::any(libc::SYS_shutdown),
    Syscall::any(libc::SYS_close),
];

/// What the kernel is asked to hold on the way to a slow host program, in bytes. It doubles the number for its own
/// bookkeeping, up to twice `net.core.wmem_max`.
const SEND_BUFFER: usize = 256 * 1024;

/// A connected socket to a host program, or one that is about to be.
#[derive(Debug)]
pub struct HostSocket(OwnedFd);

/// Why a socket took no bytes.
#[derive(Debug)]
pub enum SendError {
    /// It is full. There will be an event when it has room.
    Full,
    /// The other end receives no more.
    Closed,
    /// The system failed.
    Failed(io::Error),
}

/// Why a socket gave no bytes.
#[derive(Debug)]
pub enum ReceiveError {
    /// It has none now. There will be an event when it has.
    Empty,
    /// The other end has closed before it had read everything that was sent to it; what it sent itself is complete.
    Reset,
    /// The guest's memory can't be written. What is in the socket is still there.
    GuestMemory,
    /// The system failed.
    Failed(io::Error),
}

impl HostSocket {
    /// A socket that is connected. It must be non-blocking.
    pub fn new(socket: impl Into<OwnedFd>) -> Self {
        let socket = socket.into();
        // With the kernel's own size it works as well, if more slowly.
        let _ = setsockopt(&socket, sockopt::SndBuf, &SEND_BUFFER);
        Self(socket)
    }

    /// Connects to who listens at `path`, without waiting: a full backlog is `WouldBlock`. A socket that could not be connected is
    /// left in `spare`, and used by the next call: a guest may ask for nobody again and again.
    pub fn connect(path: &Path, spare: &mut Option<OwnedFd>) -> io::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = match spare.take() {
            Some(socket) => socket,
            None => socket(AddressFamily::Unix, SockType::Stream, flags, None)?,
        };
        match connect(socket.as_raw_fd(), &UnixAddr::new(path)?) {
            Ok(()) => Ok(Self::new(socket)),
            Err(error) => {
                *spare = Some(socket);
                Err(error.into())
            }
        }
    }

    /// How a connect that has not waited has ended, once the socket has become writable.
    pub fn connect_result(&self) -> io::Result<()> {
        match getsockopt(self, sockopt::SocketError)? {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// The user who has made the other end. It is the caller of connect(2) at a socket that was accepted.
    pub fn peer_uid(&self) -> io::Result<u32> {
        Ok(getsockopt(self, sockopt::PeerCredentials)?.uid())
    }

    /// Sends payload from guest memory, and returns how much of it the socket took.
    pub fn send(&self, payload: &Payload<'_>) -> Result<usize, SendError> {
        payload.send_to(self).map_err(SendError::from)
    }

    /// Sends bytes of our own, and returns how many the socket took.
    pub fn send_bytes(&self, bytes: &[IoSlice<'_>]) -> Result<usize, SendError> {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), bytes, &[], flags, None) {
                Err(nix::Error::EINTR) => {}
                sent => return sent.map_err(|error| io::Error::from(error).into()),
            }
        }
    }

    /// Receives into the guest's buffers, and returns how many bytes, none at the end of the stream, and whether there were
    /// no more.
    pub fn receive(&self, batch: &RxBatch<'_>) -> Result<Received, ReceiveError> {
        batch.receive_from(self).map_err(ReceiveError::from)
    }

    /// Copies what the socket has into `bytes` and leaves it there. 0 at the end of the stream.
    pub fn peek(&self, bytes: &mut [u8]) -> Result<usize, ReceiveError> {
        self.receive_bytes(bytes, MsgFlags::MSG_PEEK)
    }

    /// Takes bytes out of the socket. 0 at the end of the stream.
    pub fn take(&self, bytes: &mut [u8]) -> Result<usize, ReceiveError> {
        self.receive_bytes(bytes, MsgFlags::empty())
    }

    fn receive_bytes(&self, bytes: &mut [u8], flags: MsgFlags) -> Result<usize, ReceiveError> {
        let flags = flags | MsgFlags::MSG_DONTWAIT;
        loop {
            match recv(self.0.as_raw_fd(), bytes, flags) {
                Err(nix::Error::EINTR) => {}
                received => return received.map_err(|error| io::Error::from(error).into()),
            }
        }
    }

    /// Ends one direction or both. Where that fails, the socket is gone already.
    pub fn shutdown(&self, how: Shutdown) {
        let how = match how {
            Shutdown::Read => nix::sys::socket::Shutdown::Read,
            Shutdown::Write => nix::sys::socket::Shutdown::Write,
            Shutdown::Both => nix::sys::socket::Shutdown::Both,
        };
        let _ = shutdown(self.0.as_raw_fd(), how);
    }

    /// Whether the other end has closed, or both directions are over.
    pub fn peer_closed(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0)
    }

    /// Whether the other end receives no more. A socket whose sending direction we have shut down looks the same.
    pub fn peer_stopped_receiving(&self) -> bool {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        send(self.0.as_raw_fd(), &[], flags) == Err(nix::Error::EPIPE)
    }
}

impl AsFd for HostSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<UnixStream> for HostSocket {
    fn from(stream: UnixStream) -> Self {
        Self::new(stream)
    }
}

impl From<io::Error> for SendError {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected, WouldBlock};
        match error.kind() {
            WouldBlock => Self::Full,
            BrokenPipe | ConnectionReset | NotConnected => Self::Closed,
            _ => Self::Failed(error),
        }
    }
}

impl From<io::Error> for ReceiveError {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EAGAIN) => Self::Empty,
            Some(libc::ECONNRESET) => Self::Reset,
            Some(libc::EFAULT) => Self::GuestMemory,
            _ => Self::Failed(error),
        }
    }
}
