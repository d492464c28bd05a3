//! The header of a virtio-vsock packet and the types of its fields (virtio 1.2, 5.10.6).
//!
//! ```text
//! offset  size  field
//!      0     8  src_cid      the lower 32 bits are the CID, the upper 32 are zero
//!      8     8  dst_cid
//!     16     4  src_port
//!     20     4  dst_port
//!     24     4  len          bytes of payload behind the header
//!     28     2  type         1 STREAM, 2 SEQPACKET
//!     30     2  op           what the packet asks or answers
//!     32     4  flags        of SHUTDOWN: which directions; of a SEQPACKET RW: end of message, end of record
//!     36     4  buf_alloc    size of the sender's receive buffer for this connection
//!     40     4  fwd_cnt      bytes its program has taken out of that buffer so far, modulo 2^32
//! ```
//!
//! All numbers are little-endian. The daemon always stands between one guest and its peers, so a header here has a guest's
//! and a peer's side instead of a source and a destination. Which is which follows from the ring, and is decided here,
//! where bytes become headers: the two sides can't be mixed up anywhere else.

use std::fmt;

use bitflags::bitflags;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Length of a packet's header, in bytes.
pub const HEADER_LEN: usize = virtio_vsock::packet::PKT_HEADER_SIZE;

/// A context ID: the vsock address of a machine (virtio 1.2, 5.10.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Cid(u64);

impl Cid {
    /// The host's CID in the eyes of every guest.
    pub const HOST: Self = Self(2);

    /// A CID as a packet carries it: any number.
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// Its number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Cid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number is no guest's CID: 0 to 2 and 4294967295 are reserved, and the upper 32 bits must be zero (virtio 1.2,
/// 5.10.4).
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{0} is not a guest's CID, which is a number from 3 to 4294967294")]
pub struct InvalidCid(pub u64);

impl TryFrom<u64> for Cid {
    type Error = InvalidCid;

    /// The CID of a guest, from 3 to 4294967294.
    fn try_from(number: u64) -> Result<Self, InvalidCid> {
        if (3..u64::from(u32::MAX)).contains(&number) {
            Ok(Self(number))
        } else {
            Err(InvalidCid(number))
        }
    }
}

impl TryFrom<u32> for Cid {
    type Error = InvalidCid;

    /// The CID of a guest, from 3 to 4294967294.
    fn try_from(number: u32) -> Result<Self, InvalidCid> {
        u64::from(number).try_into()
    }
}

/// A port on the guest's side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GuestPort(pub u32);

/// A port on the peer's side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PeerPort(pub u32);

/// The address at the other end of a guest's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PeerAddr {
    /// The machine: [`Cid::HOST`], or another guest.
    pub cid: Cid,
    /// The port there.
    pub port: PeerPort,
}

impl PeerAddr {
    /// A port of the host.
    pub const fn host(port: u32) -> Self {
        Self {
            cid: Cid::HOST,
            port: PeerPort(port),
        }
    }
}

impl fmt::Display for PeerAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.cid, self.port.0)
    }
}

/// The `type` field. A number that the specification does not name is kept, since an RST repeats it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PacketType {
    /// A stream of bytes.
    Stream,
    /// Messages.
    Seqpacket,
    /// No type of the specification's.
    Unknown(u16),
}

impl From<u16> for PacketType {
    fn from(raw: u16) -> Self {
        match raw {
            1 => Self::Stream,
            2 => Self::Seqpacket,
            raw => Self::Unknown(raw),
        }
    }
}

impl From<PacketType> for u16 {
    fn from(packet_type: PacketType) -> Self {
        match packet_type {
            PacketType::Stream => 1,
            PacketType::Seqpacket => 2,
            PacketType::Unknown(raw) => raw,
        }
    }
}

/// The `op` field: what a packet asks or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Accepts a connection.
    Response,
    /// Refuses or aborts a connection.
    Rst,
    /// Ends one direction or both.
    Shutdown,
    /// Carries payload.
    Rw,
    /// Says how much the sender can take.
    CreditUpdate,
    /// Asks for a CREDIT_UPDATE.
    CreditRequest,
    /// No operation of the specification's.
    Unknown(u16),
}

