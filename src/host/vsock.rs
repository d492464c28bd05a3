//! The host's own AF_VSOCK (vsock(7)), for a VM whose connections are forwarded there.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, VsockAddr, bind, connect, listen, socket,
};

use super::relay;
use super::socket::{HostSocket, socket_type};
use crate::packet::header::{PacketType, PeerPort};
use crate::syscalls::{Argument, Syscall};

const FLAGS: SockFlag = SockFlag::SOCK_NONBLOCK.union(SockFlag::SOCK_CLOEXEC);

/// To connect. Only for daemons that forward: they are not among the calls of the other files here.
pub(crate) const SYSCALLS: &[Syscall] = &[
    Syscall::only(libc::SYS_socket, &vsock_socket(libc::SOCK_STREAM)),
    Syscall::only(libc::SYS_socket, &vsock_socket(libc::SOCK_SEQPACKET)),
    relay::PAIR,
    Syscall::any(libc::SYS_connect),
    Syscall::any(libc::SYS_close),
];

const fn vsock_socket(kind: libc::c_int) -> [Argument; 2] {
    [
        Argument::Is(0, libc::AF_VSOCK),
        Argument::Is(1, kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC),
    ]
}

/// Begins to connect a stream to `port` of `cid`. The socket becomes writable when it is connected, and
/// [`HostSocket::connect_result`] tells whether it is.
pub fn begin_connect(cid: u32, port: PeerPort) -> io::Result<HostSocket> {
    let socket = new_socket(PacketType::Stream)?;
    match connect(socket.as_raw_fd(), &VsockAddr::new(cid, port.0)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(HostSocket::vsock(PacketType::Stream, socket)),
        Err(error) => Err(error.into()),
    }
}

/// Connects a socket of messages to `port` of `cid`, and waits for that, as all its calls may. Linux gives up after 2 s.
pub(super) fn connect_waiting(cid: u32, port: PeerPort) -> io::Result<OwnedFd> {
    let socket = relay::waiting(new_socket(PacketType::Seqpacket)?)?;
    connect(socket.as_raw_fd(), &VsockAddr::new(cid, port.0))?;
    Ok(socket)
}

/// Fails where the kernel has no AF_VSOCK, and no module for it.
pub fn check() -> io::Result<()> {
    new_socket(PacketType::Stream).map(drop)
}

/// Listens on `port`, whichever CID of the host's is dialed.
pub fn listen_on(port: u32, packet_type: PacketType) -> io::Result<OwnedFd> {
    let socket = new_socket(packet_type)?;
    bind(
        socket.as_raw_fd(),
        &VsockAddr::new(libc::VMADDR_CID_ANY, port),
    )?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(socket)
}

fn new_socket(packet_type: PacketType) -> io::Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Vsock,
        socket_type(packet_type),
        FLAGS,
        None,
    )?)
}
