use std::io::{Read as _, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use virtio_vsock::packet::VsockPacket as Oracle;
use vm_memory::{Bytes, GuestAddress};

use super::*;

use crate::packet::header::{Cid, GuestPort, Op, PeerAddr};
use crate::testing::{
    Area, BORDER, RING_SIZE, WRITE, chain, chain_ending, memory, rx_batch, tx_batch,
};

const NEXT: u16 = 1;

fn rw(len: usize) -> VsockHeader {
    VsockHeader {
        len: len as u32,
        ..VsockHeader::new(Cid::from_raw(4), GuestPort(1), PeerAddr::host(2), Op::Rw)
    }
}

/// Lays areas of these lengths one behind the other from `start` on, with gaps between them.
fn areas(start: u64, lengths: &[usize], flags: u16) -> Vec<Area> {
    let mut at = start;
    let area = |len: &usize| {
        let area = (at, *len as u32, flags);
        at += *len as u64 + 3;
        area
    };
    lengths.iter().map(area).collect()
}

fn write_over(memory: &GuestMemoryMmap, areas: &[Area], bytes: &[u8]) {
    let mut rest = bytes;
    for (addr, len, _) in areas {
        let (part, after) = rest.split_at(rest.len().min(*len as usize));
        memory.write_slice(part, GuestAddress(*addr)).unwrap();
        rest = after;
    }
}

fn tx_chains(memory: &GuestMemoryMmap) -> TxChains<'_> {
    TxChains::new(memory, TxStorage::default())
}

fn rx_batch_of(memory: &GuestMemoryMmap) -> RxBatch<'_> {
    RxBatch::new(memory, RxStorage::default())
}

/// A batch of the packet in a chain.
fn take<'m>(
    memory: &'m GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
) -> Result<TxBatch<'m>, PacketError> {
    let mut chains = tx_chains(memory);
    let pushed = chains.push(chain, RING_SIZE);
    let mut rejected = None;
    let batch = chains.parse(|error| rejected = Some(error));
    let result = pushed.and(rejected.map_or(Ok(()), Err));
    if result.is_err() {
        assert!(
            batch.packets().is_empty() && batch.slices.len() == 0,
            "nothing is left of it"
        );
    }
    result.map(|()| batch)
}

fn refusal(areas: &[Area], last: (u16, u16)) -> PacketError {
    let memory = memory();
    take(&memory, chain_ending(&memory, areas, last)).unwrap_err()
}

#[test]
fn broken_chains_are_told_apart() {
    let header = (0x8000, 44, 0);
    assert!(matches!(
        refusal(&[(0x8000, 43, 0)], (0, 0)),
        PacketError::Short
    ));
    assert!(matches!(
        refusal(&[(0x8000, 0, 0)], (0, 0)),
        PacketError::Short
    ));
    assert!(matches!(
        refusal(&[header], (NEXT, 0)),
        PacketError::Endless
    ));
    assert!(matches!(
        refusal(&[header], (NEXT, RING_SIZE)),
        PacketError::Endless
    ));
    assert!(matches!(
        refusal(&[(0x8000, 44, WRITE)], (0, 0)),
        PacketError::Direction
    ));
    assert!(matches!(
        refusal(&[header, (0x9000, 1, WRITE)], (0, 0)),
        PacketError::Direction
    ));
    for addr in [0x80000, 0x80000 - 43, u64::MAX - 10] {
        assert!(matches!(
            refusal(&[(addr, 44, 0)], (0, 0)),
            PacketError::Memory(_)
        ));
    }
}

#[test]
fn a_header_must_not_promise_more_than_there_is() {
    let memory = memory();
    for len in [6, 65537, 1 << 31, u32::MAX] {
        let header = VsockHeader { len, ..rw(0) };
        memory
            .write_slice(&header.to_tx(), GuestAddress(0x8000))
            .unwrap();
        let result = take(&memory, chain(&memory, &[(0x8000, 49, 0)]));
        assert!(matches!(result, Err(PacketError::Short)), "{len}");
    }
}

