//! Messages: SOCK_SEQPACKET.

use std::os::fd::AsRawFd;

use nix::sys::socket::{Shutdown as Direction, shutdown};

use super::*;
use crate::common::sim::host::{assert_message, read_message, recv_message, write_message};
use crate::common::sim::packet::{BUF_ALLOC, SEQPACKET, STREAM};

/// How many connections of messages a daemon forwards at a time.
const MAX_RELAYS: usize = 128;

fn start(options: &[&str]) -> (Forwarding, SimGuest) {
    Forwarding::start_with(LOOPBACK, options, Setup::default().with_messages())
}

fn message_socket() -> Socket {
    assert_in_guest();
    Socket::new(Domain::VSOCK, Type::SEQPACKET, None).unwrap()
}

fn listen_for_messages(port: u32) -> Socket {
    let socket = message_socket();
    socket.bind(&SockAddr::vsock(u32::MAX, port)).unwrap();
    socket.listen(128).unwrap();
    socket
}

pub fn connect_for_messages(port: u32) -> UnixStream {
    let socket = message_socket();
    socket.connect(&SockAddr::vsock(LOOPBACK, port)).unwrap();
    stream(socket)
}

fn flow(guest_port: u32) -> Flow {
    Flow::seqpacket(guest_port, PORT)
}

#[track_caller]
fn open_messages(guest: &mut SimGuest, listener: &Socket, flow: &Flow) -> UnixStream {
    guest.send(&flow.packet(Op::Request));
    let program = accept(listener);
    guest.recv().assert_is(Op::Response, flow);
    program
}

fn send(guest: &mut SimGuest, flow: &Flow, message: &[u8]) {
    for packet in flow.message(message, 64 * 1024) {
        guest.send(&packet);
    }
}

#[track_caller]
fn assert_moves_messages(guest: &mut SimGuest, program: &UnixStream, flow: &mut Flow) {
    for size in [
        1,
        2,
        1000,
        4096,
        65_536,
        65_537,
        200_001,
        BUF_ALLOC as usize,
    ] {
        let message = pattern(size as u64, size);
        send(guest, flow, &message);
        assert_same(&read_message(program), &message);
        write_message(program, &message);
        assert_message(guest, flow, &message);
        flow.fwd_cnt = flow.fwd_cnt.wrapping_add(size as u32);
        guest.send(&flow.packet(Op::CreditUpdate));
    }
    for number in 0..100 {
        send(guest, flow, &pattern(number, 1 + 13 * number as usize));
    }
    for number in 0..100 {
        let message = pattern(number, 1 + 13 * number as usize);
        assert_same(&read_message(program), &message);
        write_message(program, &message);
    }
    for number in 0..100 {
        assert_message(guest, flow, &pattern(number, 1 + 13 * number as usize));
    }
}

#[test]
#[ignore = "runs in a guest"]
fn borders_are_kept_whoever_connects() {
    let (_daemon, mut guest) = start(&["--forward-listen=9001,seqpacket"]);
    let listener = listen_for_messages(PORT);
    let mut to_host = flow(40_000);
    let program = open_messages(&mut guest, &listener, &to_host);
    assert_moves_messages(&mut guest, &program, &mut to_host);

    let program = connect_for_messages(9001);
    write_message(&program, b"early");
    let request = guest.recv();
    let mut to_guest = Flow::of(&request);
    request.assert_is(Op::Request, &to_guest);
    assert_eq!((to_guest.kind, to_guest.guest_port), (SEQPACKET, 9001));
    guest.send(&to_guest.packet(Op::Response));
    assert_message(&mut guest, &to_guest, b"early");
    to_guest.fwd_cnt = 5;
    assert_moves_messages(&mut guest, &program, &mut to_guest);
}

#[test]
#[ignore = "runs in a guest"]
fn both_types_share_their_ports() {
    let (_daemon, mut guest) = start(&["--forward-listen=9001+9002,seqpacket"]);
    // The kernel gives a port to one socket, of whichever type. The guest may have both.
    let (listener, mut messages, bytes) = (
        listen_for_messages(PORT),
        flow(40_000),
        Flow::new(40_000, PORT),
    );
    let program = open_messages(&mut guest, &listener, &messages);
    drop(listener);
    let listener = listen(PORT);
    guest.send(&bytes.packet(Op::Request));
    let stream = accept(&listener);
    guest.recv().assert_is(Op::Response, &bytes);
    assert_moves_bytes(&mut guest, &stream, &bytes);
    assert_moves_messages(&mut guest, &program, &mut messages);
    for (port, kind, program) in [
        (9001, STREAM, connect(9001)),
        (9002, SEQPACKET, connect_for_messages(9002)),
    ] {
        let request = guest.recv();
        let flow = Flow::of(&request);
        assert_eq!((flow.kind, flow.guest_port), (kind, port));
        guest.send(&flow.packet(Op::Rst));
        assert_closed(&program);
    }
}

