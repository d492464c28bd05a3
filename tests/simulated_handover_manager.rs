//! Hand-overs under a service manager: what is stored, and what a successor makes of a store that is not what it should be.

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use common::daemon::eventually;
use common::handover::{Service, Way, take_descriptors};
use common::manager::is_parcel;
use common::sim::host::{
    FLOW, PORT, accept, assert_closed, assert_moves_bytes, assert_serves, connect, from_guest,
    listen,
};
use common::sim::{Flow, Op, Setup, SimGuest};
use nix::sys::signal::Signal;
use tempfile::TempDir;

fn device() -> (Service, SimGuest, UnixStream) {
    let service = Service::start(Way::Manager, &[]);
    let mut guest = SimGuest::start(&service, Setup::default());
    let program = from_guest(&service, &mut guest, &FLOW);
    (service, guest, program)
}

#[test]
fn every_signal_that_stops_a_daemon_hands_over() {
    let (mut service, mut guest, program) = device();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        service.signal(signal);
        assert_eq!(service.daemon().wait_exit().code(), Some(0));
        assert!(service.manager().has_parcels(), "{signal}");
        service.start_again();
        assert_moves_bytes(&mut guest, &program, &FLOW);
    }
    assert_serves(&service, &mut guest);
}

#[test]
fn a_stop_is_quick() {
    let (mut service, mut guest, program) = device();
    let quickest = (0..5).map(|_| {
        let start = Instant::now();
        service.stop();
        let took = start.elapsed();
        service.start_again();
        took
    });
    let quickest = quickest.min().unwrap();
    assert!(quickest < Duration::from_secs(1), "{quickest:?}");
    assert_moves_bytes(&mut guest, &program, &FLOW);
}

#[test]
fn few_descriptors_are_stored_for_many() {
    let (mut service, mut guest, program) = device();
    let listener = listen(&service, PORT + 1);
    let mut streams = vec![(program, FLOW)];
    for port in 0..500 {
        let flow = Flow::new(port, PORT + 1);
        guest.send(&flow.packet(Op::Request));
        guest.recv().assert_is(Op::Response, &flow);
        streams.push((accept(&listener), flow));
    }
    service.stop();
    let stored = service.manager().stored();
    assert!(stored.keys().all(|name| is_parcel(name)), "{stored:?}");
    assert!((3..=4).contains(&stored.len()), "{stored:?}");
    assert!(stored.values().all(|count| *count == 1), "{stored:?}");
    service.start_again();
    for (stream, flow) in &streams {
        assert_moves_bytes(&mut guest, stream, flow);
    }
}

#[test]
fn a_daemon_that_is_out_of_descriptors_hands_over() {
    let (mut service, mut guest, program) = device();
    let _clients = take_descriptors(&service);
    service.stop();
    service.start_again();
    assert_moves_bytes(&mut guest, &program, &FLOW);
    assert_serves(&service, &mut guest);
}

#[test]
fn without_a_store_a_stop_ends_all() {
    let mut service = Service::start_by(
        Way::Manager,
        &[
            "--guest-cid=4",
            "--socket={}/vhost.socket",
            "--uds-path={}/vm.vsock",
        ],
        |manager| manager.keep_nothing(),
    );
    let mut guest = SimGuest::start(&service, Setup::default());
    let program = from_guest(&service, &mut guest, &FLOW);
    assert!(service.manager().stored().is_empty());
    service.signal(Signal::SIGTERM);
    assert_eq!(service.daemon().wait_exit().code(), Some(0));
    assert_closed(&program);
    assert_closed(guest.frontend.stream());
    assert!(service.manager().stored().is_empty());
    assert!(!service.uds_path().exists() && !service.vhost_socket().exists());
}

