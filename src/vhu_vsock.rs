//! The device as the vhost-user library sees it: features, configuration, memory, and the rings' start and stop.

pub mod vring;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::OnceLock;

use log::debug;
use parking_lot::{Mutex, MutexGuard};
use vhost::vhost_user::Backend;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon};
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_F_IN_ORDER, VIRTIO_F_NOTIFY_ON_EMPTY, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::config::VmConfig;
use crate::daemon::service::Status;
use crate::metrics::counters::VmSnapshot;
use crate::packet::header::Cid;
use crate::syscalls::{Argument, NOT_EXECUTABLE, Syscall};
use crate::vhost_user_vsock_thread::VhostUserVsockThread;
use crate::vhu_vsock::vring::{GuestMemoryHandle, VsockVring};

/// For the vhost-user library: the VMM's messages with their descriptors, the guest's memory, and the worker's events.
pub(crate) const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_recvmsg),
    Syscall::any(libc::SYS_sendmsg),
    Syscall::only(libc::SYS_getsockopt, &[Argument::Is(1, libc::SOL_SOCKET)]),
    Syscall::any(libc::SYS_shutdown),
    Syscall::any(libc::SYS_close),
    Syscall::only(libc::SYS_fcntl, &[Argument::Is(1, libc::F_DUPFD_CLOEXEC)]),
    Syscall::only(libc::SYS_mmap, NOT_EXECUTABLE),
    Syscall::any(libc::SYS_munmap),
    Syscall::any(libc::SYS_epoll_create1),
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_epoll_wait),
    Syscall::any(libc::SYS_epoll_pwait),
    Syscall::any(libc::SYS_epoll_ctl),
    Syscall::any(libc::SYS_eventfd2),
    Syscall::any(libc::SYS_read),
    Syscall::any(libc::SYS_write),
];

/// RX, TX and event queue (virtio 1.2, 5.10.2). The event queue is not used: it tells of migrations.
const NUM_QUEUES: usize = 3;

/// Names the worker's epoll set in the library's. Below it are the rings and the library's own event.
const WORKER_EVENT: u64 = NUM_QUEUES as u64 + 1;

const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_F_NOTIFY_ON_EMPTY
    | 1 << VIRTIO_F_IN_ORDER
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// The device of one guest. It lives as long as the daemon, and serves one VMM after the other.
pub struct VhostUserVsockBackend {
    guest_cid: Cid,
    queue_size: u16,
    worker: Mutex<VhostUserVsockThread>,
    /// The channel for requests to the VMM. Nothing is ever requested, but it stays open: some VMMs watch it.
    requests: Mutex<Option<Backend>>,
    /// The descriptor with which the library's worker thread is told to end, and which it doesn't close.
    exit: Mutex<Option<RawFd>>,
    status: OnceLock<Status>,
}

impl VhostUserVsockBackend {
    /// The device that `config` asks for. Host programs connect to `listener`.
    pub fn new(config: &VmConfig, listener: UnixListener) -> io::Result<Self> {
        Ok(Self {
            guest_cid: config.guest_cid,
            queue_size: config.queue_size,
            worker: Mutex::new(VhostUserVsockThread::new(config, listener)?),
            requests: Mutex::default(),
            exit: Mutex::default(),
            status: OnceLock::new(),
        })
    }

    /// Lets the worker thread of `daemon` wait for the host's sockets.
    pub fn attach<T>(&self, daemon: &VhostUserDaemon<T>) -> io::Result<()>
    where
        T: VhostUserBackend<Vring = VsockVring, Bitmap = ()> + Clone + 'static,
    {
        let worker = self.worker.lock();
        daemon.get_epoll_handlers().iter().try_for_each(|handler| {
            handler.register_listener(worker.epoll().0.as_raw_fd(), EventSet::IN, WORKER_EVENT)
        })
    }

    /// A VMM has connected.
    pub fn greet(&self) {
        let mut worker = self.worker.lock();
        worker.connect();
        self.report(&worker);
    }

    fn report(&self, worker: &VhostUserVsockThread) {
        if let Some(status) = self.status.get() {
            let (has_vmm, connections) = worker.status();
            status.set(has_vmm, connections);
        }
    }

    /// Reports what happens to `status` from now on.
    pub fn report_to(&self, status: Status) {
        // There is one service manager.
        let _ = self.status.set(status);
    }

    /// What there is to tell now.
    pub fn snapshot(&self) -> VmSnapshot {
        self.worker.lock().snapshot()
    }

    /// Forgets the VMM, after its daemon has ended.
    pub fn detach(&self) {
        let mut worker = self.worker.lock();
        worker.disconnect();
        self.report(&worker);
        drop(worker);
        *self.requests.lock() = None;
        if let Some(exit) = self.exit.lock().take() {
            let _ = nix::unistd::close(exit);
        }
    }
}

impl VhostUserBackend for VhostUserVsockBackend {
    type Bitmap = ();
    type Vring = VsockVring;

    fn num_queues(&self) -> usize {
        NUM_QUEUES
    }

    fn max_queue_size(&self) -> usize {
        self.queue_size.into()
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn acked_features(&self, features: u64) {
        debug!("the driver takes the features {features:#x}");
        let notify_on_empty = features & (1 << VIRTIO_F_NOTIFY_ON_EMPTY) != 0;
        self.worker.lock().set_notify_on_empty(notify_on_empty);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::BACKEND_REQ
    }

    fn reset_device(&self) {
        self.worker.lock().reset();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The rings know.
    }

    /// The bytes of the configuration space from `offset` on, which is the CID as a little-endian number of 8 bytes
    /// (virtio 1.2, 5.10.4). Empty, which the library answers as an error, when that space has not as many.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let space = self.guest_cid.0.to_le_bytes();
        let end = offset.saturating_add(size) as usize;
        space.get(offset as usize..end).unwrap_or_default().to_vec()
    }

    fn update_memory(&self, memory: GuestMemoryHandle) -> io::Result<()> {
        self.worker.lock().set_memory(memory);
        Ok(())
    }

    fn set_backend_req_fd(&self, backend: Backend) {
        *self.requests.lock() = Some(backend);
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        let (consumer, notifier) = new_event_consumer_and_notifier(flags).ok()?;
        *self.exit.lock() = Some(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        // With the lock, the worker's turn has ended.
        self.worker.lock().stop_ring(queue_index as usize);
        Ok(())
    }

    /// Whatever has happened, the worker takes a turn. Never an error: that would end the worker thread.
    fn handle_event(
        &self,
        _device_event: u16,
        _evset: EventSet,
        vrings: &[VsockVring],
        _thread_id: usize,
    ) -> io::Result<()> {
        let mut worker = self.worker.lock();
        worker.turn(vrings);
        self.report(&worker);
        // A worker with enough to do would not let the VMM's messages in.
        MutexGuard::unlock_fair(worker);
        Ok(())
    }
}
