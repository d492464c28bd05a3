//! The process: its VMs, what they share, and its end.

use std::io;
use std::mem;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use log::{info, warn};

use super::descriptors;
use super::handover::{
    self, Given, HandOver, HandoverError, Left, Predecessor, Process, Survival, VmKeeper,
};
use super::log_writer;
use super::sandbox::{self, SandboxError};
use super::service::{self, ServiceManager, Status};
use super::threads::{Naming, Threads};
use super::vm::{self, BoundVm, LOCK_TIMEOUT, Vm, VmError};
use crate::config::{ConfigError, HostSide, ProcessConfig, VmConfig};
use crate::host::listener::{self, ListenerError, LoadedListeners, SocketFile};
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
    /// The VMs of the daemon that runs are not taken over.
    #[error(transparent)]
    Handover(#[from] HandoverError),
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
    hand_over: Option<HandOver>,
    /// What keeps the VMs for the case that the process dies.
    keepers: Vec<VmKeeper>,
    siblings: Arc<Siblings>,
    threads: Arc<Threads>,
    manager: ServiceManager,
}

/// The sockets of a daemon that does not serve yet.
struct Bound {
    vms: Vec<BoundVm>,
    stats: Option<SocketFile>,
    hand_over: Option<HandOver>,
    siblings: Arc<Siblings>,
    board: Arc<Board>,
}

impl Bound {
    /// Makes the sockets, or adopts those that a predecessor had.
    fn new(
        config: &ProcessConfig,
        limit: usize,
        manager: &ServiceManager,
        loaded: &mut LoadedListeners,
    ) -> Result<Self, ServerError> {
        let board = Arc::new(Board::default());
        let siblings = Arc::new(Siblings::default());
        let mut vms = Vec::new();
        for vm in &config.vms {
            let (board, posted) = (board.clone(), Posted::default());
            let observer = move |activity| board.post(&posted, activity);
            let mut vm = vm.clone();
            descriptors::fit(&mut vm, limit, config.vms.len());
            vms.push(BoundVm::new(&vm, &siblings, loaded, observer)?);
        }
        let stats = config
            .stats_path
            .as_ref()
            .map(|path| SocketFile::bind_or_adopt(path, PacketType::Stream, config.access, loaded));
        let stats = stats.transpose()?;
        let hand_over = HandOver::new(config, manager, loaded)?;
        Ok(Self {
            vms,
            stats,
            hand_over,
            siblings,
            board,
        })
    }
}

impl Server {
    /// Makes the sockets, enters the sandbox and serves. The process may have no thread but the calling one, which alone enters
    /// the sandbox, with those that it starts later. `passed` are the numbers and names of the descriptors that an earlier daemon
    /// has stored with the service manager.
    ///
    /// If there is an earlier daemon, or what it has left, its VMs are taken over.
    ///
    /// # Errors
    /// The configuration can't work, a socket can't be made, the sandbox is incomplete and `strict`, the daemon that runs can't be
    /// taken over from and goes on, or the system refuses.
    pub fn start(config: &ProcessConfig, passed: &[(RawFd, String)]) -> Result<Self, ServerError> {
        config.check()?;
        // Also for what a predecessor sends.
        let limit = descriptors::raise_limit();
        listener::tighten_umask();
        let manager = ServiceManager::from_env();
        let (mut predecessor, left) = Predecessor::find(config, passed, &manager)?;
        let started = Self::start_after(&mut predecessor, left, config, limit, manager);
        if let (Some(predecessor), Err(error)) = (predecessor, &started) {
            predecessor.refuse(&error.to_string());
        }
        started
    }

