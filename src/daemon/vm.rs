//! One VM: its sockets, its device, and the two threads that serve it.
//!
//! The *session* thread accepts a VMM and handles its messages, one VMM after the other. The *worker* thread moves the
//! packets. Both can be parked, so that the VM can be handed over.

mod parked;
mod session_thread;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use thiserror::Error;

use super::threads::{Naming, Threads, VmThreads};
use crate::config::{
    ConfigError, HostSide, ProcessConfig, Sandbox, Socket, VmConfig, VsockPort, sibling_path,
};
use crate::host::entry::{Entry, EntrySocket};
use crate::host::listener::{Inherited, ListenerError, LoadedListeners, SocketFile};
use crate::host::siblings::Siblings;
use crate::host::vsock::{self, VsockListener};
use crate::packet::header::{Cid, GuestPort, PacketType};
use crate::saved::{LoadError, Loader};
use crate::syscalls::Syscall;
use crate::thread_backend::journal::Journal;
use crate::vhost_user_vsock_thread::EVENT_RING;
use crate::vhu_vsock::session::Session;
use crate::vhu_vsock::{Activity, VhostUserVsockBackend};
use crate::vsock_conn::ConnKey;
pub(in crate::daemon) use parked::{Keep, ParkError, Parked, Parts, VmState};
use parked::{Listening, Sockets};
use session_thread::{SessionThread, Stop};

/// To wait for a VMM, and for the end.
pub(super) const SYSCALLS: &[Syscall] = &[
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_poll),
    Syscall::any(libc::SYS_ppoll),
    Syscall::any(libc::SYS_restart_syscall),
    Syscall::any(libc::SYS_write),
    Syscall::any(libc::SYS_read),
    Syscall::any(libc::SYS_clock_nanosleep),
];

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
    /// Its other listening sockets.
    others: Listening,
    device: Arc<VhostUserVsockBackend>,
    stop: Arc<Stop>,
    /// One that was loaded.
    session: Option<Session>,
    keeper: Option<Box<dyn Keep>>,
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
        let (mut entries, mut others) = (Vec::new(), Listening::default());
        for (entry, listener) in listen_on_vsock(config, loaded)? {
            entries.push(EntrySocket::new(entry, listener.socket()?));
            others.vsock.push(listener);
        }
        for (entry, file) in bind_entries(config, loaded)? {
            entries.push(EntrySocket::new(entry, file.listener()?));
            others.files.push(file);
        }
        let device = VhostUserVsockBackend::new(config, entries, siblings, observer)?;
        Ok(Self {
            cid: config.guest_cid,
            vmm,
            others,
            device: Arc::new(device),
            stop: Arc::new(Stop::new()?),
            session: None,
            keeper: None,
        })
    }

    /// The guest's CID.
    pub(super) fn cid(&self) -> Cid {
        self.cid
    }

    /// Whether a VMM was handed over with it.
    pub(super) fn has_vmm(&self) -> bool {
        self.session.is_some()
    }

    /// Goes on with what was handed over, in the sandbox and before [`BoundVm::start`]: the session may need a thread. If
    /// there is no table of connections, the predecessor has died, and they are gone. Those that are to be reset in the guest
    /// are named later.
    ///
    /// # Errors
    /// What was handed over is not complete, is wrong or does not fit this VM. Then the VM starts afresh.
    pub(super) fn load(&mut self, state: VmState, loader: &mut Loader) -> Result<(), LoadError> {
        let loaded = self.try_load(state, loader);
        if loaded.is_err() {
            self.device.end_session();
        }
        loaded
    }

    fn try_load(&mut self, state: VmState, loader: &mut Loader) -> Result<(), LoadError> {
        if state.guest_cid != self.cid {
            return Err(LoadError::Invalid("the CID of another guest"));
        }
        let is_after_crash = state.table.is_none();
        if let Some(table) = state.table {
            let mut worker = self.device.worker();
            worker.load_table(table, loader, Instant::now())?;
        }
        if let Some(session) = state.session {
            let session = Session::load(session, self.device.clone(), loader)?;
            let mut worker = self.device.worker();
            if is_after_crash && worker.is_started(EVENT_RING) {
                worker.reset_transport();
            }
            self.session = Some(session);
        }
        Ok(())
    }

    /// Shows `keeper` the session whenever it has changed.
    pub(super) fn set_keeper(&mut self, keeper: Box<dyn Keep>) {
        self.keeper = Some(keeper);
    }

    /// Lists the ports of its connections in `journal`.
    pub(super) fn set_journal(&self, journal: Journal) {
        self.device.worker().set_journal(journal);
    }

    /// Resets connections of the guest's that a daemon had which has died.
    pub(super) fn reset_lost(&self, keys: Vec<ConnKey>) {
        self.device.worker().reset_lost(keys);
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
        let session = Arc::new(Mutex::new(self.session));
        let sockets = Arc::new(Mutex::new(Sockets(None)));
        let mut session_thread = SessionThread {
            guest_cid: self.cid,
            device: self.device.clone(),
            session: session.clone(),
            sockets: sockets.clone(),
            stop: self.stop.clone(),
            keeper: self.keeper,
        };
        let device = self.device.clone();
        let mut listening = self.others;
        match self.vmm {
            VmmSocket::Listener(socket) => {
                let listener = socket.listener()?;
                listener.set_nonblocking(true)?;
                listening.files.insert(0, socket);
                sockets.lock().0 = Some(listening);
                session_thread.keep_first();
                threads.spawn("session", move || {
                    session_thread.serve_all(&listener);
                    device.stop();
                })?;
            }
            VmmSocket::Connected(vmm) => {
                sockets.lock().0 = Some(listening);
                session_thread.keep_first();
                threads.spawn("session", move || {
                    session_thread.serve_one(vmm);
                    device.stop();
                })?;
            }
        }
        Ok(Vm {
            cid: self.cid,
            sockets,
            session,
            device: self.device,
            stop: self.stop,
            threads,
        })
    }
}

