//! Messages between a socket pair and the host's AF_VSOCK, moved by threads that may wait.
//!
//! A worker never waits, and that is not for SOCK_SEQPACKET sockets of AF_VSOCK:
//!
//! - A send that may not wait puts as much of a message into the peer's buffer as fits. If that is not all, it fails with EAGAIN,
//!   and the next message is appended to what was sent. How much room there is can't be asked.
//! - The next message can't be measured without taking it before Linux 6.6.
//!
//! So a connection of messages that is forwarded has two threads, one for each direction, and its worker has an end of a
//! socket pair, as for a sibling of this process:
//!
//! ```text
//! guest <-> worker <-> socket pair <-> two threads <-> AF_VSOCK
//! ```
//!
//! What an end does to its socket, the threads do to the other: it ends a direction, or closes. The connection is over when the
//! worker's end is closed and all messages in the pair are delivered.

use std::io;
use std::net::Shutdown as Direction;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use log::debug;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, recv, send, socketpair};
use thiserror::Error;

use super::connect_line;
use super::socket::{HostSocket, socket_type};
use super::vsock;
use crate::packet::header::{PacketType, PeerPort};
use crate::syscalls::{Argument, Syscall};

/// To make a pair, and to wait on its ends. The rest are the calls of [`super::socket`] and [`super::vsock`].
pub(super) const PAIR: Syscall = Syscall::only(
    libc::SYS_socketpair,
    &[
        Argument::Is(0, libc::AF_UNIX),
        Argument::Is(
            1,
            libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
        ),
    ],
);

/// How many connections of messages of one VM are forwarded at a time. Each has two threads, and one whose host program reads
/// nothing outlives the guest's close: its messages are still to be delivered.
const MAX_RELAYS: usize = 128;

/// The stack of a thread, in bytes.
const STACK_SIZE: usize = 64 * 1024;

/// The longest message from AF_VSOCK, in bytes: all that Linux holds for a socket whose buffer nobody has changed.
const MAX_MESSAGE: usize = 256 * 1024;

/// What a thread keeps for messages, in bytes, after a longer one.
const KEPT: usize = 64 * 1024;

/// Why a connection of messages is not forwarded.
#[derive(Debug, Error)]
pub enum RelayError {
    /// There are as many as there may be.
    #[error("{MAX_RELAYS} connections of messages are forwarded already")]
    TooMany,
    /// The system refused.
    #[error("no socket pair or no thread: {0}")]
    Io(#[from] io::Error),
}

/// The forwarded connections of messages of one VM.
#[derive(Debug, Default)]
pub struct Relays(Arc<()>);

impl Relays {
    /// Begins to connect to `port` of `cid`. The socket gets the line `OK` when it is connected, and is closed if it is refused.
    pub fn connect(&self, cid: u32, port: PeerPort) -> Result<HostSocket, RelayError> {
        let (ours, theirs, place) = self.begin()?;
        start(move || match vsock::connect_waiting(cid, port) {
            Ok(vsock) => {
                let line = connect_line::answer(port.0);
                if send_to(&theirs, line.as_bytes()).is_ok() {
                    Relay::run(theirs, vsock, place);
                }
            }
            Err(error) => debug!("{cid}:{} of AF_VSOCK, messages: {error}", port.0),
        })?;
        Ok(ours)
    }

    /// Moves the messages of a socket of AF_VSOCK that is connected, and returns the socket that stands for it.
    pub fn accepted(&self, vsock: HostSocket) -> Result<HostSocket, RelayError> {
        let (ours, theirs, place) = self.begin()?;
        let vsock = waiting(vsock.into())?;
        start(move || Relay::run(theirs, vsock, place))?;
        Ok(ours)
    }

