//! Virtio-vsock packets in guest memory.
//!
//! A packet is a header of 44 bytes and, for RW, a payload (virtio 1.2, 5.10.6). The driver lays it over a descriptor chain
//! as it likes: Linux puts header and payload into one buffer or into two, others spread a payload over many descriptors,
//! and a descriptor may cross from one memory region into the next. An example, a TX chain of "hello" as Linux 6.1 sends it:
//!
//! ```text
//! descriptor 0  addr 0x7a31040  len 44  flags NEXT    src 4:1234  dst 2:80  len 5  type 1  op 5 (RW)
//! descriptor 1  addr 0x7b02c00  len  5                "hello"
//! ```
//!
//! This module turns chains into headers, which are copied once into private memory (the driver may change its own copy at
//! any time), and into lists of slices of guest memory, which go to the kernel as they are: a batch of packets leaves with
//! one `sendmsg`, and one `recvmsg` fills a batch of buffers.

mod chain;
pub mod header;
mod iov;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemoryError, GuestMemoryMmap};

pub use chain::PacketError;
use chain::{Writer, walk};
use header::{HEADER_LEN, MessageFlags, Op, PacketType, VsockHeader};
pub use iov::Received;
use iov::{GuestSlices, MAX_SLICES, SliceStorage, prefetch};

use crate::syscalls::Syscall;

pub(crate) fn syscalls() -> Vec<Syscall> {
    iov::SYSCALLS.to_vec()
}

/// A packet from the guest: its header, and where its payload is in the batch.
#[derive(Debug)]
pub struct VsockPacket {
    header: VsockHeader,
    payload: Range<usize>,
}

impl VsockPacket {
    /// The header, read once from guest memory.
    pub fn header(&self) -> &VsockHeader {
        &self.header
    }
}

/// The allocations of [`TxChains`] and [`TxBatch`] between two batches: a batch allocates nothing once it has had its
/// largest size.
#[derive(Debug, Default)]
pub struct TxStorage {
    slices: SliceStorage,
    chains: Vec<Range<usize>>,
    packets: Vec<VsockPacket>,
}

/// Chains from the TX ring that were not read yet. The guest wrote their headers on another processor, so collecting all
/// chains first lets the headers' cache lines travel together.
pub struct TxChains<'m> {
    memory: &'m GuestMemoryMmap,
    slices: GuestSlices<'m>,
    chains: Vec<Range<usize>>,
    packets: Vec<VsockPacket>,
    bytes: usize,
    descriptors: usize,
}

impl<'m> TxChains<'m> {
    /// No chains yet.
    pub fn new(memory: &'m GuestMemoryMmap, storage: TxStorage) -> Self {
        Self {
            memory,
            slices: GuestSlices::new(storage.slices),
            chains: storage.chains,
            packets: storage.packets,
            bytes: 0,
            descriptors: 0,
        }
    }

    /// Adds a chain from a ring of `ring_size` entries. After an error there are as many chains as before.
    pub fn push(
        &mut self,
        chain: DescriptorChain<&GuestMemoryMmap>,
        ring_size: u16,
    ) -> Result<(), PacketError> {
        let start = self.slices.len();
        let mut bytes = 0;
        let (slices, descriptors) = (&mut self.slices, &mut self.descriptors);
        let chain = chain.inspect(|_| *descriptors += 1);
        let walked = walk(self.memory, chain, ring_size, Writer::Driver, |slice| {
            if bytes < HEADER_LEN {
                prefetch(&slice);
            }
            bytes += slice.len();
            slices.push(&slice);
            Ok(())
        });
        match walked {
            Ok(()) => {
                self.bytes += bytes;
                self.chains.push(start..self.slices.len());
            }
            Err(_) => self.slices.truncate(start),
        }
        walked
    }

