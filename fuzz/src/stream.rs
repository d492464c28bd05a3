//! Bytes that say where they belong.

/// One direction of a connection: every byte is a function of the direction and of its place in it.
#[derive(Debug)]
pub struct Stream {
    id: u32,
    /// How many bytes have gone in.
    pub sent: u32,
    /// How many have come out.
    pub received: u32,
}

impl Stream {
    /// The stream with this number.
    pub fn new(id: u32) -> Self {
        Self {
            id,
            sent: 0,
            received: 0,
        }
    }

    /// The next `count` bytes to go in. They only count once they are [sent](Stream::sent).
    pub fn next(&self, count: usize) -> Vec<u8> {
        let end = self.sent + count as u32;
        (self.sent..end).map(|place| self.byte(place)).collect()
    }

    /// Checks what has come out: nothing is missing, repeated, invented or of another stream.
    pub fn check(&mut self, bytes: &[u8]) {
        let end = self.received + bytes.len() as u32;
        let expected: Vec<u8> = (self.received..end).map(|place| self.byte(place)).collect();
        if bytes != expected {
            let wrong = bytes
                .iter()
                .zip(&expected)
                .position(|(byte, expected)| byte != expected);
            panic!("the byte {wrong:?} behind those of {self:?} is wrong");
        }
        self.received = end;
        assert!(end <= self.sent, "bytes that nobody sent: {self:?}");
    }

    /// Whether all that went in has come out.
    pub fn is_complete(&self) -> bool {
        self.received == self.sent
    }

    fn byte(&self, place: u32) -> u8 {
        // Neighbours, and the same places of other streams, have little in common.
        let mixed = (place ^ self.id << 20).wrapping_mul(0x9e37_79b1);
        (mixed >> 24) as u8
    }
}