#[test]
#[ignore = "runs in a guest"]
fn refusals_carry_the_type_and_the_address_that_was_dialled() {
    let (daemon, mut guest) = start(&[]);
    let before = daemon.holds();
    let _streams = listen(PORT);
    for peer_cid in [2, 77] {
        for guest_port in 40_000..40_050 {
            let flow = Flow {
                peer_cid,
                ..flow(guest_port)
            };
            guest.send(&flow.packet(Op::Request));
            guest.recv().assert_is(Op::Rst, &flow);
        }
    }
    daemon.wait_until_it_holds(before);
}

#[test]
#[ignore = "runs in a guest"]
fn either_end_may_stop() {
    let (daemon, mut guest) = start(&[]);
    let before = daemon.holds();
    let listener = listen_for_messages(PORT);

    let to_host = flow(40_000);
    let program = open_messages(&mut guest, &listener, &to_host);
    write_message(&program, b"last");
    program.shutdown(Shutdown::Write).unwrap();
    assert_message(&mut guest, &to_host, b"last");
    assert_shutdown(&mut guest, &to_host, NO_SEND);
    send(&mut guest, &to_host, b"still open");
    assert_same(&read_message(&program), b"still open");
    guest.send(&to_host.shutdown(NO_SEND));
    assert_same(&read_message(&program), b"");
    assert_shutdown(&mut guest, &to_host, NO_SEND | NO_RECEIVE);
    guest.send(&to_host.packet(Op::Rst));

    let to_host = flow(40_001);
    let program = open_messages(&mut guest, &listener, &to_host);
    send(&mut guest, &to_host, b"last");
    guest.send(&to_host.rw(b"a message without end"));
    guest.send(&to_host.shutdown(NO_SEND));
    assert_same(&read_message(&program), b"last");
    assert_same(&read_message(&program), b"");
    write_message(&program, b"still open");
    assert_message(&mut guest, &to_host, b"still open");
    drop(program);
    assert_shutdown(&mut guest, &to_host, NO_SEND | NO_RECEIVE);
    guest.send(&to_host.packet(Op::Rst));

    let to_host = flow(40_002);
    let program = open_messages(&mut guest, &listener, &to_host);
    shutdown(program.as_raw_fd(), Direction::Read).unwrap();
    // It is seen when messages come.
    let mut seen = None;
    eventually("the guest to know", || {
        send(&mut guest, &to_host, b"lost");
        let mut packets = guest.settle().into_iter();
        seen = packets.find(|packet| !packet.is(Op::CreditUpdate));
        seen.is_some()
    });
    let seen = seen.unwrap();
    seen.assert_is(Op::Shutdown, &to_host);
    assert_eq!(seen.flags, NO_RECEIVE);
    write_message(&program, b"still open");
    assert_message(&mut guest, &to_host, b"still open");
    guest.send(&to_host.packet(Op::Rst));
    assert_closed(&program);
    drop(program);
    daemon.wait_until_it_holds(before);
}

#[test]
#[ignore = "runs in a guest"]
fn a_close_comes_behind_the_last_message() {
    let (daemon, mut guest) = start(&[]);
    let before = daemon.holds();
    let listener = listen_for_messages(PORT);
    let messages: Vec<_> = (0..4).map(|number| pattern(number, 60_001)).collect();

    let to_host = flow(40_000);
    let program = open_messages(&mut guest, &listener, &to_host);
    for message in &messages {
        write_message(&program, message);
    }
    drop(program);
    for message in &messages {
        assert_message(&mut guest, &to_host, message);
    }
    assert_shutdown(&mut guest, &to_host, NO_SEND | NO_RECEIVE);
    guest.send(&to_host.packet(Op::Rst));

    let to_host = flow(40_001);
    let program = open_messages(&mut guest, &listener, &to_host);
    for message in &messages {
        send(&mut guest, &to_host, message);
    }
    guest.send(&to_host.rw(b"a message without end"));
    guest.send(&to_host.shutdown(NO_SEND | NO_RECEIVE));
    recv_other(&mut guest).assert_is(Op::Rst, &to_host);
    for message in &messages {
        assert_same(&read_message(&program), message);
    }
    assert_closed(&program);
    drop(program);
    daemon.wait_until_it_holds(before);
}