    /// The two ends of a pair, of which the second may wait, and a place among the relays.
    fn begin(&self) -> Result<(HostSocket, HostSocket, Arc<()>), RelayError> {
        let place = self.0.clone();
        // This, `place` and those of the relays.
        if Arc::strong_count(&place) > MAX_RELAYS + 1 {
            return Err(RelayError::TooMany);
        }
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let kind = socket_type(PacketType::Seqpacket);
        let pair = socketpair(AddressFamily::Unix, kind, None, flags);
        let (ours, theirs) = pair.map_err(io::Error::from)?;
        let ours = HostSocket::new(PacketType::Seqpacket, ours);
        let theirs = HostSocket::new(PacketType::Seqpacket, waiting(theirs)?);
        theirs.reserve(MAX_MESSAGE as u32);
        Ok((ours, theirs, place))
    }
}

/// A socket whose calls may wait from now on.
pub(super) fn waiting(socket: OwnedFd) -> io::Result<OwnedFd> {
    let socket = UnixStream::from(socket);
    socket.set_nonblocking(false)?;
    Ok(socket.into())
}

fn start(run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = thread::Builder::new()
        .name("relay".into())
        .stack_size(STACK_SIZE);
    thread.spawn(run).map(drop)
}

/// The two sockets of a connection.
struct Relay {
    pair: HostSocket,
    vsock: HostSocket,
    /// Held while the threads run.
    _place: Arc<()>,
}

impl Relay {
    /// Moves messages until both directions are over.
    fn run(pair: HostSocket, vsock: OwnedFd, place: Arc<()>) {
        let vsock = HostSocket::vsock(PacketType::Seqpacket, vsock);
        let relay = Arc::new(Self {
            pair,
            vsock,
            _place: place,
        });
        let other = relay.clone();
        match start(move || other.to_guest()) {
            Ok(()) => relay.from_guest(),
            Err(error) => debug!("messages are not forwarded: no thread: {error}"),
        }
    }

    fn from_guest(&self) {
        let mut message = Vec::new();
        while let Some(len) = next_message(&self.pair) {
            if message.try_reserve(len).is_err() {
                break;
            }
            message.resize(len, 0);
            if receive(&self.pair, &mut message, MsgFlags::empty()) != Ok(len) {
                break;
            }
            match send_to(&self.vsock, &message) {
                Ok(()) => {}
                // Nobody receives; there may still be messages for the guest.
                Err(Errno::EPIPE) => {
                    self.pair.shutdown(Direction::Read);
                    break;
                }
                Err(error) => {
                    debug!("can't send a message of {len} bytes to AF_VSOCK: {error}");
                    self.pair.shutdown(Direction::Both);
                    break;
                }
            }
            message.clear();
            message.shrink_to(KEPT);
        }
        self.vsock.shutdown(Direction::Write);
        // Until the worker closes, it may still receive.
        wait_for_hangup(&self.pair);
        self.vsock.shutdown(Direction::Both);
    }

    fn to_guest(&self) {
        let mut message = Vec::new();
        let has_room = message.try_reserve_exact(MAX_MESSAGE).is_ok();
        message.resize(if has_room { MAX_MESSAGE } else { 0 }, 0);
        while has_room {
            match receive(&self.vsock, &mut message, MsgFlags::MSG_TRUNC) {
                Ok(0) if !self.vsock.peer_stopped_receiving() => {
                    return self.pair.shutdown(Direction::Write);
                }
                Ok(0) | Err(_) => break,
                Ok(len) if len > MAX_MESSAGE => {
                    debug!("a message of {len} bytes from AF_VSOCK is longer than {MAX_MESSAGE}");
                    break;
                }
                Ok(len) => {
                    if send_to(&self.pair, &message[..len]).is_err() {
                        // The guest receives no more. It may still send.
                        return self.vsock.shutdown(Direction::Read);
                    }
                }
            }
        }
        self.pair.shutdown(Direction::Both);
        self.vsock.shutdown(Direction::Both);
    }
}

fn send_to(socket: &HostSocket, message: &[u8]) -> Result<(), Errno> {
    loop {
        match send(socket.as_fd().as_raw_fd(), message, MsgFlags::MSG_NOSIGNAL) {
            Err(Errno::EINTR) => {}
            sent => return sent.map(drop),
        }
    }
}

/// Waits for a message of the worker's, and returns its length. None when there will be none.
fn next_message(pair: &HostSocket) -> Option<usize> {
    let len = receive(pair, &mut [], MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC);
    len.ok().filter(|len| *len > 0)
}

fn receive(from: &HostSocket, bytes: &mut [u8], flags: MsgFlags) -> Result<usize, Errno> {
    loop {
        match recv(from.as_fd().as_raw_fd(), bytes, flags) {
            Err(Errno::EINTR) => {}
            received => return received,
        }
    }
}

/// Waits until both directions of a pair are over.
fn wait_for_hangup(pair: &HostSocket) {
    let mut fds = [PollFd::new(pair.as_fd(), PollFlags::empty())];
    while poll(&mut fds, PollTimeout::NONE) == Err(Errno::EINTR) {}
}
