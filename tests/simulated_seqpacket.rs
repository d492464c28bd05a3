//! SEQPACKET connections: messages keep their borders both ways, are delivered whole or not at all, and connections of
//! messages begin and end as streams do.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, PATIENCE, eventually};
use common::sim::host::{
    PORT, accept, assert_closed, assert_message, assert_moves_bytes, assert_same, assert_serves,
    connect_for_messages, from_guest, listen, listen_for_messages, pattern, read_message,
    recv_other, write_message,
};
use common::sim::packet::{BUF_ALLOC, EOM, EOR, NO_RECEIVE, NO_SEND, SEQPACKET};
use common::sim::ring::{Indirect, feature};
use common::sim::survivor::SLACK_KIB;
use common::sim::{Dice, Flow, HeaderPlace, Op, Packet, Setup, SimGuest, Survivor, TxLayout};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};

/// The guest's port of the connections that it makes.
const GUEST_PORT: u32 = 40_000;

fn flow() -> Flow {
    Flow::seqpacket(GUEST_PORT, PORT)
}

fn setup() -> Setup {
    Setup::default().with_messages()
}

/// A daemon with a guest whose driver has messages.
fn device() -> (Daemon, SimGuest) {
    let daemon = Daemon::start();
    let guest = SimGuest::start(&daemon, setup());
    (daemon, guest)
}

/// A connection that the guest makes.
#[track_caller]
fn open(daemon: &Daemon, guest: &mut SimGuest, flow: &Flow) -> UnixStream {
    let listener = listen_for_messages(&daemon.host_port_path(flow.host_port));
    guest.send(&flow.packet(Op::Request));
    guest.recv().assert_is(Op::Response, flow);
    accept(&listener)
}

/// A device with one connection that the guest has made.
fn connected() -> (Daemon, SimGuest, UnixStream) {
    let (daemon, mut guest) = device();
    let program = open(&daemon, &mut guest, &flow());
    (daemon, guest, program)
}

fn entry(daemon: &Daemon) -> std::path::PathBuf {
    daemon.directory().join("vm.vsock_seqpacket")
}

/// A connection that a host program makes to the guest's `port`.
#[track_caller]
fn open_from_host(daemon: &Daemon, guest: &mut SimGuest, port: u32) -> (UnixStream, Flow) {
    let program = connect_for_messages(&entry(daemon));
    write_message(&program, format!("CONNECT {port}\n").as_bytes());
    let flow = accept_request(guest, port);
    let answer = read_message(&program);
    assert_eq!(answer, format!("OK {}\n", flow.host_port).as_bytes());
    (program, flow)
}

/// The guest accepts what a host program asks for.
#[track_caller]
fn accept_request(guest: &mut SimGuest, port: u32) -> Flow {
    let request = guest.recv();
    let flow = Flow::of(&request);
    assert_eq!((flow.guest_port, flow.kind), (port, SEQPACKET));
    request.assert_is(Op::Request, &flow);
    guest.send(&flow.packet(Op::Response));
    flow
}

/// Sends a message in packets of at most `most` bytes.
fn send_message(guest: &mut SimGuest, flow: &Flow, message: &[u8], most: usize) {
    for packet in flow.message(message, most) {
        guest.send(&packet);
    }
}

/// Offers packets without a kick in between, so that they lie in the ring together.
fn send_at_once(guest: &mut SimGuest, packets: &[Packet]) {
    let (layout, indirect) = (guest.setup.tx, guest.setup.indirect);
    for packet in packets {
        assert!(guest.try_send(packet, layout, indirect), "the ring is full");
    }
    guest.rings[common::sim::guest::TX].kick_if_needed();
}

/// The guest's program has taken `bytes` more.
fn give_credit(guest: &mut SimGuest, flow: &mut Flow, bytes: usize) {
    flow.fwd_cnt = flow.fwd_cnt.wrapping_add(bytes as u32);
    guest.send(&flow.packet(Op::CreditUpdate));
}

/// A short message both ways.
#[track_caller]
fn assert_moves_messages(guest: &mut SimGuest, program: &UnixStream, flow: &Flow) {
    send_message(guest, flow, b"from the guest", 5);
    assert_eq!(read_message(program), b"from the guest");
    write_message(program, b"to the guest");
    assert_message(guest, flow, b"to the guest");
}

#[track_caller]
fn assert_refused(guest: &mut SimGuest, flow: &Flow) {
    guest.send(&flow.packet(Op::Request));
    guest.recv().assert_is(Op::Rst, flow);
}

// --- Features.

#[test]
fn the_types_are_offered_unless_they_are_switched_off() {
    let types = feature::STREAM | feature::SEQPACKET | feature::NO_IMPLIED_STREAM;
    for (options, offered) in [
        (&[][..], types),
        (&["--seqpacket=on"], types),
        (&["--seqpacket=off"], 0),
    ] {
        let daemon = Daemon::start_with(options);
        let guest = SimGuest::connect(&daemon, setup());
        assert_eq!(guest.frontend.features() & types, offered, "{options:?}");
        assert_eq!(entry(&daemon).exists(), offered != 0, "{options:?}");
    }
}

