//! A new daemon takes over the session of a VMM: its socket, memory and rings, whatever state they are in.

mod common;

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use common::daemon::{Daemon, PATIENCE, eventually};
use common::handover::{Service, Way};
use common::sim::guest::{RX, TX};
use common::sim::host::{
    FLOW, assert_closed, assert_moves_bytes, assert_same, assert_serves, from_guest, from_host,
    read_exactly, recv_bytes, send_from,
};
use common::sim::ring::{Indirect, Part, feature};
use common::sim::vhost_user::{Frontend, Request};
use common::sim::{Op, Setup, SimGuest};
use nix::sys::eventfd::{EfdFlags, EventFd};

with_either_way! {
    a_daemon_without_a_vmm_hands_over
    guests_of_every_kind_go_on
    a_vmm_in_the_midst_of_its_negotiation_goes_on
    a_paused_guest_resumes
    a_guest_is_paused_after_a_hand_over
    a_guest_boots_again_after_a_hand_over
    a_device_that_was_reset_is_handed_over
    a_broken_ring_stays_broken_and_starts_again
    half_a_message_is_completed
    half_a_message_that_has_a_descriptor_is_completed
    regions_go_on_and_change
    a_call_that_is_replaced_is_used
    a_reset_of_the_transport_that_waits_for_a_buffer_comes
    a_vmm_that_comes_during_a_hand_over_is_served
    a_vmm_that_goes_during_a_hand_over_is_gone
    several_vms_one_of_which_has_no_vmm
    a_successor_has_no_more_than_a_fresh_daemon
    a_hand_over_of_nothing_after_one_of_all
}

fn device(way: Way) -> (Service, SimGuest) {
    device_as(way, Setup::default())
}

fn device_as(way: Way, setup: Setup) -> (Service, SimGuest) {
    let service = Service::start(way, &[]);
    let guest = SimGuest::start(&service, setup);
    (service, guest)
}

/// Another VMM is served when this one has gone.
#[track_caller]
fn assert_serves_another(service: &Service, guest: SimGuest) {
    drop(guest);
    assert_serves(service, &mut SimGuest::start(service, Setup::default()));
}

fn a_daemon_without_a_vmm_hands_over(way: Way) {
    let mut service = Service::start(way, &[]);
    service.hand_over();
    service.hand_over();
    let mut guest = SimGuest::start(&service, Setup::default());
    assert_serves(&service, &mut guest);
    service.hand_over();
    assert_serves(&service, &mut guest);
    assert_serves_another(&service, guest);
}

fn guests_of_every_kind_go_on(way: Way) {
    let with = |features| Setup {
        features,
        ..Setup::default()
    };
    let setups = [
        with(0),
        with(feature::EVENT_IDX),
        with(feature::EVENT_IDX | feature::IN_ORDER),
        Setup {
            queues: 3,
            ..Setup::default()
        },
        Setup {
            protocol_features: false,
            ..Setup::default()
        },
        Setup {
            indirect: Indirect::Whole,
            rx: vec![44, 4096],
            ..Setup::default()
        },
        Setup::default().with_borders(),
        Setup {
            mem_slots: true,
            ..Setup::default()
        },
    ];
    let mut service = Service::start(way, &[]);
    for setup in setups {
        let mut guest = SimGuest::start(&service, setup);
        let program = from_guest(&service, &mut guest, &FLOW);
        for _ in 0..2 {
            service.hand_over();
            assert_moves_bytes(&mut guest, &program, &FLOW);
            assert_serves(&service, &mut guest);
        }
        drop(guest);
        assert_closed(&program);
    }
}

fn a_vmm_in_the_midst_of_its_negotiation_goes_on(way: Way) {
    let mut service = Service::start(way, &[]);
    let vmm = Frontend::connect(&service.vhost_socket());
    vmm.set_owner();
    service.hand_over();
    let offered = vmm.features();
    assert_ne!(offered & feature::VERSION_1, 0);
    drop(vmm);
    let mut guest = SimGuest::connect(&service, Setup::default());
    service.hand_over();
    guest.post_rx();
    guest.start_ring(RX as u32);
    service.hand_over();
    guest.start_ring(TX as u32);
    guest.frontend.set_vring_enable(RX as u32, true);
    service.hand_over();
    guest.frontend.set_vring_enable(TX as u32, true);
    guest.settle();
    assert_serves(&service, &mut guest);
    assert_serves_another(&service, guest);
}

