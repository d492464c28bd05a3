//! The fuzz targets and their models.
//!
//! A target makes of its input what a guest, a host program or a VMM may do, does it to the library, and panics where the
//! outcome is not what a plain model of the specification says. `cargo fuzz` searches for such inputs. The test
//! `fuzz_corpus` runs the same code on a stable toolchain, with the inputs in `fuzz/corpus` and with random ones.
//!
//! ```text
//! packet         descriptor chains in any guest memory, beside a plain reading of the same bytes
//! connect_line   CONNECT and OK in any pieces, beside a parser that has the whole line
//! connection     one connection, with its guest and its host program
//! worker         the worker, with the rings of a guest and the sockets of host programs
//!
//! memory         guest memory that shows every write of the device's
//! ring           the driver's side of a ring
//! guest          a driver's side of both rings, for a target that has no worker
//! stream         bytes that tell where they belong, and sockets for them
//! borders        where the messages among them end
//! shutdown       what a SHUTDOWN may say
//! ```

use std::fmt::Debug;
use std::sync::LazyLock;

pub mod borders;
pub mod connect_line;
pub mod connection;
pub mod guest;
pub mod memory;
pub mod packet;
pub mod ring;
pub mod shutdown;
pub mod stream;
pub mod worker;

/// `FUZZ_SHOW` is set.
static SHOW: LazyLock<bool> = LazyLock::new(|| std::env::var_os("FUZZ_SHOW").is_some());

/// Prints a step of an input when `FUZZ_SHOW` is set: the bytes of an input do not show what it means.
fn show(step: &impl Debug) {
    if *SHOW {
        eprintln!("{step:?}");
    }
}

/// Runs a target with an input.
pub type Target = fn(&[u8]);

/// All targets with their names, which are those of their corpora too.
pub const TARGETS: [(&str, Target); 4] = [
    ("packet", packet::run),
    ("connect_line", connect_line::run),
    ("connection", connection::run),
    ("worker", worker::run),
];
