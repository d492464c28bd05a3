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
//! [`message`](super::message) reads and checks the messages. What they mean is done here: this keeps what was negotiated, the
//! memory and the rings' set-up, and passes on to the device ([`VhostUserVsockBackend`]) what is the device's. Each message that
//! concerns the rings is handled between two turns of the worker.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use log::{error, info, warn};
use thiserror::Error;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::VhostUserVsockBackend;
use super::channel::Channel;
use super::memory::{MAX_SLOTS, MemoryError, MemoryTable};
use super::message::{Message, MessageError, Request, RingAddresses};
use super::state::Transfer;
use crate::vhost_user_vsock_thread::VsockVring;

/// The size of the configuration space that a VMM may ask for (VHOST_USER_MAX_CONFIG_SIZE), in bytes.
const MAX_CONFIG: usize = 256;

/// The flags of GET_CONFIG and SET_CONFIG: writable fields, live migration.
const CONFIG_FLAGS: u32 = 3;

/// The only flag of SET_VRING_ADDR: the VMM logs writes to the used ring.
const VRING_LOG: u32 = 1;

/// Why a message was not obeyed.
#[derive(Debug, Error)]
pub(crate) enum SessionError {
    /// There is no message, or a broken one.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The VMM asks for what was not negotiated.
    #[error("{0:?} without its feature")]
    NotNegotiated(Request),
    /// The VMM asks for what can't be.
    #[error("{0}")]
    Invalid(&'static str),
    /// The VMM's memory can't be used.
    #[error("the VMM asks for what can't be: {0}")]
    Memory(MemoryError),
    /// A region was refused. The session goes on.
    #[error("{0}")]
    Refused(MemoryError),
}

impl SessionError {
    /// Whether the session goes on: both sides have the same idea of the device.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused(_))
    }

    /// Whether the VMM has just left.
    pub(crate) fn is_end(&self) -> bool {
        matches!(
            self,
            Self::Message(MessageError::Closed | MessageError::Socket(_))
        )
    }
}

type Result<T> = std::result::Result<T, SessionError>;

/// What one VMM has negotiated and set up.
pub(crate) struct Session {
    pub(super) channel: Channel,
    pub(super) device: Arc<VhostUserVsockBackend>,
    pub(super) owned: bool,
    pub(super) features: u64,
    /// What the device was told last of the features. That outlives a reset of the device, and of the owner.
    pub(super) accepted: Option<u64>,
    pub(super) protocol_features: u64,
    pub(super) memory: MemoryTable,
    pub(super) transfer: Transfer,
    /// The channel for requests to the VMM. Nothing is ever requested, but it stays open: some VMMs watch it.
    pub(super) requests: Option<OwnedFd>,
}

impl Session {
    /// The session of a VMM that is connected by `socket`.
    pub(crate) fn begin(socket: UnixStream, device: Arc<VhostUserVsockBackend>) -> Self {
        Self {
            channel: Channel::new(socket),
            device,
            owned: false,
            features: 0,
            accepted: None,
            protocol_features: 0,
            memory: MemoryTable::default(),
            transfer: Transfer::None,
            requests: None,
        }
    }

    /// The VMM's socket, to wait for what comes.
    pub(crate) fn socket(&self) -> Arc<UnixStream> {
        self.channel.socket()
    }

    /// Whether a reply waits until the VMM reads. No message is taken before.
    pub(crate) fn has_unsent(&self) -> bool {
        self.channel.has_unsent()
    }

    /// Takes what has come from the VMM, without waiting. If that completes a message, does what it asks; the answer is for
    /// [`Session::send_reply`]. Returns whether a successor would have to know: whether anything is different from before.
    ///
    /// # Errors
    /// The VMM is gone, or asks for what can't be. Only after a [refusal](SessionError::is_refusal) the session goes on.
    pub(crate) fn handle_request(&mut self) -> Result<bool> {
        let was_idle = self.channel.is_idle();
        let mut has_changed = false;
        if let Some(message) = self.channel.receive()? {
            has_changed = !message.request.is_question();
            self.handle(message)?;
        }
        Ok(has_changed || !was_idle || self.channel.has_begun())
    }

