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
//! A SOCK_SEQPACKET socket of AF_UNIX carries messages, and has habits of its own:
//!
//! - A send is one message, also one of no bytes. So nothing can be tried out on it: a peer that has called `shutdown(SHUT_RD)`
//!   is seen at the next message.
//! - A message can't be longer than the send buffer less 32 bytes, and one that is long takes memory in one piece.
//! - A peer that closes before it has read everything leaves ECONNRESET before what it has sent, not behind it.
//! - A message of no bytes is received as the end would be. With SO_PASSCRED set, the kernel wants to add the sender's
//!   credentials to a message, and says so (MSG_CTRUNC) where there is no room for them.
//!
//! AF_VSOCK, where a guest's streams are forwarded to that of the host, has others (messages: see [`super::relay`]):
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
    MsgFlags, SockType, SockaddrStorage, UnixAddr, getpeername, getsockopt, recv, recvmsg, send,
    sendmsg, setsockopt, shutdown, sockopt,
};

use serde::{Deserialize, Serialize};

use crate::packet::header::PacketType;
use crate::packet::{Payload, Received, RxBatch};
use crate::saved::{LoadError, Loader, SavedFd, Saver};
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
        libc::SYS_setsockopt,
        &[
            Argument::Is(1, libc::SOL_SOCKET),
            Argument::Is(2, libc::SO_PASSCRED),
        ],
    ),
    Syscall::only(
        libc::SYS_getsockopt,
        &[
            Argument::Is(1, libc::SOL_SOCKET),
            Argument::Is(2, libc::SO_SNDBUF),
        ],
    ),
    Syscall::any(libc::SYS_recvmsg),
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

/// What a Unix message can't use of its socket's send buffer, in bytes.
const MESSAGE_OVERHEAD: usize = 32;

/// The longest Unix message, in bytes, whatever the send buffer. All but 68 KiB of it is one piece of the kernel's memory, and
/// pieces that are much larger can't be had on a machine that has run for long.
const MAX_MESSAGE: u32 = 1024 * 1024;

/// A connected socket to a host program, or one that is about to be.
#[derive(Debug)]
pub struct HostSocket {
    fd: OwnedFd,
    family: Family,
    packet_type: PacketType,
    is_relayed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Family {
    Unix,
    Vsock,
}

/// A [`HostSocket`] in a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketState {
    fd: SavedFd,
    family: Family,
    packet_type: PacketType,
}