    /// How many bytes the chains hold.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many descriptors were read, those of rejected chains included.
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// Reads the packets in the chains, and calls `reject` for each chain that holds none.
    pub fn parse(mut self, mut reject: impl FnMut(PacketError)) -> TxBatch<'m> {
        let mut end = 0;
        for index in 0..self.chains.len() {
            let chain = self.chains[index].clone();
            match self.parse_chain(chain, end) {
                Ok(packet) => {
                    end = packet.payload.end;
                    self.packets.push(packet);
                }
                Err(error) => reject(error),
            }
        }
        self.slices.truncate(end);
        TxBatch {
            slices: self.slices,
            chains: self.chains,
            packets: self.packets,
        }
    }

    /// Reads the packet in a chain. The slices of its payload move to `start`, where those of the packet before end.
    fn parse_chain(
        &mut self,
        chain: Range<usize>,
        start: usize,
    ) -> Result<VsockPacket, PacketError> {
        let mut bytes = [0; HEADER_LEN];
        let mut filled = 0;
        let mut payload = 0;
        let mut end = start;
        for index in chain {
            let slice = self.slices.volatile(index);
            let part = slice.len().min(HEADER_LEN - filled);
            slice.copy_to(&mut bytes[filled..filled + part]);
            filled += part;
            if part < slice.len() {
                let rest = slice.offset(part).map_err(GuestMemoryError::from)?;
                payload += rest.len();
                self.slices.replace(end, &rest);
                end += 1;
            }
        }
        let header = VsockHeader::from_tx(&bytes);
        if filled < HEADER_LEN || payload < header.len as usize {
            return Err(PacketError::Short);
        }
        let end = self.slices.shorten(start..end, header.len as usize);
        Ok(VsockPacket {
            header,
            payload: start..end,
        })
    }
}

/// A batch of packets from the guest, in the order of the TX ring.
#[derive(Debug)]
pub struct TxBatch<'m> {
    slices: GuestSlices<'m>,
    chains: Vec<Range<usize>>,
    packets: Vec<VsockPacket>,
}

impl TxBatch<'_> {
    /// The packets, in order.
    pub fn packets(&self) -> &[VsockPacket] {
        &self.packets
    }

    /// The payload of the consecutive `packets` of this batch, as one.
    pub fn payload(&self, packets: &[VsockPacket]) -> Payload<'_> {
        let range = match packets {
            [] => 0..0,
            [first, .., last] | [first @ last] => first.payload.start..last.payload.end,
        };
        Payload {
            slices: &self.slices,
            range,
        }
    }

    /// Leaves the beginning of a message at the end of the batch out of it, and returns how many packets that are. A batch of
    /// nothing else stays as it is.
    pub fn leave_unfinished(&mut self) -> usize {
        let Some(last) = self.packets.last().map(|packet| packet.header) else {
            return 0;
        };
        let is_piece = |packet: &&VsockPacket| {
            let header = packet.header();
            header.op == Op::Rw
                && header.packet_type == PacketType::Seqpacket
                && !header.ends_message()
                && (header.guest_cid, header.guest_port, header.peer)
                    == (last.guest_cid, last.guest_port, last.peer)
        };
        let count = self.packets.iter().rev().take_while(is_piece).count();
        if count == self.packets.len() {
            return 0;
        }
        self.packets.truncate(self.packets.len() - count);
        count
    }

    /// Ends the batch, and keeps its allocations for the next.
    pub fn into_storage(mut self) -> TxStorage {
        self.chains.clear();
        self.packets.clear();
        TxStorage {
            slices: self.slices.into_storage(),
            chains: self.chains,
            packets: self.packets,
        }
    }
}

/// Payload from the guest, where the guest left it.
#[derive(Clone)]
pub struct Payload<'b> {
    slices: &'b GuestSlices<'b>,
    range: Range<usize>,
}