    /// Sends what the VMM takes of a reply.
    ///
    /// # Errors
    /// The VMM is gone.
    pub(crate) fn send_reply(&mut self) -> Result<()> {
        self.channel.flush()?;
        Ok(())
    }

    fn handle(&mut self, mut message: Message) -> Result<()> {
        self.check_negotiated(message.request)?;
        if let Some(reply) = self.answer(&mut message)? {
            self.channel.reply(message.request, &reply);
            return Ok(());
        }
        let done = self.obey(&mut message);
        if message.needs_reply && self.has(VhostUserProtocolFeatures::REPLY_ACK) {
            let status = u64::from(done.is_err());
            self.channel.reply(message.request, &status.to_ne_bytes());
        }
        done
    }

    /// Whether both sides have a protocol feature.
    fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features & feature.bits() != 0
    }

    /// Checks that a VMM asks only for what it has negotiated.
    fn check_negotiated(&self, request: Request) -> Result<()> {
        let feature = match request {
            Request::GetQueueNum => VhostUserProtocolFeatures::MQ,
            Request::SetBackendReqFd => VhostUserProtocolFeatures::BACKEND_REQ,
            Request::GetConfig | Request::SetConfig => VhostUserProtocolFeatures::CONFIG,
            Request::ResetDevice => VhostUserProtocolFeatures::RESET_DEVICE,
            Request::GetMaxMemSlots | Request::AddMemReg | Request::RemMemReg => {
                VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            }
            Request::SetDeviceStateFd | Request::CheckDeviceState => {
                VhostUserProtocolFeatures::DEVICE_STATE
            }
            Request::SetVringEnable if !self.has_protocol_features() => {
                return Err(SessionError::NotNegotiated(request));
            }
            _ => return Ok(()),
        };
        if self.has(feature) {
            Ok(())
        } else {
            Err(SessionError::NotNegotiated(request))
        }
    }

    fn has_protocol_features(&self) -> bool {
        self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0
    }

    /// The answer to a message that has one of its own. None for others.
    fn answer(&mut self, message: &mut Message) -> Result<Option<Vec<u8>>> {
        let number = |message: &Message, number: u64| -> Result<Option<Vec<u8>>> {
            message.empty()?;
            Ok(Some(number.to_ne_bytes().into()))
        };
        match message.request {
            Request::GetFeatures => number(message, self.device.features()),
            Request::GetProtocolFeatures => number(message, self.device.protocol_features().bits()),
            Request::GetQueueNum => number(message, self.device.num_queues() as u64),
            Request::GetMaxMemSlots => number(message, MAX_SLOTS),
            Request::GetVringBase => self.stop_ring(message).map(Some),
            Request::GetConfig => self.get_config(message).map(Some),
            Request::SetDeviceStateFd => self.begin_transfer(message).map(Some),
            Request::CheckDeviceState => {
                message.empty()?;
                number(message, self.end_transfer().into())
            }
            _ => Ok(None),
        }
    }

    /// Does what a message without an answer of its own asks.
    fn obey(&mut self, message: &mut Message) -> Result<()> {
        match message.request {
            Request::SetOwner => {
                message.empty()?;
                self.set_owner()
            }
            Request::ResetOwner => {
                message.empty()?;
                (self.owned, self.features, self.protocol_features) = (false, 0, 0);
                Ok(())
            }
            Request::ResetDevice => {
                message.empty()?;
                self.features = 0;
                self.device.reset_device();
                Ok(())
            }
            Request::SetFeatures => self.set_features(message.u64()?),
            Request::SetProtocolFeatures => {
                self.protocol_features = message.u64()?;
                Ok(())
            }
            Request::SetMemTable => self.set_mem_table(message),
            Request::AddMemReg => self.add_mem_region(message),
            Request::RemMemReg => self.remove_mem_region(message),
            Request::SetVringNum => self.set_vring_num(message.ring_state()?),
            Request::SetVringAddr => self.set_vring_addr(message.ring_addresses()?),
            Request::SetVringBase => self.set_vring_base(message.ring_state()?),
            Request::SetVringKick | Request::SetVringCall | Request::SetVringErr => {
                self.set_vring_event(message)
            }
            Request::SetVringEnable => self.set_vring_enable(message.ring_state()?),
            Request::SetConfig => self.set_config(message),
            Request::SetBackendReqFd => {
                let ([], requests) = message.file()?;
                self.requests = Some(requests);
                Ok(())
            }
            // They have answers of their own.
            _ => Ok(()),
        }
    }
}

