//! The device as its VMM sees it: features, config space, ring starts and stops, VMM after VMM.

mod common;

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use common::daemon::{Daemon, GUEST_CID, PATIENCE, eventually};
use common::sim::host::{
    FLOW, accept, assert_closed, assert_moves_bytes, assert_same, assert_serves, dial, from_guest,
    from_host, listen, pattern, read_exactly, read_ok,
};
use common::sim::ring::{Indirect, feature};
use common::sim::setup::TxLayout;
use common::sim::vhost_user::{F_PROTOCOL_FEATURES, Frontend, Request, protocol};
use common::sim::{Flow, GuestStack, Op, Packet, Setup, SimGuest};
use nix::sys::signal::Signal;
use tempfile::TempDir;

const PORT: u32 = 1234;

fn frontend(daemon: &Daemon) -> Frontend {
    let mut frontend = Frontend::connect(&daemon.vhost_socket());
    frontend.set_owner();
    let features = frontend.features();
    let protocol = frontend.protocol_features();
    frontend.set_protocol_features(protocol);
    frontend.set_features(features);
    frontend
}

#[test]
fn offers_the_features_the_ecosystem_expects() {
    let daemon = Daemon::start();
    let frontend = Frontend::connect(&daemon.vhost_socket());
    let features = frontend.features();
    for (name, bit) in [
        ("VERSION_1", feature::VERSION_1),
        ("EVENT_IDX", feature::EVENT_IDX),
        ("INDIRECT_DESC", feature::INDIRECT_DESC),
        ("IN_ORDER", feature::IN_ORDER),
        ("NOTIFY_ON_EMPTY", feature::NOTIFY_ON_EMPTY),
        ("PROTOCOL_FEATURES", F_PROTOCOL_FEATURES),
    ] {
        assert_ne!(features & bit, 0, "{name} is missing in {features:#x}");
    }
    let protocol_features = frontend.protocol_features();
    for (name, bit) in [
        ("CONFIG", protocol::CONFIG),
        ("MQ", protocol::MQ),
        ("REPLY_ACK", protocol::REPLY_ACK),
        ("RESET_DEVICE", protocol::RESET_DEVICE),
        ("BACKEND_REQ", protocol::BACKEND_REQ),
    ] {
        assert_ne!(
            protocol_features & bit,
            0,
            "{name} is missing in {protocol_features:#x}"
        );
    }
}

#[test]
fn has_the_queues_of_a_vsock_device() {
    let daemon = Daemon::start();
    let queues = frontend(&daemon).queue_num();
    assert!((2..=3).contains(&queues), "{queues} queues");
}

#[test]
fn takes_a_backend_request_socket() {
    let daemon = Daemon::start();
    let frontend = frontend(&daemon);
    let (_ours, theirs) = UnixStream::pair().unwrap();
    frontend.set_backend_req_fd(theirs.as_fd());
    frontend.features();
}

#[test]
fn config_space_is_the_cid() {
    let daemon = Daemon::start();
    let frontend = frontend(&daemon);
    let cid = GUEST_CID.to_le_bytes();
    for offset in 0..8 {
        for len in 1..=8 - offset {
            let got = frontend.config(offset, len).expect("a part of the CID");
            let wanted = &cid[offset as usize..(offset + len) as usize];
            assert_eq!(got, wanted, "{len} bytes at {offset}");
        }
    }
}

#[test]
fn config_space_ends_behind_the_cid() {
    let daemon = Daemon::start();
    for (offset, len) in [(0, 9), (8, 1), (1, 8), (4, 200), (255, 1)] {
        // The answer is up to the daemon, as long as it survives.
        let frontend = frontend(&daemon);
        let payload = [
            &[offset, len, 0].map(u32::to_le_bytes).concat()[..],
            &vec![0; len as usize],
        ]
        .concat();
        frontend.send_message(Request::GetConfig as u32, 0, &payload, &[]);
        drop(frontend);
    }
    daemon.assert_alive();
    assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
}

