//! A new daemon takes over: connections of messages, and guests that reach each other.

mod common;

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use common::daemon::GUEST_CID;
use common::handover::{Service, Way};
use common::siblings::flow;
use common::sim::host::{
    PORT, accept, assert_closed, assert_message, assert_moves_bytes, assert_same, assert_serves,
    connect_for_messages, listen_for_messages, pattern, read_message, recv_bytes, recv_other,
    write_message,
};
use common::sim::packet::{NO_RECEIVE, NO_SEND, SEQPACKET};
use common::sim::{Flow, Op, Setup, SimGuest};
use tempfile::TempDir;

/// The guest's port of the connections that it makes.
const GUEST_PORT: u32 = 40_000;

/// The guest's port that its sibling calls.
const SERVICE: u32 = 80;

with_either_way! {
    a_message_that_the_guest_has_not_ended_is_whole
    messages_that_the_host_has_not_read_keep_their_borders
    a_message_that_waits_for_credit_comes_whole
    a_message_that_waits_for_buffers_comes_whole
    half_a_connection_of_messages_goes_on
    a_client_of_messages_in_its_handshake_goes_on
    siblings_in_one_process_go_on
    siblings_across_processes_go_on
    calls_of_siblings_that_wait_for_an_answer_get_it
    siblings_messages_are_whole
    a_sibling_that_does_not_read_loses_nothing
}

fn flow_of_messages() -> Flow {
    Flow::seqpacket(GUEST_PORT, PORT)
}

/// A daemon, with a guest whose driver has messages and whose connections take `room` bytes.
fn device(way: Way, room: u32) -> (Service, SimGuest, UnixStream, Flow) {
    let service = Service::start(way, &[]);
    let setup = Setup {
        buf_alloc: room,
        ..Setup::default().with_messages()
    };
    let mut guest = SimGuest::start(&service, setup);
    let flow = Flow {
        buf_alloc: room,
        ..flow_of_messages()
    };
    let listener = listen_for_messages(&service.host_port_path(PORT));
    guest.send(&flow.packet(Op::Request));
    guest.recv().assert_is(Op::Response, &flow);
    (service, guest, accept(&listener), flow)
}

#[track_caller]
fn assert_moves_messages(guest: &mut SimGuest, program: &UnixStream, flow: &Flow) {
    for packet in flow.message(b"from the guest", 5) {
        guest.send(&packet);
    }
    assert_eq!(read_message(program), b"from the guest");
    write_message(program, b"to the guest");
    assert_message(guest, flow, b"to the guest");
}

fn a_message_that_the_guest_has_not_ended_is_whole(way: Way) {
    let (mut service, mut guest, program, flow) = device(way, 262_144);
    let message = pattern(1, 50_000);
    let packets = flow.message(&message, 1000);
    for (index, packet) in packets.iter().enumerate() {
        // In the daemon, and in the ring.
        if index == 20 {
            guest.wait_tx_done();
            service.hand_over();
        }
        guest.send(packet);
        if index == 40 {
            service.hand_over();
        }
    }
    assert_same(&read_message(&program), &message);
    assert_moves_messages(&mut guest, &program, &flow);
}

fn messages_that_the_host_has_not_read_keep_their_borders(way: Way) {
    let (mut service, mut guest, program, flow) = device(way, 262_144);
    // More than the socket takes.
    let messages: Vec<_> = (0..50)
        .map(|seed| pattern(seed, 4000 + seed as usize))
        .collect();
    for message in &messages {
        flow.message(message, 1500)
            .iter()
            .for_each(|packet| guest.send(packet));
    }
    guest.settle();
    service.hand_over();
    for message in &messages {
        assert_same(&read_message(&program), message);
    }
    guest.settle();
    assert_moves_messages(&mut guest, &program, &flow);
}

fn a_message_that_waits_for_credit_comes_whole(way: Way) {
    let (mut service, mut guest, program, mut flow) = device(way, 1000);
    write_message(&program, &pattern(1, 600));
    assert_message(&mut guest, &flow, &pattern(1, 600));
    for seed in 2..5 {
        write_message(&program, &pattern(seed, 500));
    }
    guest.recv().assert_is(Op::CreditRequest, &flow);
    service.hand_over();
    assert!(guest.settle().iter().all(|packet| !packet.is(Op::Rw)));
    for seed in 2..5 {
        flow.fwd_cnt += if seed == 2 { 600 } else { 500 };
        guest.send(&flow.packet(Op::CreditUpdate));
        let mut got = Vec::new();
        while got.len() < 500 {
            let packet = recv_other(&mut guest);
            if !packet.is(Op::CreditRequest) {
                packet.assert_is(Op::Rw, &flow);
                got.extend(packet.payload);
            }
        }
        assert_same(&got, &pattern(seed, 500));
    }
}

