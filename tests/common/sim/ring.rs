//! The driver's side of a split virtqueue (virtio 1.2 §2.7).

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::memory::GuestMemory;
use super::vhost_user::RingAddresses;

/// Feature bits of the ring (virtio 1.2 §6).
pub mod feature {
    /// Streams (virtio 1.2 §5.10.3).
    pub const STREAM: u64 = 1 << 0;
    /// Messages.
    pub const SEQPACKET: u64 = 1 << 1;
    /// Streams only where they are named.
    pub const NO_IMPLIED_STREAM: u64 = 1 << 2;
    /// Notify when the ring runs empty (legacy).
    pub const NOTIFY_ON_EMPTY: u64 = 1 << 24;
    /// Descriptors in tables of their own.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Virtio 1.
    pub const VERSION_1: u64 = 1 << 32;
    /// Buffers are used in the order they were offered.
    pub const IN_ORDER: u64 = 1 << 35;
}

/// Descriptor flag: the chain goes on.
pub const F_NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const F_WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const F_INDIRECT: u16 = 4;

/// The most descriptors in one indirect table.
pub const TABLE_LEN: usize = 32;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Guest-physical address.
    pub addr: u64,
    /// Length.
    pub len: u32,
    /// Whether the device writes it.
    pub write: bool,
}

/// How a chain uses an indirect table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Indirect {
    /// Not at all.
    No,
    /// All parts are in it.
    Whole,
    /// The first part is in the ring, the others are in it (§2.7.5.3.2).
    Tail,
}

struct Chain {
    slots: Vec<u16>,
    capacity: u32,
}

/// A driver-side ring.
pub struct Ring {
    memory: Arc<GuestMemory>,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    tables: u64,
    features: u64,
    free: VecDeque<u16>,
    outstanding: VecDeque<u16>,
    chains: HashMap<u16, Chain>,
    batch: VecDeque<(u16, u32)>,
    avail_idx: u16,
    kicked_idx: u16,
    used_idx: u16,
    /// The eventfd that notifies the device.
    pub kick_fd: EventFd,
    /// The eventfd that the device interrupts with.
    pub call_fd: EventFd,
    /// The eventfd that signals a broken ring.
    pub err_fd: EventFd,
    /// Kicks given.
    pub kicks: u64,
    /// Interrupts taken.
    pub interrupts: u64,
}

impl Ring {
    /// Makes a ring of `size` descriptors.
    pub fn new(memory: Arc<GuestMemory>, size: u16, features: u64) -> Self {
        let entries = u64::from(size);
        let mut ring = Self {
            // Sizes and alignments are those of §2.7.
            desc: memory.alloc(16 * entries, 16),
            avail: memory.alloc(6 + 2 * entries, 2),
            used: memory.alloc(6 + 8 * entries, 4),
            tables: memory.alloc(16 * TABLE_LEN as u64 * entries, 16),
            memory,
            size,
            features,
            free: VecDeque::new(),
            outstanding: VecDeque::new(),
            chains: HashMap::new(),
            batch: VecDeque::new(),
            avail_idx: 0,
            kicked_idx: 0,
            used_idx: 0,
            kick_fd: eventfd(),
            call_fd: eventfd(),
            err_fd: eventfd(),
            kicks: 0,
            interrupts: 0,
        };
        ring.clear();
        ring
    }

    /// Clears the ring, as a restarting driver does.
    pub fn clear(&mut self) {
        let entries = u64::from(self.size);
        self.memory.fill(self.desc, 16 * entries, 0);
        self.memory.fill(self.avail, 6 + 2 * entries, 0);
        self.memory.fill(self.used, 6 + 8 * entries, 0);
        self.free = (0..self.size).collect();
        self.outstanding.clear();
        self.chains.clear();
        self.batch.clear();
        (self.avail_idx, self.kicked_idx, self.used_idx) = (0, 0, 0);
    }