/// The kind of socket for connections of this type.
pub(super) fn socket_type(packet_type: PacketType) -> SockType {
    match packet_type {
        PacketType::Seqpacket => SockType::SeqPacket,
        PacketType::Stream | PacketType::Unknown(_) => SockType::Stream,
    }
}

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
    /// A Unix socket of this type that is connected. It must be non-blocking.
    pub fn new(packet_type: PacketType, socket: impl Into<OwnedFd>) -> Self {
        let fd = socket.into();
        // With the kernel's own size it works as well, if more slowly.
        let _ = setsockopt(&fd, sockopt::SndBuf, &SEND_BUFFER);
        Self {
            fd,
            family: Family::Unix,
            packet_type,
            is_relayed: false,
        }
    }

    /// A socket of AF_VSOCK that is connected, or about to be. It must be non-blocking. How much it holds is the credit that the
    /// peer gives.
    pub fn vsock(packet_type: PacketType, fd: OwnedFd) -> Self {
        Self {
            fd,
            family: Family::Vsock,
            packet_type,
            is_relayed: false,
        }
    }

    /// The same socket, with threads of this process at its other end.
    pub(super) fn relayed(self) -> Self {
        Self {
            is_relayed: true,
            ..self
        }
    }

    /// Whether its other end is with threads of this process (see [`super::relay`]), so that it is of no use to another.
    pub fn is_relayed(&self) -> bool {
        self.is_relayed
    }

    /// Saves it. Its options are the kernel's to keep.
    pub fn save<'fd>(&'fd self, saver: &mut Saver<'fd>) -> SocketState {
        SocketState {
            fd: saver.fd(self.as_fd()),
            family: self.family,
            packet_type: self.packet_type,
        }
    }

    /// The socket that was saved. Nothing about it is changed.
    ///
    /// # Errors
    /// It is not there, or is none of a connection's.
    pub fn load(state: &SocketState, loader: &mut Loader) -> Result<Self, LoadError> {
        if let PacketType::Unknown(_) = state.packet_type {
            return Err(LoadError::Invalid("a socket of an unknown type"));
        }
        Ok(Self {
            fd: loader.take_fd(state.fd)?,
            family: state.family,
            packet_type: state.packet_type,
            is_relayed: false,
        })
    }

    /// What it carries.
    pub fn packet_type(&self) -> PacketType {
        self.packet_type
    }

    /// Makes room for messages of up to `len` bytes, as far as the system grants it, and returns the longest that can be sent.
    /// Streams, which need none, and AF_VSOCK, whose peer decides, return `len`.
    pub fn reserve(&self, len: u32) -> u32 {
        if self.packet_type != PacketType::Seqpacket || self.family != Family::Unix {
            return len;
        }
        let len = len.min(MAX_MESSAGE);
        let wanted = len as usize + MESSAGE_OVERHEAD;
        if wanted > SEND_BUFFER {
            let _ = setsockopt(&self.fd, sockopt::SndBuf, &wanted);
        }
        let granted = getsockopt(&self.fd, sockopt::SndBuf).unwrap_or(0);
        let longest = granted.saturating_sub(MESSAGE_OVERHEAD);
        len.min(u32::try_from(longest).unwrap_or(u32::MAX))
    }

    /// How a connect that has not waited has ended; none while it goes on.
    pub fn connect_result(&self) -> Option<io::Result<()>> {
        match getsockopt(self, sockopt::SocketError) {
            Ok(0) => {}
            Ok(error) => return Some(Err(io::Error::from_raw_os_error(error))),
            Err(error) => return Some(Err(error.into())),
        }
        let connected = getpeername::<SockaddrStorage>(self.fd.as_raw_fd()).is_ok();
        connected.then_some(Ok(()))
    }

    /// The user who has made the other end. It is the caller of connect(2) at a socket that was accepted.
    pub fn peer_uid(&self) -> io::Result<u32> {
        Ok(getsockopt(self, sockopt::PeerCredentials)?.uid())
    }

    /// Whether the other end is bound to an abstract name that begins so.
    pub fn is_peer_named(&self, beginning: &[u8]) -> bool {
        self.family == Family::Unix
            && getpeername::<UnixAddr>(self.fd.as_raw_fd()).is_ok_and(|name| {
                name.as_abstract()
                    .is_some_and(|name| name.starts_with(beginning))
            })
    }

    /// Sends payload from guest memory, and returns how much of it the socket took.
    pub fn send(&self, payload: &Payload<'_>) -> Result<usize, SendError> {
        payload.send_to(self).map_err(SendError::from)
    }

    /// Sends bytes of our own, and returns how many the socket took.
    pub fn send_bytes(&self, bytes: &[IoSlice<'_>]) -> Result<usize, SendError> {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        loop {
            match sendmsg::<()>(self.fd.as_raw_fd(), bytes, &[], flags, None) {
                Err(nix::Error::EINTR) => {}
                sent => return sent.map_err(|error| io::Error::from(error).into()),
            }
        }
    }

    /// Receives into the guest's buffers, and returns how many bytes, none at the end of the stream, and whether there were
    /// no more.
    pub fn receive(&self, batch: &RxBatch<'_>) -> Result<Received, ReceiveError> {
        let received = self.past_reset(|| batch.receive_from(self));
        received.map_err(ReceiveError::from)
    }

    /// The result of a receive. Of a socket of messages, that of a second one where the first was told of a reset: messages may
    /// follow.
    fn past_reset<T>(&self, mut receive: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        let is_unix = self.family == Family::Unix;
        match receive() {
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionReset
                    && is_unix
                    && self.packet_type == PacketType::Seqpacket =>
            {
                receive()
            }
            received => received,
        }
    }

    /// Copies what the socket has into `bytes` and leaves it there. 0 at the end of the stream.
    pub fn peek(&self, bytes: &mut [u8]) -> Result<usize, ReceiveError> {
        self.receive_bytes(bytes, MsgFlags::MSG_PEEK)
    }

    /// Takes bytes out of the socket. 0 at the end of the stream.
    pub fn take(&self, bytes: &mut [u8]) -> Result<usize, ReceiveError> {
        self.receive_bytes(bytes, MsgFlags::empty())
    }

    /// The length of the next message. None when the other end sends no more.
    pub fn next_message(&self) -> Result<Option<usize>, ReceiveError> {
        match self.receive_bytes(&mut [], MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC)? {
            0 if self.has_empty_message() => Ok(Some(0)),
            0 => Ok(None),
            len => Ok(Some(len)),
        }
    }

    /// Whether what looks like the end is a message of no bytes.
    fn has_empty_message(&self) -> bool {
        if self.family != Family::Unix || setsockopt(&self.fd, sockopt::PassCred, &true).is_err() {
            return false;
        }
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let received = self.past_reset(|| {
            let received = recvmsg::<()>(self.fd.as_raw_fd(), &mut [], None, flags)?;
            Ok(received.flags)
        });
        let is_message = received.is_ok_and(|flags| flags.contains(MsgFlags::MSG_CTRUNC));
        // Where it stays set, the kernel gives a name to a socket that has none.
        let _ = setsockopt(&self.fd, sockopt::PassCred, &false);
        is_message
    }

    /// Takes the next message, and returns at most `max` bytes of it, and its length.
    pub fn take_message(&self, max: usize) -> Result<(Vec<u8>, usize), ReceiveError> {
        let mut bytes = Vec::new();
        let reserved = bytes.try_reserve_exact(max);
        reserved.map_err(|_| ReceiveError::Failed(io::ErrorKind::OutOfMemory.into()))?;
        bytes.resize(max, 0);
        let len = self.receive_bytes(&mut bytes, MsgFlags::MSG_TRUNC)?;
        bytes.truncate(len);
        bytes.shrink_to_fit();
        Ok((bytes, len))
    }

    fn receive_bytes(&self, bytes: &mut [u8], flags: MsgFlags) -> Result<usize, ReceiveError> {
        let flags = flags | MsgFlags::MSG_DONTWAIT;
        let receive = || loop {
            match recv(self.fd.as_raw_fd(), bytes, flags) {
                Err(nix::Error::EINTR) => {}
                received => return received.map_err(io::Error::from),
            }
        };
        self.past_reset(receive).map_err(ReceiveError::from)
    }

    /// Ends one direction or both. Where that fails, the socket is gone already.
    pub fn shutdown(&self, how: Shutdown) {
        let how = match how {
            Shutdown::Read => nix::sys::socket::Shutdown::Read,
            Shutdown::Write => nix::sys::socket::Shutdown::Write,
            Shutdown::Both => nix::sys::socket::Shutdown::Both,
        };
        let _ = shutdown(self.fd.as_raw_fd(), how);
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

    /// Whether the other end is known to receive no more. A socket whose sending direction we have shut down looks the same.
    pub fn peer_stopped_receiving(&self) -> bool {
        if self.packet_type == PacketType::Seqpacket && self.family == Family::Unix {
            // This would send a message.
            return false;
        }
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let sent = send(self.fd.as_raw_fd(), &[], flags);
        matches!(sent, Err(Errno::EPIPE | Errno::ENOTCONN))
    }
}

