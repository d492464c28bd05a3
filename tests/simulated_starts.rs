//! Rings start at their used index, whatever SET_VRING_BASE says: the daemon returns every buffer in order before a ring
//! stops, so that is where it stopped.

mod common;

use common::daemon::Daemon;
use common::sim::guest::{RX, TX};
use common::sim::host::{FLOW, PORT, assert_moves_bytes, assert_serves, device, from_guest};
use common::sim::{Flow, Op, SimGuest};

/// Starts both rings at the bases given by `base`.
fn start_at(guest: &mut SimGuest, base: impl Fn(&SimGuest, usize) -> u16) {
    for index in [RX, TX] {
        let base = base(guest, index);
        guest.start_ring_at(index as u32, base);
        guest.frontend.set_vring_enable(index as u32, true);
    }
    guest.frontend.features();
}

/// The base of a VMM that counts what the driver has made available, as Cloud Hypervisor does when it reconnects.
fn avail_idx(guest: &SimGuest, index: usize) -> u16 {
    guest.rings[index].avail_idx()
}

/// A device that has used its rings, and whose guest has RX buffers posted.
fn used_device() -> (Daemon, SimGuest) {
    let (daemon, mut guest) = device();
    (0..3).for_each(|_| assert_serves(&daemon, &mut guest));
    for ring in &guest.rings {
        assert_ne!(ring.device_used_idx(), 0);
    }
    assert_ne!(guest.rings[RX].outstanding(), 0);
    (daemon, guest)
}

/// Panics unless the device fills every RX buffer that is posted, in order. Then posts them all again.
#[track_caller]
fn assert_all_posted_are_used(guest: &mut SimGuest) {
    guest.auto_repost = false;
    let posted = guest.rings[RX].outstanding() as u32;
    for port in 0..posted {
        let flow = Flow::new(port, port);
        guest.send(&flow.packet(Op::CreditRequest));
        guest.recv().assert_is(Op::Rst, &flow);
    }
    assert_eq!(guest.rings[RX].outstanding(), 0);
    guest.auto_repost = true;
    guest.post_rx();
    guest.settle();
}

#[test]
fn a_vmm_that_reconnects_at_the_avail_index_loses_no_rx_buffer() {
    let (daemon, mut guest) = used_device();
    for _ in 0..3 {
        guest.reconnect(&daemon);
        start_at(&mut guest, avail_idx);
        assert_all_posted_are_used(&mut guest);
        assert_serves(&daemon, &mut guest);
    }
}

#[test]
fn a_vmm_that_reconnects_at_the_avail_index_loses_no_tx_buffer() {
    let (daemon, mut guest) = used_device();
    guest.reconnect(&daemon);
    let flows: Vec<_> = (1..=20).map(|port| Flow::new(port, PORT)).collect();
    for flow in &flows {
        let (layout, indirect) = (guest.setup.tx, guest.setup.indirect);
        assert!(guest.try_send(&flow.packet(Op::Request), layout, indirect));
    }
    start_at(&mut guest, avail_idx);
    for flow in &flows {
        guest.recv().assert_is(Op::Rst, flow);
    }
    guest.wait_tx_done();
    assert_serves(&daemon, &mut guest);
}

#[test]
fn a_vmm_that_reconnects_at_any_index_gets_the_used_index() {
    let (daemon, mut guest) = used_device();
    let bases: [fn(u16) -> u16; 6] = [
        |_| 0,
        |used| used.wrapping_sub(1),
        |used| used.wrapping_add(1),
        |used| used.wrapping_add(0x8000),
        |_| 12_345,
        |_| u16::MAX,
    ];
    for base in bases {
        guest.reconnect(&daemon);
        start_at(&mut guest, |guest, index| {
            base(guest.rings[index].device_used_idx())
        });
        // GET_VRING_BASE returns the used index.
        guest.stop_rings();
        start_at(&mut guest, |guest, index| {
            base(guest.rings[index].device_used_idx())
        });
        assert_all_posted_are_used(&mut guest);
        assert_serves(&daemon, &mut guest);
    }
}

#[test]
fn rings_that_go_on_at_another_base_than_they_stopped_at_lose_no_connection() {
    let (daemon, mut guest) = used_device();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    for base in [avail_idx, |_: &SimGuest, _| 0] {
        guest.stop_rings();
        start_at(&mut guest, base);
        assert_moves_bytes(&mut guest, &stream, &FLOW);
        assert_all_posted_are_used(&mut guest);
    }
}
