//! The credit of one connection, in both directions (virtio 1.2, 5.10.6.3).
//!
//! Each side says in every packet how large its receive buffer is (`buf_alloc`) and how many bytes its program has taken out
//! of it so far (`fwd_cnt`, modulo 2^32). What a side has sent and the other's program has not taken yet must fit the
//! other's buffer. An example, the guest sending to a buffer of 262,144 bytes:
//!
//! ```text
//! guest: RW 65536, four times      in flight 262144: the guest must wait
//! we:    CREDIT_UPDATE fwd_cnt=131072      in flight 131072: the guest may send as much again
//! ```
//!
//! What the guest says is not trusted: a count that can't be right is no credit.

use serde::{Deserialize, Serialize};

use crate::packet::header::VsockHeader;
use crate::saved::LoadError;

/// The counts of one connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// Our receive buffer. It stays the same.
    buf_alloc: u32,
    /// Bytes that the guest has sent.
    received: u64,
    /// Bytes of these that left our buffer: the host program has them, or they were dropped.
    forwarded: u64,
    /// `forwarded` as it was last sent to the guest.
    forwarded_sent: u64,
    /// The guest's receive buffer.
    guest_buf_alloc: u32,
    /// Bytes that the guest's program has taken out of it, modulo 2^32.
    guest_forwarded: u32,
    /// Bytes that we have sent to the guest.
    sent: u64,
}

impl Credit {
    /// The credit of a new connection: `buf_alloc` bytes for the guest, and none for us before the guest's first packet.
    pub fn new(buf_alloc: u32) -> Self {
        Self {
            buf_alloc,
            received: 0,
            forwarded: 0,
            forwarded_sent: 0,
            guest_buf_alloc: 0,
            guest_forwarded: 0,
            sent: 0,
        }
    }

    /// Checks counts that were loaded, for a connection with `buffered` bytes in our buffer.
    ///
    /// # Errors
    /// They can't be.
    pub(super) fn check(&self, buffered: usize) -> Result<(), LoadError> {
        let forwarded = self.forwarded.checked_add(buffered as u64);
        let in_flight = self.received.checked_sub(self.forwarded_sent);
        let is_possible = forwarded.is_some_and(|sum| sum <= self.received)
            && self.forwarded_sent <= self.forwarded
            && in_flight.is_some_and(|bytes| bytes <= self.buf_alloc.into())
            && self.received.max(self.sent) <= u64::MAX / 2;
        if is_possible {
            Ok(())
        } else {
            Err(LoadError::Invalid("a credit that can't be"))
        }
    }

