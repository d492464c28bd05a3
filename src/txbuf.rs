//! The bytes of one connection that the guest has sent and the host program has not taken yet.
//!
//! They are in memory that is mapped for them and unmapped when they are gone. On the heap, one that stays would keep the memory
//! of all that were there before it. One mapping a thread is kept for the next bytes: where a host program is just a little too
//! slow, buffers come and go all the time, and new pages cost more than the copy into them.

use std::cell::Cell;
use std::io::{self, IoSlice};

use memmap2::MmapMut;

use crate::saved::{LoadError, Loader, SavedBytes, Saver};
use crate::syscalls::{NOT_EXECUTABLE, Syscall};

/// To map and unmap memory.
pub(crate) const SYSCALLS: &[Syscall] = &[
    Syscall::only(libc::SYS_mmap, NOT_EXECUTABLE),
    Syscall::any(libc::SYS_munmap),
];

/// The smallest ring, in bytes.
const MIN_RING: usize = 16 * 1024;

/// The largest ring that is kept for the next bytes, in bytes.
const MAX_SPARE: usize = 256 * 1024;

thread_local! {
    static SPARE: Cell<Option<MmapMut>> = const { Cell::new(None) };
}

/// A ring of bytes with a limit. It has memory only while there are bytes in it, and grows by doubling: a connection whose host
/// program keeps up needs none.
#[derive(Debug)]
pub struct LocalTxBuf {
    ring: Option<MmapMut>,
    limit: usize,
    start: usize,
    len: usize,
}

impl LocalTxBuf {
    /// An empty buffer for at most `limit` bytes.
    pub fn new(limit: u32) -> Self {
        Self {
            ring: None,
            limit: limit as usize,
            start: 0,
            len: 0,
        }
    }

    /// Saves the bytes that are in it.
    ///
    /// # Errors
    /// The system refuses.
    pub fn save(&self, saver: &mut Saver<'_>) -> io::Result<SavedBytes> {
        let (first, second) = self.parts();
        saver.bytes(&[first, second])
    }

    /// A buffer for at most `limit` bytes with those that were saved in it.
    ///
    /// # Errors
    /// There are more than `limit`, they are not there, or there is no memory for them.
    pub fn load(limit: u32, bytes: SavedBytes, loader: &Loader) -> Result<Self, LoadError> {
        let mut buffer = Self::new(limit);
        if bytes.len() > limit.into() {
            return Err(LoadError::Invalid("more bytes than a buffer holds"));
        }
        if bytes.is_empty() {
            return Ok(buffer);
        }
        let len = bytes.len() as usize;
        buffer.reserve(len)?;
        let ring = buffer.ring.as_deref_mut().unwrap_or_default();
        loader.read_to(bytes, &mut ring[..len])?;
        buffer.len = len;
        Ok(buffer)
    }

    /// How many bytes are in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no byte is in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends `count` bytes. `copy` is called with an offset into them and the place for those from there on. False, and
    /// nothing is appended, when they exceed the limit or the system has no memory for them.
    pub fn push(&mut self, count: usize, mut copy: impl FnMut(usize, &mut [u8])) -> bool {
        if count == 0 || count > self.limit - self.len {
            return count == 0;
        }
        if self.reserve(self.len + count).is_err() {
            return false;
        }
        let end = self.wrap(self.start + self.len);
        let ring = self.ring.as_deref_mut().unwrap_or_default();
        let first = count.min(ring.len() - end);
        if first > 0 {
            copy(0, &mut ring[end..end + first]);
        }
        if count > first {
            copy(first, &mut ring[..count - first]);
        }
        self.len += count;
        true
    }

    /// Lets `write` take bytes from the front, at most `limit` of them, and returns how many it took.
    pub fn flush<E>(
        &mut self,
        limit: usize,
        write: impl FnOnce(&[IoSlice<'_>]) -> Result<usize, E>,
    ) -> Result<usize, E> {
        let (first, second) = self.parts();
        let first = &first[..first.len().min(limit)];
        let second = &second[..second.len().min(limit - first.len())];
        let written = write(&[IoSlice::new(first), IoSlice::new(second)])?;
        self.start = self.wrap(self.start + written);
        self.len -= written;
        if self.is_empty() {
            self.spare();
        }
        Ok(written)
    }

    /// Drops the bytes behind the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        if self.is_empty() {
            self.clear();
        }
    }

    /// Drops the bytes, and the memory.
    pub fn clear(&mut self) {
        self.ring = None;
        self.start = 0;
        self.len = 0;
    }

    /// Keeps the memory for the next bytes, whichever connection's, unless there is more already.
    fn spare(&mut self) {
        if let Some(ring) = self.ring.take_if(|ring| ring.len() <= MAX_SPARE) {
            let spare = SPARE.take();
            let is_larger = |spare: &MmapMut| spare.len() > ring.len();
            SPARE.set(Some(spare.filter(is_larger).unwrap_or(ring)));
        }
        self.clear();
    }

    fn ring(&self) -> &[u8] {
        self.ring.as_deref().unwrap_or_default()
    }

    fn parts(&self) -> (&[u8], &[u8]) {
        let ring = self.ring();
        let first = self.len.min(ring.len() - self.start);
        (
            &ring[self.start..self.start + first],
            &ring[..self.len - first],
        )
    }

    fn wrap(&self, index: usize) -> usize {
        let size = self.ring().len();
        if index >= size { index - size } else { index }
    }

