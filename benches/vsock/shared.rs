//! What the threads of one run share: when to stop, what has happened, what went wrong.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// The state of one run.
#[derive(Default)]
pub struct Shared {
    /// The run is over.
    pub stop: AtomicBool,
    /// The measured window is open.
    pub measuring: AtomicBool,
    /// Bytes that have arrived where they should, of all streams.
    pub bytes: AtomicU64,
    /// Operations that are complete.
    pub ops: AtomicU64,
    /// Connections that are open and have exchanged something.
    pub open: AtomicUsize,
    failure: Mutex<Option<String>>,
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

    /// Counts bytes.
    pub fn add_bytes(&self, count: usize) {
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Counts an operation; true while the window is open.
    pub fn add_op(&self) -> bool {
        self.ops.fetch_add(1, Ordering::Relaxed);
        self.measuring.load(Ordering::Relaxed)
    }

    /// Ends the run with a failure. The first one is kept; what fails because the run is over does not count.
    pub fn fail(&self, why: impl ToString) {
        if let Ok(mut failure) = self.failure.lock()
            && !self.stopped()
        {
            failure.get_or_insert_with(|| why.to_string());
        }
        self.end();
    }

    /// The failure, where there is one.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().ok()?.clone()
    }
}
