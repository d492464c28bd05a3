//! Guest memory that shows every write of the device's.
//!
//! All regions are parts of one file, which is mapped twice: region by region for the device, and as a whole for the driver
//! and the checks. What a region leaves of its last page is a red zone. The device's mapping reaches it, so a write past the
//! end of a region stays in the file and is found.

use std::cell::RefCell;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, MmapRegion, VolatileMemory};

const PAGE: u64 = 4096;

/// The content of red zones and of cleared memory.
const UNTOUCHED: u8 = 0xc3;

#[derive(Clone, Debug)]
struct Region {
    addr: u64,
    len: u64,
    /// Where it begins in the file.
    offset: u64,
}

impl Region {
    /// The rest of its last page, as a part of the file.
    fn red_zone(&self) -> Range<usize> {
        let end = self.offset + self.len;
        end as usize..end.next_multiple_of(PAGE) as usize
    }
}

/// Where in the file `len` bytes from `addr` on are, region by region, up to the first that is no memory.
fn parts(regions: &[Region], addr: u64, len: usize) -> impl Iterator<Item = Range<usize>> {
    let (mut addr, mut left) = (addr, len as u64);
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let (region, within) = regions.iter().find_map(|region| {
            let within = addr.checked_sub(region.addr)?;
            (within < region.len).then_some((region, within))
        })?;
        let part = left.min(region.len - within);
        let start = (region.offset + within) as usize;
        left -= part;
        addr += part;
        Some(start..start + part as usize)
    })
}

/// A content of guest memory.
#[derive(Clone, Debug)]
pub struct Image {
    regions: Vec<Region>,
    bytes: Vec<u8>,
}

impl Image {
    /// The content of memory that nobody has written to.
    fn new(regions: Vec<Region>) -> Self {
        let end = regions.last().map_or(0, |region| region.red_zone().end);
        let mut image = Self {
            regions,
            bytes: vec![0; end],
        };
        image.reset();
        image
    }

    fn reset(&mut self) {
        self.bytes.fill(0);
        for region in &self.regions {
            self.bytes[region.red_zone()].fill(UNTOUCHED);
        }
    }

    /// The bytes from `addr` on; none where one of them is no memory.
    pub fn read(&self, addr: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        for part in parts(&self.regions, addr, len) {
            bytes.extend_from_slice(&self.bytes[part]);
        }
        (bytes.len() == len).then_some(bytes)
    }

    /// Writes `bytes` from `addr` on, up to the first place that is no memory.
    pub fn write(&mut self, addr: u64, bytes: &[u8]) {
        let mut rest = bytes;
        for part in parts(&self.regions, addr, bytes.len()) {
            let (now, after) = rest.split_at(part.len());
            self.bytes[part].copy_from_slice(now);
            rest = after;
        }
    }

    /// How many of these bytes lie in each region.
    pub fn pieces(&self, addr: u64, len: usize) -> Vec<usize> {
        parts(&self.regions, addr, len)
            .map(|part| part.len())
            .collect()
    }
}

/// Guest memory.
pub struct Memory {
    map: GuestMemoryMmap,
    /// The whole file.
    file: MmapRegion,
    /// The content as the driver alone has written it.
    shadow: RefCell<Image>,
    /// Room for the content of the file.
    scratch: RefCell<Vec<u8>>,
}

impl Memory {
    /// Memory of these regions: their addresses, ascending, and their lengths in bytes.
    pub fn new(ranges: &[(u64, u64)]) -> Self {
        let mut end = 0;
        let mut regions = Vec::new();
        for (addr, len) in ranges.iter().copied() {
            let offset = end;
            regions.push(Region { addr, len, offset });
            end += len.next_multiple_of(PAGE);
        }
        let file = memfd_create(c"guest-memory", MFdFlags::MFD_CLOEXEC).unwrap();
        let file = Arc::new(File::from(file));
        file.set_len(end).unwrap();
        let by_region = regions.iter().map(|region| {
            let offset = FileOffset::from_arc(file.clone(), region.offset);
            (GuestAddress(region.addr), region.len as usize, Some(offset))
        });
        let whole = FileOffset::from_arc(file.clone(), 0);
        let memory = Self {
            map: GuestMemoryMmap::from_ranges_with_files(by_region).unwrap(),
            file: MmapRegion::from_file(whole, end as usize).unwrap(),
            scratch: RefCell::new(vec![0; end as usize]),
            shadow: RefCell::new(Image::new(regions)),
        };
        memory.store(&memory.shadow.borrow());
        memory
    }

    /// Makes it as new.
    pub fn reset(&self) {
        let mut shadow = self.shadow.borrow_mut();
        shadow.reset();
        self.store(&shadow);
    }

    fn store(&self, image: &Image) {
        self.file.as_volatile_slice().copy_from(&image.bytes);
    }

    /// The memory as the daemon has it.
    pub fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// Its content.
    pub fn image(&self) -> Image {
        let mut image = self.shadow.borrow().clone();
        self.load(0, &mut image.bytes);
        image
    }

    /// Reads from `offset` of the file on.
    fn load(&self, offset: usize, bytes: &mut [u8]) {
        let part = self.file.get_slice(offset, bytes.len()).unwrap();
        part.copy_to(bytes);
    }

    /// Writes as the driver does, up to the first place that is no memory.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        let Image {
            regions,
            bytes: all,
        } = &mut *self.shadow.borrow_mut();
        let mut rest = bytes;
        for part in parts(regions, addr, bytes.len()) {
            let (now, after) = rest.split_at(part.len());
            self.file
                .get_slice(part.start, now.len())
                .unwrap()
                .copy_from(now);
            all[part].copy_from_slice(now);
            rest = after;
        }
    }

    /// Reads as the driver does. All must be memory.
    pub fn read(&self, addr: u64, bytes: &mut [u8]) {
        let mut read = 0;
        for part in parts(&self.shadow.borrow().regions, addr, bytes.len()) {
            self.load(part.start, &mut bytes[read..read + part.len()]);
            read += part.len();
        }
        assert_eq!(read, bytes.len(), "no memory");
    }

    /// Clears memory that only the device writes to after this.
    pub fn clear(&self, addr: u64, len: usize) {
        self.write(addr, &[UNTOUCHED; PAGE as usize][..len]);
    }

    /// Whether this part has only been written to by the driver.
    pub fn is_untouched(&self, addr: u64, len: usize) -> bool {
        let shadow = self.shadow.borrow();
        let mut found = self.scratch.borrow_mut();
        parts(&shadow.regions, addr, len).all(|part| {
            let found = &mut found[..part.len()];
            self.load(part.start, found);
            *found == shadow.bytes[part]
        })
    }

    /// Checks that the device has written nothing but in these ranges of guest memory.
    pub fn check(&self, writable: &[Range<u64>]) {
        let mut shadow = self.shadow.borrow_mut();
        let Image { regions, bytes } = &mut *shadow;
        for range in writable {
            for part in parts(regions, range.start, (range.end - range.start) as usize) {
                self.load(part.start, &mut bytes[part]);
            }
        }
        self.check_all(&shadow);
    }

    /// Checks that this is the content of the memory, and that the red zones are untouched.
    pub fn check_all(&self, expected: &Image) {
        let mut found = self.scratch.borrow_mut();
        self.load(0, &mut found);
        if *found != expected.bytes {
            let mut bytes = found.iter().zip(&expected.bytes);
            let place = bytes.position(|(found, expected)| found != expected);
            panic!("the device has written to this offset of the file, and must not: {place:?}");
        }
    }
}