    /// Starts to serve what is left of a predecessor once it is certain that it serves no longer. Then there is none any more.
    fn start_after(
        predecessor: &mut Option<Predecessor>,
        left: Left,
        config: &ProcessConfig,
        limit: usize,
        manager: ServiceManager,
    ) -> Result<Self, ServerError> {
        let mut survival = Survival::prepare(&config.vms, &manager, left);
        let mut loaded = match predecessor {
            Some(predecessor) => predecessor.listeners()?,
            None => survival.listeners().unwrap_or_default(),
        };
        let mut bound = Bound::new(config, limit, &manager, &mut loaded)?;
        let threads = Threads::new(match config.vms.len() {
            0 | 1 => Naming::Off,
            _ => Naming::On,
        })?;
        let calls = syscalls(config, bound.hand_over.is_some());
        sandbox::enter(config, &loaded.directories(), &calls)?;
        if let Some(predecessor) = predecessor {
            predecessor.load(&mut bound.vms, &bound.siblings)?;
        }
        if let Some(predecessor) = predecessor.take() {
            predecessor.commit()?;
        }
        loaded.own();
        let keepers = survival.give_to(&mut bound.vms);
        Self::serve(bound, keepers, config, manager, threads)
    }

    /// Starts the threads.
    fn serve(
        bound: Bound,
        keepers: Vec<VmKeeper>,
        config: &ProcessConfig,
        manager: ServiceManager,
        threads: Arc<Threads>,
    ) -> Result<Self, ServerError> {
        let mut vms = Vec::new();
        for (vm, config) in bound.vms.into_iter().zip(&config.vms) {
            let what = match vm.has_vmm() {
                true => "serving the VMM of",
                false => "waiting for a VMM at",
            };
            info!(
                "CID {}: {what} {}, for host programs at {}",
                config.guest_cid, config.socket, config.host
            );
            vms.push(vm.start(threads.clone())?);
        }
        if let Some(stats) = &bound.stats {
            let devices: Vec<_> = vms.iter().map(Vm::device).collect();
            let snapshot =
                move || Snapshot::new(devices.iter().map(|device| device.snapshot()).collect());
            metrics::socket::serve(stats.listener()?, snapshot)?;
        }
        // There is one service manager.
        let _ = bound.board.status.set(manager.ready(config.vms.len())?);
        Ok(Self {
            vms,
            stats: bound.stats,
            hand_over: bound.hand_over,
            keepers,
            siblings: bound.siblings,
            threads,
            manager,
        })
    }

    /// Serves until something can be read from `stop`, until the only VMM of each VM, whose connection was inherited, is gone, or
    /// until a successor has taken over. With a service manager, it leaves what it serves to the next daemon. Otherwise it removes
    /// its sockets and ends its threads. What does not end in time is left to the end of the process, which must follow.
    ///
    /// # Errors
    /// The system refuses to wait, or a VM was given up on the way.
    pub fn run(mut self, stop: BorrowedFd<'_>) -> Result<(), ServerError> {
        let given = loop {
            match self.wait(stop)? {
                Event::Successor => {
                    if let Some(given) = self.give_to_successor(stop) {
                        break given;
                    }
                }
                Event::Stop => {
                    self.manager.stopping();
                    break self.give_to_manager();
                }
                Event::End => {
                    self.manager.stopping();
                    break Given::default();
                }
            }
        };
        let vms = self.vms.len();
        self.stop(&given)?;
        match self.vms.iter().filter(|vm| vm.has_panicked()).count() {
            0 => Ok(()),
            count => Err(ServerError::GivenUp(count, vms)),
        }
    }

    /// Waits until there is something to do for the process.
    fn wait(&mut self, stop: BorrowedFd<'_>) -> io::Result<Event> {
        let vms = &mut self.vms;
        let keepers = &self.keepers;
        let each = || {
            for vm in vms.iter_mut() {
                vm.remove_if_ended();
                if vm.has_ended() {
                    let own = keepers.iter().filter(|keeper| keeper.cid() == vm.cid());
                    own.for_each(VmKeeper::forget);
                }
            }
        };
        let ready = match self.hand_over.as_ref().and_then(HandOver::socket) {
            Some(successors) => self.threads.wait([stop, successors], each)?,
            None => self.threads.wait([stop], each)?,
        };
        Ok(match ready {
            None => Event::End,
            Some(0) => Event::Stop,
            Some(_) => Event::Successor,
        })
    }

