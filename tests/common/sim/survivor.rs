//! A daemon that is about to be abused, and the check that it survived unharmed.

use std::ops::Deref;

use super::guest::SimGuest;
use super::host::assert_serves;
use super::setup::Setup;
use crate::common::daemon::Daemon;

/// Freed memory that the allocator may keep, in KiB.
pub const SLACK_KIB: u64 = 4 << 10;

/// A daemon that has served one guest, so that everything allocated once is allocated.
pub struct Survivor {
    daemon: Daemon,
    descriptors_and_threads: (usize, usize),
    anonymous_kib: u64,
}

impl Survivor {
    /// A daemon with the default options.
    pub fn start() -> Self {
        Self::of(Daemon::start())
    }

    /// A daemon with `options`.
    pub fn start_with(options: &[&str]) -> Self {
        Self::of(Daemon::start_with(options))
    }

    /// This daemon.
    pub fn of(daemon: Daemon) -> Self {
        assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
        Self {
            descriptors_and_threads: daemon.at_rest(),
            anonymous_kib: daemon.anonymous_kib(),
            daemon,
        }
    }

    /// Growth of the daemon's anonymous memory so far, in KiB.
    pub fn growth_kib(&self) -> u64 {
        self.daemon
            .anonymous_kib()
            .saturating_sub(self.anonymous_kib)
    }

    /// Panics unless the daemon runs, serves the next VMM, uses no more resources than in the beginning, and is idle.
    #[track_caller]
    pub fn assert_unharmed(self) {
        self.daemon.assert_alive();
        let mut guest = SimGuest::start(&self.daemon, Setup::default());
        assert_serves(&self.daemon, &mut guest);
        drop(guest);
        assert_eq!(
            self.daemon.at_rest(),
            self.descriptors_and_threads,
            "descriptors and threads"
        );
        let growth = self.growth_kib();
        assert!(growth <= SLACK_KIB, "{growth} KiB stay");
        self.daemon.assert_idle();
    }
}

impl Deref for Survivor {
    type Target = Daemon;

    fn deref(&self) -> &Daemon {
        &self.daemon
    }
}

/// Reproducible pseudo-random numbers.
pub struct Dice(u64);

impl Dice {
    /// Dice seeded with `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.any() >> 11) % end
    }

    /// One of these.
    pub fn one_of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize].clone()
    }
}
