//! Notifications to the service manager (sd_notify(3)): readiness, a status line, the stop, and descriptors that it keeps.
//!
//! The protocol is one datagram for each message, to the socket that NOTIFY_SOCKET names. For example:
//!
//! ```text
//! READY=1
//! STATUS=A VMM is connected, with 3 connections
//! STATUS=2 of 3 VMMs are connected, with 5 connections
//! STOPPING=1
//! ```
//!
//! The manager keeps descriptors beyond the end of the process and passes them to the next (sd_pid_notify_with_fds(3)):
//!
//! ```text
//! FDSTORE=1              with the descriptor
//! FDNAME=handover-0
//! FDPOLL=0
//! ```

use std::env;
use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, Thread};
use std::time::Duration;

use log::{debug, warn};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use sd_notify::NotifyState;

use crate::syscalls::Syscall;

/// The system calls of this file that are made inside the sandbox.
pub(crate) fn syscalls() -> Vec<Syscall> {
    vec![
        Syscall::any(libc::SYS_sendto),
        Syscall::any(libc::SYS_clock_nanosleep),
    ]
}

/// Those to store descriptors.
pub(crate) const STORE_SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_sendmsg),
    Syscall::any(libc::SYS_sendto),
];

/// How long a message waits for room in the service manager's socket before it is dropped.
const SEND_TIMEOUT: Duration = Duration::from_millis(200);

/// The least time between two status lines.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// How many bits of a status have the number of connections.
const VMM_SHIFT: u32 = 40;

/// The connection to the service manager, if one has started the daemon. A clone is the same connection.
#[derive(Clone, Debug)]
pub struct ServiceManager {
    socket: Option<Arc<UnixDatagram>>,
    /// Whether it may keep descriptors.
    has_store: bool,
}

impl ServiceManager {
    /// Connects to the socket that NOTIFY_SOCKET names. This comes before the sandbox, which allows no datagram socket. If
    /// it fails, that is logged and nothing will be sent.
    pub fn from_env() -> Self {
        let path = env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty());
        let socket = path.and_then(|path| match connect(&path) {
            Ok(socket) => Some(Arc::new(socket)),
            Err(error) => {
                warn!("NOTIFY_SOCKET={}: {error}", path.display());
                None
            }
        });
        Self {
            socket,
            // How many it keeps. Older managers do not say.
            has_store: env::var_os("FDSTORE").is_none_or(|count| count != "0"),
        }
    }

    /// The manager that listens at this socket.
    #[cfg(test)]
    pub(super) fn at(path: &std::path::Path) -> Self {
        Self {
            socket: connect(path.as_os_str()).ok().map(Arc::new),
            has_store: true,
        }
    }

    /// Whether it keeps descriptors, as far as that is known.
    pub fn has_store(&self) -> bool {
        self.has_store && self.socket.is_some()
    }

    /// Gives it a descriptor to keep under a name. With `poll` it drops the descriptor when that has hung up.
    ///
    /// # Errors
    /// There is no manager, it does not read, or the system refuses.
    pub fn store(&self, name: &str, fd: BorrowedFd<'_>, poll: bool) -> io::Result<()> {
        let Some(socket) = &self.socket else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let poll = if poll { "" } else { "\nFDPOLL=0" };
        let text = format!("FDSTORE=1\nFDNAME={name}{poll}");
        let bytes = [IoSlice::new(text.as_bytes())];
        let fds = [fd.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        loop {
            match sendmsg::<()>(socket.as_raw_fd(), &bytes, &rights, flags, None) {
                Ok(_) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Makes it close all descriptors that it keeps under a name.
    ///
    /// # Errors
    /// There is no manager, it does not read, or the system refuses.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        let Some(socket) = &self.socket else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let text = format!("FDSTOREREMOVE=1\nFDNAME={name}");
        socket.send(text.as_bytes()).map(drop)
    }

    /// Sends READY, and starts a thread that sends a status line whenever the status changes. The process has `vms` VMs.
    pub fn ready(&self, vms: usize) -> io::Result<Status> {
        let Some(socket) = self.socket.clone() else {
            return Ok(Status(None));
        };
        send(&socket, &NotifyState::Ready);
        let current = Arc::new(AtomicU64::new(0));
        let source = current.clone();
        let thread = thread::Builder::new()
            .name("status".into())
            .spawn(move || send_changes(&socket, vms, &source))?;
        let thread = thread.thread().clone();
        Ok(Status(Some(Reporter { current, thread })))
    }

    /// Sends STOPPING.
    pub fn stopping(&self) {
        if let Some(socket) = &self.socket {
            send(socket, &NotifyState::Stopping);
        }
    }
}

/// Where the device reports its status for the service manager.
#[derive(Clone, Default)]
pub struct Status(Option<Reporter>);

#[derive(Clone)]
struct Reporter {
    /// The number of VMMs above [`VMM_SHIFT`], and that of connections below.
    current: Arc<AtomicU64>,
    /// The thread that sends it.
    thread: Thread,
}

impl Status {
    /// Reports how many VMMs are connected, and the number of connections.
    pub fn set(&self, vmms: usize, connections: usize) {
        let Some(reporter) = &self.0 else { return };
        let new = (vmms as u64) << VMM_SHIFT | connections as u64;
        if reporter.current.swap(new, Ordering::Relaxed) != new {
            reporter.thread.unpark();
        }
    }
}

/// Sends a line for each change, but not more often than every [`STATUS_INTERVAL`]. It never returns.
fn send_changes(socket: &UnixDatagram, vms: usize, current: &AtomicU64) {
    loop {
        let line = describe(vms, current.load(Ordering::Relaxed));
        send(socket, &NotifyState::Status(&line));
        thread::sleep(STATUS_INTERVAL);
        // A change during the sleep is sent without another one to wake this thread.
        if describe(vms, current.load(Ordering::Relaxed)) == line {
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

fn describe(vms: usize, status: u64) -> String {
    let (vmms, count) = (status >> VMM_SHIFT, status & ((1 << VMM_SHIFT) - 1));
    let connections = match count {
        1 => "1 connection".into(),
        count => format!("{count} connections"),
    };
    match (vms, vmms) {
        (1, 0) => "Waiting for a VMM".into(),
        (1, _) => format!("A VMM is connected, with {connections}"),
        (_, 0) => format!("Waiting for {vms} VMMs"),
        (_, 1) => format!("1 of {vms} VMMs is connected, with {connections}"),
        (_, vmms) => format!("{vmms} of {vms} VMMs are connected, with {connections}"),
    }
}

fn send(socket: &UnixDatagram, state: &NotifyState<'_>) {
    if let Err(error) = socket.send(state.to_string().as_bytes()) {
        debug!("the service manager was not notified: {error}");
    }
}
