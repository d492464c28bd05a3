//! The sockets of the host that have a path. They are made once for all inputs of a thread.

use std::cell::Cell;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use tempfile::TempDir;

/// How many host ports may have a listener, from 1 on.
pub(super) const PORTS: u8 = 4;

/// The sockets of the host.
pub(super) struct Host {
    directory: TempDir,
    /// Where host programs connect.
    clients: UnixListener,
    ports: Vec<Port>,
}

/// A host port. Its socket has the path that the daemon expects only while a host program listens there.
struct Port {
    listener: UnixListener,
    path: PathBuf,
    other_path: PathBuf,
    is_open: Cell<bool>,
}

impl Host {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let listen = |path: &Path| {
            let listener = UnixListener::bind(path).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        };
        let port = |port: u8| {
            let name = |name: &str| directory.path().join(format!("{name}_{port}"));
            let (path, other_path) = (name("vsock"), name("closed"));
            Port {
                listener: listen(&other_path),
                path,
                other_path,
                is_open: Cell::new(false),
            }
        };
        Self {
            clients: listen(&directory.path().join("vsock")),
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
            drain(&host.clients);
            host.ports.iter().for_each(|port| drain(&port.listener));
            run(host)
        })
    }

    /// The path that the daemon is started with.
    pub(super) fn uds_path(&self) -> PathBuf {
        self.directory.path().join("vsock")
    }

    /// The daemon's listener.
    pub(super) fn listener(&self) -> UnixListener {
        self.clients.try_clone().unwrap()
    }

    /// Connects to the daemon.
    pub(super) fn connect(&self) -> io::Result<UnixStream> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        // A full backlog is an error.
        connect(socket.as_raw_fd(), &UnixAddr::new(&self.uds_path())?)?;
        Ok(socket.into())
    }

    /// A host program begins to listen at `port`, or stops.
    pub(super) fn listen(&self, port: u8, wanted: bool) {
        let port = self.port(port);
        if port.is_open.replace(wanted) == wanted {
            return;
        }
        let (from, to) = if wanted {
            (&port.other_path, &port.path)
        } else {
            (&port.path, &port.other_path)
        };
        fs::rename(from, to).unwrap();
    }

    pub(super) fn listens(&self, port: u8) -> bool {
        self.port(port).is_open.get()
    }

    /// The next connection of the daemon's to `port`.
    pub(super) fn accept(&self, port: u8) -> Option<UnixStream> {
        let (program, _) = self.port(port).listener.accept().ok()?;
        program.set_nonblocking(true).unwrap();
        Some(program)
    }

    fn port(&self, port: u8) -> &Port {
        &self.ports[usize::from(port - 1)]
    }
}

/// Closes the connections that nobody has accepted.
fn drain(listener: &UnixListener) {
    while listener.accept().is_ok() {}
}
