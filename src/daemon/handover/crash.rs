//! What makes VMs survive a daemon that dies: a keeper and a journal of each, and how the next daemon takes them up.
//!
//! Only connections are lost. Their host programs see the end at once, as the system closes the sockets, and their guests are
//! sent an RST for each that the journal lists.

use std::collections::BTreeMap;
use std::io;
use std::mem;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};
use parking_lot::Mutex;

use super::kept::{Keeper, NextState, Part, Remains, Store};
use super::names::StoredName;
use crate::config::VmConfig;
use crate::daemon::service::ServiceManager;
use crate::daemon::vm::{BoundVm, Keep, Parts, VmState};
use crate::host::listener::LoadedListeners;
use crate::log_limit::LogLimit;
use crate::packet::header::Cid;
use crate::saved::{LoadError, Loader};
use crate::thread_backend::journal::{Journal, Lost};

/// How long a stop waits for a keeper that is at work.
const STOP_TIMEOUT: Duration = Duration::from_millis(200);

/// How the log calls a VM that would not survive.
const AT_RISK: &str = "a crash of this daemon would cost the VM its device";

/// How it calls one that has not.
const NOT_TAKEN_UP: &str = "not taken up after a crash, its VMM is dropped";

/// What daemons that have died have left, by the CIDs of their VMs.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Left(BTreeMap<u64, Remains>);

impl Left {
    /// Takes what the service manager has passed.
    pub(super) fn new(kept: Vec<(StoredName, OwnedFd)>) -> Self {
        let mut left = Self::default();
        for (name, fd) in kept {
            let (cid, part) = match name {
                StoredName::Kept { cid, number } => (cid, Part::Fd(number)),
                StoredName::State(cid) => (cid, Part::State),
                StoredName::Connections(cid) => (cid, Part::Connections),
                StoredName::Parcel(_) => continue,
            };
            left.0.entry(cid.into()).or_default().add(part, fd);
        }
        left
    }

    /// Has the manager forget all of it: the VMs were handed over.
    pub(super) fn forget(self, manager: &ServiceManager) {
        for (cid, remains) in self.0 {
            remains.forget(manager, Cid::from_raw(cid));
        }
    }
}

/// What the VMs of a process have to survive a crash, and what is left of one.
#[derive(Default)]
pub(in crate::daemon) struct Survival {
    /// One for each VM of the process, in their order.
    vms: Vec<Option<VmSurvival>>,
    /// What is left of those that are not configured any more.
    others: Vec<(Loader, VmState)>,
    /// Listening sockets, and more, of those whose state can't be read.
    found: Vec<OwnedFd>,
}

impl Survival {
    /// Prepares the VMs, before the sandbox is entered, and finds what is left of each. What can't be used is ended.
    pub(in crate::daemon) fn prepare(
        vms: &[VmConfig],
        manager: &ServiceManager,
        mut left: Left,
    ) -> Self {
        if !manager.has_store() {
            return Self::default();
        }
        let mut found = Vec::new();
        let prepare = |config: &VmConfig| {
            let cid = config.guest_cid;
            let remains = left.0.remove(&cid.get());
            let prepared = VmSurvival::prepare(config, manager, remains, &mut found);
            prepared
                .inspect_err(|error| warn!("CID {cid}: {AT_RISK}: {error}"))
                .ok()
        };
        let vms = vms.iter().map(prepare).collect();
        let mut others = Vec::new();
        for (cid, mut remains) in left.0 {
            warn!("CID {cid}: no longer configured, its VMM is dropped");
            let cid = Cid::from_raw(cid);
            let loaded = remains.load(manager.clone(), cid);
            match loaded.and_then(|(loader, keeper)| {
                keeper.forget();
                Ok((loader.document()?, loader))
            }) {
                Ok((state, loader)) => others.push((loader, state)),
                Err(_) => found.extend(remains.end(manager, cid)),
            }
        }
        Self { vms, others, found }
    }

    /// The listening sockets that are left, to be adopted. None if there was no crash.
    pub(in crate::daemon) fn listeners(&mut self) -> Option<LoadedListeners> {
        let vms = self.vms.iter_mut().flatten();
        let left = vms.filter_map(|vm| vm.left.as_mut());
        let mut loaded = None;
        for (loader, state) in left.chain(&mut self.others) {
            let loaded = loaded.get_or_insert_with(|| LoadedListeners::new(true));
            for listener in mem::take(&mut state.listeners) {
                if let Err(error) = loaded.load(listener, loader) {
                    warn!(
                        "CID {}: a listening socket is lost: {error}",
                        state.guest_cid
                    );
                }
            }
        }
        for socket in mem::take(&mut self.found) {
            let loaded = loaded.get_or_insert_with(|| LoadedListeners::new(true));
            loaded.find(socket);
        }
        loaded
    }

    /// Lets the VMs go on with what is left of them, inside the sandbox, and survive from now on. Returns what keeps them.
    pub(in crate::daemon) fn give_to(self, vms: &mut [BoundVm]) -> Vec<VmKeeper> {
        let vms = self.vms.into_iter().zip(vms);
        vms.filter_map(|(survival, vm)| Some(survival?.give_to(vm)))
            .collect()
    }
}