    /// New eventfds, as a VMM makes them for each start, without stale kicks.
    pub fn renew_eventfds(&mut self) {
        self.kick_fd = eventfd();
        self.call_fd = eventfd();
        self.err_fd = eventfd();
    }

    /// The number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where the ring lies, as frontend addresses.
    pub fn addresses(&self) -> RingAddresses {
        RingAddresses {
            desc: self.memory.user_addr(self.desc),
            used: self.memory.user_addr(self.used),
            avail: self.memory.user_addr(self.avail),
        }
    }

    /// Whether a feature was negotiated.
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Number of free descriptors.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Number of chains that the device has not returned.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Offers a chain to the device, without a kick. None when the ring has no room.
    pub fn add(&mut self, parts: &[Part], indirect: Indirect) -> Option<u16> {
        let direct = match indirect {
            Indirect::No => parts.len(),
            Indirect::Whole => 0,
            Indirect::Tail => 1,
        };
        let in_table = parts.len() - direct;
        let wanted = direct + usize::from(in_table > 0);
        if self.free.len() < wanted {
            return None;
        }
        let slots: Vec<u16> = self.free.drain(..wanted).collect();
        for (i, (&slot, part)) in slots.iter().zip(&parts[..direct]).enumerate() {
            self.write_part(self.desc, slot, part, slots.get(i + 1).copied());
        }
        if in_table > 0 {
            self.write_table(slots[direct], &parts[direct..]);
        }
        let head = slots[0];
        let capacity = parts
            .iter()
            .filter(|part| part.write)
            .map(|part| part.len)
            .sum();
        self.chains.insert(head, Chain { slots, capacity });
        self.outstanding.push_back(head);
        self.push_avail(head);
        Some(head)
    }

    fn write_table(&mut self, slot: u16, parts: &[Part]) {
        assert!(parts.len() <= TABLE_LEN);
        let table = self.tables + 16 * (TABLE_LEN as u64) * u64::from(slot);
        for (i, part) in parts.iter().enumerate() {
            let next = (i + 1 < parts.len()).then_some(i as u16 + 1);
            self.write_part(table, i as u16, part, next);
        }
        self.write_desc(slot, table, 16 * parts.len() as u32, F_INDIRECT, 0);
    }

    fn write_part(&self, table: u64, slot: u16, part: &Part, next: Option<u16>) {
        let flags = if part.write { F_WRITE } else { 0 } | if next.is_some() { F_NEXT } else { 0 };
        self.write_desc_in(table, slot, part.addr, part.len, flags, next.unwrap_or(0));
    }

    /// Writes a raw descriptor (§2.7.5).
    pub fn write_desc(&self, slot: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.write_desc_in(self.desc, slot, addr, len, flags, next);
    }