#[test]
fn a_driver_has_the_types_that_it_has_chosen() {
    let daemon = Daemon::start();
    let _streams = listen(&daemon, 1);
    let _messages = listen_for_messages(&daemon.host_port_path(2));
    let (stream, seqpacket, explicit) = (
        feature::STREAM,
        feature::SEQPACKET,
        feature::NO_IMPLIED_STREAM,
    );
    for (features, has_streams, has_messages) in [
        (0, true, false),
        (stream, true, false),
        (seqpacket, true, true),
        (explicit, false, false),
        (stream | seqpacket, true, true),
        (stream | explicit, true, false),
        (seqpacket | explicit, false, true),
        (stream | seqpacket | explicit, true, true),
    ] {
        let mut setup = Setup::default();
        setup.features |= features;
        let mut guest = SimGuest::start(&daemon, setup);
        for (flow, is_there) in [
            (Flow::new(7, 1), has_streams),
            (Flow::seqpacket(7, 2), has_messages),
        ] {
            guest.send(&flow.packet(Op::Request));
            let answer = if is_there { Op::Response } else { Op::Rst };
            guest.recv().assert_is(answer, &flow);
        }
        for (path, is_there) in [
            (daemon.uds_path(), has_streams),
            (entry(&daemon), has_messages),
        ] {
            let program = if path == entry(&daemon) {
                connect_for_messages(&path)
            } else {
                common::sim::host::connect(&path)
            };
            (&program).write_all(b"CONNECT 9\n").unwrap();
            if is_there {
                let request = guest.recv();
                request.assert_is(Op::Request, &Flow::of(&request));
                assert_eq!(request.dst_port, 9);
            } else {
                assert_closed(&program);
                assert!(guest.settle().is_empty());
            }
        }
    }
}

#[test]
fn without_messages_the_guest_has_streams_alone() {
    let daemon = Daemon::start_with(&["--seqpacket=off"]);
    let mut guest = SimGuest::start(&daemon, setup());
    let _listener = listen_for_messages(&daemon.host_port_path(PORT));
    assert_refused(&mut guest, &flow());
    assert_serves(&daemon, &mut guest);
}

// --- How connections begin.

#[test]
fn a_host_programs_socket_must_be_of_the_requests_type() {
    let (daemon, mut guest) = device();
    assert_refused(&mut guest, &flow());
    let streams = listen(&daemon, PORT);
    assert_refused(&mut guest, &flow());
    drop(streams);
    let _messages = listen_for_messages(&daemon.host_port_path(PORT));
    assert_refused(&mut guest, &Flow::new(GUEST_PORT, PORT));
    guest.send(&flow().packet(Op::Request));
    guest.recv().assert_is(Op::Response, &flow());
}

#[test]
fn a_host_program_is_answered_with_one_message() {
    let (daemon, mut guest) = device();
    let (program, flow) = open_from_host(&daemon, &mut guest, 5000);
    assert_moves_messages(&mut guest, &program, &flow);
}

#[test]
fn messages_behind_the_line_are_kept() {
    let (daemon, mut guest) = device();
    let program = connect_for_messages(&entry(&daemon));
    for message in ["connect 5000 \r\n", "first", "second"] {
        write_message(&program, message.as_bytes());
    }
    let flow = accept_request(&mut guest, 5000);
    assert_message(&mut guest, &flow, b"first");
    assert_message(&mut guest, &flow, b"second");
}

#[test]
fn a_first_message_that_is_not_the_line_closes() {
    let (daemon, mut guest) = device();
    for message in [
        &b""[..],
        b"CONNECT 5000",
        b"CONN",
        b"CONNECT 5000\nhello",
        b"CONNECT 5000\n\n",
        b"CONNECT 0000000000000000000000005000\n",
        b"CONNECT 4294967296\n",
        b"GET / HTTP/1.0\r\n\r\n",
        &[0; 100_000],
    ] {
        let program = connect_for_messages(&entry(&daemon));
        write_message(&program, message);
        assert_closed(&program);
    }
    assert!(guest.settle().is_empty());
}

#[test]
fn a_refused_client_is_closed() {
    let (daemon, mut guest) = device();
    let program = connect_for_messages(&entry(&daemon));
    write_message(&program, b"CONNECT 5000\n");
    let request = guest.recv();
    guest.send(&Flow::of(&request).packet(Op::Rst));
    assert_closed(&program);
}

#[test]
fn plain_ports_carry_messages() {
    let directory = tempfile::TempDir::new().unwrap();
    let (inside, outside) = (
        directory.path().join("inside"),
        directory.path().join("outside"),
    );
    let daemon = Daemon::start_with(&[
        &format!("--guest-port=5000={},seqpacket", inside.display()),
        &format!("--host-port={PORT}={},seqpacket", outside.display()),
    ]);
    let mut guest = SimGuest::start(&daemon, setup());
    let program = connect_for_messages(&inside);
    let to_guest = accept_request(&mut guest, 5000);
    assert_moves_messages(&mut guest, &program, &to_guest);

    // Both types at once, of the same ports.
    let listener = listen_for_messages(&outside);
    guest.send(&flow().packet(Op::Request));
    guest.recv().assert_is(Op::Response, &flow());
    let program = accept(&listener);
    let stream_flow = Flow::new(GUEST_PORT, PORT);
    let stream = from_guest(&daemon, &mut guest, &stream_flow);
    assert_moves_messages(&mut guest, &program, &flow());
    assert_moves_bytes(&mut guest, &stream, &stream_flow);
    guest.send(&stream_flow.packet(Op::Rst));
    assert_closed(&stream);
    assert_moves_messages(&mut guest, &program, &flow());
}

#[test]
fn the_caller_is_named() {
    let (_daemon, _guest, program) = connected();
    use std::os::linux::net::SocketAddrExt;
    let peer = program.peer_addr().unwrap();
    let name = String::from_utf8(peer.as_abstract_name().unwrap().to_vec()).unwrap();
    let start = format!("vhost-user-vsock/2:{PORT}/4:{GUEST_PORT}/");
    assert!(name.starts_with(&start), "{name}");
}

// --- Messages.

/// Sizes at the borders of everything between a program and another.
const SIZES: [usize; 14] = [
    1,
    2,
    43,
    44,
    45,
    1000,
    3731,
    3732,
    3733,
    4096,
    16_385,
    65_536,
    65_537,
    BUF_ALLOC as usize,
];

