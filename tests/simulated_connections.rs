//! The daemon's response to every packet of the guest and every action of a host program.

mod common;

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use common::daemon::{Daemon, eventually};
use common::sim::host::{
    FLOW, PORT, accept, assert_closed, assert_moves_bytes, assert_same, assert_serves, connect,
    device, dial, fill, fill_behind, from_guest, from_host, listen, pattern, read_exactly, read_ok,
    read_to_end, recv_bytes, recv_other,
};
use common::sim::packet::{HOST_CID, NO_RECEIVE, NO_SEND, STREAM};
use common::sim::survivor::SLACK_KIB;
use common::sim::{Flow, Op, Packet, Setup, SimGuest};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, listen as listen_on,
    send, socket,
};

/// A device with one connection that the guest has made.
fn connected() -> (Daemon, SimGuest, UnixStream) {
    let (daemon, mut guest) = device();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    (daemon, guest, stream)
}

/// Panics if any packet but CREDIT_UPDATE is pending for the guest.
#[track_caller]
fn assert_quiet(guest: &mut SimGuest) {
    let packets = guest.settle();
    let others: Vec<_> = packets
        .iter()
        .filter(|packet| !packet.is(Op::CreditUpdate))
        .collect();
    assert!(others.is_empty(), "{others:?}");
}

#[track_caller]
fn assert_refused(guest: &mut SimGuest, flow: &Flow) {
    guest.send(&flow.packet(Op::Request));
    guest.recv().assert_is(Op::Rst, flow);
}

// --- The guest connects.

#[test]
fn a_request_to_nobody_is_refused() {
    let (_daemon, mut guest) = device();
    for guest_port in 1..50 {
        assert_refused(&mut guest, &Flow::new(guest_port, PORT));
    }
    assert_quiet(&mut guest);
}

#[test]
fn a_request_to_a_dead_socket_or_a_file_is_refused() {
    let (daemon, mut guest) = device();
    drop(listen(&daemon, PORT));
    // A process forked by another test also holds it, until its exec.
    eventually("the socket is dead", || {
        UnixStream::connect(daemon.host_port_path(PORT)).is_err()
    });
    assert_refused(&mut guest, &FLOW);
    std::fs::write(daemon.host_port_path(77), "no socket").unwrap();
    assert_refused(&mut guest, &Flow::new(1, 77));
    assert_quiet(&mut guest);
}

#[test]
fn a_full_backlog_refuses_and_blocks_nobody() {
    let (daemon, mut guest) = device();
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    bind(
        fd.as_raw_fd(),
        &UnixAddr::new(&daemon.host_port_path(PORT)).unwrap(),
    )
    .unwrap();
    listen_on(&fd, Backlog::new(0).unwrap()).unwrap();
    let listener = std::os::unix::net::UnixListener::from(fd);
    let mut admitted = Vec::new();
    let refused = (1..10).map(|port| Flow::new(port, PORT)).find(|flow| {
        guest.send(&flow.packet(Op::Request));
        let answer = guest.recv();
        assert!(flow.owns(&answer));
        admitted.push(flow.clone());
        answer.is(Op::Rst)
    });
    let refused = refused.expect("a backlog of 0 took nine connections");
    assert_serves(&daemon, &mut guest);
    drop(accept(&listener));
    guest.recv().assert_is(Op::Shutdown, &admitted[0]);
    guest.send(&admitted[0].packet(Op::Rst));
    guest.send(&refused.packet(Op::Request));
    guest.recv().assert_is(Op::Response, &refused);
}

#[test]
fn beyond_the_connection_limit_requests_are_refused() {
    let daemon = Daemon::start_with(&["--max-connections", "3"]);
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let listener = listen(&daemon, PORT);
    let flows: Vec<_> = (1..=3).map(|port| Flow::new(port, PORT)).collect();
    let mut streams = Vec::new();
    for flow in &flows {
        guest.send(&flow.packet(Op::Request));
        guest.recv().assert_is(Op::Response, flow);
        streams.push(accept(&listener));
    }
    assert_refused(&mut guest, &Flow::new(4, PORT));
    guest.send(&flows[1].packet(Op::Rst));
    assert_closed(&streams[1]);
    guest.send(&Flow::new(4, PORT).packet(Op::Request));
    guest.recv().assert_is(Op::Response, &Flow::new(4, PORT));
}

#[test]
fn a_response_advertises_the_daemons_buffer() {
    for (options, buf_alloc) in [
        (&[][..], 262_144),
        (&["--tx-buffer-size", "65536"][..], 65_536),
    ] {
        let daemon = Daemon::start_with(options);
        let mut guest = SimGuest::start(&daemon, Setup::default());
        let _listener = listen(&daemon, PORT);
        guest.send(&FLOW.packet(Op::Request));
        let response = guest.recv();
        response.assert_is(Op::Response, &FLOW);
        assert_eq!((response.buf_alloc, response.fwd_cnt), (buf_alloc, 0));
    }
}