impl From<u16> for Op {
    fn from(raw: u16) -> Self {
        match raw {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Rst,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            raw => Self::Unknown(raw),
        }
    }
}

impl From<Op> for u16 {
    fn from(op: Op) -> Self {
        match op {
            Op::Request => 1,
            Op::Response => 2,
            Op::Rst => 3,
            Op::Shutdown => 4,
            Op::Rw => 5,
            Op::CreditUpdate => 6,
            Op::CreditRequest => 7,
            Op::Unknown(raw) => raw,
        }
    }
}

bitflags! {
    /// The flags of SHUTDOWN: what its sender will no longer do.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(from = "Directions", into = "Directions")]
    pub struct ShutdownFlags: u32 {
        /// It will receive no more.
        const RECEIVE = 1;
        /// It will send no more.
        const SEND = 2;
    }
}

/// [`ShutdownFlags`] in a document.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Directions {
    receive: bool,
    send: bool,
}

impl From<Directions> for ShutdownFlags {
    fn from(over: Directions) -> Self {
        let mut flags = Self::empty();
        flags.set(Self::RECEIVE, over.receive);
        flags.set(Self::SEND, over.send);
        flags
    }
}

impl From<ShutdownFlags> for Directions {
    fn from(flags: ShutdownFlags) -> Self {
        Self {
            receive: flags.contains(ShutdownFlags::RECEIVE),
            send: flags.contains(ShutdownFlags::SEND),
        }
    }
}

bitflags! {
    /// The flags of a SEQPACKET's RW.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct MessageFlags: u32 {
        /// The packet is the last of its message.
        const EOM = 1;
        /// The message is the last of its record: its sender has set MSG_EOR.
        const EOR = 2;
    }
}