/// Messages of all sizes over one connection, each way.
#[track_caller]
fn assert_sizes_pass(daemon: &Daemon, setup: Setup, most: usize) {
    let mut guest = SimGuest::start(daemon, setup);
    let mut flow = flow();
    let program = open(daemon, &mut guest, &flow);
    // By default a program's longest message is shorter than the guest's buffer.
    setsockopt(&program, sockopt::SndBuf, &(BUF_ALLOC as usize)).unwrap();
    for size in SIZES {
        // No more packets than the guest has buffers for in a moment.
        if size / most > 2000 {
            continue;
        }
        let message = pattern(size as u64, size);
        send_message(&mut guest, &flow, &message, most);
        assert_same(&read_message(&program), &message);
        write_message(&program, &message);
        assert_message(&mut guest, &flow, &message);
        give_credit(&mut guest, &mut flow, size);
    }
    guest.send(&flow.packet(Op::Rst));
    assert_closed(&program);
}

#[test]
fn sizes_rings_packets_and_buffers_do_not_matter() {
    let daemon = Daemon::start_with(&["--tx-buffer-size=262144"]);
    for (ring_size, most, rx) in [
        (8, 64 * 1024, vec![3776]),
        (16, 1000, vec![44, 4096]),
        (64, 300, vec![45, 100, 1]),
        (128, 64 * 1024, vec![64 * 1024]),
        (256, 4096, vec![144]),
        (1024, 997, vec![19, 25, 500]),
    ] {
        for borders in [false, true] {
            let mut setup = setup();
            setup.ring_size = ring_size;
            setup.rx = rx.clone();
            if borders {
                setup = setup.with_borders();
            }
            setup.tx_payload = most.min(if borders { 4096 } else { most });
            let most = setup.tx_payload;
            // What with_borders leaves has no room for so many buffers.
            let room: u32 = rx.iter().sum::<u32>() + 64;
            setup.rx_buffers =
                Some((usize::from(ring_size) / rx.len()).min((8 << 20) / room as usize));
            assert_sizes_pass(&daemon, setup, most);
        }
    }
}

#[test]
fn packets_of_one_byte_make_a_message() {
    let (_daemon, mut guest, program) = connected();
    let message = pattern(1, 500);
    send_message(&mut guest, &flow(), &message, 1);
    assert_same(&read_message(&program), &message);
}

#[test]
fn a_batch_keeps_its_messages_apart() {
    let (_daemon, mut guest, program) = connected();
    let messages: Vec<_> = (0..20).map(|i| pattern(i, 1 + 37 * i as usize)).collect();
    let packets: Vec<_> = messages
        .iter()
        .flat_map(|message| flow().message(message, 300))
        .collect();
    send_at_once(&mut guest, &packets);
    for message in &messages {
        assert_same(&read_message(&program), message);
    }
    for message in &messages {
        write_message(&program, message);
    }
    for message in &messages {
        assert_message(&mut guest, &flow(), message);
    }
}

#[test]
fn messages_of_more_slices_than_one_send_takes() {
    let daemon = Daemon::start();
    let mut setup = setup();
    setup.ring_size = 1024;
    setup.indirect = Indirect::Whole;
    setup.tx = TxLayout {
        header: HeaderPlace::Alone,
        descriptors: 31,
    };
    setup.tx_payload = 4096;
    // 29 slices of 10 bytes behind each header: 36 buffers are the first that have more than 1,024.
    setup.rx = [&[44][..], &[10; 29]].concat();
    let mut guest = SimGuest::start(&daemon, setup);
    let mut flow = flow();
    let program = open(&daemon, &mut guest, &flow);
    let packets: Vec<_> = (0..3)
        .flat_map(|seed| flow.message(&pattern(seed, 40 * 300), if seed == 1 { 300 } else { 4000 }))
        .collect();
    send_at_once(&mut guest, &packets);
    for seed in 0..3 {
        assert_same(&read_message(&program), &pattern(seed, 40 * 300));
    }
    for size in [
        1024 * 10,
        1025 * 10,
        36 * 290 - 1,
        36 * 290,
        36 * 290 + 1,
        100_000,
    ] {
        let message = pattern(9, size);
        write_message(&program, &message);
        assert_message(&mut guest, &flow, &message);
        give_credit(&mut guest, &mut flow, size);
    }
}

#[test]
fn messages_that_lie_in_the_ring_together_pass_in_order() {
    let daemon = Daemon::start();
    let mut setup = setup();
    setup.ring_size = 1024;
    let mut guest = SimGuest::start(&daemon, setup);
    let flows = [1, 2].map(|port| Flow::seqpacket(port, PORT));
    let programs = flows.clone().map(|flow| open(&daemon, &mut guest, &flow));
    // More bytes than are taken at a time, cut at another place each time.
    for size in [30_000, 50_000, 70_000, 100_000] {
        let messages: Vec<_> = (0..200_000 / size as u64)
            .map(|seed| pattern(seed, size))
            .collect();
        let mut packets = Vec::new();
        for message in &messages {
            for flow in &flows {
                packets.extend(flow.message(message, 17_000));
            }
        }
        send_at_once(&mut guest, &packets);
        for message in &messages {
            for program in &programs {
                assert_same(&read_message(program), message);
            }
        }
    }
}

#[test]
fn a_program_that_reads_less_loses_the_rest_of_that_message_alone() {
    let (_daemon, mut guest, program) = connected();
    send_message(&mut guest, &flow(), b"long message", 100);
    send_message(&mut guest, &flow(), b"next", 100);
    let mut bytes = [0; 4];
    let len = recv(program.as_raw_fd(), &mut bytes, MsgFlags::MSG_TRUNC).unwrap();
    assert_eq!((len, &bytes), (12, b"long"));
    assert_eq!(read_message(&program), b"next");
}

