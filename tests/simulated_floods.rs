//! A guest that sends what no driver sends, in any order and as much as it can: each packet is answered or dropped, and
//! the daemon's memory stays within its documented limits.

mod common;

use std::io::Write;
use std::os::unix::net::UnixStream;

use common::sim::host::{FLOW, PORT, assert_moves_bytes, connect, fill, from_guest, listen};
use common::sim::survivor::SLACK_KIB;
use common::sim::{Dice, Flow, Op, Packet, Setup, SimGuest, Survivor};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// A random packet, mostly close to a valid one.
fn any_packet(dice: &mut Dice) -> Packet {
    let flow = Flow {
        buf_alloc: dice.one_of(&[262_144, 262_144, 0, 1, 5000, u32::MAX]),
        fwd_cnt: dice.one_of(&[0, 0, 1, 1 << 31, u32::MAX]),
        ..Flow::new(1 + dice.below(4) as u32, PORT + dice.below(2) as u32)
    };
    let payload = vec![7; dice.one_of(&[0, 0, 1, 100, 5000])];
    let mut packet = flow.rw(&payload);
    packet.op = dice.below(9) as u16;
    packet.flags = dice.one_of(&[0, 1, 2, 3, 3, 4, u32::MAX]);
    match dice.below(40) {
        0 => packet.src_cid = dice.one_of(&[0, 2, 5, 1 << 32 | 4, u64::MAX]),
        1 => packet.dst_cid = dice.one_of(&[0, 1, 3, 4, 1 << 32 | 2, u64::MAX]),
        2 => packet.kind = dice.one_of(&[0, 2, 3, u16::MAX]),
        3 => packet.op = dice.any() as u16,
        4 => packet.src_port = dice.one_of(&[0, 22, u32::MAX]),
        5 => packet.dst_port = dice.one_of(&[0, 22, u32::MAX]),
        6 => packet.len = dice.any() as u32,
        _ => {}
    }
    packet
}

/// A host program in a random state.
fn any_client(daemon: &Survivor, dice: &mut Dice, clients: &mut Vec<UnixStream>) {
    if clients.len() > 8 {
        clients.remove(dice.below(8) as usize);
    }
    let mut client = connect(&daemon.uds_path());
    let line: &[u8] = dice.one_of(&[
        &b"CONNECT 1\n"[..],
        b"CONNECT 2\nbytes",
        b"CONN",
        b"CONNECT x\n",
    ]);
    client.write_all(line).unwrap();
    clients.push(client);
}

#[test]
fn any_packet_in_any_state() {
    let daemon = Survivor::start();
    for seed in 0..8 {
        let mut dice = Dice::new(seed);
        let mut guest = SimGuest::start(&daemon, Setup::default());
        let listener = listen(&daemon, PORT);
        listener.set_nonblocking(true).unwrap();
        let (mut clients, mut programs) = (Vec::new(), Vec::new());
        for step in 0..4000 {
            let packet = any_packet(&mut dice);
            guest.send(&packet);
            // A connection that the daemon asked for is answered by chance, with its own ports.
            while let Some(packet) = guest.poll_packet() {
                if packet.is(Op::Request) && dice.below(3) > 0 {
                    guest.send(&Flow::of(&packet).packet(Op::Response));
                }
            }
            if step % 20 == 0 {
                any_client(&daemon, &mut dice, &mut clients);
            }
            if let Ok((program, _)) = listener.accept() {
                programs.push(program);
            }
            if programs.len() > 4 {
                programs.remove(dice.below(4) as usize);
            }
        }
    }
    daemon.assert_unharmed();
}

/// Floods the daemon, with a connection whose host program doesn't read, and measures what that has cost.
#[track_caller]
fn assert_bounded(limit_kib: u64, packet: impl Fn(u32) -> Packet) {
    for with_buffers in [true, false] {
        let daemon = Survivor::start();
        let mut guest = SimGuest::start(&daemon, Setup::default());
        let stream = from_guest(&daemon, &mut guest, &FLOW);
        let other = Flow::new(FLOW.guest_port + 1, PORT + 1);
        let unharmed = from_guest(&daemon, &mut guest, &other);
        guest.auto_repost = with_buffers;
        if !with_buffers {
            // Buffers offered before are used first.
            (0..200).for_each(|port| guest.send(&Flow::new(port, 9).packet(Op::Request)));
        }
        // Keeping all answers would exceed the limits by far.
        for number in 0..if with_buffers { 20_000 } else { 150_000 } {
            guest.send(&packet(number));
            while with_buffers && guest.poll_packet().is_some() {}
        }
        guest.wait_tx_done();
        let growth = daemon.growth_kib();
        assert!(
            growth <= limit_kib + SLACK_KIB,
            "{growth} KiB, with buffers: {with_buffers}"
        );
        guest.auto_repost = true;
        while guest.poll_packet().is_some() {}
        guest.post_rx();
        guest.settle();
        assert_moves_bytes(&mut guest, &unharmed, &other);
        drop((guest, stream));
        daemon.assert_unharmed();
    }
}

