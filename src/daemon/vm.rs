//! One VM: its sockets, its device, and the two threads that serve it.
//!
//! The *session* thread accepts a VMM and handles its messages, one VMM after the other. The *worker* thread moves the
//! packets. The first may wait for a VMM that has sent half a message, so it is ended by shutting that VMM's socket down.

mod placeholder;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use log::{info, warn};
use nix::poll::{PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;
use thiserror::Error;

pub(super) use self::placeholder::*;
use super::threads::{Naming, Threads, VmThreads, wait_readable};
use crate::config::{
    ConfigError, HostSide, ProcessConfig, Sandbox, Socket, VmConfig, VsockPort, sibling_path,
};
use crate::host::entry::{Entry, EntrySocket};
use crate::host::listener::{Inherited, ListenerError, LoadedListeners, SocketFile};
use crate::host::siblings::Siblings;
use crate::host::vsock;
use crate::packet::header::{Cid, GuestPort, PacketType};
use crate::syscalls::Syscall;
use crate::vhu_vsock::session::Session;
use crate::vhu_vsock::{Activity, VhostUserVsockBackend};

/// To wait for a VMM, and for the end.
pub(super) const SYSCALLS: &[Syscall] = &[
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_poll),
    Syscall::any(libc::SYS_ppoll),
    Syscall::any(libc::SYS_restart_syscall),
    Syscall::any(libc::SYS_write),
    Syscall::any(libc::SYS_read),
];

/// How long no VMM is accepted after an error, in milliseconds.
const ACCEPT_PAUSE: u16 = 100;

/// How long a VM's threads may take to end.
const STOP_TIMEOUT: Duration = Duration::from_millis(700);

/// How long the directories of all sockets together may be locked by others when the sockets are removed.
pub(super) const LOCK_TIMEOUT: Duration = Duration::from_millis(200);

