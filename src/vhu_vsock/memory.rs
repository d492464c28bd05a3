//! The guest's memory, as the VMM shares it.
//!
//! The VMM names each region with three numbers and a descriptor: where it is in the guest (guest physical address), where it
//! is in the VMM's own address space (user address), where in the file behind the descriptor it begins, and how long it is.
//! Ring addresses come as user addresses, everything in the rings as guest physical addresses.

use std::fs::File;
use std::io;

use vhost::vhost_user::Error;
use vhost::vhost_user::message::{VhostUserMemoryRegion, VhostUserSingleMemoryRegion};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap,
    MmapRegion, mmap::MmapRegionError,
};

/// Most regions that a VMM may add: as many as the kernel's vhost takes.
pub(super) const MAX_SLOTS: u64 = 509;

/// Why a region, or an address in one, can't be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    #[error("can't map a region: {0}")]
    Map(#[from] MmapRegionError),
    #[error("a region at the end of the address space")]
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

impl MemoryError {
    /// A refusal, after which the session goes on.
    pub(super) fn into_refusal(self) -> Error {
        Error::ReqHandlerError(io::Error::other(self))
    }
}

/// Where a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    guest_addr: u64,
    user_addr: u64,
    size: u64,
    file_offset: u64,
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
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> Result<(), MemoryError> {
        let regions: Vec<Region> = regions.iter().map(Region::from).collect();
        let mapped = regions
            .iter()
            .zip(files)
            .map(|(region, file)| region.map(file));
        let mapped = mapped.collect::<Result<Vec<_>, MemoryError>>()?;
        self.map = GuestMemoryMmap::from_regions(mapped)?;
        self.regions = regions;
        Ok(())
    }

    /// Adds a region (ADD_MEM_REG).
    pub(super) fn add(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
    ) -> Result<(), MemoryError> {
        if self.regions.len() as u64 >= MAX_SLOTS {
            return Err(MemoryError::TooMany);
        }
        let region = Region::from(&**region);
        self.map = self.map.insert_region(region.map(file)?.into())?;
        self.regions.push(region);
        Ok(())
    }

    /// Removes a region (REM_MEM_REG). The VMM names it by its addresses and size.
    pub(super) fn remove(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
    ) -> Result<(), MemoryError> {
        let named = Region::from(&**region);
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
    fn map(&self, file: File) -> Result<GuestRegionMmap, MemoryError> {
        let offset = FileOffset::new(file, self.file_offset);
        let mapping = MmapRegion::from_file(offset, self.size as usize)?;
        GuestRegionMmap::new(mapping, GuestAddress(self.guest_addr)).ok_or(MemoryError::Overflow)
    }
}

impl From<&VhostUserMemoryRegion> for Region {
    fn from(region: &VhostUserMemoryRegion) -> Self {
        Self {
            guest_addr: region.guest_phys_addr,
            user_addr: region.user_addr,
            size: region.memory_size,
            file_offset: region.mmap_offset,
        }
    }
}