fn a_message_that_waits_for_buffers_comes_whole(way: Way) {
    let service = Service::start(way, &[]);
    let mut service = service;
    let setup = Setup {
        rx_buffers: Some(2),
        ..Setup::default().with_messages()
    };
    let mut guest = SimGuest::start(&service, setup);
    let flow = flow_of_messages();
    let listener = listen_for_messages(&service.host_port_path(PORT));
    guest.send(&flow.packet(Op::Request));
    guest.recv().assert_is(Op::Response, &flow);
    let program = accept(&listener);
    guest.auto_repost = false;
    let messages = [pattern(1, 20_000), pattern(2, 10)];
    messages
        .iter()
        .for_each(|message| write_message(&program, message));
    let mut got = Vec::new();
    for _ in 0..2 {
        let packet = guest.recv();
        packet.assert_is(Op::Rw, &flow);
        assert_eq!(packet.flags, 0);
        got.extend(packet.payload);
    }
    service.hand_over();
    guest.auto_repost = true;
    guest.post_rx();
    loop {
        let packet = recv_other(&mut guest);
        packet.assert_is(Op::Rw, &flow);
        got.extend(packet.payload);
        if packet.flags != 0 {
            break;
        }
    }
    assert_same(&got, &messages[0]);
    assert_message(&mut guest, &flow, &messages[1]);
    assert_moves_messages(&mut guest, &program, &flow);
}

fn half_a_connection_of_messages_goes_on(way: Way) {
    let (mut service, mut guest, program, flow) = device(way, 262_144);
    program.shutdown(Shutdown::Write).unwrap();
    let end = guest.recv();
    end.assert_is(Op::Shutdown, &flow);
    assert_eq!(end.flags, NO_SEND);
    service.hand_over();
    flow.message(b"answer", 3)
        .iter()
        .for_each(|packet| guest.send(packet));
    assert_eq!(read_message(&program), b"answer");
    guest.send(&flow.shutdown(NO_RECEIVE | NO_SEND));
    assert_closed(&program);
    recv_other(&mut guest).assert_is(Op::Rst, &flow);
}

fn a_client_of_messages_in_its_handshake_goes_on(way: Way) {
    let (mut service, mut guest, _program, _) = device(way, 262_144);
    let entry = service.directory().join("vm.vsock_seqpacket");
    let [silent, asked] = [(); 2].map(|()| connect_for_messages(&entry));
    write_message(&asked, b"CONNECT 22\n");
    write_message(&asked, b"behind the line");
    let request = guest.recv();
    assert_eq!(request.kind, SEQPACKET);
    service.hand_over();
    let first = Flow::of(&request);
    guest.send(&first.packet(Op::Response));
    let answer = format!("OK {}\n", first.host_port);
    assert_eq!(read_message(&asked), answer.as_bytes());
    assert_message(&mut guest, &first, b"behind the line");
    write_message(&silent, b"CONNECT 23\n");
    let second = Flow::of(&guest.recv());
    guest.send(&second.packet(Op::Response));
    let answer = format!("OK {}\n", second.host_port);
    assert_eq!(read_message(&silent), answer.as_bytes());
    assert_moves_messages(&mut guest, &silent, &second);
    assert_moves_messages(&mut guest, &asked, &first);
}

// --- Siblings.

/// Two siblings, with the CIDs 4 and 5. Both are of the first daemon, or each has one.
struct Pair {
    first: Service,
    second: Option<Service>,
    _directory: TempDir,
    four: SimGuest,
    five: SimGuest,
}

impl Pair {
    fn in_one_process(way: Way) -> Self {
        let vms = [
            "--vm=guest-cid=4,socket={}/vhost.socket,uds-path={}/vm.vsock",
            "--vm=guest-cid=5,socket={}/vhost5.socket,uds-path={}/vm5.vsock",
        ];
        let first = Service::start_vms(way, &vms);
        Self {
            four: sibling(&first, 4, "vhost.socket"),
            five: sibling(&first, 5, "vhost5.socket"),
            first,
            second: None,
            _directory: TempDir::with_prefix("vsock-test-").unwrap(),
        }
    }