fn a_paused_guest_resumes(way: Way) {
    let (mut service, mut guest) = device(way);
    let program = from_guest(&service, &mut guest, &FLOW);
    guest.stop_rings();
    (&program).write_all(b"while it is paused").unwrap();
    service.hand_over();
    service.hand_over();
    guest.start_rings();
    let got = recv_bytes(&mut guest, &FLOW, 18);
    assert_same(&got, b"while it is paused");
    assert_moves_bytes(&mut guest, &program, &FLOW);
    assert_serves(&service, &mut guest);
}

fn a_guest_is_paused_after_a_hand_over(way: Way) {
    let (mut service, mut guest) = device(way);
    let program = from_guest(&service, &mut guest, &FLOW);
    service.hand_over();
    // The base is the used index.
    guest.stop_rings();
    service.hand_over();
    guest.start_rings();
    assert_moves_bytes(&mut guest, &program, &FLOW);
    // A ring that is not enabled is not served.
    guest.frontend.set_vring_enable(TX as u32, false);
    service.hand_over();
    let (layout, indirect) = (guest.setup.tx, guest.setup.indirect);
    guest.try_send(&FLOW.rw(b"later"), layout, indirect);
    guest.rings[TX].kick();
    guest.frontend.features();
    service.hand_over();
    guest.frontend.set_vring_enable(TX as u32, true);
    assert_eq!(common::sim::host::read_exactly(&program, 5), b"later");
    assert_serves(&service, &mut guest);
}

fn a_guest_boots_again_after_a_hand_over(way: Way) {
    let (mut service, mut guest) = device(way);
    let program = from_guest(&service, &mut guest, &FLOW);
    service.hand_over();
    guest.stop_rings();
    guest.restart_fresh();
    guest.settle();
    // Whether it is the same driver, only its packets tell.
    guest.send(&FLOW.packet(Op::Rst));
    assert_closed(&program);
    service.hand_over();
    assert_serves(&service, &mut guest);
    guest.reconnect(&service);
    service.hand_over();
    guest.start_rings();
    guest.settle();
    assert_serves(&service, &mut guest);
}

fn a_device_that_was_reset_is_handed_over(way: Way) {
    let (mut service, mut guest) = device(way);
    let program = from_guest(&service, &mut guest, &FLOW);
    guest.stop_rings();
    guest.frontend.reset_device();
    assert_closed(&program);
    service.hand_over();
    // A VMM configures everything again.
    guest.frontend.set_features(guest.features);
    guest.frontend.set_mem_table(&guest.memory);
    guest.restart_fresh();
    guest.settle();
    assert_serves(&service, &mut guest);
}

fn a_broken_ring_stays_broken_and_starts_again(way: Way) {
    let (mut service, mut guest) = device(way);
    let program = from_guest(&service, &mut guest, &FLOW);
    let ring = &mut guest.rings[TX];
    ring.set_avail_idx(ring.avail_idx().wrapping_add(9999));
    ring.kick();
    assert!(guest.rings[TX].wait_error(PATIENCE));
    service.hand_over();
    // The other direction does not depend on it.
    (&program).write_all(b"to the guest").unwrap();
    let got = recv_bytes(&mut guest, &FLOW, 12);
    assert_same(&got, b"to the guest");
    for index in 0..2 {
        guest.frontend.vring_base(index);
    }
    guest.restart_fresh();
    guest.settle();
    assert_serves(&service, &mut guest);
}

fn half_a_message_is_completed(way: Way) {
    let (mut service, mut guest) = device(way);
    // GET_VRING_BASE of the event ring, which does not run.
    let message = [11_u32, 1, 8, 2, 0].map(u32::to_le_bytes).concat();
    for sent in [1, 8, 11, 12, 13, 19] {
        guest.frontend.send_raw(&message[..sent], &[]);
        service.hand_over();
        guest.frontend.send_raw(&message[sent..], &[]);
        let reply = guest.frontend.reply(Request::GetVringBase);
        assert_eq!(reply[..4], 2_u32.to_le_bytes());
        assert_serves(&service, &mut guest);
    }
    // In two hand-overs.
    guest.frontend.send_raw(&message[..5], &[]);
    service.hand_over();
    guest.frontend.send_raw(&message[5..15], &[]);
    service.hand_over();
    guest.frontend.send_raw(&message[15..], &[]);
    guest.frontend.reply(Request::GetVringBase);
    assert_serves(&service, &mut guest);
}

