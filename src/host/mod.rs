//! The host's side: everything that is not the guest.
//!
//! ```text
//! entry          what is behind each of the sockets that the daemon listens on
//! listener       the sockets that the daemon makes, and their files
//! socket         the host's end of a connection
//! dialer         connects to host programs
//! vsock          the host's own AF_VSOCK
//! relay          messages between AF_VSOCK and a worker
//! connect_line   CONNECT and OK
//! routes         where a guest's connection leads
//! siblings       guests that reach each other
//! ```

pub mod connect_line;
pub mod dialer;
pub mod entry;
pub mod listener;
pub mod relay;
pub mod routes;
pub mod siblings;
pub mod socket;
pub mod vsock;

use crate::syscalls::Syscall;

/// The system calls of these files, but for those of [`siblings`] and [`vsock`], which not every process makes.
pub(crate) fn syscalls() -> Vec<Syscall> {
    [
        &listener::syscalls(),
        dialer::SYSCALLS,
        routes::SYSCALLS,
        socket::SYSCALLS,
    ]
    .concat()
}
