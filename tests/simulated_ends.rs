//! The end of a connection, seen from both sides: which side learns of it first, and that a failure is not taken for a
//! clean end.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use common::daemon::{Daemon, PATIENCE};
use common::sim::guest::RX;
use common::sim::host::{
    FLOW, PORT, assert_closed, assert_same, device, fill, from_guest, from_host, pattern,
    read_exactly, recv_other,
};
use common::sim::packet::{HEADER_LEN, NO_RECEIVE, NO_SEND};
use common::sim::ring::Part;
use common::sim::{Flow, Op, Packet, Setup, SimGuest, Survivor};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::ftruncate;

// --- The guest's RST goes out before the host's socket is closed. Otherwise a guest program that binds the same port as
// --- soon as its peer has seen the end gets EADDRINUSE.

/// Connections per test: a wrong order may show only now and then.
const ROUNDS: u32 = 300;

/// One byte more than the daemon's buffer.
const PAST_CREDIT: usize = 262_145;

/// The state of a stream, as seen by a host program that polls it without sleeping.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// Open, with or without bytes to read.
    Open,
    /// The end of the bytes.
    End,
    /// The daemon has closed its socket; there may be unread bytes.
    HangUp,
}

/// Reads what is available.
fn poll_stream(mut stream: &UnixStream, bytes: &mut Vec<u8>) -> Seen {
    let mut polled = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO).unwrap();
    if polled[0].any().unwrap() {
        return Seen::HangUp;
    }
    let mut piece = [0; 4096];
    match stream.read(&mut piece) {
        Ok(0) => return Seen::End,
        Ok(count) => bytes.extend(&piece[..count]),
        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
    }
    Seen::Open
}

/// Reads until one of `ends`, without sleeping.
#[track_caller]
fn read_until(stream: &UnixStream, ends: &[Seen]) -> Vec<u8> {
    stream.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut bytes = Vec::new();
    while !ends.contains(&poll_stream(stream, &mut bytes)) {
        assert!(Instant::now() < deadline, "the host program sees no end");
    }
    bytes
}

/// Panics unless the RST is in the RX ring already.
#[track_caller]
fn assert_reset_is_there(guest: &mut SimGuest, flow: &Flow) {
    while let Some(packet) = guest.poll_packet() {
        if !packet.is(Op::CreditUpdate) {
            return packet.assert_is(Op::Rst, flow);
        }
    }
    panic!("the host program saw the end before the guest got its RST");
}

/// Waits until the host program sees the end, after the bytes `wanted`. By then the RST must be there.
#[track_caller]
fn assert_reset_comes_first(guest: &mut SimGuest, stream: &UnixStream, flow: &Flow, wanted: &[u8]) {
    let mut got = read_until(stream, &[Seen::End, Seen::HangUp]);
    assert_reset_is_there(guest, flow);
    stream.set_nonblocking(false).unwrap();
    got.extend(read_rest(stream));
    assert_same(&got, wanted);
}

