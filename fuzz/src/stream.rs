//! Bytes that tell where they belong.

/// One direction of a connection. Each byte is a function of the direction and of its place in it.
#[derive(Debug)]
pub struct Stream {
    id: u32,
    /// How many bytes were sent.
    pub sent: u32,
    /// How many bytes have arrived.
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

    /// The next `count` bytes to send. They only count once they are [sent](Stream::sent).
    pub fn next(&self, count: usize) -> Vec<u8> {
        let end = self.sent + count as u32;
        (self.sent..end).map(|place| self.byte(place)).collect()
    }

    /// Checks bytes that have arrived: none is missing, repeated, invented or of another stream.
    pub fn check(&mut self, bytes: &[u8]) {
        let end = self.received + bytes.len() as u32;
        assert!(end <= self.sent, "bytes that nobody has sent: {self:?}");
        let mut places = (self.received..end).zip(bytes);
        let wrong = places.position(|(place, byte)| *byte != self.byte(place));
        if let Some(wrong) = wrong {
            panic!("the byte {wrong} behind those of {self:?} is wrong");
        }
        self.received = end;
    }

    /// Whether everything that was sent has arrived.
    pub fn is_complete(&self) -> bool {
        self.received == self.sent
    }

    fn byte(&self, place: u32) -> u8 {
        // Neighbours, and the same places of other streams, have little in common.
        let mixed = (place ^ self.id << 20).wrapping_mul(0x9e37_79b1);
        (mixed >> 24) as u8
    }
}
