//! The packets of virtio-vsock (virtio 1.2 §5.10.6), as plain values.

use crate::common::daemon::GUEST_CID;

/// The length of a packet's header.
pub const HEADER_LEN: usize = 44;
/// The host's CID.
pub const HOST_CID: u64 = 2;
/// `type` of stream packets.
pub const STREAM: u16 = 1;
/// `type` of packets of SEQPACKET connections.
pub const SEQPACKET: u16 = 2;
/// RW flag: the last packet of a message.
pub const EOM: u32 = 1;
/// RW flag: the message was sent with MSG_EOR.
pub const EOR: u32 = 2;
/// Shutdown flag: the sender will not receive.
pub const NO_RECEIVE: u32 = 1;
/// Shutdown flag: the sender will not send.
pub const NO_SEND: u32 = 2;
/// `buf_alloc` of a guest, in bytes: Linux's default.
pub const BUF_ALLOC: u32 = 256 * 1024;

/// `op` values (virtio 1.2 §5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Grants it.
    Response = 2,
    /// Refuses or ends it.
    Rst = 3,
    /// Says what the sender will no longer do.
    Shutdown = 4,
    /// Carries bytes.
    Rw = 5,
    /// Reports the free buffer space.
    CreditUpdate = 6,
    /// Asks for a CREDIT_UPDATE.
    CreditRequest = 7,
}

/// A packet: the fields of the header, and the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The names are the specification's.
pub struct Packet {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    pub payload: Vec<u8>,
}

impl Packet {
    /// A packet without payload from the guest's `src_port` to the host's `dst_port`.
    pub fn new(op: Op, src_port: u32, dst_port: u32) -> Self {
        Self {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port,
            dst_port,
            len: 0,
            kind: STREAM,
            op: op as u16,
            flags: 0,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: 0,
            payload: Vec::new(),
        }
    }

    /// The header as it stands in memory, little-endian.
    pub fn header(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// Header followed by payload.
    pub fn bytes(&self) -> Vec<u8> {
        [&self.header()[..], &self.payload].concat()
    }

    /// Parses a packet, and checks what a device must guarantee.
    pub fn parse(bytes: &[u8]) -> Self {
        assert!(
            bytes.len() >= HEADER_LEN,
            "a packet of {} bytes",
            bytes.len()
        );
        let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let packet = Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
            payload: bytes[HEADER_LEN..].to_vec(),
        };
        assert_eq!(
            packet.len as usize,
            packet.payload.len(),
            "len against the used length: {packet:?}"
        );
        if packet.op != Op::Rw as u16 {
            assert_eq!(
                packet.len, 0,
                "payload in a packet that carries none: {packet:?}"
            );
        }
        packet
    }

    /// Whether this is an `op`.
    pub fn is(&self, op: Op) -> bool {
        self.op == op as u16
    }

    /// Panics unless this is an `op` of the connection `flow`.
    #[track_caller]
    pub fn assert_is(&self, op: Op, flow: &Flow) {
        assert!(
            self.is(op) && flow.owns(self),
            "wanted {op:?} for {flow:?}, got {self:?}"
        );
    }
}

/// One connection, as the guest sees it: makes the packets that belong to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The guest's CID.
    pub guest_cid: u64,
    /// The other end's: the host's, or another guest's.
    pub peer_cid: u64,
    /// The guest's port.
    pub guest_port: u32,
    /// The host's port.
    pub host_port: u32,
    /// The `type` of its packets.
    pub kind: u16,
    /// The guest's advertised buffer space.
    pub buf_alloc: u32,
    /// The guest's count of consumed bytes.
    pub fwd_cnt: u32,
}

impl Flow {
    /// A stream between two ports.
    pub fn new(guest_port: u32, host_port: u32) -> Self {
        Self {
            guest_cid: GUEST_CID,
            peer_cid: HOST_CID,
            guest_port,
            host_port,
            kind: STREAM,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: 0,
        }
    }

    /// A connection of messages between two ports.
    pub fn seqpacket(guest_port: u32, host_port: u32) -> Self {
        Self {
            kind: SEQPACKET,
            ..Self::new(guest_port, host_port)
        }
    }

    /// The connection a packet from the host belongs to.
    pub fn of(packet: &Packet) -> Self {
        Self {
            kind: packet.kind,
            guest_cid: packet.dst_cid,
            peer_cid: packet.src_cid,
            ..Self::new(packet.dst_port, packet.src_port)
        }
    }

    /// Whether a packet from the host belongs to this connection.
    pub fn owns(&self, packet: &Packet) -> bool {
        *self
            == Self {
                buf_alloc: self.buf_alloc,
                fwd_cnt: self.fwd_cnt,
                ..Self::of(packet)
            }
    }

    /// A packet without payload.
    pub fn packet(&self, op: Op) -> Packet {
        Packet {
            kind: self.kind,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            src_cid: self.guest_cid,
            dst_cid: self.peer_cid,
            ..Packet::new(op, self.guest_port, self.host_port)
        }
    }

    /// A packet with payload.
    pub fn rw(&self, payload: &[u8]) -> Packet {
        Packet {
            len: payload.len() as u32,
            payload: payload.to_vec(),
            ..self.packet(Op::Rw)
        }
    }

    /// A message in packets of at most `most` bytes: the last one has EOM.
    pub fn message(&self, message: &[u8], most: usize) -> Vec<Packet> {
        let mut packets: Vec<_> = message.chunks(most).map(|piece| self.rw(piece)).collect();
        packets.last_mut().expect("a message has bytes").flags = EOM;
        packets
    }

    /// A SHUTDOWN with these flags.
    pub fn shutdown(&self, flags: u32) -> Packet {
        Packet {
            flags,
            ..self.packet(Op::Shutdown)
        }
    }
}