// Negotiation.
impl Session {
    fn set_owner(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.owned, true) {
            return Err(SessionError::Invalid("already claimed"));
        }
        Ok(())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.device.features() != 0 {
            return Err(SessionError::Invalid("features that were not offered"));
        }
        self.features = features;
        self.accepted = Some(features);
        // Without protocol features there is no SET_VRING_ENABLE, and rings are enabled from the start.
        if !self.has_protocol_features() {
            let worker = self.device.worker();
            for vring in self.device.vrings() {
                vring.set_enabled(true);
            }
            worker.wake();
        }
        self.tell_features(features);
        Ok(())
    }

    /// Tells the device what the driver has accepted.
    pub(super) fn tell_features(&self, features: u64) {
        self.device
            .set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        self.device.acked_features(features);
    }

    /// A part of the configuration space, or an answer without one where there is none.
    fn get_config(&self, message: &Message) -> Result<Vec<u8>> {
        let (header, bytes) = message.config()?;
        check_config(header.offset, bytes, header.flags)?;
        let size = bytes.len();
        let found = self.device.get_config(header.offset, size as u32);
        Ok(header.with(if found.len() == size { &found } else { &[] }))
    }

    fn set_config(&self, message: &Message) -> Result<()> {
        let (header, bytes) = message.config()?;
        check_config(header.offset, bytes, header.flags)?;
        let set = self.device.set_config(header.offset, bytes);
        set.map_err(|_| SessionError::Invalid("the configuration space can't be written"))
    }
}

/// Checks a part of the configuration space.
fn check_config(offset: u32, bytes: &[u8], flags: u32) -> Result<()> {
    let end = bytes.len().saturating_add(offset as usize);
    if bytes.is_empty() || end > MAX_CONFIG || flags & !CONFIG_FLAGS != 0 {
        return Err(SessionError::Invalid("no part of a configuration space"));
    }
    Ok(())
}

// Memory.
impl Session {
    fn set_mem_table(&mut self, message: &mut Message) -> Result<()> {
        let regions = message.regions()?;
        self.memory.replace(regions).map_err(SessionError::Memory)?;
        self.device.replace_memory(self.memory.map());
        Ok(())
    }

    fn add_mem_region(&mut self, message: &mut Message) -> Result<()> {
        let (region, file) = message.region_to_add()?;
        let added = self.memory.add(region, file);
        added.map_err(SessionError::Refused)?;
        self.device.replace_memory(self.memory.map());
        Ok(())
    }

    /// Removes a region. A descriptor that comes along, as some VMMs send it, is closed.
    fn remove_mem_region(&mut self, message: &mut Message) -> Result<()> {
        let removed = self.memory.remove(message.region_to_remove()?);
        removed.map_err(SessionError::Refused)?;
        self.device.replace_memory(self.memory.map());
        Ok(())
    }
}

// Rings.
impl Session {
    /// The index of a ring, if there is such a ring.
    fn ring(&self, index: u32) -> Result<usize> {
        let index = index as usize;
        if index < self.device.num_queues() {
            Ok(index)
        } else {
            Err(SessionError::Invalid("no such ring"))
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

    fn set_vring_num(&self, (index, num): (u32, u32)) -> Result<()> {
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
                error!("ring {index}: the VMM wants {num} entries, at most {max} are offered");
                Err(SessionError::Invalid("a ring of that size"))
            }
        }
    }

