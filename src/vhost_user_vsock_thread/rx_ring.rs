//! Steps at the RX ring.

use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::limits::{
    MAX_QUIET_BYTES, MAX_QUIET_COST, MAX_REJECTED, MAX_RESETS, MAX_RX_DESCRIPTORS,
};
use super::ring::return_buffer;
use super::round::Queues;
use super::{RX_RING, VhostUserVsockThread};
use crate::packet::RxBatch;
use crate::thread_backend::{RxSource, cost};

/// What the guest was given and not interrupted for yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Quiet {
    buffers: usize,
    bytes: usize,
    /// What was done meanwhile, in units of cost.
    cost: usize,
}

impl Quiet {
    /// A round is over, in which so much was done.
    pub(super) fn pass(&mut self, cost: usize) {
        if self.buffers > 0 {
            self.cost += cost;
        }
    }

    /// Whether the guest has waited long enough.
    pub(super) fn is_late(&self) -> bool {
        self.cost >= MAX_QUIET_COST
    }
}

impl VhostUserVsockThread {
    /// Gives the guest what is pending first of `source`. False when it has no buffers.
    pub(super) fn serve_rx(
        &mut self,
        source: RxSource,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, QueueError> {
        self.rings.disable_kicks(RX_RING, queue, memory)?;
        let mut batch = RxBatch::new(memory, std::mem::take(&mut self.rx_storage));
        let served = match source {
            RxSource::Resets => self.give_resets(queue, memory, &mut batch),
            RxSource::Packets | RxSource::Streams => self.give(source, queue, memory, &mut batch),
        };
        self.backend
            .add_cost(batch.descriptors() * cost::DESCRIPTOR);
        self.rx_storage = batch.into_storage();
        self.backend.rx_delivered();
        served
    }

    fn give_resets(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        batch: &mut RxBatch<'_>,
    ) -> Result<bool, QueueError> {
        let source = RxSource::Resets;
        for _ in 0..MAX_RESETS {
            if !self.give(source, queue, memory, batch)? {
                return Ok(false);
            }
            if !self.backend.has_pending(source) || batch.descriptors() >= MAX_RX_DESCRIPTORS {
                break;
            }
        }
        Ok(true)
    }

    /// Fills buffers with what is pending first of `source`, and returns them. False when there are none.
    fn give(
        &mut self,
        source: RxSource,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        batch: &mut RxBatch<'_>,
    ) -> Result<bool, QueueError> {
        let Some(size) = self.backend.rx_size(source) else {
            return Ok(true);
        };
        let has_more = self.gather(queue, memory, batch, size)?;
        if batch.is_empty() {
            if !has_more {
                self.backend.rx_starved();
            }
            return Ok(has_more);
        }
        let first = queue.next_avail().wrapping_sub(batch.len() as u16);
        self.backend.recv_pkts(source, batch);
        for buffer in batch.filled() {
            self.return_rx(queue, memory, buffer.head(), buffer.used())?;
        }
        queue.set_next_avail(first.wrapping_add(batch.filled().len() as u16));
        if self.quiet.bytes >= MAX_QUIET_BYTES {
            self.quiet = Quiet::default();
            self.notify(RX_RING, queue, memory)?;
        }
        Ok(true)
    }

    fn return_rx(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        head: u16,
        used: u32,
    ) -> Result<(), QueueError> {
        self.quiet.buffers += 1;
        self.quiet.bytes += used as usize;
        return_buffer(queue, memory, head, used)
    }

    /// Interrupts the guest for what it was given, if it does not know of it.
    pub(super) fn end_rx(&mut self, queues: &mut Option<&mut Queues<'_>>) {
        if std::mem::take(&mut self.quiet).buffers > 0
            && let Some(queues) = queues
        {
            self.with_queue(queues, RX_RING, |worker, queue, memory| {
                worker.notify(RX_RING, queue, memory).map(|()| true)
            });
        }
    }

    /// Takes buffers for `size` bytes of payload out of the RX ring, or one buffer when that is 0. A buffer that can take no
    /// packet is returned unused at once. False when there are no more.
    fn gather(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        batch: &mut RxBatch<'_>,
        size: usize,
    ) -> Result<bool, QueueError> {
        batch.clear();
        let mut rejected = 0;
        while let Some(head) = self.gather_sound(queue, memory, batch, size)? {
            if !batch.is_empty() {
                // Used buffers keep their order: those before it go first, and it comes up again.
                queue.go_to_previous_position();
                return Ok(true);
            }
            self.return_rx(queue, memory, head, 0)?;
            self.backend.add_cost(cost::PACKET);
            rejected += 1;
            // A guest that offers such buffers again and again would never let this end.
            if rejected >= MAX_REJECTED || batch.descriptors() >= MAX_RX_DESCRIPTORS {
                return Ok(true);
            }
        }
        Ok(!batch.is_empty())
    }

    /// Takes buffers until the batch holds `size` bytes, and returns the head of a buffer that can take no packet.
    fn gather_sound(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        batch: &mut RxBatch<'_>,
        size: usize,
    ) -> Result<Option<u16>, QueueError> {
        let ring_size = queue.size();
        for chain in queue.iter(memory)? {
            let head = chain.head_index();
            match batch.push(chain, ring_size, size - batch.capacity()) {
                Ok(()) => {}
                Err(error) => {
                    self.count_malformed(&error);
                    return Ok(Some(head));
                }
            }
            let is_full = batch.is_full() || batch.descriptors() >= MAX_RX_DESCRIPTORS;
            if batch.capacity() >= size || is_full {
                break;
            }
        }
        Ok(None)
    }
}
