//! The predecessor's side: VMs are parked, saved and sent, and this process ends without a word to anybody.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};
use nix::poll::{PollFlags, PollTimeout};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Uid, geteuid};

use super::parcels::{self, Parcel};
use super::path::Successor;
use super::{ProcessState, VERSION, store};
use crate::config::{ProcessConfig, SocketAccess};
use crate::daemon::service::ServiceManager;
use crate::daemon::threads::wait_for;
use crate::daemon::vm::{Vm, VmState};
use crate::host::listener::{ListenerError, LoadedListeners, SocketFile};
use crate::host::siblings::{CallState, Siblings};
use crate::log_limit::LogLimit;
use crate::packet::header::PacketType;
use crate::saved::Saver;

/// How long all VMs together may take to be parked. A stop takes a second.
const PARK_TIME: Duration = Duration::from_millis(500);

/// How long no successor is accepted after an error, in milliseconds.
const ACCEPT_PAUSE: u16 = 100;

/// What a daemon has that can hand its VMs over.
pub(in crate::daemon) struct HandOver {
    manager: ServiceManager,
    /// That of `--handover-path`.
    socket: Option<SocketFile>,
    /// The file that is handed over, which the sandbox lets nobody make.
    state: File,
    /// Whose process this is.
    user: Uid,
    /// Given up for the socket pair of a parcel: host programs may have taken all other descriptors.
    spare: Cell<Option<(OwnedFd, OwnedFd)>>,
    accept_log: RefCell<LogLimit>,
}

/// What a process has beside the VMs.
pub(in crate::daemon) struct Process<'p> {
    /// The VMs.
    pub(in crate::daemon) vms: &'p [Vm],
    /// The statistics socket.
    pub(in crate::daemon) stats: Option<&'p SocketFile>,
    /// The VMs, as they see each other.
    pub(in crate::daemon) siblings: &'p Arc<Siblings>,
}

/// The places of the VMs that were handed over. Their threads are parked for good.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Given(Vec<usize>);

impl Given {
    /// Whether the VM at this place was.
    pub(in crate::daemon) fn has(&self, place: usize) -> bool {
        self.0.contains(&place)
    }

    /// Whether none was.
    pub(in crate::daemon) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl HandOver {
    /// Makes what it takes, if there is anybody to hand over to: a service manager, or `--handover-path`.
    pub(in crate::daemon) fn new(
        config: &ProcessConfig,
        manager: &ServiceManager,
        loaded: &mut LoadedListeners,
    ) -> Result<Option<Self>, ListenerError> {
        let path = config.handover_path.as_deref();
        if path.is_none() && !manager.has_store() {
            return Ok(None);
        }
        let state = match memfd_create("vhost-user-vsock state", MFdFlags::MFD_CLOEXEC) {
            Ok(state) => state.into(),
            Err(error) => {
                warn!("nothing can be handed over: {error}");
                return Ok(None);
            }
        };
        // Whoever takes a VM over has its memory: nobody else may, whatever the mode of other sockets.
        let access = SocketAccess::default();
        let kind = PacketType::Seqpacket;
        let bind = |path| SocketFile::bind_or_adopt(path, kind, access, loaded);
        Ok(Some(Self {
            manager: manager.clone(),
            socket: path.map(bind).transpose()?,
            state,
            user: geteuid(),
            spare: Cell::new(parcels::pair().ok()),
            accept_log: RefCell::default(),
        }))
    }

    /// Where successors connect, if they can.
    pub(in crate::daemon) fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// The socket, for its end.
    pub(in crate::daemon) fn into_socket(self) -> Option<SocketFile> {
        self.socket
    }

    /// Leaves the VMs with the service manager. Those that can't be are not, with a warning.
    pub(in crate::daemon) fn give_to_manager(&self, process: &Process<'_>) -> Given {
        if !self.manager.has_store() {
            return Given::default();
        }
        let skip = |vm: &Vm, error: String| {
            warn!("CID {}: not handed over: {error}", vm.cid());
            Ok(())
        };
        let store = |parcels: Vec<Parcel<'_>>| {
            self.spare.take();
            let stored = store::store(&self.manager, parcels);
            stored.map_err(|error| format!("the service manager does not take it: {error}"))
        };
        match self.give(process, skip, store) {
            Ok((given, what)) => {
                info!("left {what} with the service manager");
                given
            }
            Err(error) => {
                warn!("nothing is handed over: {error}");
                Given::default()
            }
        }
    }