#[test]
fn a_second_request_for_the_same_ports_ends_both() {
    let (daemon, mut guest, mut stream) = connected();
    for _ in 0..3 {
        assert_refused(&mut guest, &FLOW);
        assert_closed(&stream);
        assert_quiet(&mut guest);
        std::fs::remove_file(daemon.host_port_path(PORT)).unwrap();
        stream = from_guest(&daemon, &mut guest, &FLOW);
        assert_moves_bytes(&mut guest, &stream, &FLOW);
    }
}

#[test]
fn a_request_for_the_ports_of_a_host_made_connection_ends_both() {
    let (daemon, mut guest) = device();
    let (stream, flow, _) = from_host(&daemon, &mut guest, PORT);
    let _listener = listen(&daemon, flow.host_port);
    assert_refused(&mut guest, &flow);
    assert_closed(&stream);
    guest.send(&flow.packet(Op::Request));
    guest.recv().assert_is(Op::Response, &flow);
}

#[test]
fn a_listener_that_closes_what_it_accepts() {
    let (daemon, mut guest) = device();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    drop(stream);
    let shutdown = guest.recv();
    shutdown.assert_is(Op::Shutdown, &FLOW);
    assert_eq!(shutdown.flags, NO_RECEIVE | NO_SEND);
}

// --- Unexpected packets.

#[test]
fn an_unexpected_response_is_ignored() {
    let (_daemon, mut guest, stream) = connected();
    guest.send(&FLOW.packet(Op::Response));
    assert_quiet(&mut guest);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
}

#[test]
fn a_second_response_is_ignored() {
    let (daemon, mut guest) = device();
    let (stream, flow, _) = from_host(&daemon, &mut guest, PORT);
    guest.send(&flow.packet(Op::Response));
    assert_quiet(&mut guest);
    assert_moves_bytes(&mut guest, &stream, &flow);
}

#[test]
fn packets_for_no_connection_are_answered_with_rst() {
    let (_daemon, mut guest) = device();
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        guest.send(&FLOW.packet(op));
        guest.recv().assert_is(Op::Rst, &FLOW);
    }
    guest.send(&FLOW.rw(b"nobody"));
    guest.recv().assert_is(Op::Rst, &FLOW);
    assert_quiet(&mut guest);
}

#[test]
fn an_rst_is_never_answered() {
    let (_daemon, mut guest, stream) = connected();
    guest.send(&Flow::new(9, 9).packet(Op::Rst));
    assert_quiet(&mut guest);
    for _ in 0..3 {
        guest.send(&FLOW.packet(Op::Rst));
    }
    assert_closed(&stream);
    assert_quiet(&mut guest);
    for kind in [0, 2, 3, 0xffff] {
        let packet = Packet {
            kind,
            ..FLOW.packet(Op::Rst)
        };
        guest.send(&packet);
    }
    assert_quiet(&mut guest);
}

#[test]
fn unknown_types_are_answered_with_rst_of_the_same_type() {
    let (daemon, mut guest, stream) = connected();
    let _listener = listen(&daemon, 99);
    for kind in [0, 3, 7, 0xffff] {
        for op in [Op::Request, Op::Rw, Op::Shutdown] {
            let flow = Flow {
                kind,
                ..Flow::new(99, 99)
            };
            guest.send(&flow.packet(op));
            guest.recv().assert_is(Op::Rst, &flow);
        }
    }
    assert_moves_bytes(&mut guest, &stream, &FLOW);
}

#[test]
fn unknown_ops_are_answered_with_rst() {
    let (daemon, mut guest) = device();
    for op in [0, 8, 100, 0xffff] {
        let packet = Packet {
            op,
            ..FLOW.packet(Op::Rst)
        };
        guest.send(&packet);
        guest.recv().assert_is(Op::Rst, &FLOW);
    }
    let _stream = from_guest(&daemon, &mut guest, &FLOW);
    let packet = Packet {
        op: 77,
        ..FLOW.packet(Op::Rst)
    };
    guest.send(&packet);
    guest.recv().assert_is(Op::Rst, &FLOW);
    assert_serves(&daemon, &mut guest);
}

#[test]
fn a_wrong_source_is_dropped() {
    let (_daemon, mut guest, stream) = connected();
    for src_cid in [0, 1, 2, 5, u64::MAX, 1 << 32 | 4] {
        for op in [Op::Request, Op::Rw, Op::Rst, Op::Shutdown] {
            let packet = Packet {
                src_cid,
                flags: 3,
                ..FLOW.packet(op)
            };
            guest.send(&packet);
        }
    }
    assert_quiet(&mut guest);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
}