/// Why a VM can't be served.
#[derive(Debug, Error)]
pub enum VmError {
    /// Its configuration can't work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A socket can't be made.
    #[error(transparent)]
    Listener(#[from] ListenerError),
    /// The system refused something that every VM needs.
    #[error("can't serve: {0}")]
    Io(#[from] io::Error),
}

/// A VM whose sockets exist, and that is not served yet.
pub(super) struct BoundVm {
    cid: Cid,
    vmm: VmmSocket,
    /// Held for their files.
    files: Vec<SocketFile>,
    device: Arc<VhostUserVsockBackend>,
    stop: Arc<Stop>,
}

/// Where VMMs come from.
enum VmmSocket {
    Listener(SocketFile),
    /// This is the only one.
    Connected(UnixStream),
}

impl BoundVm {
    /// Makes the sockets of a VM, which joins `siblings`, or adopts those that a predecessor had. `observer` gets its activity.
    pub(super) fn new(
        config: &VmConfig,
        siblings: &Arc<Siblings>,
        loaded: &mut LoadedListeners,
        observer: impl Fn(Activity) + Send + Sync + 'static,
    ) -> Result<Self, VmError> {
        let vmm = match &config.socket {
            Socket::Path(path) => {
                let socket =
                    SocketFile::bind_or_adopt(path, PacketType::Stream, config.access, loaded)?;
                VmmSocket::Listener(socket)
            }
            Socket::Inherited(fd) => match Inherited::take(*fd)? {
                Inherited::Listener(listener) => VmmSocket::Listener(SocketFile::foreign(listener)),
                Inherited::Stream(vmm) => VmmSocket::Connected(vmm),
            },
        };
        let mut files = Vec::new();
        let mut entries = listen_on_vsock(config)?;
        for (entry, file) in bind_entries(config, loaded)? {
            entries.push(EntrySocket::new(entry, file.listener()?));
            files.push(file);
        }
        let device = VhostUserVsockBackend::new(config, entries, siblings, observer)?;
        Ok(Self {
            cid: config.guest_cid,
            vmm,
            files,
            device: Arc::new(device),
            stop: Arc::new(Stop::new()?),
        })
    }

    /// The guest's CID.
    pub(super) fn cid(&self) -> Cid {
        self.cid
    }

    /// Starts to serve.
    pub(super) fn start(self, threads: Arc<Threads>) -> Result<Vm, VmError> {
        let (device, stop) = (self.device.clone(), self.stop.clone());
        let threads = VmThreads::new(threads, self.cid, move || {
            stop.request();
            device.stop();
        });
        let device = self.device.clone();
        threads.spawn("worker", move || device.run())?;
        let (device, stop) = (self.device.clone(), self.stop.clone());
        let socket = match self.vmm {
            VmmSocket::Listener(socket) => {
                let listener = socket.listener()?;
                listener.set_nonblocking(true)?;
                threads.spawn("session", move || {
                    serve_vmms(&listener, &device, &stop);
                    device.stop();
                })?;
                Some(socket)
            }
            VmmSocket::Connected(vmm) => {
                // Whoever has made it may have meant it for an event loop.
                vmm.set_nonblocking(false)?;
                threads.spawn("session", move || {
                    serve_vmm(vmm, &device, &stop);
                    device.stop();
                })?;
                None
            }
        };
        Ok(Vm {
            cid: self.cid,
            sockets: Some((socket, self.files)),
            device: self.device,
            stop: self.stop,
            threads,
        })
    }
}

/// Listens on the ports of AF_VSOCK that lead to the guest.
fn listen_on_vsock(config: &VmConfig) -> Result<Vec<EntrySocket>, ListenerError> {
    let HostSide::Vsock { listen, .. } = &config.host else {
        return Ok(Vec::new());
    };
    vsock::check().map_err(ListenerError::NoVsock)?;
    let listen_on = |at: &VsockPort| match vsock::listen_on(at.port, at.packet_type) {
        Ok(listener) => Ok(EntrySocket::new(Entry::Vsock(GuestPort(at.port)), listener)),
        Err(error) => Err(ListenerError::Vsock(at.port, error)),
    };
    listen.iter().map(listen_on).collect()
}

/// Makes the listening Unix sockets through which a guest is reached.
fn bind_entries(
    config: &VmConfig,
    loaded: &mut LoadedListeners,
) -> Result<Vec<(Entry, SocketFile)>, ListenerError> {
    let mut entries = Vec::new();
    let mut bind = |path: &Path, packet_type| {
        SocketFile::bind_or_adopt(path, packet_type, config.access, loaded)
    };
    if let HostSide::Unix { path, fd } = &config.host {
        let file = match fd {
            Some(fd) => SocketFile::foreign(Inherited::take_listener(*fd)?),
            None => bind(path, PacketType::Stream)?,
        };
        entries.push((Entry::Host, file));
    }
    if let Some(path) = config.seqpacket_path() {
        entries.push((Entry::Host, bind(&path, PacketType::Seqpacket)?));
    }
    for port in &config.guest_ports {
        let file = bind(&port.path, port.packet_type)?;
        entries.push((Entry::Port(GuestPort(port.port)), file));
    }
    for (index, directory) in config.sibling_dirs.iter().enumerate() {
        for packet_type in config.packet_types() {
            let path = sibling_path(directory, config.guest_cid, packet_type);
            entries.push((Entry::Sibling(index), bind(&path, packet_type)?));
        }
    }
    Ok(entries)
}

/// A VM that is served. When this is dropped, it no longer is.
pub struct Vm {
    cid: Cid,
    /// Held for their files.
    sockets: Option<(Option<SocketFile>, Vec<SocketFile>)>,
    device: Arc<VhostUserVsockBackend>,
    stop: Arc<Stop>,
    threads: Arc<VmThreads>,
}

impl Vm {
    /// Makes the sockets of a VM and serves it, in two threads, and a third while a VMM is connected. There is no sandbox: that is
    /// for a process of its own. The third thread interrupts the others with SIGURG where a VMM blocks them, and installs a
    /// handler for that signal.
    ///
    /// # Errors
    /// The configuration can't work, a socket can't be made, or the system has no threads or descriptors left.
    pub fn start(config: &VmConfig) -> Result<Self, VmError> {
        let process = ProcessConfig {
            access: config.access,
            sandbox: Sandbox::Off,
            ..ProcessConfig::new(vec![config.clone()])
        };
        process.check()?;
        BoundVm::new(
            config,
            &Arc::default(),
            &mut LoadedListeners::default(),
            |_| {},
        )?
        .start(Threads::new(Naming::Off)?)
    }

    /// Its device, for statistics for as long as the process runs.
    pub(super) fn device(&self) -> Arc<VhostUserVsockBackend> {
        self.device.clone()
    }

    /// The guest's CID.
    pub(super) fn cid(&self) -> Cid {
        self.cid
    }

    /// Whether nobody serves it any more.
    pub(super) fn has_ended(&self) -> bool {
        self.has_panicked() || self.have_ended()
    }

    /// Whether its threads have ended.
    pub(super) fn have_ended(&self) -> bool {
        self.threads.have_ended()
    }

    /// Leaves the sockets to a successor. Its threads are parked, and end with the process.
    pub(super) fn leave(&mut self) {
        if let Some((vmm, others)) = self.sockets.take() {
            let files = vmm.into_iter().chain(others);
            files.for_each(SocketFile::leave);
        }
    }

    /// Removes the sockets of a VM whose threads have ended, or one of whose threads has panicked: nobody serves them.
    pub(super) fn remove_if_ended(&mut self) {
        if self.sockets.is_some() && self.has_ended() {
            self.begin_stop(Instant::now() + LOCK_TIMEOUT);
        }
    }

    /// Whether it was given up because of a panic.
    pub(super) fn has_panicked(&self) -> bool {
        self.threads.has_panicked()
    }

    /// Removes its sockets and tells its threads to end. From `deadline` on, locks of directories are not waited for.
    pub(super) fn begin_stop(&mut self, deadline: Instant) {
        if let Some((vmm, others)) = self.sockets.take() {
            let files = vmm.into_iter().chain(others);
            files.for_each(|file| file.remove_by(deadline));
        }
        self.stop.request();
        self.device.stop();
    }

    /// Stops serving: removes the sockets, and leaves the VMM and all connections. Takes at most a second.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if self.sockets.is_some() {
            self.begin_stop(Instant::now() + LOCK_TIMEOUT);
            let _ = self.threads.all().wait_timeout(STOP_TIMEOUT);
        }
    }
}

