//! The header of a virtio-vsock packet (virtio 1.2, 5.10.6).

/// The size of a header in bytes.
pub const HEADER_LEN: usize = 44;
/// The largest payload that Linux sends in one packet, in bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// The receive buffer of a Linux guest's connection, in bytes.
pub const BUF_ALLOC: u32 = 256 * 1024;
/// Both shutdown flags: will not receive, will not send.
pub const SHUTDOWN_BOTH: u32 = 3;

/// `op` values.
pub mod op {
    #![allow(missing_docs)] // The names are the specification's.
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// The guest's CID.
pub const GUEST_CID: u64 = 4;
/// The CID of the other guest, where there are two.
pub const SIBLING_CID: u64 = 5;
/// The host's CID.
pub const HOST_CID: u64 = 2;
/// The flag of a message's last packet.
pub const END_OF_MESSAGE: u32 = 1;

/// The type of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketType {
    /// A stream.
    Stream,
    /// Messages.
    Seqpacket,
}

/// What all packets of a guest have in common.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// The guest's CID.
    pub own: u64,
    /// The CID of whom it talks to.
    pub peer: u64,
    /// The type of its sockets.
    pub socket_type: SocketType,
}

impl Link {
    /// Whether it carries messages.
    pub fn has_messages(&self) -> bool {
        self.socket_type == SocketType::Seqpacket
    }
}

/// The header of a packet of either direction, without what all packets have in common.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)] // The names are the specification's.
pub struct Header {
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// Encodes the header of a packet from the guest.
    pub fn bytes(&self, link: &Link) -> [u8; HEADER_LEN] {
        let socket_type: u16 = match link.socket_type {
            SocketType::Stream => 1,
            SocketType::Seqpacket => 2,
        };
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&link.own.to_le_bytes());
        bytes[8..16].copy_from_slice(&link.peer.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// Decodes the header of a packet to the guest.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        Self {
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }
}
