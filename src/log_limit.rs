//! Keeps a guest, or a host program, from filling the log.

use std::time::{Duration, Instant};

/// The least time between two lines about the same thing.
const PAUSE: Duration = Duration::from_secs(1);

/// Lets one line a second through.
#[derive(Debug, Default)]
pub struct LogLimit(Option<Instant>);

impl LogLimit {
    /// Calls `log` unless it was called less than a second ago.
    pub fn log(&mut self, log: impl FnOnce()) {
        let now = Instant::now();
        if self.0.is_none_or(|last| now - last >= PAUSE) {
            self.0 = Some(now);
            log();
        }
    }
}
