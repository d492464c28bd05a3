//! Memory shared region by region (CONFIGURE_MEM_SLOTS: GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG), for memory hotplug and
//! for more than the eight regions of SET_MEM_TABLE.

mod common;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use common::daemon::{Daemon, PATIENCE};
use common::sim::guest::{RX, TX};
use common::sim::host::{
    FLOW, assert_moves_bytes, assert_same, assert_serves, from_guest, pattern, read_exactly,
    recv_bytes, send_from,
};
use common::sim::memory::Region;
use common::sim::ring::Part;
use common::sim::vhost_user::{Frontend, Request, protocol};
use common::sim::{Flow, Setup, SimGuest, Survivor};

/// Many more than fit in SET_MEM_TABLE.
const REGIONS: usize = 40;

/// A VMM that shares all of them one by one. RX buffers cross their borders.
fn in_slots() -> Setup {
    let mut regions = vec![2 << 20];
    regions.extend([12 << 10; REGIONS - 3]);
    regions.extend([2 << 20, 24 << 20]);
    Setup {
        regions,
        mem_slots: true,
        ..Setup::default()
    }
}

/// A VMM that starts with two regions, for rings and buffers, and plugs the others later. It posts one RX buffer.
fn plugged_later() -> Setup {
    let mut regions = vec![2 << 20, 16 << 20];
    regions.extend([64 << 10; REGIONS - 2]);
    Setup {
        regions,
        plugged_later: REGIONS - 2,
        rx_buffers: Some(1),
        ..Setup::default()
    }
}

/// Both kinds of VMMs: those that share the first regions with SET_MEM_TABLE, and with ADD_MEM_REG.
fn both(setup: Setup) -> [Setup; 2] {
    [false, true].map(|mem_slots| Setup {
        mem_slots,
        ..setup.clone()
    })
}

/// The same region with another file.
fn another(region: &Region, fd: OwnedFd) -> Region {
    Region { fd, ..*region }
}

/// The same region, modified by `change`.
fn changed(region: &Region, change: impl FnOnce(&mut Region)) -> Region {
    let mut changed = another(region, region.fd.try_clone().unwrap());
    change(&mut changed);
    changed
}

/// Receives bytes of `stream` in a buffer in a region. No other buffer may be posted.
fn receive_in(guest: &mut SimGuest, region: usize, flow: &Flow, mut stream: &UnixStream) {
    assert_eq!(guest.rings[RX].outstanding(), 0);
    let part = Part {
        addr: guest.memory.regions()[region].guest_addr + 30_000,
        len: 4096,
        write: true,
    };
    guest.post_rx_buffer(vec![part]);
    let bytes = pattern(region as u64, 1000);
    stream.write_all(&bytes).unwrap();
    assert_same(&recv_bytes(guest, flow, bytes.len()), &bytes);
}

/// Moves bytes in both directions through buffers in a region.
#[track_caller]
fn assert_carries(guest: &mut SimGuest, region: usize, flow: &Flow, stream: &UnixStream) {
    let bytes = pattern(region as u64, 2000);
    send_from(guest, region, flow, &bytes);
    assert_same(&read_exactly(stream, bytes.len()), &bytes);
    receive_in(guest, region, flow, stream);
}

/// A guest that has made a connection, which took its only RX buffer.
fn connected(daemon: &Daemon, setup: Setup) -> (SimGuest, UnixStream) {
    let mut guest = SimGuest::start(daemon, setup);
    guest.auto_repost = false;
    let stream = from_guest(daemon, &mut guest, &FLOW);
    assert_eq!(guest.rings[RX].outstanding(), 0);
    (guest, stream)
}

fn add(guest: &SimGuest, region: usize) {
    guest.frontend.add_mem_reg(&guest.memory.regions()[region]);
}

fn remove(guest: &SimGuest, region: usize) {
    guest.frontend.rem_mem_reg(&guest.memory.regions()[region]);
}

#[test]
fn slots_are_offered_and_are_enough() {
    let daemon = Daemon::start();
    let guest = SimGuest::connect(&daemon, Setup::default());
    assert_ne!(
        guest.protocol & protocol::CONFIGURE_MEM_SLOTS,
        0,
        "CONFIGURE_MEM_SLOTS is not offered"
    );
    let slots = guest.frontend.max_mem_slots();
    assert!(slots >= REGIONS as u64, "{slots} slots");
}

