//! A daemon dies under a service manager. The next one serves the VM: only the connections are lost, and both sides learn of it.
//! What a guest has sent and not got back is done once more, so most tests wait for that before a crash.

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread::spawn;
use std::time::Instant;

use common::daemon::{PATIENCE, eventually};
use common::handover::{Service, Way};
use common::siblings::flow;
use common::sim::guest::{RX, TX};
use common::sim::host::{
    FLOW, PORT, accept, assert_closed, assert_moves_bytes, assert_serves, connect_for_messages,
    dial, from_guest, from_host, listen, listen_for_messages, pattern, read_exactly, read_ok,
    recv_other, send_from, write_message,
};
use common::sim::packet::NO_SEND;
use common::sim::ring::{Indirect, Part, wait_readable};
use common::sim::{Flow, GuestStack, Op, Setup, SimGuest};
use nix::sys::signal::Signal;

fn start() -> Service {
    Service::start(Way::Manager, &[])
}

fn device() -> (Service, SimGuest) {
    device_as(Setup::default())
}

fn device_as(setup: Setup) -> (Service, SimGuest) {
    let service = start();
    let guest = SimGuest::start(&service, setup);
    (service, guest)
}

/// The guest gets one RST for each of these connections, in any order, and nothing else.
#[track_caller]
fn assert_reset_once(guest: &mut SimGuest, flows: &[Flow]) {
    let mut missing = flows.to_vec();
    while !missing.is_empty() {
        let packet = guest.recv();
        let place = missing.iter().position(|flow| flow.owns(&packet));
        let place = place.unwrap_or_else(|| panic!("of no connection, or the second: {packet:?}"));
        packet.assert_is(Op::Rst, &missing.swap_remove(place));
    }
    let more = guest.settle();
    assert!(more.is_empty(), "{more:?}");
}

/// How many descriptors are stored.
fn count(service: &Service) -> usize {
    service.manager().stored().values().sum()
}

/// A connection of every kind, and what its host program has.
fn connect_in_every_way(service: &Service, guest: &mut SimGuest) -> Vec<(UnixStream, Flow)> {
    let by_guest = from_guest(service, guest, &FLOW);
    let (by_host, host_flow, _) = from_host(service, guest, 22);
    let half = Flow::new(1000, PORT + 1);
    let half_closed = from_guest(service, guest, &half);
    guest.send(&half.shutdown(NO_SEND));
    assert_closed(&half_closed);
    let messages = Flow::seqpacket(1001, PORT + 2);
    let listener = listen_for_messages(&service.host_port_path(PORT + 2));
    guest.send(&messages.packet(Op::Request));
    guest.recv().assert_is(Op::Response, &messages);
    let of_messages = accept(&listener);
    let unanswered = dial(service, 23);
    let asked = Flow::of(&guest.recv());
    let client = connect_for_messages(&service.directory().join("vm.vsock_seqpacket"));
    write_message(&client, b"CONNECT 24\n");
    let asked_for_messages = Flow::of(&guest.recv());
    vec![
        (by_guest, FLOW),
        (by_host, host_flow),
        (half_closed, half),
        (of_messages, messages),
        (unanswered, asked),
        (client, asked_for_messages),
    ]
}

#[test]
fn each_connection_is_reset_and_the_vm_goes_on() {
    let (mut service, mut guest) = device_as(Setup::default().with_messages());
    for _ in 0..3 {
        let connections = connect_in_every_way(&service, &mut guest);
        let (programs, flows): (Vec<_>, Vec<_>) = connections.into_iter().unzip();
        guest.wait_tx_done();
        service.kill();
        programs.iter().for_each(assert_closed);
        service.start_again();
        assert_reset_once(&mut guest, &flows);
        assert_serves(&service, &mut guest);
        // Their ports are free.
        let program = from_guest(&service, &mut guest, &FLOW);
        assert_moves_bytes(&mut guest, &program, &FLOW);
        guest.send(&FLOW.packet(Op::Rst));
        assert_closed(&program);
    }
    assert_eq!(service.number("connections", ""), 0);
}

