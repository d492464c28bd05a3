//! The configuration of a simulated guest: rings, features, buffers.

use super::memory::Backing;
use super::packet::{BUF_ALLOC, HEADER_LEN};
use super::ring::{Indirect, feature};
use crate::common::daemon::GUEST_CID;

/// Where a packet's header stands among the descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderPlace {
    /// In a descriptor of its own.
    Alone,
    /// In front of the first payload bytes, in one descriptor.
    Together,
    /// Over two descriptors of its own.
    Split,
}

/// How packets to the device are laid out. No framing may be assumed (virtio 1.2 §2.7.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TxLayout {
    /// Where the header is.
    pub header: HeaderPlace,
    /// Total number of descriptors, if there is enough payload.
    pub descriptors: usize,
}

impl TxLayout {
    /// The header alone and the payload in one piece, as Linux does it.
    pub const LINUX: Self = Self {
        header: HeaderPlace::Alone,
        descriptors: 2,
    };

    /// The lengths of the descriptors for a payload of `len` bytes.
    pub fn lengths(&self, len: usize) -> Vec<usize> {
        let (mut lengths, rest, used) = match self.header {
            HeaderPlace::Alone => (vec![HEADER_LEN], len, 1),
            HeaderPlace::Together => (vec![], len + HEADER_LEN, 0),
            HeaderPlace::Split => (vec![19, HEADER_LEN - 19], len, 2),
        };
        let first_min = if used == 0 { HEADER_LEN } else { 0 };
        let parts = self
            .descriptors
            .saturating_sub(used)
            .max(1)
            .min((rest - first_min).max(1));
        if rest > 0 {
            // Uneven on purpose: the last part takes the rest.
            let step = (rest - first_min) / parts;
            lengths.extend((0..parts).map(|i| match i {
                _ if i + 1 == parts => {
                    rest - (parts - 1) * step - if i > 0 { first_min } else { 0 }
                }
                0 => step + first_min,
                _ => step,
            }));
        }
        lengths
    }
}

/// The configuration of a guest.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The guest's CID, as the daemon has it.
    pub cid: u64,
    /// Descriptors per ring.
    pub ring_size: u16,
    /// Features to accept, where they are offered.
    pub features: u64,
    /// 3 with the event queue, 2 without.
    pub queues: usize,
    /// The descriptor lengths of each RX buffer.
    pub rx: Vec<u32>,
    /// How many RX buffers to post; None fills the ring.
    pub rx_buffers: Option<usize>,
    /// How packets are laid out.
    pub tx: TxLayout,
    /// Whether, and how, chains of more than one descriptor use indirect tables.
    pub indirect: Indirect,
    /// The most payload in one packet.
    pub tx_payload: usize,
    /// SET_VRING_ENABLE before SET_VRING_KICK.
    pub enable_first: bool,
    /// SET_VRING_CALL before SET_VRING_KICK.
    pub call_first: bool,
    /// Whether to negotiate protocol features at all; without them rings are enabled from the start.
    pub protocol_features: bool,
    /// `buf_alloc` of each connection, in bytes.
    pub buf_alloc: u32,
    /// Keep at most our own `buf_alloc` in flight, as newer Linux does.
    pub cap_in_flight: bool,
    /// The sizes of the memory regions.
    pub regions: Vec<u64>,
    /// The region that the rings are in. Buffers are in those behind it, if there are any.
    pub ring_region: usize,
    /// How many of the regions, from the end, are not shared at first.
    pub plugged_later: usize,
    /// Share each region with ADD_MEM_REG instead of all with SET_MEM_TABLE.
    pub mem_slots: bool,
    /// What the regions are made of.
    pub backing: Backing,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            cid: GUEST_CID,
            ring_size: 128,
            features: feature::EVENT_IDX | feature::INDIRECT_DESC,
            queues: 2,
            rx: vec![3776],
            rx_buffers: None,
            tx: TxLayout::LINUX,
            indirect: Indirect::No,
            tx_payload: 64 * 1024,
            enable_first: false,
            call_first: false,
            protocol_features: true,
            buf_alloc: BUF_ALLOC,
            cap_in_flight: false,
            regions: vec![2 << 20, 30 << 20],
            ring_region: 0,
            plugged_later: 0,
            mem_slots: false,
            backing: Backing::Pages,
        }
    }
}

impl Setup {
    /// A driver that has messages as Linux does: it takes SEQPACKET, and has streams too.
    pub fn with_messages(mut self) -> Self {
        self.features |= feature::SEQPACKET;
        self
    }

    /// Regions so small that RX and TX buffers lie across their borders.
    pub fn with_borders(mut self) -> Self {
        let (rx, tx) = (12 << 10, 20 << 10);
        self.regions = vec![2 << 20, rx, rx, rx, tx, tx, tx, 24 << 20];
        self
    }
}
