//! How a module lists the system calls that it makes, itself or through a library that it drives.
//!
//! Each module that is used inside the sandbox has such a list beside its code. The server hands all of them to
//! [`sandbox`](crate::daemon::sandbox); a call that is not listed ends the daemon. The calls of the data path are listed
//! without conditions on their arguments: the kernel keeps a bitmap of those and does not run the filter for them.

use libc::{c_int, c_long};

/// A system call that may be made. If it is listed more than once, the conditions of one entry must hold.
#[derive(Clone, Copy, Debug)]
pub struct Syscall {
    /// Its number.
    pub number: c_long,
    /// Conditions on its arguments, all of which must hold.
    pub arguments: &'static [Argument],
}

/// A condition on an argument of a system call. Only the argument's lower 32 bits are compared.
#[derive(Clone, Copy, Debug)]
pub enum Argument {
    /// The argument of this index has this value.
    Is(u8, c_int),
    /// The argument, masked, has this value.
    Bits {
        /// The argument's index.
        index: u8,
        /// The bits that are compared.
        mask: c_int,
        /// Their value.
        value: c_int,
    },
    /// The argument of this index is the id of this process.
    OwnPid(u8),
}

/// The condition for `mmap` and `mprotect`: memory does not become executable.
pub const NOT_EXECUTABLE: &[Argument] = &[Argument::Bits {
    index: 2,
    mask: libc::PROT_EXEC,
    value: 0,
}];

impl Syscall {
    /// A call with any arguments.
    pub const fn any(number: c_long) -> Self {
        Self {
            number,
            arguments: &[],
        }
    }

    /// A call whose arguments meet all of these conditions.
    pub const fn only(number: c_long, arguments: &'static [Argument]) -> Self {
        Self { number, arguments }
    }
}
