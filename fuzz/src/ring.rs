//! The driver's side of a split virtqueue (virtio 1.2, 2.7).

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;

use arbitrary::Arbitrary;
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::memory::Memory;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The flag in the used ring with which the device asks for no kicks.
const NO_NOTIFY: u16 = 1;

/// How much memory every descriptor has for its buffer, in bytes.
const SLOT: usize = 2048;

/// The most descriptors of a chain.
const MAX_PARTS: usize = 6;

/// How a chain uses an indirect table (virtio 1.2, 2.7.5.3).
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Table {
    /// Not at all.
    None,
    /// For all its buffers.
    Whole,
    /// For all but the first.
    Tail,
}

/// How a packet lies in a chain.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Layout {
    /// How many bytes are in the first buffer.
    first: u8,
    /// How many buffers hold the others.
    others: u8,
    /// What lies between two of them, in bytes.
    gap: u8,
    table: Table,
}

impl Layout {
    /// Everything in one buffer.
    pub const PLAIN: Self = Self {
        first: 0,
        others: 0,
        gap: 0,
        table: Table::None,
    };

    /// The buffers for `len` bytes from `start` on.
    fn areas(self, start: u64, len: usize) -> Vec<(u64, u32)> {
        let others = usize::from(self.others) % MAX_PARTS;
        let first = if others == 0 {
            len
        } else {
            len.min(self.first.into())
        };
        let mut lengths = vec![first];
        for left in (1..=others).rev() {
            let taken: usize = lengths.iter().sum();
            lengths.push((len - taken) / left);
        }
        let gap = u64::from(self.gap) % 16;
        let mut at = start;
        let area = |len: usize| {
            let area = (at, len as u32);
            at += len as u64 + gap;
            area
        };
        lengths.into_iter().map(area).collect()
    }
}

/// The most bytes that a chain holds in any layout.
pub const MAX_PACKET: usize = SLOT - 16 * MAX_PARTS;

/// The most bytes of a buffer whose slot has a table of [`MAX_SIZE`] descriptors too.
const MAX_HOLLOW: usize = SLOT - 16 * MAX_SIZE as usize;

/// A chain that the device has.
struct Offer {
    slots: Vec<u16>,
    areas: Vec<(u64, u32)>,
    /// It is a packet or a buffer for one, and not [`Malformed`].
    is_sound: bool,
}

/// A chain that the device has returned.
#[derive(Debug)]
pub struct Returned {
    /// What the device has written to it.
    pub bytes: Vec<u8>,
    /// It is a packet or a buffer for one, and not [`Malformed`].
    pub is_sound: bool,
}

/// A ring, with the memory for its buffers.
pub struct Ring<'m> {
    memory: &'m Memory,
    size: u16,
    is_rx: bool,
    event_idx: bool,
    desc: u64,
    avail: u64,
    used: u64,
    tables: u64,
    buffers: u64,
    free: Vec<u16>,
    offers: VecDeque<Offer>,
    avail_idx: u16,
    kicked_idx: u16,
    used_idx: u16,
    kick: EventFd,
    call: EventFd,
    err: EventFd,
}

/// Where rings lie in the memory of [`with_memory`], and how far apart.
const FIRST_RING: u64 = 0x1000;
const NEXT_RING: u64 = 0x1800;
const FIRST_BUFFER: u64 = 0x4000;
const MAX_SIZE: u16 = 32;

/// Runs an input with the memory of a guest with two rings. It is made once for all inputs of a thread.
pub fn with_memory<T>(run: impl FnOnce(&Memory) -> T) -> T {
    thread_local! {
        static MEMORY: Memory = memory();
    }
    MEMORY.with(|memory| {
        memory.reset();
        run(memory)
    })
}

/// Several adjacent regions, whose borders buffers cross.
fn memory() -> Memory {
    let lengths = [0x3000, 0x8123, 0x9001, 0xedc];
    let mut addr = FIRST_RING;
    let mut ranges = Vec::new();
    for len in lengths {
        ranges.push((addr, len));
        addr += len;
    }
    let end = FIRST_BUFFER + 2 * u64::from(MAX_SIZE) * SLOT as u64;
    ranges.push((addr, end - addr));
    Memory::new(&ranges)
}

