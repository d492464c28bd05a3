//! What the worker knows of a ring besides the ring itself, and its events.

mod watchdog;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

use crate::syscalls::{Argument, Syscall};
pub(super) use watchdog::Watchdog;
use watchdog::Writes;

/// To signal the VMM's events.
const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_write),
    Syscall::only(libc::SYS_fcntl, &[Argument::Is(1, libc::F_GETFL)]),
    Syscall::only(libc::SYS_fcntl, &[Argument::Is(1, libc::F_SETFL)]),
];

pub(super) fn syscalls() -> Vec<Syscall> {
    [SYSCALLS, watchdog::SYSCALLS].concat()
}

/// The guest's memory. All clones see the same, whatever the VMM makes of it.
pub type GuestMemoryHandle = GuestMemoryAtomic<GuestMemoryMmap>;

/// An eventfd of the VMM's to signal: its interrupt of the guest, or its notice of an error.
#[derive(Debug)]
pub(super) struct VmmEvent {
    file: File,
    writes: Arc<Writes>,
}

/// An event of the VMM's blocks who signals it. It is not to be signalled again.
#[derive(Debug)]
pub(super) struct Blocked;

impl VmmEvent {
    pub(super) fn new(file: File, watchdog: &Watchdog) -> Self {
        let writes = watchdog.writes();
        let event = Self { file, writes };
        event.unblock();
        event
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The VMM shares the flags of the open file, so this is undone where it clears them.
    fn unblock(&self) {
        let flags = fcntl(&self.file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
        let flags = flags.unwrap_or(OFlag::empty()) | OFlag::O_NONBLOCK;
        let _ = fcntl(&self.file, FcntlArg::F_SETFL(flags));
    }

    /// Signals it. One that is full was signalled before and not read since.
    fn signal(&self) -> Result<(), Blocked> {
        match self.writes.write(&self.file, &1u64.to_ne_bytes()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(Blocked),
            Ok(_) | Err(_) => Ok(()),
        }
    }
}

/// Whether a ring can be worked on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum RingState {
    /// The VMM has not started it.
    #[default]
    Stopped,
    /// Started, and not looked at since: it may be in bad memory.
    Unchecked,
    /// In order.
    Running,
    /// It is unusable until it is started again.
    Broken,
}

/// A ring of the VMM's.
#[derive(Debug, Default)]
pub(super) struct Ring {
    pub(super) state: RingState,
    /// Where it was left: the next entry of the avail ring.
    pub(super) position: Option<u16>,
    /// The driver was asked to kick.
    pub(super) kicks_enabled: bool,
    /// Becomes readable with each kick, and is never read.
    pub(super) kick: Option<File>,
    pub(super) call: Option<VmmEvent>,
    pub(super) err: Option<VmmEvent>,
}

impl Ring {
    /// Interrupts the guest. A VMM without an eventfd for that polls.
    pub(super) fn interrupt(&mut self) -> Result<(), Blocked> {
        signal(&mut self.call)
    }

    /// The ring is unusable: says so to the VMM.
    pub(super) fn set_broken(&mut self) -> Result<(), Blocked> {
        self.state = RingState::Broken;
        signal(&mut self.err)
    }
}

/// Signals an event if there is one, and gives up one that blocks.
fn signal(event: &mut Option<VmmEvent>) -> Result<(), Blocked> {
    let signalled = event.as_ref().map_or(Ok(()), VmmEvent::signal);
    if signalled.is_err() {
        *event = None;
    }
    signalled
}

/// Whether the driver has made entries available that were not taken yet.
pub(super) fn has_entries(queue: &Queue, memory: &GuestMemoryMmap) -> Result<bool, Error> {
    let available = queue.avail_idx(memory, Ordering::Acquire)?;
    Ok(available.0 != queue.next_avail())
}

/// Whether the guest is to be interrupted for the buffers that were returned to it since the last call (virtio 1.2,
/// 2.7.7). The library minds the event index, but not the flag that stands in for it.
pub(super) fn needs_interrupt(queue: &mut Queue, memory: &GuestMemoryMmap) -> Result<bool, Error> {
    let needed = queue.needs_notification(memory)?;
    if !needed || queue.event_idx_enabled() {
        return Ok(needed);
    }
    let flags: u16 = memory
        .load(GuestAddress(queue.avail_ring()), Ordering::Relaxed)
        .map_err(Error::GuestMemory)?;
    Ok(u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
}

/// Returns a buffer to the guest. A head that is no descriptor can't be returned.
pub(super) fn return_buffer(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    head: u16,
    used: u32,
) -> Result<(), Error> {
    if head >= queue.size() {
        return Ok(());
    }
    queue.add_used(memory, head, used)
}

/// Where a ring goes on: at its used index, in the words of the ring itself. Every buffer is returned, in order, before a
/// ring stops, so everything before that index is done and everything behind it is not. A VMM may name another: one that
/// reconnects names the avail index, which would skip all buffers that are posted.
pub(super) fn rewind_to_used(queue: &mut Queue, memory: &GuestMemoryMmap) -> Result<u16, Error> {
    let used = queue.used_idx(memory, Ordering::Relaxed)?.0;
    queue.set_next_used(used);
    queue.set_next_avail(used);
    Ok(used)
}