#[test]
fn a_destination_nobody_serves_is_answered_with_rst() {
    let (_daemon, mut guest, stream) = connected();
    for dst_cid in [0, 1, 3, 4, 5, u64::MAX, 1 << 32 | HOST_CID] {
        for op in [Op::Request, Op::Rw, Op::Shutdown] {
            let flow = Flow {
                peer_cid: dst_cid,
                ..FLOW
            };
            guest.send(&flow.packet(op));
            // With another address, the guest would not know this answer.
            guest.recv().assert_is(Op::Rst, &flow);
        }
        let packet = Packet {
            dst_cid,
            ..FLOW.packet(Op::Rst)
        };
        guest.send(&packet);
    }
    assert_quiet(&mut guest);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
}

// --- Credit.

#[test]
fn a_credit_request_is_answered() {
    let (_daemon, mut guest, stream) = connected();
    guest.send(&FLOW.rw(&[1; 1000]));
    read_exactly(&stream, 1000);
    for _ in 0..3 {
        guest.send(&FLOW.packet(Op::CreditRequest));
        let update = guest.recv();
        update.assert_is(Op::CreditUpdate, &FLOW);
        assert_eq!((update.buf_alloc, update.fwd_cnt), (262_144, 1000));
    }
    assert!(guest.settle().is_empty());
}

#[test]
fn no_credit_update_is_sent_without_need() {
    let (_daemon, mut guest, stream) = connected();
    for _ in 0..100 {
        guest.send(&FLOW.rw(&[1; 1000]));
        read_exactly(&stream, 1000);
    }
    let packets = guest.settle();
    assert!(
        packets.is_empty(),
        "{} packets after 100 kB of 256 KiB",
        packets.len()
    );
}

#[test]
fn a_credit_update_is_sent_before_a_capped_guest_runs_out() {
    let (_daemon, mut guest, stream) = connected();
    let flow = Flow {
        buf_alloc: 8192,
        ..FLOW
    };
    // Newer guests keep no more in flight than their own buffer: half of that is the threshold.
    for _ in 0..20 {
        guest.send(&flow.rw(&[1; 8192]));
        read_exactly(&stream, 8192);
        guest.recv().assert_is(Op::CreditUpdate, &flow);
    }
}

#[test]
fn bytes_past_the_credit_end_the_connection() {
    let (daemon, mut guest, stream) = connected();
    fill(&mut guest, &FLOW);
    guest.send(&FLOW.rw(&[0]));
    recv_other(&mut guest).assert_is(Op::Rst, &FLOW);
    let mut rest = Vec::new();
    let _ = (&stream).read_to_end(&mut rest);
    assert_serves(&daemon, &mut guest);
}

#[test]
fn a_guest_that_ignores_credit_can_not_grow_the_daemon() {
    let (daemon, mut guest) = device();
    let _listener = listen(&daemon, PORT);
    let before = daemon.anonymous_kib();
    for port in 1..=20 {
        let flow = Flow::new(port, PORT);
        guest.send(&flow.packet(Op::Request));
        for _ in 0..64 {
            guest.send(&flow.rw(&[1; 65_536]));
        }
        guest.wait_tx_done();
    }
    assert!(guest.settle().iter().any(|packet| packet.is(Op::Rst)));
    let grown = daemon.anonymous_kib().saturating_sub(before);
    assert!(grown <= 20 * 256 + SLACK_KIB, "{grown} KiB");
}

#[test]
fn an_unread_connection_stops_alone() {
    let (daemon, mut guest, stream) = connected();
    let sent = fill(&mut guest, &FLOW);
    assert!(sent.len() >= 262_144);
    assert_serves(&daemon, &mut guest);
    assert_same(&read_exactly(&stream, sent.len()), &sent);
    // Credit is updated once the host has read.
    recv_update(&mut guest, sent.len() as u32);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
}

#[track_caller]
fn recv_update(guest: &mut SimGuest, fwd_cnt: u32) {
    guest.send(&FLOW.packet(Op::CreditRequest));
    loop {
        let update = guest.recv();
        update.assert_is(Op::CreditUpdate, &FLOW);
        if update.fwd_cnt == fwd_cnt {
            return;
        }
    }
}

#[test]
fn the_guests_credit_is_never_exceeded() {
    let (daemon, mut guest) = device();
    let mut flow = Flow {
        buf_alloc: 1000,
        ..FLOW
    };
    let stream = from_guest(&daemon, &mut guest, &flow);
    let wanted = pattern(1, 10_000);
    (&stream).write_all(&wanted).unwrap();
    for round in 0..10 {
        let got = recv_exhausting(&mut guest, &flow);
        assert_same(&got, &wanted[round * 1000..(round + 1) * 1000]);
        flow.fwd_cnt += 1000;
        guest.send(&flow.packet(Op::CreditUpdate));
    }
    assert_quiet(&mut guest);
}