/// Listens on the ports of AF_VSOCK that lead to the guest.
fn listen_on_vsock(
    config: &VmConfig,
    loaded: &mut LoadedListeners,
) -> Result<Vec<(Entry, VsockListener)>, ListenerError> {
    let HostSide::Vsock { listen, .. } = &config.host else {
        return Ok(Vec::new());
    };
    vsock::check().map_err(ListenerError::NoVsock)?;
    let listen_on = |at: &VsockPort| match VsockListener::bind_or_adopt(at, loaded) {
        Ok(listener) => Ok((Entry::Vsock(GuestPort(at.port)), listener)),
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
    sockets: Arc<Mutex<Sockets>>,
    session: Arc<Mutex<Option<Session>>>,
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
        let mut none = LoadedListeners::default();
        BoundVm::new(config, &Arc::default(), &mut none, |_| {})?.start(Threads::new(Naming::Off)?)
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

    /// Parks the VM, once its turn and the message that is being handled are done, at the latest at `until`.
    ///
    /// # Errors
    /// They are not done until then, or there is no VM to park any more.
    pub(super) fn park(&self, until: Instant) -> Result<Parked<'_>, ParkError> {
        let session = self.session.try_lock_until(until);
        let session = session.ok_or(ParkError::Session)?;
        let worker = self.device.worker_until(until).ok_or(ParkError::Worker)?;
        let sockets = self.sockets.try_lock_until(until);
        let sockets = sockets.ok_or(ParkError::Sockets)?;
        if self.threads.has_panicked() {
            return Err(ParkError::GivenUp);
        }
        Ok(Parked {
            guest_cid: self.cid,
            session,
            worker,
            sockets,
        })
    }

    /// Removes the sockets of a VM whose threads have ended, or one of whose threads has panicked: nobody serves them.
    pub(super) fn remove_if_ended(&mut self) {
        if self.has_sockets() && self.has_ended() {
            let deadline = Instant::now() + LOCK_TIMEOUT;
            self.begin_stop(deadline);
            // The statistics keep the worker, and with it these sockets, for as long as the process runs.
            if let Some(mut worker) = self.device.worker_until(deadline) {
                worker.stop_listening();
            }
        }
    }

    fn has_sockets(&self) -> bool {
        self.sockets.lock().0.is_some()
    }

    /// Whether it was given up because of a panic.
    pub(super) fn has_panicked(&self) -> bool {
        self.threads.has_panicked()
    }

    /// Removes its sockets and tells its threads to end. From `deadline` on, locks of directories are not waited for.
    pub(super) fn begin_stop(&mut self, deadline: Instant) {
        // A keeper may have the lock for a moment.
        let sockets = self.sockets.try_lock_until(deadline);
        let listening = sockets.and_then(|mut sockets| sockets.0.take());
        for file in listening.unwrap_or_default().files {
            file.remove_by(deadline);
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
        if self.has_sockets() {
            self.begin_stop(Instant::now() + LOCK_TIMEOUT);
            let _ = self.threads.all().wait_timeout(STOP_TIMEOUT);
        }
    }
}
