//! The simulated guest: one VMM connection, its rings, and packets in and out of them.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::memory::GuestMemory;
use super::packet::{HEADER_LEN, Op, Packet};
use super::ring::{Indirect, Part, Ring, feature};
use super::setup::{Setup, TxLayout};
use super::vhost_user::{F_PROTOCOL_FEATURES, Frontend, Request, protocol};
use crate::common::daemon::{Daemon, PATIENCE};

/// Index of the ring the device fills.
pub const RX: usize = 0;
/// Index of the ring the guest fills.
pub const TX: usize = 1;

/// The bytes between two descriptors of one packet, so that an overrun shows. Odd, to get unaligned addresses.
const GAP: u64 = 13;
/// The most packets in flight to the device.
const TX_SLOTS: usize = 64;

/// `SimGuest::settle` uses ports from here on.
const PROBE_PORT: u32 = 0xffff_0000;

/// A simulated guest. Dropping it kills the VMM.
pub struct SimGuest {
    /// The connection to the daemon.
    pub frontend: Frontend,
    /// The memory shared with it.
    pub memory: Arc<GuestMemory>,
    /// RX, TX and perhaps the event ring.
    pub rings: Vec<Ring>,
    /// Its configuration.
    pub setup: Setup,
    /// The features that were negotiated.
    pub features: u64,
    /// The protocol features that were negotiated.
    pub protocol: u64,
    /// Post an RX buffer again as soon as its packet was taken.
    pub auto_repost: bool,
    rx_free: VecDeque<Vec<Part>>,
    rx_posted: HashMap<u16, Vec<Part>>,
    tx_free: VecDeque<u64>,
    tx_sent: HashMap<u16, Option<u64>>,
    probes: u32,
}

impl SimGuest {
    /// A guest whose device runs and has answered a packet.
    #[track_caller]
    pub fn start(daemon: &Daemon, setup: Setup) -> Self {
        Self::connect(daemon, setup).run()
    }

    /// The same over a connected socket.
    pub fn start_over(stream: UnixStream, setup: Setup) -> Self {
        Self::negotiate(Frontend::over(stream), setup).run()
    }

    fn run(mut self) -> Self {
        self.post_rx();
        self.start_rings();
        self.settle();
        self
    }

    /// A guest whose VMM has connected and negotiated; no ring is started.
    pub fn connect(daemon: &Daemon, setup: Setup) -> Self {
        Self::negotiate(Frontend::connect(&daemon.vhost_socket()), setup)
    }

    fn negotiate(mut frontend: Frontend, setup: Setup) -> Self {
        let (features, protocol) = negotiate(&mut frontend, &setup);
        let memory = Arc::new(GuestMemory::new(&setup.regions, setup.backing));
        share_memory(&frontend, &setup, &memory);
        memory.skip_to_region(setup.ring_region);
        let rings = (0..setup.queues)
            .map(|_| Ring::new(memory.clone(), setup.ring_size, features))
            .collect();
        memory.skip_to_region((setup.ring_region + 1).min(memory.regions().len() - 1));
        let mut guest = Self {
            frontend,
            rings,
            features,
            protocol,
            auto_repost: true,
            rx_free: VecDeque::new(),
            rx_posted: HashMap::new(),
            tx_free: VecDeque::new(),
            tx_sent: HashMap::new(),
            probes: 0,
            memory,
            setup,
        };
        guest.make_buffers();
        guest
    }

    fn make_buffers(&mut self) {
        let per_buffer = if self.rx_indirect() == Indirect::No {
            self.setup.rx.len()
        } else {
            1
        };
        let room = usize::from(self.setup.ring_size) / per_buffer;
        for _ in 0..self.setup.rx_buffers.unwrap_or(room) {
            let parts = self.setup.rx.iter().map(|&len| Part {
                addr: self.memory.alloc(u64::from(len) + GAP, 1),
                len,
                write: true,
            });
            self.rx_free.push_back(parts.collect());
        }
        if self.setup.regions.len() == 8 {
            // With small regions: buffers to the device over the borders of the later ones.
            self.memory.skip_to_region(4);
        }
        let slot = self.slot_len();
        for _ in 0..TX_SLOTS.min(self.setup.ring_size.into()) {
            self.tx_free.push_back(self.memory.alloc(slot, 1));
        }
    }

    fn slot_len(&self) -> u64 {
        (HEADER_LEN + self.setup.tx_payload) as u64 + 32 * GAP
    }

    /// Starts the rings at the indices they stopped at (0 when they never ran), with no kick.
    pub fn start_rings(&mut self) {
        let count = self.rings.len() as u32;
        let enable = self.features & F_PROTOCOL_FEATURES != 0;
        if enable && self.setup.enable_first {
            (0..count).for_each(|i| self.frontend.set_vring_enable(i, true));
        }
        for index in 0..count {
            self.start_ring(index);
        }
        if enable && !self.setup.enable_first {
            (0..count).for_each(|i| self.frontend.set_vring_enable(i, true));
        }
        // Messages are handled in order: with this reply, the rings are started.
        self.frontend.features();
    }

