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
//! worker's end is closed and all messages in the pair are delivered. It can't be handed over to another process: its threads, and
//! what they hold, stay in this one.

use std::io;
use std::net::Shutdown as Direction;
use std::ops::ControlFlow;
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
use crate::log_vm;
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
        let ours = HostSocket::new(PacketType::Seqpacket, ours).relayed();
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
    thread.spawn(log_vm::inherit(run)).map(drop)
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
        match start(move || other.deliver_to_guest()) {
            Ok(()) => relay.deliver_to_host(),
            Err(error) => debug!("messages are not forwarded: no thread: {error}"),
        }
    }

    fn deliver_to_host(&self) {
        let mut message = Vec::new();
        while let Some(len) = next_message(&self.pair) {
            let has_room = message.try_reserve(len).is_ok();
            message.resize(if has_room { len } else { 0 }, 0);
            if !has_room || receive(&self.pair, &mut message, MsgFlags::empty()) != Ok(len) {
                self.pair.shutdown(Direction::Both);
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

    fn deliver_to_guest(&self) {
        let mut message = Vec::new();
        if message.try_reserve_exact(MAX_MESSAGE).is_ok() {
            message.resize(MAX_MESSAGE, 0);
            if self.receive_all(&mut message).is_continue() {
                return;
            }
        }
        self.pair.shutdown(Direction::Both);
        self.vsock.shutdown(Direction::Both);
    }

    /// Moves the host program's messages until there are no more. Breaks if the other direction is over as well.
    fn receive_all(&self, message: &mut [u8]) -> ControlFlow<()> {
        loop {
            match receive(&self.vsock, message, MsgFlags::MSG_TRUNC) {
                Ok(0) if !self.vsock.peer_stopped_receiving() => {
                    self.pair.shutdown(Direction::Write);
                    return ControlFlow::Continue(());
                }
                Ok(0) | Err(_) => return ControlFlow::Break(()),
                Ok(len) if len > MAX_MESSAGE => {
                    debug!("a message of {len} bytes from AF_VSOCK is longer than {MAX_MESSAGE}");
                    return ControlFlow::Break(());
                }
                Ok(len) => {
                    if send_to(&self.pair, &message[..len]).is_err() {
                        // The guest receives no more. It may still send.
                        self.vsock.shutdown(Direction::Read);
                        return ControlFlow::Continue(());
                    }
                }
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::time::{Duration, Instant};

    /// The worker's end and the host program's. In place of AF_VSOCK there is another pair, whose ends wait as well.
    fn relay(relays: &Relays) -> (UnixStream, UnixStream) {
        let flags = SockFlag::SOCK_CLOEXEC;
        let kind = socket_type(PacketType::Seqpacket);
        let (vsock, program) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
        let ours = relays
            .accepted(HostSocket::vsock(PacketType::Seqpacket, vsock))
            .unwrap();
        let ours = UnixStream::from(OwnedFd::from(ours));
        ours.set_nonblocking(false).unwrap();
        for end in [&ours, &UnixStream::from(program.try_clone().unwrap())] {
            end.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        }
        (ours, program.into())
    }

    fn wait_until_unused(relays: &Relays) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Arc::strong_count(&relays.0) > 1 {
            assert!(Instant::now() < deadline, "threads stay");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn read(mut end: &UnixStream) -> Vec<u8> {
        let mut bytes = vec![0; 1000];
        let len = end.read(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }

    #[test]
    fn either_end_may_leave_first() {
        let relays = Relays::default();
        for program_first in [true, false] {
            let (mut worker, mut program) = relay(&relays);
            worker.write_all(b"there").unwrap();
            worker.write_all(b"again").unwrap();
            program.write_all(b"back").unwrap();
            assert_eq!(
                (read(&program), read(&program)),
                (b"there".to_vec(), b"again".to_vec())
            );
            assert_eq!(read(&worker), b"back");
            let (first, other) = if program_first {
                (program, worker)
            } else {
                (worker, program)
            };
            drop(first);
            assert_eq!(read(&other), b"");
            drop(other);
            wait_until_unused(&relays);
        }
    }

    #[test]
    fn what_was_sent_before_a_close_arrives() {
        let relays = Relays::default();
        let (mut worker, program) = relay(&relays);
        let sent = [[1; 900], [2; 900], [3; 900]];
        for message in sent {
            worker.write_all(&message).unwrap();
        }
        drop(worker);
        for message in sent {
            assert_eq!(read(&program), message);
        }
        assert_eq!(read(&program), b"");
        wait_until_unused(&relays);
    }

    #[test]
    fn there_are_so_many_and_no_more() {
        let relays = Relays::default();
        let open: Vec<_> = (0..MAX_RELAYS).map(|_| relay(&relays)).collect();
        assert!(matches!(relays.begin(), Err(RelayError::TooMany)));
        drop(open);
        wait_until_unused(&relays);
        relay(&relays);
    }
}
