//! Whether to poll for more work before sleeping.
//!
//! A poll saves the time that waking takes, and costs processor time for as long as the wait. What that is differs from one machine
//! and one guest to the next by a factor of ten, so it is measured. While waits are short, some in a row are slept through and some
//! polled for:
//!
//! ```text
//!                  time of the waits               processor time
//! slept through    |-- wait --|-- wake-up --|      |-- work --|-- sleep and wake-up --|
//! polled for       |-- wait --|                    |-- work --|-- wait --|
//! ```
//!
//! Polling goes on where it saves about as much time as it costs processor time. Both are taken for the same work: a stream of which
//! more comes together while the worker sleeps is not polled for. Where polling does not pay, it is tried less and less often.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use crate::syscalls::Syscall;

/// To read the thread's CPU clock, and the monotonic clock where that takes a system call.
pub(super) const SYSCALLS: &[Syscall] = &[Syscall::any(libc::SYS_clock_gettime)];

/// How many waits in a row are measured.
const WINDOW: u32 = 32;

/// How many windows are slept through before polling is tried: at first, and where it has never paid.
const TRY_AFTER: (u32, u32) = (1, 256);

/// After how many windows in which polling has paid it is compared with sleeping again.
const POLL: u32 = 128;

/// In how many windows it has to pay before it is tried again as soon as at first.
const TRIAL: u32 = 8;

/// How much processor time a poll may take for the time that it saves, in percent: to begin with, and to go on. Both vary.
const BEGIN: u32 = 110;
const GO_ON: u32 = 125;

/// What the worker's thread has taken and done so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    /// Its processor time.
    pub(super) cpu: Duration,
    /// The cost of what it has done, in the units of [`crate::thread_backend::cost`].
    pub(super) work: u64,
}

impl Usage {
    fn since(self, before: Self) -> Self {
        Self {
            cpu: self.cpu.saturating_sub(before.cpu),
            work: self.work.wrapping_sub(before.work),
        }
    }
}

/// What some waits in a row have taken, and what was done between them.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    waits: u32,
    time: Duration,
    usage: Usage,
}

impl Window {
    /// Time and processor time, where so many percent of the one are worth as much as the other.
    fn price(&self, percent: u32) -> u128 {
        (self.usage.cpu * 100 + self.time * percent).as_nanos()
    }

    /// Whether the same work costs no more than in `other`.
    fn costs_no_more_than(&self, other: &Self, percent: u32) -> bool {
        let work = |window: &Self| u128::from(window.usage.work.max(1));
        self.price(percent) * work(other) <= other.price(percent) * work(self)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Waits are slept through, in so many windows so far.
    Sleep { windows: u32 },
    /// They are polled for, to see whether that pays.
    Try,
    /// Polling pays. It has in so many windows more.
    Poll { windows: u32 },
}

/// Decides whether to poll.
#[derive(Debug)]
pub(super) struct BusyPoll {
    /// What a short wait is, and how long a poll may take.
    limit: Duration,
    mode: Mode,
    window: Window,
    /// What the thread had taken and done when the window began.
    usage_before: Usage,
    /// The last one that was slept through.
    slept: Window,
    try_after: u32,
    idle_since: Option<Instant>,
}

impl BusyPoll {
    /// Polls for at most `limit` at a time; never when that is zero.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            mode: Mode::Sleep { windows: 0 },
            window: Window::default(),
            usage_before: Usage::default(),
            slept: Window::default(),
            try_after: TRY_AFTER.0,
            idle_since: None,
        }
    }

    /// How long to poll now, if at all: at most twice the average of the waits that were slept through. A longer one is not worth it.
    pub(super) fn time(&self) -> Option<Duration> {
        match self.mode {
            Mode::Sleep { .. } => None,
            Mode::Try | Mode::Poll { .. } => Some((self.slept.time * 2 / WINDOW).min(self.limit)),
        }
    }

    /// The worker has nothing to do. It polls, or sleeps, or both.
    pub(super) fn begin(&mut self, now: impl FnOnce() -> Instant) {
        if !self.limit.is_zero() && self.idle_since.is_none() {
            self.idle_since = Some(now());
        }
    }

    /// It has something to do again.
    pub(super) fn end(&mut self, now: impl FnOnce() -> Instant, usage: impl FnOnce() -> Usage) {
        let Some(since) = self.idle_since.take() else {
            return;
        };
        let waited = now().saturating_duration_since(since);
        if let Mode::Sleep { .. } = self.mode
            && waited > self.limit
        {
            // The device is not busy.
            self.window.waits = 0;
            return;
        }
        if self.window.waits == 0 {
            self.usage_before = usage();
            self.window = Window {
                waits: 1,
                ..Window::default()
            };
            return;
        }
        self.window.time += waited.min(self.limit);
        self.window.waits += 1;
        if self.window.waits > WINDOW {
            self.window.usage = usage().since(self.usage_before);
            self.decide();
            self.window.waits = 0;
        }
    }

    fn decide(&mut self) {
        let pays = |percent| self.window.costs_no_more_than(&self.slept, percent);
        self.mode = match self.mode {
            Mode::Sleep { windows } => {
                self.slept = self.window;
                if windows + 1 < self.try_after {
                    Mode::Sleep {
                        windows: windows + 1,
                    }
                } else {
                    Mode::Try
                }
            }
            Mode::Try if pays(BEGIN) => Mode::Poll { windows: 0 },
            Mode::Poll { windows } if pays(GO_ON) && windows < POLL => Mode::Poll {
                windows: windows + 1,
            },
            Mode::Poll { windows } if windows >= TRIAL => {
                self.try_after = TRY_AFTER.0;
                Mode::Sleep { windows: 0 }
            }
            Mode::Try | Mode::Poll { .. } => {
                self.try_after = (self.try_after * 2).min(TRY_AFTER.1);
                Mode::Sleep { windows: 0 }
            }
        };
    }
}