    /// Starts one ring, without enabling it.
    pub fn start_ring(&mut self, index: u32) {
        let base = self.rings[index as usize].device_used_idx();
        self.start_ring_at(index, base);
    }

    /// Starts one ring at `base`, without enabling it.
    pub fn start_ring_at(&mut self, index: u32, base: u16) {
        let ring = &mut self.rings[index as usize];
        ring.renew_eventfds();
        ring.arm();
        let frontend = &self.frontend;
        frontend.set_vring_num(index, ring.size().into());
        frontend.set_vring_base(index, base);
        frontend.set_vring_addr(index, ring.addresses());
        let kick = (Request::SetVringKick, ring.kick_fd.as_fd());
        let call = (Request::SetVringCall, ring.call_fd.as_fd());
        let err = (Request::SetVringErr, ring.err_fd.as_fd());
        let order = if self.setup.call_first {
            [call, err, kick]
        } else {
            [kick, call, err]
        };
        for (request, fd) in order {
            frontend.set_vring_fd(request, index, fd);
        }
    }

    /// Another VMM process takes the guest over, with its memory and rings as they are; no ring is started.
    pub fn reconnect(&mut self, daemon: &Daemon) {
        // The one before is gone first: there is one at a time.
        let stream = self.frontend.stream();
        stream.shutdown(std::net::Shutdown::Both).unwrap();
        self.frontend = Frontend::connect(&daemon.vhost_socket());
        let negotiated = negotiate(&mut self.frontend, &self.setup);
        assert_eq!(negotiated, (self.features, self.protocol));
        share_memory(&self.frontend, &self.setup, &self.memory);
    }

    /// Stops the rings. The device must have returned all that it took: the base is the used index.
    pub fn stop_rings(&mut self) -> Vec<u16> {
        (0..self.rings.len())
            .map(|index| {
                let base = self.frontend.vring_base(index as u32);
                assert_eq!(
                    base,
                    self.rings[index].device_used_idx(),
                    "ring {index} kept buffers"
                );
                base
            })
            .collect()
    }

    /// Restarts the stopped rings from index 0, as a rebooted driver does, with RX buffers posted.
    pub fn restart_fresh(&mut self) {
        self.rings.iter_mut().for_each(Ring::clear);
        self.rx_free
            .extend(self.rx_posted.drain().map(|(_, parts)| parts));
        let slots = self.tx_sent.drain().filter_map(|(_, slot)| slot);
        self.tx_free.extend(slots);
        self.post_rx();
        self.start_rings();
    }

    fn rx_indirect(&self) -> Indirect {
        let wanted = self.setup.indirect != Indirect::No && self.setup.rx.len() > 1;
        if wanted && self.features & feature::INDIRECT_DESC != 0 {
            self.setup.indirect
        } else {
            Indirect::No
        }
    }

    /// Posts every RX buffer that is not posted, with a kick where the device wants one.
    pub fn post_rx(&mut self) {
        self.post_rx_some(usize::MAX);
    }

    /// Posts up to `count` RX buffers.
    pub fn post_rx_some(&mut self, count: usize) {
        let indirect = self.rx_indirect();
        for _ in 0..count {
            let Some(parts) = self.rx_free.pop_front() else {
                break;
            };
            let Some(head) = self.rings[RX].add(&parts, indirect) else {
                self.rx_free.push_front(parts);
                break;
            };
            self.rx_posted.insert(head, parts);
        }
        self.rings[RX].kick_if_needed();
    }

    /// Posts a buffer of these parts, with a kick where the device wants one.
    pub fn post_rx_buffer(&mut self, parts: Vec<Part>) {
        let head = self.rings[RX].add(&parts, Indirect::No);
        self.rx_posted
            .insert(head.expect("no room in the ring"), parts);
        self.rings[RX].kick_if_needed();
    }

    /// The next packet from the device, if one is there.
    pub fn poll_packet(&mut self) -> Option<Packet> {
        let (head, used) = self.rings[RX].pop_used()?;
        let parts = self
            .rx_posted
            .remove(&head)
            .expect("no buffer behind this head");
        let packet = self.gather(&parts, used as usize);
        self.rx_free.push_back(parts);
        if self.auto_repost {
            self.post_rx();
        }
        Some(packet)
    }

    fn gather(&self, parts: &[Part], used: usize) -> Packet {
        let capacity: usize = parts.iter().map(|part| part.len as usize).sum();
        assert!(used <= capacity, "{used} bytes used of {capacity}");
        let mut bytes = Vec::with_capacity(used);
        for part in parts {
            let take = (part.len as usize).min(used - bytes.len());
            bytes.extend(self.memory.read(part.addr, take));
        }
        let packet = Packet::parse(&bytes);
        assert_eq!(packet.dst_cid, self.setup.cid, "{packet:?}");
        packet
    }

