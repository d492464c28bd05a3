//! The guest's memory, as the VMM shares it.
//!
//! The VMM names each region with three numbers and a descriptor: where it is in the guest (guest physical address), where it
//! is in the VMM's own address space (user address), where in the file behind the descriptor it begins, and how long it is.
//! Ring addresses come as user addresses, everything in the rings as guest physical addresses.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use serde::{Deserialize, Serialize};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionCollectionError, GuestRegionMmap, MmapRegion, mmap::MmapRegionError,
};

use super::message::RegionMessage;
use crate::saved::{LoadError, Loader, SavedFd, Saver};

/// Most regions that a VMM may add: as many as the kernel's vhost takes.
pub(super) const MAX_SLOTS: u64 = 509;

/// Why a region, or an address in one, can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("can't map a region: {0}")]
    Map(#[from] MmapRegionError),
    #[error("a region without a byte, or past the end of an address space")]
    Overflow,
    #[error("the regions don't fit together: {0}")]
    Regions(#[from] GuestRegionCollectionError),
    #[error("no such region")]
    NoRegion,
    #[error("more than {MAX_SLOTS} regions")]
    TooMany,
    #[error("user address {0:#x} is in no region")]
    Address(u64),
}

/// Where a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    guest_addr: u64,
    user_addr: u64,
    size: u64,
    file_offset: u64,
}

/// A region in a document: its addresses and size in bytes, and its file.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RegionState {
    guest_addr: u64,
    size: u64,
    user_addr: u64,
    file_offset: u64,
    file: SavedFd,
}

/// The regions that the VMM shares now. Their descriptors stay open in the mapping.
#[derive(Debug, Default)]
pub(super) struct MemoryTable {
    regions: Vec<Region>,
    map: GuestMemoryMmap,
}

impl MemoryTable {
    /// Replaces all regions (SET_MEM_TABLE).
    pub(super) fn replace(
        &mut self,
        regions: Vec<(RegionMessage, OwnedFd)>,
    ) -> Result<(), MemoryError> {
        let mut table = Vec::new();
        let mut mapped = Vec::new();
        for (region, file) in regions {
            let region = Region::new(region)?;
            mapped.push(region.map(file)?);
            table.push(region);
        }
        self.map = GuestMemoryMmap::from_regions(mapped)?;
        self.regions = table;
        Ok(())
    }

    /// Adds a region (ADD_MEM_REG).
    pub(super) fn add(&mut self, region: RegionMessage, file: OwnedFd) -> Result<(), MemoryError> {
        if self.regions.len() as u64 >= MAX_SLOTS {
            return Err(MemoryError::TooMany);
        }
        let region = Region::new(region)?;
        self.map = self.map.insert_region(region.map(file)?.into())?;
        self.regions.push(region);
        Ok(())
    }

    /// Removes a region (REM_MEM_REG). The VMM names it by its addresses and size.
    pub(super) fn remove(&mut self, region: RegionMessage) -> Result<(), MemoryError> {
        let named = Region::new(region)?;
        let is_named = |region: &Region| {
            (region.guest_addr, region.user_addr, region.size)
                == (named.guest_addr, named.user_addr, named.size)
        };
        let index = self.regions.iter().position(is_named);
        let index = index.ok_or(MemoryError::NoRegion)?;
        let (map, _) = self
            .map
            .remove_region(GuestAddress(named.guest_addr), named.size)?;
        self.map = map;
        self.regions.remove(index);
        Ok(())
    }

    /// The regions, for a successor to map them again.
    pub(super) fn save<'a>(&'a self, saver: &mut Saver<'a>) -> io::Result<Vec<RegionState>> {
        let save = |region: &Region| {
            let mapped = self.map.find_region(GuestAddress(region.guest_addr));
            let file = mapped.and_then(|mapped| mapped.file_offset());
            let file = file.ok_or_else(|| io::Error::other("a region without a file"))?;
            Ok(RegionState {
                guest_addr: region.guest_addr,
                size: region.size,
                user_addr: region.user_addr,
                file_offset: region.file_offset,
                file: saver.fd(file.file().as_fd()),
            })
        };
        self.regions.iter().map(save).collect()
    }

    /// Maps the regions that were saved. What lies past the end of a file is not mapped: access to it would end the daemon.
    pub(super) fn load(regions: Vec<RegionState>, loader: &mut Loader) -> Result<Self, LoadError> {
        let mut table = Self::default();
        for region in regions {
            let file = File::from(loader.take_fd(region.file)?);
            let metadata = file.metadata()?;
            let end = region.file_offset.saturating_add(region.size);
            if metadata.is_file() && metadata.len() < end {
                return Err(LoadError::Invalid("a region past the end of its file"));
            }
            let region = RegionMessage {
                guest_addr: region.guest_addr,
                size: region.size,
                user_addr: region.user_addr,
                file_offset: region.file_offset,
            };
            table.add(region, file.into()).map_err(io::Error::other)?;
        }
        Ok(table)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The memory as it is mapped now.
    pub(super) fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// The guest physical address of a user address.
    pub(super) fn translate(&self, user_addr: u64) -> Result<GuestAddress, MemoryError> {
        let within = |region: &Region| {
            let offset = user_addr.checked_sub(region.user_addr)?;
            let guest_addr = region.guest_addr.checked_add(offset)?;
            (offset < region.size).then_some(GuestAddress(guest_addr))
        };
        self.regions
            .iter()
            .find_map(within)
            .ok_or(MemoryError::Address(user_addr))
    }
}

impl Region {
    /// The region that a message describes. It lies within all address spaces.
    fn new(message: RegionMessage) -> Result<Self, MemoryError> {
        let RegionMessage {
            guest_addr,
            size,
            user_addr,
            file_offset,
        } = message;
        let fits = |start: u64| start.checked_add(size).is_some();
        if size == 0 || ![guest_addr, user_addr, file_offset].into_iter().all(fits) {
            return Err(MemoryError::Overflow);
        }
        Ok(Self {
            guest_addr,
            user_addr,
            size,
            file_offset,
        })
    }

    fn map(&self, file: OwnedFd) -> Result<GuestRegionMmap, MemoryError> {
        let offset = FileOffset::new(file.into(), self.file_offset);
        let mapping = MmapRegion::from_file(offset, self.size as usize)?;
        GuestRegionMmap::new(mapping, GuestAddress(self.guest_addr)).ok_or(MemoryError::Overflow)
    }
}
