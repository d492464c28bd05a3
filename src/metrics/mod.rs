//! Statistics: what the daemon counts, and the socket that reports it.
//!
//! ```text
//! counters     what is counted, by the data path, and the snapshot that is reported
//! prometheus   a snapshot in Prometheus' text format
//! json         a snapshot as JSON
//! socket       the stats socket of the daemon: one thread for all clients
//! ```

use std::io;

use crate::syscalls::Syscall;

pub mod counters;
pub mod json;
pub mod prometheus;
pub mod socket;
#[cfg(test)]
mod tests;

/// A text that is generated while it is written, in chunks of a few KiB at most.
type Chunks = Box<dyn Iterator<Item = io::Result<String>>>;

/// The system calls that reporting makes in a sandboxed daemon.
pub(crate) fn syscalls() -> Vec<Syscall> {
    [socket::SYSCALLS].concat()
}
