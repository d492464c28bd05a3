//! Which sockets are watched for room.
//!
//! Room in a socket matters while something waits for it. An event of that kind is also all that tells of a host program which has
//! stopped receiving (see [`crate::host::socket`]), so sockets are watched for room from the beginning. But a host program that
//! reads what it is sent causes an event with each read, and each wakes the worker for nothing. So after some of these, a socket is
//! not watched for room until something waits for it, or for [`REST`].

use std::time::{Duration, Instant};

use super::slot_list::SlotList;

/// How many events in vain there may be before a socket is not watched.
pub(super) const MAX_IN_VAIN: u8 = 16;

/// How long it is not: by so much later it is seen that a host program has stopped receiving.
const REST: Duration = Duration::from_millis(100);

/// The connections whose sockets are not watched for room.
#[derive(Debug, Default)]
pub(super) struct Unwatched {
    slots: SlotList,
    /// When all of them are to be watched again.
    until: Option<Instant>,
}

impl Unwatched {
    pub(super) fn add(&mut self, slot: u32) {
        self.slots.push(slot);
        if self.until.is_none() {
            self.until = Some(Instant::now() + REST);
        }
    }

    pub(super) fn contains(&self, slot: u32) -> bool {
        self.slots.contains(slot)
    }

    pub(super) fn remove(&mut self, slot: u32) {
        self.slots.remove(slot);
        if self.slots.len() == 0 {
            self.until = None;
        }
    }

    /// When [`Unwatched::expired`] has something to return.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.until
    }

    /// A connection that is to be watched again.
    pub(super) fn expired(&self, now: Instant) -> Option<u32> {
        self.until.filter(|until| *until <= now)?;
        self.slots.first()
    }

    /// Gives back what many connections have taken, if there are none.
    pub(super) fn give_back(&mut self) {
        self.slots.give_back();
    }
}