/// Receives until the credit is used up: the bytes, and at most one CREDIT_REQUEST.
#[track_caller]
fn recv_exhausting(guest: &mut SimGuest, flow: &Flow) -> Vec<u8> {
    let (mut got, mut asked) = (Vec::new(), 0);
    let mut take = |packet: Packet| match packet.is(Op::CreditRequest) {
        true => asked += 1,
        false => {
            packet.assert_is(Op::Rw, flow);
            got.extend(packet.payload);
        }
    };
    let first = guest.recv();
    take(first);
    // Give a faulty daemon the time to send more.
    guest.settle().into_iter().for_each(&mut take);
    guest.settle().into_iter().for_each(&mut take);
    assert!(asked <= 1, "{asked} CREDIT_REQUESTs for one lack of credit");
    got
}

#[test]
fn out_of_credit_the_daemon_asks_once() {
    let (daemon, mut guest) = device();
    let flow = Flow {
        buf_alloc: 1000,
        ..FLOW
    };
    let stream = from_guest(&daemon, &mut guest, &flow);
    (&stream).write_all(&[3; 5000]).unwrap();
    let mut packets = vec![guest.recv()];
    while !packets.iter().any(|packet| packet.is(Op::CreditRequest)) {
        packets.push(guest.recv());
    }
    packets.extend(guest.settle());
    packets.extend(guest.settle());
    let asked = packets
        .iter()
        .filter(|packet| packet.is(Op::CreditRequest))
        .count();
    let bytes: u32 = packets.iter().map(|packet| packet.len).sum();
    assert_eq!((asked, bytes), (1, 1000));
}

#[test]
fn shrinking_buffers_and_lies_count_as_no_credit() {
    let (daemon, mut guest) = device();
    let mut flow = Flow {
        buf_alloc: 1000,
        ..FLOW
    };
    let stream = from_guest(&daemon, &mut guest, &flow);
    (&stream).write_all(&pattern(1, 3000)).unwrap();
    assert_same(&recv_exhausting(&mut guest, &flow), &pattern(1, 1000));
    for (buf_alloc, fwd_cnt) in [
        (10, 0),
        (0, 0),
        (999, 0),
        (1000, 6000),
        (u32::MAX / 2, 0x8000_0000),
        (500, 500),
    ] {
        let lie = Flow {
            buf_alloc,
            fwd_cnt,
            ..flow.clone()
        };
        guest.send(&lie.packet(Op::CreditUpdate));
        let packets = guest.settle();
        assert!(
            !packets.iter().any(|packet| packet.is(Op::Rw)),
            "bytes at buf_alloc {buf_alloc}, fwd_cnt {fwd_cnt}"
        );
    }
    flow.fwd_cnt = 1000;
    flow.buf_alloc = 2000;
    guest.send(&flow.packet(Op::CreditUpdate));
    let got = recv_skipping_credit(&mut guest, &flow, 2000);
    assert_same(&got, &pattern(1, 3000)[1000..]);
}

/// As `recv_bytes`, with CREDIT_REQUESTs allowed.
#[track_caller]
fn recv_skipping_credit(guest: &mut SimGuest, flow: &Flow, len: usize) -> Vec<u8> {
    let mut got = Vec::new();
    while got.len() < len {
        let packet = recv_other(guest);
        if !packet.is(Op::CreditRequest) {
            packet.assert_is(Op::Rw, flow);
            got.extend(packet.payload);
        }
    }
    got
}

// --- The guest ends a direction, or all.

#[test]
fn no_more_from_the_guest_is_an_end_for_the_host_alone() {
    let (_daemon, mut guest, stream) = connected();
    let sent = fill(&mut guest, &FLOW);
    guest.send(&FLOW.shutdown(NO_SEND));
    assert_same(&read_to_end(&stream), &sent);
    (&stream).write_all(b"still open").unwrap();
    assert_same(&recv_bytes(&mut guest, &FLOW, 10), b"still open");
    drop(stream);
    let last = recv_other(&mut guest);
    last.assert_is(Op::Shutdown, &FLOW);
    assert_eq!(last.flags, NO_RECEIVE | NO_SEND);
}

#[test]
fn a_guest_that_will_not_receive_breaks_the_hosts_pipe() {
    let (_daemon, mut guest, stream) = connected();
    guest.send(&FLOW.shutdown(NO_RECEIVE));
    eventually("writes fail", || {
        (&stream)
            .write(b"x")
            .is_err_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    });
    guest.send(&FLOW.rw(b"the other way"));
    assert_same(&read_exactly(&stream, 13), b"the other way");
}

#[test]
fn shutdowns_accumulate() {
    for flags in [[NO_RECEIVE, NO_SEND], [NO_SEND, NO_RECEIVE]] {
        let (daemon, mut guest, stream) = connected();
        let sent = pattern(1, 50_000);
        guest.send(&FLOW.rw(&sent));
        guest.send(&FLOW.shutdown(flags[0]));
        assert_quiet(&mut guest);
        guest.send(&FLOW.shutdown(flags[1]));
        assert_same(&read_to_end(&stream), &sent);
        recv_other(&mut guest).assert_is(Op::Rst, &FLOW);
        assert_quiet(&mut guest);
        assert_serves(&daemon, &mut guest);
    }
}