    fn set_vring_addr(&self, addresses: RingAddresses) -> Result<()> {
        let RingAddresses {
            descriptors,
            available,
            used,
            ..
        } = addresses;
        // Virtio 1.2, 2.7.
        let is_aligned = descriptors % 16 == 0 && available % 2 == 0 && used % 4 == 0;
        if !is_aligned || addresses.flags & !VRING_LOG != 0 {
            return Err(SessionError::Invalid("a ring at an address that none has"));
        }
        let index = self.ring(addresses.ring)?;
        let translate = |address| self.memory.translate(address).map_err(SessionError::Memory);
        let descriptors = translate(descriptors)?;
        let available = translate(available)?;
        let used = translate(used)?;
        self.set_up_ring(index, |vring| {
            vring
                .set_queue_info(descriptors.0, available.0, used.0)
                .map_err(|_| SessionError::Invalid("a ring at an address that none has"))
        })
    }

    fn set_vring_base(&self, (index, base): (u32, u32)) -> Result<()> {
        // It starts at its used index, whatever the VMM says, but is asked for this until it does.
        let index = self.ring(index)?;
        self.set_up_ring(index, |vring| {
            vring.set_queue_next_avail(base as u16);
            Ok(())
        })
    }

    /// Stops a ring, and says where it stands.
    fn stop_ring(&self, message: &Message) -> Result<Vec<u8>> {
        let (index, _) = message.ring_state()?;
        let ring = self.ring(index)?;
        let mut worker = self.device.worker();
        worker.stop_ring(ring);
        let base = self.device.vrings()[ring].queue_next_avail();
        let answer = [index, base.into()].map(u32::to_ne_bytes);
        Ok(answer.as_flattened().into())
    }

    fn set_vring_event(&self, message: &mut Message) -> Result<()> {
        let (index, file) = message.ring_event()?;
        let index = self.ring(index)?;
        let file = file.map(File::from);
        let mut worker = self.device.worker();
        match message.request {
            Request::SetVringCall => worker.set_call(index, file),
            Request::SetVringErr => worker.set_err(index, file),
            _ => {
                let has_kick = file.is_some();
                worker.set_kick(index, file);
                if has_kick {
                    let mut vring = self.device.vrings()[index].get_mut();
                    worker.start_ring(index, vring.get_queue_mut());
                }
            }
        }
        Ok(())
    }

    fn set_vring_enable(&self, (index, enable): (u32, u32)) -> Result<()> {
        let enable = match enable {
            0 => false,
            1 => true,
            _ => return Err(SessionError::Invalid("a ring is enabled or not")),
        };
        let index = self.ring(index)?;
        let worker = self.device.worker();
        self.device.vrings()[index].set_enabled(enable);
        worker.wake();
        Ok(())
    }
}

// Snapshots.
impl Session {
    /// Begins to transfer the device's state. The daemon has no descriptor of its own for that.
    fn begin_transfer(&mut self, message: &mut Message) -> Result<Vec<u8>> {
        const NO_FD: u64 = 1 << 8;
        let ((direction, phase), file) = message.transfer()?;
        self.transfer = match (direction, phase) {
            (0, 0) => Transfer::write(self.device.guest_cid, file.into()),
            (1, 0) => Transfer::Loading(file.into()),
            _ => {
                return Err(SessionError::Invalid(
                    "no such transfer of the device's state",
                ));
            }
        };
        Ok(NO_FD.to_ne_bytes().into())
    }

    /// Whether the transfer has failed.
    fn end_transfer(&mut self) -> bool {
        match std::mem::take(&mut self.transfer).finish() {
            Ok(Some(cid)) => {
                info!("the state of CID {cid} was loaded: its connections are gone");
                self.device.worker().reset_transport();
                false
            }
            Ok(None) => false,
            Err(error) => {
                // The answer that the VMM gets is just a number.
                warn!("the device's state {error}");
                true
            }
        }
    }
}
