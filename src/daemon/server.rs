//! The daemon's life: its sockets, and one VMM after the other.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use log::{info, warn};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use parking_lot::Mutex;
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error, ShutdownHandle, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::config::{ConfigError, ProcessConfig, Socket, VmConfig};
use crate::daemon::relay::Relay;
use crate::daemon::sandbox::{self, SandboxError};
use crate::daemon::service::ServiceManager;
use crate::host::listener::{self, Inherited, ListenerError, SocketFile};
use crate::metrics::socket;
use crate::syscalls::Syscall;
use crate::vhu_vsock::VhostUserVsockBackend;

/// To wait for a VMM and for the wish to stop, which a signal brings: its handler sends a byte to the thread that reads
/// it.
const SYSCALLS: &[Syscall] = &[
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_poll),
    Syscall::any(libc::SYS_ppoll),
    Syscall::any(libc::SYS_restart_syscall),
    Syscall::any(libc::SYS_rt_sigreturn),
    Syscall::any(libc::SYS_sendto),
    Syscall::any(libc::SYS_recvfrom),
];

/// How long to wait before the next try to serve, in milliseconds.
const RETRY: u16 = 100;

/// Why the daemon can't go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// It was told something that can't work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A socket can't be made.
    #[error(transparent)]
    Listener(#[from] ListenerError),
    /// It must not serve without a sandbox that it can't have.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The system refused something that every daemon needs.
    #[error("can't serve: {0}")]
    Io(#[from] io::Error),
    /// The vhost-user library refused.
    #[error("can't serve a VMM: {0}")]
    Daemon(Error),
}

/// Asks the daemon to stop, from any thread.
#[derive(Clone)]
pub struct Stop(Arc<StopState>);

struct StopState {
    requested: AtomicBool,
    event: EventFd,
    /// The VMM that is served at the moment.
    session: Mutex<Option<ShutdownHandle>>,
}

impl Stop {
    /// A wish that was not uttered yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(StopState {
            requested: AtomicBool::new(false),
            event: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            session: Mutex::default(),
        })))
    }

    /// Asks.
    pub fn request(&self) {
        self.0.requested.store(true, Ordering::SeqCst);
        let _ = self.0.event.write(1);
        if let Some(session) = self.0.session.lock().as_ref() {
            session.shutdown();
        }
    }

    fn is_requested(&self) -> bool {
        self.0.requested.load(Ordering::SeqCst)
    }

    /// Takes the VMM that is served from now on.
    fn set_session(&self, session: Option<ShutdownHandle>) {
        *self.0.session.lock() = session;
        if self.is_requested() {
            self.request();
        }
    }
}

/// The daemon with its sockets, which go with it.
pub struct Server {
    socket: SocketFile,
    /// Held for their files. Others have the sockets.
    _others: [Option<SocketFile>; 2],
    /// The VMM is there from the start, and there is no other one.
    is_single: bool,
    manager: ServiceManager,
    backend: Arc<VhostUserVsockBackend>,
}

impl Server {
    /// Makes the sockets and enters the sandbox. The process may have no thread but the calling one, which alone enters
    /// it, with those it starts later.
    pub fn start(config: &ProcessConfig) -> Result<Self, ServerError> {
        config.check()?;
        let Some(vm) = config.vms.first() else {
            return Err(ConfigError::Vms(0).into());
        };
        raise_descriptor_limit();
        let (socket, relay) = vmm_socket(vm)?;
        let uds = match vm.uds_fd {
            Some(fd) => SocketFile::foreign(Inherited::take_listener(fd)?),
            None => SocketFile::bind(&vm.uds_path, vm.access)?,
        };
        let stats = config.stats_path.as_ref();
        let stats = stats.map(|path| SocketFile::bind(path, config.access));
        let stats = stats.transpose()?;
        let is_single = relay.is_some();
        let backend = Arc::new(VhostUserVsockBackend::new(vm, uds.listener()?)?);
        let manager = ServiceManager::from_env();
        sandbox::enter(config, SYSCALLS)?;
        info!(
            "CID {}: waiting for a VMM at {}, for host programs at {}",
            vm.guest_cid.0,
            vm.socket,
            vm.uds_path.display()
        );
        if let Some(stats) = &stats {
            let backend = backend.clone();
            socket::serve(stats.listener()?, move || backend.snapshot().into())?;
        }
        if let Some(relay) = &relay {
            relay.start()?;
        }
        backend.report_to(manager.ready()?);
        Ok(Self {
            socket,
            _others: [Some(uds), stats],
            is_single,
            manager,
            backend,
        })
    }