#[test]
fn a_guest_of_forty_regions() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(&daemon, in_slots());
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    let mut flow = FLOW;
    // Each buffer of either ring is used, several times.
    for round in 0..20 {
        let bytes = pattern(round, 100_000);
        bytes
            .chunks(10_000)
            .for_each(|piece| guest.send(&flow.rw(piece)));
        assert_same(&read_exactly(&stream, bytes.len()), &bytes);
        (&stream).write_all(&bytes).unwrap();
        assert_same(&recv_bytes(&mut guest, &flow, bytes.len()), &bytes);
        flow.fwd_cnt += bytes.len() as u32;
    }
    assert_serves(&daemon, &mut guest);
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn rings_in_the_last_regions() {
    let daemon = Survivor::start();
    let setup = Setup {
        ring_region: REGIONS - 2,
        queues: 3,
        ..in_slots()
    };
    let mut guest = SimGuest::start(&daemon, setup);
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    guest.stop_rings();
    guest.start_rings();
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn regions_added_under_live_connections_carry_bytes() {
    let daemon = Survivor::start();
    for setup in both(plugged_later()) {
        let (mut guest, stream) = connected(&daemon, setup);
        for region in 2..REGIONS {
            add(&guest, region);
            assert_carries(&mut guest, region, &FLOW, &stream);
        }
        for region in 1..REGIONS {
            assert_carries(&mut guest, region, &FLOW, &stream);
        }
    }
    daemon.assert_unharmed();
}

#[test]
fn rings_restarted_in_a_region_added_later() {
    let daemon = Survivor::start();
    for setup in both(Setup {
        regions: vec![2 << 20, 16 << 20, 2 << 20],
        plugged_later: 1,
        ..Setup::default()
    }) {
        let mut guest = SimGuest::start(&daemon, setup);
        add(&guest, 2);
        guest.stop_rings();
        guest.memory.skip_to_region(2);
        for ring in &mut guest.rings {
            let (memory, size) = (guest.memory.clone(), guest.setup.ring_size);
            *ring = common::sim::ring::Ring::new(memory, size, guest.features);
        }
        guest.restart_fresh();
        assert_serves(&daemon, &mut guest);
        // Their old region is no longer used.
        remove(&guest, 0);
        assert_serves(&daemon, &mut guest);
    }
    daemon.assert_unharmed();
}

#[test]
fn a_removed_region_leaves_the_others_alone_and_may_come_back() {
    let daemon = Survivor::start();
    for setup in both(plugged_later()) {
        let (mut guest, stream) = connected(&daemon, setup);
        (2..10).for_each(|region| add(&guest, region));
        for round in 0..100 {
            let region = 2 + round % 8;
            assert_carries(&mut guest, region, &FLOW, &stream);
            remove(&guest, region);
            // A packet in it is dropped, and its buffers come back.
            send_from(&mut guest, region, &FLOW, b"lost");
            assert_carries(&mut guest, 2 + (round + 1) % 8, &FLOW, &stream);
            add(&guest, region);
        }
        (2..10).for_each(|region| remove(&guest, region));
        assert_carries(&mut guest, 1, &FLOW, &stream);
    }
    daemon.assert_unharmed();
}

#[test]
fn adding_and_removing_regions_under_load_loses_nothing() {
    let daemon = Survivor::start();
    let setup = Setup {
        plugged_later: 1,
        regions: vec![2 << 20, 30 << 20, 1 << 20],
        ..Setup::default()
    };
    for setup in both(setup) {
        let mut guest = SimGuest::start(&daemon, setup);
        let stream = from_guest(&daemon, &mut guest, &FLOW);
        let mut flow = FLOW;
        for round in 0..100 {
            let bytes = pattern(round, 20_000);
            bytes
                .chunks(1000)
                .for_each(|piece| guest.send(&flow.rw(piece)));
            (&stream).write_all(&bytes).unwrap();
            match round % 2 {
                0 => add(&guest, 2),
                _ => remove(&guest, 2),
            }
            assert_same(&read_exactly(&stream, bytes.len()), &bytes);
            assert_same(&recv_bytes(&mut guest, &flow, bytes.len()), &bytes);
            flow.fwd_cnt += bytes.len() as u32;
        }
    }
    daemon.assert_unharmed();
}

#[test]
fn rings_in_a_removed_region_stop_until_they_are_restarted() {
    let daemon = Survivor::start();
    for setup in both(Setup::default()) {
        let mut guest = SimGuest::start(&daemon, setup);
        let _stream = from_guest(&daemon, &mut guest, &FLOW);
        for _ in 0..5 {
            remove(&guest, 0);
            guest.rings[TX].kick();
            assert!(
                guest.rings[TX].wait_error(PATIENCE),
                "the error eventfd is silent"
            );
            add(&guest, 0);
            (0..2).for_each(|ring| _ = guest.frontend.vring_base(ring));
            guest.restart_fresh();
            guest.settle();
            assert_serves(&daemon, &mut guest);
        }
    }
    daemon.assert_unharmed();
}

#[test]
fn a_memory_table_replaces_all_regions() {
    let daemon = Survivor::start();
    for setup in both(plugged_later()) {
        let (mut guest, stream) = connected(&daemon, setup);
        for _ in 0..3 {
            add(&guest, 2);
            add(&guest, 3);
            assert_carries(&mut guest, 3, &FLOW, &stream);
            guest.frontend.share(&guest.memory.regions()[..2]);
            send_from(&mut guest, 3, &FLOW, b"lost");
            assert_carries(&mut guest, 1, &FLOW, &stream);
        }
    }
    daemon.assert_unharmed();
}

/// Panics unless each of these messages is refused without a trace, and the session goes on.
#[track_caller]
fn assert_refused(change: impl Fn(&SimGuest) -> Vec<Region>, send: fn(&Frontend, &Region) -> u64) {
    let daemon = Survivor::start();
    for setup in both(plugged_later()) {
        let (mut guest, stream) = connected(&daemon, setup);
        add(&guest, 2);
        let descriptors = daemon.at_rest().0;
        for round in 0..10 {
            for (number, region) in change(&guest).iter().enumerate() {
                let status = send(&guest.frontend, region);
                assert_ne!(status, 0, "region {number} is taken, in round {round}");
            }
        }
        assert_eq!(daemon.at_rest().0, descriptors, "descriptors");
        assert_carries(&mut guest, 1, &FLOW, &stream);
        assert_carries(&mut guest, 2, &FLOW, &stream);
        add(&guest, 3);
        assert_carries(&mut guest, 3, &FLOW, &stream);
        remove(&guest, 2);
        assert_carries(&mut guest, 3, &FLOW, &stream);
    }
    daemon.assert_unharmed();
}

#[test]
fn an_overlapping_region_is_refused() {
    assert_refused(
        |guest| {
            let all = guest.memory.regions();
            vec![
                changed(&all[2], |_| ()),
                changed(&all[2], |region| region.guest_addr += 4096),
                changed(&all[2], |region| region.size = 4096),
                changed(&all[2], |region| {
                    region.guest_addr += 4096;
                    region.size = 4096;
                }),
                // Over the end of the region before, and over the start of the first one.
                changed(&all[3], |region| region.guest_addr -= 4096),
                changed(&all[2], |region| {
                    region.guest_addr = all[0].guest_addr - 4096;
                    region.size = 8192;
                }),
                // Around all the others.
                changed(&all[0], |region| {
                    region.guest_addr -= 1 << 20;
                    region.size = 64 << 20;
                }),
            ]
        },
        Frontend::try_add_mem_reg,
    );
}

#[test]
fn an_invalid_region_is_refused() {
    assert_refused(
        |guest| {
            let region = &guest.memory.regions()[3];
            vec![
                changed(region, |region| region.size = 0),
                changed(region, |region| region.size = u64::MAX),
                changed(region, |region| region.guest_addr = u64::MAX - 4095),
                another(region, File::open("/dev/null").unwrap().into()),
                another(region, std::io::pipe().unwrap().0.into()),
            ]
        },
        Frontend::try_add_mem_reg,
    );
}

#[test]
fn the_removal_of_an_unknown_region_is_refused() {
    assert_refused(
        |guest| {
            let all = guest.memory.regions();
            vec![
                changed(&all[3], |_| ()),
                changed(&all[2], |region| region.guest_addr += 4096),
                changed(&all[2], |region| region.size -= 4096),
                changed(&all[2], |region| region.size *= 2),
                changed(&all[2], |region| region.user_addr += 4096),
                changed(&all[2], |region| region.size = 0),
                changed(&all[0], |region| region.guest_addr = 0),
            ]
        },
        Frontend::try_rem_mem_reg,
    );
}

#[test]
fn all_slots_can_be_used_and_no_more() {
    let daemon = Survivor::start();
    for setup in both(plugged_later()) {
        let (mut guest, stream) = connected(&daemon, setup);
        let slots = guest.frontend.max_mem_slots();
        assert!(slots <= 4096, "{slots} slots");
        // Small ones, far beyond the others, all in one file.
        let last = guest.memory.regions().last().unwrap();
        let region = |number: u64| {
            changed(last, |region| {
                region.guest_addr += (1 << 30) + number * 8192;
                region.user_addr += (1 << 30) + number * 8192;
                region.size = 4096;
            })
        };
        let descriptors = daemon.at_rest().0;
        for _ in 0..2 {
            // Two are in use.
            (2..slots).for_each(|number| guest.frontend.add_mem_reg(&region(number)));
            assert_ne!(guest.frontend.try_add_mem_reg(&region(slots)), 0);
            (2..slots).for_each(|number| guest.frontend.rem_mem_reg(&region(number)));
        }
        assert_eq!(daemon.at_rest().0, descriptors, "descriptors");
        add(&guest, 2);
        assert_carries(&mut guest, 2, &FLOW, &stream);
    }
    daemon.assert_unharmed();
}

#[test]
fn malformed_messages_about_slots() {
    let daemon = Survivor::start();
    let memory = |guest: &SimGuest| guest.memory.regions()[2].fd.try_clone().unwrap();
    for request in [Request::AddMemReg, Request::RemMemReg] {
        for size in [0, 8, 32, 39, 40, 41, 80, 4096] {
            for count in [0, 1, 2, 8] {
                let guest = SimGuest::connect(&daemon, plugged_later());
                let file = memory(&guest);
                let mut payload = vec![0; 8];
                payload.extend(guest.memory.regions()[2].describe());
                payload.resize(size, 0);
                let fds = vec![file.as_fd(); count];
                // The daemon may refuse it or drop the VMM.
                guest
                    .frontend
                    .send_message(request as u32, 0, &payload, &fds);
            }
        }
    }
    daemon.assert_unharmed();
}
