//! What the threads of one run share: whether to stop, what they have counted, and what went wrong.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// The state of one run.
#[derive(Default)]
pub struct Shared {
    /// Whether the run is over.
    stop: AtomicBool,
    /// Whether the measured window is open.
    measuring: AtomicBool,
    /// Whether a flood may begin.
    flooding: AtomicBool,
    to_host: AtomicU64,
    to_guest: AtomicU64,
    ops: AtomicU64,
    flood_ops: AtomicU64,
    flood_answers: AtomicU64,
    /// The longest pause, in nanoseconds.
    pause: AtomicU64,
    failure: Mutex<Option<String>>,
}

/// What has been counted, since the run began or between two moments.
#[derive(Clone, Copy)]
pub struct Counts {
    /// Bytes that host programs have received.
    pub to_host: u64,
    /// Bytes that guest programs have received.
    pub to_guest: u64,
    /// Completed operations.
    pub ops: u64,
    /// REQUESTs, connections or writes of the flood.
    pub flood_ops: u64,
    /// RSTs that answered the flood's REQUESTs.
    pub flood_answers: u64,
}

impl Counts {
    /// What was counted since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            to_host: self.to_host - earlier.to_host,
            to_guest: self.to_guest - earlier.to_guest,
            ops: self.ops - earlier.ops,
            flood_ops: self.flood_ops - earlier.flood_ops,
            flood_answers: self.flood_answers - earlier.flood_answers,
        }
    }

    /// Bytes of both directions.
    pub fn bytes(self) -> u64 {
        self.to_host + self.to_guest
    }

    /// Whether bytes have moved in both directions.
    pub fn moved_both_ways(self) -> bool {
        self.to_host > 0 && self.to_guest > 0
    }

    /// Whether the measured traffic has moved; the flood does not count.
    pub fn moved(self) -> bool {
        self.bytes() + self.ops > 0
    }
}

impl Shared {
    /// Whether the run is over.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Ends the run for every thread.
    pub fn end(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether the flood may begin.
    pub fn flooding(&self) -> bool {
        self.flooding.load(Ordering::Relaxed)
    }

    /// Lets the flood begin.
    pub fn flood(&self) {
        self.flooding.store(true, Ordering::Relaxed);
    }

    /// Opens the measured window.
    pub fn open_window(&self) {
        self.measuring.store(true, Ordering::Relaxed);
    }

    /// Closes the measured window.
    pub fn close_window(&self) {
        self.measuring.store(false, Ordering::Relaxed);
    }

    /// What has been counted so far.
    pub fn counts(&self) -> Counts {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counts {
            to_host: read(&self.to_host),
            to_guest: read(&self.to_guest),
            ops: read(&self.ops),
            flood_ops: read(&self.flood_ops),
            flood_answers: read(&self.flood_answers),
        }
    }

    /// Counts bytes that a host program has received.
    pub fn add_to_host(&self, count: usize) {
        self.to_host.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Counts bytes that a guest program has received.
    pub fn add_to_guest(&self, count: usize) {
        self.to_guest.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Counts an operation. Returns whether it belongs to the measured window.
    pub fn add_op(&self) -> bool {
        self.ops.fetch_add(1, Ordering::Relaxed);
        self.measuring.load(Ordering::Relaxed)
    }

    /// Counts operations of the flood.
    pub fn add_flood_ops(&self, count: u64) {
        self.flood_ops.fetch_add(count, Ordering::Relaxed);
    }

    /// Sets how many of the flood's REQUESTs have been answered.
    pub fn set_flood_answers(&self, count: u64) {
        self.flood_answers.store(count, Ordering::Relaxed);
    }

    /// Notes for how long nothing came.
    pub fn note_pause(&self, pause: Duration) {
        let pause = pause.as_nanos() as u64;
        self.pause.fetch_max(pause, Ordering::Relaxed);
    }

    /// The longest pause since this was last called.
    pub fn take_pause(&self) -> Duration {
        Duration::from_nanos(self.pause.swap(0, Ordering::Relaxed))
    }

    /// Ends the run with a failure. The first one is kept, and none that comes after the end of the run.
    pub fn fail(&self, why: impl ToString) {
        if let Ok(mut failure) = self.failure.lock()
            && !self.stopped()
        {
            failure.get_or_insert_with(|| why.to_string());
        }
        self.end();
    }

    /// The failure, if there is one.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().ok()?.clone()
    }
}