#[test]
fn connections_that_ended_before_are_not_reset() {
    let (mut service, mut guest) = device();
    let stays = Flow::new(1, PORT);
    let program = from_guest(&service, &mut guest, &stays);
    for port in 2..300 {
        let flow = Flow::new(port, PORT);
        let program = from_guest(&service, &mut guest, &flow);
        if port % 2 == 0 {
            guest.send(&flow.packet(Op::Rst));
            assert_closed(&program);
        } else {
            drop(program);
            recv_other(&mut guest).assert_is(Op::Shutdown, &flow);
            guest.send(&flow.packet(Op::Rst));
        }
    }
    service.wait_for_connections(1);
    guest.wait_tx_done();
    service.crash();
    assert_closed(&program);
    assert_reset_once(&mut guest, &[stays]);
    assert_serves(&service, &mut guest);
}

#[test]
fn many_connections_are_reset() {
    let (mut service, mut guest) = device();
    let listener = listen(&service, PORT);
    let flows: Vec<_> = (0..300).map(|port| Flow::new(port, PORT)).collect();
    let mut programs = Vec::new();
    for flow in &flows {
        guest.send(&flow.packet(Op::Request));
        guest.recv().assert_is(Op::Response, flow);
        programs.push(accept(&listener));
    }
    guest.wait_tx_done();
    service.crash();
    programs.iter().for_each(assert_closed);
    assert_reset_once(&mut guest, &flows);
    assert_serves(&service, &mut guest);
}

#[test]
fn crashes_in_a_row_leave_nothing_behind() {
    let (mut service, mut guest) = device();
    // The first has made the session itself.
    guest.wait_tx_done();
    service.crash();
    let stored = count(&service);
    for signal in [Signal::SIGKILL, Signal::SIGSYS, Signal::SIGABRT] {
        let program = from_guest(&service, &mut guest, &FLOW);
        guest.wait_tx_done();
        service.signal(signal);
        service.daemon().wait_exit();
        service.kill_and_start_some(3);
        assert_closed(&program);
        assert_reset_once(&mut guest, &[FLOW]);
        assert_serves(&service, &mut guest);
        assert_eq!(count(&service), stored);
    }
    service.hand_over();
    assert_serves(&service, &mut guest);
    guest.wait_tx_done();
    service.crash();
    assert_serves(&service, &mut guest);
    assert_eq!(count(&service), stored);
}

#[test]
fn a_guest_without_buffers_gets_its_resets_later() {
    let setup = Setup {
        rx_buffers: Some(1),
        ..Setup::default()
    };
    let (mut service, mut guest) = device_as(setup);
    let flows = [1, 2, 3].map(|port| Flow::new(port, PORT));
    let programs = flows
        .each_ref()
        .map(|flow| from_guest(&service, &mut guest, flow));
    guest.auto_repost = false;
    // The answer takes the only buffer.
    let refused = Flow::new(9, PORT + 9);
    guest.send(&refused.packet(Op::Request));
    guest.recv().assert_is(Op::Rst, &refused);
    // Nor does the reset of this one find a buffer before the crash.
    let pending = Flow::new(10, PORT + 9);
    guest.send(&pending.packet(Op::Request));
    guest.wait_tx_done();
    service.crash();
    programs.iter().for_each(assert_closed);
    service.crash();
    assert_eq!(guest.rings[RX].outstanding(), 0);
    guest.auto_repost = true;
    guest.post_rx();
    let all = [&flows[..], &[pending]].concat();
    assert_reset_once(&mut guest, &all);
    assert_serves(&service, &mut guest);
}