#[test]
fn records_end_as_messages_do() {
    let (_daemon, mut guest, program) = connected();
    for message in [&b"one"[..], b"two"] {
        let mut packets = flow().message(message, 2);
        packets.last_mut().unwrap().flags |= EOR;
        // Without the message's end it means nothing.
        packets[0].flags |= EOR;
        send_at_once(&mut guest, &packets);
    }
    for message in [b"one", b"two"] {
        assert_eq!(read_message(&program), message);
    }
}

#[test]
fn there_are_no_empty_messages() {
    let (_daemon, mut guest, program) = connected();
    let empty = |flags| Packet {
        flags,
        ..flow().rw(b"")
    };
    for packet in [empty(EOM), empty(0), empty(EOM | EOR)] {
        guest.send(&packet);
    }
    // The end of a message may come without bytes.
    guest.send(&flow().rw(b"whole"));
    guest.send(&empty(EOM));
    send_message(&mut guest, &flow(), b"next", 10);
    assert_eq!(read_message(&program), b"whole");
    assert_eq!(read_message(&program), b"next");

    for message in [&b""[..], b"", b"a", b"", b"b", b""] {
        write_message(&program, message);
    }
    assert_message(&mut guest, &flow(), b"a");
    assert_message(&mut guest, &flow(), b"b");
    assert_moves_messages(&mut guest, &program, &flow());
    for message in [&b""[..], b"last", b""] {
        write_message(&program, message);
    }
    drop(program);
    assert_message(&mut guest, &flow(), b"last");
    assert_closing(&mut guest, &flow());
}

/// The host program has closed, and all that it wrote was there before.
#[track_caller]
fn assert_closing(guest: &mut SimGuest, flow: &Flow) {
    let shutdown = recv_other(guest);
    shutdown.assert_is(Op::Shutdown, flow);
    assert_eq!(shutdown.flags, NO_RECEIVE | NO_SEND);
    guest.send(&flow.packet(Op::Rst));
    assert!(guest.settle().is_empty());
}

// --- Credit and limits.

#[test]
fn a_message_waits_for_credit_for_all_of_it() {
    let daemon = Daemon::start();
    let mut setup = setup();
    setup.buf_alloc = 1000;
    let mut guest = SimGuest::start(&daemon, setup);
    let mut flow = Flow {
        buf_alloc: 1000,
        ..flow()
    };
    let program = open(&daemon, &mut guest, &flow);
    write_message(&program, &pattern(1, 600));
    assert_message(&mut guest, &flow, &pattern(1, 600));
    write_message(&program, &pattern(2, 500));
    guest.recv().assert_is(Op::CreditRequest, &flow);
    assert!(guest.settle().is_empty());
    // Still too little.
    give_credit(&mut guest, &mut flow, 99);
    assert!(guest.settle().is_empty());
    give_credit(&mut guest, &mut flow, 1);
    assert_message(&mut guest, &flow, &pattern(2, 500));
    write_message(&program, &pattern(3, 1000));
    guest.recv().assert_is(Op::CreditRequest, &flow);
    give_credit(&mut guest, &mut flow, 1000);
    assert_message(&mut guest, &flow, &pattern(3, 1000));
    assert!(guest.settle().is_empty());
}

#[test]
fn a_message_of_all_of_the_credit_passes_and_a_longer_one_ends_the_connection() {
    let daemon = Daemon::start_with(&["--tx-buffer-size=100000"]);
    let mut guest = SimGuest::start(&daemon, setup());
    let program = open(&daemon, &mut guest, &flow());
    let message = pattern(1, 100_000);
    send_message(&mut guest, &flow(), &message, 30_000);
    assert_same(&read_message(&program), &message);
    let update = guest.recv();
    update.assert_is(Op::CreditUpdate, &flow());
    assert_eq!((update.buf_alloc, update.fwd_cnt), (100_000, 100_000));

    for piece in message.chunks(25_000) {
        guest.send(&flow().rw(piece));
    }
    recv_other(&mut guest).assert_is(Op::Rst, &flow());
    assert_closed(&program);
    // And the next connection works.
    let program = open(&daemon, &mut guest, &flow());
    assert_moves_messages(&mut guest, &program, &flow());
}

#[test]
fn a_buffer_larger_than_a_unix_message_is_not_advertised() {
    let daemon = Daemon::start_with(&["--tx-buffer-size=1073741824"]);
    let mut guest = SimGuest::start(&daemon, setup());
    let listener = listen_for_messages(&daemon.host_port_path(PORT));
    guest.send(&flow().packet(Op::Request));
    let response = guest.recv();
    response.assert_is(Op::Response, &flow());
    let program = accept(&listener);
    let longest = response.buf_alloc as usize;
    assert!(longest <= 1 << 20, "{longest}");
    let message = pattern(1, longest);
    send_message(&mut guest, &flow(), &message, 64 * 1024);
    let mut bytes = vec![0; longest + 1];
    let len = (&program).read(&mut bytes).unwrap();
    assert_same(&bytes[..len], &message);
    // Streams have all of it.
    let streams = listen(&daemon, 77);
    let stream = Flow::new(1, 77);
    guest.send(&stream.packet(Op::Request));
    let response = recv_other(&mut guest);
    response.assert_is(Op::Response, &stream);
    assert_eq!(response.buf_alloc, 1 << 30);
    drop(streams);
}

