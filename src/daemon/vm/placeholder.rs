//! Until the state of a VM is there.

use std::io;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{BoundVm, Vm};
use crate::host::listener::ListenerState;
use crate::packet::header::Cid;
use crate::saved::{LoadError, Loader, Saver};

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::daemon) struct CallState {}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::daemon) struct VmState {
    cid: u32,
    #[serde(skip, default = "cid")]
    pub(in crate::daemon) guest_cid: Cid,
    pub(in crate::daemon) listeners: Vec<ListenerState>,
}

fn cid() -> Cid {
    Cid::HOST
}

impl VmState {
    pub(in crate::daemon) fn connections(&self) -> usize {
        0
    }
}

#[derive(Debug, Error)]
#[error("it can't be parked yet")]
pub(in crate::daemon) struct ParkError;

#[derive(Debug)]
pub(in crate::daemon) struct Parked<'v>(&'v ());

impl Vm {
    pub(in crate::daemon) fn park(&self, _until: Instant) -> Result<Parked<'_>, ParkError> {
        Err(ParkError)
    }
}

impl Parked<'_> {
    pub(in crate::daemon) fn save<'a>(&'a self, _: &mut Saver<'a>) -> io::Result<VmState> {
        Err(io::Error::other("not yet"))
    }
}

impl BoundVm {
    pub(in crate::daemon) fn load(
        &mut self,
        _state: VmState,
        _loader: &mut Loader,
        _now: Instant,
    ) -> Result<(), LoadError> {
        Err(LoadError::Missing)
    }
}
