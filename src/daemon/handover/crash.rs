//! What makes VMs survive a daemon that dies: a keeper and a journal of each, and how the next daemon takes them up.
//!
//! Only connections are lost. Their host programs see the end at once, as the system closes the sockets, and their guests are
//! sent an RST for each that the journal lists.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};
use parking_lot::Mutex;

use super::kept::{Keeper, NextState, Part, Remains, Store};
use crate::config::VmConfig;
use crate::daemon::service::ServiceManager;
use crate::daemon::vm::{BoundVm, Keep, Parts, VmState};
use crate::host::listener::ListenerState;
use crate::log_limit::LogLimit;
use crate::packet::header::Cid;
use crate::saved::{LoadError, Loader};
use crate::thread_backend::journal::{Journal, Lost};

/// How long a stop waits for a keeper that is at work.
const STOP_TIMEOUT: Duration = Duration::from_millis(200);

/// What daemons that have died have left, by the CIDs of their VMs.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Left(BTreeMap<u64, Remains>);

impl Left {
    /// Takes what the service manager has passed.
    pub(in crate::daemon) fn new(kept: impl IntoIterator<Item = (Cid, Part, OwnedFd)>) -> Self {
        let mut left = Self::default();
        for (cid, part, fd) in kept {
            left.0.entry(cid.get()).or_default().add(part, fd);
        }
        left
    }

    /// Has the manager forget all of it: the VMs were handed over.
    pub(in crate::daemon) fn forget(self, manager: &ServiceManager) {
        for (cid, remains) in self.0 {
            remains.forget(manager, Cid::from_raw(cid));
        }
    }

    /// Ends VMs that are not configured any more.
    fn end(self, manager: &ServiceManager) {
        for (cid, remains) in self.0 {
            warn!("CID {cid}: no longer configured, its VMM is dropped");
            remains.end(manager, Cid::from_raw(cid));
        }
    }
}

/// What a VM has to survive a crash, and what is left of one.
pub(in crate::daemon) struct Survival {
    keeper: VmKeeper,
    journal: Journal,
    /// What is to be loaded.
    left: Option<(Loader, VmState)>,
    lost: Lost,
}

impl Survival {
    /// Prepares all VMs, before the sandbox is entered, and finds what is left of each. What can't be used is ended.
    pub(in crate::daemon) fn prepare_all(
        vms: &[VmConfig],
        manager: &ServiceManager,
        mut left: Left,
    ) -> Vec<Option<Self>> {
        let prepare = |config: &VmConfig| {
            let cid = config.guest_cid;
            let remains = left.0.remove(&cid.get());
            let prepared = Self::prepare(config, manager, remains);
            let warn = |error: &io::Error| {
                warn!("CID {cid}: a crash of this daemon would cost the VM its device: {error}")
            };
            prepared.inspect_err(warn).ok()
        };
        let prepared = vms.iter().map(prepare).collect();
        left.end(manager);
        prepared
    }

    fn prepare(
        config: &VmConfig,
        manager: &ServiceManager,
        remains: Option<Remains>,
    ) -> io::Result<Self> {
        let cid = config.guest_cid;
        if let Some(mut remains) = remains {
            match Self::resume(config, manager, &mut remains) {
                Ok(survival) => return Ok(survival),
                Err(error) => {
                    warn!("CID {cid}: not taken up after a crash, its VMM is dropped: {error}");
                    remains.end(manager, cid);
                }
            }
        }
        let journal = Journal::new(config)?;
        let keeper = Keeper::new(manager.clone(), cid)?;
        if let Some(file) = journal.file() {
            keeper.keep_connections(file)?;
        }
        Ok(Self {
            keeper: VmKeeper::new(keeper),
            journal,
            left: None,
            lost: Lost::default(),
        })
    }

    fn resume(
        config: &VmConfig,
        manager: &ServiceManager,
        remains: &mut Remains,
    ) -> Result<Self, LoadError> {
        let (journal, lost) = match &remains.connections {
            Some(file) => Journal::resume(file.try_clone()?, config)?,
            None => return Err(LoadError::Missing),
        };
        let (loader, keeper) = remains.load(manager.clone(), config.guest_cid)?;
        let keeper = VmKeeper::new(keeper);
        let state = match loader.document() {
            Ok(state) => state,
            Err(error) => {
                keeper.invalidate();
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

    /// Takes the listening sockets that are left, with what they are to be loaded from.
    pub(in crate::daemon) fn listeners(&mut self) -> Option<(Vec<ListenerState>, &mut Loader)> {
        let (loader, state) = self.left.as_mut()?;
        Some((std::mem::take(&mut state.listeners), loader))
    }

    /// Lets `vm` go on with what is left, inside the sandbox, and survive from now on. Returns what keeps it, for the end.
    pub(in crate::daemon) fn give_to(self, vm: &mut BoundVm, cid: Cid) -> VmKeeper {
        vm.set_journal(self.journal);
        if let Some((mut loader, state)) = self.left {
            let had_vmm = state.session.is_some();
            match vm.load(state, &mut loader) {
                Ok(()) => {
                    let count = self.lost.keys.len();
                    if had_vmm {
                        info!("CID {cid}: goes on after a crash, {count} connections are reset");
                    }
                    vm.reset_lost(self.lost.keys.clone());
                }
                Err(error) => {
                    warn!("CID {cid}: not taken up after a crash, its VMM is dropped: {error}");
                    self.keeper.invalidate();
                }
            }
        }
        vm.set_keeper(Box::new(self.keeper.clone()));
        self.keeper
    }
}

/// The keeper of a VM, which its session and whoever stops it share.
#[derive(Clone, Debug)]
pub(in crate::daemon) struct VmKeeper(Arc<Mutex<Shared>>);

#[derive(Debug)]
struct Shared {
    /// None when the VM is kept no more.
    keeper: Option<Keeper<ServiceManager>>,
    /// What was saved, and is to be kept.
    next: Option<io::Result<NextState>>,
    log: LogLimit,
}

impl VmKeeper {
    fn new(keeper: Keeper<ServiceManager>) -> Self {
        Self(Arc::new(Mutex::new(Shared {
            keeper: Some(keeper),
            next: None,
            log: LogLimit::default(),
        })))
    }

    fn invalidate(&self) {
        if let Some(keeper) = &mut self.0.lock().keeper {
            keeper.invalidate();
        }
    }

    /// Keeps the VM no more: it was handed over, or has ended.
    pub(in crate::daemon) fn forget(&self) {
        let shared = self.0.try_lock_for(STOP_TIMEOUT);
        if let Some(keeper) = shared.and_then(|mut shared| shared.keeper.take()) {
            keeper.forget();
        }
    }
}

impl Keep for VmKeeper {
    fn keep(&mut self, vm: Parts<'_>) {
        let mut shared = self.0.lock();
        let saved = shared
            .keeper
            .as_ref()
            .map(|keeper| keeper.save(|saver| vm.save(saver)));
        shared.next = saved;
    }

    fn store(&mut self) {
        let shared = &mut *self.0.lock();
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
            shared
                .log
                .log(|| warn!("a crash of this daemon would cost the VM its device: {error}"));
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
