//! The credit of one connection, both ways (virtio 1.2, 5.10.6.3).
//!
//! Each side tells the other, in every packet, how large its receive buffer is (`buf_alloc`) and how many bytes its
//! program has taken out of it so far (`fwd_cnt`). What a side has sent and the other has not taken yet must fit that
//! buffer. In packets the counts run modulo 2^32. What the guest says is not trusted: a count that can't be is no credit.

use crate::packet::header::VsockHeader;

/// Who may still send how much.
#[derive(Debug)]
pub struct Credit {
    /// Our receive buffer, as we tell the guest.
    buf_alloc: u32,
    /// Bytes the guest has sent.
    received: u64,
    /// Bytes of these that the host program has, or will never have.
    forwarded: u64,
    /// `forwarded` as the guest knows it.
    told: u64,
    /// The guest's receive buffer.
    guest_buf_alloc: u32,
    /// Bytes the guest's program has taken.
    guest_forwarded: u32,
    /// Bytes we have sent to the guest.
    sent: u64,
}

impl Credit {
    /// The credit of a new connection: `buf_alloc` bytes for the guest, none for us until the guest speaks.
    pub fn new(buf_alloc: u32) -> Self {
        Self {
            buf_alloc,
            received: 0,
            forwarded: 0,
            told: 0,
            guest_buf_alloc: 0,
            guest_forwarded: 0,
            sent: 0,
        }
    }

    /// Learns the guest's side from any packet of the connection.
    pub fn learn(&mut self, header: &VsockHeader) {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
    }

    /// Puts our side into a packet for the guest, which knows it from then on.
    pub fn tell(&mut self, header: &mut VsockHeader) {
        header.buf_alloc = self.buf_alloc;
        header.fwd_cnt = self.forwarded as u32;
        self.told = self.forwarded;
    }

    /// How many bytes we may send now.
    pub fn for_us(&self) -> usize {
        let in_flight = (self.sent as u32).wrapping_sub(self.guest_forwarded);
        self.guest_buf_alloc.saturating_sub(in_flight) as usize
    }

    /// The guest's receive buffer: the most that can be on the way to it.
    pub fn guest_window(&self) -> usize {
        self.guest_buf_alloc as usize
    }

    /// How many bytes the guest may send now, as far as it knows.
    pub fn for_guest(&self) -> usize {
        self.buf_alloc.saturating_sub(self.on_the_way()) as usize
    }

    /// Bytes of the guest's that take up our buffer, as far as it knows. It never has more than the buffer.
    fn on_the_way(&self) -> u32 {
        (self.received - self.told) as u32
    }

    /// How many bytes the guest has sent in all.
    pub fn received(&self) -> u64 {
        self.received
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

    /// Counts bytes that have left us for the host program, and no longer take up our buffer.
    pub fn count_forwarded(&mut self, bytes: usize) {
        self.forwarded += bytes as u64;
    }

    /// Whether the guest should hear of room that it doesn't know of: less than half of what it would use is left to
    /// it. Linux keeps no more on the way than its own buffer holds, so the smaller of both buffers is what it uses.
    pub fn is_due(&self) -> bool {
        let window = self.buf_alloc.min(self.guest_buf_alloc);
        self.told != self.forwarded
            && window.saturating_sub(self.on_the_way()) < (window / 2).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::header::{Cid, GuestPort, HostPort, Op};
    use proptest::prelude::*;

    fn packet(buf_alloc: u32, fwd_cnt: u32) -> VsockHeader {
        VsockHeader {
            buf_alloc,
            fwd_cnt,
            ..VsockHeader::to_guest(Cid(4), GuestPort(1), HostPort(2), Op::Rw)
        }
    }

    #[test]
    fn we_send_no_more_than_the_guest_has_room_for() {
        let mut credit = Credit::new(100);
        assert_eq!(credit.for_us(), 0);
        credit.learn(&packet(50, 0));
        credit.count_sent(30);
        assert_eq!(credit.for_us(), 20);
        credit.learn(&packet(50, 10));
        assert_eq!(credit.for_us(), 30);
    }

    #[test]
    fn a_lying_guest_gets_nothing() {
        let mut credit = Credit::new(100);
        credit.learn(&packet(50, 0));
        credit.count_sent(30);
        credit.learn(&packet(20, 0));
        assert_eq!(
            credit.for_us(),
            0,
            "the buffer shrank below what is on the way"
        );
        credit.learn(&packet(50, 31));
        assert_eq!(credit.for_us(), 0, "more was taken than was sent");
    }

    #[test]
    fn an_update_is_due_below_half_of_the_smaller_buffer() {
        let mut credit = Credit::new(1000);
        credit.learn(&packet(100, 0));
        credit.count_received(50);
        credit.count_forwarded(50);
        assert!(!credit.is_due());
        credit.count_received(1);
        assert!(credit.is_due());
        credit.tell(&mut packet(0, 0));
        assert!(!credit.is_due(), "the guest knows");
        credit.count_received(51);
        assert!(
            !credit.is_due(),
            "there is no more room than the guest knows of"
        );
    }

    #[test]
    fn a_buffer_of_one_byte_is_still_handed_back() {
        let mut credit = Credit::new(1);
        credit.learn(&packet(1, 0));
        credit.count_received(1);
        credit.count_forwarded(1);
        assert!(credit.is_due());
    }

    proptest! {
        #[test]
        fn what_is_on_the_way_never_exceeds_the_buffer(
            start in any::<u32>(),
            steps in prop::collection::vec((0usize..5000, 0u32..5000), 1..200),
        ) {
            let buffer = 4096;
            let mut credit = Credit::new(1);
            credit.sent = start.into();
            let mut taken = start;
            credit.learn(&packet(buffer, taken));
            let mut on_the_way = 0u32;
            for (wish, take) in steps {
                let send = wish.min(credit.for_us());
                credit.count_sent(send);
                on_the_way += send as u32;
                prop_assert!(on_the_way <= buffer);
                let take = take.min(on_the_way);
                on_the_way -= take;
                taken = taken.wrapping_add(take);
                credit.learn(&packet(buffer, taken));
            }
        }
    }
}
