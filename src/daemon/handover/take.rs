//! The successor's side: what a predecessor has left is received, loaded, and then this process's.
//!
//! Until [`Predecessor::commit`] this process may fail, and the predecessor goes on, or the next finds everything where it was.

use std::mem;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use log::{info, warn};

use super::crash::Left;
use super::give::describe;
use super::parcels::Opened;
use super::store::{self, Stored};
use super::{HandoverError, ProcessState, VERSION, path};
use crate::config::ProcessConfig;
use crate::daemon::service::ServiceManager;
use crate::daemon::vm::{BoundVm, VmState};
use crate::host::listener::LoadedListeners;
use crate::host::siblings::Siblings;
use crate::saved::Loader;

/// What a predecessor has left. When this is dropped without [`commit`](Self::commit), it is left to others.
pub(in crate::daemon) struct Predecessor {
    way: Way,
    state: ProcessState,
    loader: Loader,
    /// How the log calls what is taken over.
    what: String,
}

/// Where it comes from.
enum Way {
    /// The predecessor has ended.
    Store {
        manager: ServiceManager,
        /// Held as long as the others may need them.
        stored: Stored,
    },
    /// The predecessor waits for this process.
    Path {
        path: PathBuf,
        predecessor: path::Predecessor,
    },
}

impl Predecessor {
    /// Finds what there is: among what the service manager has passed, or at `--handover-path`. If nobody has handed anything over,
    /// what is left of a daemon that has died is returned as well.
    ///
    /// # Errors
    /// There is a daemon at `--handover-path`, and it does not hand over what can be taken over.
    pub(in crate::daemon) fn find(
        config: &ProcessConfig,
        passed: &[(RawFd, String)],
        manager: &ServiceManager,
    ) -> Result<(Option<Self>, Left), HandoverError> {
        let mut stored = Stored::take(passed);
        store::forget(manager, &stored.strange);
        let left = Left::new(mem::take(&mut stored.kept));
        if !stored.parcels.is_empty() {
            match stored.open().map_err(Into::into).and_then(load) {
                Ok((state, loader)) => {
                    left.forget(manager);
                    let manager = manager.clone();
                    let way = Way::Store { manager, stored };
                    return Ok((Some(Self::new(way, state, loader)), Left::default()));
                }
                Err(error) => {
                    warn!("what the service manager has stored is not taken over: {error}");
                    stored.discard();
                    store::forget(manager, &stored.names());
                }
            }
        }
        let Some(path) = &config.handover_path else {
            return Ok((None, left));
        };
        let failed = |error| HandoverError::Path(path.clone(), error);
        match path::Predecessor::connect(path).map_err(failed)? {
            Some(predecessor) => {
                let found = Self::from_path(path, predecessor, config)?;
                left.forget(manager);
                Ok((Some(found), Left::default()))
            }
            None => Ok((None, left)),
        }
    }

    fn from_path(
        path: &Path,
        predecessor: path::Predecessor,
        config: &ProcessConfig,
    ) -> Result<Self, HandoverError> {
        let path = path.to_owned();
        let opened = match predecessor.take(VERSION) {
            Ok(opened) => opened,
            Err(error) => return Err(HandoverError::Path(path, error)),
        };
        let loaded = load(opened).and_then(|(state, loader)| {
            match state.vms.iter().find(|vm| !is_configured(vm, config)) {
                Some(vm) => Err(HandoverError::NotConfigured(vm.guest_cid)),
                None => Ok((state, loader)),
            }
        });
        match loaded {
            Ok((state, loader)) => Ok(Self::new(Way::Path { path, predecessor }, state, loader)),
            Err(error) => {
                predecessor.refuse(&error.to_string());
                Err(error)
            }
        }
    }

    fn new(way: Way, state: ProcessState, loader: Loader) -> Self {
        let what = describe(&state.vms);
        Self {
            way,
            state,
            loader,
            what,
        }
    }

    /// The listening sockets, to be adopted.
    ///
    /// # Errors
    /// One is not there.
    pub(in crate::daemon) fn listeners(&mut self) -> Result<LoadedListeners, HandoverError> {
        let mut loaded = LoadedListeners::new(matches!(self.way, Way::Store { .. }));
        let ProcessState {
            vms,
            stats,
            handover,
            ..
        } = &mut self.state;
        let of_vms = vms.iter_mut().flat_map(|vm| mem::take(&mut vm.listeners));
        let of_process = stats.take().into_iter().chain(handover.take());
        for state in of_vms.chain(of_process) {
            loaded.load(state, &mut self.loader)?;
        }
        Ok(loaded)
    }

    /// Loads the VMs that there are.
    ///
    /// # Errors
    /// The state of one can't be loaded, and the predecessor can still serve it.
    pub(in crate::daemon) fn load(
        &mut self,
        vms: &mut [BoundVm],
        siblings: &Siblings,
    ) -> Result<(), HandoverError> {
        for state in mem::take(&mut self.state.vms) {
            let cid = state.guest_cid;
            let Some(vm) = vms.iter_mut().find(|vm| vm.cid() == cid) else {
                warn!("CID {cid}: no longer configured, its VMM and its connections are dropped");
                continue;
            };
            match (vm.load(state, &mut self.loader), &self.way) {
                (Ok(()), _) => {}
                (Err(error), Way::Path { .. }) => return Err(HandoverError::Vm(cid, error)),
                (Err(error), Way::Store { .. }) => {
                    warn!(
                        "CID {cid}: not taken over, its VMM and its connections are dropped: {error}"
                    );
                }
            }
        }
        let calls = mem::take(&mut self.state.calls);
        match (siblings.load_calls(calls, &mut self.loader), &self.way) {
            (Err(error), Way::Path { .. }) => return Err(error.into()),
            (Err(error), Way::Store { .. }) => warn!("calls between guests are refused: {error}"),
            (Ok(()), _) => {}
        }
        Ok(())
    }

    /// Makes all that was loaded this process's: the predecessor serves no longer.
    ///
    /// # Errors
    /// The predecessor goes on.
    pub(in crate::daemon) fn commit(self) -> Result<(), HandoverError> {
        match self.way {
            Way::Path { path, predecessor } => {
                let relieved = predecessor.relieve();
                relieved.map_err(|error| HandoverError::Path(path, error))?;
            }
            Way::Store { manager, stored } => store::forget(&manager, &stored.names()),
        }
        info!(
            "took {} over from process {}",
            self.what, self.state.process
        );
        Ok(())
    }

    /// Tells the predecessor why this process ends.
    pub(in crate::daemon) fn refuse(&self, reason: &str) {
        if let Way::Path { predecessor, .. } = &self.way {
            predecessor.refuse(reason);
        }
    }
}

fn is_configured(vm: &VmState, config: &ProcessConfig) -> bool {
    config
        .vms
        .iter()
        .any(|other| other.guest_cid == vm.guest_cid)
}

/// The document of what was received.
fn load(opened: Opened) -> Result<(ProcessState, Loader), HandoverError> {
    let (state, fds) = opened.finish()?;
    let loader = Loader::open(state, fds)?;
    Ok((ProcessState::load(&loader)?, loader))
}