/// A packet's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VsockHeader {
    /// The CID on the guest's side.
    pub guest_cid: Cid,
    /// The port on the guest's side.
    pub guest_port: GuestPort,
    /// The address on the other side.
    pub peer: PeerAddr,
    /// Length of the payload, in bytes.
    pub len: u32,
    /// What kind of socket the packet is for.
    pub packet_type: PacketType,
    /// What it asks or answers.
    pub op: Op,
    /// The `flags` field, whose meaning depends on the operation.
    pub flags: u32,
    /// The sender's receive buffer for this connection, in bytes.
    pub buf_alloc: u32,
    /// How many bytes the sender's program has taken out of that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl VsockHeader {
    /// A header of a stream connection, with everything that is not named here zero.
    pub fn new(guest_cid: Cid, guest_port: GuestPort, peer: PeerAddr, op: Op) -> Self {
        Self {
            guest_cid,
            guest_port,
            peer,
            len: 0,
            packet_type: PacketType::Stream,
            op,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// The RST that answers this packet: the same addresses and the same `type`.
    pub fn reset(&self) -> Self {
        Self {
            packet_type: self.packet_type,
            ..Self::new(self.guest_cid, self.guest_port, self.peer, Op::Rst)
        }
    }

    /// The flags of a SHUTDOWN. Bits that the specification does not name are ignored.
    pub fn shutdown_flags(&self) -> ShutdownFlags {
        ShutdownFlags::from_bits_truncate(self.flags)
    }

    /// Whether an RW packet is the last of its message.
    pub fn ends_message(&self) -> bool {
        MessageFlags::from_bits_truncate(self.flags).contains(MessageFlags::EOM)
    }

    /// Reads the header of a packet from the TX ring: its source is the guest.
    pub fn from_tx(bytes: &[u8; HEADER_LEN]) -> Self {
        Self {
            guest_cid: Cid(u64::from_le_bytes(field(bytes, 0))),
            guest_port: GuestPort(u32::from_le_bytes(field(bytes, 16))),
            peer: PeerAddr {
                cid: Cid(u64::from_le_bytes(field(bytes, 8))),
                port: PeerPort(u32::from_le_bytes(field(bytes, 20))),
            },
            len: u32::from_le_bytes(field(bytes, 24)),
            packet_type: u16::from_le_bytes(field(bytes, 28)).into(),
            op: u16::from_le_bytes(field(bytes, 30)).into(),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// Writes the header of a packet for the RX ring: its source is the peer.
    pub fn to_rx(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.peer.cid.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.guest_cid.0.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.peer.port.0.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.guest_port.0.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&u16::from(self.packet_type).to_le_bytes());
        bytes[30..32].copy_from_slice(&u16::from(self.op).to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// The `N` bytes of a header's field at `offset`.
fn field<const N: usize>(bytes: &[u8; HEADER_LEN], offset: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[offset + i])
}

/// What a guest writes and reads, for the tests: source and destination are the other way round there.
#[cfg(test)]
impl VsockHeader {
    pub(crate) fn to_tx(self) -> [u8; HEADER_LEN] {
        Self::swapped(self.to_rx())
    }

    pub(crate) fn from_rx(bytes: &[u8; HEADER_LEN]) -> Self {
        Self::from_tx(&Self::swapped(*bytes))
    }

    fn swapped(mut bytes: [u8; HEADER_LEN]) -> [u8; HEADER_LEN] {
        bytes[..16].rotate_left(8);
        bytes[16..24].rotate_left(4);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: PeerAddr = PeerAddr::host(1025);

    #[test]
    fn a_header_keeps_its_sides_over_the_rings() {
        let sent = VsockHeader {
            len: 5,
            flags: ShutdownFlags::all().bits(),
            buf_alloc: 6,
            fwd_cnt: 7,
            ..VsockHeader::new(Cid(4), GuestPort(1234), PEER, Op::Shutdown)
        };
        let bytes = sent.to_rx();
        assert_eq!(bytes[..8], 2u64.to_le_bytes(), "the source is the host");
        assert_eq!(
            bytes[20..24],
            1234u32.to_le_bytes(),
            "the destination is the guest's port"
        );
        assert_eq!(VsockHeader::from_rx(&bytes), sent);

        let bytes = sent.to_tx();
        assert_eq!(bytes[..8], 4u64.to_le_bytes(), "the source is the guest");
        assert_eq!(VsockHeader::from_tx(&bytes), sent);
    }

    #[test]
    fn a_reset_keeps_addresses_and_type_only() {
        let mut refused = VsockHeader::new(Cid(4), GuestPort(1), PEER, Op::Rw);
        refused.packet_type = PacketType::Seqpacket;
        refused.len = 9;
        refused.buf_alloc = 9;
        let reset = refused.reset();
        assert_eq!(
            (reset.packet_type, reset.op),
            (PacketType::Seqpacket, Op::Rst)
        );
        assert_eq!((reset.len, reset.buf_alloc), (0, 0));
        assert_eq!(
            (reset.guest_port, reset.peer),
            (refused.guest_port, refused.peer)
        );
    }

    #[test]
    fn operations_and_types_have_the_numbers_of_the_specification() {
        let known: Vec<u16> = (0..=u16::MAX)
            .filter(|raw| !matches!(Op::from(*raw), Op::Unknown(_)))
            .collect();
        assert_eq!(known, [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(Op::from(6), Op::CreditUpdate);
        assert_eq!(PacketType::from(2), PacketType::Seqpacket);
        for raw in 0..=u16::MAX {
            assert_eq!(u16::from(Op::from(raw)), raw);
            assert_eq!(u16::from(PacketType::from(raw)), raw);
        }
    }

    #[test]
    fn reserved_numbers_are_no_guests_cids() {
        for number in [0, 1, 2, u64::from(u32::MAX), 1 << 32, u64::MAX] {
            assert_eq!(Cid::try_from(number), Err(InvalidCid(number)));
        }
        for number in [3, u32::MAX - 1] {
            assert_eq!(Cid::try_from(number), Ok(Cid(number.into())));
        }
    }
}
