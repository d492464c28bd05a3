//! Bytes that tell where they belong, and sockets for them.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use vhost_user_vsock::packet::header::PacketType;

/// After how many bytes a stream repeats itself: a prime, and more than any buffer on the way holds.
const PERIOD: usize = 1_048_573;

/// Bytes without a pattern. A stream is a part of them, with the next stream's somewhere else: slices are made and compared much
/// faster than single bytes.
static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let byte = |place: u32| (place.wrapping_mul(0x9e37_79b1) >> 24) as u8;
    (0..PERIOD as u32)
        .map(|place| byte(place ^ place >> 8))
        .collect()
});

/// The daemon's end of a connection and the program's, neither of which waits.
pub fn pair(packet_type: PacketType) -> (OwnedFd, UnixStream) {
    let kind = match packet_type {
        PacketType::Seqpacket => SockType::SeqPacket,
        _ => SockType::Stream,
    };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (socket, program) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
    (socket, program.into())
}

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
        let mut bytes = Vec::with_capacity(count);
        self.parts(self.sent, count)
            .for_each(|part| bytes.extend_from_slice(part));
        bytes
    }

    /// Checks bytes that have arrived: none is missing, repeated, invented or of another stream.
    pub fn check(&mut self, bytes: &[u8]) {
        let end = self.received + bytes.len() as u32;
        assert!(end <= self.sent, "bytes that nobody has sent: {self:?}");
        let mut rest = bytes;
        for expected in self.parts(self.received, bytes.len()) {
            let (part, after) = rest.split_at(expected.len());
            assert!(part == expected, "wrong bytes behind those of {self:?}");
            rest = after;
        }
        self.received = end;
    }

    /// Whether everything that was sent has arrived.
    pub fn is_complete(&self) -> bool {
        self.received == self.sent
    }

    /// The `count` bytes from `place` on.
    fn parts(&self, place: u32, count: usize) -> impl Iterator<Item = &'static [u8]> + use<> {
        // Far from each other, whatever the number.
        let mut start = (self.id as usize * 618_033 + place as usize) % PERIOD;
        let mut left = count;
        std::iter::from_fn(move || {
            let part = left.min(PERIOD - start);
            let bytes = &BYTES[start..start + part];
            left -= part;
            start = 0;
            (part > 0).then_some(bytes)
        })
    }
}
