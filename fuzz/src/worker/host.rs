//! The sockets of the host that have a path. They are made once for all inputs of a thread.

use std::cell::Cell;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use tempfile::TempDir;
use vhost_user_vsock::host::entry::{Entry, EntrySocket};
use vhost_user_vsock::packet::header::PacketType;

/// How many host ports may have a listener, from 1 on.
pub(super) const PORTS: u8 = 4;

/// The types of sockets.
const TYPES: [PacketType; 2] = [PacketType::Stream, PacketType::Seqpacket];

/// The sockets of the host.
pub(super) struct Host {
    directory: TempDir,
    /// Where host programs connect.
    clients: Vec<UnixListener>,
    ports: Vec<Port>,
}

/// A host port. Its socket, which is of one of two types, has the path that the daemon expects only while a host program listens
/// there.
struct Port {
    path: PathBuf,
    /// Of each type, and where it is while nobody listens.
    listeners: Vec<(UnixListener, PathBuf)>,
    open: Cell<Option<PacketType>>,
}

impl Port {
    fn listener(&self, packet_type: PacketType) -> &(UnixListener, PathBuf) {
        &self.listeners[index(packet_type)]
    }
}

fn index(packet_type: PacketType) -> usize {
    usize::from(packet_type == PacketType::Seqpacket)
}

fn unix_socket(packet_type: PacketType) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let kind = [SockType::Stream, SockType::SeqPacket][index(packet_type)];
    Ok(socket(AddressFamily::Unix, kind, flags, None)?)
}

fn bound(packet_type: PacketType, path: &Path) -> UnixListener {
    let socket = unix_socket(packet_type).unwrap();
    bind(socket.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&socket, Backlog::MAXCONN).unwrap();
    socket.into()
}

impl Host {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let path = |name: String| directory.path().join(name);
        let clients = TYPES.map(|kind| bound(kind, &path(client_name(kind).into())));
        let port = |port: u8| Port {
            path: path(format!("vsock_{port}")),
            listeners: TYPES
                .map(|kind| {
                    let path = path(format!("closed_{port}_{kind:?}"));
                    (bound(kind, &path), path)
                })
                .into(),
            open: Cell::new(None),
        };
        Self {
            clients: clients.into(),
            ports: (1..=PORTS).map(port).collect(),
            directory,
        }
    }

    /// Calls `run` with sockets to which nobody is connected.
    pub(super) fn with<T>(run: impl FnOnce(&Self) -> T) -> T {
        thread_local! {
            static HOST: Host = Host::new();
        }
        HOST.with(|host| {
            host.clients.iter().for_each(drain);
            let listeners = host.ports.iter().flat_map(|port| &port.listeners);
            listeners.for_each(|(listener, _)| drain(listener));
            run(host)
        })
    }

    /// The path that the daemon is started with.
    pub(super) fn uds_path(&self) -> PathBuf {
        self.directory.path().join("vsock")
    }

    /// The daemon's listeners.
    pub(super) fn entries(&self) -> Vec<EntrySocket> {
        let entry =
            |listener: &UnixListener| EntrySocket::new(Entry::Host, listener.try_clone().unwrap());
        self.clients.iter().map(entry).collect()
    }

    /// Connects to the daemon.
    pub(super) fn connect(&self, packet_type: PacketType) -> io::Result<UnixStream> {
        let socket = unix_socket(packet_type)?;
        let path = self.directory.path().join(client_name(packet_type));
        // A full backlog is an error.
        connect(socket.as_raw_fd(), &UnixAddr::new(&path)?)?;
        Ok(socket.into())
    }

    /// A host program begins to listen at `port` for connections of this type, or nobody listens there any more.
    pub(super) fn listen(&self, port: u8, wanted: Option<PacketType>) {
        let port = self.port(port);
        let open = port.open.replace(wanted);
        if open == wanted {
            return;
        }
        if let Some(packet_type) = open {
            fs::rename(&port.path, &port.listener(packet_type).1).unwrap();
        }
        if let Some(packet_type) = wanted {
            fs::rename(&port.listener(packet_type).1, &port.path).unwrap();
        }
    }

    pub(super) fn listens(&self, port: u8, packet_type: PacketType) -> bool {
        self.port(port).open.get() == Some(packet_type)
    }

    /// The next connection of the daemon's to `port`.
    pub(super) fn accept(&self, port: u8, packet_type: PacketType) -> Option<UnixStream> {
        let (listener, _) = self.port(port).listener(packet_type);
        let (program, _) = listener.accept().ok()?;
        program.set_nonblocking(true).unwrap();
        Some(program)
    }

    fn port(&self, port: u8) -> &Port {
        &self.ports[usize::from(port - 1)]
    }
}

fn client_name(packet_type: PacketType) -> &'static str {
    ["vsock", "vsock_seqpacket"][index(packet_type)]
}

/// Closes the connections that nobody has accepted.
fn drain(listener: &UnixListener) {
    while listener.accept().is_ok() {}
}