/// The processor time of the thread.
pub(super) fn thread_cpu() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(100);

    /// A machine, in microseconds: what a wait takes, what waking takes, what of that is the worker's processor time, and what the
    /// worker does between two waits.
    #[derive(Clone, Copy)]
    struct Machine {
        wait: u64,
        wake_up: u64,
        sleep_cpu: u64,
        work: u64,
        /// How much is done after a wait that is slept through, and after one that is polled for.
        done: [u64; 2],
    }

    /// So many waits. Returns for how many of them the worker polled.
    fn wait(poll: &mut BusyPoll, count: u32, machine: Machine) -> u32 {
        let micros = Duration::from_micros;
        let wait = micros(machine.wait);
        let (mut now, mut usage) = (Instant::now(), Usage::default());
        let mut polls = 0;
        for _ in 0..count {
            poll.begin(|| now);
            let polled = poll.time();
            polls += u32::from(polled.is_some());
            usage.cpu += polled.unwrap_or_default().min(wait);
            now += wait;
            if polled.is_none_or(|polled| polled <= wait) {
                now += micros(machine.wake_up);
                usage.cpu += micros(machine.sleep_cpu);
            }
            poll.end(|| now, || usage);
            usage.cpu += micros(machine.work);
            usage.work += machine.done[usize::from(polled.is_some())];
        }
        polls
    }

    /// A round trip through programs of this machine.
    const SHORT: Machine = Machine {
        wait: 9,
        wake_up: 4,
        sleep_cpu: 5,
        work: 4,
        done: [1, 1],
    };

    /// One with a real guest.
    const LONG: Machine = Machine { wait: 36, ..SHORT };

    #[test]
    fn a_short_wait_is_polled_for() {
        let slow = Machine {
            wait: 23,
            wake_up: 23,
            sleep_cpu: 8,
            work: 6,
            ..SHORT
        };
        for machine in [SHORT, slow] {
            let mut poll = BusyPoll::new(LIMIT);
            assert_eq!(wait(&mut poll, WINDOW + 1, machine), 0);
            let polls = wait(&mut poll, 100_000, machine);
            assert!(polls > 95_000, "{polls}");
        }
    }

    #[test]
    fn a_long_one_is_slept_through_but_for_a_few_tries() {
        let mut poll = BusyPoll::new(LIMIT);
        let polls = wait(&mut poll, 100_000, LONG);
        assert!(polls > 0 && polls < 1000, "{polls}");
    }

    /// While the worker sleeps, more comes together than while it polls.
    #[test]
    fn a_stream_is_left_to_come_together() {
        let stream = Machine {
            done: [3, 2],
            ..SHORT
        };
        let mut poll = BusyPoll::new(LIMIT);
        let polls = wait(&mut poll, 100_000, stream);
        assert!(polls > 0 && polls < 1000, "{polls}");
    }

    #[test]
    fn what_no_longer_pays_ends() {
        let mut poll = BusyPoll::new(LIMIT);
        assert!(wait(&mut poll, 1000, SHORT) > 900);
        let polls = wait(&mut poll, 1000, LONG);
        assert!(polls < 200, "{polls}");
    }

    #[test]
    fn an_idle_device_is_not_polled_for() {
        let idle = Machine {
            wait: 1_000_000,
            ..SHORT
        };
        let mut poll = BusyPoll::new(LIMIT);
        assert_eq!(wait(&mut poll, 1000, idle), 0);
        assert!(wait(&mut poll, 1000, SHORT) > 900);
        assert!(wait(&mut poll, 1000, idle) <= 2 * WINDOW);
    }

    #[test]
    fn zero_turns_it_off() {
        let mut poll = BusyPoll::new(Duration::ZERO);
        assert_eq!(wait(&mut poll, 1000, SHORT), 0);
    }
}
