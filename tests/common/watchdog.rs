//! Kills a process group if the test process dies.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// Kills a process group if this process ends without running destructors. It is in a group of its own, out of reach of
/// Ctrl-C.
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

    /// Stops watching. Call it before the group is killed: its id may be reused afterwards.
    pub fn dismiss(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
