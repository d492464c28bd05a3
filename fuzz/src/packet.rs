//! Descriptor chains in any guest memory, beside a plain reading of the same bytes.
//!
//! The model reads the rings as the specification describes them (virtio 1.2, 2.7), one byte after the other, and knows
//! nothing of slices. What the parser makes of a chain must be the same, and what it writes must be there and nowhere
//! else.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use arbitrary::{Arbitrary, Unstructured};
use vhost_user_vsock::packet::header::{
    Cid, GuestPort, HEADER_LEN, MessageFlags, Op, PacketType, PeerAddr, VsockHeader,
};
use vhost_user_vsock::packet::{Received, RxBatch, RxStorage, TxChains, TxStorage};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::memory::{Image, Memory};

/// The most slices of memory that one receive fills.
const MAX_SLICES: usize = 1024;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Somewhere in guest memory, or outside of it.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    In { region: u8, offset: u16 },
    AtEndOf { region: u8, before: u8 },
    Anywhere(u64),
}

/// A descriptor. Most have the flags of the ring's direction.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Entry {
    place: Place,
    len: Len,
    flags: u8,
    next: u8,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Len {
    Header,
    Short(u8),
    Medium(u16),
    Any(u32),
}

/// A packet's header, and where it lies.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Header {
    place: Place,
    len: Len,
    rest: [u8; 20],
}

#[derive(Arbitrary, Debug)]
struct Input {
    /// How far behind the one before a region begins, and how long it is.
    regions: [(u8, u16); 3],
    size: u8,
    /// Descriptor table, avail ring, indirect table.
    places: [Place; 3],
    writable: bool,
    table: Vec<Entry>,
    indirect: Vec<Entry>,
    headers: Vec<Header>,
    heads: Vec<u8>,
    start: u16,
    /// How much payload the buffers are for, and how much the socket has.
    payload: u16,
    available: u16,
    noise: Vec<(Place, u8)>,
}

impl Input {
    fn ranges(&self) -> Vec<(u64, u64)> {
        let mut at = 0x1000;
        let range = |(gap, len): &(u8, u16)| {
            at += 16 * u64::from(*gap);
            let range = (at, 16 + u64::from(*len) % 0x1800);
            at += range.1;
            range
        };
        self.regions.iter().map(range).collect()
    }
}

impl Place {
    fn addr(self, ranges: &[(u64, u64)]) -> u64 {
        match self {
            Self::In { region, offset } => {
                let (addr, len) = ranges[usize::from(region) % ranges.len()];
                addr + u64::from(offset) % len
            }
            Self::AtEndOf { region, before } => {
                let (addr, len) = ranges[usize::from(region) % ranges.len()];
                addr + len - u64::from(before)
            }
            Self::Anywhere(addr) => addr,
        }
    }
}

impl Len {
    fn bytes(self) -> u32 {
        match self {
            Self::Header => HEADER_LEN as u32,
            Self::Short(len) => len.into(),
            Self::Medium(len) => u32::from(len) % 0x1000,
            Self::Any(len) => len,
        }
    }
}

/// Where the rings are.
struct Rings {
    size: u16,
    table: u64,
    avail: u64,
    start: u16,
}

impl Rings {
    fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(self.table))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail))
            .unwrap();
        queue.set_next_avail(self.start);
        queue.set_ready(true);
        queue
    }
}

/// Runs the target.
pub fn run(bytes: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(bytes)) else {
        return;
    };
    let ranges = input.ranges();
    let memory = Memory::new(&ranges);
    let rings = lay_out(&input, &ranges, &memory);
    let image = memory.image();
    if input.writable {
        read_buffers(&input, &rings, &memory, image);
    } else {
        read_packets(&rings, &memory, &image);
    }
}

