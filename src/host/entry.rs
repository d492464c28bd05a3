//! The listening sockets through which host programs and other processes' guests reach a guest.

use std::os::fd::OwnedFd;

use crate::packet::header::GuestPort;

/// What those who connect to a listening socket reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The guest's port that their CONNECT line names.
    Host,
    /// This port of the guest's. They write no CONNECT line and get no answer.
    Port(GuestPort),
    /// This port of the guest's, from the host's AF_VSOCK. There is no line either.
    Vsock(GuestPort),
    /// The guest's port that their CONNECT line names, for guests of other processes, which it names too. They are reached in
    /// the directory of siblings of this index.
    Sibling(usize),
}

/// A listening socket, and what is behind it.
#[derive(Debug)]
pub struct EntrySocket {
    /// What is behind it.
    pub entry: Entry,
    /// The socket.
    pub listener: OwnedFd,
}

impl EntrySocket {
    /// `listener` leads to `entry`.
    pub fn new(entry: Entry, listener: impl Into<OwnedFd>) -> Self {
        Self {
            entry,
            listener: listener.into(),
        }
    }
}
