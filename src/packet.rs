//! Virtio-vsock packets in guest memory.
//!
//! A packet is a header of 44 bytes and, for RW, a payload (virtio 1.2, 5.10.6). The guest lays it over a descriptor
//! chain as it likes: in one buffer, header and payload apart, the payload over many descriptors, a descriptor over
//! several memory regions. This module alone turns such chains into headers, which are copied once into private
//! memory, and into lists of slices of guest memory, which go to the kernel as they are: a batch of packets leaves with
//! one `sendmsg`, and one `readv` fills a batch of buffers. It is also the only module with `unsafe` code.

#![allow(unsafe_code)]

pub mod header;

use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use libc::iovec;
use thiserror::Error;
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, VolatileSlice};

use crate::packet::header::{HEADER_LEN, VsockHeader};
use crate::syscalls::Syscall;

/// To move payload between guest memory and a socket.
pub(crate) const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_sendmsg),
    Syscall::any(libc::SYS_recvmsg),
];

/// How many slices the kernel takes in one call (`UIO_MAXIOV`).
const MAX_SLICES: usize = 1024;

/// Why a descriptor chain holds no packet.
#[derive(Debug, Error)]
pub enum PacketError {
    /// The chain has a descriptor of the other direction (virtio 1.2, 2.7.4.2).
    #[error("a descriptor of the wrong direction")]
    Direction,
    /// The chain loops, leaves the descriptor table, or is longer than the ring (virtio 1.2, 2.7.5.1).
    #[error("a chain without an end")]
    Endless,
    /// The chain is shorter than a header, or than its header says.
    #[error("a chain too short for its packet")]
    Short,
    /// A descriptor points outside of guest memory.
    #[error("a descriptor outside of guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Slices of guest memory, one behind the other. They live no longer than the memory they point into.
struct GuestSlices<'m> {
    iovecs: Vec<iovec>,
    memory: PhantomData<&'m GuestMemoryMmap>,
}

impl<'m> GuestSlices<'m> {
    fn new() -> Self {
        Self {
            iovecs: Vec::with_capacity(64),
            memory: PhantomData,
        }
    }

    fn len(&self) -> usize {
        self.iovecs.len()
    }

    fn push(&mut self, slice: &VolatileSlice<'m>) {
        self.iovecs.push(to_iovec(slice));
    }

    /// Shortens the slices in `range` to `bytes` bytes, of which they must hold as many, and answers where they end now.
    fn cut(&mut self, range: Range<usize>, bytes: usize) -> usize {
        let mut left = bytes;
        for i in range.clone() {
            if left == 0 {
                return i;
            }
            self.iovecs[i].iov_len = left.min(self.iovecs[i].iov_len);
            left -= self.iovecs[i].iov_len;
        }
        range.end
    }

    /// The slice at `index` as memory that the guest may change at any time.
    fn volatile(&self, index: usize) -> VolatileSlice<'m> {
        let iovec = &self.iovecs[index];
        // SAFETY: every iovec was made by `push` from a slice that is valid for 'm, and was only shortened since.
        unsafe { VolatileSlice::new(iovec.iov_base.cast(), iovec.iov_len) }
    }

    /// Writes `bytes` over the slices in `range`, which hold as many.
    fn write(&self, range: Range<usize>, mut bytes: &[u8]) {
        for index in range {
            let slice = self.volatile(index);
            let (part, rest) = bytes.split_at(slice.len().min(bytes.len()));
            slice.copy_from(part);
            bytes = rest;
        }
    }
}

fn to_iovec(slice: &VolatileSlice<'_>) -> iovec {
    iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}

/// Calls `take` with every slice of the chain's buffers, in order, and checks the chain: it has an end, every
/// descriptor is `writable` by the device or none is, and all lie in guest memory.
fn walk<'m>(
    memory: &'m GuestMemoryMmap,
    chain: impl Iterator<Item = Descriptor>,
    longest: u16,
    writable: bool,
    mut take: impl FnMut(VolatileSlice<'m>) -> Result<(), PacketError>,
) -> Result<(), PacketError> {
    let mut last: Option<Descriptor> = None;
    for (count, descriptor) in chain.enumerate() {
        if count >= usize::from(longest) {
            return Err(PacketError::Endless);
        }
        if descriptor.is_write_only() != writable {
            return Err(PacketError::Direction);
        }
        let (addr, len) = (descriptor.addr(), descriptor.len() as usize);
        match memory.get_slice(addr, len) {
            Ok(slice) => take(slice)?,
            // It crosses from one region to the next, or is no memory at all.
            Err(_) => memory
                .get_slices(addr, len)
                .try_for_each(|slice| take(slice?))?,
        }
        last = Some(descriptor);
    }
    // The iterator ends in silence where the chain is broken: then its last descriptor still names a next one.
    match last {
        Some(descriptor) if !descriptor.has_next() => Ok(()),
        Some(_) => Err(PacketError::Endless),
        None => Err(PacketError::Short),
    }
}

