//! When the guest is interrupted for packets that were taken from it.
//!
//! With such an interrupt the driver frees what it has sent. It is in no hurry while the ring has room: Linux goes on sending,
//! and an interrupt for each packet costs the guest more than the packet does. So one interrupt is for many: it comes when a good
//! part of the ring has been returned, with a packet that is likely to be waited for, and no later than [`DELAY`].
//!
//! A driver that sends nothing before it has been interrupted for the packet before would wait that long each time. One that sends
//! nothing for the whole delay is interrupted at once for a while.

use std::time::{Duration, Instant};

/// How long buffers may be returned without an interrupt.
const DELAY: Duration = Duration::from_micros(500);

/// Which part of the ring may be.
const FRACTION: usize = 4;

/// How many batches are interrupted for at once after a delay in which nothing came: after the first one, and after many.
const PROMPT: (u32, u32) = (64, 4096);

/// The interrupts for the TX ring.
#[derive(Debug)]
pub(super) struct TxInterrupts {
    /// Descriptors that were returned without an interrupt, in so many batches.
    descriptors: usize,
    batches: u32,
    due: Option<Instant>,
    is_overdue: bool,
    /// So many batches are interrupted for at once.
    prompt: u32,
    next_prompt: u32,
}

impl Default for TxInterrupts {
    fn default() -> Self {
        Self {
            descriptors: 0,
            batches: 0,
            due: None,
            is_overdue: false,
            prompt: 0,
            next_prompt: PROMPT.0,
        }
    }
}

impl TxInterrupts {
    /// A batch was returned, of so many descriptors. Whether to interrupt now, and to forget it.
    pub(super) fn returned(
        &mut self,
        descriptors: usize,
        ring_size: u16,
        now: impl FnOnce() -> Instant,
    ) -> bool {
        if self.prompt > 0 {
            self.prompt -= 1;
            return true;
        }
        self.descriptors += descriptors;
        self.batches = self.batches.saturating_add(1);
        if self.descriptors >= usize::from(ring_size) / FRACTION {
            if self.batches > 1 {
                self.next_prompt = PROMPT.0;
            }
            return true;
        }
        if self.due.is_none() {
            self.due = Some(now() + DELAY);
        }
        false
    }

    /// When to call [`TxInterrupts::expire`].
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.due
    }

    /// Notes whether an interrupt has become due.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.due.is_none_or(|due| due > now) {
            return;
        }
        if self.batches == 1 {
            self.prompt = self.next_prompt;
            self.next_prompt = (2 * self.next_prompt).min(PROMPT.1);
        }
        self.forget();
        self.is_overdue = true;
    }

    /// Whether to interrupt now.
    pub(super) fn take_overdue(&mut self) -> bool {
        std::mem::take(&mut self.is_overdue)
    }

    /// The guest knows of everything, or there is none.
    pub(super) fn forget(&mut self) {
        self.descriptors = 0;
        self.batches = 0;
        self.due = None;
        self.is_overdue = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RING: u16 = 128;

    /// Returns single packets of two descriptors, so far apart, and counts the interrupts.
    fn send(interrupts: &mut TxInterrupts, packets: u32, gap: Duration) -> u32 {
        let mut now = Instant::now();
        let mut count = 0;
        for _ in 0..packets {
            if interrupts.returned(2, RING, || now) {
                interrupts.forget();
                count += 1;
            }
            now += gap;
            interrupts.expire(now);
            count += u32::from(interrupts.take_overdue());
        }
        count
    }

    #[test]
    fn many_packets_have_one() {
        let mut interrupts = TxInterrupts::default();
        let per_interrupt = u32::from(RING) / FRACTION as u32 / 2;
        let count = send(&mut interrupts, 1000, Duration::from_micros(1));
        assert_eq!(count, 1000 / per_interrupt);
    }

    #[test]
    fn slow_packets_have_theirs_in_time() {
        let mut interrupts = TxInterrupts::default();
        let count = send(&mut interrupts, 1000, DELAY / 4);
        assert_eq!(count, 250);
    }

    #[test]
    fn a_single_packet_has_one() {
        let mut interrupts = TxInterrupts::default();
        let now = Instant::now();
        assert!(!interrupts.returned(2, RING, || now));
        assert_eq!(interrupts.deadline(), Some(now + DELAY));
        interrupts.expire(now);
        assert!(!interrupts.take_overdue());
        interrupts.expire(now + DELAY);
        assert!(interrupts.take_overdue());
        assert!(!interrupts.take_overdue());
        assert_eq!(interrupts.deadline(), None);
    }

    /// Each delay is one in which nothing came.
    #[test]
    fn a_driver_that_waits_for_each_is_not_delayed_often() {
        let mut interrupts = TxInterrupts::default();
        let packets = 10_000;
        let mut delays = 0;
        for _ in 0..packets {
            let now = Instant::now();
            if !interrupts.returned(2, RING, || now) {
                delays += 1;
                interrupts.expire(now + DELAY);
                assert!(interrupts.take_overdue());
            }
        }
        assert!(delays < 10, "{delays}");
    }
}