#[test]
fn every_order_of_setup_with_2_and_3_queues() {
    let daemon = Daemon::start();
    for queues in [2, 3] {
        for bits in 0..8 {
            let setup = Setup {
                queues,
                enable_first: bits & 1 != 0,
                call_first: bits & 2 != 0,
                protocol_features: bits & 4 == 0,
                ..Setup::default()
            };
            println!("{queues} queues, order {bits:03b}");
            assert_serves(&daemon, &mut SimGuest::start(&daemon, setup));
        }
    }
}

#[test]
fn rings_may_start_in_any_order() {
    let daemon = Daemon::start();
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1]] {
        let setup = Setup {
            queues: 3,
            ..Setup::default()
        };
        let mut guest = SimGuest::connect(&daemon, setup);
        guest.post_rx();
        for index in order {
            guest.start_ring(index);
            guest.frontend.set_vring_enable(index, true);
        }
        guest.frontend.features();
        assert_serves(&daemon, &mut guest);
    }
}

/// Queues a packet without a kick that the device would see: the eventfds are new at each start.
fn queue(guest: &mut SimGuest, packet: &Packet) {
    assert!(guest.try_send(packet, TxLayout::LINUX, Indirect::No));
}

#[test]
fn tx_queued_before_the_start_is_served_without_a_kick() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::connect(&daemon, Setup::default());
    guest.post_rx();
    let flow = Flow::new(5, 6);
    queue(&mut guest, &flow.packet(Op::Request));
    guest.start_rings();
    guest.recv().assert_is(Op::Rst, &flow);
}

#[test]
fn tx_queued_while_stopped_is_served_without_a_kick() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let flow = Flow::new(PORT, PORT);
    let stream = from_guest(&daemon, &mut guest, &flow);
    guest.stop_rings();
    queue(&mut guest, &flow.rw(b"queued"));
    guest.start_rings();
    assert_same(&read_exactly(&stream, 6), b"queued");
}

#[test]
fn a_stop_parks_the_streams() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let from = Flow::new(PORT, PORT);
    let first = from_guest(&daemon, &mut guest, &from);
    let (second, to, _) = from_host(&daemon, &mut guest, PORT);
    for _ in 0..10 {
        assert_moves_bytes(&mut guest, &first, &from);
        assert_moves_bytes(&mut guest, &second, &to);
        guest.stop_rings();
        (&first).write_all(b"to the parked guest").unwrap();
        // QEMU sends the table again when it resumes.
        guest.frontend.set_mem_table(&guest.memory);
        guest.start_rings();
        let got = common::sim::host::recv_bytes(&mut guest, &from, 19);
        assert_same(&got, b"to the parked guest");
    }
}

#[test]
fn a_stopped_device_does_not_touch_guest_memory() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let flow = Flow::new(PORT, PORT);
    let stream = from_guest(&daemon, &mut guest, &flow);
    guest.stop_rings();
    let everything = |guest: &SimGuest| -> Vec<Vec<u8>> {
        let regions = guest.memory.regions().iter();
        regions
            .map(|region| guest.memory.read(region.guest_addr, region.size as usize))
            .collect()
    };
    queue(&mut guest, &flow.rw(b"later"));
    let before = everything(&guest);
    (&stream).write_all(&pattern(1, 5000)).unwrap();
    guest.rings[0].kick();
    guest.rings[1].kick();
    // Give a faulty device time.
    sleep(Duration::from_millis(300));
    assert!(
        before == everything(&guest),
        "the stopped device wrote to guest memory"
    );
    guest.start_rings();
    assert_same(
        &common::sim::host::recv_bytes(&mut guest, &flow, 5000),
        &pattern(1, 5000),
    );
    assert_same(&read_exactly(&stream, 5), b"later");
}

#[test]
fn clients_wait_while_the_device_is_stopped() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    guest.stop_rings();
    let client = dial(&daemon, PORT);
    guest.start_rings();
    let request = guest.recv();
    let flow = Flow::of(&request);
    request.assert_is(Op::Request, &flow);
    guest.send(&flow.packet(Op::Response));
    assert_eq!(read_ok(&client), flow.host_port);
}