/// A packet from the guest: its header, and where its payload stands in the batch.
#[derive(Debug)]
pub struct VsockPacket {
    header: VsockHeader,
    payload: Range<usize>,
}

impl VsockPacket {
    /// The header, read once.
    pub fn header(&self) -> &VsockHeader {
        &self.header
    }
}

/// A batch of packets from the guest, in the order of the TX ring. First it is given all their chains, then it reads
/// their headers: the guest wrote those on another processor, and so they are on their way here all at once.
pub struct TxBatch<'m> {
    memory: &'m GuestMemoryMmap,
    slices: GuestSlices<'m>,
    chains: Vec<Range<usize>>,
    packets: Vec<VsockPacket>,
    bytes: usize,
    descriptors: usize,
}

impl<'m> TxBatch<'m> {
    /// An empty batch.
    pub fn new(memory: &'m GuestMemoryMmap) -> Self {
        Self {
            memory,
            slices: GuestSlices::new(),
            chains: Vec::with_capacity(64),
            packets: Vec::with_capacity(64),
            bytes: 0,
            descriptors: 0,
        }
    }

    /// Adds a chain from a ring of `ring_size` entries. On an error the batch stays as it was.
    pub fn push(
        &mut self,
        chain: DescriptorChain<&GuestMemoryMmap>,
        ring_size: u16,
    ) -> Result<(), PacketError> {
        let start = self.slices.len();
        let mut bytes = 0;
        let (slices, descriptors) = (&mut self.slices, &mut self.descriptors);
        let chain = chain.inspect(|_| *descriptors += 1);
        let walked = walk(self.memory, chain, ring_size, false, |slice| {
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
            Err(_) => self.slices.iovecs.truncate(start),
        }
        walked
    }

    /// Makes packets of the chains, and calls `refuse` for each that holds none.
    pub fn parse(&mut self, mut refuse: impl FnMut(PacketError)) {
        let mut end = 0;
        for chain in std::mem::take(&mut self.chains) {
            match self.parse_chain(chain, end) {
                Ok(packet) => {
                    end = packet.payload.end;
                    self.packets.push(packet);
                }
                Err(error) => refuse(error),
            }
        }
        self.slices.iovecs.truncate(end);
    }

    /// Makes a packet of a chain. What is payload of its slices moves to `start`, where that of the packet before ends.
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
                self.slices.iovecs[end] = to_iovec(&rest);
                end += 1;
            }
        }
        let header = VsockHeader::from_tx(&bytes);
        if filled < HEADER_LEN || payload < header.len as usize {
            return Err(PacketError::Short);
        }
        let end = self.slices.cut(start..end, header.len as usize);
        Ok(VsockPacket {
            header,
            payload: start..end,
        })
    }

    /// The packets, in order.
    pub fn packets(&self) -> &[VsockPacket] {
        &self.packets
    }

    /// How many bytes its chains hold.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many descriptors the batch was made of, those of refused chains among them.
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// The payload of the consecutive `packets` of this batch, as one.
    pub fn payload(&self, packets: &[VsockPacket]) -> Payload<'_> {
        let slices = match packets {
            [] => 0..0,
            [first, .., last] | [first @ last] => first.payload.start..last.payload.end,
        };
        Payload {
            slices: &self.slices,
            range: slices,
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
    /// Its length in bytes.
    pub fn len(&self) -> usize {
        length(self.iovecs())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sends it to a socket without waiting, and answers how many bytes the socket took. It is an error only where
    /// the first byte could not be sent: `WouldBlock` for a socket that is full.
    pub fn send_to(&self, socket: impl AsFd) -> io::Result<usize> {
        let mut sent = 0;
        for iovecs in self.iovecs().chunks(MAX_SLICES) {
            match sendmsg(socket.as_fd(), iovecs) {
                Ok(count) if count == length(iovecs) => sent += count,
                Ok(count) => return Ok(sent + count),
                Err(error) if sent == 0 => return Err(error),
                Err(_) => return Ok(sent),
            }
        }
        Ok(sent)
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

    fn iovecs(&self) -> &[iovec] {
        &self.slices.iovecs[self.range.clone()]
    }
}

/// What one read from a socket has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// How many bytes.
    pub bytes: usize,
    /// Whether the socket has no more for now.
    pub is_all: bool,
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

    /// How many bytes of these are payload.
    pub fn payload(&self) -> u64 {
        u64::from(self.used).saturating_sub(HEADER_LEN as u64)
    }
}

/// A batch of the guest's buffers, in the order of the RX ring. What is not filled can go back to the ring.
pub struct RxBatch<'m> {
    memory: &'m GuestMemoryMmap,
    headers: GuestSlices<'m>,
    payloads: GuestSlices<'m>,
    buffers: Vec<RxBuffer>,
    capacity: usize,
    filled: usize,
}