/// What one VM has to survive a crash.
struct VmSurvival {
    keeper: VmKeeper,
    journal: Journal,
    /// What is to be loaded.
    left: Option<(Loader, VmState)>,
    lost: Lost,
}

impl VmSurvival {
    fn prepare(
        config: &VmConfig,
        manager: &ServiceManager,
        remains: Option<Remains>,
        found: &mut Vec<OwnedFd>,
    ) -> io::Result<Self> {
        let cid = config.guest_cid;
        if let Some(mut remains) = remains {
            match Self::resume(config, manager, &mut remains, found) {
                Ok(survival) => return Ok(survival),
                Err(error) => {
                    warn!("CID {cid}: {NOT_TAKEN_UP}: {error}");
                    found.extend(remains.end(manager, cid));
                }
            }
        }
        let journal = Journal::new(config)?;
        let keeper = Keeper::new(manager.clone(), cid)?;
        if let Some(file) = journal.file() {
            keeper.keep_connections(file)?;
        }
        Ok(Self {
            keeper: VmKeeper::new(cid, keeper),
            journal,
            left: None,
            lost: Lost::default(),
        })
    }

    fn resume(
        config: &VmConfig,
        manager: &ServiceManager,
        remains: &mut Remains,
        found: &mut Vec<OwnedFd>,
    ) -> Result<Self, LoadError> {
        let (journal, lost) = match &remains.connections {
            Some(file) => Journal::resume(file.try_clone()?, config)?,
            None => return Err(LoadError::Missing),
        };
        let cid = config.guest_cid;
        let (loader, keeper) = remains.load(manager.clone(), cid)?;
        let keeper = VmKeeper::new(cid, keeper);
        let state = match loader.document() {
            Ok(state) => state,
            Err(error) => {
                keeper.invalidate();
                found.extend(loader.into_fds());
                return Err(error);
            }
        };
        Ok(Self {
            keeper,
            journal,
            left: Some((loader, state)),
            lost,
        })
    }

    fn give_to(self, vm: &mut BoundVm) -> VmKeeper {
        let cid = vm.cid();
        vm.set_journal(self.journal);
        if let Some((mut loader, state)) = self.left {
            let had_vmm = state.session.is_some();
            match vm.load(state, &mut loader) {
                Ok(()) if had_vmm => {
                    let count = self.lost.keys.len();
                    info!("CID {cid}: goes on after a crash, {count} of its connections are reset");
                    vm.reset_lost(self.lost.keys.clone());
                }
                Ok(()) => {}
                Err(error) => {
                    warn!("CID {cid}: {NOT_TAKEN_UP}: {error}");
                    self.keeper.invalidate();
                }
            }
        }
        // They are listed anew, or their guest is gone.
        self.lost.clear();
        vm.set_keeper(Box::new(self.keeper.clone()));
        self.keeper
    }
}

/// The keeper of a VM, which its session and whoever stops it share.
#[derive(Clone, Debug)]
pub(in crate::daemon) struct VmKeeper {
    cid: Cid,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
struct Shared {
    /// None when the VM is kept no more.
    keeper: Option<Keeper<ServiceManager>>,
    /// What was saved, and is to be kept.
    next: Option<io::Result<NextState>>,
    log: LogLimit,
}

impl VmKeeper {
    fn new(cid: Cid, keeper: Keeper<ServiceManager>) -> Self {
        let shared = Shared {
            keeper: Some(keeper),
            next: None,
            log: LogLimit::default(),
        };
        Self {
            cid,
            shared: Arc::new(Mutex::new(shared)),
        }
    }

    /// The CID of the VM.
    pub(in crate::daemon) fn cid(&self) -> Cid {
        self.cid
    }

    fn invalidate(&self) {
        if let Some(keeper) = &mut self.shared.lock().keeper {
            keeper.invalidate();
        }
    }

    /// Keeps the VM no more: it was handed over, or has ended.
    pub(in crate::daemon) fn forget(&self) {
        let shared = self.shared.try_lock_for(STOP_TIMEOUT);
        if let Some(keeper) = shared.and_then(|mut shared| shared.keeper.take()) {
            keeper.forget();
        }
    }
}

impl Keep for VmKeeper {
    fn keep(&mut self, vm: Parts<'_>) {
        let mut shared = self.shared.lock();
        let saved = shared
            .keeper
            .as_ref()
            .map(|keeper| keeper.save(|saver| vm.save(saver)));
        shared.next = saved;
    }

    fn store(&mut self) {
        let shared = &mut *self.shared.lock();
        let (Some(keeper), Some(next)) = (&mut shared.keeper, shared.next.take()) else {
            return;
        };
        let kept = match next {
            Ok(next) => keeper.keep(next),
            Err(error) => {
                keeper.invalidate();
                Err(error)
            }
        };
        if let Err(error) = kept {
            shared.log.log(|| warn!("{AT_RISK}: {error}"));
        }
    }
}

impl Store for ServiceManager {
    fn store(&self, name: &str, fd: BorrowedFd<'_>, poll: bool) -> io::Result<()> {
        ServiceManager::store(self, name, fd, poll)
    }

    fn forget(&self, name: &str) -> io::Result<()> {
        ServiceManager::forget(self, name)
    }
}
