//! What names a connection.

use serde::{Deserialize, Serialize};

use crate::packet::header::{GuestPort, PacketType, PeerAddr, VsockHeader};

/// What names a connection: its type and the addresses of its two ends, without the guest's CID, which is always the same. Who began it
/// does not matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ConnKey {
    /// The guest's port.
    pub guest: GuestPort,
    /// The other end.
    pub peer: PeerAddr,
    /// What it carries. A stream and a connection of messages may have the same addresses.
    pub packet_type: PacketType,
}

impl ConnKey {
    /// The connection that a packet belongs to.
    pub fn of(header: &VsockHeader) -> Self {
        Self {
            guest: header.guest_port,
            peer: header.peer,
            packet_type: header.packet_type,
        }
    }
}
