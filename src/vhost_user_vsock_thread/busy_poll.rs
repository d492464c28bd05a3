//! The short look before sleep: how long it pays to watch for work in place of sleeping and being woken.

use std::time::{Duration, Instant};

use crate::syscalls::Syscall;

/// To read the clock, on machines where that takes a call.
pub(crate) const SYSCALLS: &[Syscall] = &[Syscall::any(libc::SYS_clock_gettime)];

/// Decides by what it has seen last. When the last wait for work was shorter than the limit, the next one is likely to be
/// too, and looking is cheaper than sleeping. Otherwise the worker sleeps: an idle or slow device costs nothing.
#[derive(Debug)]
pub struct Look {
    limit: Duration,
    pays: bool,
    asleep: Option<Instant>,
}

impl Look {
    /// Looks for at most `limit` at a time; never when that is zero.
    pub fn new(limit: Duration) -> Self {
        Self {
            limit,
            pays: false,
            asleep: None,
        }
    }

    /// Until when to look now, if at all.
    pub fn until(&self) -> Option<Instant> {
        self.pays.then(|| Instant::now() + self.limit)
    }

    /// The look was in vain.
    pub fn in_vain(&mut self) {
        self.pays = false;
    }

    /// The worker goes to sleep.
    pub fn sleeps(&mut self) {
        self.asleep = (!self.limit.is_zero()).then(Instant::now);
    }

    /// The worker has been woken.
    pub fn woke(&mut self) {
        if let Some(asleep) = self.asleep.take() {
            self.pays = asleep.elapsed() <= self.limit;
        }
    }
}
