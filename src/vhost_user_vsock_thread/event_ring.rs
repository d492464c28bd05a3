//! The event ring: what the driver must know besides packets (virtio 1.2, 5.10.6.7).
//!
//! There is one event. TRANSPORT_RESET says that all connections are gone, and that the guest may have another CID: a snapshot
//! was restored, or the VM has come from another host. Most VMMs serve this ring themselves, and the device gets none.

use vhost_user_backend::VringT;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryMmap};

use super::ring::{GuestMemoryHandle, has_entries, return_buffer};
use super::{EVENT_RING, VhostUserVsockThread, VsockVring};

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, the event's whole content.
const TRANSPORT_RESET: u32 = 0;

/// How many buffers without room for an event are given back in a turn.
const MAX_UNUSABLE: usize = 16;

impl VhostUserVsockThread {
    /// The guest's connections are gone, and it does not know: closes what there is, and tells the driver as soon as there is a
    /// buffer for that.
    pub fn reset_transport(&mut self) {
        self.backend.reset();
        self.transport_reset = true;
        self.wake();
    }

    /// Gives the driver the event that it has not got yet. True where that is to go on in the next turn.
    pub(super) fn serve_events(&mut self, vrings: &[VsockVring]) -> bool {
        let memory = self.rings.memory().map(GuestMemoryHandle::memory);
        let (true, Some(memory)) = (self.transport_reset, memory) else {
            return false;
        };
        let mut vring = vrings[EVENT_RING].get_mut();
        let Some(queue) = self.rings.check(EVENT_RING, &mut vring, &memory) else {
            return false;
        };
        self.give_event(queue, &memory).unwrap_or_else(|error| {
            self.rings.stop_broken(EVENT_RING, &error);
            false
        })
    }

    fn give_event(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, QueueError> {
        for _ in 0..MAX_UNUSABLE {
            let has_more = has_entries(queue, memory)?
                || self.rings.enable_kicks(EVENT_RING, queue, memory)?;
            let Some(chain) = queue.iter(memory)?.next().filter(|_| has_more) else {
                return Ok(false);
            };
            let head = chain.head_index();
            let buffer = chain.writable().next();
            let used = buffer.map_or(0, |buffer| write_event(buffer, memory));
            return_buffer(queue, memory, head, used)?;
            self.rings.set_position(EVENT_RING, queue.next_avail());
            self.notify(EVENT_RING, queue, memory)?;
            if used > 0 {
                self.transport_reset = false;
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Writes the event, and returns how many bytes it has: none where there is no room for it.
fn write_event(buffer: Descriptor, memory: &GuestMemoryMmap) -> u32 {
    let event = TRANSPORT_RESET.to_le_bytes();
    let has_room = buffer.len() as usize >= event.len();
    if has_room && memory.write_slice(&event, buffer.addr()).is_ok() {
        event.len() as u32
    } else {
        0
    }
}
