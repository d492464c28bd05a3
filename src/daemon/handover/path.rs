//! `--handover-path`: the successor connects to the predecessor's socket, and they agree on when the one serves no longer and the
//! other begins.
//!
//! ```text
//! successor                      predecessor
//! {"take_over":{"version":1}} ->
//!                                parks its VMs
//!                             <- parcels
//! loads, enters its sandbox
//! {"ready":true}              ->
//!                             <- {"go":true}, and exits
//! serves
//! ```
//!
//! Either may send `{"refused":"why"}` instead. Whatever goes wrong before `go`, the predecessor serves on. Messages are those of a
//! SOCK_SEQPACKET socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, setsockopt, socket,
    sockopt,
};
use nix::unistd::Uid;
use rustix::net::{RecvFlags, SocketFlags, accept_with};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::VERSION;
use super::parcels::{self, Label, MAX_TEXT, Opened, Parcel, ParcelError};
use crate::syscalls::{Argument, Syscall};

/// To accept a successor, and to talk to it or to the predecessor.
pub(super) const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_accept4),
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_poll),
    Syscall::any(libc::SYS_ppoll),
    Syscall::any(libc::SYS_restart_syscall),
    Syscall::only(
        libc::SYS_getsockopt,
        &[
            Argument::Is(1, libc::SOL_SOCKET),
            Argument::Is(2, libc::SO_PEERCRED),
        ],
    ),
];

/// How long the predecessor waits for a successor, all in all.
const HAND_OVER_TIME: Duration = Duration::from_secs(5);

/// How long a successor waits. Another may come before it.
const TAKE_OVER_TIME: Duration = Duration::from_secs(12);

/// The longest reason for a refusal that is sent, in bytes.
const MAX_REASON: usize = MAX_TEXT / 2;

/// Why nothing was handed over.
#[derive(Debug, Error)]
pub enum PathError {
    /// The other process has closed the connection, or has ended.
    #[error("it has closed the connection")]
    Closed,
    /// The other process does not answer.
    #[error("it does not answer in time")]
    Timeout,
    /// This process is to stop.
    #[error("this daemon is to stop")]
    Stopped,
    /// The message is not the one that comes now.
    #[error("it sends what is no part of a hand-over")]
    Garbage,
    /// The other process does not want to.
    #[error("{0}")]
    Refused(String),
    /// The successor can't read the state.
    #[error("the state of the daemon that runs has version {VERSION}, this one reads version {0}")]
    Version(u32),
    /// The successor is another user's.
    #[error("it is a process of user {0}")]
    User(Uid),
    /// The parcels are not what they should be.
    #[error(transparent)]
    Parcel(#[from] ParcelError),
    /// The system refuses.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A message without descriptors.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    /// The successor asks for the state, of which it reads this version and earlier ones.
    TakeOver {
        version: u32,
    },
    Refused(String),
    Ready(bool),
    Go(bool),
}

/// A message with descriptors, or without.
#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Parcel(Label),
    Message(Message),
}

/// The connection between the two. Waiting ends when something can be read from `stop`.
#[derive(Debug)]
struct Channel<'s> {
    socket: OwnedFd,
    deadline: Instant,
    stop: Option<BorrowedFd<'s>>,
}

impl Channel<'_> {
    /// Waits until the socket can be read or written.
    fn wait(&self, events: PollFlags) -> Result<(), PathError> {
        let mut fds = vec![PollFd::new(self.socket.as_fd(), events)];
        fds.extend(self.stop.map(|stop| PollFd::new(stop, PollFlags::POLLIN)));
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that the last wait is not one of no time.
            let left = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
            match poll(&mut fds, left) {
                _ if self.deadline <= Instant::now() => return Err(PathError::Timeout),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
            let [socket, stop @ ..] = &fds[..] else {
                return Err(PathError::Closed);
            };
            if stop.iter().any(|stop| stop.any() == Some(true)) {
                return Err(PathError::Stopped);
            }
            if socket.any() == Some(true) {
                return Ok(());
            }
        }
    }

    fn send(&self, message: &Message) -> Result<(), PathError> {
        let text = serde_json::to_vec(message).map_err(io::Error::from)?;
        self.send_text(&text, &[])
    }

    fn send_text(&self, text: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), PathError> {
        loop {
            self.wait(PollFlags::POLLOUT)?;
            let sent =
                parcels::send_message(self.socket.as_fd(), text, fds, MsgFlags::MSG_DONTWAIT);
            match sent {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    return Err(match error.kind() {
                        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                            self.last_word()
                        }
                        _ => error.into(),
                    });
                }
            }
        }
    }

    /// Why the other process has closed the connection, if it has said so.
    fn last_word(&self) -> PathError {
        match self.receive_message() {
            Err(error @ PathError::Refused(_)) => error,
            _ => PathError::Closed,
        }
    }

    fn receive(&self) -> Result<(Vec<u8>, Vec<OwnedFd>), PathError> {
        loop {
            self.wait(PollFlags::POLLIN)?;
            match parcels::receive_message(self.socket.as_fd(), RecvFlags::DONTWAIT) {
                Ok(message) => return message.ok_or(PathError::Closed),
                Err(error) => match error.kind() {
                    // The latter is reported once, if something that was sent was not read. What was received before is still there.
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionReset => {}
                    _ => return Err(error.into()),
                },
            }
        }
    }

    /// Receives a message that is no refusal.
    fn receive_message(&self) -> Result<Message, PathError> {
        let (text, _) = self.receive()?;
        match serde_json::from_slice(&text).map_err(|_| PathError::Garbage)? {
            Message::Refused(reason) => Err(PathError::Refused(reason)),
            message => Ok(message),
        }
    }

    /// Says why nothing is handed over. Nobody waits for it to be read.
    fn refuse(&self, reason: &str) {
        let mut end = reason.len().min(MAX_REASON);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        if let Ok(text) = serde_json::to_vec(&Message::Refused(reason[..end].into())) {
            let flags = MsgFlags::MSG_DONTWAIT;
            let _ = parcels::send_message(self.socket.as_fd(), &text, &[], flags);
        }
    }
}

