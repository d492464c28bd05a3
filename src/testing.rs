//! A configuration, guest memory, descriptor chains and documents for the unit tests.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::config::VmConfig;
use crate::host::socket::HostSocket;
use crate::packet::header::{Cid, PacketType, VsockHeader};
use crate::packet::{RxBatch, RxStorage, TxBatch, TxChains, TxStorage};
use crate::saved::{Loader, Saver};
use crate::thread_backend::Registry;
use crate::thread_backend::event_source::EventSource;

/// An event loop in which nothing happens.
pub(crate) struct NoEvents;

impl Registry for NoEvents {
    fn register(&self, _socket: BorrowedFd<'_>, _source: EventSource) -> io::Result<()> {
        Ok(())
    }

    fn watch_room(&self, _socket: BorrowedFd<'_>, _source: EventSource, _watch: bool) {}
}

/// The size of the rings these chains are from.
pub(crate) const RING_SIZE: u16 = 64;

/// A small device whose sockets are in `folder`.
pub(crate) fn config(folder: &Path) -> VmConfig {
    VmConfig {
        tx_buffer_size: 1 << 16,
        max_connections: 16,
        busy_poll: Duration::ZERO,
        ..VmConfig::new(Cid::from_raw(4), folder.join("vhost"), folder.join("uds"))
    }
}

/// The two ends of a connection of messages: ours, and the host program's.
pub(crate) fn message_pair() -> (HostSocket, UnixStream) {
    let (family, kind) = (AddressFamily::Unix, SockType::SeqPacket);
    let (ours, program) = socketpair(family, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let program = UnixStream::from(program);
    program
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let ours = UnixStream::from(ours);
    ours.set_nonblocking(true).unwrap();
    let socket = HostSocket::new(PacketType::Seqpacket, OwnedFd::from(ours));
    (socket, program)
}

/// Where the second region of the memory begins, right behind the first.
pub(crate) const BORDER: u64 = 0x10000;

const END: u64 = 0x80000;

/// One descriptor: address, length, flags without NEXT.
pub(crate) type Area = (u64, u32, u16);

/// The flag of an area that the device writes.
pub(crate) const WRITE: u16 = VRING_DESC_F_WRITE as u16;

/// Memory of two adjacent regions.
pub(crate) fn memory() -> GuestMemoryMmap {
    let border = BORDER as usize;
    GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), border),
        (GuestAddress(BORDER), END as usize - border),
    ])
    .unwrap()
}

/// The chain of the areas, in their order. `last` is the flags and the next index of the last one.
pub(crate) fn chain_ending<'m>(
    memory: &'m GuestMemoryMmap,
    areas: &[Area],
    last: (u16, u16),
) -> DescriptorChain<&'m GuestMemoryMmap> {
    let mock = MockSplitQueue::new(memory, RING_SIZE);
    for (index, (addr, len, flags)) in areas.iter().enumerate() {
        let (more, next) = if index + 1 < areas.len() {
            (VRING_DESC_F_NEXT as u16, index as u16 + 1)
        } else {
            last
        };
        let descriptor = Descriptor::new(*addr, *len, flags | more, next);
        mock.desc_table()
            .store(index as u16, RawDescriptor::from(descriptor))
            .unwrap();
    }
    mock.avail().ring().ref_at(0).unwrap().store(0);
    mock.avail().idx().store(1);
    let mut queue: Queue = mock.create_queue().unwrap();
    queue.iter(memory).unwrap().next().unwrap()
}

/// The chain of the areas, in their order.
pub(crate) fn chain<'m>(
    memory: &'m GuestMemoryMmap,
    areas: &[Area],
) -> DescriptorChain<&'m GuestMemoryMmap> {
    chain_ending(memory, areas, (0, 0))
}

/// Where the packets of [`tx_batch`] and the buffers of [`rx_batch`] begin.
const PACKETS: u64 = 0x20000;