#[test]
fn sockets_of_the_service_manager_go_on() {
    let folder = TempDir::with_prefix("vsock-test-").unwrap();
    let paths = ["vhost", "host"].map(|name| folder.path().join(name));
    let options = ["--guest-cid=4", "--uds-path={}/vm.vsock"];
    let mut service = Service::start_by(Way::Manager, &options, |manager| {
        for (name, path) in ["vhost-user", "host"].iter().zip(&paths) {
            manager.activate(name, UnixListener::bind(path).unwrap());
        }
    });
    let vmm = UnixStream::connect(&paths[0]).unwrap();
    let mut guest = SimGuest::start_over(vmm, Setup::default());
    let program = from_guest(&service, &mut guest, &FLOW);
    let call = |guest: &mut SimGuest| {
        let client = connect(&paths[1]);
        (&client).write_all(b"CONNECT 22\n").unwrap();
        let flow = Flow::of(&guest.recv());
        guest.send(&flow.packet(Op::Response));
        assert_eq!(common::sim::host::read_ok(&client), flow.host_port);
        (client, flow)
    };
    let mut streams = vec![call(&mut guest)];
    for _ in 0..3 {
        service.hand_over();
        assert_moves_bytes(&mut guest, &program, &FLOW);
        streams.push(call(&mut guest));
        for (stream, flow) in &streams {
            assert_moves_bytes(&mut guest, stream, flow);
        }
    }
    service.kill();
    assert_closed(&program);
    service.start_again();
    while guest.try_recv(Duration::from_millis(100)).is_some() {}
    let (client, flow) = call(&mut guest);
    assert_moves_bytes(&mut guest, &client, &flow);
    assert!(paths.iter().all(|path| path.exists()));
}

// --- Successors that don't get so far.

#[test]
fn a_successor_that_fails_leaves_all_to_the_next() {
    let (mut service, mut guest, program) = device();
    service.stop();
    let mut wrong = service.options().to_vec();
    // A file is in the way.
    let log = service.directory().join("log");
    wrong.push(format!("--guest-port=23={}", log.display()));
    for _ in 0..3 {
        let failing = service.manager().spawn(&wrong);
        assert_eq!(failing.wait_exit().code(), Some(1));
        assert!(service.manager().has_parcels());
        assert!(service.uds_path().exists() && service.vhost_socket().exists());
    }
    let client = connect(&service.uds_path());
    service.start_again();
    assert_moves_bytes(&mut guest, &program, &FLOW);
    (&client).write_all(b"CONNECT 22\n").unwrap();
    assert_eq!(guest.recv().dst_port, 22);
    assert_serves(&service, &mut guest);
}

#[test]
fn successors_that_are_killed_leave_all_to_the_next() {
    let (mut service, mut guest, program) = device();
    let mut sent = 0;
    for round in 0..10 {
        service.stop();
        let unlucky = service.manager().spawn(service.options());
        // Sooner and later.
        for _ in 0..round {
            std::thread::yield_now();
        }
        service.manager().kill(&unlucky);
        if !service.manager().has_parcels() {
            // It had taken over: this was a crash.
            return assert_closed(&program);
        }
        service.start_again();
        assert_moves_bytes(&mut guest, &program, &FLOW);
        sent += 300;
    }
    assert_eq!(
        service.number("payload_bytes_total", "from=\"guest\""),
        sent
    );
}

// --- Stores that are not what they should be.

/// Stops a daemon with many streams, and starts one after `spoil` has had what is stored: it begins afresh, and says so.
#[track_caller]
fn assert_starts_afresh_after(spoil: impl FnOnce(&Service)) {
    let (mut service, mut guest, program) = device();
    let listener = listen(&service, PORT + 1);
    let mut streams = Vec::new();
    for port in 0..250 {
        let flow = Flow::new(port, PORT + 1);
        guest.send(&flow.packet(Op::Request));
        guest.recv().assert_is(Op::Response, &flow);
        streams.push(accept(&listener));
    }
    service.stop();
    spoil(&service);
    service.start_again();
    eventually("a warning", || service.log().contains("WARN"));
    assert_closed(&program);
    streams.iter().for_each(assert_closed);
    assert_closed(guest.frontend.stream());
    assert_serves(&service, &mut SimGuest::start(&service, Setup::default()));
    // What comes later is handed over as ever.
    let mut guest = SimGuest::start_over(
        UnixStream::connect(service.vhost_socket()).unwrap(),
        Setup::default(),
    );
    service.hand_over();
    assert_serves(&service, &mut guest);
}