#[test]
fn a_chain_longer_than_its_ring_is_refused() {
    let memory = memory();
    let chain = chain(&memory, &areas(0x8000, &[44, 1, 1, 1], 0));
    let result = tx_chains(&memory).push(chain, 3);
    assert!(matches!(result, Err(PacketError::Endless)));
}

#[test]
fn rx_buffers_hold_a_header_and_a_byte() {
    let memory = memory();
    let mut batch = rx_batch_of(&memory);
    let mut push = |len, payload| {
        batch
            .push(chain(&memory, &[(0x8000, len, WRITE)]), RING_SIZE, payload)
            .is_ok()
    };
    assert!(!push(43, 0));
    assert!(push(44, 0), "enough for a packet without payload");
    assert!(!push(44, 1));
    assert!(push(45, 1));
    let readable = batch.push(chain(&memory, &[(0x8000, 100, 0)]), RING_SIZE, 1);
    assert!(matches!(readable, Err(PacketError::Direction)));
    assert_eq!((batch.len(), batch.capacity()), (2, 1));
}

#[test]
fn the_last_packet_of_a_message_says_so() {
    let memory = memory();
    for (bytes, lengths) in [(1, &[1][..]), (10, &[10]), (11, &[10, 1]), (20, &[10, 10])] {
        let mut batch = rx_batch_of(&memory);
        for addr in [0x8000, 0x9000] {
            let area = [(addr, 54, WRITE)];
            batch.push(chain(&memory, &area), RING_SIZE, 10).unwrap();
        }
        batch.fill(&rw(0), bytes, MessageFlags::EOM);
        let mut headers = [0x8000, 0x9000].map(|addr| {
            let mut header = [0; HEADER_LEN];
            memory.read_slice(&mut header, GuestAddress(addr)).unwrap();
            VsockHeader::from_rx(&header)
        });
        let found: Vec<_> = batch.filled().iter().map(RxBuffer::payload).collect();
        assert_eq!(found, lengths);
        let headers = &mut headers[..lengths.len()];
        assert!(
            headers
                .iter()
                .zip(lengths)
                .all(|(header, len)| u64::from(header.len) == *len)
        );
        let ends: Vec<_> = headers.iter().map(|header| header.ends_message()).collect();
        let last = lengths.len() - 1;
        assert!(
            ends.iter()
                .enumerate()
                .all(|(index, ends)| *ends == (index == last))
        );
        memory
            .write_slice(&[0; 0x2000], GuestAddress(0x8000))
            .unwrap();
    }
}

#[test]
fn the_beginning_of_a_message_is_left_for_the_next_batch() {
    let piece = |port: u32, flags: MessageFlags| VsockHeader {
        guest_port: GuestPort(port),
        packet_type: PacketType::Seqpacket,
        flags: flags.bits(),
        ..rw(0)
    };
    let (part, end) = (
        |port| piece(port, MessageFlags::empty()),
        |port| piece(port, MessageFlags::EOM),
    );
    for (packets, left) in [
        (vec![], 0),
        (vec![end(1)], 0),
        (vec![part(1), part(1)], 0),
        (vec![end(1), part(1)], 1),
        (vec![part(1), end(1), part(1), part(1)], 2),
        (vec![part(2), part(1)], 1),
        (vec![part(1), end(2)], 0),
        (vec![part(1), rw(0)], 0),
        (vec![rw(0), part(1)], 1),
    ] {
        let memory = memory();
        let chains: Vec<_> = packets.iter().map(|header| (*header, &b"x"[..])).collect();
        let mut batch = tx_batch(&memory, &chains);
        assert_eq!(batch.leave_unfinished(), left, "{packets:?}");
        assert_eq!(batch.packets().len(), packets.len() - left);
    }
}

#[test]
fn one_receive_takes_no_more_slices_than_the_kernel_does() {
    let memory = memory();
    let mut batch = rx_batch_of(&memory);
    // 60 slices of 2 bytes behind each header.
    let lengths = [&[44][..], &[2; 60]].concat();
    for _ in 0..18 {
        assert!(!batch.is_full());
        let buffer = chain(&memory, &areas(0x8000, &lengths, WRITE));
        batch.push(buffer, RING_SIZE, usize::MAX).unwrap();
        assert!(batch.receives_at_once(batch.capacity().min(2048)));
        assert!(!batch.receives_at_once(batch.capacity() + 1));
    }
    assert!(batch.is_full() && batch.capacity() == 2160);
    assert!(batch.receives_at_once(2048) && !batch.receives_at_once(2049));
}

