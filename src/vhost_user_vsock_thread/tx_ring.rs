//! Steps at the TX ring.

use std::time::Instant;

use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::limits::{MAX_TX_BYTES, MAX_TX_DESCRIPTORS, MAX_TX_PACKETS};
use super::ring::{has_entries, return_buffer};
use super::round::Queues;
use super::{TX_RING, VhostUserVsockThread};
use crate::packet::header::Op;
use crate::packet::{TxChains, VsockPacket};
use crate::thread_backend::cost;

/// Whether the guest is likely to do nothing else until the packet is answered. An interrupt wakes its processor ahead of the answer.
fn is_awaited(packet: &VsockPacket) -> bool {
    match packet.header().op {
        Op::Rw | Op::CreditUpdate | Op::CreditRequest => false,
        Op::Request | Op::Response | Op::Rst | Op::Shutdown | Op::Unknown(_) => true,
    }
}

impl VhostUserVsockThread {
    /// Takes a batch of packets from the guest. False when there was none.
    pub(super) fn serve_tx(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, QueueError> {
        if !has_entries(queue, memory)? {
            return Ok(false);
        }
        self.rings.disable_kicks(TX_RING, queue, memory)?;
        let ring_size = queue.size();
        let mut chains = TxChains::new(memory, std::mem::take(&mut self.tx_storage));
        self.heads.clear();
        let mut is_cut = false;
        for chain in queue.iter(memory)? {
            self.heads.push(chain.head_index());
            if let Err(error) = chains.push(chain, ring_size) {
                self.count_malformed(&error);
            }
            let is_full =
                chains.bytes() >= MAX_TX_BYTES || chains.descriptors() >= MAX_TX_DESCRIPTORS;
            if is_full || self.heads.len() == MAX_TX_PACKETS {
                is_cut = true;
                break;
            }
        }
        let descriptors = chains.descriptors();
        let read = chains.bytes() + descriptors * cost::DESCRIPTOR;
        self.backend
            .add_cost(read + self.heads.len() * cost::PACKET);
        let mut batch = chains.parse(|error| self.count_malformed(&error));
        if is_cut && batch.packets().len() == self.heads.len() {
            // The rest of a message may be in the ring. All of it is in the next batch, and need not be copied.
            let left = batch.leave_unfinished();
            self.heads.truncate(self.heads.len() - left);
            queue.set_next_avail(queue.next_avail().wrapping_sub(left as u16));
        }
        let is_awaited = batch.packets().iter().any(is_awaited);
        self.backend.send_pkts(&batch);
        self.tx_storage = batch.into_storage();
        for head in &self.heads {
            return_buffer(queue, memory, *head, 0)?;
        }
        let is_due = self
            .tx_interrupts
            .returned(descriptors, ring_size, Instant::now);
        if is_due || is_awaited || self.notify_on_empty {
            self.tx_interrupts.forget();
            self.notify(TX_RING, queue, memory)?;
        }
        Ok(true)
    }

    /// Interrupts the guest for packets that were taken long ago, once their ring can be worked on.
    pub(super) fn end_tx(&mut self, queues: &mut Queues<'_>) {
        if queues.queues[TX_RING].is_some() && self.tx_interrupts.take_overdue() {
            self.with_queue(queues, TX_RING, |worker, queue, memory| {
                worker.notify(TX_RING, queue, memory).map(|()| true)
            });
        }
    }
}