fn half_a_message_that_has_a_descriptor_is_completed(way: Way) {
    let (mut service, mut guest) = device(way);
    let request = Request::SetVringCall;
    let head = [request as u32, 1 | 8, 8].map(u32::to_le_bytes).concat();
    let message = [head, (RX as u64).to_le_bytes().to_vec()].concat();
    for sent in [1, 12, 15] {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let call = EventFd::from_flags(flags).unwrap();
        guest.frontend.send_raw(&message[..sent], &[call.as_fd()]);
        service.hand_over();
        guest.frontend.send_raw(&message[sent..], &[]);
        assert_eq!(guest.frontend.reply(request), [0; 8]);
        guest.rings[RX].call_fd = call;
        assert_serves(&service, &mut guest);
    }
}

fn regions_go_on_and_change(way: Way) {
    for mem_slots in [false, true] {
        let (mut service, mut guest) = device_as(
            way,
            Setup {
                regions: vec![2 << 20, 16 << 20, 64 << 10, 64 << 10, 64 << 10],
                plugged_later: 3,
                mem_slots,
                ..Setup::default()
            },
        );
        let memory = guest.memory.clone();
        let regions = memory.regions();
        guest.frontend.add_mem_reg(&regions[2]);
        guest.frontend.add_mem_reg(&regions[3]);
        let program = from_guest(&service, &mut guest, &FLOW);
        service.hand_over();
        assert_moves_bytes(&mut guest, &program, &FLOW);
        // The device reads from all that it had, and from those that come later.
        guest.frontend.add_mem_reg(&regions[4]);
        for region in 2..regions.len() {
            send_from(&mut guest, region, &FLOW, b"from a region");
            assert_eq!(read_exactly(&program, 13), b"from a region");
        }
        // A region of the predecessor's is known, and twice is once too often.
        guest.frontend.rem_mem_reg(&regions[2]);
        assert_ne!(guest.frontend.try_rem_mem_reg(&regions[2]), 0);
        assert_ne!(guest.frontend.try_add_mem_reg(&regions[3]), 0);
        service.hand_over();
        guest.frontend.add_mem_reg(&regions[2]);
        assert_moves_bytes(&mut guest, &program, &FLOW);
        assert_serves_another(&service, guest);
    }
}

fn a_call_that_is_replaced_is_used(way: Way) {
    let (mut service, mut guest) = device(way);
    service.hand_over();
    for index in [RX, TX] {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let [call, kick] = [(); 2].map(|()| EventFd::from_flags(flags).unwrap());
        let frontend = &guest.frontend;
        frontend.set_vring_fd(Request::SetVringCall, index as u32, call.as_fd());
        frontend.set_vring_fd(Request::SetVringKick, index as u32, kick.as_fd());
        (guest.rings[index].call_fd, guest.rings[index].kick_fd) = (call, kick);
    }
    assert_serves(&service, &mut guest);
    service.hand_over();
    assert_serves(&service, &mut guest);
}

fn a_reset_of_the_transport_that_waits_for_a_buffer_comes(way: Way) {
    const EVENTS: usize = 2;
    let setup = Setup {
        queues: 3,
        ..Setup::default()
    };
    let mut service = Service::start(way, &[]);
    let mut guest = SimGuest::connect(&service, setup);
    let state = br#"{"version":1,"guest_cid":4}"#;
    assert_eq!(guest.frontend.load_state(state), 0);
    guest.post_rx();
    guest.start_rings();
    guest.settle();
    service.hand_over();
    assert_eq!(guest.rings[EVENTS].device_used_idx(), 0);
    let addr = guest.memory.alloc(16, 8);
    guest.memory.write(addr, &[0xee; 16]);
    let part = Part {
        addr,
        len: 16,
        write: true,
    };
    for _ in 0..2 {
        guest.rings[EVENTS].add(&[part], Indirect::No).unwrap();
    }
    guest.rings[EVENTS].kick_if_needed();
    assert!(guest.rings[EVENTS].wait_used(PATIENCE), "no event");
    assert_eq!(guest.rings[EVENTS].pop_used().unwrap().1, 4);
    assert_eq!(guest.memory.read(addr, 4), [0; 4]);
    // Once.
    service.hand_over();
    guest.settle();
    assert_eq!(guest.rings[EVENTS].device_used_idx(), 1);
}

