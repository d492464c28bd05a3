//! The driver's side of a split ring, as in Linux's `virtio_ring.c`: EVENT_IDX if it is offered, an indirect table for
//! a chain of more than one descriptor if they are offered, and a kick only when the device wants one.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::common::memory::GuestMemory;
use crate::common::vhost_user::RingAddresses;

/// Feature bits of the ring (virtio 1.2, 6).
pub mod feature {
    /// Indirect descriptor tables.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications suppressed by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Virtio 1.
    pub const VERSION_1: u64 = 1 << 32;
}

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// The most descriptors of a chain: a header and a payload.
const MAX_PARTS: usize = 2;
/// The size of a descriptor in bytes.
const DESC_LEN: u64 = 16;

/// Kicks sent and interrupts received on both rings.
#[derive(Default)]
pub struct Notifications {
    /// Writes to the kick eventfds.
    kicks: AtomicU64,
    /// Signals on the call eventfds.
    interrupts: AtomicU64,
}

impl Notifications {
    /// Kicks and interrupts so far.
    pub fn counts(&self) -> (u64, u64) {
        (
            self.kicks.load(Ordering::Relaxed),
            self.interrupts.load(Ordering::Relaxed),
        )
    }
}

/// A buffer of a chain: its guest address and its length in bytes.
pub type Part = (u64, u32);

/// The driver's side of a ring. Each chain has a token, which comes back with it.
pub struct Ring {
    memory: Arc<GuestMemory>,
    notifications: Arc<Notifications>,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    tables: u64,
    indirect: bool,
    event_idx: bool,
    write: bool,
    free: Vec<u16>,
    /// By head: the token, and the chain's second descriptor unless it is in a table.
    chains: Vec<(u16, Option<u16>)>,
    avail_idx: u16,
    kicked_idx: u16,
    used_idx: u16,
    /// Notifies the device.
    pub kick_fd: EventFd,
    /// Notifies the guest.
    pub call_fd: EventFd,
}

impl Ring {
    /// Allocates a ring of `size` descriptors in guest memory; with `write`, its buffers are for the device to write.
    pub fn new(
        memory: Arc<GuestMemory>,
        notifications: Arc<Notifications>,
        size: u16,
        features: u64,
        write: bool,
    ) -> io::Result<Self> {
        let entries = u64::from(size);
        Ok(Self {
            // Sizes and alignments are those of virtio 1.2, 2.7.
            desc: memory.alloc(DESC_LEN * entries, 4096),
            avail: memory.alloc(6 + 2 * entries, 64),
            used: memory.alloc(6 + 8 * entries, 4096),
            tables: memory.alloc(DESC_LEN * MAX_PARTS as u64 * entries, 64),
            memory,
            notifications,
            size,
            indirect: features & feature::INDIRECT_DESC != 0,
            event_idx: features & feature::EVENT_IDX != 0,
            write,
            free: (0..size).rev().collect(),
            chains: vec![(0, None); size.into()],
            avail_idx: 0,
            kicked_idx: 0,
            used_idx: 0,
            kick_fd: eventfd()?,
            call_fd: eventfd()?,
        })
    }

    /// The number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The addresses of the ring's parts in this process, for SET_VRING_ADDR.
    pub fn addresses(&self) -> RingAddresses {
        RingAddresses {
            desc: self.memory.user_addr(self.desc),
            used: self.memory.user_addr(self.used),
            avail: self.memory.user_addr(self.avail),
        }
    }