impl Payload<'_> {
    /// How many bytes it has.
    pub fn bytes(&self) -> usize {
        self.slices.bytes(self.range.clone())
    }

    /// Whether one `sendmsg` takes all of it.
    pub fn fits_one_send(&self) -> bool {
        self.range.len() <= MAX_SLICES
    }

    /// Sends it to a socket without waiting, and returns how many bytes the socket took. An error means that not even the
    /// first byte was sent: `WouldBlock` from a socket that is full.
    pub fn send_to(&self, socket: impl AsFd) -> io::Result<usize> {
        self.slices.send(self.range.clone(), socket.as_fd())
    }

    /// Copies the bytes from `offset` on into `out`, as many as it holds.
    pub fn copy_to(&self, offset: usize, out: &mut [u8]) {
        let mut skip = offset;
        let mut filled = 0;
        for index in self.range.clone() {
            let slice = self.slices.volatile(index);
            if let Ok(rest) = slice.offset(skip) {
                let end = out.len().min(filled + rest.len());
                filled += rest.copy_to(&mut out[filled..end]);
            }
            skip = skip.saturating_sub(slice.len());
        }
    }
}

/// A buffer of the guest's, for a packet to it.
#[derive(Debug)]
pub struct RxBuffer {
    head: u16,
    header: Range<usize>,
    capacity: usize,
    used: u32,
}

impl RxBuffer {
    /// The head of its descriptor chain.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// How many bytes of it have been written.
    pub fn used(&self) -> u32 {
        self.used
    }

    /// How many of these bytes are payload.
    pub fn payload(&self) -> u64 {
        u64::from(self.used).saturating_sub(HEADER_LEN as u64)
    }
}

/// The allocations of an [`RxBatch`] between two uses.
#[derive(Debug, Default)]
pub struct RxStorage {
    headers: SliceStorage,
    payloads: SliceStorage,
    buffers: Vec<RxBuffer>,
}

/// A batch of the guest's buffers, in the order of the RX ring. Those that are not filled can go back to the ring.
#[derive(Debug)]
pub struct RxBatch<'m> {
    memory: &'m GuestMemoryMmap,
    headers: GuestSlices<'m>,
    payloads: GuestSlices<'m>,
    buffers: Vec<RxBuffer>,
    capacity: usize,
    filled: usize,
    descriptors: usize,
}

impl<'m> RxBatch<'m> {
    /// An empty batch.
    pub fn new(memory: &'m GuestMemoryMmap, storage: RxStorage) -> Self {
        Self {
            memory,
            headers: GuestSlices::new(storage.headers),
            payloads: GuestSlices::new(storage.payloads),
            buffers: storage.buffers,
            capacity: 0,
            filled: 0,
            descriptors: 0,
        }
    }

    /// Makes the batch empty again. Only the count of descriptors goes on.
    pub fn clear(&mut self) {
        self.headers.clear();
        self.payloads.clear();
        self.buffers.clear();
        self.capacity = 0;
        self.filled = 0;
    }

    /// Ends the batch, and keeps its allocations for the next.
    pub fn into_storage(mut self) -> RxStorage {
        self.clear();
        RxStorage {
            headers: self.headers.into_storage(),
            payloads: self.payloads.into_storage(),
            buffers: self.buffers,
        }
    }

    /// Adds the buffer in `chain`, from a ring of `ring_size` entries, for at most `payload` bytes behind the header. Where
    /// there is payload to carry, a buffer without room for a byte of it is an error. After an error the batch holds what it
    /// held before.
    pub fn push(
        &mut self,
        chain: DescriptorChain<&GuestMemoryMmap>,
        ring_size: u16,
        payload: usize,
    ) -> Result<(), PacketError> {
        let (header, start) = (self.headers.len(), self.payloads.len());
        let head = chain.head_index();
        let room = self.parse(chain, ring_size).and_then(|room| {
            if room == 0 && payload > 0 {
                Err(PacketError::Short)
            } else {
                Ok(room)
            }
        });
        if room.is_err() {
            self.headers.truncate(header);
            self.payloads.truncate(start);
        }
        let capacity = room?.min(payload);
        let end = self.payloads.shorten(start..self.payloads.len(), capacity);
        self.payloads.truncate(end);
        self.capacity += capacity;
        self.buffers.push(RxBuffer {
            head,
            header: header..self.headers.len(),
            capacity,
            used: 0,
        });
        Ok(())
    }