#[test]
fn pauses_lose_and_repeat_nothing() {
    const LEN: usize = 6 << 20;
    let daemon = Daemon::start();
    let stack = GuestStack::new(SimGuest::start(&daemon, Setup::default()));
    let listener = listen(&daemon, PORT);
    let running = AtomicBool::new(true);
    scope(|s| {
        let streams: Vec<_> = (0..3)
            .map(|_| {
                let guest = stack.connect(PORT).unwrap();
                (accept(&listener), guest)
            })
            .collect();
        s.spawn(|| {
            while running.load(Ordering::Relaxed) {
                stack.pause();
                sleep(Duration::from_millis(3));
                stack.resume();
                sleep(Duration::from_millis(10));
            }
        });
        scope(|s| {
            for (i, (host, guest)) in streams.iter().enumerate() {
                let (to_host, to_guest) = (pattern(i as u64, LEN), pattern(i as u64 + 100, LEN));
                let wanted = (to_host.clone(), to_guest.clone());
                let (mut writer, mut reader) = (guest.handle(), guest.handle());
                s.spawn(move || writer.write_all(&to_host).unwrap());
                s.spawn(move || (&*host).write_all(&to_guest).unwrap());
                s.spawn(move || assert_same(&read_exactly(host, LEN), &wanted.0));
                s.spawn(move || {
                    let mut got = vec![0; LEN];
                    reader.read_exact(&mut got).unwrap();
                    assert_same(&got, &wanted.1);
                });
            }
        });
        running.store(false, Ordering::Relaxed);
    });
}

#[test]
fn a_fresh_start_closes_the_streams() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let first = from_guest(&daemon, &mut guest, &Flow::new(PORT, PORT));
    let (second, ..) = from_host(&daemon, &mut guest, PORT);
    guest.stop_rings();
    guest.restart_fresh();
    assert_closed(&first);
    assert_closed(&second);
    guest.settle();
    assert_serves(&daemon, &mut guest);
}

#[test]
fn a_device_reset_closes_the_streams() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    assert_ne!(
        guest.protocol & protocol::RESET_DEVICE,
        0,
        "RESET_DEVICE is not offered"
    );
    let first = from_guest(&daemon, &mut guest, &Flow::new(PORT, PORT));
    let (second, ..) = from_host(&daemon, &mut guest, PORT);
    guest.frontend.reset_device();
    assert_closed(&first);
    assert_closed(&second);
    start_after_reset(&daemon, &mut guest);
}

/// After RESET_DEVICE, a VMM configures everything again.
#[track_caller]
fn start_after_reset(daemon: &Daemon, guest: &mut SimGuest) {
    guest.frontend.set_features(guest.features);
    guest.frontend.set_mem_table(&guest.memory);
    guest.restart_fresh();
    guest.settle();
    assert_serves(daemon, guest);
}

#[test]
fn a_reset_of_a_stopped_device_closes_the_streams() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let stream = from_guest(&daemon, &mut guest, &Flow::new(PORT, PORT));
    guest.stop_rings();
    guest.frontend.reset_device();
    assert_closed(&stream);
    start_after_reset(&daemon, &mut guest);
}

#[test]
fn the_death_of_a_vmm_closes_the_streams() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let first = from_guest(&daemon, &mut guest, &Flow::new(PORT, PORT));
    let (second, ..) = from_host(&daemon, &mut guest, PORT);
    let shaking = common::sim::host::connect(&daemon.uds_path());
    (&shaking).write_all(b"CONN").unwrap();
    drop(guest);
    assert_closed(&first);
    assert_closed(&second);
    assert_closed(&shaking);
    assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
}

#[test]
fn the_death_of_a_stopped_vmm_closes_the_streams() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let stream = from_guest(&daemon, &mut guest, &Flow::new(PORT, PORT));
    guest.stop_rings();
    drop(guest);
    assert_closed(&stream);
    assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
}