    /// Writes a descriptor into any table.
    pub fn write_desc_in(&self, table: u64, slot: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&next.to_le_bytes());
        self.memory.write(table + 16 * u64::from(slot), &bytes);
    }

    /// Takes descriptors off the free list, for handwritten chains.
    pub fn take_slots(&mut self, count: usize) -> Vec<u16> {
        self.free.drain(..count).collect()
    }

    /// Offers a handwritten chain over `slots`, the first of which is its head.
    pub fn offer(&mut self, slots: Vec<u16>) -> u16 {
        let head = slots[0];
        self.chains.insert(head, Chain { slots, capacity: 0 });
        self.outstanding.push_back(head);
        self.push_avail(head);
        head
    }

    /// Puts `head` in the available ring, valid or not.
    pub fn push_avail(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.memory
            .write(self.avail + 4 + 2 * slot, &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.memory.store_u16(self.avail + 2, self.avail_idx);
    }

    /// Sets the available index, valid or not.
    pub fn set_avail_idx(&mut self, index: u16) {
        self.avail_idx = index;
        self.memory.store_u16(self.avail + 2, index);
    }

    /// The available index.
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// The used index, as the device wrote it.
    pub fn device_used_idx(&self) -> u16 {
        self.memory.load_u16(self.used + 2)
    }

    /// Kicks when the device asked for it: by `avail_event` (§2.7.10) or the NO_NOTIFY flag.
    pub fn kick_if_needed(&mut self) {
        self.memory.barrier();
        let needed = if self.has(feature::EVENT_IDX) {
            let event = self
                .memory
                .load_u16(self.used + 4 + 8 * u64::from(self.size));
            let since = self.avail_idx.wrapping_sub(self.kicked_idx);
            self.avail_idx.wrapping_sub(event).wrapping_sub(1) < since
        } else {
            self.memory.load_u16(self.used) & 1 == 0
        };
        self.kicked_idx = self.avail_idx;
        if needed {
            self.kick();
        }
    }

    /// Kicks.
    pub fn kick(&mut self) {
        self.kicks += 1;
        self.kick_fd.write(1).unwrap();
    }

    /// The next buffer the device has returned: its head and the bytes written.
    pub fn pop_used(&mut self) -> Option<(u16, u32)> {
        if self.batch.is_empty() {
            self.read_used();
        }
        let (head, len) = self.batch.pop_front()?;
        let chain = self
            .chains
            .remove(&head)
            .expect("a head that was never offered");
        self.free.extend(chain.slots);
        Some((head, len))
    }

    fn read_used(&mut self) {
        let device = self.device_used_idx();
        let ready = device.wrapping_sub(self.used_idx);
        assert!(
            usize::from(ready) <= self.outstanding.len(),
            "more used than offered"
        );
        if ready == 0 {
            return;
        }
        let at = self.used + 4 + 8 * u64::from(self.used_idx % self.size);
        let bytes = self.memory.read(at, 8);
        let id = u32::from_le_bytes(bytes[0..4].try_into().unwrap());
        let len = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
        let place = self
            .outstanding
            .iter()
            .position(|&head| u32::from(head) == id);
        let place = place.unwrap_or_else(|| panic!("head {id} used but not outstanding"));
        if self.has(feature::IN_ORDER) {
            // One entry may stand for a batch, named by its last head (§2.7.9); the buffers before it are used in full.
            assert!(place < usize::from(ready), "used out of order");
            for head in self.outstanding.drain(..place) {
                self.batch.push_back((head, self.chains[&head].capacity));
            }
            self.outstanding.pop_front();
            self.used_idx = self.used_idx.wrapping_add(place as u16 + 1);
        } else {
            self.outstanding.remove(place);
            self.used_idx = self.used_idx.wrapping_add(1);
        }
        self.batch.push_back((id as u16, len));
    }

    /// Whether the device has returned buffers that were not taken.
    pub fn device_has_more(&self) -> bool {
        !self.batch.is_empty() || self.device_used_idx() != self.used_idx
    }

    /// Asks for an interrupt at the next used buffer; true when there already is one (§2.7.7.1).
    pub fn arm(&mut self) -> bool {
        if self.has(feature::EVENT_IDX) {
            let used_event = self.avail + 4 + 2 * u64::from(self.size);
            self.memory.store_u16(used_event, self.used_idx);
        }
        self.memory.barrier();
        self.device_has_more()
    }

    /// Waits for a returned buffer, relying on interrupts; false if none came in time.
    pub fn wait_used(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            self.drain_call();
            if self.arm() {
                return true;
            }
            if !wait_readable(self.call_fd.as_fd(), deadline) {
                return false;
            }
        }
    }

    /// Consumes pending interrupts.
    pub fn drain_call(&mut self) {
        if let Ok(count) = self.call_fd.read() {
            self.interrupts += count;
        }
    }

    /// Waits for the error eventfd.
    pub fn wait_error(&self, patience: Duration) -> bool {
        wait_readable(self.err_fd.as_fd(), Instant::now() + patience)
    }

    /// The address of the descriptor table, for misbehaviour.
    pub fn desc_addr(&self) -> u64 {
        self.desc
    }
}

fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap()
}

/// Waits until `fd` can be read; false when it could not in time.
pub fn wait_readable(fd: BorrowedFd, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap();
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], left).unwrap() > 0
}