/// Writes everything to where the input places it, one over the other if need be.
fn lay_out(input: &Input, ranges: &[(u64, u64)], memory: &Memory) -> Rings {
    let [table, avail, indirect] = input.places.map(|place| place.addr(ranges));
    let rings = Rings {
        size: 1 << (input.size % 7),
        table: table & !15,
        avail: (avail & !1).max(2),
        start: input.start,
    };
    for (index, header) in input.headers.iter().enumerate() {
        let mut bytes = [0; HEADER_LEN];
        bytes[..20].copy_from_slice(&header.rest);
        bytes[24..28].copy_from_slice(&header.len.bytes().to_le_bytes());
        bytes[28..44].copy_from_slice(&header.rest[4..]);
        bytes[20] = index as u8;
        memory.write(header.place.addr(ranges), &bytes);
    }
    for (place, byte) in &input.noise {
        memory.write(place.addr(ranges), &[*byte]);
    }
    let write = |at: u64, entries: &[Entry]| {
        for (index, entry) in entries.iter().enumerate() {
            let bytes = descriptor(
                entry,
                index,
                input.writable,
                ranges,
                (indirect, input.indirect.len()),
            );
            memory.write(at.saturating_add(16 * index as u64), &bytes);
        }
    };
    write(indirect, &input.indirect);
    write(rings.table, &input.table);
    for (index, head) in input.heads.iter().enumerate() {
        let slot = u64::from(rings.start.wrapping_add(index as u16) % rings.size);
        let head = u16::from(*head) % (rings.size + 1);
        memory.write(
            rings.avail.saturating_add(4 + 2 * slot),
            &head.to_le_bytes(),
        );
    }
    let end = rings.start.wrapping_add(input.heads.len() as u16);
    memory.write(rings.avail.saturating_add(2), &end.to_le_bytes());
    rings
}

fn descriptor(
    entry: &Entry,
    index: usize,
    writable: bool,
    ranges: &[(u64, u64)],
    table: (u64, usize),
) -> [u8; 16] {
    // The upper bits choose the exceptions.
    let usual = if writable { WRITE } else { 0 };
    let direction = if entry.flags >> 4 == 15 {
        usual ^ WRITE
    } else {
        usual
    };
    let next = u16::from(entry.flags) & NEXT;
    let (addr, len, flags) = if entry.flags & 14 == 14 {
        (table.0, 16 * table.1 as u32, INDIRECT)
    } else {
        (
            entry.place.addr(ranges),
            entry.len.bytes(),
            direction | next,
        )
    };
    let following = if entry.next == 0 {
        index as u16 + 1
    } else {
        u16::from(entry.next) % 80
    };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&following.to_le_bytes());
    bytes
}

/// A chain as the model has read it.
struct Chain {
    /// Address and length of each buffer.
    buffers: Vec<(u64, usize)>,
}

impl Chain {
    /// Reads the chain that begins at `head`; none where a driver must not offer it (virtio 1.2, 2.7.4 and 2.7.5).
    fn read(image: &Image, rings: &Rings, head: u16, writable: bool) -> Option<Self> {
        let (mut table, mut entries, mut index) = (rings.table, u32::from(rings.size), head);
        let mut is_indirect = false;
        let mut buffers = Vec::new();
        let mut total = 0;
        loop {
            let place = table.checked_add(16 * u64::from(index))?;
            let bytes = image
                .read(place, 16)
                .filter(|_| u32::from(index) < entries)?;
            let addr = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
            let flags = u16::from_le_bytes([bytes[12], bytes[13]]);
            if flags & INDIRECT != 0 {
                if is_indirect || !len.is_multiple_of(16) || len / 16 > u32::from(u16::MAX) {
                    return None;
                }
                (table, entries, index, is_indirect) = (addr, len / 16, 0, true);
                continue;
            }
            let inside = image.read(addr, len as usize).is_some();
            total += u64::from(len);
            if !inside || total > u64::from(u32::MAX) || (flags & WRITE != 0) != writable {
                return None;
            }
            buffers.push((addr, len as usize));
            if buffers.len() > usize::from(rings.size) {
                return None;
            }
            if flags & NEXT == 0 {
                return Some(Self { buffers });
            }
            index = u16::from_le_bytes([bytes[14], bytes[15]]);
        }
    }

    fn len(&self) -> usize {
        self.buffers.iter().map(|(_, len)| len).sum()
    }

    fn bytes(&self, image: &Image) -> Vec<u8> {
        let bytes = self
            .buffers
            .iter()
            .flat_map(|(addr, len)| image.read(*addr, *len).unwrap());
        bytes.collect()
    }

    /// The buffers without their first `skip` bytes and without what follows `len` more.
    fn part(&self, mut skip: usize, mut len: usize) -> Vec<(u64, usize)> {
        let mut part = Vec::new();
        for (addr, all) in &self.buffers {
            let skipped = skip.min(*all);
            skip -= skipped;
            let taken = len.min(all - skipped);
            len -= taken;
            if taken > 0 {
                part.push((addr + skipped as u64, taken));
            }
        }
        part
    }
}

