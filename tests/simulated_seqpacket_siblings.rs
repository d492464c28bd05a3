//! Guests that exchange messages with each other, in one process and across processes.

mod common;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use common::daemon::{PATIENCE, eventually};
use common::siblings::{Kind, Vms, flow};
use common::sim::host::{
    assert_message, assert_same, pattern, recv_bytes, recv_message, recv_other,
};
use common::sim::packet::{BUF_ALLOC, EOM, NO_RECEIVE, NO_SEND, SEQPACKET};
use common::sim::{Dice, Flow, Op, Packet, Setup, SimGuest};

/// The port where a guest's program listens.
const PORT: u32 = 80;

/// The port that a guest's program calls from.
const CALLER: u32 = 1000;

/// The most payload that Linux puts in one packet.
const PACKET: usize = 64 * 1024;

/// Runs each scenario with siblings of either kind.
macro_rules! with_either_kind {
    ($($scenario:ident)*) => {
        mod in_one_process {
            $(#[test] fn $scenario() { super::$scenario(super::Kind::OneProcess) })*
        }
        mod across_processes {
            $(#[test] fn $scenario() { super::$scenario(super::Kind::Processes) })*
        }
    };
}

with_either_kind! {
    borders_are_kept_in_both_directions_at_once
    small_buffers_and_packets_keep_the_borders
    both_types_share_their_ports
    refusals_carry_the_type_and_the_address_that_was_dialled
    messages_that_are_switched_off_are_refused
    either_direction_ends_by_itself
    what_was_sent_before_a_close_arrives
    a_reset_within_a_message_delivers_no_part_of_it
    only_the_connection_that_is_not_read_waits
    a_message_waits_for_credit_for_all_of_it
    a_message_longer_than_the_siblings_window_ends_the_connection
    a_sibling_that_pauses_loses_nothing
    a_sibling_that_reboots_loses_its_connections
}

fn seqpacket(from: (u64, u32), to: (u64, u32)) -> Flow {
    Flow {
        kind: SEQPACKET,
        ..flow(from, to)
    }
}

fn setup(cid: u64) -> Setup {
    Setup {
        cid,
        ..Setup::default().with_messages()
    }
}

fn guest(vms: &Vms, setup: Setup) -> SimGuest {
    SimGuest::start_over(vms.vmm(setup.cid), setup)
}

/// One end of a connection, which gives credit for what is read and uses no more than it has.
struct End {
    guest: SimGuest,
    flow: Flow,
    sent: u32,
    /// The buffer of the other end, and what it has read of it.
    peer: (u32, u32),
    /// The packets of messages that are not sent yet.
    unsent: VecDeque<Packet>,
    /// The message that is coming.
    unfinished: Vec<u8>,
    received: Vec<Vec<u8>>,
}

impl End {
    fn new(guest: SimGuest, flow: Flow, answer: &Packet) -> Self {
        Self {
            guest,
            flow,
            sent: 0,
            peer: (answer.buf_alloc, answer.fwd_cnt),
            unsent: VecDeque::new(),
            unfinished: Vec::new(),
            received: Vec::new(),
        }
    }

    /// Means to send these messages, in packets of at most `most` bytes.
    fn queue(&mut self, messages: &[Vec<u8>], most: usize) {
        let packets = messages
            .iter()
            .flat_map(|message| self.flow.message(message, most));
        self.unsent = packets.collect();
    }

    /// Sends what credit allows, and takes what has come.
    fn turn(&mut self) {
        while let Some(mut packet) = self.unsent.pop_front() {
            let in_flight = self.sent.wrapping_sub(self.peer.1);
            if packet.len > self.peer.0 - in_flight {
                self.unsent.push_front(packet);
                break;
            }
            self.sent = self.sent.wrapping_add(packet.len);
            packet.fwd_cnt = self.flow.fwd_cnt;
            self.guest.send(&packet);
        }
        while let Some(packet) = self.guest.try_recv(Duration::from_millis(1)) {
            self.take(packet);
        }
    }

    fn take(&mut self, packet: Packet) {
        assert!(self.flow.owns(&packet), "{packet:?}");
        self.peer = (packet.buf_alloc, packet.fwd_cnt);
        if packet.is(Op::CreditRequest) {
            return self.guest.send(&self.flow.packet(Op::CreditUpdate));
        }
        if packet.is(Op::CreditUpdate) {
            return;
        }
        packet.assert_is(Op::Rw, &self.flow);
        self.unfinished.extend(&packet.payload);
        assert!(self.unfinished.len() <= self.flow.buf_alloc as usize);
        if packet.flags & EOM != 0 {
            let message = std::mem::take(&mut self.unfinished);
            self.flow.fwd_cnt = self.flow.fwd_cnt.wrapping_add(message.len() as u32);
            self.received.push(message);
            self.guest.send(&self.flow.packet(Op::CreditUpdate));
        }
    }
}

/// Both ends of a connection from guest 4 to guest 5.
struct Pair {
    vms: Vms,
    four: End,
    five: End,
}

impl Pair {
    fn new(kind: Kind) -> Self {
        Self::with(kind, setup(4), setup(5))
    }

    fn with(kind: Kind, of_four: Setup, of_five: Setup) -> Self {
        let vms = Vms::start(kind, &[4, 5]);
        let mut caller = seqpacket((4, CALLER), (5, PORT));
        let mut callee = seqpacket((5, PORT), (4, CALLER));
        (caller.buf_alloc, callee.buf_alloc) = (of_four.buf_alloc, of_five.buf_alloc);
        let (mut four, mut five) = (guest(&vms, of_four), guest(&vms, of_five));
        let [response, request] = open(&mut four, &mut five, &caller, &callee);
        Self {
            vms,
            four: End::new(four, caller, &response),
            five: End::new(five, callee, &request),
        }
    }

    /// Sends messages both ways at once until all have arrived.
    #[track_caller]
    fn exchange(&mut self, there: &[Vec<u8>], back: &[Vec<u8>], most: usize) {
        self.four.queue(there, most);
        self.five.queue(back, most);
        let deadline = Instant::now() + 2 * PATIENCE;
        while self.five.received.len() < there.len() || self.four.received.len() < back.len() {
            self.four.turn();
            self.five.turn();
            assert!(
                Instant::now() < deadline,
                "{} of {} messages, {} of {}",
                self.five.received.len(),
                there.len(),
                self.four.received.len(),
                back.len()
            );
        }
        assert_are(&self.five.received, there);
        assert_are(&self.four.received, back);
    }
}

#[track_caller]
fn assert_are(received: &[Vec<u8>], messages: &[Vec<u8>]) {
    let lens = |messages: &[Vec<u8>]| messages.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(lens(received), lens(messages));
    for (received, message) in received.iter().zip(messages) {
        assert_same(received, message);
    }
}

/// Opens a connection from one guest to the other, and returns the packets that open it: those which `four` and `five` get.
#[track_caller]
fn open(four: &mut SimGuest, five: &mut SimGuest, caller: &Flow, callee: &Flow) -> [Packet; 2] {
    four.send(&caller.packet(Op::Request));
    let request = five.recv();
    request.assert_is(Op::Request, callee);
    five.send(&callee.packet(Op::Response));
    let response = four.recv();
    response.assert_is(Op::Response, caller);
    [response, request]
}

#[track_caller]
fn assert_moves(four: &mut SimGuest, five: &mut SimGuest, caller: &Flow, callee: &Flow) {
    send(four, caller, b"there");
    assert_message(five, callee, b"there");
    send(five, callee, b"and back");
    assert_message(four, caller, b"and back");
}

fn send(guest: &mut SimGuest, flow: &Flow, message: &[u8]) {
    for packet in flow.message(message, PACKET) {
        guest.send(&packet);
    }
}

#[track_caller]
fn assert_refused(guest: &mut SimGuest, flow: &Flow) {
    guest.send(&flow.packet(Op::Request));
    guest.recv().assert_is(Op::Rst, flow);
}

/// Messages from one byte to all of the credit, in an order of their own.
fn messages(seed: u64, longest: usize) -> Vec<Vec<u8>> {
    let sizes = [
        1, 2, 43, 44, 1000, 3732, 3733, 4096, 16_385, 32_769, 65_536, 65_537, 200_000, 262_143,
        longest, 1, longest, longest, 3,
    ];
    let mut dice = Dice::new(seed);
    let more = (0..30).map(|_| 1 + dice.below(5000) as usize);
    let sizes = sizes.into_iter().chain(more.collect::<Vec<_>>());
    let mut numbered: Vec<_> = (0..).zip(sizes.filter(|size| *size <= longest)).collect();
    numbered.sort_by_cached_key(|_| dice.any());
    let bytes = numbered
        .into_iter()
        .map(|(number, size)| pattern(seed * 1000 + number, size));
    bytes.collect()
}

fn borders_are_kept_in_both_directions_at_once(kind: Kind) {
    let mut pair = Pair::new(kind);
    let (there, back) = (
        messages(1, BUF_ALLOC as usize),
        messages(2, BUF_ALLOC as usize),
    );
    pair.exchange(&there, &back, PACKET);
    pair.vms.assert_idle();
}

fn small_buffers_and_packets_keep_the_borders(kind: Kind) {
    let small = Setup {
        rx: vec![100],
        buf_alloc: 20_000,
        ..setup(5)
    };
    let mut pair = Pair::with(kind, setup(4), small);
    let (there, back) = (messages(3, 20_000), messages(4, 40_000));
    pair.exchange(&there, &back, 997);
}

fn both_types_share_their_ports(kind: Kind) {
    let Pair {
        vms: _vms,
        four: End {
            guest: mut four,
            flow: caller,
            ..
        },
        five: End {
            guest: mut five,
            flow: callee,
            ..
        },
    } = Pair::new(kind);
    let (stream, other) = (flow((4, CALLER), (5, PORT)), flow((5, PORT), (4, CALLER)));
    open(&mut four, &mut five, &stream, &other);
    for _ in 0..3 {
        four.send(&stream.rw(b"bytes "));
        send(&mut four, &caller, b"a message");
        // They come in any order.
        let mut got = [five.recv(), five.recv()];
        got.sort_by_key(|packet| packet.kind);
        got[0].assert_is(Op::Rw, &other);
        got[1].assert_is(Op::Rw, &callee);
        assert_eq!((&got[0].payload[..], got[0].flags), (&b"bytes "[..], 0));
        assert_eq!(
            (&got[1].payload[..], got[1].flags),
            (&b"a message"[..], EOM)
        );
    }
    // The end of one is not the other's.
    four.send(&stream.packet(Op::Rst));
    let end = recv_other(&mut five);
    end.assert_is(Op::Shutdown, &other);
    five.send(&other.packet(Op::Rst));
    assert_moves(&mut four, &mut five, &caller, &callee);
    open(&mut four, &mut five, &stream, &other);
    four.send(&caller.packet(Op::Rst));
    recv_other(&mut five).assert_is(Op::Shutdown, &callee);
    five.send(&callee.packet(Op::Rst));
    four.send(&stream.rw(b"still there"));
    assert_same(&recv_bytes(&mut five, &other, 11), b"still there");
}

fn refusals_carry_the_type_and_the_address_that_was_dialled(kind: Kind) {
    let vms = Vms::start(kind, &[4, 5]);
    let mut four = guest(&vms, setup(4));
    // No guest of this CID, or none that runs.
    for cid in [0, 1, 3, 4, 5, 6, u64::from(u32::MAX), u64::MAX] {
        assert_refused(&mut four, &seqpacket((4, CALLER), (cid, PORT)));
    }
    // The other guest's driver has streams alone.
    let (caller, callee) = (
        seqpacket((4, CALLER), (5, PORT)),
        seqpacket((5, PORT), (4, CALLER)),
    );
    let mut five = vms.guest(5);
    assert_refused(&mut four, &caller);
    assert_eq!(five.settle(), []);
    let (stream, other) = (flow((4, CALLER), (5, PORT)), flow((5, PORT), (4, CALLER)));
    open(&mut four, &mut five, &stream, &other);
    drop(five);
    recv_other(&mut four).assert_is(Op::Shutdown, &stream);
    four.send(&stream.packet(Op::Rst));
    // Nobody listens there, says the other guest.
    eventually("the VMM's end", || {
        std::os::unix::net::UnixStream::connect(vms.vhost_socket(5)).is_ok()
    });
    let mut five = guest(&vms, setup(5));
    four.send(&caller.packet(Op::Request));
    five.recv().assert_is(Op::Request, &callee);
    five.send(&callee.packet(Op::Rst));
    four.recv().assert_is(Op::Rst, &caller);
    open(&mut four, &mut five, &caller, &callee);
    assert_moves(&mut four, &mut five, &caller, &callee);
}

fn messages_that_are_switched_off_are_refused(kind: Kind) {
    let mut vms = Vms::none();
    let off = "seqpacket=off";
    match kind {
        Kind::OneProcess => vms.add_daemon(&[(4, String::new()), (5, off.into())]),
        Kind::Processes => {
            vms.add(4);
            let options = format!("{},{off}", vms.sibling_dir());
            vms.add_daemon(&[(5, options)]);
            assert!(!vms.directory().join("5.vsock_seqpacket").exists());
        }
    }
    let (mut four, mut five) = (guest(&vms, setup(4)), guest(&vms, setup(5)));
    assert_refused(&mut four, &seqpacket((4, CALLER), (5, PORT)));
    assert_refused(&mut five, &seqpacket((5, CALLER), (4, PORT)));
    assert_eq!((four.settle(), five.settle()), (vec![], vec![]));
    open(
        &mut four,
        &mut five,
        &flow((4, CALLER), (5, PORT)),
        &flow((5, PORT), (4, CALLER)),
    );
}

fn either_direction_ends_by_itself(kind: Kind) {
    let Pair {
        vms: _vms,
        four: End {
            guest: mut four,
            flow: caller,
            ..
        },
        five: End {
            guest: mut five,
            flow: callee,
            ..
        },
    } = Pair::new(kind);
    let message = pattern(1, 100_000);
    send(&mut four, &caller, &message);
    send(&mut four, &caller, b"last");
    four.send(&caller.shutdown(NO_SEND));
    assert_message(&mut five, &callee, &message);
    assert_message(&mut five, &callee, b"last");
    let end = recv_other(&mut five);
    end.assert_is(Op::Shutdown, &callee);
    assert_eq!(end.flags, NO_SEND);
    send(&mut five, &callee, &message);
    send(&mut five, &callee, b"answer");
    assert_message(&mut four, &caller, &message);
    assert_message(&mut four, &caller, b"answer");
    five.send(&callee.shutdown(NO_SEND | NO_RECEIVE));
    recv_other(&mut five).assert_is(Op::Rst, &callee);
    let end = recv_other(&mut four);
    end.assert_is(Op::Shutdown, &caller);
    assert_eq!(end.flags, NO_SEND | NO_RECEIVE);
    four.send(&caller.packet(Op::Rst));
    assert_eq!((four.settle(), five.settle()), (vec![], vec![]));
}

fn what_was_sent_before_a_close_arrives(kind: Kind) {
    let small = Setup {
        buf_alloc: 10_000,
        ..setup(5)
    };
    let Pair {
        vms,
        four: End {
            guest: mut four,
            flow: caller,
            ..
        },
        five:
            End {
                guest: mut five,
                flow: mut callee,
                ..
            },
    } = Pair::with(kind, setup(4), small);
    // As much as there is credit for, of which nobody reads anything.
    let messages: Vec<_> = (0..40).map(|seed| pattern(seed, 6500)).collect();
    for message in &messages {
        send(&mut four, &caller, message);
    }
    four.send(&caller.shutdown(NO_SEND | NO_RECEIVE));
    for message in &messages {
        let mut got = Vec::new();
        while got.len() < message.len() {
            let packet = recv_other(&mut five);
            if packet.is(Op::CreditRequest) {
                five.send(&callee.packet(Op::CreditUpdate));
                continue;
            }
            packet.assert_is(Op::Rw, &callee);
            got.extend(&packet.payload);
            assert_eq!(packet.flags == EOM, got.len() == message.len());
        }
        assert_same(&got, message);
        callee.fwd_cnt += message.len() as u32;
        five.send(&callee.packet(Op::CreditUpdate));
    }
    let end = recv_other(&mut five);
    end.assert_is(Op::Shutdown, &callee);
    assert_eq!(end.flags, NO_SEND | NO_RECEIVE);
    five.send(&callee.packet(Op::Rst));
    recv_other(&mut four).assert_is(Op::Rst, &caller);
    vms.assert_idle();
}

fn a_reset_within_a_message_delivers_no_part_of_it(kind: Kind) {
    for ends in [Op::Rst, Op::Shutdown] {
        let Pair {
            vms: _vms,
            four:
                End {
                    guest: mut four,
                    flow: caller,
                    ..
                },
            five:
                End {
                    guest: mut five,
                    flow: callee,
                    ..
                },
        } = Pair::new(kind);
        send(&mut four, &caller, b"whole");
        four.send(&caller.rw(b"half of a mess"));
        four.send(&match ends {
            Op::Rst => caller.packet(Op::Rst),
            _ => caller.shutdown(NO_SEND | NO_RECEIVE),
        });
        assert_message(&mut five, &callee, b"whole");
        let end = recv_other(&mut five);
        end.assert_is(Op::Shutdown, &callee);
        assert_eq!(end.flags, NO_SEND | NO_RECEIVE);
    }
}

/// Sends messages of this size until credit is over and stays so. Returns how many.
fn fill(guest: &mut SimGuest, flow: &Flow, size: usize) -> usize {
    let (mut count, mut idle) = (0, 0);
    while idle < 3 {
        guest.send(&flow.packet(Op::CreditRequest));
        let answers = [vec![guest.recv()], guest.settle()].concat();
        let update = answers.last().unwrap();
        update.assert_is(Op::CreditUpdate, flow);
        let in_flight = ((count * size) as u32).wrapping_sub(update.fwd_cnt);
        let more = (update.buf_alloc - in_flight) as usize / size;
        for number in count..count + more {
            send(guest, flow, &pattern(number as u64, size));
        }
        count += more;
        idle = if more == 0 { idle + 1 } else { 0 };
    }
    count
}

fn only_the_connection_that_is_not_read_waits(kind: Kind) {
    let small = Setup {
        buf_alloc: 20_000,
        ..setup(5)
    };
    let Pair {
        vms,
        four: End {
            guest: mut four,
            flow: caller,
            ..
        },
        five:
            End {
                guest: mut five,
                flow: mut callee,
                ..
            },
    } = Pair::with(kind, setup(4), small);
    let count = fill(&mut four, &caller, 7000);
    assert!(
        count * 7000 >= BUF_ALLOC as usize - 7000,
        "{count} messages"
    );
    // What it has credit for lies in its ring.
    let arrived = [
        recv_message(&mut five, &callee),
        recv_message(&mut five, &callee),
    ];
    for (number, message) in (0..).zip(&arrived) {
        assert_same(message, &pattern(number, 7000));
    }
    recv_other(&mut five).assert_is(Op::CreditRequest, &callee);
    vms.assert_idle();
    let (other, others) = (
        seqpacket((4, CALLER + 1), (5, PORT)),
        seqpacket((5, PORT), (4, CALLER + 1)),
    );
    open(&mut four, &mut five, &other, &others);
    for _ in 0..50 {
        assert_moves(&mut four, &mut five, &other, &others);
    }
    send(&mut five, &callee, b"the other direction");
    assert_message(&mut four, &caller, b"the other direction");
    callee.fwd_cnt += 2 * 7000;
    five.send(&callee.packet(Op::CreditUpdate));
    for number in 2..count {
        let mut packet = recv_other(&mut five);
        if packet.is(Op::CreditRequest) {
            packet = recv_other(&mut five);
        }
        let mut message = packet.payload;
        if packet.flags != EOM {
            message.extend(recv_message(&mut five, &callee));
        }
        assert_same(&message, &pattern(number as u64, 7000));
        callee.fwd_cnt += 7000;
        five.send(&callee.packet(Op::CreditUpdate));
    }
}

fn a_message_waits_for_credit_for_all_of_it(kind: Kind) {
    let small = Setup {
        buf_alloc: 10_000,
        ..setup(5)
    };
    let Pair {
        vms: _vms,
        four: End {
            guest: mut four,
            flow: caller,
            ..
        },
        five:
            End {
                guest: mut five,
                flow: mut callee,
                ..
            },
    } = Pair::with(kind, setup(4), small);
    let (first, second) = (pattern(1, 6000), pattern(2, 4500));
    send(&mut four, &caller, &first);
    send(&mut four, &caller, &second);
    assert_message(&mut five, &callee, &first);
    // Some bytes are missing, and so nothing of it comes.
    recv_other(&mut five).assert_is(Op::CreditRequest, &callee);
    assert_eq!(five.settle(), []);
    callee.fwd_cnt += 6000;
    five.send(&callee.packet(Op::CreditUpdate));
    assert_message(&mut five, &callee, &second);
}

fn a_message_longer_than_the_siblings_window_ends_the_connection(kind: Kind) {
    let small = Setup {
        buf_alloc: 10_000,
        ..setup(5)
    };
    let Pair {
        mut vms,
        four: End {
            guest: mut four,
            flow: caller,
            ..
        },
        five: End {
            guest: mut five,
            flow: callee,
            ..
        },
    } = Pair::with(kind, setup(4), small);
    let (other, others) = (
        seqpacket((4, CALLER + 1), (5, PORT)),
        seqpacket((5, PORT), (4, CALLER + 1)),
    );
    open(&mut four, &mut five, &other, &others);
    send(&mut four, &caller, b"fits");
    send(&mut four, &caller, &pattern(1, 10_001));
    assert_message(&mut five, &callee, b"fits");
    recv_other(&mut five).assert_is(Op::Rst, &callee);
    let end = recv_other(&mut four);
    end.assert_is(Op::Shutdown, &caller);
    assert_eq!(end.flags, NO_SEND | NO_RECEIVE);
    four.send(&caller.packet(Op::Rst));
    let about = "10001 bytes is longer than the guest's receive buffer of 10000";
    let daemon = vms.daemon(5);
    eventually("the log to name it", || daemon.log().contains(about));
    // Only that one.
    assert_moves(&mut four, &mut five, &other, &others);
    open(&mut four, &mut five, &caller, &callee);
    assert_moves(&mut four, &mut five, &caller, &callee);
}

fn a_sibling_that_pauses_loses_nothing(kind: Kind) {
    let Pair {
        vms: _vms,
        four: End {
            guest: mut four,
            flow: caller,
            ..
        },
        five: End {
            guest: mut five,
            flow: callee,
            ..
        },
    } = Pair::new(kind);
    five.send(&callee.rw(b"the beginning "));
    five.wait_tx_done();
    five.stop_rings();
    let long = pattern(1, 100_000);
    send(&mut four, &caller, &long);
    send(&mut four, &caller, b"short");
    assert!(
        four.settle()
            .iter()
            .all(|packet| packet.is(Op::CreditUpdate))
    );
    five.start_rings();
    assert_message(&mut five, &callee, &long);
    assert_message(&mut five, &callee, b"short");
    send(&mut five, &callee, b"and the end");
    assert_message(&mut four, &caller, b"the beginning and the end");
}

fn a_sibling_that_reboots_loses_its_connections(kind: Kind) {
    let Pair {
        vms: _vms,
        four: End {
            guest: mut four,
            flow: caller,
            ..
        },
        five: End {
            guest: mut five,
            flow: callee,
            ..
        },
    } = Pair::new(kind);
    send(&mut five, &callee, b"before");
    five.send(&callee.rw(b"half of"));
    five.wait_tx_done();
    five.stop_rings();
    five.restart_fresh();
    assert_message(&mut four, &caller, b"before");
    let end = recv_other(&mut four);
    end.assert_is(Op::Shutdown, &caller);
    assert_eq!(end.flags, NO_SEND | NO_RECEIVE);
    four.send(&caller.packet(Op::Rst));
    open(&mut four, &mut five, &caller, &callee);
    assert_moves(&mut four, &mut five, &caller, &callee);
}