#[test]
fn a_close_is_confirmed_after_the_host_has_all() {
    let (_daemon, mut guest, stream) = connected();
    let sent = fill(&mut guest, &FLOW);
    guest.send(&FLOW.shutdown(NO_RECEIVE | NO_SEND));
    assert_quiet(&mut guest);
    assert_same(&read_to_end(&stream), &sent);
    recv_other(&mut guest).assert_is(Op::Rst, &FLOW);
    assert_quiet(&mut guest);
}

#[test]
fn a_close_without_data_is_confirmed_at_once() {
    let (_daemon, mut guest, stream) = connected();
    guest.send(&FLOW.shutdown(NO_RECEIVE | NO_SEND));
    guest.recv().assert_is(Op::Rst, &FLOW);
    assert_closed(&stream);
    assert_quiet(&mut guest);
}

#[test]
fn a_host_that_leaves_during_the_flush_is_confirmed() {
    let (daemon, mut guest, stream) = connected();
    fill(&mut guest, &FLOW);
    guest.send(&FLOW.shutdown(NO_RECEIVE | NO_SEND));
    assert_quiet(&mut guest);
    drop(stream);
    recv_other(&mut guest).assert_is(Op::Rst, &FLOW);
    assert_quiet(&mut guest);
    assert_serves(&daemon, &mut guest);
}

#[test]
fn an_rst_aborts_at_once() {
    let (_daemon, mut guest, stream) = connected();
    let sent = fill(&mut guest, &FLOW);
    guest.send(&FLOW.packet(Op::Rst));
    assert_quiet(&mut guest);
    let mut got = Vec::new();
    let _ = (&stream).read_to_end(&mut got);
    assert!(got.len() < sent.len(), "an abort was treated as a close");
    assert_same(&got, &sent[..got.len()]);
}

#[test]
fn an_rst_after_a_shutdown_of_one_way_aborts() {
    for flags in [NO_RECEIVE, NO_SEND] {
        let (_daemon, mut guest, stream) = connected();
        let sent = fill(&mut guest, &FLOW);
        guest.send(&FLOW.shutdown(flags));
        guest.send(&FLOW.packet(Op::Rst));
        assert_quiet(&mut guest);
        let mut got = Vec::new();
        let _ = (&stream).read_to_end(&mut got);
        assert!(got.len() < sent.len(), "an abort was treated as a close");
    }
}

#[test]
fn an_rst_after_a_close_keeps_the_bytes_and_frees_the_ports() {
    let (daemon, mut guest, stream) = connected();
    let sent = fill(&mut guest, &FLOW);
    guest.send(&FLOW.shutdown(NO_RECEIVE | NO_SEND));
    guest.send(&FLOW.packet(Op::Rst));
    assert_quiet(&mut guest);
    std::fs::remove_file(daemon.host_port_path(PORT)).unwrap();
    let second = from_guest(&daemon, &mut guest, &FLOW);
    assert_moves_bytes(&mut guest, &second, &FLOW);
    assert_same(&read_to_end(&stream), &sent);
    assert_quiet(&mut guest);
    assert_moves_bytes(&mut guest, &second, &FLOW);
}

#[test]
fn bytes_after_the_guests_own_shutdown_do_no_harm() {
    let (daemon, mut guest, stream) = connected();
    guest.send(&FLOW.shutdown(NO_SEND));
    guest.send(&FLOW.rw(b"too late"));
    assert_closed(&stream);
    guest.settle();
    assert_serves(&daemon, &mut guest);
}

// --- The host connects.

#[test]
fn a_connect_line_in_pieces() {
    let (daemon, mut guest) = device();
    let mut stream = connect(&daemon.uds_path());
    for byte in b"CONNECT 1234\n" {
        stream.write_all(&[*byte]).unwrap();
        // Each piece is read separately: the guest's packets keep the daemon working in between.
        assert!(guest.settle().iter().all(|packet| packet.is(Op::Request)));
        if *byte == b'4' {
            stream.write_all(b"\npayload").unwrap();
            break;
        }
    }
    let flow = Flow::new(PORT, guest.recv().src_port);
    guest.send(&flow.packet(Op::Response));
    assert_eq!(read_ok(&stream), flow.host_port);
    assert_same(&recv_bytes(&mut guest, &flow, 7), b"payload");
    assert_moves_bytes(&mut guest, &stream, &flow);
}

#[test]
fn payload_behind_the_connect_line() {
    let (daemon, mut guest) = device();
    let payload = pattern(1, 100_000);
    let mut stream = connect(&daemon.uds_path());
    stream
        .write_all(&[b"CONNECT 1234\n", &payload[..]].concat())
        .unwrap();
    let request = guest.recv();
    let flow = Flow::of(&request);
    request.assert_is(Op::Request, &flow);
    // Before the RESPONSE nothing else may come.
    assert!(guest.settle().is_empty());
    guest.send(&flow.packet(Op::Response));
    assert_eq!(read_ok(&stream), flow.host_port);
    assert_same(&recv_bytes(&mut guest, &flow, payload.len()), &payload);
}

