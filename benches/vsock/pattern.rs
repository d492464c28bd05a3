//! The payloads of the programs on both sides: requests of one size, and streams with marks at known offsets, so that
//! lost, repeated or reordered bytes are found at little cost.

/// The size of a request and of its response, in bytes.
pub const REQUEST_LEN: usize = 64;

const MAGIC: u64 = 0x7673_6f63_6b21_a55a;
/// The distance of two marks in bytes, unless writes are smaller.
const STEP: usize = 4096;
/// The size of a mark in bytes.
const MARK: usize = 8;

/// Writes marks for the bytes that follow.
pub struct Marker {
    offset: u64,
    step: usize,
}

impl Marker {
    /// Marks for a stream in writes of `write` bytes.
    pub fn new(write: usize) -> Self {
        Self {
            offset: 0,
            step: write.min(STEP),
        }
    }

    /// Marks the next write.
    pub fn mark(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_exact_mut(self.step) {
            piece[..MARK].copy_from_slice(&(self.offset ^ MAGIC).to_le_bytes());
            self.offset += self.step as u64;
        }
    }
}

/// Checks marks.
pub struct Checker {
    offset: u64,
    step: u64,
}

impl Checker {
    /// Checks a stream that `Marker::new(write)` marks.
    pub fn new(write: usize) -> Self {
        Self {
            offset: 0,
            step: write.min(STEP) as u64,
        }
    }

    /// Checks the marks that lie entirely in the next `bytes` of the stream; one that is split is skipped.
    pub fn check(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut at = self.offset.next_multiple_of(self.step);
        let end = self.offset + bytes.len() as u64;
        while at + MARK as u64 <= end {
            let start = (at - self.offset) as usize;
            if bytes[start..start + MARK] != (at ^ MAGIC).to_le_bytes() {
                return Err(format!("wrong bytes at offset {at} of a stream"));
            }
            at += self.step;
        }
        self.offset = end;
        Ok(())
    }
}
