//! The header of a virtio-vsock packet, and the names in it (virtio 1.2, 5.10.6).
//!
//! The daemon always stands between one guest and its host, so a header here has a guest's and a host's side in place of
//! a source and a destination. Which is which follows from the ring, and is decided here, where bytes become headers.

use serde::{Deserialize, Serialize};

/// Length of a packet's header, in bytes.
pub const HEADER_LEN: usize = virtio_vsock::packet::PKT_HEADER_SIZE;

/// The `type` of packets of a stream connection (virtio 1.2, 5.10.6). 2 would be SEQPACKET.
pub const TYPE_STREAM: u16 = 1;

/// The flag of SHUTDOWN that says its sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// The flag of SHUTDOWN that says its sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both flags of SHUTDOWN: a clean end of the connection.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// A context id: the address of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cid(pub u64);

/// The host's CID in every guest's eyes (virtio 1.2, 5.10.4).
pub const HOST_CID: Cid = Cid(2);

/// A port on the guest's side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GuestPort(pub u32);

/// A port on the host's side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HostPort(pub u32);

/// What a packet asks or answers, the `op` field (virtio 1.2, 5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts a connection.
    Response = 2,
    /// Refuses or aborts a connection.
    Rst = 3,
    /// Ends one direction or both.
    Shutdown = 4,
    /// Carries payload.
    Rw = 5,
    /// Tells how much the sender can take.
    CreditUpdate = 6,
    /// Asks for a CREDIT_UPDATE.
    CreditRequest = 7,
}

impl Op {
    /// The operation with this number, if there is one.
    pub fn from_raw(raw: u16) -> Option<Self> {
        [
            Self::Request,
            Self::Response,
            Self::Rst,
            Self::Shutdown,
            Self::Rw,
            Self::CreditUpdate,
            Self::CreditRequest,
        ]
        .into_iter()
        .find(|op| *op as u16 == raw)
    }
}

/// A packet's header. `kind` and `op` are as the guest sent them, known or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VsockHeader {
    /// The CID on the guest's side.
    pub guest_cid: Cid,
    /// The CID on the host's side.
    pub host_cid: Cid,
    /// The port on the guest's side.
    pub guest_port: GuestPort,
    /// The port on the host's side.
    pub host_port: HostPort,
    /// Length of the payload, in bytes.
    pub len: u32,
    /// The `type` field.
    pub kind: u16,
    /// The `op` field.
    pub op: u16,
    /// The flags of SHUTDOWN.
    pub flags: u32,
    /// The sender's receive buffer for this connection, in bytes.
    pub buf_alloc: u32,
    /// How many bytes the sender's program has taken out of that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl VsockHeader {
    /// A header for the guest, with all that is not named here zero.
    pub fn to_guest(guest_cid: Cid, guest_port: GuestPort, host_port: HostPort, op: Op) -> Self {
        Self {
            guest_cid,
            host_cid: HOST_CID,
            guest_port,
            host_port,
            len: 0,
            kind: TYPE_STREAM,
            op: op as u16,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// The RST that refuses this packet: the same addresses and the same `type`.
    pub fn reset(&self) -> Self {
        Self {
            len: 0,
            op: Op::Rst as u16,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
            ..*self
        }
    }

    /// Reads the header of a packet from the guest: its source is the guest's side.
    pub fn from_tx(bytes: &[u8; HEADER_LEN]) -> Self {
        Self {
            guest_cid: Cid(u64::from_le_bytes(field(bytes, 0))),
            host_cid: Cid(u64::from_le_bytes(field(bytes, 8))),
            guest_port: GuestPort(u32::from_le_bytes(field(bytes, 16))),
            host_port: HostPort(u32::from_le_bytes(field(bytes, 20))),
            len: u32::from_le_bytes(field(bytes, 24)),
            kind: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// Writes the header of a packet for the guest: its source is the host's side.
    pub fn to_rx(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.host_cid.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.guest_cid.0.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.host_port.0.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.guest_port.0.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
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

/// The guest's view of both directions, for the tests: source and destination the other way round.
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

    #[test]
    fn a_header_keeps_its_sides_over_the_rings() {
        let sent = VsockHeader {
            len: 5,
            flags: SHUTDOWN_BOTH,
            buf_alloc: 6,
            fwd_cnt: 7,
            ..VsockHeader::to_guest(Cid(4), GuestPort(1234), HostPort(1025), Op::Shutdown)
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
        let mut refused = VsockHeader::to_guest(Cid(4), GuestPort(1), HostPort(2), Op::Rw);
        refused.kind = 2;
        refused.len = 9;
        refused.buf_alloc = 9;
        let reset = refused.reset();
        assert_eq!((reset.kind, reset.op), (2, Op::Rst as u16));
        assert_eq!((reset.len, reset.buf_alloc), (0, 0));
        assert_eq!(reset.guest_port, refused.guest_port);
    }

    #[test]
    fn operations_have_the_numbers_of_the_specification() {
        let known: Vec<u16> = (0..=u16::MAX)
            .filter(|raw| Op::from_raw(*raw).is_some())
            .collect();
        assert_eq!(known, [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(Op::from_raw(6), Some(Op::CreditUpdate));
    }
}
