//! What one process sends another: a file and a list of descriptors, in messages that have not too many of them.
//!
//! A *parcel* is a message of a SOCK_SEQPACKET socket. Its text says which one it is, and of how many:
//!
//! ```text
//! {"parcel":0,"of":3}                   with 200 descriptors, of which the first is the file
//! {"parcel":1,"of":3,"missing":[7]}     with 199
//! ```
//!
//! A host program decides what waits in its socket, which may be sockets in which sockets wait. The kernel refuses to send what
//! is nested too deep (unix(7), ETOOMANYREFS). Such a descriptor is missing, and the others are there.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType};
use nix::sys::socket::{sendmsg, socketpair};
use rustix::cmsg_space;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::syscalls::{Argument, Syscall};

/// To send and to receive.
pub(super) const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_sendmsg),
    Syscall::any(libc::SYS_recvmsg),
    Syscall::any(libc::SYS_close),
    Syscall::only(libc::SYS_socketpair, PAIR),
];

const PAIR: &[Argument] = &[
    Argument::Is(0, libc::AF_UNIX),
    Argument::Is(1, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC),
];

/// The most descriptors in a parcel. The kernel takes 253 in a message (SCM_MAX_FD).
const MAX_FDS: usize = 200;

/// The most parcels, which have more descriptors than a process.
const MAX_PARCELS: u32 = 10_000;

/// The longest text of a message, in bytes. That of a parcel which misses all descriptors is shorter.
pub(super) const MAX_TEXT: usize = 4096;

/// Why parcels can't be opened.
#[derive(Debug, Error)]
pub enum ParcelError {
    /// A message is not a parcel.
    #[error("what was sent is no state of vhost-user-vsock")]
    Garbage,
    /// A parcel is not there, or is there twice.
    #[error("the state is not complete")]
    Incomplete,
    /// The system refused.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// What stands on a parcel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Label {
    parcel: u32,
    of: u32,
    /// The places of descriptors that could not be sent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    missing: Vec<u32>,
}

/// A parcel to be sent.
#[derive(Debug)]
pub(super) struct Parcel<'fd> {
    label: Label,
    fds: Vec<BorrowedFd<'fd>>,
}

