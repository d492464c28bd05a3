//! Snapshots: a VMM saves the device's state and loads it, here or elsewhere, and the guest is told that its connections are gone.

mod common;

use std::os::fd::AsFd;
use std::time::Duration;

use common::daemon::{Daemon, PATIENCE};
use common::sim::host::{PORT, accept, assert_closed, listen};
use common::sim::ring::{Indirect, Part};
use nix::sys::signal::Signal;

use common::sim::{Flow, Op, Setup, SimGuest, Survivor};

/// The event ring.
const EVENTS: usize = 2;
const TRANSPORT_RESET: [u8; 4] = [0; 4];
const STATE: &[u8] = br#"{"version":1,"guest_cid":4}"#;
/// How long nothing comes when nothing is left to come.
const QUIET: Duration = Duration::from_millis(200);

fn with_events() -> Setup {
    Setup {
        queues: 3,
        ..Setup::default()
    }
}

/// Offers a buffer for an event, and returns its address.
fn offer(guest: &mut SimGuest, len: u32) -> u64 {
    let addr = guest.memory.alloc(16, 8);
    guest.memory.write(addr, &[0xee; 16]);
    let part = Part {
        addr,
        len,
        write: true,
    };
    guest.rings[EVENTS].add(&[part], Indirect::No).unwrap();
    guest.rings[EVENTS].kick_if_needed();
    addr
}

/// Waits until a buffer for an event comes back, and returns how many bytes it has.
fn event_len(guest: &mut SimGuest) -> u32 {
    assert!(guest.rings[EVENTS].wait_used(PATIENCE), "no event");
    guest.rings[EVENTS].pop_used().unwrap().1
}

fn assert_event(guest: &mut SimGuest, addr: u64) {
    assert_eq!(event_len(guest), 4);
    assert_eq!(guest.memory.read(addr, 4), TRANSPORT_RESET);
}

#[test]
fn the_state_is_saved_and_can_be_loaded() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(&daemon, with_events());
    guest.stop_rings();
    assert_eq!(guest.frontend.save_state(), STATE);
    // Saving is not an end: the guest may go on.
    guest.start_rings();
    guest.settle();
    drop(guest);
    let mut guest = SimGuest::connect(&daemon, with_events());
    assert_eq!(guest.frontend.load_state(STATE), 0);
    guest.post_rx();
    guest.start_rings();
    let addr = offer(&mut guest, 16);
    assert_event(&mut guest, addr);
    // Once.
    offer(&mut guest, 16);
    guest.settle();
    assert!(!guest.rings[EVENTS].wait_used(QUIET));
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn connections_of_before_are_gone_on_both_sides() {
    let daemon = Survivor::start();
    let listener = listen(&daemon, PORT);
    let mut guest = SimGuest::start(&daemon, with_events());
    let addr = offer(&mut guest, 4);
    let flow = Flow::new(1000, PORT);
    guest.send(&flow.packet(Op::Request));
    guest.recv().assert_is(Op::Response, &flow);
    let program = accept(&listener);
    guest.stop_rings();
    assert_eq!(guest.frontend.load_state(STATE), 0);
    assert_closed(&program);
    guest.start_rings();
    assert_event(&mut guest, addr);
    // The connection is not known any more, and its ports are free.
    guest.send(&flow.rw(b"lost"));
    guest.recv().assert_is(Op::Rst, &flow);
    guest.send(&flow.packet(Op::Request));
    guest.recv().assert_is(Op::Response, &flow);
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn a_buffer_without_room_for_an_event_is_given_back() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::connect(&daemon, with_events());
    assert_eq!(guest.frontend.load_state(STATE), 0);
    for _ in 0..40 {
        offer(&mut guest, 3);
    }
    let addr = offer(&mut guest, 4);
    guest.post_rx();
    guest.start_rings();
    for _ in 0..40 {
        assert_eq!(event_len(&mut guest), 0);
    }
    assert_event(&mut guest, addr);
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn a_guest_without_an_event_ring_is_served() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::connect(&daemon, Setup::default());
    assert_eq!(guest.frontend.load_state(STATE), 0);
    guest.post_rx();
    guest.start_rings();
    guest.settle();
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn what_is_no_state_is_refused_and_changes_nothing() {
    let daemon = Survivor::start();
    let listener = listen(&daemon, PORT);
    let mut guest = SimGuest::start(&daemon, with_events());
    let flow = Flow::new(1000, PORT);
    guest.send(&flow.packet(Op::Request));
    guest.recv().assert_is(Op::Response, &flow);
    let _program = accept(&listener);
    guest.stop_rings();
    let long = [b" ".repeat(60_000), STATE.to_vec()].concat();
    for state in [
        &b""[..],
        b"{}",
        br#"{"version":2,"guest_cid":4}"#,
        br#"{"version":1}"#,
        &long,
    ] {
        assert_ne!(guest.frontend.load_state(state), 0);
        // The transfer is over.
        assert_ne!(guest.frontend.check_state(), 0);
    }
    // Nobody reads what is saved.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    guest.frontend.transfer_state(0, writer.as_fd());
    assert_ne!(guest.frontend.check_state(), 0);
    guest.start_rings();
    guest.send(&flow.packet(Op::CreditRequest));
    guest.recv().assert_is(Op::CreditUpdate, &flow);
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn a_state_that_never_ends_keeps_no_daemon_from_stopping() {
    let daemon = Daemon::start();
    let guest = SimGuest::connect(&daemon, with_events());
    let (reader, _writer) = std::io::pipe().unwrap();
    guest.frontend.transfer_state(1, reader.as_fd());
    guest.frontend.send_message(43, 0, &[], &[]);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
}
