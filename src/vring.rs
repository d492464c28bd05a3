//! The rings that the vhost-user library keeps, with what it leaves to be wished.
//!
//! A kick is read by the library as the VMM has made it: a descriptor that blocks, or an event that was read already,
//! would stop or end the worker for good. Here kicks never block and never fail. A kick that replaces a running ring's
//! is taken, as is the descriptor for errors, which the library keeps to itself.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use parking_lot::Mutex;
use vhost_user_backend::{VringMutex, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// The guest's memory, as the vhost-user library hands it out.
pub type GuestMemoryHandle = GuestMemoryAtomic<GuestMemoryMmap>;

/// How many kicks of one ring are looked at. They stay in the library's epoll set even when they are replaced.
const MAX_KICKS: usize = 16;

/// A ring.
#[derive(Clone)]
pub struct VsockVring {
    inner: VringMutex<GuestMemoryHandle>,
    /// The ring's kicks, the one in force last.
    kicks: Arc<Mutex<Vec<File>>>,
    err: Arc<Mutex<Option<File>>>,
    starts: Arc<AtomicU64>,
}

impl VsockVring {
    /// How often the ring was started.
    pub fn starts(&self) -> u64 {
        self.starts.load(Ordering::Acquire)
    }

    /// Tells the VMM that the ring is broken.
    pub fn signal_error(&self) {
        if let Some(mut err) = self.err.lock().as_ref() {
            // A VMM that doesn't read it has been told before.
            let _ = err.write(&1u64.to_ne_bytes());
        }
    }

    /// The same descriptor, which doesn't block any more: its other end is the VMM's.
    fn unblocked(file: Option<File>) -> Option<File> {
        file.inspect(|file| {
            let flags = fcntl(file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
            let flags = flags.unwrap_or(OFlag::empty()) | OFlag::O_NONBLOCK;
            let _ = fcntl(file, FcntlArg::F_SETFL(flags));
        })
    }

    fn remember_kick(&self, file: Option<&File>) {
        let mut kicks = self.kicks.lock();
        match file.and_then(|file| file.try_clone().ok()) {
            Some(kick) => {
                if kicks.len() == MAX_KICKS {
                    kicks.remove(0);
                }
                kicks.push(kick);
            }
            None => {
                kicks.pop();
            }
        }
    }
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
            kicks: Arc::default(),
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
        let file = Self::unblocked(file);
        self.remember_kick(file.as_ref());
        if file.is_some() && self.inner.get_ref().get_kick().is_some() {
            // The library registers a kick when it makes a ring ready, and only then.
            self.inner.set_queue_ready(false);
        }
        self.inner.set_kick(file);
    }

    fn read_kick(&self) -> io::Result<bool> {
        for mut kick in self.kicks.lock().iter() {
            let _ = kick.read(&mut [0; 8]);
        }
        Ok(self.inner.get_ref().is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        self.inner.set_call(Self::unblocked(file));
    }

    fn set_err(&self, file: Option<File>) {
        *self.err.lock() = Self::unblocked(file);
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
