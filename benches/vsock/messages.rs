//! Host programs that exchange messages with the guest, on Unix sockets of the type SOCK_SEQPACKET. Each read and write is one
//! message.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect as connect_to,
    listen as listen_on, socket, socketpair,
};

use crate::host::{accept, text};
use crate::pattern::Checker;
use crate::shared::Shared;

/// More than any message here has, so that a longer one would show.
const READ_SIZE: usize = 128 * 1024;
/// The longest `OK <port>\n`.
const REPLY_LEN: usize = 32;

/// Listens at `path`.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket = seqpacket()?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen_on(&socket, Backlog::new(1)?)?;
    Ok(socket.into())
}

/// Connects to a port of the guest.
pub fn connect(uds_path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut path = uds_path.as_os_str().to_owned();
    path.push("_seqpacket");
    let socket = seqpacket()?;
    connect_to(socket.as_raw_fd(), &UnixAddr::new(Path::new(&path))?)?;
    let mut socket = UnixStream::from(socket);
    socket.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut reply = [0; REPLY_LEN];
    let len = socket.read(&mut reply)?;
    if reply[..len].starts_with(b"OK ") {
        Ok(socket)
    } else {
        Err(io::Error::other("no OK after CONNECT"))
    }
}

/// Two sockets that are connected to each other.
pub fn pair() -> io::Result<(UnixStream, UnixStream)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (one, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    Ok((one.into(), other.into()))
}

/// Accepts a connection and drains it.
pub fn accept_and_drain(
    listener: &UnixListener,
    size: usize,
    shared: &Shared,
) -> Result<(), String> {
    match accept(listener, shared)? {
        Some(socket) => drain(socket, size, shared),
        None => Ok(()),
    }
}

/// Reads and checks messages of `size` bytes until the run is over.
pub fn drain(mut socket: UnixStream, size: usize, shared: &Shared) -> Result<(), String> {
    let mut checker = Checker::new(size);
    let mut buffer = vec![0; READ_SIZE];
    while !shared.stopped() {
        let len = socket.read(&mut buffer).map_err(text)?;
        if len != size {
            return Err(format!("a message of {len} bytes to the host"));
        }
        checker.check(&buffer[..len])?;
        shared.add_to_host(len);
    }
    Ok(())
}

fn seqpacket() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
}
