//! What is fuzzed, and what must hold then.
//!
//! Each target takes any bytes, makes of them what a guest, a host program or a VMM may do, does it to the library, and
//! panics when the outcome is not what a plain model says. `cargo fuzz` looks for such bytes; the test `fuzz_corpus` runs
//! the same code with the bytes that it has found, and with a few random ones.
//!
//! ```text
//! packet       descriptor chains in any guest memory, beside a plain reading of the same bytes
//! handshake    the CONNECT line in any pieces
//! connection   one connection, its guest and its host program       guest: the packets of a guest
//! worker       the whole worker: rings, kicks, interrupts, sockets   worker/: what both sides may do, and were promised
//! memory, ring     guest memory that shows what was done to it, and the driver's side of a ring
//! stream           bytes that say where they belong
//! ```

use std::fmt::Debug;

pub mod connection;
pub mod guest;
pub mod handshake;
pub mod memory;
pub mod packet;
pub mod ring;
pub mod shutdown;
pub mod stream;
pub mod worker;

/// Says what is done next, when `FUZZ_SHOW` is set: what an input means is not to be seen from its bytes.
fn show(step: &impl Debug) {
    if std::env::var_os("FUZZ_SHOW").is_some() {
        eprintln!("{step:?}");
    }
}

/// What runs a target with an input.
pub type Target = fn(&[u8]);

/// All targets, and their names, which those of their corpora are too.
pub const TARGETS: [(&str, Target); 4] = [
    ("packet", packet::run),
    ("handshake", handshake::run),
    ("connection", connection::run),
    ("worker", worker::run),
];