#[test]
fn newlines_in_the_payload_are_payload() {
    let (daemon, mut guest) = device();
    let mut stream = connect(&daemon.uds_path());
    stream.write_all(b"CONNECT 1234\n\nCONNECT 5\n\n").unwrap();
    let flow = Flow::of(&guest.recv());
    guest.send(&flow.packet(Op::Response));
    assert_eq!(read_ok(&stream), flow.host_port);
    assert_same(&recv_bytes(&mut guest, &flow, 12), b"\nCONNECT 5\n\n");
}

#[test]
fn the_greatest_ports() {
    let (daemon, mut guest) = device();
    for port in [1, 65_535, 65_536, 4_294_967_294, 4_294_967_295] {
        let (stream, flow, _) = from_host(&daemon, &mut guest, port);
        assert_moves_bytes(&mut guest, &stream, &flow);
        guest.send(&flow.packet(Op::Rst));
        assert_closed(&stream);
    }
}

#[test]
fn anything_else_is_closed() {
    let (daemon, mut guest) = device();
    let lines: [&[u8]; 17] = [
        b"\n",
        b"CONNECT\n",
        b"CONNECT \n",
        b"CONNECT x\n",
        b"CONNECT 5x\n",
        b" CONNECT 5\n",
        b"CONNECT\t5\n",
        b"CONNECT5\n",
        b"CONNECT -5\n",
        b"CONNECT +5\n",
        b"CONNECT 0x5\n",
        b"CONNECT 5\0\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 99999999999999999999\n",
        b"CONNECT 18446744073709551621\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xfe\xfd\n",
    ];
    for line in lines {
        let mut stream = connect(&daemon.uds_path());
        stream.write_all(line).unwrap();
        assert_closed(&stream);
    }
    assert!(guest.settle().is_empty(), "the guest heard of it");
}

#[test]
fn no_newline_within_32_bytes_is_closed() {
    let (daemon, mut guest) = device();
    for bytes in [
        vec![b'a'; 32],
        vec![b'a'; 100],
        [b"CONNECT ", &[b'0'; 24][..]].concat(),
        vec![0; 1000],
    ] {
        let mut stream = connect(&daemon.uds_path());
        stream.write_all(&bytes).unwrap();
        assert_closed(&stream);
    }
    assert!(guest.settle().is_empty(), "the guest heard of it");
}

#[test]
fn a_client_that_leaves_before_its_line_ends() {
    let (daemon, mut guest) = device();
    let (before, _) = daemon.at_rest();
    for bytes in [&b""[..], b"C", b"CONNECT 1234"] {
        connect(&daemon.uds_path()).write_all(bytes).unwrap();
    }
    eventually("the daemon closes them too", || {
        daemon.open_descriptors() <= before
    });
    assert!(guest.settle().is_empty());
}

#[test]
fn a_thousand_silent_clients_cost_nobody_anything_and_are_dropped() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(65_536), hard).unwrap();
    let (daemon, mut guest) = device();
    let (before, _) = daemon.at_rest();
    let clients: Vec<_> = (0..1000).map(|_| connect(&daemon.uds_path())).collect();
    let mut half = connect(&daemon.uds_path());
    half.write_all(b"CONNECT").unwrap();
    assert_serves(&daemon, &mut guest);
    for client in &clients {
        assert_closed(client);
    }
    assert_closed(&half);
    eventually("their descriptors are closed", || {
        daemon.open_descriptors() <= before
    });
    assert_serves(&daemon, &mut guest);
}

#[test]
fn a_port_nobody_listens_on_closes_the_client() {
    let (daemon, mut guest) = device();
    for _ in 0..20 {
        let client = dial(&daemon, PORT);
        let flow = Flow::of(&guest.recv());
        guest.send(&flow.packet(Op::Rst));
        assert_closed(&client);
    }
    assert_quiet(&mut guest);
}

#[test]
fn without_a_vmm_clients_are_closed_at_once() {
    let daemon = Daemon::start();
    assert_closed(&connect(&daemon.uds_path()));
    let guest = SimGuest::connect(&daemon, Setup::default());
    assert_closed(&connect(&daemon.uds_path()));
    drop(guest);
    let mut guest = SimGuest::start(&daemon, Setup::default());
    assert_serves(&daemon, &mut guest);
    drop(guest);
    eventually("clients are closed again", || {
        let mut client = connect(&daemon.uds_path());
        client
            .set_read_timeout(Some(std::time::Duration::from_millis(200)))
            .unwrap();
        matches!(client.read(&mut [0]), Ok(0))
    });
}

