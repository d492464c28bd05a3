//! A vhost-user session: what one VMM asks of the device, from its connection to its end.
//!
//! # Protocol
//!
//! The VMM, in the role of the *frontend*, sends messages over a Unix socket, some of them with descriptors (vhost-user,
//! "Message types"). QEMU starting a guest and resetting it later, shortened:
//!
//! ```text
//! GET_FEATURES, SET_PROTOCOL_FEATURES, SET_OWNER      what both sides can do
//! GET_CONFIG                                          the guest's CID
//! SET_FEATURES                                        what the guest's driver has accepted
//! ADD_MEM_REG or SET_MEM_TABLE                        the guest's memory, one descriptor a region
//! SET_VRING_NUM, _BASE, _ADDR, _KICK, _CALL           each ring's size, addresses and eventfds; KICK starts it
//! SET_VRING_ENABLE 1                                  packets flow
//! GET_VRING_BASE                                      stops a ring, and asks where it stands
//! ```
//!
//! The `vhost` crate reads and checks the messages. What they mean is done here: this keeps what was negotiated, the memory
//! and the rings' set-up, and passes on to the device ([`VhostUserVsockBackend`]) what is the device's. Each message that
//! concerns the rings is handled between two turns of the worker.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use log::{info, warn};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Backend, BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::VhostUserVsockBackend;
use super::memory::{MAX_SLOTS, MemoryError, MemoryTable};
use super::state::Transfer;
use crate::vhost_user_vsock_thread::VsockVring;

/// A session, and the requests that it gets.
pub(crate) type SessionHandler = BackendReqHandler<Mutex<Session>>;

/// What one VMM has negotiated and set up.
pub(crate) struct Session {
    device: Arc<VhostUserVsockBackend>,
    owned: bool,
    features: u64,
    protocol_features: u64,
    memory: MemoryTable,
    transfer: Transfer,
}

impl Session {
    /// The session of a VMM that is connected by `stream`.
    pub(crate) fn begin(stream: UnixStream, device: Arc<VhostUserVsockBackend>) -> SessionHandler {
        let session = Self {
            device,
            owned: false,
            features: 0,
            protocol_features: 0,
            memory: MemoryTable::default(),
            transfer: Transfer::None,
        };
        BackendReqHandler::from_stream(stream, Arc::new(Mutex::new(session)))
    }

    /// The index of a ring, if there is such a ring.
    fn ring(&self, index: impl Into<u32>) -> Result<usize> {
        let index = index.into() as usize;
        if index < self.device.num_queues() {
            Ok(index)
        } else {
            Err(Error::InvalidParam)
        }
    }

    /// Sets a ring up, between two turns. One that runs goes on with what has changed.
    fn set_up_ring(
        &self,
        index: usize,
        set_up: impl FnOnce(&VsockVring) -> Result<()>,
    ) -> Result<()> {
        let mut worker = self.device.worker();
        let vring = &self.device.vrings()[index];
        set_up(vring)?;
        if worker.is_started(index) {
            worker.start_ring(index, vring.get_mut().get_queue_mut());
        }
        Ok(())
    }
}

/// An error after which the VMM and we have different ideas of the device: it ends the session.
fn fatal(error: MemoryError) -> Error {
    log::warn!("the VMM asks for what can't be: {error}");
    Error::InvalidParam
}

