//! Hand-over: one daemon, the *predecessor*, leaves its VMs to the next, the *successor*. No VM, no guest and no host program
//! notices.
//!
//! ```text
//! give      parks the VMs, saves them, and sends what was saved
//! take      receives it, and loads it
//!   path    how the two meet with --handover-path
//!   store   what the service manager keeps from one to the other
//!   parcels how a file and many descriptors are sent
//! crash     what is left of VMs whose daemon has died
//!   kept    what the service manager keeps of a VM for that
//! ```
//!
//! What is saved is a document, as `saved` describes it, whose root is `ProcessState`.

mod crash;
mod give;
mod kept;
mod names;
mod parcels;
mod path;
mod store;
mod take;

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub(super) use self::crash::{Left, Survival, VmKeeper};
pub(super) use self::give::{Given, HandOver, Process};
pub use self::names::{StoredName, is_stored};
pub use self::parcels::ParcelError;
pub use self::path::PathError;
pub(super) use self::take::Predecessor;
use super::service;
use super::vm::VmState;
use crate::host::listener::ListenerState;
use crate::host::siblings::CallState;
use crate::packet::header::Cid;
use crate::saved::{self, LoadError, Loader};
use crate::syscalls::Syscall;
use crate::thread_backend::journal;

/// The version of the state that is written, and the last one that is read.
const VERSION: u32 = 1;

/// What a process hands over.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ProcessState {
    version: u32,
    /// The id of the process.
    process: u32,
    vms: Vec<VmState>,
    /// The statistics socket.
    #[serde(default)]
    stats: Option<ListenerState>,
    /// The socket of `--handover-path`.
    #[serde(default)]
    handover: Option<ListenerState>,
    /// Calls between its VMs that wait.
    #[serde(default)]
    calls: Vec<CallState>,
}

/// The part of the document that every version has.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// Why VMs are not taken over.
#[derive(Debug, Error)]
pub enum HandoverError {
    /// The daemon at `--handover-path` does not hand them over.
    #[error("--handover-path {0}: {1}")]
    Path(PathBuf, PathError),
    /// The state is a later daemon's.
    #[error("the state of the daemon that runs has version {0}, this one reads version {VERSION}")]
    Version(u32),
    /// The state can't be loaded.
    #[error("the state of the daemon that runs: {0}")]
    State(#[from] LoadError),
    /// That of a VM can't be loaded.
    #[error("CID {0}: the state of the daemon that runs: {1}")]
    Vm(Cid, LoadError),
    /// A VM of the predecessor's is not among those of the successor.
    #[error("CID {0}: the daemon that runs serves it, and it is not configured here")]
    NotConfigured(Cid),
    /// What was stored is not what it should be.
    #[error(transparent)]
    Parcels(#[from] ParcelError),
    /// The system refuses something.
    #[error("no hand-over is possible: {0}")]
    Io(#[from] io::Error),
}

impl ProcessState {
    /// Reads a document.
    fn load(loader: &Loader) -> Result<Self, HandoverError> {
        let Version { version } = loader.document()?;
        if version > VERSION {
            return Err(HandoverError::Version(version));
        }
        Ok(loader.document()?)
    }
}

/// The system calls of a daemon that can hand its VMs over.
pub(super) fn syscalls() -> Vec<Syscall> {
    [
        saved::SYSCALLS,
        parcels::SYSCALLS,
        path::SYSCALLS,
        service::STORE_SYSCALLS,
        kept::SYSCALLS,
        journal::SYSCALLS,
    ]
    .concat()
}

#[cfg(test)]
mod tests;