    /// Only the first is handed over.
    fn across_processes(way: Way) -> Self {
        let directory = TempDir::with_prefix("vsock-test-").unwrap();
        let option = format!("--sibling-dir={}", directory.path().display());
        let vms = [4, 5].map(|cid| format!("--guest-cid={cid}"));
        let start = |cid: &str| {
            let paths = ["--socket={}/vhost.socket", "--uds-path={}/vm.vsock"];
            Service::start_vms(way, &[cid, paths[0], paths[1], &option])
        };
        let (first, second) = (start(&vms[0]), start(&vms[1]));
        Self {
            four: sibling(&first, 4, "vhost.socket"),
            five: sibling(&second, 5, "vhost.socket"),
            first,
            second: Some(second),
            _directory: directory,
        }
    }

    fn both(way: Way) -> [Self; 2] {
        [Self::in_one_process(way), Self::across_processes(way)]
    }

    /// A connection from 4 to 5, as each of them sees it.
    #[track_caller]
    fn connect(&mut self, kind: u16) -> (Flow, Flow) {
        let (here, there) = flows(kind);
        self.four.send(&here.packet(Op::Request));
        self.five.recv().assert_is(Op::Request, &there);
        self.five.send(&there.packet(Op::Response));
        self.four.recv().assert_is(Op::Response, &here);
        (here, there)
    }

    #[track_caller]
    fn assert_moves_bytes(&mut self, (here, there): &(Flow, Flow)) {
        let bytes = pattern(1, 2000);
        self.four.send(&here.rw(&bytes));
        assert_same(&recv_bytes(&mut self.five, there, 2000), &bytes);
        self.five.send(&there.rw(&bytes));
        assert_same(&recv_bytes(&mut self.four, here, 2000), &bytes);
    }
}

fn sibling(service: &Service, cid: u64, socket: &str) -> SimGuest {
    let vmm = UnixStream::connect(service.directory().join(socket)).unwrap();
    let setup = Setup {
        cid,
        ..Setup::default().with_messages()
    };
    SimGuest::start_over(vmm, setup)
}

fn flows(kind: u16) -> (Flow, Flow) {
    let of = |from, to| Flow {
        kind,
        ..flow(from, to)
    };
    let (caller, callee) = ((GUEST_CID, GUEST_PORT), (5, SERVICE));
    (of(caller, callee), of(callee, caller))
}

#[track_caller]
fn assert_siblings_go_on(mut pair: Pair) {
    let flows = pair.connect(common::sim::packet::STREAM);
    for _ in 0..3 {
        pair.assert_moves_bytes(&flows);
        pair.first.hand_over();
    }
    if let Some(second) = &mut pair.second {
        second.hand_over();
    }
    pair.assert_moves_bytes(&flows);
    let (here, there) = &flows;
    pair.four.send(&here.shutdown(NO_SEND));
    recv_other(&mut pair.five).assert_is(Op::Shutdown, there);
    pair.first.hand_over();
    pair.five.send(&there.rw(b"last"));
    assert_eq!(recv_bytes(&mut pair.four, here, 4), b"last");
    pair.five.send(&there.packet(Op::Rst));
    recv_other(&mut pair.four).assert_is(Op::Shutdown, here);
    pair.first.hand_over();
    pair.four.send(&here.packet(Op::Rst));
    pair.four.settle();
    assert!(pair.five.settle().is_empty());
    // The ports are free, and the host is reached as before.
    pair.connect(common::sim::packet::STREAM);
    assert_serves(&pair.first, &mut pair.four);
}

fn siblings_in_one_process_go_on(way: Way) {
    assert_siblings_go_on(Pair::in_one_process(way));
}

fn siblings_across_processes_go_on(way: Way) {
    assert_siblings_go_on(Pair::across_processes(way));
}