#[test]
fn a_daemon_starts_afresh_where_a_parcel_is_missing() {
    assert_starts_afresh_after(|service| drop(service.manager().take("handover-0")));
    assert_starts_afresh_after(|service| drop(service.manager().take("handover-1")));
}

#[test]
fn a_daemon_starts_afresh_where_a_parcel_is_a_file() {
    assert_starts_afresh_after(|service| {
        service.manager().take("handover-0");
        let mut file: fs::File = tempfile::tempfile().unwrap();
        file.write_all(b"garbage").unwrap();
        service.manager().put("handover-0", file);
    });
}

#[test]
fn a_daemon_starts_afresh_where_a_parcel_is_empty_or_garbage() {
    for content in [&b""[..], b"garbage", br#"{"parcel":0,"of":1}"#] {
        assert_starts_afresh_after(|service| {
            service.manager().take("handover-0");
            let (mut one, other) = UnixStream::pair().unwrap();
            one.write_all(content).unwrap();
            service.manager().put("handover-0", other);
            if content.is_empty() {
                // Nor does its end come: nobody may wait for that.
                std::mem::forget(one);
            }
        });
    }
}

#[test]
fn a_vm_that_is_no_longer_configured_is_given_up_and_the_others_go_on() {
    let vms = [
        "--vm=guest-cid=4,socket={}/vhost.socket,uds-path={}/vm.vsock",
        "--vm=guest-cid=5,socket={}/vhost5.socket,uds-path={}/vm5.vsock",
    ];
    let mut service = Service::start_vms(Way::Manager, &vms);
    let path = service.directory().join("vhost5.socket");
    let setup = Setup {
        cid: 5,
        ..Setup::default()
    };
    let five = SimGuest::start_over(UnixStream::connect(&path).unwrap(), setup);
    let mut four = SimGuest::start(&service, Setup::default());
    let program = from_guest(&service, &mut four, &FLOW);
    let mut options = service.options().to_vec();
    options.retain(|option| !option.contains("guest-cid=5"));
    service.hand_over_to(options);
    eventually("a warning", || service.log().contains("WARN"));
    assert_closed(five.frontend.stream());
    eventually("its socket is removed", || !path.exists());
    assert_moves_bytes(&mut four, &program, &FLOW);
    assert_serves(&service, &mut four);
}

// --- The same after a crash.

/// Replaces what is stored under `name` by a file with this content, and expects a daemon that starts afresh.
#[track_caller]
fn assert_starts_afresh_with(name: &str, content: &[u8]) {
    let mut service = Service::start(Way::Manager, &[]);
    let nothing = service.manager().stored();
    let guest = SimGuest::start(&service, Setup::default());
    service.kill();
    assert!(!service.manager().take(name).is_empty(), "no {name}");
    let mut file: fs::File = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    service.manager().put(name, file);
    service.start_again();
    eventually("a warning", || service.log().contains("WARN"));
    // The VMM learns of it.
    assert_closed(guest.frontend.stream());
    drop(guest);
    assert_serves(&service, &mut SimGuest::start(&service, Setup::default()));
    eventually("an empty store", || service.manager().stored() == nothing);
}

#[test]
fn a_daemon_starts_afresh_where_the_state_is_garbage() {
    for content in [&b""[..], b"garbage", &[0; 4096], &[0xff; 4096]] {
        assert_starts_afresh_with("handover-4-state", content);
    }
}

#[test]
fn a_list_of_connections_that_is_garbage_keeps_no_vm_from_its_device() {
    for content in [&b""[..], &[0xff; 4096]] {
        let (mut service, mut guest, program) = device();
        service.kill();
        assert_closed(&program);
        let name = "handover-4-connections";
        assert!(!service.manager().take(name).is_empty());
        let mut file: fs::File = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        service.manager().put(name, file);
        service.start_again();
        service.daemon().assert_alive();
        // Whether the session goes on or not, the VM is served.
        if service.number("vmm_connected", "") == 0 {
            guest.reconnect(&service);
            guest.start_rings();
        }
        guest.settle();
        assert_serves(&service, &mut guest);
    }
}
