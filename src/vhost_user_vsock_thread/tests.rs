use std::os::unix::net::UnixListener;
use std::sync::mpsc;
use std::thread;

use tempfile::TempDir;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::limits::{MAX_ROUND_COST, MAX_TX_BYTES, MAX_TX_DESCRIPTORS};
use super::shares::Work;
use super::*;
use crate::host::entry::Entry;
use crate::packet::header::{Cid, GuestPort, Op, PeerAddr, VsockHeader};
use crate::testing::{self, WRITE, tx_batch};
use crate::thread_backend::RxSource;
use crate::thread_backend::cost;

/// Where the rings' descriptors lie, their avail and used rings, a packet or buffer, and an indirect table.
const DESCRIPTORS: [u64; 2] = [0x1_0000, 0x2_0000];
const INDICES: [u64; 2] = [0x3_0000, 0x4_0000];
const BUFFER: u64 = 0x5_0000;
const TABLE: u64 = 0x6_0000;
const MEMORY: usize = 0x10_0000;

/// A worker and two rings of a guest that offers each buffer again as soon as it comes back: the used ring lies over the
/// avail ring, and is ahead of it by the whole ring. However long the worker takes buffers, there are always more.
struct Endless {
    worker: VhostUserVsockThread,
    memory: GuestMemoryMmap,
    vrings: Vec<VsockVring>,
    _folder: TempDir,
}

impl Endless {
    fn new(ring_size: u16) -> Self {
        let folder = TempDir::new().unwrap();
        let config = testing::config(folder.path());
        let listener = UnixListener::bind(config.host.uds_path().unwrap()).unwrap();
        let entry = EntrySocket::new(Entry::Host, listener);
        let mut worker = VhostUserVsockThread::new(&config, vec![entry]).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let handle = GuestMemoryHandle::new(memory.clone());
        let ring = |index: usize| {
            let vring = VsockVring::new(handle.clone(), 1024).unwrap();
            vring.set_queue_size(ring_size);
            vring
                .set_queue_info(DESCRIPTORS[index], INDICES[index], INDICES[index])
                .unwrap();
            vring.set_queue_next_used(ring_size);
            memory
                .write_obj(ring_size.to_le(), GuestAddress(INDICES[index] + 2))
                .unwrap();
            vring
        };
        let vrings = vec![ring(RX_RING), ring(TX_RING)];
        worker.set_memory(handle);
        Self {
            worker,
            memory,
            vrings,
            _folder: folder,
        }
    }

    fn write_descriptor(&self, at: u64, area: testing::Area, next: u16) {
        let (addr, len, flags) = area;
        let memory = &self.memory;
        memory.write_obj(addr.to_le(), GuestAddress(at)).unwrap();
        memory.write_obj(len.to_le(), GuestAddress(at + 8)).unwrap();
        memory
            .write_obj(flags.to_le(), GuestAddress(at + 12))
            .unwrap();
        memory
            .write_obj(next.to_le(), GuestAddress(at + 14))
            .unwrap();
    }

    /// Starts a ring all of whose descriptors are the same.
    fn start(&mut self, ring: usize, area: testing::Area) {
        let vring = &self.vrings[ring];
        let size = vring.get_ref().get_queue().size();
        for slot in 0..u64::from(size) {
            self.write_descriptor(DESCRIPTORS[ring] + 16 * slot, area, 0);
        }
        self.worker
            .start_ring(ring, self.vrings[ring].get_mut().get_queue_mut());
        self.vrings[ring]
            .get_mut()
            .get_queue_mut()
            .set_next_avail(0);
        self.vrings[ring].set_enabled(true);
    }

    /// Starts the TX ring, all of whose packets are the same, with as much payload as the header says.
    fn start_sending(&mut self, header: VsockHeader) {
        self.memory
            .write_slice(&header.to_tx(), GuestAddress(BUFFER))
            .unwrap();
        self.start(TX_RING, (BUFFER, 44 + header.len, 0));
    }

    /// Lays a packet over an indirect table of so many descriptors of one byte.
    fn write_table(&self, packet: &[u8], descriptors: u16) -> testing::Area {
        self.memory
            .write_slice(packet, GuestAddress(BUFFER))
            .unwrap();
        for index in 0..descriptors {
            let is_last = index + 1 == descriptors;
            let flags = if is_last { 0 } else { VRING_DESC_F_NEXT as u16 };
            let byte = (BUFFER + u64::from(index), 1, flags);
            self.write_descriptor(TABLE + 16 * u64::from(index), byte, index + 1);
        }
        (
            TABLE,
            16 * u32::from(descriptors),
            VRING_DESC_F_INDIRECT as u16,
        )
    }

    /// Lays a buffer over an indirect table of so many descriptors, all but the last of which have no length.
    fn write_buffer_table(&self, descriptors: u16, len: u32) -> testing::Area {
        for index in 0..descriptors {
            let is_last = index + 1 == descriptors;
            let area = if is_last {
                (BUFFER, len, WRITE)
            } else {
                (BUFFER, 0, WRITE | VRING_DESC_F_NEXT as u16)
            };
            self.write_descriptor(TABLE + 16 * u64::from(index), area, index + 1);
        }
        (
            TABLE,
            16 * u32::from(descriptors),
            VRING_DESC_F_INDIRECT as u16,
        )
    }

    /// Makes so many resets pending for the guest.
    fn add_resets(&mut self, count: u32) {
        let memory = testing::memory();
        let packets = [(packet(1, Op::CreditRequest), &b""[..]); 100];
        for rest in (0..count).rev().step_by(packets.len()) {
            let packets = &packets[..packets.len().min(rest as usize + 1)];
            self.worker.backend.send_pkts(&tx_batch(&memory, packets));
        }
    }