#[test]
fn under_load_only_connections_are_lost() {
    let mut service = start();
    let guest = GuestStack::new(SimGuest::start(&service, Setup::default()));
    guest.listen(22);
    for _ in 0..5 {
        let listener = listen(&service, PORT);
        let mut ends = Vec::new();
        for _ in 0..3 {
            let stream = guest.connect(PORT).unwrap();
            ends.push((stream, accept(&listener)));
            let client = dial(&service, 22);
            read_ok(&client);
            ends.push((guest.accept(22), client));
        }
        let before = service.number("payload_bytes_total", "");
        let mut threads = Vec::new();
        for (stream, program) in &ends {
            let bytes = pattern(1, 100_000);
            let copy = bytes.clone();
            let (mut writer, mut reader) = (stream.handle(), stream.handle());
            let (host_writer, host_reader) =
                (program.try_clone().unwrap(), program.try_clone().unwrap());
            // Each of them ends with the connection.
            threads.push(spawn(move || while writer.write_all(&bytes).is_ok() {}));
            threads.push(spawn(
                move || {
                    while (&host_writer).write_all(&copy).is_ok() {}
                },
            ));
            threads.push(spawn(move || {
                while reader.read(&mut [0; 65_536]).is_ok_and(|count| count > 0) {}
            }));
            threads.push(spawn(move || {
                let mut piece = [0; 65_536];
                while (&host_reader).read(&mut piece).is_ok_and(|count| count > 0) {}
            }));
        }
        eventually("bytes flow", || {
            service.number("payload_bytes_total", "") > before + 1_000_000
        });
        service.crash();
        ends.iter().for_each(|(stream, _)| stream.wait_gone());
        for thread in threads {
            thread.join().unwrap();
        }
        eventually("nothing is left", || {
            service.number("connections", "") == 0 && guest.open_connections() == 0
        });
    }
}

#[test]
fn what_lies_in_the_ring_is_done_without_a_kick_and_interrupts_come() {
    let (mut service, mut guest) = device();
    let listener = listen(&service, PORT);
    service.kill();
    let (layout, indirect) = (guest.setup.tx, guest.setup.indirect);
    assert!(guest.try_send(&FLOW.packet(Op::Request), layout, indirect));
    for index in [RX, TX] {
        guest.rings[index].drain_call();
    }
    // One that was due may be lost with the daemon: each ring gets one, whatever the driver asked for.
    service.start_again();
    let deadline = Instant::now() + PATIENCE;
    for index in [RX, TX] {
        let call = guest.rings[index].call_fd.as_fd();
        assert!(wait_readable(call, deadline), "no interrupt of {index}");
    }
    guest.recv().assert_is(Op::Response, &FLOW);
    assert_moves_bytes(&mut guest, &accept(&listener), &FLOW);
}

#[test]
fn a_guest_with_an_event_ring_is_told_of_the_reset() {
    const EVENTS: usize = 2;
    let (mut service, mut guest) = device_as(Setup {
        queues: 3,
        ..Setup::default()
    });
    let program = from_guest(&service, &mut guest, &FLOW);
    for round in 0..3 {
        let addr = guest.memory.alloc(16, 8);
        guest.memory.write(addr, &[0xee; 16]);
        let part = Part {
            addr,
            len: 16,
            write: true,
        };
        guest.rings[EVENTS].add(&[part], Indirect::No).unwrap();
        guest.rings[EVENTS].kick_if_needed();
        guest.settle();
        guest.wait_tx_done();
        service.crash();
        assert!(guest.rings[EVENTS].wait_used(PATIENCE), "no event");
        assert_eq!(guest.rings[EVENTS].pop_used().unwrap().1, 4);
        assert_eq!(guest.memory.read(addr, 4), [0; 4]);
        if round == 0 {
            assert_closed(&program);
            assert_reset_once(&mut guest, &[FLOW]);
        }
    }
    assert_serves(&service, &mut guest);
}

#[test]
fn a_paused_guest_resumes_after_a_crash() {
    let (mut service, mut guest) = device();
    let program = from_guest(&service, &mut guest, &FLOW);
    guest.stop_rings();
    guest.wait_tx_done();
    service.crash();
    assert_closed(&program);
    guest.wait_tx_done();
    service.crash();
    guest.start_rings();
    assert_reset_once(&mut guest, &[FLOW]);
    assert_serves(&service, &mut guest);
    // And one that pauses after it.
    guest.wait_tx_done();
    service.crash();
    guest.stop_rings();
    guest.start_rings();
    assert_serves(&service, &mut guest);
}

