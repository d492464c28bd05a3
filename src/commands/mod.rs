//! The subcommands of the binary. They are clients of running daemons, and know of a daemon only what any client knows: the
//! CONNECT line, and the formats of its statistics.
//!
//! ```text
//! connect   joins standard input and output to a port of the guest   (+ join: moves the bytes)
//! list      one line for each VM of all daemons
//! stats     the statistics of one daemon, or of all of them          (+ output: a file that is replaced)
//! page      the statistics as a text for a terminal
//! query     asks daemons for their statistics
//! socket    connects to a Unix socket, in bounded time
//! ```

pub mod connect;
pub mod list;
mod page;
mod query;
mod socket;
pub mod stats;