    /// Our receive buffer, in bytes.
    pub(super) fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }

    /// Takes the guest's side from a packet of the connection.
    pub fn read_from(&mut self, header: &VsockHeader) {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
    }

    /// Puts our side into a packet for the guest.
    pub fn write_to(&mut self, header: &mut VsockHeader) {
        header.buf_alloc = self.buf_alloc;
        header.fwd_cnt = self.forwarded as u32;
        self.forwarded_sent = self.forwarded;
    }

    /// How many bytes we may send now.
    pub fn ours(&self) -> usize {
        let in_flight = (self.sent as u32).wrapping_sub(self.guest_forwarded);
        self.guest_buf_alloc.saturating_sub(in_flight) as usize
    }

    /// The guest's receive buffer: the most that can be in flight to it, in bytes.
    pub fn guest_window(&self) -> usize {
        self.guest_buf_alloc as usize
    }

    /// How many bytes the guest may send now, as far as it knows.
    pub fn guests(&self) -> usize {
        self.buf_alloc.saturating_sub(self.in_flight()) as usize
    }

    /// Bytes from the guest that occupy our buffer, as far as it knows. Never more than the buffer.
    fn in_flight(&self) -> u32 {
        (self.received - self.forwarded_sent) as u32
    }

    /// How many bytes the guest has sent in all.
    pub fn received(&self) -> u64 {
        self.received
    }

    #[cfg(test)]
    pub(super) fn forwarded(&self) -> u64 {
        self.forwarded
    }

    /// How many bytes we have sent in all.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Counts bytes that we have sent.
    pub fn count_sent(&mut self, bytes: usize) {
        self.sent += bytes as u64;
    }

    /// Counts bytes that the guest has sent.
    pub fn count_received(&mut self, bytes: usize) {
        self.received += bytes as u64;
    }

    /// Counts bytes that have left our buffer.
    pub fn count_forwarded(&mut self, bytes: usize) {
        self.forwarded += bytes as u64;
    }

    /// Whether a CREDIT_UPDATE is due: there is room that the guest does not know of, and less than half of what it would use
    /// is left to it. Linux keeps no more in flight than its own buffer holds, so it uses the smaller of both buffers.
    pub fn update_is_due(&self) -> bool {
        let window = self.buf_alloc.min(self.guest_buf_alloc);
        self.forwarded_sent != self.forwarded
            && window.saturating_sub(self.in_flight()) < (window / 2).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::header::{Cid, GuestPort, Op, PeerAddr};
    use proptest::prelude::*;

    fn packet(buf_alloc: u32, fwd_cnt: u32) -> VsockHeader {
        VsockHeader {
            buf_alloc,
            fwd_cnt,
            ..VsockHeader::new(Cid::from_raw(4), GuestPort(1), PeerAddr::host(2), Op::Rw)
        }
    }

    #[test]
    fn we_send_no_more_than_the_guest_has_room_for() {
        let mut credit = Credit::new(100);
        assert_eq!(credit.ours(), 0);
        credit.read_from(&packet(50, 0));
        credit.count_sent(30);
        assert_eq!(credit.ours(), 20);
        credit.read_from(&packet(50, 10));
        assert_eq!(credit.ours(), 30);
    }

    #[test]
    fn a_lying_guest_gets_nothing() {
        let mut credit = Credit::new(100);
        credit.read_from(&packet(50, 0));
        credit.count_sent(30);
        credit.read_from(&packet(20, 0));
        assert_eq!(
            credit.ours(),
            0,
            "the buffer shrank below what is on the way"
        );
        credit.read_from(&packet(50, 31));
        assert_eq!(credit.ours(), 0, "more was taken than was sent");
    }

    #[test]
    fn an_update_is_due_below_half_of_the_smaller_buffer() {
        let mut credit = Credit::new(1000);
        credit.read_from(&packet(100, 0));
        credit.count_received(50);
        credit.count_forwarded(50);
        assert!(!credit.update_is_due());
        credit.count_received(1);
        assert!(credit.update_is_due());
        credit.write_to(&mut packet(0, 0));
        assert!(!credit.update_is_due(), "the guest was sent it");
        credit.count_received(51);
        assert!(
            !credit.update_is_due(),
            "there is no more room than the guest knows of"
        );
    }

    #[test]
    fn a_buffer_of_one_byte_is_still_handed_back() {
        let mut credit = Credit::new(1);
        credit.read_from(&packet(1, 0));
        credit.count_received(1);
        credit.count_forwarded(1);
        assert!(credit.update_is_due());
    }

    proptest! {
        #[test]
        fn what_is_in_flight_never_exceeds_the_buffer(
            start in any::<u32>(),
            steps in prop::collection::vec((0usize..5000, 0u32..5000), 1..200),
        ) {
            let buffer = 4096;
            let mut credit = Credit::new(1);
            credit.sent = start.into();
            let mut taken = start;
            credit.read_from(&packet(buffer, taken));
            let mut in_flight = 0u32;
            for (wish, take) in steps {
                let send = wish.min(credit.ours());
                credit.count_sent(send);
                in_flight += send as u32;
                prop_assert!(in_flight <= buffer);
                let take = take.min(in_flight);
                in_flight -= take;
                taken = taken.wrapping_add(take);
                credit.read_from(&packet(buffer, taken));
            }
        }
    }
}
