//! Connecting to a Unix socket, in bounded time.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, bind, connect as connect_to, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// Connects to the socket at `path`. A server whose backlog is full gets so much time to accept, or any time. Sending on the
/// stream takes no longer either.
///
/// # Errors
/// `WouldBlock` when the time is over, or what the system says.
pub(super) fn connect(path: &Path, limit: Option<Duration>) -> io::Result<UnixStream> {
    connect_from(new()?, path, limit)
}

/// The same, from a socket whose abstract name begins so (unix(7)), if the system allows it.
///
/// # Errors
/// As above.
pub(super) fn connect_as(
    name: &str,
    path: &Path,
    limit: Option<Duration>,
) -> io::Result<UnixStream> {
    let socket = new()?;
    // Every socket needs a name of its own.
    let name = format!("{name}{:016x}", RandomState::new().build_hasher().finish());
    if let Ok(name) = UnixAddr::new_abstract(name.as_bytes()) {
        let _ = bind(socket.as_raw_fd(), &name);
    }
    connect_from(socket, path, limit)
}

fn new() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    Ok(socket(AddressFamily::Unix, SockType::Stream, flags, None)?)
}

fn connect_from(socket: OwnedFd, path: &Path, limit: Option<Duration>) -> io::Result<UnixStream> {
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