impl<'m> RxBatch<'m> {
    /// An empty batch.
    pub fn new(memory: &'m GuestMemoryMmap) -> Self {
        Self {
            memory,
            headers: GuestSlices::new(),
            payloads: GuestSlices::new(),
            buffers: Vec::with_capacity(64),
            capacity: 0,
            filled: 0,
        }
    }

    /// Makes the batch empty again.
    pub fn clear(&mut self) {
        self.headers.iovecs.clear();
        self.payloads.iovecs.clear();
        self.buffers.clear();
        self.capacity = 0;
        self.filled = 0;
    }

    /// Adds the buffer in `chain`, from a ring of `ring_size` entries, for at most `payload` bytes besides the header.
    /// A buffer without room for a byte is an error when there is payload to carry. On an error the batch stays as it
    /// was.
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
            self.headers.iovecs.truncate(header);
            self.payloads.iovecs.truncate(start);
        }
        let capacity = room?.min(payload);
        let end = self.payloads.cut(start..self.payloads.len(), capacity);
        self.payloads.iovecs.truncate(end);
        self.capacity += capacity;
        self.buffers.push(RxBuffer {
            head,
            header: header..self.headers.len(),
            capacity,
            used: 0,
        });
        Ok(())
    }

    fn parse(
        &mut self,
        chain: DescriptorChain<&GuestMemoryMmap>,
        ring_size: u16,
    ) -> Result<usize, PacketError> {
        let mut header = 0;
        let mut room = 0;
        let (headers, payloads) = (&mut self.headers, &mut self.payloads);
        walk(self.memory, chain, ring_size, true, |slice| {
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

    /// How many buffers there are in it.
    pub fn len(&self) -> usize {
        self.buffers.len()
    }

    /// Whether there is no buffer in it.
    pub fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    /// How many bytes of payload its buffers hold together.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether it is made of so many slices of guest memory that a `readv` takes no more.
    pub fn is_full(&self) -> bool {
        self.payloads.len() >= MAX_SLICES
    }

    /// The buffers that carry a packet now.
    pub fn filled(&self) -> &[RxBuffer] {
        &self.buffers[..self.filled]
    }

    /// Reads what the socket has into the payload areas, up to [`RxBatch::capacity`] bytes, without waiting. Without a
    /// byte it is the end of the stream.
    pub fn read_from(&self, socket: impl AsFd) -> io::Result<Read> {
        let count = self.payloads.len().min(MAX_SLICES);
        recvmsg(socket.as_fd(), &self.payloads.iovecs[..count])
    }

    /// Makes packets of `bytes` bytes of payload that [`RxBatch::read_from`] has put there, each with `header` and its
    /// own length.
    pub fn fill(&mut self, header: &VsockHeader, bytes: usize) {
        let mut left = bytes;
        while left > 0 && self.filled < self.buffers.len() {
            let part = left.min(self.buffers[self.filled].capacity);
            self.finish(header, part);
            left -= part;
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

/// Has the processor load the places where a header in `slice` lies, while other things are done.
fn prefetch(slice: &VolatileSlice<'_>) {
    #[cfg(target_arch = "x86_64")]
    for offset in [0, HEADER_LEN - 1] {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let place = slice.ptr_guard().as_ptr().wrapping_add(offset);
        // SAFETY: a prefetch reads nothing for the program and never faults, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = slice;
}

/// The bytes in `iovecs`.
fn length(iovecs: &[iovec]) -> usize {
    iovecs.iter().map(|iovec| iovec.iov_len).sum()
}

/// Sends at most [`MAX_SLICES`] slices of guest memory.
fn sendmsg(socket: BorrowedFd<'_>, iovecs: &[iovec]) -> io::Result<usize> {
    // SAFETY: a msghdr of zeroes is a valid one, without name, control data and slices.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_ptr().cast_mut();
    message.msg_iovlen = iovecs.len() as _;
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    retry(|| {
        // SAFETY: the slices are valid guest memory, which the kernel only reads, as it does the list of them.
        unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) }
    })
}

/// Reads into at most [`MAX_SLICES`] slices of guest memory.
fn recvmsg(socket: BorrowedFd<'_>, iovecs: &[iovec]) -> io::Result<Read> {
    // SAFETY: a msghdr of zeroes is a valid one, without name, control data and slices.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_ptr().cast_mut();
    message.msg_iovlen = iovecs.len() as _;
    let bytes = retry(|| {
        // SAFETY: the slices are valid guest memory, to which no Rust reference exists, and the guest may see any
        // byte change at any time. The message lives as long as the call.
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) }
    })?;
    // A stream gives all it has, but a read ends behind descriptors that were sent along. Then the lack of a place for
    // them is reported.
    let is_all = bytes < length(iovecs) && message.msg_flags & libc::MSG_CTRUNC == 0;
    Ok(Read { bytes, is_all })
}

/// A system call's outcome, called again where a signal came in between.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