#[test]
fn a_message_longer_than_is_received_at_a_time() {
    let (daemon, mut guest) = device();
    let mut flow = Flow {
        buf_alloc: 1 << 20,
        ..flow()
    };
    let program = open(&daemon, &mut guest, &flow);
    setsockopt(&program, sockopt::SndBuf, &300_000).unwrap();
    for size in [262_144, 262_145, 300_000] {
        let message = pattern(1, size);
        write_message(&program, &message);
        write_message(&program, b"next");
        assert_message(&mut guest, &flow, &message);
        assert_message(&mut guest, &flow, b"next");
        give_credit(&mut guest, &mut flow, size + 4);
    }
}

#[test]
fn credit_past_its_end_ends_the_connection() {
    let (_daemon, mut guest, program) = connected();
    for _ in 0..4 {
        guest.send(&flow().rw(&[7; 65_000]));
    }
    guest.send(&flow().rw(&[7; 3000]));
    guest.recv().assert_is(Op::Rst, &flow());
    assert_closed(&program);
}

#[test]
fn a_message_longer_than_the_guests_buffer_resets_and_is_logged_once() {
    let stats = tempfile::TempDir::new().unwrap();
    let stats = stats.path().join("stats");
    let daemon = Daemon::start_with(&["--stats-path", stats.to_str().unwrap()]);
    let mut guest = SimGuest::start(&daemon, setup());
    let mut flow = flow();
    flow.buf_alloc = 1000;
    let start = Instant::now();
    for round in 0..20 {
        let program = open(&daemon, &mut guest, &flow);
        write_message(&program, &pattern(1, 1000));
        assert_message(&mut guest, &flow, &pattern(1, 1000));
        // It has no credit for this, and need not have.
        write_message(&program, &vec![1; 1001 + round]);
        guest.recv().assert_is(Op::Rst, &flow);
        assert_closed(&program);
    }
    let seconds = start.elapsed().as_secs() as usize;
    let about = "1001 bytes is longer than the guest's receive buffer of 1000";
    eventually("the log names it", || daemon.log().contains(about));
    let lines = daemon.log().matches("receive buffer of 1000").count();
    assert!(lines <= seconds + 1, "{lines} lines in {seconds} s");
    assert!(daemon.log().contains("WARN"), "{}", daemon.log());
    let mut text = String::new();
    let mut client = UnixStream::connect(&stats).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    client.read_to_string(&mut text).unwrap();
    let counted = text
        .lines()
        .any(|line| line.contains("\"message_too_long\"") && line.ends_with(" 20"));
    assert!(counted, "{text}");
    let program = open(&daemon, &mut guest, &flow);
    assert_moves_messages(&mut guest, &program, &flow);
}

/// Sends whole messages within the credit until no more is given, since the host program does not read. What was sent before
/// must have been taken.
fn fill(guest: &mut SimGuest, flow: &Flow, size: usize) -> Vec<Vec<u8>> {
    let mut sent = Vec::<Vec<u8>>::new();
    let (mut bytes, mut before) = (None, None);
    loop {
        guest.send(&flow.packet(Op::CreditRequest));
        let mut packets = guest.settle();
        let update = packets.pop().unwrap();
        update.assert_is(Op::CreditUpdate, flow);
        let bytes = bytes.get_or_insert(update.fwd_cnt as usize);
        let room = update.buf_alloc as usize - (*bytes - update.fwd_cnt as usize);
        if room < size && before == Some(update.fwd_cnt) {
            return sent;
        }
        before = Some(update.fwd_cnt);
        for _ in 0..room / size {
            let message = pattern(sent.len() as u64, size);
            send_message(guest, flow, &message, 1 + size / 2);
            *bytes += size;
            sent.push(message);
        }
    }
}

#[test]
fn a_slow_host_program_costs_no_time_and_bounded_memory() {
    let survivor = Survivor::start();
    for size in [1, 1000, 100_000] {
        let mut guest = SimGuest::start(&survivor, setup());
        let mut flow = flow();
        if size == 1 {
            // A quarter of a million packets would take too long.
            flow.buf_alloc = 1000;
        }
        let program = open(&survivor, &mut guest, &flow);
        let sent = if size == 1 {
            let messages: Vec<_> = (0..20_000u32).map(|i| vec![i as u8]).collect();
            for message in &messages {
                send_message(&mut guest, &flow, message, 1);
            }
            messages
        } else {
            fill(&mut guest, &flow, size)
        };
        survivor.assert_idle();
        let growth = survivor.growth_kib();
        assert!(growth < SLACK_KIB, "{growth} KiB");
        for message in &sent {
            assert_same(&read_message(&program), message);
        }
        send_message(&mut guest, &flow, b"last", 10);
        assert_eq!(read_message(&program), b"last");
        guest.send(&flow.packet(Op::Rst));
        guest.settle();
    }
    survivor.assert_unharmed();
}

// --- How connections end.

#[test]
fn a_connection_that_ends_within_a_message_delivers_no_part_of_it() {
    let (daemon, mut guest) = device();
    for end in [
        flow().packet(Op::Rst),
        flow().shutdown(NO_SEND),
        flow().shutdown(NO_SEND | NO_RECEIVE),
    ] {
        for is_slow in [false, true] {
            let program = open(&daemon, &mut guest, &flow());
            let mut whole = vec![b"whole".to_vec()];
            send_message(&mut guest, &flow(), b"whole", 3);
            let is_abort = end.is(Op::Rst);
            if is_slow && !is_abort {
                whole.extend(fill(&mut guest, &flow(), 2000));
            }
            // In one batch, or the rest of it.
            send_at_once(
                &mut guest,
                &[flow().rw(b"no "), flow().rw(b"message"), end.clone()],
            );
            for message in whole {
                assert_same(&read_message(&program), &message);
            }
            assert_closed(&program);
            if !is_abort {
                drop(program);
                let ends = recv_other(&mut guest);
                assert!(flow().owns(&ends), "{ends:?}");
                if ends.is(Op::Shutdown) {
                    guest.send(&flow().packet(Op::Rst));
                } else {
                    ends.assert_is(Op::Rst, &flow());
                }
            }
            guest.settle();
        }
    }
    let program = open(&daemon, &mut guest, &flow());
    guest.send(&flow().rw(b"no message"));
    guest.settle();
    drop(guest);
    assert_closed(&program);
}