/// Ends the session thread.
#[derive(Debug)]
struct Stop {
    requested: AtomicBool,
    event: EventFd,
    /// The VMM that is served at the moment.
    vmm: Mutex<Option<UnixStream>>,
}

impl Stop {
    fn new() -> io::Result<Self> {
        Ok(Self {
            requested: AtomicBool::new(false),
            event: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            vmm: Mutex::default(),
        })
    }

    fn request(&self) {
        self.requested.store(true, Ordering::SeqCst);
        let _ = self.event.write(1);
        self.shut_down_vmm();
    }

    fn is_requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    fn shut_down_vmm(&self) {
        if let Some(vmm) = self.vmm.lock().as_ref() {
            let _ = vmm.shutdown(std::net::Shutdown::Both);
        }
    }

    /// The VMM that is served from now on.
    fn set_vmm(&self, vmm: Option<UnixStream>) {
        *self.vmm.lock() = vmm;
        if self.is_requested() {
            self.shut_down_vmm();
        }
    }
}

/// Serves one VMM after the other until the end is requested.
fn serve_vmms(listener: &UnixListener, device: &Arc<VhostUserVsockBackend>, stop: &Stop) {
    let mut is_short = false;
    while !stop.is_requested() {
        let fds = [listener.as_fd(), stop.event.as_fd()];
        let waited = wait_readable(&fds, PollTimeout::NONE);
        if stop.is_requested() {
            return;
        }
        let is_shut_down = matches!(waited, Ok([events, _]) if events.contains(PollFlags::POLLHUP));
        match waited.and_then(|_| listener.accept()) {
            Ok((vmm, _)) => {
                is_short = false;
                serve_vmm(vmm, device, stop);
            }
            Err(error) if is_shut_down => {
                warn!("can't serve a VMM: the listener was shut down: {error}");
                let _ = wait_readable(&[stop.event.as_fd()], PollTimeout::NONE);
            }
            Err(error) => match error.kind() {
                // Somebody else who has the listener was faster, or the VMM has left already.
                io::ErrorKind::WouldBlock
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::Interrupted => {}
                // Nothing left to accept with, whatever it is: it may pass.
                _ => {
                    if !std::mem::replace(&mut is_short, true) {
                        warn!("can't serve a VMM: {error}");
                    }
                    let _ = wait_readable(&[stop.event.as_fd()], ACCEPT_PAUSE.into());
                }
            },
        }
    }
}

/// Serves a VMM until it is gone.
fn serve_vmm(vmm: UnixStream, device: &Arc<VhostUserVsockBackend>, stop: &Stop) {
    match vmm.try_clone() {
        Ok(clone) => stop.set_vmm(Some(clone)),
        Err(error) => return warn!("can't serve a VMM: {error}"),
    }
    info!("a VMM connected");
    device.begin_session();
    let mut session = Session::begin(vmm, device.clone());
    let end = loop {
        match session.handle_request() {
            Ok(()) => {}
            // A VMM that wanted an answer has it. The session goes on.
            Err(error) if error.is_refusal() => warn!("refused the VMM: {error}"),
            Err(error) => break error,
        }
    };
    stop.set_vmm(None);
    drop(session);
    device.end_session();
    if end.is_end() || stop.is_requested() {
        info!("the VMM disconnected");
    } else {
        warn!("the VMM is no longer served: {end}");
    }
}