#[test]
fn a_guest_whose_rings_do_not_run_yet_starts_after_a_crash() {
    let mut service = start();
    let mut guest = SimGuest::connect(&service, Setup::default());
    // The answer to a message comes before what it has changed is stored, and that to the next one behind.
    guest.frontend.features();
    service.crash();
    guest.post_rx();
    guest.start_ring(RX as u32);
    guest.frontend.features();
    service.crash();
    guest.start_ring(TX as u32);
    for index in [RX, TX] {
        guest.frontend.set_vring_enable(index as u32, true);
    }
    guest.settle();
    assert_serves(&service, &mut guest);
}

#[test]
fn a_broken_ring_is_served_no_more_than_before() {
    let (mut service, mut guest) = device();
    let ring = &mut guest.rings[TX];
    ring.set_avail_idx(ring.avail_idx().wrapping_add(9999));
    ring.kick();
    assert!(guest.rings[TX].wait_error(PATIENCE));
    service.crash();
    for index in 0..2 {
        guest.frontend.vring_base(index);
    }
    guest.restart_fresh();
    guest.settle();
    assert_serves(&service, &mut guest);
    service.assert_idle();
}

#[test]
fn regions_that_came_one_by_one_are_there_after_a_crash() {
    let (mut service, mut guest) = device_as(Setup {
        regions: vec![2 << 20, 16 << 20, 64 << 10, 64 << 10],
        plugged_later: 2,
        mem_slots: true,
        ..Setup::default()
    });
    let memory = guest.memory.clone();
    let regions = memory.regions();
    let before = count(&service);
    guest.frontend.add_mem_reg(&regions[2]);
    guest.frontend.add_mem_reg(&regions[3]);
    eventually("the regions are stored", || count(&service) == before + 2);
    guest.frontend.rem_mem_reg(&regions[2]);
    eventually("no region is kept alive", || count(&service) == before + 1);
    guest.wait_tx_done();
    service.crash();
    let program = from_guest(&service, &mut guest, &FLOW);
    send_from(&mut guest, 3, &FLOW, b"from a region");
    assert_eq!(read_exactly(&program, 13), b"from a region");
    guest.frontend.add_mem_reg(&regions[2]);
    guest.frontend.rem_mem_reg(&regions[3]);
    guest.frontend.features();
    guest.wait_tx_done();
    service.crash();
    assert_reset_once(&mut guest, &[FLOW]);
    assert_ne!(guest.frontend.try_rem_mem_reg(&regions[3]), 0);
    guest.frontend.rem_mem_reg(&regions[2]);
    assert_serves(&service, &mut guest);
    eventually("an old region is gone", || count(&service) == before);
}

// --- What is stored goes when the VMM goes.

/// What is stored when no VMM is there.
fn without_vmm() -> (Service, BTreeMap<String, usize>) {
    let service = start();
    let stored = service.manager().stored();
    (service, stored)
}

#[test]
fn nothing_of_a_vmm_that_has_gone_is_stored() {
    let (mut service, nothing) = without_vmm();
    for _ in 0..3 {
        let mut guest = SimGuest::start(&service, Setup::default());
        assert_serves(&service, &mut guest);
        eventually("something is stored", || {
            service.manager().stored() != nothing
        });
        drop(guest);
        eventually("an empty store", || service.manager().stored() == nothing);
    }
    let guest = SimGuest::start(&service, Setup::default());
    service.crash();
    drop(guest);
    eventually("an empty store", || service.manager().stored() == nothing);
    service.crash();
    assert_eq!(service.manager().stored(), nothing);
    assert_serves(&service, &mut SimGuest::start(&service, Setup::default()));
}

#[test]
fn a_vmm_that_dies_while_no_daemon_is_there_is_forgotten() {
    let (mut service, nothing) = without_vmm();
    let mut guest = SimGuest::start(&service, Setup::default());
    let program = from_guest(&service, &mut guest, &FLOW);
    service.kill();
    assert_ne!(service.manager().stored(), nothing);
    drop(guest);
    assert_closed(&program);
    service.start_again();
    eventually("an empty store", || service.manager().stored() == nothing);
    assert_eq!(service.number("vmm_connected", ""), 0);
    assert_serves(&service, &mut SimGuest::start(&service, Setup::default()));
}