#[test]
fn a_hundred_vmms_one_after_the_other_leave_nothing() {
    let daemon = Daemon::start();
    let mut settled = (0, 0);
    for i in 0..100 {
        let mut guest = SimGuest::start(&daemon, Setup::default());
        // Some go with connections open, in mid-handshake, or stopped.
        let stream = from_guest(&daemon, &mut guest, &Flow::new(PORT, 10_000 + i));
        let client = dial(&daemon, PORT);
        match i % 4 {
            0 => assert!(guest.recv().is(Op::Request)),
            1 => drop(guest.stop_rings()),
            2 => assert_serves_after_request(&daemon, &mut guest),
            _ => (),
        }
        drop(guest);
        assert_closed(&stream);
        assert_closed(&client);
        if i == 4 {
            // By now everything allocated once is allocated.
            settled = daemon.at_rest();
        }
    }
    daemon.assert_alive();
    assert_eq!(daemon.at_rest(), settled, "descriptors and threads");
}

fn assert_serves_after_request(daemon: &Daemon, guest: &mut SimGuest) {
    assert!(guest.recv().is(Op::Request));
    assert_serves(daemon, guest);
}

#[test]
fn vmms_that_leave_in_the_middle_of_their_setup() {
    let daemon = Daemon::start();
    drop(UnixStream::connect(daemon.vhost_socket()).unwrap());
    frontend(&daemon).send_raw(&[1, 0, 0], &[]);
    frontend(&daemon).send_message(999, 0, &[], &[]);
    frontend(&daemon).send_message(Request::SetMemTable as u32, 0, &[0xff; 72], &[]);
    frontend(&daemon).send_message(Request::SetVringNum as u32, 0, &[0xff; 8], &[]);
    frontend(&daemon).send_raw(&[0xff; 4096], &[]);
    drop(SimGuest::connect(&daemon, Setup::default()));
    let guest = SimGuest::connect(&daemon, Setup::default());
    guest.frontend.set_vring_num(0, 128);
    drop(guest);
    daemon.assert_alive();
    assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
}

#[test]
fn a_second_vmm_waits_for_the_first_to_go() {
    let daemon = Daemon::start();
    let mut first = SimGuest::start(&daemon, Setup::default());
    let second = Frontend::connect(&daemon.vhost_socket());
    second.send_message(Request::GetFeatures as u32, 0, &[], &[]);
    assert_serves(&daemon, &mut first);
    drop(first);
    assert_eq!(second.reply(Request::GetFeatures).len(), 8);
}

#[test]
fn a_ring_may_be_switched_off_and_on() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let flow = Flow::new(PORT, PORT);
    let stream = from_guest(&daemon, &mut guest, &flow);
    for ring in [0, 1] {
        guest.frontend.set_vring_enable(ring, false);
        guest.frontend.set_vring_enable(ring, true);
        guest.frontend.features();
        assert_moves_bytes(&mut guest, &stream, &flow);
    }
}

#[test]
fn interrupts_and_kicks_are_asked_for_rarely() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let flow = Flow::new(PORT, PORT);
    let stream = from_guest(&daemon, &mut guest, &flow);
    let before = guest.rings[1].interrupts + guest.rings[1].kicks;
    // Sixty packets offered at once are worth one kick.
    for _ in 0..60 {
        queue(&mut guest, &flow.rw(&[7; 100]));
    }
    guest.rings[1].kick_if_needed();
    assert_same(&read_exactly(&stream, 6000), &[7; 6000]);
    guest.wait_tx_done();
    let calls = guest.rings[1].interrupts + guest.rings[1].kicks - before;
    assert!(
        calls < 60,
        "{calls} kicks and interrupts for 60 packets offered at once"
    );
}

/// The guest sends a packet, which the host program reads.
#[track_caller]
fn send_and_read(guest: &mut SimGuest, stream: &UnixStream, flow: &Flow) {
    guest.send(&flow.rw(&[7; 100]));
    assert_same(&read_exactly(stream, 100), &[7; 100]);
}