impl<'m> Ring<'m> {
    /// A ring of `size` descriptors, 1 to 32, whose indices begin at `start`.
    pub fn new(memory: &'m Memory, is_rx: bool, size: u16, event_idx: bool, start: u16) -> Self {
        let which = u64::from(is_rx);
        let desc = FIRST_RING + which * NEXT_RING;
        let mut ring = Self {
            memory,
            size,
            is_rx,
            event_idx,
            desc,
            avail: desc + 0x200,
            used: desc + 0x280,
            tables: desc + 0x400,
            buffers: FIRST_BUFFER + which * u64::from(MAX_SIZE) * SLOT as u64,
            free: Vec::new(),
            offers: VecDeque::new(),
            avail_idx: 0,
            kicked_idx: 0,
            used_idx: 0,
            kick: eventfd(),
            call: eventfd(),
            err: eventfd(),
        };
        ring.begin(start);
        ring
    }

    /// Starts afresh, as a driver that has just been loaded.
    pub fn begin(&mut self, start: u16) {
        self.free = (0..self.size).rev().collect();
        self.offers.clear();
        (self.avail_idx, self.kicked_idx, self.used_idx) = (start, start, start);
        self.store(self.avail, 0);
        self.store(self.avail + 2, start);
        self.store(self.avail + 4 + 2 * u64::from(self.size), start);
        self.store(self.used, 0);
        self.store(self.used + 2, start);
        self.store(self.avail_event(), start);
    }

    /// Descriptor table, avail ring and used ring.
    pub fn addresses(&self) -> [u64; 3] {
        [self.desc, self.avail, self.used]
    }