/// The chains that the library takes off the ring. They must be those that stand in the avail ring.
fn chains<'m>(
    queue: &'m mut Queue,
    rings: &Rings,
    image: &Image,
    map: &'m GuestMemoryMmap,
) -> Vec<DescriptorChain<&'m GuestMemoryMmap>> {
    let chains: Vec<_> = queue.iter(map).map(Iterator::collect).unwrap_or_default();
    for (index, chain) in chains.iter().enumerate() {
        let slot = u64::from(rings.start.wrapping_add(index as u16) % rings.size);
        let head = image.read(rings.avail + 4 + 2 * slot, 2).unwrap();
        assert_eq!(chain.head_index().to_le_bytes()[..], head);
    }
    chains
}

/// The guest's packets.
fn read_packets(rings: &Rings, memory: &Memory, image: &Image) {
    let mut queue = rings.queue();
    let mut tx = TxChains::new(memory.map(), TxStorage::default());
    let (mut expected, mut room, mut short) = (Vec::new(), 0, 0);
    for chain in chains(&mut queue, rings, image, memory.map()) {
        let model = Chain::read(image, rings, chain.head_index(), false);
        let pushed = tx.push(chain, rings.size);
        assert_eq!(pushed.is_ok(), model.is_some(), "{pushed:?}");
        let Some(chain) = model else { continue };
        let bytes = chain.bytes(image);
        room += bytes.len();
        let len = bytes
            .get(24..28)
            .map(|len| u32::from_le_bytes(len.try_into().unwrap()));
        let is_packet = len.is_some_and(|len| bytes.len() >= HEADER_LEN + len as usize);
        if is_packet {
            expected.push(bytes);
        } else {
            short += 1;
        }
    }
    assert_eq!(tx.bytes(), room);
    let batch = tx.parse(|_| short -= 1);
    assert_eq!(short, 0);
    assert_eq!(batch.packets().len(), expected.len());
    let mut stream = Vec::new();
    for (packet, bytes) in batch.packets().iter().zip(&expected) {
        let header = packet.header();
        assert_eq!(in_guest_order(header), bytes[..HEADER_LEN]);
        stream.extend_from_slice(&bytes[HEADER_LEN..HEADER_LEN + header.len as usize]);
        let payload = batch.payload(std::slice::from_ref(packet));
        assert_eq!(payload.bytes(), header.len as usize);
    }
    let whole = batch.payload(batch.packets());
    for skip in [0, stream.len() / 3, stream.len()] {
        let mut copy = vec![0; stream.len() - skip];
        whole.copy_to(skip, &mut copy);
        assert_eq!(copy, stream[skip..]);
    }
    let (host, mut program) = UnixStream::pair().unwrap();
    let sent = whole.send_to(&host).unwrap_or(0);
    drop(host);
    let mut received = Vec::new();
    program.read_to_end(&mut received).unwrap();
    assert_eq!(received, stream[..sent]);
    assert!(
        sent == stream.len() || sent > 0,
        "a socket with room took nothing"
    );
    memory.check_all(image);
}

/// A header as the guest sends it: the guest's side first.
fn in_guest_order(header: &VsockHeader) -> Vec<u8> {
    [
        &header.guest_cid.get().to_le_bytes()[..],
        &header.peer.cid.get().to_le_bytes(),
        &header.guest_port.0.to_le_bytes(),
        &header.peer.port.0.to_le_bytes(),
        &header.len.to_le_bytes(),
        &u16::from(header.packet_type).to_le_bytes(),
        &u16::from(header.op).to_le_bytes(),
        &header.flags.to_le_bytes(),
        &header.buf_alloc.to_le_bytes(),
        &header.fwd_cnt.to_le_bytes(),
    ]
    .concat()
}

/// A header as the guest receives it: the peer's side first.
fn in_peer_order(header: &VsockHeader) -> Vec<u8> {
    let mut bytes = in_guest_order(header);
    bytes[..16].rotate_left(8);
    bytes[16..24].rotate_left(4);
    bytes
}