fn a_vmm_that_comes_during_a_hand_over_is_served(way: Way) {
    let mut service = Service::start(way, &[]);
    let path = service.vhost_socket();
    let vmm = if way == Way::Manager {
        service.stop();
        let vmm = UnixStream::connect(path).unwrap();
        service.start_again();
        vmm
    } else {
        let successor = service.spawn_successor();
        let vmm = UnixStream::connect(path).unwrap();
        service.expect_successor(successor);
        vmm
    };
    let mut guest = SimGuest::start_over(vmm, Setup::default());
    assert_serves(&service, &mut guest);
}

fn a_vmm_that_goes_during_a_hand_over_is_gone(way: Way) {
    let (mut service, mut guest) = device(way);
    let program = from_guest(&service, &mut guest, &FLOW);
    if way == Way::Manager {
        service.stop();
        drop(guest);
        service.start_again();
    } else {
        let successor = service.spawn_successor();
        drop(guest);
        service.expect_successor(successor);
    }
    assert_closed(&program);
    service.wait_for_connections(0);
    eventually("no VMM", || service.number("vmm_connected", "") == 0);
    assert_serves(&service, &mut SimGuest::start(&service, Setup::default()));
}

fn several_vms_one_of_which_has_no_vmm(way: Way) {
    let vms = [
        "--vm=guest-cid=4,socket={}/vhost.socket,uds-path={}/vm.vsock",
        "--vm=guest-cid=5,socket={}/vhost5.socket,uds-path={}/vm5.vsock",
        "--vm=guest-cid=6,socket={}/vhost6.socket,uds-path={}/vm6.vsock",
    ];
    let mut service = Service::start_vms(way, &vms);
    let start = |service: &Service, cid| {
        let path = service.directory().join(format!("vhost{cid}.socket"));
        let setup = Setup {
            cid,
            ..Setup::default()
        };
        SimGuest::start_over(UnixStream::connect(path).unwrap(), setup)
    };
    let mut four = SimGuest::start(&service, Setup::default());
    let mut six = start(&service, 6);
    let program = from_guest(&service, &mut four, &FLOW);
    service.hand_over();
    assert_moves_bytes(&mut four, &program, &FLOW);
    six.settle();
    let mut five = start(&service, 5);
    five.settle();
    drop(six);
    service.hand_over();
    assert_moves_bytes(&mut four, &program, &FLOW);
    five.settle();
    start(&service, 6).settle();
}

fn a_successor_has_no_more_than_a_fresh_daemon(way: Way) {
    let (mut service, mut guest) = device(way);
    let programs = [1, 2, 3].map(|port| from_host(&service, &mut guest, port));
    let loads = |service: &Service| {
        let (descriptors, threads) = service.at_rest();
        (descriptors, threads)
    };
    let mut before = loads(&service);
    for round in 0..3 {
        service.hand_over();
        // The first has not been a successor itself: what was inherited may not add up, at least.
        let now = loads(&service);
        assert_eq!(
            now, before,
            "descriptors and threads after hand-over {round}"
        );
        before = now;
    }
    for (program, flow, _) in &programs {
        assert_moves_bytes(&mut guest, program, flow);
    }
    service.assert_idle();
    drop((guest, programs));
    let fresh = Service::start(way, &[]);
    drop(SimGuest::start(&fresh, Setup::default()));
    eventually("the VMMs are gone", || {
        [&service, &fresh].map(|service| service.number("vmm_connected", "")) == [0, 0]
    });
    assert_eq!(loads(&service), loads(&fresh));
    if way == Way::Manager {
        // Their numbers may differ.
        let stored = [&service, &fresh].map(|service| service.manager().stored().len());
        assert_eq!(stored[0], stored[1], "what the service manager keeps");
    }
    Daemon::assert_all_idle(&[&service, &fresh]);
}

fn a_hand_over_of_nothing_after_one_of_all(way: Way) {
    let (mut service, mut guest) = device(way);
    let program = from_guest(&service, &mut guest, &FLOW);
    service.hand_over();
    drop(guest);
    assert_closed(&program);
    service.hand_over();
    assert_eq!(service.number("vmm_connected", ""), 0);
    assert_serves(&service, &mut SimGuest::start(&service, Setup::default()));
}