/// The kernel takes as much of a message as there is room for, if the daemon lets it.
#[test]
#[ignore = "runs in a guest"]
fn a_program_that_reads_late_gets_whole_messages() {
    let (_daemon, mut guest) = start(&[]);
    let listener = listen_for_messages(PORT);
    let (late, mut fast) = (flow(40_000), flow(40_001));
    let program = open_messages(&mut guest, &listener, &late);
    let other = open_messages(&mut guest, &listener, &fast);
    let (size, mut sent) = (60_001, 0);
    let deadline = Instant::now() + PATIENCE;
    // As much as all on the way holds: the program's buffer, the pair, and ours.
    while sent < 12 {
        guest.send(&late.packet(Op::CreditRequest));
        let update = guest.recv();
        update.assert_is(Op::CreditUpdate, &late);
        if update.fwd_cnt as usize + BUF_ALLOC as usize >= (sent + 1) * size {
            send(&mut guest, &late, &pattern(sent as u64, size));
            sent += 1;
        }
        assert!(Instant::now() < deadline, "{sent} messages");
    }
    guest.settle();
    assert_moves_messages(&mut guest, &other, &mut fast);
    for number in 0..sent {
        assert_same(&read_message(&program), &pattern(number as u64, size));
    }
}

#[test]
#[ignore = "runs in a guest"]
fn a_message_longer_than_the_programs_buffer_ends_the_connection() {
    let (_daemon, mut guest) = start(&["--tx-buffer-size=524288"]);
    let listener = listen_for_messages(PORT);
    let to_host = flow(40_000);
    let program = open_messages(&mut guest, &listener, &to_host);
    send(&mut guest, &to_host, b"fits");
    // A program has a buffer of 256 KiB unless it wants another.
    send(&mut guest, &to_host, &pattern(1, 300_000));
    assert_same(&read_message(&program), b"fits");
    assert_closed(&program);
    assert_shutdown(&mut guest, &to_host, NO_SEND | NO_RECEIVE);
}

#[test]
#[ignore = "runs in a guest"]
fn there_are_so_many_and_no_more() {
    let (daemon, mut guest) = start(&["--forward-listen=9001,seqpacket"]);
    let before = daemon.holds();
    let listener = listen_for_messages(PORT);
    let mut programs = Vec::new();
    for number in 0..MAX_RELAYS {
        programs.push(open_messages(
            &mut guest,
            &listener,
            &flow(40_000 + number as u32),
        ));
    }
    let refused = flow(50_000);
    guest.send(&refused.packet(Op::Request));
    guest.recv().assert_is(Op::Rst, &refused);
    assert_closed(&connect_for_messages(9001));
    let mut last = flow(40_000 + MAX_RELAYS as u32 - 1);
    assert_moves_messages(&mut guest, &programs[MAX_RELAYS - 1], &mut last);
    // One that is closed with all delivered makes room, and so does one that its program closes.
    guest.send(&flow(40_000).packet(Op::Rst));
    assert_closed(&programs[0]);
    eventually("a place", || {
        guest.send(&refused.packet(Op::Request));
        recv_other(&mut guest).is(Op::Response)
    });
    programs.clear();
    for _ in 0..MAX_RELAYS - 1 {
        let end = recv_other(&mut guest);
        guest.send(&Flow::of(&end).packet(Op::Rst));
    }
    guest.send(&refused.packet(Op::Rst));
    drop(listener);
    daemon.wait_until_it_holds(before);
}

#[test]
#[ignore = "runs in a guest"]
fn a_message_that_comes_in_pieces_is_one() {
    let (_daemon, mut guest) = start(&[]);
    let listener = listen_for_messages(PORT);
    let to_host = flow(40_000);
    let program = open_messages(&mut guest, &listener, &to_host);
    let message = pattern(9, 5000);
    for packet in to_host.message(&message, 100) {
        guest.send(&packet);
    }
    assert_same(&read_message(&program), &message);
    write_message(&program, &message);
    assert_same(&recv_message(&mut guest, &to_host), &message);
}