    fn reserve(&mut self, len: usize) -> io::Result<()> {
        if len <= self.ring().len() {
            return Ok(());
        }
        let size = len
            .next_power_of_two()
            .clamp(MIN_RING, self.limit.max(MIN_RING));
        let mut ring = allocate(size)?;
        let (first, second) = self.parts();
        ring[..first.len()].copy_from_slice(first);
        ring[first.len()..self.len].copy_from_slice(second);
        self.ring = Some(ring);
        self.start = 0;
        Ok(())
    }
}

/// A ring of at least `size` bytes, which may hold what was in it before.
fn allocate(size: usize) -> io::Result<MmapMut> {
    match SPARE.take() {
        Some(spare) if spare.len() >= size => Ok(spare),
        smaller => {
            SPARE.set(smaller);
            MmapMut::map_anon(size)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;
    use std::io::{self, Write};

    fn flush_to(buffer: &mut LocalTxBuf, mut out: impl Write) -> io::Result<usize> {
        buffer.flush(usize::MAX, |slices| out.write_vectored(slices))
    }

    fn push(buffer: &mut LocalTxBuf, bytes: &[u8]) -> bool {
        buffer.push(bytes.len(), |offset, place| {
            place.copy_from_slice(&bytes[offset..offset + place.len()]);
        })
    }

    /// A writer that takes so many bytes and then says `WouldBlock`.
    struct Slow {
        taken: Vec<u8>,
        room: usize,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = bytes.len().min(self.room);
            if count == 0 && !bytes.is_empty() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.taken.extend_from_slice(&bytes[..count]);
            self.room -= count;
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn it_has_memory_only_while_it_holds_bytes() {
        let mut buffer = LocalTxBuf::new(1 << 20);
        assert!(buffer.ring.is_none());
        assert!(push(&mut buffer, b"x"));
        assert_eq!(buffer.ring().len(), MIN_RING);
        assert_eq!(flush_to(&mut buffer, Vec::new()).unwrap(), 1);
        assert!(buffer.ring.is_none());
    }

    #[test]
    fn it_refuses_what_there_is_no_memory_for() {
        let mut buffer = LocalTxBuf::new(100);
        assert!(push(&mut buffer, b"here"));
        // As on a machine that has given out all its memory.
        buffer.limit = usize::MAX;
        assert!(!buffer.push(1 << 62, |_, _| unreachable!()));
        let mut out = Vec::new();
        flush_to(&mut buffer, &mut out).unwrap();
        assert_eq!(out, b"here");
    }

    #[test]
    fn a_ring_that_is_used_again_shows_nothing_of_what_was_in_it() {
        let mut buffer = LocalTxBuf::new(300_000);
        for (byte, len) in [
            (1, 20_000),
            (2, 300_000),
            (3, 10),
            (4, 200_000),
            (5, 40_000),
        ] {
            assert!(push(&mut buffer, &vec![byte; len]));
            let mut out = Vec::new();
            flush_to(&mut buffer, &mut out).unwrap();
            assert_eq!(out, vec![byte; len]);
            assert!(buffer.is_empty() && buffer.ring.is_none());
        }
    }

    #[test]
    fn a_flush_takes_no_more_than_its_limit() {
        let mut buffer = LocalTxBuf::new(100);
        assert!(push(&mut buffer, b"0123456789"));
        let mut out = Vec::new();
        let taken = buffer.flush(4, |slices| out.write_vectored(slices));
        assert_eq!(taken.unwrap(), 4);
        assert_eq!((&out[..], buffer.len()), (&b"0123"[..], 6));
    }

    #[test]
    fn its_end_can_be_dropped() {
        let mut buffer = LocalTxBuf::new(MIN_RING as u32);
        // So that the bytes go over the end of the ring.
        assert!(push(&mut buffer, &[0; MIN_RING - 4]));
        buffer
            .flush(MIN_RING - 5, |_| Ok::<_, ()>(MIN_RING - 5))
            .unwrap();
        assert!(push(&mut buffer, b"0123456789"));
        for (len, left) in [(20, 11), (9, 9), (3, 3)] {
            buffer.truncate(len);
            assert_eq!(buffer.len(), left);
        }
        assert!(push(&mut buffer, b"ab"));
        let mut out = Vec::new();
        flush_to(&mut buffer, &mut out).unwrap();
        assert_eq!(out, b"\x0001ab");
        assert!(push(&mut buffer, b"x"));
        buffer.truncate(0);
        assert!(buffer.is_empty() && buffer.ring.is_none());
    }

    #[test]
    fn it_refuses_what_exceeds_its_limit() {
        let mut buffer = LocalTxBuf::new(10);
        assert!(push(&mut buffer, &[1; 10]));
        assert!(!push(&mut buffer, &[2]));
        assert_eq!(buffer.len(), 10);
    }

    proptest! {
        #[test]
        fn it_is_a_queue(
            limit in 1u32..100_000,
            steps in prop::collection::vec((0usize..40_000, 0usize..40_000), 1..60),
        ) {
            let mut buffer = LocalTxBuf::new(limit);
            let mut model = VecDeque::new();
            let mut next = 0u8;
            for (put, room) in steps {
                let bytes: Vec<u8> = (0..put).map(|_| { next = next.wrapping_add(7); next }).collect();
                let fits = model.len() + put <= limit as usize;
                prop_assert_eq!(push(&mut buffer, &bytes), fits);
                if fits {
                    model.extend(bytes);
                }
                let mut out = Slow { taken: Vec::new(), room };
                while !buffer.is_empty() && flush_to(&mut buffer, &mut out).is_ok() {}
                let expected: Vec<u8> = model.drain(..room.min(model.len())).collect();
                prop_assert_eq!(out.taken, expected);
                prop_assert_eq!(buffer.len(), model.len());
            }
        }
    }
}
