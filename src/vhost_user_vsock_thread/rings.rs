//! The rings of the device, and the memory they lie in.

use std::fs::File;
use std::sync::Arc;

use log::warn;
use vhost_user_backend::VringState;
use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::NUM_RINGS;
use super::epoll::Epoll;
use super::ring::{
    Blocked, GuestMemoryHandle, Ring, RingState, VmmEvent, Watchdog, rewind_to_used,
};
use crate::log_limit::LogLimit;
use crate::thread_backend::event_source::EventSource;

/// How a ring goes on when the VMM starts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// Where it was left; or it is the first start, or it is broken.
    Resumed,
    /// Elsewhere: it belongs to a driver that has started afresh, and knows of no connection.
    Afresh,
}

/// All rings.
#[derive(Debug)]
pub(super) struct Rings {
    epoll: Arc<Epoll>,
    rings: [Ring; NUM_RINGS],
    memory: Option<GuestMemoryHandle>,
    /// Of the VMM's events, while there are any.
    watchdog: Option<Watchdog>,
    broken_log: LogLimit,
    blocked_log: LogLimit,
}

impl Rings {
    /// Rings without memory, which nobody has started. Their kicks are watched with `epoll`.
    pub(super) fn new(epoll: Arc<Epoll>) -> Self {
        Self {
            epoll,
            rings: Default::default(),
            memory: None,
            watchdog: None,
            broken_log: LogLimit::default(),
            blocked_log: LogLimit::default(),
        }
    }

    pub(super) fn memory(&self) -> Option<&GuestMemoryHandle> {
        self.memory.as_ref()
    }

    pub(super) fn ring(&self, index: usize) -> &Ring {
        &self.rings[index]
    }

    /// A ring was stopped or broken in the predecessor, at this entry of the avail ring.
    pub(super) fn leave(&mut self, index: usize, state: RingState, position: Option<u16>) {
        self.rings[index].state = state;
        self.rings[index].position = position;
    }

    /// The memory has changed: what runs in it is to be checked again.
    pub(super) fn set_memory(&mut self, memory: GuestMemoryHandle) {
        self.memory = Some(memory);
        for ring in &mut self.rings {
            if ring.state == RingState::Running {
                ring.state = RingState::Unchecked;
            }
        }
    }

    /// Takes the eventfd for kicks in place of the one before. It is never read: each kick is an event of its own.
    pub(super) fn set_kick(&mut self, index: usize, kick: Option<File>) {
        if let Some(old) = std::mem::replace(&mut self.rings[index].kick, kick) {
            self.epoll.remove(&old);
        }
        if let Some(new) = &self.rings[index].kick
            && let Err(error) = self.epoll.add_input(new, EventSource::Kick(index as u32))
        {
            warn!("ring {index}: can't watch its kicks: {error}");
        }
    }

    /// Takes the eventfd for interrupts. It is signalled once: the ring may have run without it before.
    pub(super) fn set_call(&mut self, index: usize, call: Option<File>) {
        self.rings[index].call = call.and_then(|file| self.event(index, file));
        self.interrupt(index);
    }

    /// Takes the eventfd for errors.
    pub(super) fn set_err(&mut self, index: usize, err: Option<File>) {
        self.rings[index].err = err.and_then(|file| self.event(index, file));
    }

    fn event(&mut self, index: usize, file: File) -> Option<VmmEvent> {
        let watchdog = match self.watchdog.take() {
            Some(watchdog) => Ok(watchdog),
            None => Watchdog::start(),
        };
        let watchdog = watchdog.inspect_err(|error| {
            warn!("ring {index}: can't signal the VMM: no watchdog: {error}");
        });
        let watchdog = self.watchdog.insert(watchdog.ok()?);
        Some(VmmEvent::new(file, watchdog))
    }

    pub(super) fn is_started(&self, index: usize) -> bool {
        self.rings[index].state != RingState::Stopped
    }