/// Makes parcels of a file and descriptors.
pub(super) fn pack<'fd>(state: &'fd File, fds: &[BorrowedFd<'fd>]) -> Vec<Parcel<'fd>> {
    let fds: Vec<BorrowedFd<'fd>> = [&[state.as_fd()], fds].concat();
    let of = fds.len().div_ceil(MAX_FDS) as u32;
    let parcels = fds.chunks(MAX_FDS).zip(0..);
    let parcels = parcels.map(|(fds, parcel)| Parcel {
        label: Label {
            parcel,
            of,
            missing: Vec::new(),
        },
        fds: fds.to_vec(),
    });
    parcels.collect()
}

impl Parcel<'_> {
    /// Its number, from 0.
    pub(super) fn number(&self) -> u32 {
        self.label.parcel
    }

    /// Sends it with what `send` makes of a message. If the kernel refuses that for what waits in some of the sockets, those are
    /// left out. Returns how many were.
    pub(super) fn send<E: From<io::Error>>(
        &mut self,
        mut send: impl FnMut(&[u8], &[BorrowedFd<'_>]) -> Result<(), E>,
        is_nested: impl Fn(&E) -> bool,
    ) -> Result<usize, E> {
        match send(&self.text()?, &self.fds) {
            Err(error) if is_nested(&error) => {}
            sent => return sent.map(|()| 0),
        }
        self.leave_out_nested()?;
        send(&self.text()?, &self.fds)?;
        Ok(self.label.missing.len())
    }

    fn text(&self) -> io::Result<Vec<u8>> {
        Ok(serde_json::to_vec(&self.label)?)
    }

    /// Leaves out the descriptors that can't be sent.
    fn leave_out_nested(&mut self) -> io::Result<()> {
        let mut sendable = Vec::new();
        for (fd, place) in self.fds.drain(..).zip(0..) {
            if is_sendable(fd)? {
                sendable.push(fd);
            } else {
                self.label.missing.push(place);
            }
        }
        self.fds = sendable;
        Ok(())
    }
}

/// Whether the kernel refused to send descriptors for what waits in them.
pub(super) fn is_nested(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ETOOMANYREFS)
}

/// Whether a descriptor can be sent in a socket that is itself sent.
fn is_sendable(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let (inner, outer) = (pair()?, pair()?);
    let sent = send_message(inner.0.as_fd(), b"?", &[fd], MsgFlags::empty())
        .and_then(|()| send_message(outer.0.as_fd(), b"?", &[inner.1.as_fd()], MsgFlags::empty()));
    match sent {
        Ok(()) => Ok(true),
        Err(error) if is_nested(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Two connected sockets for messages.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    Ok(pair)
}

/// Sends a message with descriptors.
pub(super) fn send_message(
    socket: BorrowedFd<'_>,
    text: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: MsgFlags,
) -> io::Result<()> {
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if fds.is_empty() { &[] } else { &rights[..] };
    let flags = flags | MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(text)],
            rights,
            flags,
            None,
        ) {
            Ok(_) => return Ok(()),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives a message with its descriptors. None at the end of the connection.
///
/// # Errors
/// It is too long, the process has no descriptors left, or the system refuses.
pub(super) fn receive_message(
    socket: BorrowedFd<'_>,
    flags: RecvFlags,
) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut text = vec![0; MAX_TEXT];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        let mut bytes = [IoSliceMut::new(&mut text)];
        match recvmsg(socket, &mut bytes, &mut ancillary, flags) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?,
        }
    };
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    if received
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(io::Error::other(
            "a message is too long, or no descriptors are left",
        ));
    }
    text.truncate(received.bytes);
    Ok((!text.is_empty()).then_some((text, fds)))
}

/// Takes parcels, in their order, until all are there.
#[derive(Debug, Default)]
pub(super) struct Opened {
    /// How many there are, once one was opened.
    of: Option<u32>,
    count: u32,
    fds: Vec<Option<OwnedFd>>,
}

impl Opened {
    /// Opens the next parcel.
    pub(super) fn open(&mut self, label: &Label, fds: Vec<OwnedFd>) -> Result<(), ParcelError> {
        let of = *self.of.get_or_insert(label.of);
        if label.parcel != self.count || label.of != of {
            return Err(ParcelError::Incomplete);
        }
        let count = fds.len() + label.missing.len();
        let is_possible = (1..=MAX_PARCELS).contains(&of) && label.parcel < of && count <= MAX_FDS;
        if !is_possible {
            return Err(ParcelError::Garbage);
        }
        let mut fds = fds.into_iter();
        for place in 0..count as u32 {
            let is_missing = label.missing.contains(&place);
            let fd = if is_missing { None } else { fds.next() };
            self.fds.push(fd);
        }
        self.count += 1;
        Ok(())
    }

    /// Whether all are there.
    pub(super) fn is_complete(&self) -> bool {
        self.of == Some(self.count)
    }

    /// The file, and the descriptors.
    pub(super) fn finish(self) -> Result<(File, Vec<Option<OwnedFd>>), ParcelError> {
        if !self.is_complete() {
            return Err(ParcelError::Incomplete);
        }
        let mut fds = self.fds.into_iter();
        let state = fds.next().flatten().ok_or(ParcelError::Incomplete)?;
        Ok((state.into(), fds.collect()))
    }
}

/// Looks at a parcel in a socket, and leaves it there for others.
pub(super) fn peek(socket: BorrowedFd<'_>) -> Result<(Label, Vec<OwnedFd>), ParcelError> {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let (text, fds) = receive_message(socket, flags)?.ok_or(ParcelError::Garbage)?;
    let label = serde_json::from_slice(&text).map_err(|_| ParcelError::Garbage)?;
    Ok((label, fds))
}

#[cfg(test)]
mod tests;
