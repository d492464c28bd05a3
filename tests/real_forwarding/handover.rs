//! A daemon that forwards is replaced by another, or dies. The ports on which it listens stay open.

use super::*;
use crate::common::handover::{Service, Way};
use crate::common::sim::packet::{SEQPACKET, STREAM};

const STREAMS: u32 = 9001;
const MESSAGES: u32 = 9002;

fn start(way: Way) -> (Service, SimGuest) {
    assert_in_guest();
    let service = Service::start_vms(
        way,
        &[
            &format!("--guest-cid={GUEST_CID}"),
            &format!("--forward-cid={LOOPBACK}"),
            &format!("--forward-listen={STREAMS}+{MESSAGES},seqpacket"),
            "--socket={}/vhost.socket",
            // Where the service looks whether the daemon serves.
            "--guest-port=22={}/vm.vsock",
        ],
    );
    let vmm = connect_soon(&service.vhost_socket());
    let guest = SimGuest::start_over(vmm, Setup::default().with_messages());
    (service, guest)
}

/// The guest accepts what a program has opened.
#[track_caller]
fn accept_in_guest(guest: &mut SimGuest) -> Flow {
    let request = guest.recv();
    let flow = Flow::of(&request);
    request.assert_is(Op::Request, &flow);
    guest.send(&flow.packet(Op::Response));
    flow
}

/// The guest is asked for the ports of the programs that connected while no daemon ran.
#[track_caller]
fn assert_have_waited(guest: &mut SimGuest, programs: [&UnixStream; 2]) {
    let mut asked = [(); 2].map(|()| accept_in_guest(guest));
    asked.sort_by_key(|flow| flow.guest_port);
    let expected = [(STREAM, STREAMS), (SEQPACKET, MESSAGES)];
    assert_eq!(
        asked.each_ref().map(|flow| (flow.kind, flow.guest_port)),
        expected
    );
    for (flow, program) in asked.iter().zip(programs) {
        guest.send(&flow.packet(Op::Rst));
        assert_closed(program);
    }
}

#[test]
#[ignore = "runs in a guest"]
fn programs_that_connect_during_a_restart_are_served_after_it() {
    let (mut service, mut guest) = start(Way::Manager);
    let before = connect(STREAMS);
    let flow = accept_in_guest(&mut guest);
    service.stop();
    let meanwhile = [connect(STREAMS), messages::connect_for_messages(MESSAGES)];
    service.start_again();
    assert_have_waited(&mut guest, meanwhile.each_ref());
    assert_moves_bytes(&mut guest, &before, &flow);
}

#[test]
#[ignore = "runs in a guest"]
fn programs_that_connect_after_a_crash_are_served_by_the_next_daemon() {
    let (mut service, mut guest) = start(Way::Manager);
    let before = connect(STREAMS);
    let flow = accept_in_guest(&mut guest);
    // The daemon has seen the answer.
    assert_moves_bytes(&mut guest, &before, &flow);
    service.kill();
    assert_closed(&before);
    let meanwhile = [connect(STREAMS), messages::connect_for_messages(MESSAGES)];
    service.start_again();
    recv_other(&mut guest).assert_is(Op::Rst, &flow);
    assert_have_waited(&mut guest, meanwhile.each_ref());
    // And so it goes on.
    service.hand_over();
    let after = connect(STREAMS);
    let flow = accept_in_guest(&mut guest);
    assert_moves_bytes(&mut guest, &after, &flow);
}

#[test]
#[ignore = "runs in a guest"]
fn no_program_is_refused_while_a_successor_takes_over() {
    let (mut service, guest) = start(Way::Path);
    let stack = GuestStack::new(guest);
    stack.listen(STREAMS);
    scope(|scope| {
        let upgrades = scope.spawn(|| (0..5).for_each(|_| service.hand_over()));
        while !upgrades.is_finished() {
            let mut program = connect(STREAMS);
            stack.accept(STREAMS).write_all(b"answer").unwrap();
            program.read_exact(&mut [0; 6]).unwrap();
        }
    });
}