/// A batch of packets from the guest.
pub(crate) fn tx_batch<'m>(
    memory: &'m GuestMemoryMmap,
    packets: &[(VsockHeader, &[u8])],
) -> TxBatch<'m> {
    let mut chains = TxChains::new(memory, TxStorage::default());
    let mut at = PACKETS;
    for (header, payload) in packets {
        let header = VsockHeader {
            len: payload.len() as u32,
            ..*header
        };
        memory
            .write_slice(&header.to_tx(), GuestAddress(at))
            .unwrap();
        memory.write_slice(payload, GuestAddress(at + 44)).unwrap();
        let len = 44 + payload.len() as u32;
        chains
            .push(chain(memory, &[(at, len, 0)]), RING_SIZE)
            .unwrap();
        at += u64::from(len);
    }
    chains.parse(|error| panic!("a good packet is rejected: {error}"))
}

/// A batch of one buffer of the guest's, for `payload` bytes.
pub(crate) fn rx_batch(memory: &GuestMemoryMmap, payload: usize) -> RxBatch<'_> {
    let mut batch = RxBatch::new(memory, RxStorage::default());
    let area = (PACKETS, 44 + payload as u32, WRITE);
    batch
        .push(chain(memory, &[area]), RING_SIZE, payload)
        .unwrap();
    batch
}

/// The packets that were put into a batch of [`rx_batch`].
pub(crate) fn received(
    memory: &GuestMemoryMmap,
    batch: &RxBatch<'_>,
) -> Vec<(VsockHeader, Vec<u8>)> {
    let packet = |used: u32| {
        let mut bytes = vec![0; used as usize];
        memory
            .read_slice(&mut bytes, GuestAddress(PACKETS))
            .unwrap();
        let payload = bytes.split_off(44);
        (VsockHeader::from_rx(&bytes.try_into().unwrap()), payload)
    };
    batch
        .filled()
        .iter()
        .map(|buffer| packet(buffer.used()))
        .collect()
}

/// Saves something in `file`, and opens it as a successor would, with copies of the descriptors. Returns the document as well.
pub(crate) fn reload<'a, T: Serialize + DeserializeOwned>(
    file: &'a File,
    save: impl FnOnce(&mut Saver<'a>) -> T,
) -> (Loader, T) {
    let loader = loader(file, save);
    let document = loader.document().unwrap();
    (loader, document)
}

/// What another process gets of what `save` has put into `file`.
pub(crate) fn loader<'fd, D: Serialize>(
    file: &'fd File,
    save: impl FnOnce(&mut Saver<'fd>) -> D,
) -> Loader {
    let mut saver = Saver::new(file).unwrap();
    let document = save(&mut saver);
    let fds = saver.finish(&document).unwrap();
    let fds = fds
        .iter()
        .map(|fd| Some(fd.try_clone_to_owned().unwrap()))
        .collect();
    Loader::open(file.try_clone().unwrap(), fds).unwrap()
}

/// How a document is made wrong: a place in it, and what is put there.
pub(crate) type Mutation = (prop::sample::Index, Value);

/// Any mutation.
pub(crate) fn mutation() -> impl Strategy<Value = Mutation> {
    let value = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0u64..40).prop_map(Value::from),
        (0u32..33).prop_map(|bit| Value::from((1u64 << bit) - 1)),
        Just(Value::from(-1)),
        Just(Value::from(u64::MAX)),
        prop::sample::select(vec![
            "requested",
            "established",
            "flushing",
            "closing",
            "request",
            "shutdown",
            "stream",
            "seqpacket",
            "vsock",
            "guest",
            "host",
        ])
        .prop_map(Value::from),
        Just(Value::Array(Vec::new())),
        prop::collection::vec(0u64..3000, 1..4).prop_map(Value::from),
    ];
    (any::<prop::sample::Index>(), value)
}

/// Makes a document wrong.
pub(crate) fn mutate(document: &mut Value, (place, new): Mutation) {
    fn count(value: &Value) -> usize {
        1 + match value {
            Value::Array(values) => values.iter().map(count).sum(),
            Value::Object(members) => members.values().map(count).sum(),
            _ => 0,
        }
    }
    fn find<'v>(value: &'v mut Value, place: &mut usize) -> Option<&'v mut Value> {
        if *place == 0 {
            return Some(value);
        }
        *place -= 1;
        match value {
            Value::Array(values) => values.iter_mut().find_map(|value| find(value, place)),
            Value::Object(members) => members.values_mut().find_map(|value| find(value, place)),
            _ => None,
        }
    }
    let mut place = place.index(count(document));
    *find(document, &mut place).unwrap() = new;
}
