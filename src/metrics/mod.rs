//! Statistics: what the daemon counts, the socket that reports it, and the `stats` command that shows it.
//!
//! ```text
//! counters     what is counted, by the data path, and the snapshot that is reported
//! prometheus   a snapshot in Prometheus' text format
//! json         a snapshot as JSON
//! socket       the stats socket of the daemon: one thread for all clients
//! table        the client: asks the socket for JSON and lays it out for a terminal
//! ```

use std::io;

use crate::syscalls::Syscall;

pub mod counters;
mod json;
mod prometheus;
pub mod socket;
pub mod table;
#[cfg(test)]
mod tests;

/// A text that is generated while it is written, in chunks of a few KiB at most.
type Chunks = Box<dyn Iterator<Item = io::Result<String>>>;

/// The system calls that reporting makes in a sandboxed daemon.
pub(crate) fn syscalls() -> Vec<Syscall> {
    [socket::SYSCALLS].concat()
}
