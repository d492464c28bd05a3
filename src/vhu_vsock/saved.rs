//! A session as a successor takes it over: from its socket to where its rings stand.
//!
//! The rings' own indices are in the guest's memory. A ring that was started goes on at its used index, whether it was parked
//! there or the daemon died: every buffer before that is done, and no other.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vhost_user_backend::VhostUserBackend;

use super::VhostUserVsockBackend;
use super::channel::{Channel, ChannelState};
use super::memory::{MemoryTable, RegionState};
use super::session::Session;
use super::state::{Transfer, TransferState};
use crate::saved::{LoadError, Loader, SavedFd, Saver};
use crate::vhost_user_vsock_thread::VhostUserVsockThread;
use crate::vhost_user_vsock_thread::saved::RingState;

/// A session in a document.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SessionState {
    channel: ChannelState,
    owned: bool,
    features: u64,
    #[serde(default)]
    accepted: Option<u64>,
    protocol_features: u64,
    /// In the order in which the VMM has named them.
    regions: Vec<RegionState>,
    rings: Vec<RingState>,
    /// The driver has not got a TRANSPORT_RESET yet.
    #[serde(default)]
    transport_reset: bool,
    #[serde(default)]
    transfer: TransferState,
    #[serde(default)]
    requests: Option<SavedFd>,
}

impl Session {
    /// Saves the session and its rings, which are `worker`'s: between two messages, and between two turns.
    ///
    /// # Errors
    /// The system refuses.
    pub(crate) fn save<'a>(
        &'a self,
        worker: &'a VhostUserVsockThread,
        saver: &mut Saver<'a>,
    ) -> io::Result<SessionState> {
        let rings = self.device.vrings().iter().enumerate();
        let rings = rings.map(|(index, vring)| worker.save_ring(index, vring, saver));
        Ok(SessionState {
            rings: rings.collect(),
            channel: self.channel.save(saver)?,
            owned: self.owned,
            features: self.features,
            accepted: self.accepted,
            protocol_features: self.protocol_features,
            regions: self.memory.save(saver)?,
            transport_reset: worker.has_transport_reset(),
            transfer: self.transfer.save(saver),
            requests: self.requests.as_ref().map(|fd| saver.fd(fd.as_fd())),
        })
    }

    /// Goes on with a session on a device that has none. What the device keeps of one that can't be loaded goes with
    /// [`VhostUserVsockBackend::end_session`].
    ///
    /// # Errors
    /// The state is not complete, is not one of a session, or does not fit this device; or the system refuses.
    pub(crate) fn load(
        state: SessionState,
        device: Arc<VhostUserVsockBackend>,
        loader: &mut Loader,
    ) -> Result<Self, LoadError> {
        let features = state.features | state.accepted.unwrap_or_default();
        if features & !device.features() != 0 {
            return Err(LoadError::Invalid(
                "features that this device does not offer",
            ));
        }
        if state.rings.len() > device.num_queues() {
            return Err(LoadError::Invalid("more rings than the device has"));
        }
        let requests = state.requests.map(|fd| loader.take_fd(fd)).transpose()?;
        let session = Self {
            channel: Channel::load(state.channel, loader)?,
            device,
            owned: state.owned,
            features: state.features,
            accepted: state.accepted,
            protocol_features: state.protocol_features,
            memory: MemoryTable::load(state.regions, loader)?,
            transfer: Transfer::load(state.transfer, loader)?,
            requests,
        };
        let device = &session.device;
        if !session.memory.is_empty() {
            device.replace_memory(session.memory.map());
        }
        if let Some(features) = session.accepted {
            session.tell_features(features);
        }
        for (index, ring) in state.rings.into_iter().enumerate() {
            let vring = &device.vrings()[index];
            device.worker().load_ring(index, vring, ring, loader)?;
        }
        device.resume_session(state.transport_reset);
        Ok(session)
    }
}