#[test]
fn half_a_connection_goes_on() {
    let (daemon, mut guest) = device();
    // The guest sends no more.
    let program = open(&daemon, &mut guest, &flow());
    send_message(&mut guest, &flow(), b"last", 2);
    guest.send(&flow().shutdown(NO_SEND));
    assert_eq!(read_message(&program), b"last");
    assert_closed(&program);
    write_message(&program, b"answer");
    assert_message(&mut guest, &flow(), b"answer");
    drop(program);
    assert_closing(&mut guest, &flow());

    // It receives no more.
    let program = open(&daemon, &mut guest, &flow());
    guest.send(&flow().shutdown(NO_RECEIVE));
    guest.settle();
    let error = (&program).write(b"nobody").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    send_message(&mut guest, &flow(), b"still there", 100);
    assert_eq!(read_message(&program), b"still there");
    guest.send(&flow().shutdown(NO_SEND));
    guest.recv().assert_is(Op::Rst, &flow());
    assert_closed(&program);

    // The host program sends no more.
    let program = open(&daemon, &mut guest, &flow());
    write_message(&program, b"last");
    program.shutdown(Shutdown::Write).unwrap();
    assert_message(&mut guest, &flow(), b"last");
    let shutdown = guest.recv();
    shutdown.assert_is(Op::Shutdown, &flow());
    assert_eq!(shutdown.flags, NO_SEND);
    send_message(&mut guest, &flow(), b"answer", 100);
    assert_eq!(read_message(&program), b"answer");
    drop(program);
    let shutdown = guest.recv();
    shutdown.assert_is(Op::Shutdown, &flow());
    assert_eq!(shutdown.flags, NO_SEND | NO_RECEIVE);
    guest.send(&flow().packet(Op::Rst));

    // It receives no more, which the next message shows.
    let program = open(&daemon, &mut guest, &flow());
    program.shutdown(Shutdown::Read).unwrap();
    send_message(&mut guest, &flow(), b"nobody reads this", 100);
    let shutdown = recv_other(&mut guest);
    shutdown.assert_is(Op::Shutdown, &flow());
    assert_eq!(shutdown.flags, NO_RECEIVE);
    write_message(&program, b"still there");
    assert_message(&mut guest, &flow(), b"still there");
    drop(program);
    assert_closing(&mut guest, &flow());
}

#[test]
fn what_a_program_wrote_before_it_closed_arrives_although_it_has_not_read_all() {
    let (daemon, mut guest) = device();
    for count in [0, 1, 50] {
        let program = open(&daemon, &mut guest, &flow());
        send_message(&mut guest, &flow(), b"never read", 100);
        guest.settle();
        for number in 0..count {
            write_message(&program, &pattern(number, 100));
        }
        drop(program);
        for number in 0..count {
            assert_message(&mut guest, &flow(), &pattern(number, 100));
        }
        assert_closing(&mut guest, &flow());
    }
}

#[test]
fn a_close_waits_until_all_messages_are_delivered() {
    let (daemon, mut guest) = device();
    for size in [1000, 60_000] {
        let program = open(&daemon, &mut guest, &flow());
        let sent = fill(&mut guest, &flow(), size);
        guest.send(&flow().shutdown(NO_RECEIVE | NO_SEND));
        assert!(
            guest
                .settle()
                .iter()
                .all(|packet| packet.is(Op::CreditUpdate))
        );
        for message in &sent {
            assert_same(&read_message(&program), message);
        }
        assert_closed(&program);
        recv_other(&mut guest).assert_is(Op::Rst, &flow());
    }
}

#[test]
fn an_rst_after_a_close_keeps_the_messages_and_frees_the_ports() {
    let (daemon, mut guest, program) = connected();
    let sent = fill(&mut guest, &flow(), 1000);
    guest.send(&flow().shutdown(NO_RECEIVE | NO_SEND));
    guest.send(&flow().packet(Op::Rst));
    guest.settle();
    let next = open(&daemon, &mut guest, &flow());
    assert_moves_messages(&mut guest, &next, &flow());
    for message in &sent {
        assert_same(&read_message(&program), message);
    }
    assert_closed(&program);
}

#[test]
fn a_client_may_wait_for_the_guest() {
    let daemon = Daemon::start_with(&["--wait-for-guest=60"]);
    let program = connect_for_messages(&entry(&daemon));
    write_message(&program, b"CONNECT 5000\n");
    write_message(&program, b"first");
    let mut guest = SimGuest::connect(&daemon, setup());
    guest.post_rx();
    guest.start_rings();
    let flow = accept_request(&mut guest, 5000);
    assert_message(&mut guest, &flow, b"first");
    read_message(&program);
    assert_moves_messages(&mut guest, &program, &flow);
}

#[test]
fn a_program_that_stops_reading_a_full_socket_is_found_out_by_what_comes_next() {
    let (_daemon, mut guest, program) = connected();
    fill(&mut guest, &flow(), 1000);
    program.shutdown(Shutdown::Read).unwrap();
    guest.send(&flow().packet(Op::CreditRequest));
    let shutdown = recv_other(&mut guest);
    shutdown.assert_is(Op::Shutdown, &flow());
    assert_eq!(shutdown.flags, NO_RECEIVE);
    write_message(&program, b"still there");
    assert_message(&mut guest, &flow(), b"still there");
}