#[test]
fn eventfds_that_are_replaced_do_not_add_up() {
    let (mut service, mut guest) = device();
    let before = count(&service);
    for _ in 0..20 {
        guest.stop_rings();
        guest.start_rings();
        guest.frontend.set_mem_table(&guest.memory);
    }
    guest.frontend.features();
    assert_eq!(count(&service), before);
    service.crash();
    assert_serves(&service, &mut guest);
}

#[test]
fn an_orderly_stop_leaves_nothing_but_what_the_successor_takes() {
    let (mut service, mut guest) = device();
    let before = count(&service);
    service.stop();
    let stored = service.manager().stored();
    let is_parcel = |name: &String| common::manager::is_parcel(name);
    assert!(stored.keys().all(is_parcel), "{stored:?}");
    service.start_again();
    assert_eq!(count(&service), before);
    assert_serves(&service, &mut guest);
}

// --- Several VMs.

#[test]
fn all_vms_of_a_process_go_on() {
    let vms = [
        "--vm=guest-cid=4,socket={}/vhost.socket,uds-path={}/vm.vsock",
        "--vm=guest-cid=5,socket={}/vhost5.socket,uds-path={}/vm5.vsock",
        "--vm=guest-cid=6,socket={}/vhost6.socket,uds-path={}/vm6.vsock",
    ];
    let mut service = Service::start_vms(Way::Manager, &vms);
    let vmm = UnixStream::connect(service.directory().join("vhost5.socket")).unwrap();
    let setup = Setup {
        cid: 5,
        ..Setup::default()
    };
    let mut four = SimGuest::start(&service, Setup::default());
    let mut five = SimGuest::start_over(vmm, setup);
    let program = from_guest(&service, &mut four, &FLOW);
    let (here, there) = (flow((4, 1000), (5, 80)), flow((5, 80), (4, 1000)));
    four.send(&here.packet(Op::Request));
    five.recv().assert_is(Op::Request, &there);
    five.send(&there.packet(Op::Response));
    four.recv().assert_is(Op::Response, &here);
    four.wait_tx_done();
    five.wait_tx_done();
    service.crash();
    assert_closed(&program);
    assert_reset_once(&mut four, &[FLOW, here.clone()]);
    assert_reset_once(&mut five, std::slice::from_ref(&there));
    four.send(&here.packet(Op::Request));
    five.recv().assert_is(Op::Request, &there);
    assert_serves(&service, &mut four);
}

#[test]
fn a_sibling_in_another_process_sees_the_end() {
    let directory = tempfile::TempDir::with_prefix("vsock-test-").unwrap();
    let option = format!("--sibling-dir={}", directory.path().display());
    let start = |cid: &str| {
        let paths = ["--socket={}/vhost.socket", "--uds-path={}/vm.vsock"];
        Service::start_vms(Way::Manager, &[cid, paths[0], paths[1], &option])
    };
    let (mut first, second) = (start("--guest-cid=4"), start("--guest-cid=5"));
    let mut four = SimGuest::start(&first, Setup::default());
    let setup = Setup {
        cid: 5,
        ..Setup::default()
    };
    let mut five = SimGuest::start(&second, setup);
    let (here, there) = (flow((4, 1000), (5, 80)), flow((5, 80), (4, 1000)));
    for _ in 0..2 {
        four.send(&here.packet(Op::Request));
        five.recv().assert_is(Op::Request, &there);
        five.send(&there.packet(Op::Response));
        four.recv().assert_is(Op::Response, &here);
        four.wait_tx_done();
        first.crash();
        assert_reset_once(&mut four, std::slice::from_ref(&here));
        let end = recv_other(&mut five);
        assert!(end.is(Op::Rst) || end.is(Op::Shutdown), "{end:?}");
        five.send(&there.packet(Op::Rst));
        five.settle();
    }
}