/// 1,024 resets of one header each, and the queue that holds them.
const RESETS_KIB: u64 = 128;
/// The bytes that one connection may keep for its host program.
const BUFFER_KIB: u64 = 256;

#[test]
fn requests_to_nobody() {
    assert_bounded(RESETS_KIB, |port| {
        Flow::new(port, PORT + 2).packet(Op::Request)
    });
}

#[test]
fn packets_that_provoke_resets() {
    let ops = [
        Op::Response,
        Op::Shutdown,
        Op::Rw,
        Op::CreditUpdate,
        Op::CreditRequest,
    ];
    assert_bounded(RESETS_KIB, |port| {
        Flow::new(port, PORT + 2).packet(ops[port as usize % ops.len()])
    });
}

#[test]
fn unknown_ops_and_types() {
    assert_bounded(RESETS_KIB, |port| Packet {
        op: 8 + (port % 100) as u16,
        kind: 1 + (port % 3) as u16,
        ..Flow::new(port, PORT).packet(Op::Rw)
    });
}

#[test]
fn packets_of_other_cids() {
    assert_bounded(RESETS_KIB, |number| Packet {
        src_cid: 5 + u64::from(number),
        ..FLOW.packet(Op::Request)
    });
}

#[test]
fn single_bytes_that_nobody_reads() {
    assert_bounded(RESETS_KIB + BUFFER_KIB, |_| FLOW.rw(b"1"));
}

#[test]
fn bytes_past_the_credit() {
    assert_bounded(RESETS_KIB + BUFFER_KIB, |_| FLOW.rw(&[1; 1000]));
}

#[test]
fn packets_without_a_byte() {
    assert_bounded(RESETS_KIB, |_| FLOW.rw(b""));
}

#[test]
fn credit_requests_and_updates() {
    assert_bounded(RESETS_KIB, |number| {
        let op = if number % 2 == 0 {
            Op::CreditRequest
        } else {
            Op::CreditUpdate
        };
        Flow {
            fwd_cnt: number,
            buf_alloc: number,
            ..FLOW
        }
        .packet(op)
    });
}

#[test]
fn responses_and_shutdowns_again_and_again() {
    assert_bounded(RESETS_KIB, |number| match number % 3 {
        0 => FLOW.packet(Op::Response),
        1 => FLOW.shutdown(2),
        _ => FLOW.shutdown(1 << 31),
    });
}

#[test]
fn more_connections_than_there_may_be() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(65_536), hard).unwrap();
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let listener = listen(&daemon, PORT);
    let mut refused = 0;
    let mut programs = Vec::new();
    for port in 0..3000 {
        let flow = Flow::new(port, PORT);
        guest.send(&flow.packet(Op::Request));
        let answer = guest.recv();
        refused += u32::from(answer.is(Op::Rst));
        if answer.is(Op::Response) {
            programs.push(listener.accept().unwrap());
        }
    }
    assert_eq!((programs.len(), refused), (1024, 3000 - 1024));
    let growth = daemon.growth_kib();
    assert!(
        growth <= 1024 + SLACK_KIB,
        "{growth} KiB for 1024 connections"
    );
    drop((guest, programs));
    daemon.assert_unharmed();
}

#[test]
fn full_buffers_on_all_connections_take_what_is_documented() {
    let daemon = Survivor::start_with(&["--max-connections=8", "--tx-buffer-size=1000000"]);
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let flows: Vec<_> = (1..=8).map(|port| Flow::new(port, PORT)).collect();
    let mut unread = Vec::new();
    for flow in &flows {
        unread.push(from_guest(&daemon, &mut guest, flow));
        fill(&mut guest, flow);
    }
    let growth = daemon.growth_kib();
    assert!(growth >= 7 * 900, "{growth} KiB: the buffers are not full");
    assert!(growth <= 8 * 1001 + SLACK_KIB, "{growth} KiB");
    drop((guest, unread));
    daemon.assert_unharmed();
}
