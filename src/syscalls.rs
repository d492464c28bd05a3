//! How a file of this crate says which system calls it makes, itself or by a library it drives.
//!
//! Each such file has its list beside its code; [`sandbox`](crate::daemon::sandbox) joins them, and all else ends the daemon.
//! The calls of the data path have no condition: of those the kernel remembers that they are allowed, and asks no more.

use libc::{c_int, c_long};

/// A system call that may be made. Listed twice, it may be made either way.
#[derive(Clone, Copy, Debug)]
pub struct Syscall {
    /// Its number.
    pub number: c_long,
    /// What its arguments must be, all of it. Without any, the call is free.
    pub arguments: &'static [Argument],
}

/// What an argument of a call must be. Only its lower 32 bits count, as in the kernel.
#[derive(Clone, Copy, Debug)]
pub enum Argument {
    /// The argument of this index is this number.
    Is(u8, c_int),
    /// Of the argument of this index, the bits of the mask are these.
    Bits {
        /// Which argument.
        index: u8,
        /// Which of its bits.
        mask: c_int,
        /// What they are.
        value: c_int,
    },
    /// The argument of this index is this process.
    Ourselves(u8),
}

/// What `mmap` and `mprotect` must not ask for: no memory ever becomes code.
pub const NOT_EXECUTABLE: &[Argument] = &[Argument::Bits {
    index: 2,
    mask: libc::PROT_EXEC,
    value: 0,
}];

impl Syscall {
    /// A call with whatever arguments.
    pub const fn any(number: c_long) -> Self {
        Self {
            number,
            arguments: &[],
        }
    }

    /// A call with such arguments only.
    pub const fn only(number: c_long, arguments: &'static [Argument]) -> Self {
        Self { number, arguments }
    }
}
