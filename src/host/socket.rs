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
//!
//! AF_VSOCK, where a guest's connections are forwarded to that of the host, has others:
//!
//! - POLLHUP is set only once both we and the peer have ended our direction. A peer that has closed sends no more (POLLRDHUP) and
//!   receives no more (EPIPE, as above); after a reset the socket is not connected (ENOTCONN).
//! - A connect goes on in the background. An error that ends it is ECONNRESET where nobody listens.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    MsgFlags, SockaddrStorage, getpeername, getsockopt, recv, send, sendmsg, setsockopt, shutdown,
    sockopt,
};

use crate::packet::{Payload, Received, RxBatch};
use crate::syscalls::{Argument, Syscall};

/// To move bytes that are not in guest memory, and to look at a socket's state.
pub(super) const SYSCALLS: &[Syscall] = &[
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
    Syscall::any(libc::SYS_getpeername),
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

    /// A socket of AF_VSOCK that is connected, or about to be. It must be non-blocking. How much it holds is the credit that the
    /// peer gives.
    pub fn vsock(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// How a connect that has not waited has ended; none while it goes on.
    pub fn connect_result(&self) -> Option<io::Result<()>> {
        match getsockopt(self, sockopt::SocketError) {
            Ok(0) => {}
            Ok(error) => return Some(Err(io::Error::from_raw_os_error(error))),
            Err(error) => return Some(Err(error.into())),
        }
        let connected = getpeername::<SockaddrStorage>(self.0.as_raw_fd()).is_ok();
        connected.then_some(Ok(()))
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
        let sends_no_more = PollFlags::from_bits_retain(libc::POLLRDHUP);
        self.has(PollFlags::empty()) || self.has(sends_no_more) && self.peer_stopped_receiving()
    }

    /// Whether one of these events is there, or POLLHUP or POLLERR.
    fn has(&self, events: PollFlags) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), events)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0)
    }

    /// Whether the other end receives no more. A socket whose sending direction we have shut down looks the same.
    pub fn peer_stopped_receiving(&self) -> bool {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let sent = send(self.0.as_raw_fd(), &[], flags);
        matches!(sent, Err(Errno::EPIPE | Errno::ENOTCONN))
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

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

    fn pair() -> (HostSocket, UnixStream) {
        let (ours, other) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (ours.into(), other)
    }

    #[test]
    fn a_peer_that_only_stops_sending_has_not_closed() {
        let (ours, other) = pair();
        assert!(!ours.peer_closed());
        other.shutdown(Shutdown::Write).unwrap();
        assert!(!ours.peer_closed() && !ours.peer_stopped_receiving());
        other.shutdown(Shutdown::Read).unwrap();
        assert!(ours.peer_closed() && ours.peer_stopped_receiving());
    }

    #[test]
    fn a_peer_that_only_stops_receiving_has_not_closed() {
        let (ours, other) = pair();
        other.shutdown(Shutdown::Read).unwrap();
        assert!(!ours.peer_closed() && ours.peer_stopped_receiving());
        drop(other);
        assert!(ours.peer_closed());
    }

    #[test]
    fn a_connect_goes_on_until_there_is_a_peer_or_an_error() {
        let flags = SockFlag::SOCK_NONBLOCK;
        let alone = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        assert!(HostSocket::new(alone).connect_result().is_none());
        let (ours, _other) = pair();
        assert!(matches!(ours.connect_result(), Some(Ok(()))));
    }
}