impl AsFd for HostSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<HostSocket> for OwnedFd {
    fn from(socket: HostSocket) -> Self {
        socket.fd
    }
}

impl From<UnixStream> for HostSocket {
    fn from(stream: UnixStream) -> Self {
        Self::new(PacketType::Stream, stream)
    }
}

impl From<io::Error> for SendError {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind::{
            BrokenPipe, ConnectionRefused, ConnectionReset, NotConnected, WouldBlock,
        };
        match error.kind() {
            WouldBlock => Self::Full,
            // Refused says Linux before 6.2, of a message to a socket that is just being closed.
            BrokenPipe | ConnectionReset | ConnectionRefused | NotConnected => Self::Closed,
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
    use crate::testing::message_pair;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    use std::io::{Read, Write};

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
        assert!(
            HostSocket::new(PacketType::Stream, alone)
                .connect_result()
                .is_none()
        );
        let (ours, _other) = pair();
        assert!(matches!(ours.connect_result(), Some(Ok(()))));
    }

    fn lengths(socket: &HostSocket) -> Vec<usize> {
        let mut lengths = Vec::new();
        while let Ok(Some(len)) = socket.next_message() {
            let again = socket.next_message();
            assert!(matches!(again, Ok(Some(same)) if same == len), "{again:?}");
            lengths.push(len);
            assert_eq!(socket.take_message(1000).unwrap().1, len);
        }
        lengths
    }

