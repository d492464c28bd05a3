//! Notifications to the service manager (sd_notify(3)): readiness, a status line, and the stop.
//!
//! The protocol is one datagram for each message, to the socket that NOTIFY_SOCKET names. For example:
//!
//! ```text
//! READY=1
//! STATUS=A VMM is connected, with 3 connections
//! STOPPING=1
//! ```

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

/// The system calls of this file that are made inside the sandbox.
pub(crate) fn syscalls() -> Vec<Syscall> {
    vec![
        Syscall::any(libc::SYS_sendto),
        Syscall::any(libc::SYS_clock_nanosleep),
    ]
}

/// How long a message waits for room in the service manager's socket before it is dropped.
const SEND_TIMEOUT: Duration = Duration::from_millis(200);

/// The least time between two status lines.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// The connection to the service manager, if one has started the daemon.
pub struct ServiceManager(Option<Arc<UnixDatagram>>);

impl ServiceManager {
    /// Connects to the socket that NOTIFY_SOCKET names. This comes before the sandbox, which allows no datagram socket. If
    /// it fails, that is logged and nothing will be sent.
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

    /// Sends READY, and starts a thread that sends a status line whenever the status changes.
    pub fn ready(&self) -> io::Result<Status> {
        let Some(socket) = self.0.clone() else {
            return Ok(Status(None));
        };
        send(&socket, &NotifyState::Ready);
        let current = Arc::new(AtomicU64::new(0));
        let source = current.clone();
        let thread = thread::Builder::new()
            .name("status".into())
            .spawn(move || send_changes(&socket, &source))?;
        let thread = thread.thread().clone();
        Ok(Status(Some(Reporter { current, thread })))
    }

    /// Sends STOPPING.
    pub fn stopping(&self) {
        if let Some(socket) = &self.0 {
            send(socket, &NotifyState::Stopping);
        }
    }
}

/// Where the device reports its status for the service manager.
#[derive(Clone, Default)]
pub struct Status(Option<Reporter>);

#[derive(Clone)]
struct Reporter {
    /// Bit 0: a VMM is connected. The others: the number of connections.
    current: Arc<AtomicU64>,
    /// The thread that sends it.
    thread: Thread,
}

impl Status {
    /// Reports whether a VMM is connected, and the number of connections.
    pub fn set(&self, has_vmm: bool, connections: usize) {
        let Some(reporter) = &self.0 else { return };
        let new = connections as u64 * 2 + u64::from(has_vmm);
        if reporter.current.swap(new, Ordering::Relaxed) != new {
            reporter.thread.unpark();
        }
    }
}

/// Sends a line for each change, but not more often than every [`STATUS_INTERVAL`]. It never returns.
fn send_changes(socket: &UnixDatagram, current: &AtomicU64) {
    loop {
        let line = describe(current.load(Ordering::Relaxed));
        send(socket, &NotifyState::Status(&line));
        thread::sleep(STATUS_INTERVAL);
        // A change during the sleep is sent without another one to wake this thread.
        if describe(current.load(Ordering::Relaxed)) == line {
            thread::park();
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
    socket.set_write_timeout(Some(SEND_TIMEOUT))?;
    Ok(socket)
}

fn describe(status: u64) -> String {
    match (status % 2 == 1, status / 2) {
        (false, _) => "Waiting for a VMM".into(),
        (true, 1) => "A VMM is connected, with 1 connection".into(),
        (true, count) => format!("A VMM is connected, with {count} connections"),
    }
}

fn send(socket: &UnixDatagram, state: &NotifyState<'_>) {
    if let Err(error) = socket.send(state.to_string().as_bytes()) {
        debug!("the service manager was not notified: {error}");
    }
}