    /// Serves one VMM after the other until `stop` asks for the end. One whose connection was inherited is the only one.
    pub fn run(self, stop: &Stop) -> Result<(), ServerError> {
        let mut is_short = false;
        while !stop.is_requested() {
            match serve(&self.backend, &self.socket, stop) {
                Ok(()) if self.is_single => break,
                Ok(()) => is_short = false,
                Err(error) if self.is_single => return Err(error),
                Err(error) => {
                    // Descriptors or memory have run out, which passes.
                    if !std::mem::replace(&mut is_short, true) {
                        warn!("{error}");
                    }
                    wait_for(&[stop.0.event.as_fd()], RETRY)?;
                }
            }
        }
        self.manager.stopping();
        info!("stopped");
        Ok(())
    }
}

/// The socket for VMMs, and the way to the one whose connection was inherited. It is made before other sockets: the
/// folder that the relay makes for a moment would be closed to us, too, with their umask.
fn vmm_socket(config: &VmConfig) -> Result<(SocketFile, Option<Relay>), ServerError> {
    let inherited = match &config.socket {
        Socket::Inherited(fd) => Inherited::take(*fd)?,
        Socket::Path(path) => {
            listener::tighten_umask();
            return Ok((SocketFile::bind(path, config.access)?, None));
        }
    };
    let (listener, relay) = match inherited {
        Inherited::Listener(listener) => (listener, None),
        Inherited::Stream(vmm) => {
            let (relay, listener) = Relay::new(vmm)?;
            (listener, Some(relay))
        }
    };
    listener::tighten_umask();
    Ok((SocketFile::foreign(listener), relay))
}

/// Waits for a VMM and serves it until it is gone.
fn serve(
    backend: &Arc<VhostUserVsockBackend>,
    socket: &SocketFile,
    stop: &Stop,
) -> Result<(), ServerError> {
    let served = serve_once(backend, socket, stop);
    // The worker has ended with its daemon, and only now has the guest's memory no user.
    backend.detach();
    served
}

fn serve_once(
    backend: &Arc<VhostUserVsockBackend>,
    socket: &SocketFile,
    stop: &Stop,
) -> Result<(), ServerError> {
    // The worker is there before the VMM: it is the one who turns host programs away.
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon =
        VhostUserDaemon::new("vmm".into(), backend.clone(), memory).map_err(ServerError::Daemon)?;
    backend.attach(&daemon)?;
    wait_for(&[socket.as_fd(), stop.0.event.as_fd()], PollTimeout::NONE)?;
    if stop.is_requested() {
        Ok(())
    } else {
        serve_vmm(backend, &mut daemon, socket, stop)
    }
}

/// Serves the VMM that has connected.
fn serve_vmm(
    backend: &VhostUserVsockBackend,
    daemon: &mut VhostUserDaemon<Arc<VhostUserVsockBackend>>,
    socket: &SocketFile,
    stop: &Stop,
) -> Result<(), ServerError> {
    let mut listener = Listener::from(socket.listener()?);
    daemon.start(&mut listener).map_err(ServerError::Daemon)?;
    backend.greet();
    info!("a VMM connected");
    stop.set_session(daemon.shutdown_handle());
    let end = daemon.wait();
    stop.set_session(None);
    match end {
        Ok(()) | Err(Error::HandleRequest(VhostUserError::Disconnected)) => {
            info!("the VMM disconnected");
        }
        Err(error) => warn!("the VMM is no longer served: {error}"),
    }
    Ok(())
}

/// Waits until one of the descriptors is readable, or the time is over.
fn wait_for(fds: &[BorrowedFd<'_>], timeout: impl Into<PollTimeout>) -> io::Result<()> {
    let mut fds: Vec<PollFd<'_>> = fds
        .iter()
        .map(|fd| PollFd::new(*fd, PollFlags::POLLIN))
        .collect();
    let timeout = timeout.into();
    loop {
        match poll(&mut fds, timeout) {
            Ok(_) => return Ok(()),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A connection is a descriptor: as many as the system allows.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!("the limit of open descriptors stays as it is: {error}");
    }
}
