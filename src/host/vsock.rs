//! The host's own AF_VSOCK (vsock(7)), for a VM whose connections are forwarded there.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, listen, socket,
};

use super::socket::HostSocket;
use crate::packet::header::PeerPort;
use crate::syscalls::{Argument, Syscall};

const FLAGS: SockFlag = SockFlag::SOCK_NONBLOCK.union(SockFlag::SOCK_CLOEXEC);

/// To connect. Only for daemons that forward: they are not among the calls of the other files here.
pub(crate) const SYSCALLS: &[Syscall] = &[
    Syscall::only(
        libc::SYS_socket,
        &[
            Argument::Is(0, libc::AF_VSOCK),
            Argument::Is(
                1,
                libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            ),
        ],
    ),
    Syscall::any(libc::SYS_connect),
    Syscall::any(libc::SYS_close),
];

/// Begins to connect to `port` of `cid`. The socket becomes writable when it is connected, and
/// [`HostSocket::connect_result`] tells whether it is.
pub fn begin_connect(cid: u32, port: PeerPort) -> io::Result<HostSocket> {
    let socket = new_socket()?;
    match connect(socket.as_raw_fd(), &VsockAddr::new(cid, port.0)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(HostSocket::vsock(socket)),
        Err(error) => Err(error.into()),
    }
}

/// Fails where the kernel has no AF_VSOCK, and no module for it.
pub fn check() -> io::Result<()> {
    new_socket().map(drop)
}

/// Listens on `port`, whichever CID of the host's is dialed.
pub fn listen_on(port: u32) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    bind(
        socket.as_raw_fd(),
        &VsockAddr::new(libc::VMADDR_CID_ANY, port),
    )?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(socket)
}

fn new_socket() -> io::Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Vsock,
        SockType::Stream,
        FLAGS,
        None,
    )?)
}