/// The guest's buffers.
fn read_buffers(input: &Input, rings: &Rings, memory: &Memory, mut image: Image) {
    let wanted = usize::from(input.payload);
    let mut queue = rings.queue();
    let mut batch = RxBatch::new(memory.map(), RxStorage::default());
    let mut buffers = Vec::new();
    let mut capacity = 0;
    for chain in chains(&mut queue, rings, &image, memory.map()) {
        let head = chain.head_index();
        let left = wanted - capacity;
        let model = Chain::read(&image, rings, head, true)
            .filter(|chain| chain.len() >= HEADER_LEN + usize::from(left > 0));
        let pushed = batch.push(chain, rings.size, left);
        assert_eq!(pushed.is_ok(), model.is_some(), "{pushed:?}");
        if let Some(chain) = model {
            let room = left.min(chain.len() - HEADER_LEN);
            capacity += room;
            buffers.push((head, chain, room));
        }
        if capacity == wanted || batch.is_full() {
            break;
        }
    }
    assert_eq!((batch.len(), batch.capacity()), (buffers.len(), capacity));
    assert_eq!(batch.is_empty(), buffers.is_empty());
    if capacity == 0 {
        fill_header(&mut batch, &buffers, &mut image);
    } else {
        fill_payload(input, &mut batch, &buffers, &mut image);
    }
    memory.check_all(&image);
}

const HEADER: VsockHeader = VsockHeader {
    guest_cid: Cid::from_raw(0x0102_0304_0506_0708),
    guest_port: GuestPort(0x1122_3344),
    peer: PeerAddr::host(0x5566_7788),
    len: 0,
    packet_type: PacketType::Stream,
    op: Op::Rw,
    flags: 0x99aa_bbcc,
    buf_alloc: 0xddee_ff00,
    fwd_cnt: 0x1020_3040,
};

/// A packet without payload.
fn fill_header(batch: &mut RxBatch<'_>, buffers: &[(u16, Chain, usize)], image: &mut Image) {
    batch.fill_header(&HEADER);
    assert_eq!(batch.filled().len(), buffers.len().min(1));
    for (buffer, (head, chain, _)) in batch.filled().iter().zip(buffers) {
        assert_eq!((buffer.head(), buffer.used()), (*head, HEADER_LEN as u32));
        write(image, &chain.part(0, HEADER_LEN), &in_peer_order(&HEADER));
    }
}

/// Packets with the payload that one receive brings.
fn fill_payload(
    input: &Input,
    batch: &mut RxBatch<'_>,
    buffers: &[(u16, Chain, usize)],
    image: &mut Image,
) {
    let (host, mut program) = UnixStream::pair().unwrap();
    let stream: Vec<u8> = (0..input.available)
        .map(|place| (place % 251) as u8)
        .collect();
    program.write_all(&stream).unwrap();
    drop(program);
    let areas: Vec<(u64, usize)> = buffers
        .iter()
        .flat_map(|(_, chain, room)| chain.part(HEADER_LEN, *room))
        .collect();
    let reachable = one_receive(image, &areas);
    let count = stream.len().min(reachable);
    let received = batch.receive_from(&host).unwrap();
    let expected = Received {
        bytes: count,
        drained: count < reachable,
    };
    assert_eq!(received, expected);
    write(image, &areas, &stream[..count]);
    batch.fill(&HEADER, count, MessageFlags::empty());
    let mut left = count;
    for (buffer, (head, chain, room)) in batch.filled().iter().zip(buffers) {
        let len = left.min(*room);
        left -= len;
        assert_eq!(
            (buffer.head(), buffer.used()),
            (*head, (HEADER_LEN + len) as u32)
        );
        let header = VsockHeader {
            len: len as u32,
            ..HEADER
        };
        write(image, &chain.part(0, HEADER_LEN), &in_peer_order(&header));
    }
    assert_eq!(left, 0, "every byte is in a packet");
    let before: usize = buffers[..batch.filled().len().saturating_sub(1)]
        .iter()
        .map(|(_, _, room)| room)
        .sum();
    assert!(count == 0 || before < count, "no packet is empty");
}

/// How many bytes one receive brings at most.
fn one_receive(image: &Image, areas: &[(u64, usize)]) -> usize {
    let slices = areas
        .iter()
        .flat_map(|(addr, len)| image.pieces(*addr, *len));
    slices.take(MAX_SLICES).sum()
}

/// Writes `bytes` over these areas.
fn write(image: &mut Image, areas: &[(u64, usize)], bytes: &[u8]) {
    let mut rest = bytes;
    for (addr, len) in areas {
        let (part, after) = rest.split_at(rest.len().min(*len));
        image.write(*addr, part);
        rest = after;
    }
}
