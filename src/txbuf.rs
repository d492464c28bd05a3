//! The bytes of one connection that the guest has sent and the host program has not taken yet.

use std::collections::TryReserveError;
use std::io::IoSlice;

/// The smallest allocation, in bytes.
const FIRST_ALLOCATION: usize = 16 * 1024;

/// A ring of bytes with a limit. It allocates only when something is put into it, grows by doubling, and frees its memory
/// when the last byte has left: a connection whose host program keeps up needs none.
#[derive(Debug)]
pub struct LocalTxBuf {
    ring: Box<[u8]>,
    limit: usize,
    start: usize,
    len: usize,
}

impl LocalTxBuf {
    /// An empty buffer for at most `limit` bytes.
    pub fn new(limit: u32) -> Self {
        Self {
            ring: Box::default(),
            limit: limit as usize,
            start: 0,
            len: 0,
        }
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
        let first = count.min(self.ring.len() - end);
        if first > 0 {
            copy(0, &mut self.ring[end..end + first]);
        }
        if count > first {
            copy(first, &mut self.ring[..count - first]);
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
            self.clear();
        }
        Ok(written)
    }

    /// Drops the bytes, and frees the memory.
    pub fn clear(&mut self) {
        self.ring = Box::default();
        self.start = 0;
        self.len = 0;
    }

    fn parts(&self) -> (&[u8], &[u8]) {
        let first = self.len.min(self.ring.len() - self.start);
        (
            &self.ring[self.start..self.start + first],
            &self.ring[..self.len - first],
        )
    }

    fn wrap(&self, index: usize) -> usize {
        if index >= self.ring.len() {
            index - self.ring.len()
        } else {
            index
        }
    }

    fn reserve(&mut self, len: usize) -> Result<(), TryReserveError> {
        if len <= self.ring.len() {
            return Ok(());
        }
        let size = len
            .next_power_of_two()
            .clamp(FIRST_ALLOCATION, self.limit.max(FIRST_ALLOCATION));
        let mut ring = Vec::new();
        ring.try_reserve_exact(size)?;
        ring.resize(size, 0);
        let mut ring = ring.into_boxed_slice();
        let (first, second) = self.parts();
        ring[..first.len()].copy_from_slice(first);
        ring[first.len()..self.len].copy_from_slice(second);
        self.ring = ring;
        self.start = 0;
        Ok(())
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
    fn it_allocates_only_while_it_holds_bytes() {
        let mut buffer = LocalTxBuf::new(1 << 20);
        assert_eq!(buffer.ring.len(), 0);
        assert!(push(&mut buffer, b"x"));
        assert_eq!(buffer.ring.len(), FIRST_ALLOCATION);
        assert_eq!(flush_to(&mut buffer, Vec::new()).unwrap(), 1);
        assert_eq!(buffer.ring.len(), 0);
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
    fn a_flush_takes_no_more_than_its_limit() {
        let mut buffer = LocalTxBuf::new(100);
        assert!(push(&mut buffer, b"0123456789"));
        let mut out = Vec::new();
        let taken = buffer.flush(4, |slices| out.write_vectored(slices));
        assert_eq!(taken.unwrap(), 4);
        assert_eq!((&out[..], buffer.len()), (&b"0123"[..], 6));
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
