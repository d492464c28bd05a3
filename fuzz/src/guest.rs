//! A driver's side of both rings, for a target that has no worker.

use vhost_user_vsock::packet::header::{HEADER_LEN, VsockHeader};
use vhost_user_vsock::packet::{RxBatch, RxStorage, TxBatch, TxChains, TxStorage};
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::memory::Memory;
use super::ring::{Layout, MAX_PACKET, Ring};

/// The most payload of one packet, in bytes.
pub const MAX_PAYLOAD: usize = MAX_PACKET - HEADER_LEN;

/// The most packets or buffers of one batch.
pub const MAX_BATCH: usize = 5;

const RING_SIZE: u16 = 32;

/// A packet's bytes as the guest writes them: its own side is the source.
pub fn bytes(header: &VsockHeader, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header.to_rx().to_vec();
    swap_sides(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes
}

/// The packet of these bytes, as the guest reads them: its own side is the destination.
pub fn packet(mut bytes: Vec<u8>) -> (VsockHeader, Vec<u8>) {
    let payload = bytes.split_off(HEADER_LEN);
    swap_sides(&mut bytes);
    let header = VsockHeader::from_tx(&bytes.try_into().unwrap());
    assert_eq!(header.len as usize, payload.len(), "{header:?}");
    (header, payload)
}

fn swap_sides(header: &mut [u8]) {
    header[..16].rotate_left(8);
    header[16..24].rotate_left(4);
}

/// A guest's rings, each with the device's view of it.
pub struct Guest<'m> {
    memory: &'m Memory,
    rx: (Ring<'m>, Queue),
    tx: (Ring<'m>, Queue),
    // As in the worker, the allocations of a batch are the next one's.
    rx_storage: RxStorage,
    tx_storage: TxStorage,
}

impl<'m> Guest<'m> {
    /// A guest with this memory, which is that of [`super::ring::with_memory`].
    pub fn new(memory: &'m Memory) -> Self {
        let ring = |is_rx| {
            let ring = Ring::new(memory, is_rx, RING_SIZE, false, 0);
            let queue = ring.queue();
            (ring, queue)
        };
        Self {
            memory,
            rx: ring(true),
            tx: ring(false),
            rx_storage: RxStorage::default(),
            tx_storage: TxStorage::default(),
        }
    }

    /// Sends packets, at most [`MAX_BATCH`] of [`MAX_PAYLOAD`] bytes each.
    pub fn send<T>(
        &mut self,
        packets: &[Vec<u8>],
        layout: Layout,
        take: impl FnOnce(&TxBatch<'_>) -> T,
    ) -> T {
        let (ring, queue) = &mut self.tx;
        let map = self.memory.map();
        packets.iter().for_each(|packet| ring.offer(layout, packet));
        let mut chains = TxChains::new(map, std::mem::take(&mut self.tx_storage));
        let mut heads = Vec::new();
        for chain in queue.iter(map).unwrap() {
            heads.push(chain.head_index());
            chains.push(chain, RING_SIZE).unwrap();
        }
        let batch = chains.parse(|error| panic!("a good packet is rejected: {error}"));
        assert_eq!(batch.packets().len(), packets.len());
        let outcome = take(&batch);
        self.tx_storage = batch.into_storage();
        for head in heads {
            queue.add_used(map, head, 0).unwrap();
        }
        while ring.take().is_some() {}
        outcome
    }

    /// Offers up to `count` buffers, at most [`MAX_BATCH`], for `size` bytes of payload, and returns the packets in them.
    pub fn receive<T>(
        &mut self,
        size: usize,
        count: usize,
        layout: Layout,
        fill: impl FnOnce(&mut RxBatch<'_>) -> T,
    ) -> (T, Vec<(VsockHeader, Vec<u8>)>) {
        let (ring, queue) = &mut self.rx;
        let map = self.memory.map();
        let mut batch = RxBatch::new(map, std::mem::take(&mut self.rx_storage));
        for _ in 0..count {
            ring.offer_buffer(layout, MAX_PACKET);
        }
        let mut unused = 0;
        for chain in queue.iter(map).unwrap() {
            if batch.is_empty() || batch.capacity() < size {
                batch
                    .push(chain, RING_SIZE, size - batch.capacity())
                    .unwrap();
            } else {
                unused += 1;
            }
        }
        let outcome = fill(&mut batch);
        for buffer in batch.filled() {
            queue.add_used(map, buffer.head(), buffer.used()).unwrap();
        }
        let filled = batch.filled().len();
        unused += batch.len() - filled;
        self.rx_storage = batch.into_storage();
        let mut packets = Vec::new();
        for _ in 0..filled {
            packets.push(packet(ring.take().unwrap().bytes));
        }
        // Buffers that were not filled are returned unused, so that every call finds the same room.
        for head in ring.outstanding() {
            queue.add_used(map, head, 0).unwrap();
            let returned = ring.take();
            assert!(returned.is_some_and(|returned| returned.bytes.is_empty()));
            unused -= 1;
        }
        assert_eq!(unused, 0);
        (outcome, packets)
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let writable = [self.rx.0.writable(), self.tx.0.writable()].concat();
            self.memory.check(&writable);
        }
    }
}