/// Reads to the end, or to the reset due to bytes that the daemon has not read.
fn read_rest(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Err(error) = stream.read_to_end(&mut bytes) {
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    bytes
}

/// Ends connections with the packets of `end`, of which the host program receives `wanted`.
#[track_caller]
fn assert_resets_come_first(wanted: &[u8], end: impl Fn(&Flow) -> Vec<Packet>) {
    let daemon = Daemon::start();
    let setup = Setup {
        tx_payload: PAST_CREDIT,
        ..Setup::default()
    };
    let mut guest = SimGuest::start(&daemon, setup);
    for round in 0..ROUNDS {
        let flow = Flow::new(round, PORT);
        let stream = from_guest(&daemon, &mut guest, &flow);
        end(&flow).iter().for_each(|packet| guest.send(packet));
        assert_reset_comes_first(&mut guest, &stream, &flow, wanted);
    }
}

#[test]
fn a_close_is_confirmed_before_the_host_sees_it() {
    assert_resets_come_first(b"", |flow| vec![flow.shutdown(NO_RECEIVE | NO_SEND)]);
}

#[test]
fn a_close_in_two_steps_is_confirmed_before_the_host_sees_it() {
    let (daemon, mut guest) = device();
    for round in 0..ROUNDS {
        let flow = Flow::new(round, PORT);
        let stream = from_guest(&daemon, &mut guest, &flow);
        guest.send(&flow.shutdown(NO_SEND));
        read_until(&stream, &[Seen::End]);
        guest.send(&flow.shutdown(NO_RECEIVE));
        read_until(&stream, &[Seen::HangUp]);
        assert_reset_is_there(&mut guest, &flow);
    }
}

#[test]
fn a_close_behind_data_is_confirmed_before_the_host_sees_it() {
    let bytes = pattern(1, 30_000);
    assert_resets_come_first(&bytes, |flow| {
        vec![flow.rw(&bytes), flow.shutdown(NO_RECEIVE | NO_SEND)]
    });
}

#[test]
fn a_close_behind_a_flush_is_confirmed_before_the_host_sees_it() {
    let (daemon, mut guest) = device();
    for round in 0..ROUNDS / 2 {
        let flow = Flow::new(round, PORT);
        let stream = from_guest(&daemon, &mut guest, &flow);
        let sent = fill(&mut guest, &flow);
        guest.send(&flow.shutdown(NO_RECEIVE | NO_SEND));
        assert_reset_comes_first(&mut guest, &stream, &flow, &sent);
    }
}

#[test]
fn a_close_by_the_guest_of_a_host_made_connection_is_confirmed_before_the_host_sees_it() {
    let (daemon, mut guest) = device();
    for _ in 0..ROUNDS {
        let (stream, flow, _) = from_host(&daemon, &mut guest, PORT);
        guest.send(&flow.shutdown(NO_RECEIVE | NO_SEND));
        assert_reset_comes_first(&mut guest, &stream, &flow, b"");
    }
}

#[test]
fn a_packet_of_no_known_kind_is_answered_before_the_host_sees_the_end() {
    assert_resets_come_first(b"", |flow| {
        vec![Packet {
            op: 77,
            ..flow.packet(Op::Rst)
        }]
    });
}

#[test]
fn bytes_past_the_credit_are_answered_before_the_host_sees_the_end() {
    assert_resets_come_first(b"", |flow| vec![flow.rw(&[0; PAST_CREDIT])]);
}

#[test]
fn a_request_on_ports_in_use_is_answered_before_the_host_sees_the_end() {
    assert_resets_come_first(b"", |flow| vec![flow.packet(Op::Request)]);
}

#[test]
fn without_rx_buffers_the_host_sees_the_end_all_the_same() {
    let ends: [fn(&Flow) -> Packet; 3] = [
        |flow| flow.shutdown(NO_RECEIVE | NO_SEND),
        |flow| flow.packet(Op::Request),
        |flow| Packet {
            op: 77,
            ..flow.packet(Op::Rst)
        },
    ];
    let daemon = Daemon::start();
    let mut guest = SimGuest::connect(&daemon, Setup::default());
    guest.auto_repost = false;
    guest.start_rings();
    for end in ends {
        guest.post_rx_some(1);
        let stream = from_guest(&daemon, &mut guest, &FLOW);
        assert_eq!(guest.rings[RX].outstanding(), 0);
        guest.send(&end(&FLOW));
        assert_closed(&stream);
        guest.post_rx_some(1);
        guest.recv().assert_is(Op::Rst, &FLOW);
    }
}

// --- A failed receive: the payload part of an RX buffer is in memory whose file was truncated.

/// Truncates the file of the last memory region, and posts buffers whose payload part is there.
fn post_truncated_buffers(guest: &mut SimGuest) {
    let region = guest.memory.regions().last().unwrap();
    let payload = Part {
        addr: region.guest_addr,
        len: 4096,
        write: true,
    };
    ftruncate(region.fd.as_fd(), 0).unwrap();
    for _ in 0..4 {
        let header = Part {
            addr: guest.memory.alloc(HEADER_LEN as u64, 4),
            len: HEADER_LEN as u32,
            write: true,
        };
        guest.post_rx_buffer(vec![header, payload]);
    }
}

/// A guest with one RX buffer, and a memory region that it uses for nothing else.
fn guest_with_one_buffer(daemon: &Daemon) -> SimGuest {
    let setup = Setup {
        regions: vec![2 << 20, 30 << 20, 1 << 20],
        rx_buffers: Some(1),
        ..Setup::default()
    };
    SimGuest::start(daemon, setup)
}

/// Makes the device use the posted buffer.
#[track_caller]
fn use_up_the_buffer(guest: &mut SimGuest) {
    guest.auto_repost = false;
    guest.send(&FLOW.packet(Op::CreditRequest));
    guest.recv().assert_is(Op::CreditUpdate, &FLOW);
    assert_eq!(guest.rings[RX].outstanding(), 0);
}

#[test]
fn a_receive_that_fails_is_a_reset_for_the_guest() {
    let daemon = Survivor::start();
    let mut guest = guest_with_one_buffer(&daemon);
    let mut stream = from_guest(&daemon, &mut guest, &FLOW);
    use_up_the_buffer(&mut guest);
    post_truncated_buffers(&mut guest);
    stream.write_all(b"lost").unwrap();
    recv_other(&mut guest).assert_is(Op::Rst, &FLOW);
    assert_closed(&stream);
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn a_receive_that_fails_takes_nothing_of_what_the_guest_has_sent() {
    let daemon = Survivor::start();
    let mut guest = guest_with_one_buffer(&daemon);
    let mut stream = from_guest(&daemon, &mut guest, &FLOW);
    let sent = fill(&mut guest, &FLOW);
    use_up_the_buffer(&mut guest);
    post_truncated_buffers(&mut guest);
    stream.write_all(b"lost").unwrap();
    recv_other(&mut guest).assert_is(Op::Rst, &FLOW);
    assert_same(&read_exactly(&stream, sent.len()), &sent);
    assert_closed(&stream);
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn a_receive_that_fails_behind_a_half_close_of_the_guest_takes_nothing_either() {
    let daemon = Survivor::start();
    let mut guest = guest_with_one_buffer(&daemon);
    let mut stream = from_guest(&daemon, &mut guest, &FLOW);
    let sent = fill(&mut guest, &FLOW);
    use_up_the_buffer(&mut guest);
    guest.send(&FLOW.shutdown(NO_SEND));
    post_truncated_buffers(&mut guest);
    stream.write_all(b"lost").unwrap();
    recv_other(&mut guest).assert_is(Op::Rst, &FLOW);
    assert_same(&read_exactly(&stream, sent.len()), &sent);
    assert_closed(&stream);
    drop(guest);
    daemon.assert_unharmed();
}
