//! Guest memory: regions that are adjacent in guest-physical space, each backed by its own file.

#![allow(unsafe_code)]

use std::fs;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::os::raw::c_void;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::unistd::ftruncate;

/// The guest-physical address of the first byte.
pub const GUEST_BASE: u64 = 0x4000_0000;

/// A huge page on x86-64.
pub const HUGE_PAGE: u64 = 2 << 20;

/// What a region is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// memfd with normal pages.
    Pages,
    /// memfd with huge pages; normal ones, with a message, if there are none.
    HugePages,
}

/// One region as SET_MEM_TABLE describes it.
pub struct Region {
    /// Where the guest sees it.
    pub guest_addr: u64,
    /// Its length.
    pub size: u64,
    /// Where the frontend sees it.
    pub user_addr: u64,
    /// The file behind it, from offset 0.
    pub fd: OwnedFd,
}

impl Region {
    /// The region as encoded in vhost-user messages.
    pub fn describe(&self) -> Vec<u8> {
        [self.guest_addr, self.size, self.user_addr, 0]
            .map(u64::to_le_bytes)
            .concat()
    }
}

/// The memory of one simulated guest.
pub struct GuestMemory {
    map: NonNull<c_void>,
    map_len: usize,
    base: *mut u8,
    len: u64,
    regions: Vec<Region>,
    next: AtomicU64,
    _huge: Option<HugeReservation>,
}

// SAFETY: the mapping lives as long as the value; concurrent access is by volatile or atomic operations only.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Makes regions of the given sizes, adjacent in guest-physical space.
    pub fn new(sizes: &[u64], backing: Backing) -> Self {
        let len: u64 = sizes.iter().sum();
        let huge = (backing == Backing::HugePages)
            .then(|| HugeReservation::new(len / HUGE_PAGE))
            .flatten();
        if let Some(memory) =
            huge.and_then(|huge| Self::map(sizes, MFdFlags::MFD_HUGETLB, Some(huge)))
        {
            return memory;
        }
        if backing == Backing::HugePages {
            println!("no huge pages can be reserved here: normal pages instead");
        }
        Self::map(sizes, MFdFlags::empty(), None).expect("no memory for the guest")
    }

    fn map(sizes: &[u64], flags: MFdFlags, huge: Option<HugeReservation>) -> Option<Self> {
        let len: u64 = sizes.iter().sum();
        let map_len = (len + HUGE_PAGE) as usize;
        let size = NonZeroUsize::new(map_len)?;
        // SAFETY: a fresh reservation of address space; nothing else refers to it.
        let map = unsafe {
            mmap_anonymous(None, size, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE).ok()?
        };
        let base = (map.as_ptr() as u64).next_multiple_of(HUGE_PAGE);
        let mut memory = Self {
            map,
            map_len,
            base: base as *mut u8,
            len,
            regions: Vec::new(),
            next: AtomicU64::new(GUEST_BASE),
            _huge: huge,
        };
        let mut offset = 0;
        for &size in sizes {
            memory.add_region(offset, size, flags)?;
            offset += size;
        }
        Some(memory)
    }

    fn add_region(&mut self, offset: u64, size: u64, flags: MFdFlags) -> Option<()> {
        let fd = memfd_create(c"guest-memory", flags | MFdFlags::MFD_CLOEXEC).ok()?;
        ftruncate(fd.as_fd(), size as i64).ok()?;
        let user_addr = self.base as u64 + offset;
        // SAFETY: MAP_FIXED inside the address space reserved by `map`, which only this value uses.
        unsafe {
            mmap(
                NonZeroUsize::new(user_addr as usize),
                NonZeroUsize::new(size as usize)?,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED | MapFlags::MAP_FIXED,
                fd.as_fd(),
                0,
            )
            .ok()?;
        }
        self.regions.push(Region {
            guest_addr: GUEST_BASE + offset,
            size,
            user_addr,
            fd,
        });
        Some(())
    }

    /// The regions, in address order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The first guest-physical address behind the memory.
    pub fn end(&self) -> u64 {
        GUEST_BASE + self.len
    }

    /// The frontend's address of a guest-physical one.
    pub fn user_addr(&self, addr: u64) -> u64 {
        self.pointer(addr, 1) as u64
    }

    /// Allocates `len` bytes, never freed.
    pub fn alloc(&self, len: u64, align: u64) -> u64 {
        let mut start = 0;
        self.next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                start = next.next_multiple_of(align);
                Some(start + len)
            })
            .ok();
        assert!(start + len <= self.end(), "the guest's memory is too small");
        start
    }

    /// Skips to region `index`: later allocations start there or beyond.
    pub fn skip_to_region(&self, index: usize) {
        let start = self.regions[index].guest_addr;
        self.next.fetch_max(start, Ordering::Relaxed);
    }

    /// Writes `bytes` at `addr`.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        let to = self.pointer(addr, bytes.len() as u64);
        // SAFETY: `pointer` checked the range; source and target can't overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Reads `len` bytes at `addr`.
    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let from = self.pointer(addr, len as u64);
        let mut bytes = vec![0; len];
        // SAFETY: `pointer` checked the range; source and target can't overlap.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len) };
        bytes
    }

    /// Fills `len` bytes at `addr`.
    pub fn fill(&self, addr: u64, len: u64, byte: u8) {
        // SAFETY: `pointer` checked the range.
        unsafe { self.pointer(addr, len).write_bytes(byte, len as usize) };
    }

    /// Reads a 16-bit ring field with acquire ordering.
    pub fn load_u16(&self, addr: u64) -> u16 {
        u16::from_le(self.atomic(addr).load(Ordering::Acquire))
    }

    /// Writes a 16-bit ring field with release ordering.
    pub fn store_u16(&self, addr: u64, value: u16) {
        self.atomic(addr).store(value.to_le(), Ordering::Release);
    }

    /// Orders earlier writes before later reads.
    pub fn barrier(&self) {
        fence(Ordering::SeqCst);
    }

    fn atomic(&self, addr: u64) -> &AtomicU16 {
        assert!(addr.is_multiple_of(2));
        // SAFETY: in range and aligned; the mapping lives as long as `self`, and is accessed atomically here.
        unsafe { AtomicU16::from_ptr(self.pointer(addr, 2).cast()) }
    }

    fn pointer(&self, addr: u64, len: u64) -> *mut u8 {
        assert!(
            addr >= GUEST_BASE && addr + len <= self.end(),
            "outside guest memory"
        );
        // SAFETY: in range by the assertion.
        unsafe { self.base.add((addr - GUEST_BASE) as usize) }
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: the whole reservation, which nothing refers to any more.
        let _ = unsafe { munmap(self.map, self.map_len) };
    }
}

/// Huge pages added to the machine's pool, removed on drop.
struct HugeReservation(u64);

impl HugeReservation {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";

    fn new(pages: u64) -> Option<Self> {
        let before = Self::pool()?;
        fs::write(Self::POOL, (before + pages).to_string()).ok()?;
        let reservation = Self(pages);
        (Self::pool()? >= before + pages).then_some(reservation)
    }

    fn pool() -> Option<u64> {
        fs::read_to_string(Self::POOL).ok()?.trim().parse().ok()
    }
}

impl Drop for HugeReservation {
    fn drop(&mut self) {
        if let Some(now) = Self::pool() {
            let _ = fs::write(Self::POOL, now.saturating_sub(self.0).to_string());
        }
    }
}
