//! Whether to poll for more work before sleeping.

use std::time::{Duration, Instant};

use crate::syscalls::Syscall;

/// To read the clock, on machines where that takes a system call.
pub(super) const SYSCALLS: &[Syscall] = &[Syscall::any(libc::SYS_clock_gettime)];

/// Decides by the last wait. When that was shorter than the limit, the next one is likely to be too, and polling is cheaper
/// than sleeping and being woken. Otherwise the worker sleeps: an idle or slow device costs nothing.
#[derive(Debug)]
pub(super) struct BusyPoll {
    limit: Duration,
    pays: bool,
    asleep_since: Option<Instant>,
}

impl BusyPoll {
    /// Polls for at most `limit` at a time; never when that is zero.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            pays: false,
            asleep_since: None,
        }
    }

    /// Until when to poll now, if at all.
    pub(super) fn until(&self) -> Option<Instant> {
        self.pays.then(|| Instant::now() + self.limit)
    }

    /// Nothing came while polling.
    pub(super) fn was_in_vain(&mut self) {
        self.pays = false;
    }

    /// The worker goes to sleep.
    pub(super) fn sleeps(&mut self) {
        self.asleep_since = (!self.limit.is_zero()).then(Instant::now);
    }

    /// The worker was woken.
    pub(super) fn woke(&mut self) {
        if let Some(since) = self.asleep_since.take() {
            self.pays = since.elapsed() <= self.limit;
        }
    }
}