    /// Hands the VMs over to a successor that has connected, if one has. All go, or none. It ends when something can be read from
    /// `stop`.
    pub(in crate::daemon) fn give_to_successor(
        &self,
        process: &Process<'_>,
        stop: BorrowedFd<'_>,
    ) -> Option<Given> {
        let successor = match Successor::accept(self.socket()?, self.user, stop) {
            Ok(successor) => successor?,
            Err(error) => {
                let warn =
                    || warn!("nothing is handed over to a process that asks for it: {error}");
                self.accept_log.borrow_mut().log(warn);
                // Out of descriptors, for example: it waits in the backlog, and is not asked for all the time.
                let pause = PollTimeout::from(ACCEPT_PAUSE);
                let _ = wait_for(&[(stop, PollFlags::POLLIN)], pause);
                return None;
            }
        };
        let refuse = |vm: &Vm, error: String| Err(format!("CID {}: {error}", vm.cid()));
        let send =
            |parcels: Vec<Parcel<'_>>| successor.give(parcels).map_err(|error| error.to_string());
        let asked = successor.await_request().map_err(|error| error.to_string());
        match asked.and_then(|()| self.give(process, refuse, send)) {
            Ok((given, what)) => {
                info!("handed {what} over to process {}", successor.process());
                Some(given)
            }
            Err(error) => {
                let process = successor.process();
                warn!("nothing is handed over to process {process}: {error}");
                successor.refuse(&error);
                None
            }
        }
    }

    /// Parks the VMs, saves them and sends them. What becomes of one that can't be is for `failed` to say. Returns which have gone,
    /// and how the log calls them.
    fn give(
        &self,
        process: &Process<'_>,
        mut failed: impl FnMut(&Vm, String) -> Result<(), String>,
        send: impl FnOnce(Vec<Parcel<'_>>) -> Result<usize, String>,
    ) -> Result<(Given, String), String> {
        let until = Instant::now() + PARK_TIME;
        let mut parked = Vec::new();
        for (place, vm) in process.vms.iter().enumerate() {
            // One that has ended has nothing to hand over.
            if vm.has_ended() {
                continue;
            }
            match vm.park(until) {
                Ok(vm) => parked.push((place, vm)),
                Err(error) => failed(vm, error.to_string())?,
            }
        }
        let mut saver = Saver::new(&self.state).map_err(|error| error.to_string())?;
        let (mut given, mut states) = (Given::default(), Vec::new());
        for (place, vm) in &parked {
            match vm.save(&mut saver) {
                Ok(state) => {
                    given.0.push(*place);
                    states.push(state);
                }
                Err(error) => failed(&process.vms[*place], error.to_string())?,
            }
        }
        if given.is_empty() {
            return Err("there is no VM that can be".into());
        }
        let what = describe(&states);
        let calls = process.siblings.park_calls();
        let fds = self.finish(process, states, calls.save_calls(&mut saver), saver);
        let fds = fds.map_err(|error| error.to_string())?;
        let missing = send(parcels::pack(&self.state, &fds))?;
        if missing > 0 {
            warn!("{missing} connections are lost, with sockets in their sockets");
        }
        let gone = parked.into_iter().filter(|(place, _)| given.has(*place));
        gone.for_each(|(_, vm)| vm.leave());
        Ok((given, what))
    }

    /// Completes the state. Returns the descriptors that go with it.
    fn finish<'p>(
        &'p self,
        process: &Process<'p>,
        vms: Vec<VmState>,
        calls: Vec<CallState>,
        mut saver: Saver<'p>,
    ) -> io::Result<Vec<BorrowedFd<'p>>> {
        let stats = process.stats.and_then(|socket| socket.save(&mut saver));
        let handover = self.socket.as_ref();
        let state = ProcessState {
            version: VERSION,
            process: process::id(),
            vms,
            stats,
            handover: handover.and_then(|socket| socket.save(&mut saver)),
            calls,
        };
        saver.finish(&state)
    }
}

/// How the log calls VMs.
pub(super) fn describe(vms: &[VmState]) -> String {
    let connections = vms.iter().map(VmState::connections).sum();
    let count = |count: usize, what: &str| match count {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    };
    let (vms, connections) = (count(vms.len(), "VM"), count(connections, "connection"));
    format!("{vms} with {connections}")
}
