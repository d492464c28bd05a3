//! The host's own AF_VSOCK (vsock(7)), for a VM whose connections are forwarded there.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, VsockAddr, bind, connect, listen, socket,
};

use super::listener::{ListenerState, LoadedListeners};
use super::relay;
use super::socket::{HostSocket, socket_type};
use crate::config::VsockPort;
use crate::packet::header::{PacketType, PeerPort};
use crate::saved::Saver;
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

/// A listening, non-blocking socket of AF_VSOCK.
#[derive(Debug)]
pub struct VsockListener(OwnedFd);

impl VsockListener {
    /// Listens on a port, whichever CID of the host's is dialed. Where a predecessor listens there for connections of this type,
    /// its socket goes on.
    pub fn bind_or_adopt(at: &VsockPort, loaded: &mut LoadedListeners) -> io::Result<Self> {
        if let Some(socket) = loaded.take_vsock(at.port, at.packet_type) {
            return Ok(Self(socket));
        }
        let socket = new_socket(at.packet_type)?;
        bind(
            socket.as_raw_fd(),
            &VsockAddr::new(libc::VMADDR_CID_ANY, at.port),
        )?;
        listen(&socket, Backlog::MAXCONN)?;
        Ok(Self(socket))
    }

    /// A duplicate of the socket.
    pub fn socket(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// Saves the socket.
    pub(crate) fn save<'a>(&'a self, saver: &mut Saver<'a>) -> ListenerState {
        ListenerState::Vsock {
            vsock: saver.fd(self.0.as_fd()),
        }
    }
}

fn new_socket(packet_type: PacketType) -> io::Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Vsock,
        socket_type(packet_type),
        FLAGS,
        None,
    )?)
}
