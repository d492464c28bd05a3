//! What the service manager is told (sd_notify(3)): that the daemon is ready, what it does, and that it stops.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, Thread};
use std::time::Duration;

use log::{debug, warn};
use sd_notify::NotifyState;

use crate::syscalls::Syscall;

/// To send to the socket that is connected before the sandbox, and not too often.
pub(crate) const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_sendto),
    Syscall::any(libc::SYS_clock_nanosleep),
];

/// How long a service manager may take to make room for a message.
const PATIENCE: Duration = Duration::from_millis(200);

/// The least time between two status lines.
const STATUS_PAUSE: Duration = Duration::from_secs(1);

/// The service manager that has started the daemon, if one has.
pub struct ServiceManager(Option<Arc<UnixDatagram>>);

impl ServiceManager {
    /// The one that the environment names. Its socket is connected now: it can't be reached from within the sandbox. One
    /// that is not there is told nothing.
    pub fn from_env() -> Self {
        let path = env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty());
        Self(path.and_then(|path| match connect(&path) {
            Ok(socket) => Some(Arc::new(socket)),
            Err(error) => {
                warn!("NOTIFY_SOCKET={}: {error}", path.display());
                None
            }
        }))
    }

    /// Says that both sockets listen, and starts a thread that says what the daemon does.
    pub fn ready(&self) -> io::Result<Status> {
        let Some(socket) = self.0.clone() else {
            return Ok(Status(None));
        };
        tell(&socket, &NotifyState::Ready);
        let now = Arc::new(AtomicU64::new(0));
        let told = now.clone();
        let thread = thread::Builder::new()
            .name("status".into())
            .spawn(move || {
                loop {
                    let line = describe(told.load(Ordering::Relaxed));
                    tell(&socket, &NotifyState::Status(&line));
                    thread::sleep(STATUS_PAUSE);
                    // What came meanwhile does not wait for a next change.
                    if describe(told.load(Ordering::Relaxed)) == line {
                        thread::park();
                    }
                }
            })?;
        let thread = thread.thread().clone();
        Ok(Status(Some(Watched { now, thread })))
    }

    /// Says that the daemon stops.
    pub fn stopping(&self) {
        if let Some(socket) = &self.0 {
            tell(socket, &NotifyState::Stopping);
        }
    }
}

/// What the daemon does at the moment, for a service manager that wants to know.
#[derive(Clone, Default)]
pub struct Status(Option<Watched>);

#[derive(Clone)]
struct Watched {
    /// Twice the number of connections, and one more with a VMM.
    now: Arc<AtomicU64>,
    thread: Thread,
}

impl Status {
    /// Takes whether there is a VMM, and the number of connections.
    pub fn set(&self, has_vmm: bool, connections: usize) {
        let Some(watched) = &self.0 else { return };
        let new = connections as u64 * 2 + u64::from(has_vmm);
        if watched.now.swap(new, Ordering::Relaxed) != new {
            watched.thread.unpark();
        }
    }
}

fn connect(path: &OsStr) -> io::Result<UnixDatagram> {
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn describe(status: u64) -> String {
    match (status % 2 == 1, status / 2) {
        (false, _) => "Waiting for a VMM".into(),
        (true, 1) => "A VMM is connected, with 1 connection".into(),
        (true, count) => format!("A VMM is connected, with {count} connections"),
    }
}

fn tell(socket: &UnixDatagram, state: &NotifyState<'_>) {
    if let Err(error) = socket.send(state.to_string().as_bytes()) {
        debug!("the service manager was not told: {error}");
    }
}
