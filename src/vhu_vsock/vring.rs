//! The rings that the vhost-user library keeps, with what it leaves to be wished.
//!
//! The library reads a kick as the VMM has made it: a descriptor that blocks, or an event that was read already, would
//! stop or end its worker for good, and a kick that replaces a running ring's is not heard at all. So the library gets a
//! kick that never comes, and the VMM's waits here for the worker, which watches it without reading. The descriptor for
//! errors, which the library keeps to itself, waits here too.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;
use vhost_user_backend::{VringMutex, VringStateGuard, VringStateMutGuard, VringT};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

use crate::syscalls::{Argument, Syscall};

/// To make the library's kick, and to signal the VMM's events, which must not block.
pub(crate) const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_eventfd2),
    Syscall::any(libc::SYS_write),
    Syscall::only(libc::SYS_fcntl, &[Argument::Is(1, libc::F_GETFL)]),
    Syscall::only(libc::SYS_fcntl, &[Argument::Is(1, libc::F_SETFL)]),
];

/// The guest's memory, as the vhost-user library hands it out.
pub type GuestMemoryHandle = GuestMemoryAtomic<GuestMemoryMmap>;

/// A ring.
#[derive(Clone)]
pub struct VsockVring {
    inner: VringMutex<GuestMemoryHandle>,
    kick: Arc<Mutex<Option<Arc<File>>>>,
    err: Arc<Mutex<Option<File>>>,
    starts: Arc<AtomicU64>,
}

impl VsockVring {
    /// How often the ring was started.
    pub fn starts(&self) -> u64 {
        self.starts.load(Ordering::Acquire)
    }

    /// The VMM's kick. It becomes readable with each kick, and stays so.
    pub fn kick(&self) -> Option<Arc<File>> {
        self.kick.lock().clone()
    }

    /// Tells the VMM that the ring is broken.
    pub fn signal_error(&self) {
        if let Some(err) = self.err.lock().as_ref() {
            signal(err);
        }
    }
}

/// Whether the guest has made entries available that were not taken yet.
pub fn has_entries(queue: &Queue, memory: &GuestMemoryMmap) -> Result<bool, Error> {
    let available = queue.avail_idx(memory, Ordering::Acquire)?;
    Ok(available.0 != queue.next_avail())
}

/// Whether the guest is to be interrupted for the buffers that were returned to it since the last call (virtio 1.2,
/// 2.7.7). The library minds the event index, but not the flag that stands in for it.
pub fn needs_interrupt(queue: &mut Queue, memory: &GuestMemoryMmap) -> Result<bool, Error> {
    let needed = queue.needs_notification(memory)?;
    if !needed || queue.event_idx_enabled() {
        return Ok(needed);
    }
    let flags: u16 = memory
        .load(GuestAddress(queue.avail_ring()), Ordering::Relaxed)
        .map_err(Error::GuestMemory)?;
    Ok(u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
}

/// Signals an eventfd of the VMM's. One that is full has been told, and not been read since.
fn signal(mut event: &File) {
    let _ = event.write(&1u64.to_ne_bytes());
}

/// The same descriptor, which doesn't block any more: its other end is the VMM's.
fn unblocked(file: Option<File>) -> Option<File> {
    file.inspect(|file| {
        let flags = fcntl(file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
        let flags = flags.unwrap_or(OFlag::empty()) | OFlag::O_NONBLOCK;
        let _ = fcntl(file, FcntlArg::F_SETFL(flags));
    })
}

/// A kick that never comes.
fn silent_kick() -> Option<File> {
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).ok()?;
    Some(OwnedFd::from(event).into())
}

impl<'a> VringStateGuard<'a, GuestMemoryHandle> for VsockVring {
    type G = <VringMutex<GuestMemoryHandle> as VringStateGuard<'a, GuestMemoryHandle>>::G;
}

impl<'a> VringStateMutGuard<'a, GuestMemoryHandle> for VsockVring {
    type G = <VringMutex<GuestMemoryHandle> as VringStateMutGuard<'a, GuestMemoryHandle>>::G;
}

impl VringT<GuestMemoryHandle> for VsockVring {
    fn new(mem: GuestMemoryHandle, max_queue_size: u16) -> Result<Self, Error> {
        Ok(Self {
            inner: VringMutex::new(mem, max_queue_size)?,
            kick: Arc::default(),
            err: Arc::default(),
            starts: Arc::default(),
        })
    }

    fn set_queue_ready(&self, ready: bool) {
        self.inner.set_queue_ready(ready);
        if ready {
            self.starts.fetch_add(1, Ordering::Release);
        }
    }

    fn set_kick(&self, file: Option<File>) {
        let was_there = self.kick.lock().is_some();
        let silent = file.as_ref().and_then(|_| silent_kick());
        *self.kick.lock() = file.map(Arc::new);
        if was_there {
            // The ring starts once more, so that the worker hears of the new kick.
            self.inner.set_queue_ready(false);
        }
        self.inner.set_kick(silent);
    }

    fn read_kick(&self) -> io::Result<bool> {
        Ok(self.inner.get_ref().is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        let file = unblocked(file);
        // A ring may start before its call is there: an interrupt that was due then is not lost.
        file.iter().for_each(signal);
        self.inner.set_call(file);
    }

    fn set_err(&self, file: Option<File>) {
        *self.err.lock() = unblocked(file);
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, GuestMemoryHandle>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, GuestMemoryHandle>>::G {
        self.inner.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.inner.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
    }

    fn set_queue_info(
        &self,
        desc_table: u64,
        avail_ring: u64,
        used_ring: u64,
    ) -> Result<(), Error> {
        self.inner.set_queue_info(desc_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.inner.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.inner.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.inner.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.inner.set_queue_event_idx(enabled);
    }
}
