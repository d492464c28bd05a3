//! What ends a process group when the test itself can no longer.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// Kills a process group when this process ends in a way that drops nothing. It stands in a group of its own: an interrupt
/// from the terminal does not reach it.
pub struct Watchdog(Child);

impl Watchdog {
    /// Watches over the process group `group`.
    pub fn start(group: u32) -> Self {
        let child = Command::new("sh")
            // Its standard input ends with this process.
            .args(["-c", "read -r _; kill -s KILL -- -$1", "sh"])
            .arg(group.to_string())
            .process_group(0)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// Watches no more. To be called before the group's end: the watchdog must not meet a new owner of its id.
    pub fn dismiss(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