    /// The call eventfd.
    pub fn call(&self) -> BorrowedFd<'_> {
        self.call_fd.as_fd()
    }

    /// Makes a chain of one or two buffers available, without a kick; false when the ring is full.
    pub fn add(&mut self, parts: &[Part], token: u16) -> bool {
        let table = self.indirect && parts.len() > 1;
        let wanted = if table { 1 } else { parts.len() };
        if self.free.len() < wanted {
            return false;
        }
        let Some(head) = self.free.pop() else {
            return false;
        };
        let mut second = None;
        if table {
            let at = self.tables + DESC_LEN * MAX_PARTS as u64 * u64::from(head);
            self.write_parts(at, parts, [0, 1]);
            let len = DESC_LEN as u32 * parts.len() as u32;
            self.write_desc(self.desc, head, (at, len), F_INDIRECT, 0);
        } else {
            second = if parts.len() > 1 {
                self.free.pop()
            } else {
                None
            };
            self.write_parts(self.desc, parts, [head, second.unwrap_or(0)]);
        }
        self.chains[usize::from(head)] = (token, second);
        let slot = self.avail + 4 + 2 * u64::from(self.avail_idx % self.size);
        self.memory.write(slot, &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.memory.store_u16(self.avail + 2, self.avail_idx);
        true
    }

    fn write_parts(&self, table: u64, parts: &[Part], slots: [u16; MAX_PARTS]) {
        let write = if self.write { F_WRITE } else { 0 };
        for (i, &part) in parts.iter().enumerate() {
            let (flags, next) = match slots.get(i + 1) {
                Some(&next) if i + 1 < parts.len() => (write | F_NEXT, next),
                _ => (write, 0),
            };
            self.write_desc(table, slots[i], part, flags, next);
        }
    }

    fn write_desc(&self, table: u64, slot: u16, (addr, len): Part, flags: u16, next: u16) {
        let mut bytes = [0; DESC_LEN as usize];
        bytes[0..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&next.to_le_bytes());
        self.memory
            .write(table + DESC_LEN * u64::from(slot), &bytes);
    }

    /// Kicks if the device wants it (virtio 1.2, 2.7.10).
    pub fn kick_if_needed(&mut self) {
        self.memory.barrier();
        let since = self.avail_idx.wrapping_sub(self.kicked_idx);
        let needed = if self.event_idx {
            let event = self.used + 4 + 8 * u64::from(self.size);
            let event = self.memory.load_u16(event);
            self.avail_idx.wrapping_sub(event).wrapping_sub(1) < since
        } else {
            since > 0 && self.memory.load_u16(self.used) & 1 == 0
        };
        self.kicked_idx = self.avail_idx;
        if needed {
            self.notifications.kicks.fetch_add(1, Ordering::Relaxed);
            // It fails only when the counter is full, which wakes the device as well.
            let _ = self.kick_fd.write(1);
        }
    }

    /// Pops a used chain: its token, and how many bytes the device wrote to it.
    pub fn pop_used(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        let slot = self.used + 4 + 8 * u64::from(self.used_idx % self.size);
        let mut entry = [0; 8];
        self.read(slot, &mut entry);
        let [a, b, _, _, len @ ..] = entry;
        let head = u16::from_le_bytes([a, b]);
        self.used_idx = self.used_idx.wrapping_add(1);
        let (token, second) = self.chains[usize::from(head)];
        self.free.extend(second);
        self.free.push(head);
        Some((token, u32::from_le_bytes(len)))
    }

    fn has_used(&self) -> bool {
        self.memory.load_u16(self.used + 2) != self.used_idx
    }

    /// Suppresses interrupts, like `virtqueue_disable_cb`.
    pub fn disable_interrupts(&self) {
        if self.event_idx {
            self.memory.store_u16(self.used_event(), 0);
        } else {
            self.memory.store_u16(self.avail, 1);
        }
    }

    /// Enables an interrupt for the next used chain; true when there is one already, like a failed `virtqueue_enable_cb`.
    pub fn enable_interrupts(&self) -> bool {
        if self.event_idx {
            self.memory.store_u16(self.used_event(), self.used_idx);
        } else {
            self.memory.store_u16(self.avail, 0);
        }
        self.memory.barrier();
        self.has_used()
    }

    fn used_event(&self) -> u64 {
        self.avail + 4 + 2 * u64::from(self.size)
    }

    /// Consumes pending interrupts.
    pub fn take_interrupts(&self) {
        if let Ok(count) = self.call_fd.read() {
            let total = &self.notifications.interrupts;
            total.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// Copies bytes out of guest memory.
    pub fn read(&self, addr: u64, into: &mut [u8]) {
        let first = self.memory.user_addr(addr);
        if let Some(last) = into.len().checked_sub(1) {
            // It panics when the range is not in guest memory.
            self.memory.user_addr(addr + last as u64);
        }
        // SAFETY: both ends are in the one mapping, which lives as long as `self.memory`.
        unsafe {
            std::ptr::copy_nonoverlapping(first as *const u8, into.as_mut_ptr(), into.len());
        }
    }
}

fn eventfd() -> io::Result<EventFd> {
    Ok(EventFd::from_flags(
        EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC,
    )?)
}
