//! The process: its VMs, what they share, and its end.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use log::{info, warn};

use super::descriptors;
use super::log_writer;
use super::sandbox::{self, SandboxError};
use super::service::{self, ServiceManager, Status};
use super::threads::{Naming, Threads};
use super::vm::{self, BoundVm, LOCK_TIMEOUT, Vm, VmError};
use crate::config::{ConfigError, HostSide, ProcessConfig, VmConfig};
use crate::host::listener::{self, ListenerError, SocketFile};
use crate::host::siblings::{self, Siblings};
use crate::host::vsock;
use crate::metrics;
use crate::metrics::counters::Snapshot;
use crate::packet::header::PacketType;
use crate::syscalls::Syscall;
use crate::vhu_vsock::{self, Activity};

/// To return from signal handlers, which send a byte.
const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_rt_sigreturn),
    Syscall::any(libc::SYS_sendto),
];

/// How long the threads may take to end after a signal. What is stuck then ends with the process.
const STOP_TIMEOUT: Duration = Duration::from_millis(700);

/// Why the daemon can't go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Its configuration can't work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A socket can't be made.
    #[error(transparent)]
    Listener(#[from] ListenerError),
    /// The sandbox is incomplete, and it must not serve without.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Threads panicked.
    #[error("{0} of {1} VMs given up after a panic")]
    GivenUp(usize, usize),
    /// The system refused something that every daemon needs.
    #[error("can't serve: {0}")]
    Io(#[from] io::Error),
}

impl From<VmError> for ServerError {
    fn from(error: VmError) -> Self {
        match error {
            VmError::Config(error) => error.into(),
            VmError::Listener(error) => error.into(),
            VmError::Io(error) => error.into(),
        }
    }
}

/// The activity of all VMs, for the service manager.
#[derive(Default)]
struct Board {
    vmms: AtomicUsize,
    connections: AtomicUsize,
    status: OnceLock<Status>,
}

/// What a VM has last written on the board.
#[derive(Default)]
struct Posted {
    vmms: AtomicUsize,
    connections: AtomicUsize,
}

impl Board {
    /// Replaces what a VM has on the board.
    fn post(&self, posted: &Posted, activity: Activity) {
        let replace = |total: &AtomicUsize, part: &AtomicUsize, new: usize| {
            let old = part.swap(new, Ordering::Relaxed);
            if old != new {
                total.fetch_add(new.wrapping_sub(old), Ordering::Relaxed);
            }
            total.load(Ordering::Relaxed)
        };
        let vmms = replace(&self.vmms, &posted.vmms, activity.has_vmm.into());
        let connections = replace(&self.connections, &posted.connections, activity.connections);
        if let Some(status) = self.status.get() {
            status.set(vmms, connections);
        }
    }
}

/// The daemon with its sockets, which go with it.
pub struct Server {
    vms: Vec<Vm>,
    stats: Option<SocketFile>,
    threads: Arc<Threads>,
    manager: ServiceManager,
}

impl Server {
    /// Makes the sockets, enters the sandbox and serves. The process may have no thread but the calling one, which alone enters
    /// the sandbox, with those that it starts later.
    ///
    /// # Errors
    /// The configuration can't work, a socket can't be made, the sandbox is incomplete and `strict`, or the system refuses.
    pub fn start(config: &ProcessConfig) -> Result<Self, ServerError> {
        config.check()?;
        let limit = descriptors::raise_limit();
        listener::tighten_umask();
        let board = Arc::new(Board::default());
        let siblings = Arc::new(Siblings::default());
        let mut bound = Vec::new();
        for vm in &config.vms {
            let (board, posted) = (board.clone(), Posted::default());
            let observer = move |activity| board.post(&posted, activity);
            let mut vm = vm.clone();
            descriptors::fit(&mut vm, limit, config.vms.len());
            bound.push(BoundVm::new(&vm, &siblings, observer)?);
        }
        let stats = config.stats_path.as_ref();
        let stats = stats.map(|path| SocketFile::bind(path, PacketType::Stream, config.access));
        let stats = stats.transpose()?;
        let manager = ServiceManager::from_env();
        let threads = Threads::new(match config.vms.len() {
            0 | 1 => Naming::Off,
            _ => Naming::On,
        })?;
        sandbox::enter(config, &syscalls(config))?;
        let mut vms = Vec::new();
        for (vm, config) in bound.into_iter().zip(&config.vms) {
            info!(
                "CID {}: waiting for a VMM at {}, for host programs at {}",
                config.guest_cid, config.socket, config.host
            );
            vms.push(vm.start(threads.clone())?);
        }
        if let Some(stats) = &stats {
            let devices: Vec<_> = vms.iter().map(Vm::device).collect();
            let snapshot =
                move || Snapshot::new(devices.iter().map(|device| device.snapshot()).collect());
            metrics::socket::serve(stats.listener()?, snapshot)?;
        }
        // There is one service manager.
        let _ = board.status.set(manager.ready(config.vms.len())?);
        Ok(Self {
            vms,
            stats,
            threads,
            manager,
        })
    }

    /// Serves until something can be read from `stop`, or until the only VMM of each VM, whose connection was inherited, is
    /// gone. Then it removes its sockets and ends its threads. What does not end in time is left to the end of the process,
    /// which must follow.
    ///
    /// # Errors
    /// The system refuses to wait, or a VM was given up on the way.
    pub fn run(mut self, stop: BorrowedFd<'_>) -> Result<(), ServerError> {
        let vms = &mut self.vms;
        self.threads
            .wait(stop, || vms.iter_mut().for_each(Vm::remove_if_ended))?;
        self.manager.stopping();
        let deadline = Instant::now() + LOCK_TIMEOUT;
        if let Some(stats) = self.stats.take() {
            stats.remove_by(deadline);
        }
        for vm in &mut self.vms {
            vm.begin_stop(deadline);
        }
        if self.threads.wait_timeout(STOP_TIMEOUT)? {
            info!("stopped");
        } else {
            warn!("stopped, though a thread did not end");
        }
        match self.vms.iter().filter(|vm| vm.has_panicked()).count() {
            0 => Ok(()),
            count => Err(ServerError::GivenUp(count, self.vms.len())),
        }
    }
}

/// All system calls of the daemon but those of the language's run time.
fn syscalls(config: &ProcessConfig) -> Vec<Syscall> {
    let has_siblings = siblings::are_among(&config.vms);
    let forwards = |vm: &VmConfig| matches!(vm.host, HostSide::Vsock { .. });
    let vsock = match config.vms.iter().any(forwards) {
        true => vsock::SYSCALLS,
        false => &[],
    };
    [
        SYSCALLS,
        if has_siblings {
            siblings::SYSCALLS
        } else {
            &[]
        },
        vm::SYSCALLS,
        &service::syscalls(),
        &log_writer::syscalls(),
        &metrics::syscalls(),
        &vhu_vsock::syscalls(),
        vsock,
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::header::Cid;
    use crate::syscalls::Argument;

    #[test]
    fn sockets_of_af_vsock_are_made_only_to_forward() {
        let has_vsock = |host| {
            let mut vm = VmConfig::new(Cid::try_from(4u32).unwrap(), "/vhost", "/uds");
            vm.host = host;
            let calls = syscalls(&ProcessConfig::new(vec![vm]));
            calls.iter().any(|call| {
                let is_vsock = |argument| matches!(argument, &Argument::Is(0, libc::AF_VSOCK));
                call.number == libc::SYS_socket && call.arguments.iter().any(is_vsock)
            })
        };
        assert!(!has_vsock(HostSide::unix("/uds")));
        let cid = Cid::try_from(3u32).unwrap();
        let listen = Vec::new();
        assert!(has_vsock(HostSide::Vsock { cid, listen }));
    }

    #[test]
    fn socket_pairs_are_made_only_between_siblings() {
        let has_pairs = |groups: [&str; 2]| {
            let vm = |group: &str| VmConfig {
                groups: vec![group.into()],
                ..VmConfig::new(Cid::try_from(4u32).unwrap(), "/vhost", "/uds")
            };
            let calls = syscalls(&ProcessConfig::new(groups.map(vm).into()));
            calls.iter().any(|call| call.number == libc::SYS_socketpair)
        };
        assert!(!has_pairs(["a", "b"]));
        assert!(has_pairs(["a", "a"]));
    }
}