#[test]
fn a_close_within_a_message_waits_for_its_end() {
    let daemon = Daemon::start();
    let mut setup = setup();
    setup.rx = vec![1044];
    setup.rx_buffers = Some(4);
    let mut guest = SimGuest::start(&daemon, setup);
    let program = open(&daemon, &mut guest, &flow());
    guest.auto_repost = false;
    let message = pattern(1, 6000);
    write_message(&program, &message);
    let first = guest.recv();
    assert_eq!((first.op, first.flags), (Op::Rw as u16, 0));
    drop(program);
    guest.auto_repost = true;
    guest.post_rx();
    assert_message(&mut guest, &flow(), &message[first.payload.len()..]);
    assert_closing(&mut guest, &flow());
}

#[test]
fn a_program_that_leaves_during_the_flush_is_confirmed() {
    let (_daemon, mut guest, program) = connected();
    fill(&mut guest, &flow(), 1000);
    guest.send(&flow().shutdown(NO_RECEIVE | NO_SEND));
    guest.settle();
    drop(program);
    recv_other(&mut guest).assert_is(Op::Rst, &flow());
}

#[test]
fn a_close_waits_for_the_guests_credit() {
    let (daemon, mut guest) = device();
    let mut flow = Flow {
        buf_alloc: 1000,
        ..flow()
    };
    let program = open(&daemon, &mut guest, &flow);
    for number in 0..5 {
        write_message(&program, &pattern(number, 600));
    }
    drop(program);
    for number in 0..5 {
        assert_message(&mut guest, &flow, &pattern(number, 600));
        if number < 4 {
            guest.recv().assert_is(Op::CreditRequest, &flow);
        }
        give_credit(&mut guest, &mut flow, 600);
    }
    assert_closing(&mut guest, &flow);
}

// --- The device stops and starts.

#[test]
fn a_pause_within_a_message_loses_nothing() {
    let daemon = Daemon::start();
    let mut setup = setup();
    setup.rx_buffers = Some(4);
    setup.rx = vec![1044];
    let mut guest = SimGuest::start(&daemon, setup);
    let program = open(&daemon, &mut guest, &flow());
    let message = pattern(1, 10_000);
    let pause = |guest: &mut SimGuest| {
        guest.stop_rings();
        guest.start_rings();
    };
    let packets = flow().message(&message, 3000);
    for packet in &packets {
        guest.send(packet);
        guest.wait_tx_done();
        pause(&mut guest);
    }
    assert_same(&read_message(&program), &message);

    guest.auto_repost = false;
    write_message(&program, &message);
    write_message(&program, b"next");
    let mut got = Vec::new();
    while got.len() < message.len() {
        let packet = recv_other(&mut guest);
        packet.assert_is(Op::Rw, &flow());
        got.extend(packet.payload);
        assert_eq!(packet.flags == EOM, got.len() == message.len());
        pause(&mut guest);
        guest.post_rx();
    }
    assert_same(&got, &message);
    assert_message(&mut guest, &flow(), b"next");
}

#[test]
fn a_reboot_ends_all_and_the_next_driver_may_choose_otherwise() {
    let (daemon, mut guest, program) = connected();
    guest.send(&flow().rw(b"no message"));
    guest.settle();
    guest.stop_rings();
    guest.restart_fresh();
    assert_closed(&program);
    let program = open(&daemon, &mut guest, &flow());
    assert_moves_messages(&mut guest, &program, &flow());
    drop(guest);
    assert_closed(&program);
    // This one has streams alone.
    let mut guest = SimGuest::start(&daemon, Setup::default());
    assert_refused(&mut guest, &flow());
    assert_serves(&daemon, &mut guest);
}

// --- All together.

/// One connection of the model: what its host program and its guest have not received yet.
struct Modelled {
    flow: Flow,
    program: UnixStream,
    to_host: std::collections::VecDeque<Vec<u8>>,
    to_guest: std::collections::VecDeque<Vec<u8>>,
    /// The packets of a message that the guest is sending.
    sending: std::collections::VecDeque<Packet>,
    /// What the guest has of a message.
    partial: Vec<u8>,
    sent: u32,
    /// How many bytes it may have sent, modulo 2^32.
    limit: u32,
    number: u64,
}

impl Modelled {
    fn next_message(&mut self, dice: &mut Dice) -> Vec<u8> {
        self.number += 1;
        let size = dice.one_of(&[1, 10, 100, 1000, 5000, 40_000]);
        pattern(self.number << 32 | u64::from(self.flow.guest_port), size)
    }

    /// Sends packets of the message at hand as far as credit goes.
    fn send(&mut self, guest: &mut SimGuest, dice: &mut Dice) {
        if self.sending.is_empty() {
            let message = self.next_message(dice);
            let most = dice.one_of(&[7, 100, 4096, 65_536]).max(message.len() / 40);
            self.sending = self.flow.message(&message, most).into();
            self.to_host.push_back(message);
        }
        while let Some(packet) = self.sending.front()
            && packet.len <= self.limit.wrapping_sub(self.sent)
        {
            self.sent = self.sent.wrapping_add(packet.len);
            let packet = Packet {
                fwd_cnt: self.flow.fwd_cnt,
                ..self.sending.pop_front().unwrap()
            };
            guest.send(&packet);
            if dice.one_of(&[false, false, true]) {
                return;
            }
        }
        if !self.sending.is_empty() {
            guest.send(&self.flow.packet(Op::CreditRequest));
        }
    }

    fn take(&mut self, guest: &mut SimGuest, packet: &Packet) {
        self.limit = packet.fwd_cnt.wrapping_add(packet.buf_alloc);
        if packet.is(Op::CreditRequest) {
            guest.send(&self.flow.packet(Op::CreditUpdate));
        } else if packet.is(Op::Rw) {
            self.partial.extend(&packet.payload);
            if packet.flags == EOM {
                let whole = std::mem::take(&mut self.partial);
                assert_same(
                    &whole,
                    &self.to_guest.pop_front().expect("a message too many"),
                );
                let flow = &mut self.flow;
                give_credit(guest, flow, whole.len());
            }
        } else {
            packet.assert_is(Op::CreditUpdate, &self.flow);
        }
    }