    #[test]
    fn messages_are_measured_and_the_end_is_none() {
        let (socket, mut program) = message_pair();
        assert!(matches!(socket.next_message(), Err(ReceiveError::Empty)));
        for message in [&b""[..], b"four", b"", &[0; 5000]] {
            assert_eq!(program.write(message).unwrap(), message.len());
        }
        assert_eq!(lengths(&socket), [0, 4, 0, 5000]);
        assert!(matches!(socket.next_message(), Err(ReceiveError::Empty)));
        assert_eq!(program.write(b"").unwrap(), 0);
        program.shutdown(Shutdown::Write).unwrap();
        assert_eq!(lengths(&socket), [0]);
        assert!(matches!(socket.next_message(), Ok(None)));
        assert!(!socket.peer_closed());
        drop(program);
        assert!(socket.peer_closed());
    }

    #[test]
    fn messages_are_received_behind_a_reset() {
        let (socket, mut program) = message_pair();
        socket.send_bytes(&[IoSlice::new(b"never read")]).unwrap();
        for message in [b"one", b"two"] {
            assert_eq!(program.write(message).unwrap(), 3);
        }
        drop(program);
        assert_eq!(lengths(&socket), [3, 3]);
        assert!(matches!(socket.next_message(), Ok(None)));
    }

    #[test]
    fn a_look_at_an_empty_message_gives_the_socket_no_name() {
        let (socket, mut program) = message_pair();
        assert_eq!(program.write(b"").unwrap(), 0);
        assert!(matches!(socket.next_message(), Ok(Some(0))));
        socket.send_bytes(&[IoSlice::new(b"x")]).unwrap();
        assert_eq!(program.read(&mut [0; 2]).unwrap(), 1);
        assert!(program.peer_addr().unwrap().is_unnamed());
    }

    #[test]
    fn a_message_longer_than_asked_for_is_cut_and_its_length_is_told() {
        let (socket, mut program) = message_pair();
        assert_eq!(program.write(b"0123456789").unwrap(), 10);
        assert_eq!(socket.take_message(4).unwrap(), (b"0123".to_vec(), 10));
        assert!(matches!(socket.take_message(4), Err(ReceiveError::Empty)));
    }

    #[test]
    fn what_is_reserved_can_be_sent() {
        for wanted in [1, 70_000, 256 * 1024, 1 << 30] {
            let (socket, program) = message_pair();
            let longest = socket.reserve(wanted);
            assert!(longest <= wanted.min(MAX_MESSAGE), "{longest}");
            let message = vec![7; longest as usize];
            let sent = socket.send_bytes(&[IoSlice::new(&message)]);
            assert_eq!(sent.unwrap(), message.len());
            let mut bytes = vec![0; message.len() + 1];
            assert_eq!((&program).read(&mut bytes).unwrap(), message.len());
        }
        let (stream, _program) = UnixStream::pair().unwrap();
        assert_eq!(HostSocket::from(stream).reserve(1 << 30), 1 << 30);
    }
}