    /// Splits a chain into the slices of the header and those behind it, and returns how many bytes the latter hold.
    fn parse(
        &mut self,
        chain: DescriptorChain<&GuestMemoryMmap>,
        ring_size: u16,
    ) -> Result<usize, PacketError> {
        let mut header = 0;
        let mut room = 0;
        let (headers, payloads) = (&mut self.headers, &mut self.payloads);
        let descriptors = &mut self.descriptors;
        let chain = chain.inspect(|_| *descriptors += 1);
        walk(self.memory, chain, ring_size, Writer::Device, |slice| {
            let part = slice.len().min(HEADER_LEN - header);
            let (before, rest) = slice.split_at(part).map_err(GuestMemoryError::from)?;
            if !before.is_empty() {
                header += part;
                headers.push(&before);
            }
            if !rest.is_empty() {
                room += rest.len();
                payloads.push(&rest);
            }
            Ok(())
        })?;
        if header < HEADER_LEN {
            Err(PacketError::Short)
        } else {
            Ok(room)
        }
    }

    /// How many buffers are in it.
    pub fn len(&self) -> usize {
        self.buffers.len()
    }

    /// Whether no buffer is in it.
    pub fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    /// How many bytes of payload its buffers hold together.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether one [`RxBatch::receive_from`] takes `bytes` bytes.
    pub fn receives_at_once(&self, bytes: usize) -> bool {
        let slices = self.payloads.len();
        bytes <= self.capacity
            && (slices <= MAX_SLICES || bytes <= self.payloads.bytes(0..MAX_SLICES))
    }

    /// How many descriptors were read since it was made, those of rejected chains included.
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// Whether it is made of as many slices of guest memory as one `recvmsg` takes.
    pub fn is_full(&self) -> bool {
        self.payloads.len() >= MAX_SLICES
    }

    /// The buffers that carry a packet now.
    pub fn filled(&self) -> &[RxBuffer] {
        &self.buffers[..self.filled]
    }

    /// Receives what the socket has into the buffers' payload areas, up to [`RxBatch::capacity`] bytes, without waiting.
    /// No byte means the end of the stream.
    pub fn receive_from(&self, socket: impl AsFd) -> io::Result<Received> {
        self.payloads.receive(socket.as_fd())
    }

    /// Writes `bytes` into the buffers' payload areas. At most [`RxBatch::capacity`] bytes fit.
    pub fn write(&self, bytes: &[u8]) {
        self.payloads.write(0..self.payloads.len(), bytes);
    }

    /// Makes packets of `bytes` bytes of payload that [`RxBatch::receive_from`] or [`RxBatch::write`] has written, each with
    /// `header` and a length of its own. The last one also has the flags `last`.
    pub fn fill(&mut self, header: &VsockHeader, bytes: usize, last: MessageFlags) {
        let mut left = bytes;
        while left > 0 && self.filled < self.buffers.len() {
            let part = left.min(self.buffers[self.filled].capacity);
            left -= part;
            let flags = if left == 0 { last.bits() } else { 0 };
            let header = VsockHeader {
                flags: header.flags | flags,
                ..*header
            };
            self.finish(&header, part);
        }
    }

    /// Makes a packet without payload of the next buffer, if there is one.
    pub fn fill_header(&mut self, header: &VsockHeader) {
        if self.filled < self.buffers.len() {
            self.finish(header, 0);
        }
    }

    fn finish(&mut self, header: &VsockHeader, len: usize) {
        let buffer = &mut self.buffers[self.filled];
        let header = VsockHeader {
            len: len as u32,
            ..*header
        };
        self.headers.write(buffer.header.clone(), &header.to_rx());
        buffer.used = (HEADER_LEN + len) as u32;
        self.filled += 1;
    }
}