    /// How many descriptors it has.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// A device's view of the ring.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(self.desc))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used))
            .unwrap();
        queue.set_next_avail(self.avail_idx);
        queue.set_next_used(self.used_idx);
        queue.set_ready(true);
        queue
    }

    /// Where the device may write.
    pub fn writable(&self) -> Vec<Range<u64>> {
        let used = self.used..self.used + 6 + 8 * u64::from(self.size);
        let buffers = self.buffers..self.buffers + u64::from(self.size) * SLOT as u64;
        if self.is_rx {
            vec![used, buffers]
        } else {
            vec![used]
        }
    }

    /// Its kick, call and error descriptors, in this order.
    pub fn files(&self) -> [File; 3] {
        [&self.kick, &self.call, &self.err].map(|event| {
            let copy = nix::unistd::dup(event).unwrap();
            File::from(copy)
        })
    }

    /// Where the driver makes the next chain available.
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// Where the device returns the next chain.
    pub fn returned_idx(&self) -> u16 {
        self.load(self.used + 2)
    }

    /// Whether a chain of any layout can be offered now.
    pub fn has_room(&self) -> bool {
        self.free.len() > MAX_PARTS
    }

    /// The heads of the chains that the device has, and of those that it has returned and the driver has not taken, in order.
    pub fn outstanding(&self) -> Vec<u16> {
        self.offers.iter().map(|offer| offer.slots[0]).collect()
    }

    /// Offers a packet, which has at most [`MAX_PACKET`] bytes, or a buffer for one.
    pub fn offer(&mut self, layout: Layout, packet: &[u8]) {
        let Some(head) = self.free.last().copied() else {
            return;
        };
        let areas = layout.areas(self.buffers + u64::from(head) * SLOT as u64, packet.len());
        let mut rest = packet;
        for (addr, len) in &areas {
            let (part, after) = rest.split_at(*len as usize);
            self.memory.write(*addr, part);
            rest = after;
        }
        let usual = if self.is_rx { WRITE } else { 0 };
        self.offer_areas(areas, layout.table, [usual; 2], true);
    }

    /// Offers an empty buffer for a packet of at most `len` bytes.
    pub fn offer_buffer(&mut self, layout: Layout, len: usize) {
        let Some(head) = self.free.last().copied() else {
            return;
        };
        self.memory
            .clear(self.buffers + u64::from(head) * SLOT as u64, SLOT);
        let areas = layout.areas(self.buffers + u64::from(head) * SLOT as u64, len);
        self.offer_areas(areas, layout.table, [WRITE; 2], true);
    }

    /// Offers an empty buffer for a packet of at most `len` bytes, behind as many descriptors without a byte as a chain may have.
    pub fn offer_hollow_buffer(&mut self, len: usize) {
        let Some(head) = self.free.pop() else { return };
        let table = self.buffers + u64::from(head) * SLOT as u64;
        let buffer = table + 16 * u64::from(MAX_SIZE);
        self.memory.clear(table, SLOT);
        let last = self.size - 1;
        for index in 0..last {
            let place = table + 16 * u64::from(index);
            self.write_descriptor(place, buffer, 0, WRITE | NEXT, index + 1);
        }
        let len = len.min(MAX_HOLLOW) as u32;
        self.write_descriptor(table + 16 * u64::from(last), buffer, len, WRITE, 0);
        let place = self.desc + 16 * u64::from(head);
        self.write_descriptor(place, table, 16 * u32::from(self.size), INDIRECT, 0);
        self.offers.push_back(Offer {
            slots: vec![head],
            areas: vec![(buffer, len)],
            is_sound: true,
        });
        self.push_avail(head);
    }

    /// Offers a chain that breaks the rules.
    pub fn offer_malformed(&mut self, malformed: Malformed) {
        let Some(head) = self.free.last().copied() else {
            return;
        };
        let start = self.buffers + u64::from(head) * SLOT as u64;
        self.memory.clear(start, SLOT);
        let usual = if self.is_rx { WRITE } else { 0 };
        let (areas, flags) = match malformed {
            Malformed::Short => (vec![(start, 43)], [usual; 2]),
            Malformed::Empty => (vec![(start, 0)], [usual; 2]),
            Malformed::Direction => (vec![(start, 100)], [usual ^ WRITE; 2]),
            Malformed::Outside => (vec![(u64::MAX - 50, 100)], [usual; 2]),
            Malformed::Endless => (vec![(start, 100)], [usual | NEXT; 2]),
            Malformed::Mixed => (vec![(start, 44), (start + 44, 9)], [usual, usual ^ WRITE]),
        };
        self.offer_areas(areas, Table::None, flags, false);
    }

    /// Offers a chain of these areas; `flags` are those of the first and of the others.
    fn offer_areas(
        &mut self,
        areas: Vec<(u64, u32)>,
        table: Table,
        flags: [u16; 2],
        is_sound: bool,
    ) {
        let direct = match table {
            Table::None => areas.len(),
            Table::Whole => 0,
            Table::Tail => 1,
        };
        let in_table = areas.len() - direct;
        let wanted = direct + usize::from(in_table > 0);
        let slots: Vec<u16> = (0..wanted).filter_map(|_| self.free.pop()).collect();
        let head = slots[0];
        for (index, (addr, len)) in areas.iter().enumerate() {
            let flags = flags[usize::from(index > 0)];
            let more = if index + 1 < areas.len() { NEXT } else { 0 };
            let (place, next) = if index < direct {
                let next = slots.get(index + 1).copied().unwrap_or(head);
                (self.desc + 16 * u64::from(slots[index]), next)
            } else {
                let within = index - direct;
                (self.table(head) + 16 * within as u64, within as u16 + 1)
            };
            self.write_descriptor(place, *addr, *len, flags | more, next);
        }
        if in_table > 0 {
            let place = self.desc + 16 * u64::from(slots[direct]);
            self.write_descriptor(place, self.table(head), 16 * in_table as u32, INDIRECT, 0);
        }
        self.offers.push_back(Offer {
            slots,
            areas,
            is_sound,
        });
        self.push_avail(head);
    }

    fn table(&self, head: u16) -> u64 {
        self.tables + 16 * MAX_PARTS as u64 * u64::from(head)
    }

    fn write_descriptor(&self, place: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write(place, &bytes);
    }

    fn push_avail(&mut self, head: u16) {
        self.store(
            self.avail + 4 + 2 * u64::from(self.avail_idx % self.size),
            head,
        );
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.store(self.avail + 2, self.avail_idx);
    }

    /// Makes more available than there are descriptors: the ring is broken (virtio 1.2, 2.7.13.3).
    pub fn break_it(&mut self) {
        self.avail_idx = self.avail_idx.wrapping_add(self.size + 1);
        self.store(self.avail + 2, self.avail_idx);
    }

    /// Kicks if the device asked for it (virtio 1.2, 2.7.7 and 2.7.10).
    pub fn kick(&mut self) {
        let since = self.avail_idx.wrapping_sub(self.kicked_idx);
        let asked = if self.event_idx {
            let event = self.load(self.avail_event());
            self.avail_idx.wrapping_sub(event).wrapping_sub(1) < since
        } else {
            since > 0 && self.load(self.used) & NO_NOTIFY == 0
        };
        self.kicked_idx = self.avail_idx;
        if asked {
            self.kick.write(1).unwrap();
        }
    }

    /// Kicks without being asked, as a driver does that finds its ring full.
    pub fn kick_anyway(&self) {
        self.kick.write(1).unwrap();
    }

    /// Asks for an interrupt when the next chain is returned, or for none.
    pub fn ask_for_interrupt(&mut self, wanted: bool) {
        let event = if wanted {
            self.used_idx
        } else {
            self.used_idx.wrapping_sub(1)
        };
        self.store(self.avail + 4 + 2 * u64::from(self.size), event);
        self.store(self.avail, u16::from(!wanted && !self.event_idx));
        let _ = self.call.read();
    }

    /// Whether there was an interrupt since one was asked for.
    pub fn is_interrupted(&self) -> bool {
        self.call.read().is_ok()
    }

    /// Whether the device has reported the ring as broken.
    pub fn is_reported_broken(&self) -> bool {
        self.err.read().is_ok()
    }

    /// Whether chains were returned that the driver has not taken.
    pub fn has_returned(&self) -> bool {
        self.returned_idx() != self.used_idx
    }

    /// Whether the device has chains that it has not returned.
    pub fn has_unreturned(&self) -> bool {
        let returned = self.returned_idx().wrapping_sub(self.used_idx);
        usize::from(returned) < self.offers.len()
    }

    /// Takes the next chain that the device has returned. They must come in the order in which they were offered.
    pub fn take(&mut self) -> Option<Returned> {
        if !self.has_returned() {
            return None;
        }
        let place = self.used + 4 + 8 * u64::from(self.used_idx % self.size);
        let mut element = [0; 8];
        self.memory.read(place, &mut element);
        let id = u32::from_le_bytes(element[..4].try_into().unwrap());
        let len = u32::from_le_bytes(element[4..].try_into().unwrap()) as usize;
        let Some(offer) = self.offers.pop_front() else {
            panic!("{id} was returned, and nothing was offered");
        };
        assert_eq!(id, u32::from(offer.slots[0]), "returned out of order");
        self.used_idx = self.used_idx.wrapping_add(1);
        let bytes = if len > 0 {
            self.written(&offer, len)
        } else {
            Vec::new()
        };
        self.free.extend(offer.slots.iter().rev());
        Some(Returned {
            bytes,
            is_sound: offer.is_sound,
        })
    }

    /// The `len` bytes that the device has written into a buffer; it must not have written more.
    fn written(&self, offer: &Offer, len: usize) -> Vec<u8> {
        assert!(
            self.is_rx && offer.is_sound,
            "written to a chain that takes no packet"
        );
        let mut bytes = vec![0; len];
        let mut read = 0;
        for (addr, all) in &offer.areas {
            let part = (len - read).min(*all as usize);
            self.memory.read(*addr, &mut bytes[read..read + part]);
            read += part;
            let rest = *all as usize - part;
            assert!(
                self.memory.is_untouched(addr + part as u64, rest),
                "more than {len} bytes were written"
            );
        }
        assert_eq!(read, len, "the buffer is shorter than {len} bytes");
        bytes
    }

    fn avail_event(&self) -> u64 {
        self.used + 4 + 8 * u64::from(self.size)
    }

    fn store(&self, addr: u64, value: u16) {
        self.memory.write(addr, &value.to_le_bytes());
    }

    fn load(&self, addr: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read(addr, &mut bytes);
        u16::from_le_bytes(bytes)
    }
}

/// How a chain breaks the rules (virtio 1.2, 2.7.4, 2.7.5 and 5.10.6).
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Malformed {
    /// Too short for a header.
    Short,
    /// No byte at all.
    Empty,
    /// Of the other direction.
    Direction,
    /// Outside of guest memory.
    Outside,
    /// A loop.
    Endless,
    /// Of both directions.
    Mixed,
}

fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap()
}