    /// The next packet, if one comes in time.
    pub fn try_recv(&mut self, patience: Duration) -> Option<Packet> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(packet) = self.poll_packet() {
                return Some(packet);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.rings[RX].wait_used(left) {
                return None;
            }
        }
    }

    /// The next packet; panics when none comes.
    #[track_caller]
    pub fn recv(&mut self) -> Packet {
        self.try_recv(PATIENCE).expect("no packet from the daemon")
    }

    /// Reclaims returned TX buffers.
    pub fn reclaim_tx(&mut self) {
        while let Some((head, used)) = self.rings[TX].pop_used() {
            assert_eq!(used, 0, "bytes written into buffers that are only read");
            self.tx_free.extend(self.tx_sent.remove(&head).flatten());
        }
    }

    /// Waits until the device has returned everything sent to it.
    #[track_caller]
    pub fn wait_tx_done(&mut self) {
        loop {
            self.reclaim_tx();
            if self.rings[TX].outstanding() == 0 {
                return;
            }
            assert!(
                self.rings[TX].wait_used(PATIENCE),
                "the daemon keeps TX buffers"
            );
        }
    }

    /// Sends a packet in the configured layout and kicks if the device asked for it.
    #[track_caller]
    pub fn send(&mut self, packet: &Packet) {
        let layout = self.setup.tx;
        self.send_as(packet, layout, self.setup.indirect);
    }

    /// Sends a packet in any layout.
    #[track_caller]
    pub fn send_as(&mut self, packet: &Packet, layout: TxLayout, indirect: Indirect) {
        while !self.try_send(packet, layout, indirect) {
            assert!(
                self.rings[TX].wait_used(PATIENCE),
                "the daemon keeps TX buffers"
            );
        }
        self.rings[TX].kick_if_needed();
    }

    /// Offers a packet without a kick; false when the ring is full.
    pub fn try_send(&mut self, packet: &Packet, layout: TxLayout, indirect: Indirect) -> bool {
        self.reclaim_tx();
        let Some(slot) = self.tx_free.pop_front() else {
            return false;
        };
        let parts = self.lay_out(&packet.bytes(), &layout.lengths(packet.payload.len()), slot);
        let table = parts.len() > 1 && self.features & feature::INDIRECT_DESC != 0;
        let indirect = if table { indirect } else { Indirect::No };
        let Some(head) = self.rings[TX].add(&parts, indirect) else {
            self.tx_free.push_front(slot);
            return false;
        };
        self.tx_sent.insert(head, Some(slot));
        true
    }

    fn lay_out(&self, bytes: &[u8], lengths: &[usize], slot: u64) -> Vec<Part> {
        let (mut addr, mut rest) = (slot, bytes);
        lengths
            .iter()
            .map(|&len| {
                let (piece, tail) = rest.split_at(len);
                rest = tail;
                self.memory.write(addr, piece);
                let part = Part {
                    addr,
                    len: len as u32,
                    write: false,
                };
                addr += len as u64 + GAP;
                part
            })
            .collect()
    }

    /// Offers any chain on the TX ring and kicks; its memory is the caller's.
    pub fn send_chain(&mut self, parts: &[Part], indirect: Indirect) {
        self.rings[TX]
            .add(parts, indirect)
            .expect("no room in the ring");
        self.rings[TX].kick_if_needed();
    }

    /// Waits until everything sent before has been processed: sends a packet that is always answered with RST and
    /// waits for that, twice. Returns the other packets received.
    #[track_caller]
    pub fn settle(&mut self) -> Vec<Packet> {
        let mut others = Vec::new();
        for _ in 0..2 {
            self.probes += 1;
            let port = PROBE_PORT + self.probes;
            self.send(&Packet {
                src_cid: self.setup.cid,
                ..Packet::new(Op::CreditRequest, port, port)
            });
            loop {
                let packet = self.recv();
                if packet.dst_port == port && packet.is(Op::Rst) {
                    break;
                }
                others.push(packet);
            }
        }
        others
    }
}

fn negotiate(frontend: &mut Frontend, setup: &Setup) -> (u64, u64) {
    frontend.set_owner();
    let offered = frontend.features();
    let mut wanted = setup.features | feature::VERSION_1;
    let mut accepted_protocol = 0;
    if setup.protocol_features {
        wanted |= F_PROTOCOL_FEATURES;
        let known = protocol::MQ
            | protocol::REPLY_ACK
            | protocol::CONFIG
            | protocol::RESET_DEVICE
            | protocol::CONFIGURE_MEM_SLOTS
            | protocol::DEVICE_STATE;
        accepted_protocol = frontend.protocol_features() & known;
        frontend.set_protocol_features(accepted_protocol);
    }
    frontend.set_features(offered & wanted);
    (offered & wanted, accepted_protocol)
}

fn share_memory(frontend: &Frontend, setup: &Setup, memory: &GuestMemory) {
    let regions = memory.regions();
    let shared = &regions[..regions.len() - setup.plugged_later];
    if setup.mem_slots {
        shared
            .iter()
            .for_each(|region| frontend.add_mem_reg(region));
    } else {
        frontend.share(shared);
    }
}