#[test]
fn a_client_right_behind_the_start_is_served() {
    let daemon = Daemon::start();
    for _ in 0..50 {
        let mut guest = SimGuest::connect(&daemon, Setup::default());
        guest.post_rx();
        guest.start_rings();
        from_host(&daemon, &mut guest, PORT);
    }
}

#[test]
fn host_ports_have_at_most_five_digits_and_differ() {
    let (daemon, mut guest) = device();
    let connections: Vec<_> = (0..100)
        .map(|_| from_host(&daemon, &mut guest, PORT))
        .collect();
    let ports: HashSet<_> = connections
        .iter()
        .map(|(_, flow, _)| flow.host_port)
        .collect();
    assert_eq!(ports.len(), 100);
    assert!(
        ports.iter().all(|port| (1024..=65_535).contains(port)),
        "{ports:?}"
    );
}

#[test]
fn a_request_to_the_guest_advertises_the_daemons_buffer() {
    let (daemon, mut guest) = device();
    let (.., request) = from_host(&daemon, &mut guest, PORT);
    assert_eq!(
        (request.buf_alloc, request.fwd_cnt, request.flags),
        (262_144, 0, 0)
    );
    assert_eq!((request.src_cid, request.kind), (HOST_CID, STREAM));
}

#[test]
fn a_client_that_left_before_the_response_is_reset() {
    let (daemon, mut guest) = device();
    for _ in 0..20 {
        let client = dial(&daemon, PORT);
        let flow = Flow::of(&guest.recv());
        drop(client);
        guest.send(&flow.packet(Op::Response));
        recv_other(&mut guest).assert_is(Op::Rst, &flow);
        guest.settle();
    }
    assert_serves(&daemon, &mut guest);
}

// --- The host ends a direction, or all.

