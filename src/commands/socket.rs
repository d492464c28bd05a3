//! Connecting to a Unix socket, in bounded time.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect as connect_to, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// Connects to the socket at `path`. A server whose backlog is full gets so much time to accept, or any time. Sending on the
/// stream takes no longer either.
///
/// # Errors
/// `WouldBlock` when the time is over, or what the system says.
pub(super) fn connect(path: &Path, limit: Option<Duration>) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    if let Some(limit) = limit {
        // It is `connect`'s as well. 0 would mean no limit.
        let limit = i64::try_from(limit.as_micros()).unwrap_or(i64::MAX);
        setsockopt(
            &socket,
            sockopt::SendTimeout,
            &TimeVal::microseconds(limit.max(1)),
        )?;
    }
    connect_to(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}
