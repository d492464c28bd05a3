//! Which directions of a connection are over, and what the guest knows of that.
//!
//! Either end may stop sending, stop receiving, or both. The guest says so with SHUTDOWN, whose flags accumulate (virtio 1.2,
//! 5.10.6.6). The host program's shutdown(2) or close(2) is seen at its socket, and passed on to the guest with a SHUTDOWN.

use serde::{Deserialize, Serialize};

use crate::packet::header::ShutdownFlags;

/// What each end will no longer do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Shutdown {
    /// The guest program.
    pub(super) guest: ShutdownFlags,
    /// The host program.
    pub(super) host: ShutdownFlags,
    /// What of the host program's was last sent to the guest.
    pub(super) sent: ShutdownFlags,
    /// Both directions of the host's socket are over.
    pub(super) host_closed: bool,
    /// Bytes from the guest were dropped, since the host program receives no more.
    pub(super) dropped: bool,
}

impl Shutdown {
    /// Whether bytes from the host program still go to the guest.
    pub(super) fn to_guest_open(&self) -> bool {
        !self.guest.contains(ShutdownFlags::RECEIVE) && !self.host.contains(ShutdownFlags::SEND)
    }

    /// Whether bytes from the guest still go to the host program.
    pub(super) fn host_receives(&self) -> bool {
        !self.host.contains(ShutdownFlags::RECEIVE)
    }

    /// Whether the guest is to be sent a SHUTDOWN now. A host program that has closed ends both directions with one, behind
    /// its last byte. But a guest that goes on sending hears at once that nobody receives: it may never read so far.
    pub(super) fn is_due(&self) -> bool {
        let unsent = self.host.difference(self.sent);
        let bytes_first = self.host_closed && self.to_guest_open();
        !unsent.is_empty() && (self.dropped || !bytes_first)
    }
}