fn unsupported<T>() -> Result<T> {
    Err(Error::InvalidOperation("not supported"))
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.owned, true) {
            return Err(Error::InvalidOperation("already claimed"));
        }
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.owned = false;
        self.features = 0;
        self.protocol_features = 0;
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.features = 0;
        self.device.reset_device();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.device.features() != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = features;
        // Without protocol features there is no SET_VRING_ENABLE, and rings are enabled from the start.
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            let worker = self.device.worker();
            for vring in self.device.vrings() {
                vring.set_enabled(true);
            }
            worker.wake();
        }
        self.device
            .set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        self.device.acked_features(features);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(self.device.protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.device.num_queues() as u64)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.memory.replace(regions, files).map_err(fatal)?;
        self.device.replace_memory(self.memory.map());
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_SLOTS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.memory
            .add(region, file)
            .map_err(MemoryError::into_refusal)?;
        self.device.replace_memory(self.memory.map());
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.memory
            .remove(region)
            .map_err(MemoryError::into_refusal)?;
        self.device.replace_memory(self.memory.map());
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let max = self.device.max_queue_size();
        let index = self.ring(index)?;
        // A split ring has a power of two of entries (virtio 1.2, 2.7).
        match u16::try_from(num) {
            Ok(size) if size.is_power_of_two() && usize::from(size) <= max => {
                self.set_up_ring(index, |vring| {
                    vring.set_queue_size(size);
                    Ok(())
                })
            }
            _ => {
                log::error!("ring {index}: the VMM wants {num} entries, at most {max} are offered");
                Err(Error::InvalidParam)
            }
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let index = self.ring(index)?;
        let descriptor = self.memory.translate(descriptor).map_err(fatal)?;
        let available = self.memory.translate(available).map_err(fatal)?;
        let used = self.memory.translate(used).map_err(fatal)?;
        self.set_up_ring(index, |vring| {
            vring
                .set_queue_info(descriptor.0, available.0, used.0)
                .map_err(|_| Error::InvalidParam)
        })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        // It starts at its used index, whatever the VMM says, but is asked for this until it does.
        let index = self.ring(index)?;
        self.set_up_ring(index, |vring| {
            vring.set_queue_next_avail(base as u16);
            Ok(())
        })
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = self.ring(index)?;
        self.device
            .stop_vring(index)
            .map_err(|_| Error::BackendInternalError)?;
        let _worker = self.device.worker();
        let base = self.device.vrings()[ring].queue_next_avail();
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let index = self.ring(index)?;
        let mut worker = self.device.worker();
        let has_kick = file.is_some();
        worker.set_kick(index, file);
        if has_kick {
            let mut vring = self.device.vrings()[index].get_mut();
            worker.start_ring(index, vring.get_queue_mut());
        }
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let index = self.ring(index)?;
        self.device.worker().set_call(index, file);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let index = self.ring(index)?;
        self.device.worker().set_err(index, file);
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(Error::InactiveFeature(
                VhostUserVirtioFeatures::PROTOCOL_FEATURES,
            ));
        }
        let index = self.ring(index)?;
        let worker = self.device.worker();
        self.device.vrings()[index].set_enabled(enable);
        worker.wake();
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(self.device.get_config(offset, size))
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        let set = self.device.set_config(offset, bytes);
        set.map_err(|_| Error::BackendInternalError)
    }

    fn set_backend_req_fd(&mut self, requests: Backend) {
        let has = |feature: VhostUserProtocolFeatures| self.protocol_features & feature.bits() != 0;
        requests.set_reply_ack_flag(has(VhostUserProtocolFeatures::REPLY_ACK));
        self.device.set_backend_req_fd(requests);
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        file: File,
    ) -> Result<Option<File>> {
        self.transfer = match direction {
            VhostTransferStateDirection::SAVE => Transfer::save(self.device.guest_cid, file),
            VhostTransferStateDirection::LOAD => Transfer::Loading(file),
        };
        Ok(None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        let finished = std::mem::take(&mut self.transfer).finish();
        let loaded = finished.map_err(|error| {
            // The answer that the VMM gets is just a number.
            warn!("the device's state {error}");
            Error::BackendInternalError
        })?;
        if let Some(cid) = loaded {
            info!("the state of CID {cid} was loaded: its connections are gone");
            self.device.worker().reset_transport();
        }
        Ok(())
    }

    // Nothing of the following was offered.

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unsupported()
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        unsupported()
    }
}
