//! Descriptor chains (virtio 1.2, 2.7.5): the buffers that a driver has laid a packet over.

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, VolatileSlice};

/// Why a descriptor chain holds no packet, or can't take one.
#[derive(Debug, Error)]
pub enum PacketError {
    /// The chain has a descriptor of the other direction (virtio 1.2, 2.7.4.2).
    #[error("a descriptor of the wrong direction")]
    Direction,
    /// The chain loops, leaves the descriptor table, or is longer than the ring (virtio 1.2, 2.7.5.1).
    #[error("a chain without an end")]
    Endless,
    /// The chain is shorter than a header, or than its header says.
    #[error("a chain too short for its packet")]
    Short,
    /// A descriptor points outside of guest memory.
    #[error("a descriptor outside of guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Which of the two sides writes to a chain's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writer {
    Driver,
    Device,
}

/// Calls `take` with every slice of the chain's buffers, in order, and checks the chain: it ends, all its descriptors are
/// for the same `writer`, and they lie in guest memory.
pub(super) fn walk<'m>(
    memory: &'m GuestMemoryMmap,
    chain: impl Iterator<Item = Descriptor>,
    ring_size: u16,
    writer: Writer,
    mut take: impl FnMut(VolatileSlice<'m>) -> Result<(), PacketError>,
) -> Result<(), PacketError> {
    let mut last: Option<Descriptor> = None;
    for (count, descriptor) in chain.enumerate() {
        if count >= usize::from(ring_size) {
            return Err(PacketError::Endless);
        }
        if descriptor.is_write_only() != (writer == Writer::Device) {
            return Err(PacketError::Direction);
        }
        let (addr, len) = (descriptor.addr(), descriptor.len() as usize);
        match memory.get_slice(addr, len) {
            Ok(slice) => take(slice)?,
            // It crosses from one region to the next, or is not memory at all.
            Err(_) => memory
                .get_slices(addr, len)
                .try_for_each(|slice| take(slice?))?,
        }
        last = Some(descriptor);
    }
    // The iterator stops without an error where the chain is broken: its last descriptor then still names a next one.
    match last {
        Some(descriptor) if !descriptor.has_next() => Ok(()),
        Some(_) => Err(PacketError::Endless),
        None => Err(PacketError::Short),
    }
}
