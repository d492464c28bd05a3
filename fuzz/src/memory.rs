//! Guest memory that shows what was done to it.
//!
//! All regions are parts of one file. What a region leaves of its last page is a red zone, so that the file says what was
//! written, where, and whether it was outside.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

const PAGE: u64 = 4096;

/// What stands in the red zones, and in what was cleared.
const UNTOUCHED: u8 = 0xc3;

#[derive(Clone, Debug)]
struct Region {
    addr: u64,
    len: u64,
    /// Where it begins in the file.
    offset: u64,
}

/// What stands in guest memory, byte by byte.
#[derive(Clone, Debug)]
pub struct Image {
    regions: Vec<Region>,
    bytes: Vec<u8>,
}

impl Image {
    /// Where in the file `len` bytes from `addr` on are, region by region, until one of them is outside of the memory.
    fn parts(&self, addr: u64, len: usize) -> impl Iterator<Item = Range<usize>> {
        let (mut at, end) = (u128::from(addr), u128::from(addr) + len as u128);
        std::iter::from_fn(move || {
            let (region, within) = self.regions.iter().find_map(|region| {
                let within = at.checked_sub(u128::from(region.addr))?;
                (within < u128::from(region.len)).then_some((region, within))
            })?;
            let part = (end - at).min(u128::from(region.len) - within);
            let start = (u128::from(region.offset) + within) as usize;
            at += part;
            (part > 0).then(|| start..start + part as usize)
        })
    }

    /// The bytes from `addr` on; none where one of them is outside of the memory.
    pub fn read(&self, addr: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        for part in self.parts(addr, len) {
            bytes.extend_from_slice(&self.bytes[part]);
        }
        (bytes.len() == len).then_some(bytes)
    }

    /// Writes `bytes` from `addr` on, as far as there is memory.
    pub fn write(&mut self, addr: u64, bytes: &[u8]) {
        let mut rest = bytes;
        let parts: Vec<_> = self.parts(addr, bytes.len()).collect();
        for part in parts {
            let (now, after) = rest.split_at(part.len());
            self.bytes[part].copy_from_slice(now);
            rest = after;
        }
    }

    /// How many of these bytes lie in each region.
    pub fn pieces(&self, addr: u64, len: usize) -> Vec<usize> {
        self.parts(addr, len).map(|part| part.len()).collect()
    }
}

/// Guest memory.
pub struct Memory {
    map: GuestMemoryMmap,
    file: Arc<File>,
    /// What must stand in it, as far as the driver alone has written it.
    shadow: Mutex<Image>,
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
        let mut bytes = vec![0; end as usize];
        for region in &regions {
            let (start, end) = (
                region.offset + region.len,
                (region.offset + region.len).next_multiple_of(PAGE),
            );
            let zone = &mut bytes[start as usize..end as usize];
            zone.fill(UNTOUCHED);
            file.write_all_at(zone, start).unwrap();
        }
        let mapped = regions.iter().map(|region| {
            let offset = FileOffset::from_arc(file.clone(), region.offset);
            (GuestAddress(region.addr), region.len as usize, Some(offset))
        });
        Self {
            map: GuestMemoryMmap::from_ranges_with_files(mapped).unwrap(),
            file: file.clone(),
            shadow: Mutex::new(Image { regions, bytes }),
        }
    }

    /// The memory as the daemon has it.
    pub fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    fn shadow(&self) -> MutexGuard<'_, Image> {
        self.shadow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What stands in it now.
    pub fn image(&self) -> Image {
        let mut image = self.shadow().clone();
        self.file.read_exact_at(&mut image.bytes, 0).unwrap();
        image
    }

    /// Writes as the driver does, as far as there is memory.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        let mut shadow = self.shadow();
        let mut rest = bytes;
        for part in shadow.parts(addr, bytes.len()) {
            let (now, after) = rest.split_at(part.len());
            self.file.write_all_at(now, part.start as u64).unwrap();
            rest = after;
        }
        shadow.write(addr, bytes);
    }

    /// Reads as the driver does. All must be memory.
    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        for part in self.shadow().parts(addr, len) {
            let start = bytes.len();
            bytes.resize(start + part.len(), 0);
            self.file
                .read_exact_at(&mut bytes[start..], part.start as u64)
                .unwrap();
        }
        assert_eq!(bytes.len(), len, "no memory");
        bytes
    }

    /// Fills memory with what nobody else writes.
    pub fn clear(&self, addr: u64, len: usize) {
        self.write(addr, &vec![UNTOUCHED; len]);
    }

    /// Whether this part is still as it was cleared.
    pub fn is_untouched(&self, addr: u64, len: usize) -> bool {
        self.read(addr, len) == vec![UNTOUCHED; len]
    }

    /// Checks that the device has written nothing but in these ranges of guest memory.
    pub fn check(&self, writable: &[Range<u64>]) {
        let mut expected = self.shadow().clone();
        for range in writable {
            let bytes = self.read(range.start, (range.end - range.start) as usize);
            expected.write(range.start, &bytes);
        }
        self.check_all(&expected);
    }

    /// Checks that this stands in the memory and around it.
    pub fn check_all(&self, expected: &Image) {
        let found = self.image();
        if found.bytes != expected.bytes {
            let mut bytes = found.bytes.iter().zip(&expected.bytes);
            let place = bytes.position(|(found, expected)| found != expected);
            panic!("a byte was written where none is to be, at this offset of the file: {place:?}");
        }
    }
}