    fn process(&self) -> Process<'_> {
        Process {
            vms: &self.vms,
            stats: self.stats.as_ref(),
            siblings: &self.siblings,
        }
    }

    fn give_to_successor(&self, stop: BorrowedFd<'_>) -> Option<Given> {
        let hand_over = self.hand_over.as_ref()?;
        hand_over.give_to_successor(&self.process(), stop)
    }

    fn give_to_manager(&self) -> Given {
        let hand_over = self.hand_over.as_ref();
        hand_over.map_or_else(Given::default, |hand_over| {
            hand_over.give_to_manager(&self.process())
        })
    }

    /// Ends the process's part in all VMs: those that were given away are left alone.
    fn stop(&mut self, given: &Given) -> io::Result<()> {
        self.keepers.iter().for_each(VmKeeper::forget);
        let deadline = Instant::now() + LOCK_TIMEOUT;
        let hand_over = self.hand_over.take().and_then(HandOver::into_socket);
        for socket in self.stats.take().into_iter().chain(hand_over) {
            match given.is_empty() {
                true => socket.remove_by(deadline),
                false => socket.leave(),
            }
        }
        for (place, mut vm) in mem::take(&mut self.vms).into_iter().enumerate() {
            if given.has(place) {
                // It is parked for good, and whoever would end it would wait.
                mem::forget(vm);
            } else {
                vm.begin_stop(deadline);
                self.vms.push(vm);
            }
        }
        let have_ended = || self.vms.iter().all(Vm::have_ended);
        if self.threads.wait_until(STOP_TIMEOUT, have_ended)? {
            info!("stopped");
        } else {
            warn!("stopped, though a thread did not end");
        }
        Ok(())
    }
}

/// Something for the process to do.
enum Event {
    /// To stop.
    Stop,
    /// To end, since nothing is left to serve.
    End,
    /// To hand over to a process that has connected.
    Successor,
}

/// All system calls of the daemon but those of the language's run time.
fn syscalls(config: &ProcessConfig, has_hand_over: bool) -> Vec<Syscall> {
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
        &if has_hand_over {
            handover::syscalls()
        } else {
            Vec::new()
        },
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::header::Cid;
    use crate::syscalls::Argument;
    use std::collections::BTreeSet;

    #[test]
    fn sockets_of_af_vsock_are_made_only_to_forward() {
        let has_vsock = |host| {
            let mut vm = VmConfig::new(Cid::try_from(4u32).unwrap(), "/vhost", "/uds");
            vm.host = host;
            let calls = syscalls(&ProcessConfig::new(vec![vm]), false);
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
    fn what_hand_over_takes_is_allowed_only_where_it_is_on() {
        let vm = VmConfig::new(Cid::try_from(4u32).unwrap(), "/vhost", "/uds");
        let config = ProcessConfig::new(vec![vm]);
        let numbers = |has_hand_over| -> BTreeSet<_> {
            let calls = syscalls(&config, has_hand_over);
            calls.into_iter().map(|call| call.number).collect()
        };
        let added: Vec<_> = numbers(true).difference(&numbers(false)).copied().collect();
        let mut expected = [
            libc::SYS_fallocate,
            libc::SYS_fstat,
            libc::SYS_ftruncate,
            libc::SYS_newfstatat,
            libc::SYS_pread64,
            libc::SYS_pwrite64,
            libc::SYS_socketpair,
        ];
        expected.sort_unstable();
        assert_eq!(added, expected);
    }

    #[test]
    fn socket_pairs_are_made_only_between_siblings() {
        let has_pairs = |groups: [&str; 2]| {
            let vm = |group: &str| VmConfig {
                groups: vec![group.into()],
                ..VmConfig::new(Cid::try_from(4u32).unwrap(), "/vhost", "/uds")
            };
            let calls = syscalls(&ProcessConfig::new(groups.map(vm).into()), false);
            calls.iter().any(|call| call.number == libc::SYS_socketpair)
        };
        assert!(!has_pairs(["a", "b"]));
        assert!(has_pairs(["a", "a"]));
    }
}