#[test]
fn a_half_close_reaches_the_guest_behind_the_data() {
    let (daemon, mut guest) = device();
    let (stream, mut flow, _) = from_host(&daemon, &mut guest, PORT);
    let bytes = pattern(1, 100_000);
    (&stream).write_all(&bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_same(&recv_bytes(&mut guest, &flow, bytes.len()), &bytes);
    let shutdown = recv_other(&mut guest);
    shutdown.assert_is(Op::Shutdown, &flow);
    assert_eq!(shutdown.flags, NO_SEND);
    flow.fwd_cnt = bytes.len() as u32;
    let reply = pattern(2, 60_000);
    guest.send(&flow.rw(&reply));
    guest.send(&flow.shutdown(NO_RECEIVE | NO_SEND));
    assert_same(&read_to_end(&stream), &reply);
    recv_other(&mut guest).assert_is(Op::Rst, &flow);
    assert_quiet(&mut guest);
}

#[test]
fn a_half_close_before_the_response_keeps_its_place() {
    let (daemon, mut guest) = device();
    let mut stream = connect(&daemon.uds_path());
    stream.write_all(b"CONNECT 1234\nquestion").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let flow = Flow::of(&guest.recv());
    guest.send(&flow.packet(Op::Response));
    assert_eq!(read_ok(&stream), flow.host_port);
    assert_same(&recv_bytes(&mut guest, &flow, 8), b"question");
    let shutdown = recv_other(&mut guest);
    shutdown.assert_is(Op::Shutdown, &flow);
    assert_eq!(shutdown.flags, NO_SEND);
    guest.send(&flow.rw(b"answer"));
    assert_same(&read_exactly(&stream, 6), b"answer");
}

/// The host writes more than the guest's credit and ends by `end`; the guest reads slowly.
fn ends_behind_slow_data(end: impl FnOnce(UnixStream) -> Option<UnixStream>, flags: u32) {
    let (daemon, mut guest) = device();
    let mut flow = Flow {
        buf_alloc: 2000,
        ..FLOW
    };
    let stream = from_guest(&daemon, &mut guest, &flow);
    let bytes = pattern(1, 50_000);
    (&stream).write_all(&bytes).unwrap();
    let _kept = end(stream);
    let mut got = Vec::new();
    let last = loop {
        let packet = guest.recv();
        if packet.is(Op::Rw) {
            got.extend(packet.payload);
            flow.fwd_cnt = got.len() as u32;
            guest.send(&flow.packet(Op::CreditUpdate));
        } else if !packet.is(Op::CreditUpdate) && !packet.is(Op::CreditRequest) {
            break packet;
        }
    };
    assert_same(&got, &bytes);
    last.assert_is(Op::Shutdown, &flow);
    assert_eq!(last.flags, flags);
    if flags == NO_RECEIVE | NO_SEND {
        guest.send(&flow.packet(Op::Rst));
        assert_quiet(&mut guest);
        assert_refused_after_close(&mut guest);
    }
}

/// The connection is gone: its packets are answered with RST.
#[track_caller]
fn assert_refused_after_close(guest: &mut SimGuest) {
    guest.send(&FLOW.packet(Op::CreditRequest));
    guest.recv().assert_is(Op::Rst, &FLOW);
}

#[test]
fn a_host_that_stops_reading_is_reported_to_the_guest() {
    let (_daemon, mut guest, stream) = connected();
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    stream.shutdown(Shutdown::Read).unwrap();
    let packet = recv_other(&mut guest);
    packet.assert_is(Op::Shutdown, &FLOW);
    assert_eq!(packet.flags, NO_RECEIVE);
    (&stream).write_all(b"still speaks").unwrap();
    assert_same(&recv_bytes(&mut guest, &FLOW, 12), b"still speaks");
}

/// The host program reads a hundred times, and the guest sends as often. Each read makes room, which the daemon does not listen to
/// for long. Returns how many bytes were moved.
fn read_often(guest: &mut SimGuest, stream: &UnixStream) -> usize {
    let (count, bytes) = (100, [7; 100]);
    for _ in 0..count {
        guest.send(&FLOW.rw(&bytes));
        assert_same(&read_exactly(stream, bytes.len()), &bytes);
    }
    count * bytes.len()
}

#[test]
fn a_host_that_stops_reading_after_many_reads_is_reported_too() {
    let (_daemon, mut guest, stream) = connected();
    read_often(&mut guest, &stream);
    guest.settle();
    stream.shutdown(Shutdown::Read).unwrap();
    let packet = recv_other(&mut guest);
    packet.assert_is(Op::Shutdown, &FLOW);
    assert_eq!(packet.flags, NO_RECEIVE);
}

#[test]
fn a_host_that_stalls_after_many_reads_gets_the_rest() {
    let (_daemon, mut guest, stream) = connected();
    let mut read = read_often(&mut guest, &stream);
    for _ in 0..3 {
        let sent = fill_behind(&mut guest, &FLOW, read);
        assert_same(&read_exactly(&stream, sent.len()), &sent);
        read += sent.len();
    }
}

#[test]
fn bytes_behind_out_of_band_ones_are_not_left_behind() {
    let (daemon, mut guest, stream) = connected();
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    // All of it is queued before the daemon reads.
    daemon.signal(Signal::SIGSTOP);
    (&stream).write_all(b"before").unwrap();
    send(stream.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
    (&stream).write_all(b"behind").unwrap();
    daemon.signal(Signal::SIGCONT);
    let got = recv_bytes(&mut guest, &FLOW, 12);
    assert!(got.starts_with(b"before") && got.ends_with(b"behind"));
}

#[test]
fn a_half_close_waits_for_the_guests_credit() {
    ends_behind_slow_data(
        |stream| {
            stream.shutdown(Shutdown::Write).unwrap();
            Some(stream)
        },
        NO_SEND,
    );
}

#[test]
fn a_close_waits_for_the_guests_credit() {
    ends_behind_slow_data(|_| None, NO_RECEIVE | NO_SEND);
}

#[test]
fn a_close_that_is_not_confirmed_is_reset() {
    let (daemon, mut guest, stream) = connected();
    drop(stream);
    let shutdown = guest.recv();
    shutdown.assert_is(Op::Shutdown, &FLOW);
    assert_eq!(shutdown.flags, NO_RECEIVE | NO_SEND);
    recv_other(&mut guest).assert_is(Op::Rst, &FLOW);
    assert_refused_after_close(&mut guest);
    assert_serves(&daemon, &mut guest);
}

#[test]
fn both_close_at_once() {
    let (daemon, mut guest) = device();
    let listener = listen(&daemon, PORT);
    for port in 1..100 {
        let flow = Flow::new(port, PORT);
        guest.send(&flow.packet(Op::Request));
        guest.recv().assert_is(Op::Response, &flow);
        drop(accept(&listener));
        guest.send(&flow.shutdown(NO_RECEIVE | NO_SEND));
        let mut last = guest.recv();
        if last.is(Op::Shutdown) {
            last = guest.recv();
        }
        last.assert_is(Op::Rst, &flow);
    }
    assert_quiet(&mut guest);
}

#[test]
fn a_guest_that_writes_to_a_closed_host_program() {
    let (daemon, mut guest, stream) = connected();
    drop(stream);
    guest.recv().assert_is(Op::Shutdown, &FLOW);
    guest.send(&FLOW.rw(b"nobody reads this"));
    guest.send(&FLOW.shutdown(NO_RECEIVE | NO_SEND));
    recv_other(&mut guest).assert_is(Op::Rst, &FLOW);
    guest.settle();
    assert_serves(&daemon, &mut guest);
}

#[test]
fn connections_come_and_go_without_a_trace() {
    let (daemon, mut guest) = device();
    assert_serves(&daemon, &mut guest);
    let (before, _) = daemon.at_rest();
    for _ in 0..200 {
        assert_serves(&daemon, &mut guest);
    }
    eventually("no more descriptors than before", || {
        daemon.open_descriptors() <= before
    });
}