#[test]
fn a_read_that_ends_at_descriptors_is_not_all() {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::io::IoSlice;
    let memory = memory();
    let batch = rx_batch(&memory, 100);
    let (host, program) = UnixStream::pair().unwrap();
    for text in [b"first ", b"second"] {
        let fds = [program.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let (fd, flags) = (program.as_raw_fd(), MsgFlags::empty());
        sendmsg::<()>(fd, &[IoSlice::new(text)], &rights, flags, None).unwrap();
    }
    let expected = Received {
        bytes: 6,
        drained: false,
    };
    assert_eq!(batch.receive_from(&host).unwrap(), expected);
    assert_eq!(batch.receive_from(&host).unwrap(), expected);
}

proptest! {
    #[test]
    fn any_layout_of_a_packet_reads_the_same(
        payload in prop::collection::vec(any::<u8>(), 0..5000),
        cuts in prop::collection::vec(1usize..700, 0..20),
        start in prop_oneof![Just(0x8000u64), BORDER - 3000..BORDER],
        surplus in 0usize..50,
    ) {
        let memory = memory();
        let bytes = [&rw(payload.len()).to_tx()[..], &payload, &vec![0xee; surplus]].concat();
        let mut lengths = cuts;
        let covered: usize = lengths.iter().sum();
        lengths.push(bytes.len().saturating_sub(covered).max(1));
        let areas = areas(start, &lengths, 0);
        write_over(&memory, &areas, &bytes);

        let batch = take(&memory, chain(&memory, &areas)).unwrap();
        let packets = batch.packets();
        prop_assert_eq!(packets[0].header(), &rw(payload.len()));
        let whole = batch.payload(packets);
        prop_assert_eq!(whole.bytes(), payload.len());
        let mut copied = vec![0; payload.len() / 2];
        let skipped = payload.len() - copied.len();
        whole.copy_to(skipped, &mut copied);
        prop_assert_eq!(&copied[..], &payload[skipped..]);
        let (host, mut program) = UnixStream::pair().unwrap();
        prop_assert_eq!(whole.send_to(&host).unwrap(), payload.len());
        drop(host);
        let mut sent = Vec::new();
        program.read_to_end(&mut sent).unwrap();
        prop_assert_eq!(sent, payload);
    }

    /// Packets whose headers and payloads are cut at will, and among them some that promise more than they hold.
    #[test]
    fn a_batch_keeps_the_payload_of_its_good_packets(
        packets in prop::collection::vec((0usize..300, 6usize..80, prop::bool::weighted(0.2)), 1..20),
    ) {
        let memory = memory();
        let mut chains = tx_chains(&memory);
        let (mut at, mut sent, mut lengths) = (0x8000, Vec::new(), Vec::new());
        for (number, (len, cut, short)) in packets.iter().enumerate() {
            let payload = vec![number as u8; *len];
            let bytes = [&rw(len + usize::from(*short)).to_tx()[..], &payload].concat();
            let cuts: Vec<usize> = bytes.chunks(*cut).map(<[u8]>::len).collect();
            let areas = areas(at, &cuts, 0);
            write_over(&memory, &areas, &bytes);
            chains.push(chain(&memory, &areas), RING_SIZE).unwrap();
            at += 0x400;
            if !short {
                sent.extend(payload);
                lengths.push(*len as u32);
            }
        }
        let mut rejected = 0;
        let batch = chains.parse(|error| {
            assert!(matches!(error, PacketError::Short));
            rejected += 1;
        });
        prop_assert_eq!(rejected, packets.len() - lengths.len());
        let found: Vec<u32> = batch.packets().iter().map(|packet| packet.header().len).collect();
        prop_assert_eq!(found, lengths);
        let whole = batch.payload(batch.packets());
        let mut copied = vec![0; whole.bytes()];
        whole.copy_to(0, &mut copied);
        prop_assert_eq!(copied, sent);
    }

    /// virtio-vsock takes a header and at most one data descriptor, each within one region.
    #[test]
    fn what_the_oracle_can_read_is_read_alike(
        bytes in prop::array::uniform32(any::<u8>()),
        len in 0u32..3000,
        area in 0u32..3000,
    ) {
        let memory = memory();
        let areas = [(0x8000, 44, 0), (0x9000, area, 0)];
        memory.write_slice(&bytes, GuestAddress(0x8000)).unwrap();
        memory.write_slice(&len.to_le_bytes(), GuestAddress(0x8000 + 24)).unwrap();
        let count = if len == 0 { 1 } else { 2 };
        let oracle = Oracle::from_tx_virtq_chain(&memory, &mut chain(&memory, &areas[..count]), 65536);
        let ours = take(&memory, chain(&memory, &areas[..count]));
        prop_assert_eq!(ours.is_ok(), oracle.is_ok());
        if let (Ok(batch), Ok(oracle)) = (ours, oracle) {
            let header = batch.packets()[0].header();
            prop_assert_eq!(header.guest_cid.get(), oracle.src_cid());
            prop_assert_eq!(header.peer.cid.get(), oracle.dst_cid());
            prop_assert_eq!(header.guest_port.0, oracle.src_port());
            prop_assert_eq!(header.peer.port.0, oracle.dst_port());
            prop_assert_eq!(header.len, oracle.len());
            prop_assert_eq!(u16::from(header.packet_type), oracle.type_());
            prop_assert_eq!(u16::from(header.op), oracle.op());
            prop_assert_eq!(header.flags, oracle.flags());
            prop_assert_eq!(header.buf_alloc, oracle.buf_alloc());
            prop_assert_eq!(header.fwd_cnt, oracle.fwd_cnt());
        }
    }

    #[test]
    fn one_read_fills_buffers_of_any_layout(
        payload in prop::collection::vec(any::<u8>(), 1..4000),
        buffers in prop::collection::vec(prop::collection::vec(1usize..300, 1..6), 1..20),
        limit in 1usize..5000,
    ) {
        let memory = memory();
        let mut batch = rx_batch_of(&memory);
        let mut taken = Vec::new();
        for (index, lengths) in buffers.iter().enumerate() {
            let areas = areas(0x8000 + 0x1000 * index as u64, lengths, WRITE);
            let size: usize = lengths.iter().sum();
            let left = limit - batch.capacity();
            if left == 0 {
                break;
            }
            let pushed = batch.push(chain(&memory, &areas), RING_SIZE, left);
            prop_assert_eq!(pushed.is_ok(), size > 44);
            if size > 44 {
                taken.push((areas, (size - 44).min(left)));
            }
        }
        prop_assert_eq!(batch.capacity(), taken.iter().map(|(_, room)| room).sum::<usize>());
        let (host, mut program) = UnixStream::pair().unwrap();
        program.write_all(&payload).unwrap();
        if batch.is_empty() {
            return Ok(());
        }
        let read = batch.receive_from(&host).unwrap();
        let count = read.bytes;
        prop_assert_eq!(count, payload.len().min(batch.capacity()));
        prop_assert_eq!(read.drained, count < batch.capacity());
        batch.fill(&rw(0), count, MessageFlags::empty());
        let mut got = Vec::new();
        for (buffer, (areas, room)) in batch.filled().iter().zip(&taken) {
            let mut bytes = Vec::new();
            for (addr, len, _) in areas {
                let mut part = vec![0; *len as usize];
                memory.read_slice(&mut part, GuestAddress(*addr)).unwrap();
                bytes.extend(part);
            }
            bytes.truncate(buffer.used() as usize);
            let body = bytes.split_off(44);
            let header = VsockHeader::from_rx(&bytes.try_into().unwrap());
            prop_assert_eq!(header, rw(body.len()));
            prop_assert!(body.len() <= *room);
            got.extend(body);
        }
        prop_assert_eq!(&got[..], &payload[..count]);
    }
}