    /// Takes a turn, and answers how many buffers it took from `ring`.
    #[track_caller]
    fn turn(mut self, ring: usize) -> (Self, u16, Wait) {
        let (done, wait) = mpsc::channel();
        thread::spawn(move || {
            let before = self.vrings[ring].queue_next_avail();
            let wait = self.worker.turn(&self.vrings);
            let after = self.vrings[ring].queue_next_avail();
            let _ = done.send((self, after.wrapping_sub(before), wait));
        });
        wait.recv_timeout(Duration::from_secs(20))
            .expect("a turn without an end")
    }
}

fn packet(port: u32, op: Op) -> VsockHeader {
    VsockHeader::new(Cid::from_raw(4), GuestPort(port), PeerAddr::host(9), op)
}

/// Turns that take buffers, but no more than `limit` each, and leave the rest to the next.
#[track_caller]
fn assert_bounded(mut endless: Endless, ring: usize, limit: usize) {
    for _ in 0..3 {
        let (taken, wait);
        (endless, taken, wait) = endless.turn(ring);
        assert!(taken > 0, "nothing was taken");
        assert!(
            usize::from(taken) <= limit,
            "{taken} taken, {limit} expected"
        );
        assert_eq!(wait, Wait::Not, "the rest is forgotten");
    }
}

/// How many steps a round has at most that cost so much each, one of which may begin right before the limit.
fn steps(cost: usize) -> usize {
    MAX_ROUND_COST / cost + 1
}

#[test]
fn a_turn_takes_a_bounded_number_of_packets() {
    let mut endless = Endless::new(1024);
    endless.start_sending(packet(1, Op::Rst));
    let steps = steps(MAX_TX_PACKETS * cost::PACKET);
    assert_bounded(endless, TX_RING, MAX_ROUNDS * steps * MAX_TX_PACKETS);
}

#[test]
fn a_turn_takes_a_bounded_number_of_descriptors() {
    // As long as the ring, and one longer: the first are packets, the others are not.
    for descriptors in [1024, 1025] {
        let mut endless = Endless::new(1024);
        let table = endless.write_table(&packet(1, Op::Rst).to_tx(), descriptors);
        endless.start(TX_RING, table);
        let chains_in_a_step = MAX_TX_DESCRIPTORS / 1024 + 1;
        let steps = steps(MAX_TX_DESCRIPTORS * cost::DESCRIPTOR);
        assert_bounded(endless, TX_RING, MAX_ROUNDS * steps * chains_in_a_step);
    }
}

#[test]
fn a_turn_takes_a_bounded_number_of_bytes() {
    let mut endless = Endless::new(1024);
    let header = VsockHeader {
        len: 60_000,
        ..packet(1, Op::Rw)
    };
    endless.start_sending(header);
    let packets_in_a_step = MAX_TX_BYTES / 60_000 + 1;
    let steps = steps(MAX_TX_BYTES);
    assert_bounded(endless, TX_RING, MAX_ROUNDS * steps * packets_in_a_step);
}

#[test]
fn a_turn_gives_a_bounded_number_of_bad_buffers_back() {
    for bad in [(BUFFER, 43, WRITE), (BUFFER, 100, 0), (1 << 40, 100, WRITE)] {
        let mut endless = Endless::new(64);
        endless.start(RX_RING, bad);
        endless.add_resets(1);
        assert_bounded(endless, RX_RING, MAX_ROUNDS * steps(cost::PACKET));
    }
}

#[test]
fn a_turn_reads_a_bounded_number_of_descriptors_without_length() {
    // The last one has room for a header: it is a buffer. Or for less: it is given back.
    for len in [44, 43] {
        let mut endless = Endless::new(1024);
        let table = endless.write_buffer_table(1024, len);
        endless.start(RX_RING, table);
        endless.add_resets(1024);
        assert_bounded(
            endless,
            RX_RING,
            MAX_ROUNDS * (steps(1024 * cost::DESCRIPTOR) + 1),
        );
    }
}

#[test]
fn a_turn_gives_the_guest_a_bounded_number_of_packets() {
    let mut endless = Endless::new(64);
    endless.start(RX_RING, (BUFFER, 100, WRITE));
    endless.add_resets(120_000);
    assert_bounded(endless, RX_RING, MAX_ROUNDS * steps(cost::PACKET));
}

#[test]
fn packets_whose_resets_the_guest_does_not_take_are_left_in_the_ring() {
    let mut endless = Endless::new(1024);
    endless.start_sending(packet(1, Op::CreditRequest));
    let (endless, taken, wait) = endless.turn(TX_RING);
    assert_eq!(usize::from(taken), 1024);
    assert_eq!(wait, Wait::ForEvents, "it spins");
    let (mut endless, taken, wait) = endless.turn(TX_RING);
    assert_eq!((taken, wait), (0, Wait::ForEvents));
    assert_eq!(endless.worker.backend.counters().resets_lost, 0);
}

#[test]
fn a_guest_that_was_given_up_loses_nothing_once_it_has_buffers() {
    let mut endless = Endless::new(64);
    endless.start_sending(packet(1, Op::CreditRequest));
    let (mut endless, _, wait) = endless.turn(TX_RING);
    assert_eq!(wait, Wait::ForEvents);
    let deadline = endless.worker.backend.next_deadline().unwrap();
    endless.worker.backend.expire(deadline);
    endless.start(RX_RING, (BUFFER, 100, WRITE));
    // Even where it is the TX ring's turn.
    let resets = Work::Rx(RxSource::Resets);
    endless.worker.shares.charge(resets, 1 << 30);
    let (mut endless, _, _) = endless.turn(TX_RING);
    assert_eq!(endless.worker.backend.counters().resets_lost, 0);
}
