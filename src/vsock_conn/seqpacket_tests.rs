//! Connections of messages.

mod saved;

use std::io::{Read, Write};
use std::net::Shutdown as Half;
use std::os::unix::net::UnixStream;

use super::*;
use crate::packet::header::{GuestPort, MessageFlags, PacketType, PeerAddr};
use crate::testing::{memory, message_pair, received, rx_batch, tx_batch};

const KEY: ConnKey = ConnKey {
    guest: GuestPort(1234),
    peer: PeerAddr::host(40000),
    packet_type: PacketType::Seqpacket,
};
const WINDOW: u32 = 4096;
const CID: Cid = Cid::from_raw(4);

/// A connection and its two ends: the host program's socket, and the packets of the guest.
struct Ends {
    conn: VsockConnection,
    program: UnixStream,
}

/// A piece of a message, with its end or without.
type Piece<'a> = (&'a [u8], bool);

fn packet(op: Op) -> VsockHeader {
    VsockHeader {
        packet_type: PacketType::Seqpacket,
        buf_alloc: WINDOW,
        ..VsockHeader::new(CID, KEY.guest, KEY.peer, op)
    }
}

impl Ends {
    /// A connection that the guest has opened and whose RESPONSE is out.
    fn new(buf_alloc: u32) -> Self {
        let (socket, program) = message_pair();
        let mut ends = Self {
            conn: VsockConnection::accepted(&packet(Op::Request), socket, buf_alloc),
            program,
        };
        assert_eq!(ends.packets(WINDOW as usize)[0].0.op, Op::Response);
        ends
    }