    fn write(&mut self, dice: &mut Dice) {
        let message = self.next_message(dice);
        match (&self.program).write(&message) {
            Ok(len) => {
                assert_eq!(len, message.len());
                self.to_guest.push_back(message);
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }

    fn read(&mut self) {
        let mut bytes = vec![0; 1 << 17];
        match (&self.program).read(&mut bytes) {
            Ok(len) => {
                let wanted = self.to_host.pop_front().expect("a message too many");
                assert_same(&bytes[..len], &wanted);
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
}

#[test]
fn no_message_is_merged_split_lost_or_invented() {
    for seed in 1..=4 {
        let daemon = Daemon::start_with(&["--tx-buffer-size=65536"]);
        let mut dice = Dice::new(seed);
        let mut setup = setup();
        setup.ring_size = dice.one_of(&[8, 64, 256]);
        setup.rx = dice.one_of(&[vec![3776], vec![144], vec![44, 5000]]);
        let mut guest = SimGuest::start(&daemon, setup);
        let listener = listen_for_messages(&daemon.host_port_path(PORT));
        let mut conns: Vec<_> = (0..12)
            .map(|port| {
                let flow = Flow::seqpacket(port, PORT);
                guest.send(&flow.packet(Op::Request));
                let response = guest.recv();
                response.assert_is(Op::Response, &flow);
                let program = accept(&listener);
                program.set_nonblocking(true).unwrap();
                Modelled {
                    flow,
                    program,
                    to_host: Default::default(),
                    to_guest: Default::default(),
                    sending: Default::default(),
                    partial: Vec::new(),
                    sent: 0,
                    limit: response.buf_alloc,
                    number: 0,
                }
            })
            .collect();
        let take_all = |guest: &mut SimGuest, conns: &mut [Modelled]| {
            while let Some(packet) = guest.poll_packet() {
                conns[packet.dst_port as usize].take(guest, &packet);
            }
        };
        for _ in 0..3000 {
            let index = dice.below(conns.len() as u64) as usize;
            match dice.below(5) {
                0 | 1 => conns[index].send(&mut guest, &mut dice),
                2 => conns[index].write(&mut dice),
                3 => (0..3).for_each(|_| conns[index].read()),
                _ => take_all(&mut guest, &mut conns),
            }
        }
        let is_done = |conn: &Modelled| {
            conn.to_host.is_empty() && conn.to_guest.is_empty() && conn.sending.is_empty()
        };
        let deadline = Instant::now() + PATIENCE;
        while !conns.iter().all(is_done) {
            assert!(Instant::now() < deadline, "seed {seed}: messages stay away");
            if let Some(packet) = guest.try_recv(Duration::from_millis(5)) {
                conns[packet.dst_port as usize].take(&mut guest, &packet);
            }
            for conn in &mut conns {
                if !conn.sending.is_empty() {
                    conn.send(&mut guest, &mut dice);
                }
                conn.read();
            }
        }
        assert!(conns.iter().all(|conn| conn.partial.is_empty()));
    }
}

/// What a host program may do with its socket.
fn any_deed(program: &UnixStream, dice: &mut Dice) {
    let message = vec![7; dice.one_of(&[0, 1, 100, 5000, 100_000])];
    match dice.below(12) {
        0 => _ = program.shutdown(Shutdown::Read),
        1 => _ = program.shutdown(Shutdown::Write),
        2..=6 => _ = { program }.read(&mut vec![0; 1 << 17]),
        _ => _ = { program }.write(&message),
    }
}

#[test]
fn any_packet_in_any_state() {
    let daemon = Survivor::start();
    for seed in 1..=6 {
        let mut dice = Dice::new(seed);
        let mut guest = SimGuest::start(&daemon, setup());
        let listener = listen_for_messages(&daemon.host_port_path(PORT));
        listener.set_nonblocking(true).unwrap();
        let mut programs = Vec::new();
        for step in 0..4000 {
            let flow = Flow {
                buf_alloc: dice.one_of(&[262_144, 262_144, 0, 1, 5000, u32::MAX]),
                fwd_cnt: dice.one_of(&[0, 0, 1, 1 << 31, u32::MAX]),
                ..Flow::seqpacket(1 + dice.below(3) as u32, PORT)
            };
            let payload = vec![7; dice.one_of(&[0, 0, 1, 100, 5000, 60_000])];
            let mut packet = flow.rw(&payload);
            packet.flags = dice.one_of(&[0, 0, EOM, EOM, EOM | EOR, EOR, u32::MAX]);
            if dice.below(3) == 0 {
                packet.op = dice.below(9) as u16;
            }
            guest.send(&packet);
            while let Some(packet) = guest.poll_packet() {
                if packet.is(Op::Request) && dice.below(3) > 0 {
                    guest.send(&Flow::of(&packet).packet(Op::Response));
                }
            }
            if step % 50 == 0 {
                let program = connect_for_messages(&entry(&daemon));
                write_message(&program, b"CONNECT 1\n");
                program.set_nonblocking(true).unwrap();
                programs.push(program);
            }
            if let Ok((program, _)) = listener.accept() {
                program.set_nonblocking(true).unwrap();
                programs.push(program);
            }
            if programs.len() > 6 {
                programs.remove(dice.below(6) as usize);
            }
            if let Some(program) = programs.get(dice.below(6) as usize) {
                any_deed(program, &mut dice);
            }
        }
        guest.settle();
    }
    daemon.assert_unharmed();
}