    /// Whether one has been started since the device was reset, even if it was stopped meanwhile.
    pub(super) fn were_started(&self) -> bool {
        self.rings.iter().any(|ring| ring.position.is_some())
    }

    /// The VMM starts a ring, or changes one that runs.
    pub(super) fn start(&mut self, index: usize, queue: &mut Queue) -> Start {
        queue.set_ready(true);
        let memory = self.memory.as_ref().map(GuestMemoryHandle::memory);
        let position = match memory {
            Some(memory) => rewind_to_used(queue, &memory),
            None => Err(QueueError::QueueNotReady),
        };
        let ring = &mut self.rings[index];
        ring.state = RingState::Unchecked;
        ring.kicks_enabled = true;
        match position {
            Ok(position) => match ring.position.replace(position) {
                Some(left_at) if left_at != position => Start::Afresh,
                Some(_) | None => Start::Resumed,
            },
            Err(error) => {
                self.stop_broken(index, &error);
                Start::Resumed
            }
        }
    }

    /// The VMM stops a ring, which may go on later.
    pub(super) fn stop(&mut self, index: usize) {
        self.set_kick(index, None);
        self.rings[index].state = RingState::Stopped;
        self.rings[index].call = None;
    }

    /// No ring goes on where it was left.
    pub(super) fn reset(&mut self) {
        for index in 0..NUM_RINGS {
            self.set_kick(index, None);
            self.rings[index].state = RingState::Stopped;
            self.rings[index].position = None;
        }
    }

    /// Forgets everything of a VMM.
    pub(super) fn clear(&mut self) {
        self.reset();
        self.rings = Default::default();
        self.memory = None;
        self.watchdog = None;
    }

    /// The queue of a ring that can be worked on. One that was started since is checked first.
    pub(super) fn check<'q>(
        &mut self,
        index: usize,
        vring: &'q mut VringState<GuestMemoryHandle>,
        memory: &GuestMemoryMmap,
    ) -> Option<&'q mut Queue> {
        if !vring.is_enabled() {
            return None;
        }
        let queue = vring.get_queue_mut();
        match self.rings[index].state {
            RingState::Stopped | RingState::Broken => return None,
            RingState::Running => {}
            RingState::Unchecked if queue.is_valid(memory) => {
                self.rings[index].state = RingState::Running;
            }
            RingState::Unchecked => {
                self.stop_broken(index, &QueueError::QueueNotReady);
                return None;
            }
        }
        Some(queue)
    }

    /// A ring is unusable until it is started again. The VMM is told, and the log.
    pub(super) fn stop_broken(&mut self, index: usize, error: &QueueError) {
        let told = self.rings[index].set_broken();
        self.note_blocked(index, told);
        self.broken_log
            .log(|| warn!("ring {index} stops until it is started again: {error}"));
    }

    /// The worker has left a ring at this entry of the avail ring.
    pub(super) fn set_position(&mut self, index: usize, position: u16) {
        self.rings[index].position = Some(position);
    }

    pub(super) fn interrupt(&mut self, index: usize) {
        let interrupted = self.rings[index].interrupt();
        self.note_blocked(index, interrupted);
    }

    fn note_blocked(&mut self, index: usize, signalled: Result<(), Blocked>) {
        if signalled.is_err() {
            self.blocked_log.log(|| {
                warn!("ring {index}: a descriptor of the VMM's blocks, and is not signalled again");
            });
        }
    }

    /// Asks the driver to kick. True when there is something in the ring already.
    pub(super) fn enable_kicks(
        &mut self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, QueueError> {
        self.rings[index].kicks_enabled = true;
        queue.enable_notification(memory)
    }

    /// Asks the driver not to kick, if it was asked to.
    pub(super) fn disable_kicks(
        &mut self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<(), QueueError> {
        if std::mem::take(&mut self.rings[index].kicks_enabled) {
            queue.disable_notification(memory)?;
        }
        Ok(())
    }
}
