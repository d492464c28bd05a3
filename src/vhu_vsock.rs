//! The virtio-vsock device of one guest, as the vhost-user library's traits describe a device.
//!
//! [`VhostUserVsockBackend`] answers what the device is: its features, its configuration space (the guest's CID, virtio 1.2,
//! 5.10.4) and its three rings. One worker thread does its work, in [`VhostUserVsockBackend::run`]. What a VMM negotiates and
//! sets up is kept by [`session`], one session after the other.

mod channel;
mod memory;
mod message;
pub(crate) mod saved;
pub(crate) mod session;
mod state;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use log::debug;
use parking_lot::{Mutex, MutexGuard};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_F_IN_ORDER, VIRTIO_F_NOTIFY_ON_EMPTY, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::config::VmConfig;
use crate::host::entry::EntrySocket;
use crate::host::siblings::{Membership, Siblings};
use crate::metrics::counters::VmSnapshot;
use crate::packet::header::Cid;
use crate::syscalls::{NOT_EXECUTABLE, Syscall};
use crate::thread_backend::Types;
use crate::vhost_user_vsock_thread::{
    self, Epoll, EventBuffer, GuestMemoryHandle, NUM_RINGS, VhostUserVsockThread, VsockVring, Wait,
};

/// For the guest's memory, and to end a session.
const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_close),
    Syscall::any(libc::SYS_statx),
    Syscall::only(libc::SYS_mmap, NOT_EXECUTABLE),
    Syscall::any(libc::SYS_munmap),
];

pub(crate) fn syscalls() -> Vec<Syscall> {
    [
        SYSCALLS,
        channel::SYSCALLS,
        state::SYSCALLS,
        &vhost_user_vsock_thread::syscalls(),
    ]
    .concat()
}

const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_F_NOTIFY_ON_EMPTY
    | 1 << VIRTIO_F_IN_ORDER
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

// Virtio 1.2, 5.10.3.
const VIRTIO_VSOCK_F_STREAM: u32 = 0;
const VIRTIO_VSOCK_F_SEQPACKET: u32 = 1;
const VIRTIO_VSOCK_F_NO_IMPLIED_STREAM: u32 = 2;

/// Offered where there is more than streams. A driver that names no type has streams; Linux names SEQPACKET and uses both.
const TYPE_FEATURES: u64 = 1 << VIRTIO_VSOCK_F_STREAM
    | 1 << VIRTIO_VSOCK_F_SEQPACKET
    | 1 << VIRTIO_VSOCK_F_NO_IMPLIED_STREAM;

/// What a device is doing, for whoever supervises it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// A VMM is connected.
    pub has_vmm: bool,
    /// Connections at the moment.
    pub connections: usize,
}

/// Takes a device's activity after each turn. It is called often, with the worker's lock.
type Observer = Box<dyn Fn(Activity) + Send + Sync>;

/// The device of one guest. It lives as long as the daemon, and serves one VMM after the other.
pub struct VhostUserVsockBackend {
    guest_cid: Cid,
    queue_size: u16,
    seqpacket: bool,
    epoll: Arc<Epoll>,
    worker: Mutex<VhostUserVsockThread>,
    memory: GuestMemoryHandle,
    vrings: Vec<VsockVring>,
    wake: EventFd,
    stopping: AtomicBool,
    siblings: Arc<Membership>,
    observer: Observer,
}

impl VhostUserVsockBackend {
    /// The device that `config` describes. Host programs connect to `entries`, it joins `siblings`, and `observer` gets its
    /// activity.
    pub fn new(
        config: &VmConfig,
        entries: Vec<EntrySocket>,
        siblings: &Arc<Siblings>,
        observer: impl Fn(Activity) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let mut worker = VhostUserVsockThread::new(config, entries)?;
        let siblings = Arc::new(siblings.join(config, worker.wake_handle()?));
        worker.join(siblings.clone());
        let memory = GuestMemoryHandle::new(GuestMemoryMmap::new());
        let vring = |_| VsockVring::new(memory.clone(), config.queue_size);
        let vrings = (0..NUM_RINGS).map(vring).collect::<Result<_, _>>();
        Ok(Self {
            guest_cid: config.guest_cid,
            queue_size: config.queue_size,
            seqpacket: config.seqpacket,
            epoll: worker.epoll(),
            wake: worker.wake_handle()?,
            worker: Mutex::new(worker),
            vrings: vrings.map_err(io::Error::other)?,
            memory,
            stopping: AtomicBool::new(false),
            siblings,
            observer: Box::new(observer),
        })
    }

    /// Works until [`VhostUserVsockBackend::stop`]. This is the worker thread, of which there is one.
    pub fn run(&self) {
        let mut events = EventBuffer::default();
        let mut wait = Wait::ForEvents;
        while !self.stopping.load(Ordering::Acquire) {
            self.epoll.wait(&mut events, wait);
            wait = self.turn(&events);
        }
    }

    /// Ends the worker thread, after its turn.
    pub fn stop(&self) {
        self.siblings.leave();
        self.stopping.store(true, Ordering::Release);
        // Without the worker's lock: whatever it is stuck in, this returns.
        let _ = self.wake.write(1);
    }