/// A successor that has connected. When this is dropped before `go`, it gets nothing.
#[derive(Debug)]
pub(in crate::daemon) struct Successor<'s> {
    channel: Channel<'s>,
    process: i32,
}

impl<'s> Successor<'s> {
    /// Accepts the next one, if there is one. It must be a process of `user`, this one's, or of root. It has until 5 seconds from now, or
    /// until something can be read from `stop`.
    pub(in crate::daemon) fn accept(
        listener: BorrowedFd<'_>,
        user: Uid,
        stop: BorrowedFd<'s>,
    ) -> Result<Option<Self>, PathError> {
        let socket = match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            Err(error) => {
                let error = io::Error::from(error);
                return match error.kind() {
                    io::ErrorKind::WouldBlock
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::Interrupted => Ok(None),
                    _ => Err(error.into()),
                };
            }
        };
        let peer = getsockopt(&socket, sockopt::PeerCredentials).map_err(io::Error::from)?;
        let successor = Self {
            channel: Channel {
                socket,
                deadline: Instant::now() + HAND_OVER_TIME,
                stop: Some(stop),
            },
            process: peer.pid(),
        };
        let asking = Uid::from_raw(peer.uid());
        if !asking.is_root() && asking != user {
            successor.refuse("the daemon that runs is another user's");
            return Err(PathError::User(asking));
        }
        Ok(Some(successor))
    }

    /// The id of its process.
    pub(in crate::daemon) fn process(&self) -> i32 {
        self.process
    }

    /// Waits until it asks for the state.
    ///
    /// # Errors
    /// It does not, or it can't read this version.
    pub(in crate::daemon) fn await_request(&self) -> Result<(), PathError> {
        match self.channel.receive_message()? {
            Message::TakeOver { version } if version < VERSION => Err(PathError::Version(version)),
            Message::TakeOver { .. } => Ok(()),
            _ => Err(PathError::Garbage),
        }
    }

    /// Gives it everything, and waits until it has it. Once this has returned, it serves. Returns how many descriptors could not be
    /// handed over.
    ///
    /// # Errors
    /// It will not serve: it refuses, has ended, or takes too long.
    pub(in crate::daemon) fn give(&self, parcels: Vec<Parcel<'_>>) -> Result<usize, PathError> {
        let mut missing = 0;
        for mut parcel in parcels {
            let send = |text: &[u8], fds: &[BorrowedFd<'_>]| self.channel.send_text(text, fds);
            let is_nested = |error: &PathError| matches!(error, PathError::Io(error) if parcels::is_nested(error));
            missing += parcel.send(send, is_nested)?;
        }
        match self.channel.receive_message()? {
            Message::Ready(true) => {}
            _ => return Err(PathError::Garbage),
        }
        self.channel.send(&Message::Go(true))?;
        Ok(missing)
    }

    /// Tells it why it gets nothing.
    pub(in crate::daemon) fn refuse(&self, reason: &str) {
        self.channel.refuse(reason);
    }
}

/// The connection to the predecessor.
#[derive(Debug)]
pub(super) struct Predecessor {
    channel: Channel<'static>,
}

impl Predecessor {
    /// Connects to the daemon at `path`. None if there is none.
    pub(super) fn connect(path: &Path) -> Result<Option<Self>, PathError> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None);
        let socket = socket.map_err(io::Error::from)?;
        let address = UnixAddr::new(path).map_err(io::Error::from)?;
        let timeout = nix::sys::time::TimeVal::new(TAKE_OVER_TIME.as_secs() as i64, 0);
        // For a full backlog.
        setsockopt(&socket, sockopt::SendTimeout, &timeout).map_err(io::Error::from)?;
        match connect(socket.as_raw_fd(), &address) {
            Ok(()) => {}
            Err(Errno::ENOENT | Errno::ECONNREFUSED) => return Ok(None),
            Err(Errno::EAGAIN) => return Err(PathError::Timeout),
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let channel = Channel {
            socket,
            deadline: Instant::now() + TAKE_OVER_TIME,
            stop: None,
        };
        Ok(Some(Self { channel }))
    }

    /// Asks for the state, of which `version` and earlier ones are read, and receives it.
    pub(super) fn take(&self, version: u32) -> Result<Opened, PathError> {
        self.channel.send(&Message::TakeOver { version })?;
        let mut opened = Opened::default();
        while !opened.is_complete() {
            let (text, fds) = self.channel.receive()?;
            match serde_json::from_slice(&text).map_err(|_| PathError::Garbage)? {
                Answer::Parcel(label) => opened.open(&label, fds)?,
                Answer::Message(Message::Refused(reason)) => {
                    return Err(PathError::Refused(reason));
                }
                Answer::Message(_) => return Err(PathError::Garbage),
            }
        }
        Ok(opened)
    }

    /// Says that everything is loaded, and waits until the predecessor serves no longer.
    pub(super) fn relieve(&self) -> Result<(), PathError> {
        self.channel.send(&Message::Ready(true))?;
        match self.channel.receive_message()? {
            Message::Go(true) => Ok(()),
            _ => Err(PathError::Garbage),
        }
    }

    /// Says why nothing is taken over.
    pub(super) fn refuse(&self, reason: &str) {
        self.channel.refuse(reason);
    }
}

#[cfg(test)]
mod tests;