#[test]
fn packets_that_follow_each_other_share_their_interrupts() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let flow = Flow::new(PORT, PORT);
    let stream = from_guest(&daemon, &mut guest, &flow);
    guest.wait_tx_done();
    let (packets, before) = (500, guest.rings[1].interrupts);
    for _ in 0..packets {
        guest.rings[1].arm();
        send_and_read(&mut guest, &stream, &flow);
        // Without a wait for an interrupt, and without a break in which one would come.
        let deadline = Instant::now() + PATIENCE;
        while guest.rings[1].outstanding() > 0 {
            assert!(Instant::now() < deadline, "the packet is not returned");
            guest.reclaim_tx();
        }
        guest.rings[1].drain_call();
    }
    guest.wait_tx_done();
    let interrupts = guest.rings[1].interrupts - before;
    assert!(interrupts < packets, "{interrupts} for {packets} packets");
}

/// A driver that sends one packet at a time, and nothing before it has been interrupted for it.
#[test]
fn a_packet_that_nothing_follows_has_its_interrupt() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let flow = Flow::new(PORT, PORT);
    let stream = from_guest(&daemon, &mut guest, &flow);
    for _ in 0..1000 {
        guest.send(&flow.rw(&[7; 100]));
        guest.wait_tx_done();
        assert_same(&read_exactly(&stream, 100), &[7; 100]);
    }
}

/// Some VMMs pause a guest by disabling its rings, and in no other way.
#[test]
fn an_interrupt_that_is_due_while_the_ring_is_disabled_comes_when_it_is_enabled() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let flow = Flow::new(PORT, PORT);
    let stream = from_guest(&daemon, &mut guest, &flow);
    for _ in 0..50 {
        guest.wait_tx_done();
        guest.rings[1].drain_call();
        guest.rings[1].arm();
        let before = guest.rings[1].interrupts;
        // A driver that waited for each would send one.
        for _ in 0..6 {
            send_and_read(&mut guest, &stream, &flow);
        }
        guest.frontend.set_vring_enable(1, false);
        sleep(Duration::from_millis(2));
        guest.frontend.set_vring_enable(1, true);
        eventually("the interrupt", || {
            guest.rings[1].drain_call();
            guest.rings[1].interrupts > before
        });
    }
}

// --- Inherited sockets.

#[test]
fn an_inherited_socket_that_listens_serves_one_vmm_after_the_other() {
    let directory = TempDir::with_prefix("vsock-test-").unwrap();
    let path = directory.path().join("inherited");
    let listener = UnixListener::bind(&path).unwrap();
    let daemon = Daemon::start_inheriting(OwnedFd::from(listener));
    for _ in 0..3 {
        let stream = UnixStream::connect(&path).unwrap();
        let mut guest = SimGuest::start_over(stream, Setup::default());
        assert_serves(&daemon, &mut guest);
    }
    daemon.signal(Signal::SIGTERM);
    let daemon = daemon;
    assert!(daemon.wait_exit().success());
    assert!(path.exists(), "it is not the daemon's to remove");
}

#[test]
fn an_inherited_connection_is_served_until_it_ends() {
    let (vmm, theirs) = UnixStream::pair().unwrap();
    // As a launcher with an event loop would create it.
    theirs.set_nonblocking(true).unwrap();
    let daemon = Daemon::start_inheriting(OwnedFd::from(theirs));
    let mut guest = SimGuest::start_over(vmm, Setup::default());
    for _ in 0..3 {
        assert_serves(&daemon, &mut guest);
    }
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    guest.stop_rings();
    guest.start_rings();
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    drop(guest);
    assert!(daemon.wait_exit().success());
    assert!(!daemon.uds_path().exists());
}

#[test]
fn an_inherited_connection_does_not_keep_the_daemon_from_stopping() {
    let (_vmm, theirs) = UnixStream::pair().unwrap();
    let daemon = Daemon::start_inheriting(OwnedFd::from(theirs));
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait_exit().success());
}