    /// What statistics show now.
    pub fn snapshot(&self) -> VmSnapshot {
        self.worker().snapshot()
    }

    /// A VMM has connected.
    pub(crate) fn begin_session(&self) {
        let mut worker = self.worker();
        worker.connect();
        self.report(&worker);
    }

    /// A VMM's session was handed over. It counts as no new one.
    pub(crate) fn resume_session(&self, transport_reset: bool) {
        let mut worker = self.worker();
        worker.resume(transport_reset);
        self.report(&worker);
    }

    /// The VMM is gone. Nothing of it is left: its memory is unmapped, its descriptors are closed.
    pub(crate) fn end_session(&self) {
        let mut worker = self.worker();
        worker.disconnect();
        self.report(&worker);
        for vring in &self.vrings {
            let mut vring = vring.get_mut();
            vring.set_enabled(false);
            vring.get_queue_mut().reset();
        }
        if let Ok(memory) = self.memory.lock() {
            memory.replace(GuestMemoryMmap::new());
        }
    }

    /// The worker, between two turns.
    pub(crate) fn worker(&self) -> MutexGuard<'_, VhostUserVsockThread> {
        self.worker.lock()
    }

    /// The worker, between two turns. None if its turn does not end until then.
    pub(crate) fn worker_until(
        &self,
        until: Instant,
    ) -> Option<MutexGuard<'_, VhostUserVsockThread>> {
        self.worker.try_lock_until(until)
    }

    pub(crate) fn vrings(&self) -> &[VsockVring] {
        &self.vrings
    }

    /// The guest has this memory, between two turns: the mapping that was there before is unused when this returns.
    pub(crate) fn replace_memory(&self, map: &GuestMemoryMmap) {
        let mut worker = self.worker();
        if let Ok(memory) = self.memory.lock() {
            memory.replace(map.clone());
        }
        worker.set_memory(self.memory.clone());
    }

    fn turn(&self, events: &EventBuffer) -> Wait {
        let mut worker = self.worker();
        worker.take_events(events);
        let wait = worker.turn(&self.vrings);
        self.report(&worker);
        // A worker that is busy all the time would not let others have the lock.
        MutexGuard::unlock_fair(worker);
        wait
    }

    fn report(&self, worker: &VhostUserVsockThread) {
        let (has_vmm, connections) = worker.status();
        (self.observer)(Activity {
            has_vmm,
            connections,
        });
    }
}

impl VhostUserBackend for VhostUserVsockBackend {
    type Bitmap = ();
    type Vring = VsockVring;

    fn num_queues(&self) -> usize {
        NUM_RINGS
    }

    fn max_queue_size(&self) -> usize {
        self.queue_size.into()
    }

    fn features(&self) -> u64 {
        if self.seqpacket {
            FEATURES | TYPE_FEATURES
        } else {
            FEATURES
        }
    }

    fn acked_features(&self, features: u64) {
        debug!("the driver accepts the features {features:#x}");
        let notify_on_empty = features & (1 << VIRTIO_F_NOTIFY_ON_EMPTY) != 0;
        let has = |feature: u32| features & (1 << feature) != 0;
        let mut worker = self.worker();
        worker.set_notify_on_empty(notify_on_empty);
        worker.set_types(Types {
            stream: has(VIRTIO_VSOCK_F_STREAM) || !has(VIRTIO_VSOCK_F_NO_IMPLIED_STREAM),
            seqpacket: has(VIRTIO_VSOCK_F_SEQPACKET),
        });
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::DEVICE_STATE
    }

    fn reset_device(&self) {
        let mut worker = self.worker();
        for vring in &self.vrings {
            vring.set_enabled(false);
        }
        worker.reset();
    }

    fn set_event_idx(&self, enabled: bool) {
        let _worker = self.worker();
        for vring in &self.vrings {
            vring.set_queue_event_idx(enabled);
        }
    }

    /// The bytes of the configuration space from `offset` on: the CID as a little-endian number of 8 bytes (virtio 1.2,
    /// 5.10.4). None, which the VMM gets as an error, when the space has not as many.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let space = self.guest_cid.get().to_le_bytes();
        let end = offset.saturating_add(size) as usize;
        space.get(offset as usize..end).unwrap_or_default().to_vec()
    }

    fn update_memory(&self, memory: GuestMemoryHandle) -> io::Result<()> {
        self.worker().set_memory(memory);
        Ok(())
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        self.worker().stop_ring(queue_index as usize);
        Ok(())
    }

    /// Takes a turn, for an event loop other than [`VhostUserVsockBackend::run`].
    fn handle_event(
        &self,
        _device_event: u16,
        _events: EventSet,
        _vrings: &[VsockVring],
        _thread_id: usize,
    ) -> io::Result<()> {
        let mut events = EventBuffer::default();
        self.epoll.wait(&mut events, Wait::Not);
        if self.turn(&events) == Wait::Not {
            self.worker().wake();
        }
        Ok(())
    }
}