    fn guest_writes(&mut self, pieces: &[Piece<'_>]) -> Verdict {
        let memory = memory();
        let packets: Vec<_> = pieces
            .iter()
            .map(|(bytes, ends)| {
                let mut header = packet(Op::Rw);
                header.flags = if *ends { MessageFlags::EOM.bits() } else { 0 };
                (header, *bytes)
            })
            .collect();
        let batch = tx_batch(&memory, &packets);
        self.conn.send_payload(&batch, batch.packets())
    }

    fn guest(&mut self, op: Op, change: impl FnOnce(&mut VsockHeader)) -> Verdict {
        let mut header = packet(op);
        change(&mut header);
        self.conn.send_pkt(&header)
    }

    fn readable(&mut self) -> Verdict {
        self.conn.socket_ready(Readiness {
            readable: true,
            ..Readiness::default()
        })
    }

    /// Everything the guest gets now, in buffers of at most `room` bytes.
    fn packets(&mut self, room: usize) -> Vec<(VsockHeader, Vec<u8>)> {
        let mut packets = Vec::new();
        while let Some(size) = self.conn.rx_size() {
            let memory = memory();
            let mut batch = rx_batch(&memory, size.min(room));
            assert_eq!(self.conn.recv_pkt(&mut batch), Verdict::Open);
            packets.extend(received(&memory, &batch));
        }
        packets
    }

    /// The messages of `packets`, and nothing else.
    fn messages(&mut self, room: usize) -> Vec<Vec<u8>> {
        let mut messages = vec![Vec::new()];
        for (header, bytes) in self.packets(room) {
            assert_eq!(
                (header.op, header.packet_type),
                (Op::Rw, PacketType::Seqpacket)
            );
            messages.last_mut().unwrap().extend(bytes);
            if header.ends_message() {
                messages.push(Vec::new());
            }
        }
        assert_eq!(messages.pop().unwrap(), b"", "a message without an end");
        messages
    }

    #[track_caller]
    fn assert_read(&self, messages: &[&[u8]]) {
        for message in messages {
            let mut bytes = [0; 10_000];
            let len = (&self.program).read(&mut bytes).unwrap();
            assert_eq!(&bytes[..len], *message);
        }
        self.program.set_nonblocking(true).unwrap();
        let more = (&self.program).read(&mut [0; 10]);
        assert!(more.is_err(), "one more message: {more:?}");
        self.program.set_nonblocking(false).unwrap();
    }

    fn write(&self, messages: &[&[u8]]) {
        for message in messages {
            assert_eq!((&self.program).write(message).unwrap(), message.len());
        }
    }
}

#[test]
fn whole_messages_are_sent_without_a_copy() {
    let mut ends = Ends::new(WINDOW);
    let pieces = [(&b"a"[..], true), (b"b", false), (b"", false), (b"c", true)];
    assert_eq!(ends.guest_writes(&pieces), Verdict::Open);
    assert_eq!(ends.conn.buffered(), 0);
    ends.assert_read(&[b"a", b"bc"]);
}

#[test]
fn a_message_in_pieces_is_gathered_and_does_not_delay_those_behind_it() {
    let mut ends = Ends::new(WINDOW);
    assert_eq!(
        ends.guest_writes(&[(b"first", true), (b"in ", false)]),
        Verdict::Open
    );
    ends.assert_read(&[b"first"]);
    assert!(!ends.conn.can_flush(), "there is nothing whole");
    assert_eq!(
        ends.guest_writes(&[(b"pieces", true), (b"last", true)]),
        Verdict::Open
    );
    assert_eq!(ends.conn.buffered(), 0);
    ends.assert_read(&[b"in pieces", b"last"]);
    assert_eq!(ends.guest_writes(&[(b"x", false)]), Verdict::Open);
    assert_eq!(ends.guest_writes(&[(b"y", true)]), Verdict::Open);
    assert!(ends.conn.can_flush());
    assert_eq!(ends.conn.flush(), Verdict::Open);
    ends.assert_read(&[b"xy"]);
    // All of it was handed on.
    assert_eq!(ends.conn.credit.guests(), WINDOW as usize - 20);
    assert_eq!(ends.guest(Op::CreditRequest, |_| ()), Verdict::Open);
    assert_eq!(ends.packets(0)[0].0.fwd_cnt, 20);
}

#[test]
fn a_message_that_can_not_end_resets() {
    let mut ends = Ends::new(100);
    assert_eq!(ends.guest_writes(&[(&[1; 99], false)]), Verdict::Open);
    let verdict = ends.guest_writes(&[(&[1; 1], false)]);
    assert_eq!(verdict, Verdict::Reset(CloseReason::Protocol));
    let mut ends = Ends::new(100);
    assert_eq!(
        ends.guest_writes(&[(&[1; 99], false), (&[1; 1], true)]),
        Verdict::Open
    );
    ends.assert_read(&[&[1; 100]]);
}

#[test]
fn a_full_socket_keeps_messages_apart() {
    let mut ends = Ends::new(1 << 20);
    let mut written = 0usize;
    while ends.conn.buffered() < 20_000 {
        let message = vec![written as u8; 1 + written % 5000];
        assert_eq!(ends.guest_writes(&[(&message, true)]), Verdict::Open);
        written += 1;
    }
    for number in 0..written {
        let mut bytes = [0; 10_000];
        let len = ends.program.read(&mut bytes).unwrap();
        assert_eq!(&bytes[..len], vec![number as u8; 1 + number % 5000]);
        let writable = Readiness {
            writable: true,
            ..Readiness::default()
        };
        assert_eq!(ends.conn.socket_ready(writable), Verdict::Open);
        while ends.conn.can_flush() {
            assert_eq!(ends.conn.flush(), Verdict::Open);
        }
    }
    assert_eq!(ends.conn.buffered(), 0);
    assert_eq!(ends.conn.credit.received(), ends.conn.credit.forwarded());
}

#[test]
fn a_shutdown_drops_what_is_not_whole() {
    for flags in [ShutdownFlags::SEND, ShutdownFlags::all()] {
        let mut ends = Ends::new(WINDOW);
        assert_eq!(
            ends.guest_writes(&[(b"whole", true), (b"part", false)]),
            Verdict::Open
        );
        let verdict = ends.guest(Op::Shutdown, |header| header.flags = flags.bits());
        let done = Verdict::Reset(CloseReason::Done);
        assert_eq!(verdict, if flags.is_all() { done } else { Verdict::Open });
        assert_eq!(ends.conn.buffered(), 0);
        let mut bytes = [0; 10];
        assert_eq!(ends.program.read(&mut bytes).unwrap(), 5);
        drop(ends.conn);
        assert_eq!(ends.program.read(&mut bytes).unwrap(), 0);
    }
}

#[test]
fn a_program_that_has_gone_counts_nothing_twice() {
    let mut ends = Ends::new(WINDOW);
    assert_eq!(ends.guest_writes(&[(b"part", false)]), Verdict::Open);
    ends.program.shutdown(Half::Read).unwrap();
    assert_eq!(
        ends.guest_writes(&[(b"end", true), (b"next", true)]),
        Verdict::Open
    );
    let packets = ends.packets(0);
    assert_eq!((packets[0].0.op, packets[0].0.fwd_cnt), (Op::Shutdown, 11));
    assert_eq!(ends.conn.buffered(), 0);
}

#[test]
fn messages_for_the_guest_keep_their_borders_in_buffers_of_any_size() {
    let long: Vec<u8> = (0..3000u32).map(|i| i as u8).collect();
    for room in [1, 7, 100, 4096] {
        let mut ends = Ends::new(WINDOW);
        ends.write(&[b"one", &long[..], b"", b"three"]);
        assert_eq!(ends.readable(), Verdict::Open);
        assert_eq!(ends.messages(room), [&b"one"[..], &long, b"three"]);
    }
}

#[test]
fn a_message_waits_for_all_of_its_credit_and_asks_once() {
    let mut ends = Ends::new(WINDOW);
    ends.write(&[&[1; 4000], &[2; 97]]);
    assert_eq!(ends.readable(), Verdict::Open);
    let packets = ends.packets(WINDOW as usize);
    let ops: Vec<_> = packets.iter().map(|(header, _)| header.op).collect();
    assert_eq!(ops, [Op::Rw, Op::CreditRequest]);
    assert_eq!(ends.readable(), Verdict::Open);
    assert_eq!(ends.conn.pending(), None);
    assert_eq!(
        ends.guest(Op::CreditUpdate, |header| header.fwd_cnt = 1),
        Verdict::Open
    );
    assert_eq!(ends.messages(50), [[2; 97]]);
}

#[test]
fn a_guest_that_takes_credit_back_gets_the_rest_of_a_message_later() {
    let mut ends = Ends::new(WINDOW);
    ends.write(&[&[1; 4000]]);
    assert_eq!(ends.readable(), Verdict::Open);
    let memory = memory();
    let mut batch = rx_batch(&memory, 1000);
    assert_eq!(ends.conn.recv_pkt(&mut batch), Verdict::Open);
    let first = received(&memory, &batch);
    assert_eq!((first[0].1.len(), first[0].0.ends_message()), (1000, false));
    let shrink = |header: &mut VsockHeader| header.buf_alloc = 2000;
    assert_eq!(ends.guest(Op::CreditUpdate, shrink), Verdict::Open);
    let ops: Vec<_> = ends
        .packets(1000)
        .iter()
        .map(|(header, _)| header.op)
        .collect();
    assert_eq!(ops, [Op::Rw, Op::CreditRequest]);
    assert_eq!(ends.guest(Op::CreditUpdate, |_| {}), Verdict::Open);
    assert_eq!(ends.messages(1000), [[1; 2000]]);
}

#[test]
fn a_message_is_not_held_back_for_more_than_half_of_the_guests_buffer() {
    let mut ends = Ends::new(WINDOW);
    ends.write(&[&[1; 1000], &[2; 4000]]);
    assert_eq!(ends.readable(), Verdict::Open);
    let packets = ends.packets(WINDOW as usize);
    let sent: Vec<_> = packets
        .iter()
        .map(|(header, bytes)| (header.op, bytes.len()))
        .collect();
    let rest = WINDOW as usize - 1000;
    assert_eq!(
        sent,
        [(Op::Rw, 1000), (Op::Rw, rest), (Op::CreditRequest, 0)]
    );
    assert!(!packets[1].0.ends_message());
    // The guest's program has read the first message.
    let read = |header: &mut VsockHeader| header.fwd_cnt = 1000;
    assert_eq!(ends.guest(Op::CreditUpdate, read), Verdict::Open);
    assert_eq!(ends.messages(WINDOW as usize), [vec![2; 4000 - rest]]);
}

#[test]
fn a_message_longer_than_the_guests_buffer_resets() {
    let mut ends = Ends::new(WINDOW);
    ends.write(&[&[1; 4096], &[2; 4097]]);
    assert_eq!(ends.readable(), Verdict::Open);
    let memory = memory();
    let mut batch = rx_batch(&memory, ends.conn.rx_size().unwrap());
    assert_eq!(ends.conn.recv_pkt(&mut batch), Verdict::Open);
    let mut batch = rx_batch(&memory, ends.conn.rx_size().unwrap());
    let verdict = ends.conn.recv_pkt(&mut batch);
    assert_eq!(verdict, Verdict::Reset(CloseReason::MessageTooLong));
    assert!(batch.filled().is_empty());
    assert_eq!(ends.conn.too_long(), Some((4097, 4096)));
}

#[test]
fn a_program_that_closes_is_heard_behind_its_last_message() {
    let mut ends = Ends::new(WINDOW);
    assert_eq!(ends.guest_writes(&[(b"never read", true)]), Verdict::Open);
    ends.write(&[b"", b"last", b""]);
    ends.program = UnixStream::pair().unwrap().0;
    let gone = Readiness {
        readable: true,
        until_empty: true,
        writable: true,
        hung_up: true,
    };
    assert_eq!(ends.conn.socket_ready(gone), Verdict::Open);
    let packets = ends.packets(WINDOW as usize);
    let ops: Vec<_> = packets.iter().map(|(header, _)| header.op).collect();
    assert_eq!(ops, [Op::Rw, Op::Shutdown]);
    assert_eq!(packets[0].1, b"last");
    assert!(packets[1].0.shutdown_flags().is_all());
}
