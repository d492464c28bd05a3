//! What the daemon must have given back when its VMM is gone and every connection is closed.

use std::fmt;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::common::daemon::{Daemon, PATIENCE};

/// How much more memory of its own than after the warm-up is no leak, in KiB. In use is the same then as now, but the
/// allocator keeps what was freed, and how much depends on which connections came together.
const MEMORY_MARGIN: u64 = 1024;

/// What the daemon has at rest.
#[derive(Clone, Copy, Debug)]
pub struct Rest {
    descriptors: usize,
    threads: usize,
    /// In KiB.
    memory: u64,
}

impl Rest {
    /// Of a daemon that has just started.
    pub fn at_start(daemon: &Daemon) -> Self {
        let (descriptors, threads) = daemon.at_rest();
        Self {
            descriptors,
            threads,
            memory: daemon.anonymous_kib(),
        }
    }

    /// Waits until the daemon has no more descriptors and threads than when it started.
    pub fn again(daemon: &Daemon, start: Self) -> Result<Self, String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = Self {
                descriptors: daemon.open_descriptors(),
                threads: daemon.threads(),
                memory: daemon.anonymous_kib(),
            };
            if now.descriptors <= start.descriptors && now.threads <= start.threads {
                return Ok(now);
            }
            if Instant::now() > deadline {
                return Err(format!(
                    "without a VMM there is {now}; at the start {start}"
                ));
            }
            sleep(Duration::from_millis(10));
        }
    }

    /// Compares the memory with what it was after the warm-up.
    pub fn check_memory(self, warm: Self) -> Result<(), String> {
        if self.memory <= warm.memory + MEMORY_MARGIN {
            return Ok(());
        }
        Err(format!(
            "in the end there is {self}; after the warm-up {warm}"
        ))
    }

    /// The one with more memory.
    pub fn or_larger(self, other: Option<Self>) -> Self {
        other
            .filter(|other| other.memory > self.memory)
            .unwrap_or(self)
    }
}

impl fmt::Display for Rest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} KiB of memory, {} descriptors, {} threads",
            self.memory, self.descriptors, self.threads
        )
    }
}
