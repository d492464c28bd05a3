//! The rings as a successor takes them over.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use super::ring::{self, GuestMemoryHandle};
use super::{VhostUserVsockThread, VsockVring};
use crate::saved::{LoadError, Loader, SavedFd, Saver};
use crate::thread_backend::journal::Journal;
pub use crate::thread_backend::saved::TableState;
use crate::vsock_conn::ConnKey;

/// A ring in a document.
#[derive(Debug, Serialize, Deserialize)]
pub struct RingState {
    /// How many entries it has.
    size: u16,
    /// Guest physical addresses of its descriptors, its avail ring and its used ring.
    descriptors: u64,
    available: u64,
    used: u64,
    /// The next entry of the avail ring. One that is started goes on at its used index.
    base: u16,
    enabled: bool,
    state: ring::RingState,
    /// Where it was left. A stopped one that is started elsewhere belongs to a driver that has started afresh.
    #[serde(default)]
    position: Option<u16>,
    #[serde(default)]
    kick: Option<SavedFd>,
    #[serde(default)]
    call: Option<SavedFd>,
    #[serde(default)]
    err: Option<SavedFd>,
}

impl VhostUserVsockThread {
    /// Saves a ring, between two turns.
    pub fn save_ring<'a>(
        &'a self,
        index: usize,
        vring: &VsockVring,
        saver: &mut Saver<'a>,
    ) -> RingState {
        let vring = vring.get_ref();
        let queue = vring.get_queue();
        let ring = self.rings.ring(index);
        let mut fd = |file: Option<&'a File>| file.map(|file| saver.fd(file.as_fd()));
        RingState {
            size: queue.size(),
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            base: queue.next_avail(),
            enabled: vring.is_enabled(),
            state: ring.state,
            position: ring.position,
            kick: fd(ring.kick.as_ref()),
            call: fd(ring.call.as_ref().map(ring::VmmEvent::file)),
            err: fd(ring.err.as_ref().map(ring::VmmEvent::file)),
        }
    }

    /// Goes on with a ring, whose memory is there already. The guest is interrupted, and whatever is in the ring is looked at in
    /// the first turn.
    ///
    /// # Errors
    /// It is no ring of this device's, or it runs and is not in the guest's memory; or it is not complete.
    pub fn load_ring(
        &mut self,
        index: usize,
        vring: &VsockVring,
        state: RingState,
        loader: &mut Loader,
    ) -> Result<(), LoadError> {
        let mut file = |fd: Option<SavedFd>| -> Result<Option<File>, LoadError> {
            Ok(fd.map(|fd| loader.take_fd(fd)).transpose()?.map(File::from))
        };
        let (kick, call, err) = (file(state.kick)?, file(state.call)?, file(state.err)?);
        let mut vring = vring.get_mut();
        if !state.size.is_power_of_two() || state.size > vring.get_queue().max_size() {
            return Err(LoadError::Invalid(
                "a ring of a size that --queue-size does not allow",
            ));
        }
        vring
            .set_queue_info(state.descriptors, state.available, state.used)
            .map_err(|_| LoadError::Invalid("a ring at an address that none has"))?;
        vring.set_enabled(state.enabled);
        let queue = vring.get_queue_mut();
        queue.set_size(state.size);
        queue.set_next_avail(state.base);
        self.rings.set_err(index, err);
        self.rings.set_kick(index, kick);
        match state.state {
            ring::RingState::Stopped | ring::RingState::Broken => {
                self.rings.leave(index, state.state, state.position);
            }
            ring::RingState::Unchecked => {
                self.rings.start(index, queue);
            }
            ring::RingState::Running => {
                let memory = self.rings.memory().map(GuestMemoryHandle::memory);
                queue.set_ready(true);
                if !memory.is_some_and(|memory| queue.is_valid(&*memory)) {
                    return Err(LoadError::Invalid(
                        "a ring that is not in the guest's memory",
                    ));
                }
                self.rings.start(index, queue);
            }
        }
        self.rings.set_call(index, call);
        Ok(())
    }

    /// A VMM is there, whose session was handed over.
    pub fn resume(&mut self, transport_reset: bool) {
        self.backend.connect();
        // A guest whose driver has started it before may be paused.
        if !self.rings.were_started() {
            self.driver_watch.connected(Instant::now());
        }
        self.transport_reset = transport_reset;
        self.wake();
    }

    /// Lists the ports of connections in `journal`.
    pub fn set_journal(&mut self, journal: Journal) {
        self.backend.set_journal(journal);
    }

    /// Resets connections of a process that is gone.
    pub fn reset_lost(&mut self, keys: Vec<ConnKey>) {
        self.backend.reset_lost(keys);
    }

    /// Whether the driver must still hear that all connections are gone.
    pub fn has_transport_reset(&self) -> bool {
        self.transport_reset
    }
}

impl VhostUserVsockThread {
    /// Saves the table of connections, between two turns.
    ///
    /// # Errors
    /// The system refuses.
    pub fn save_table<'a>(&'a self, saver: &mut Saver<'a>, now: Instant) -> io::Result<TableState> {
        self.backend.save(saver, now)
    }

    /// Goes on with the connections of a table.
    ///
    /// # Errors
    /// It is not complete, it can't be, or the system refuses. There are no connections then.
    pub fn load_table(
        &mut self,
        state: TableState,
        loader: &mut Loader,
        now: Instant,
    ) -> Result<(), LoadError> {
        self.backend.load(state, loader, now)
    }
}