fn calls_of_siblings_that_wait_for_an_answer_get_it(way: Way) {
    for mut pair in Pair::both(way) {
        let (here, there) = flows(common::sim::packet::STREAM);
        let (refused, refuses) = (
            Flow {
                guest_port: 1,
                ..here.clone()
            },
            Flow {
                host_port: 1,
                ..there.clone()
            },
        );
        // And one the other way.
        let (called, calls) = (flow((4, 2), (5, 2)), flow((5, 2), (4, 2)));
        pair.four.send(&here.packet(Op::Request));
        pair.five.recv().assert_is(Op::Request, &there);
        pair.four.send(&refused.packet(Op::Request));
        pair.five.recv().assert_is(Op::Request, &refuses);
        pair.five.send(&calls.packet(Op::Request));
        pair.four.recv().assert_is(Op::Request, &called);
        pair.first.hand_over();
        assert!(pair.five.settle().is_empty(), "nobody is asked again");
        pair.five.send(&there.packet(Op::Response));
        pair.four.recv().assert_is(Op::Response, &here);
        pair.five.send(&refuses.packet(Op::Rst));
        pair.four.recv().assert_is(Op::Rst, &refused);
        pair.four.send(&called.packet(Op::Response));
        pair.five.recv().assert_is(Op::Response, &calls);
        pair.assert_moves_bytes(&(here, there));
        pair.assert_moves_bytes(&(called, calls));
    }
}

fn siblings_messages_are_whole(way: Way) {
    for mut pair in Pair::both(way) {
        let (here, there) = pair.connect(SEQPACKET);
        let message = pattern(1, 10_000);
        for (index, packet) in here.message(&message, 1000).iter().enumerate() {
            pair.four.send(packet);
            if index == 4 {
                pair.four.wait_tx_done();
                pair.first.hand_over();
            }
        }
        assert_message(&mut pair.five, &there, &message);
        let message = pattern(2, 10_000);
        for (index, packet) in there.message(&message, 1000).iter().enumerate() {
            pair.five.send(packet);
            if index == 4 {
                pair.five.wait_tx_done();
                pair.first.hand_over();
            }
        }
        assert_message(&mut pair.four, &here, &message);
    }
}

fn a_sibling_that_does_not_read_loses_nothing(way: Way) {
    for mut pair in Pair::both(way) {
        let (here, mut there) = flows(common::sim::packet::STREAM);
        there.buf_alloc = 1000;
        pair.four.send(&here.packet(Op::Request));
        pair.five.recv().assert_is(Op::Request, &there);
        pair.five.send(&there.packet(Op::Response));
        pair.four.recv().assert_is(Op::Response, &here);
        let sent = common::sim::host::fill(&mut pair.four, &here);
        let mut got = Vec::new();
        while got.len() < 1000 {
            let packet = recv_other(&mut pair.five);
            if !packet.is(Op::CreditRequest) {
                packet.assert_is(Op::Rw, &there);
                got.extend(packet.payload);
            }
        }
        pair.first.hand_over();
        there.fwd_cnt = 1000;
        pair.five.send(&there.packet(Op::CreditUpdate));
        let missing = sent.len() - got.len();
        let rest = common::handover::take_bytes(&mut pair.five, &mut there, missing);
        got.extend(rest);
        assert_same(&got, &sent);
        pair.four.settle();
        there.buf_alloc = 65_536;
        pair.five.send(&there.packet(Op::CreditUpdate));
        pair.five.settle();
        pair.assert_moves_bytes(&(here, there));
    }
}

#[test]
fn a_host_program_of_one_vm_is_not_disturbed_by_another_vm() {
    let mut pair = Pair::in_one_process(Way::Manager);
    let flows = pair.connect(common::sim::packet::STREAM);
    let program = {
        let path = pair.first.host_port_path(PORT);
        let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
        let flow = Flow::new(1, PORT);
        pair.four.send(&flow.packet(Op::Request));
        pair.four.recv().assert_is(Op::Response, &flow);
        accept(&listener)
    };
    // One of the VMMs goes while nobody serves.
    pair.first.stop();
    drop(pair.five);
    (&program).write_all(b"meanwhile").unwrap();
    pair.first.start_again();
    let flow = Flow::new(1, PORT);
    let mut seen = Vec::new();
    let mut is_over = false;
    while seen.len() < 9 || !is_over {
        let packet = recv_other(&mut pair.four);
        if packet.src_cid == 5 {
            is_over = packet.is(Op::Rst) || packet.is(Op::Shutdown);
            pair.four.send(&flows.0.packet(Op::Rst));
        } else {
            packet.assert_is(Op::Rw, &flow);
            seen.extend(packet.payload);
        }
    }
    assert_eq!(seen, b"meanwhile");
    assert_moves_bytes(&mut pair.four, &program, &flow);
    pair.five = sibling(&pair.first, 5, "vhost5.socket");
    let flows = pair.connect(common::sim::packet::STREAM);
    pair.assert_moves_bytes(&flows);
}
