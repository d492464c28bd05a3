//! A hostile guest or VMM: the daemon survives and serves the next one.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::Duration;

use common::daemon::{Daemon, PATIENCE, eventually};
use common::sim::guest::{RX, TX};
use common::sim::host::{
    FLOW, PORT, assert_moves_bytes, assert_same, assert_serves, connect, device, dial, fill,
    from_guest, from_host, listen, pattern, read_exactly, recv_bytes,
};
use common::sim::memory::GUEST_BASE;
use common::sim::packet::HEADER_LEN;
use common::sim::ring::{F_INDIRECT, F_NEXT, F_WRITE, Indirect, Part, TABLE_LEN};
use common::sim::survivor::SLACK_KIB;
use common::sim::vhost_user::Request;
use common::sim::{Flow, Op, Packet, Setup, SimGuest};

fn read_part(addr: u64, len: usize) -> Part {
    Part {
        addr,
        len: len as u32,
        write: false,
    }
}

/// Memory with these bytes in it.
fn place(guest: &SimGuest, bytes: &[u8]) -> u64 {
    let addr = guest.memory.alloc(bytes.len() as u64, 1);
    guest.memory.write(addr, bytes);
    addr
}

/// Offers malformed chains with `offer`: each comes back, nothing is answered, and a connection goes on.
fn assert_survives(offer: impl Fn(&mut SimGuest)) {
    let (daemon, mut guest) = device();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    for _ in 0..3 {
        offer(&mut guest);
        guest.wait_tx_done();
        assert!(
            guest.settle().is_empty(),
            "the guest got packets for chains that are none"
        );
        assert_moves_bytes(&mut guest, &stream, &FLOW);
    }
    daemon.assert_alive();
    assert_serves(&daemon, &mut guest);
}

// --- Malformed chains.

#[test]
fn a_chain_that_is_a_loop() {
    assert_survives(|guest| {
        let addr = place(guest, &FLOW.packet(Op::Request).bytes());
        let ring = &mut guest.rings[TX];
        let slots = ring.take_slots(2);
        ring.write_desc(slots[0], addr, 20, F_NEXT, slots[1]);
        ring.write_desc(slots[1], addr + 20, 24, F_NEXT, slots[0]);
        ring.offer(slots);
        ring.kick();
    });
}

#[test]
fn a_descriptor_that_is_its_own_next() {
    assert_survives(|guest| {
        let addr = place(guest, &FLOW.rw(&[1; 1000]).bytes());
        let ring = &mut guest.rings[TX];
        let slots = ring.take_slots(1);
        ring.write_desc(slots[0], addr, 1, F_NEXT, slots[0]);
        ring.offer(slots);
        ring.kick();
    });
}

#[test]
fn a_next_outside_the_table() {
    assert_survives(|guest| {
        let addr = place(guest, &FLOW.packet(Op::Rst).bytes());
        let ring = &mut guest.rings[TX];
        let slots = ring.take_slots(1);
        ring.write_desc(slots[0], addr, 20, F_NEXT, 60_000);
        ring.offer(slots);
        ring.kick();
    });
}

#[test]
fn buffers_that_the_device_may_only_write() {
    assert_survives(|guest| {
        let bytes = FLOW.packet(Op::Rst).bytes();
        let addr = place(guest, &bytes);
        let written = Part {
            write: true,
            ..read_part(addr, bytes.len())
        };
        guest.send_chain(&[written], Indirect::No);
    });
}

#[test]
fn a_header_to_read_and_a_payload_to_write() {
    assert_survives(|guest| {
        let addr = place(guest, &FLOW.rw(&[9; 500]).bytes());
        let payload = Part {
            write: true,
            ..read_part(addr + HEADER_LEN as u64, 500)
        };
        guest.send_chain(&[read_part(addr, HEADER_LEN), payload], Indirect::No);
    });
}

#[test]
fn buffers_outside_the_memory() {
    for addr in [0, 0x1000, GUEST_BASE - 44, u64::MAX, u64::MAX - 43, 1 << 63] {
        assert_survives(|guest| guest.send_chain(&[read_part(addr, HEADER_LEN)], Indirect::No));
    }
}

#[test]
fn buffers_that_reach_over_the_end_of_the_memory() {
    assert_survives(|guest| {
        let packet = FLOW.rw(&[5; 1000]);
        let end = guest.memory.end();
        guest.memory.write(end - 100, &packet.bytes()[..100]);
        guest.send_chain(&[read_part(end - 100, 1044)], Indirect::No);
        guest.send_chain(&[read_part(end - 20, HEADER_LEN)], Indirect::No);
        let head = place(guest, &packet.header());
        guest.send_chain(
            &[read_part(head, HEADER_LEN), read_part(end - 100, 1000)],
            Indirect::No,
        );
    });
}

#[test]
fn chains_shorter_than_a_header() {
    assert_survives(|guest| {
        let addr = place(guest, &FLOW.packet(Op::Rst).bytes());
        for len in [0, 1, 43] {
            guest.send_chain(&[read_part(addr, len)], Indirect::No);
        }
        guest.send_chain(
            &[read_part(addr, 20), read_part(addr + 20, 23)],
            Indirect::No,
        );
        guest.send_chain(&[read_part(addr, 0), read_part(addr, 0)], Indirect::No);
    });
}

#[test]
fn a_len_beyond_the_chain() {
    assert_survives(|guest| {
        for len in [11, 4096, 65_537, u32::MAX, u32::MAX - 43] {
            let packet = Packet {
                len,
                ..FLOW.rw(&[1; 10])
            };
            let bytes = packet.bytes();
            let addr = place(guest, &bytes);
            guest.send_chain(&[read_part(addr, bytes.len())], Indirect::No);
            guest.send_chain(
                &[read_part(addr, HEADER_LEN), read_part(addr + 44, 10)],
                Indirect::No,
            );
        }
    });
}

#[test]
fn descriptor_lengths_that_sum_up_beyond_32_bits() {
    assert_survives(|guest| {
        let addr = place(guest, &FLOW.rw(&[1; 10]).bytes());
        let huge = read_part(addr, u32::MAX as usize);
        guest.send_chain(
            &[read_part(addr, HEADER_LEN), huge, huge, huge],
            Indirect::No,
        );
        guest.send_chain(&[huge; 20], Indirect::Whole);
    });
}

#[test]
fn indirect_tables_that_are_none() {
    assert_survives(|guest| {
        let addr = place(guest, &[0; 1024]);
        let end = guest.memory.end();
        // No table, half a descriptor, outside memory, over its end, longer than any ring.
        for (addr, len) in [
            (addr, 0),
            (addr, 24),
            (addr, 7),
            (64, 64),
            (end - 16, 64),
            (addr, 16 << 20),
        ] {
            let ring = &mut guest.rings[TX];
            let slots = ring.take_slots(1);
            ring.write_desc(slots[0], addr, len, F_INDIRECT, 0);
            ring.offer(slots);
            ring.kick();
            guest.wait_tx_done();
        }
    });
}

#[test]
fn an_indirect_table_in_an_indirect_table_and_loops_in_one() {
    assert_survives(|guest| {
        let table = place(guest, &[0; 16 * TABLE_LEN]);
        let data = place(guest, &FLOW.packet(Op::Rst).bytes());
        let offer = |guest: &mut SimGuest| {
            let ring = &mut guest.rings[TX];
            let slots = ring.take_slots(1);
            ring.write_desc(slots[0], table, 32, F_INDIRECT, 0);
            ring.offer(slots);
            ring.kick();
            guest.wait_tx_done();
        };
        guest.rings[TX].write_desc_in(table, 0, table, 32, F_INDIRECT, 0);
        offer(guest);
        guest.rings[TX].write_desc_in(table, 0, data, 20, F_NEXT, 1);
        guest.rings[TX].write_desc_in(table, 1, data, 20, F_NEXT, 0);
        offer(guest);
        guest.rings[TX].write_desc_in(table, 1, data, 20, F_NEXT, 9);
        offer(guest);
    });
}

#[test]
fn a_len_shorter_than_the_chain_is_a_packet() {
    let (daemon, mut guest) = device();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    let bytes = pattern(1, 600);
    let packet = Packet {
        len: 500,
        ..FLOW.rw(&bytes)
    };
    let addr = place(&guest, &packet.bytes());
    guest.send_chain(
        &[read_part(addr, HEADER_LEN), read_part(addr + 44, 600)],
        Indirect::No,
    );
    assert_same(&read_exactly(&stream, 500), &bytes[..500]);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
}

#[test]
fn empty_descriptors_between_the_others() {
    let (daemon, mut guest) = device();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    let bytes = pattern(1, 100);
    let addr = place(&guest, &FLOW.rw(&bytes).bytes());
    let none = read_part(addr, 0);
    let parts = [
        none,
        read_part(addr, 44),
        none,
        none,
        read_part(addr + 44, 50),
        none,
        read_part(addr + 94, 50),
        none,
    ];
    guest.send_chain(&parts, Indirect::No);
    assert_same(&read_exactly(&stream, 100), &bytes);
}

#[test]
fn a_malformed_chain_between_good_ones_takes_nothing_along() {
    let (daemon, mut guest) = device();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    let bytes = pattern(1, 300_000);
    let bad = place(&guest, &FLOW.packet(Op::Rst).bytes());
    for piece in bytes.chunks(5000) {
        guest.send(&FLOW.rw(piece));
        guest.send_chain(&[read_part(bad, 43)], Indirect::No);
        if piece.len() < 5000 {
            break;
        }
        assert_same(&read_exactly(&stream, piece.len()), piece);
    }
}

// --- Unusable RX buffers.

/// A guest whose first RX buffers have `lengths`; the others are good.
fn with_bad_rx(lengths: &[&[u32]]) -> (Daemon, SimGuest) {
    let daemon = Daemon::start();
    let mut guest = SimGuest::connect(&daemon, Setup::default());
    for parts in lengths {
        let parts: Vec<_> = parts
            .iter()
            .map(|&len| Part {
                write: true,
                ..read_part(guest.memory.alloc(len.into(), 1), len as usize)
            })
            .collect();
        guest.rings[RX].add(&parts, Indirect::No).unwrap();
    }
    (daemon, guest)
}

/// Takes back `count` buffers that must be unused.
#[track_caller]
fn take_unused(guest: &mut SimGuest, count: usize) {
    for _ in 0..count {
        assert!(
            guest.rings[RX].wait_used(PATIENCE),
            "a buffer that holds no packet is kept"
        );
        assert_eq!(
            guest.rings[RX].pop_used().unwrap().1,
            0,
            "bytes in a buffer that holds no packet"
        );
    }
}

#[test]
fn rx_buffers_too_short_for_a_packet_come_back_unused() {
    let (daemon, mut guest) = with_bad_rx(&[&[43], &[1], &[20, 23], &[0], &[10]]);
    guest.post_rx();
    guest.start_rings();
    guest.send(&FLOW.packet(Op::Request));
    take_unused(&mut guest, 5);
    guest.recv().assert_is(Op::Rst, &FLOW);
    assert_serves(&daemon, &mut guest);
}

#[test]
fn rx_buffers_for_a_header_alone_do_not_stop_the_bytes() {
    // A buffer of 44 bytes when there is payload may carry a header, or come back unused.
    let (daemon, mut guest) = with_bad_rx(&[&[44]]);
    guest.post_rx();
    guest.start_rings();
    let listener = listen(&daemon, PORT);
    guest.send(&FLOW.packet(Op::Request));
    assert!(guest.rings[RX].wait_used(PATIENCE));
    let (_, used) = guest.rings[RX].pop_used().unwrap();
    assert!(used == 0 || used == 44, "{used} bytes used of 44");
    if used == 0 {
        guest.recv().assert_is(Op::Response, &FLOW);
    }
    let stream = common::sim::host::accept(&listener);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
}

#[test]
fn rx_buffers_of_44_bytes_for_payload() {
    let (daemon, mut guest) = with_bad_rx(&[]);
    guest.post_rx_some(1);
    guest.auto_repost = false;
    guest.start_rings();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    let addr = guest.memory.alloc(44, 1);
    let part = Part {
        write: true,
        ..read_part(addr, 44)
    };
    guest.rings[RX].add(&[part], Indirect::No).unwrap();
    guest.rings[RX].kick_if_needed();
    (&stream).write_all(b"payload").unwrap();
    assert!(
        guest.rings[RX].wait_used(PATIENCE),
        "a buffer without room for payload is kept"
    );
    let (_, used) = guest.rings[RX].pop_used().unwrap();
    assert!(used == 0 || used == 44, "{used} bytes used of 44");
    guest.post_rx();
    assert_same(&recv_bytes(&mut guest, &FLOW, 7), b"payload");
}

#[test]
fn rx_buffers_the_device_can_not_write() {
    let (daemon, mut guest) = with_bad_rx(&[]);
    let inside = guest.memory.alloc(4096, 1);
    let end = guest.memory.end();
    let bad = [
        Part {
            write: false,
            ..read_part(inside, 4096)
        },
        Part {
            write: true,
            ..read_part(8, 4096)
        },
        Part {
            write: true,
            ..read_part(end - 40, 4096)
        },
    ];
    for part in bad {
        guest.rings[RX].add(&[part], Indirect::No).unwrap();
    }
    guest.post_rx();
    guest.start_rings();
    guest.send(&FLOW.packet(Op::Request));
    take_unused(&mut guest, 3);
    guest.recv().assert_is(Op::Rst, &FLOW);
    assert_serves(&daemon, &mut guest);
}

// --- Broken rings.

/// Stops rings whose indices are meaningless by now.
fn give_up(guest: &mut SimGuest) {
    for index in 0..2 {
        guest.frontend.vring_base(index);
    }
}

#[track_caller]
fn assert_breaks_and_restarts(ring: usize, break_it: impl Fn(&mut SimGuest)) {
    let (daemon, mut guest) = device();
    for _ in 0..3 {
        break_it(&mut guest);
        assert!(
            guest.rings[ring].wait_error(PATIENCE),
            "the error eventfd is silent"
        );
        daemon.assert_alive();
        give_up(&mut guest);
        guest.restart_fresh();
        guest.settle();
        assert_serves(&daemon, &mut guest);
    }
    drop(guest);
    assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
}

#[test]
fn a_jump_of_the_tx_avail_index_stops_the_ring() {
    for jump in [129, 1000, 32_768, 60_000] {
        assert_breaks_and_restarts(TX, |guest| {
            let ring = &mut guest.rings[TX];
            ring.set_avail_idx(ring.avail_idx().wrapping_add(jump));
            ring.kick();
        });
    }
}

#[test]
fn a_jump_of_the_rx_avail_index_stops_the_ring() {
    assert_breaks_and_restarts(RX, |guest| {
        let ring = &mut guest.rings[RX];
        ring.set_avail_idx(ring.avail_idx().wrapping_add(5000));
        ring.kick();
        // The ring may be read only when there is a packet for it.
        guest.try_send(&FLOW.packet(Op::Request), guest.setup.tx, Indirect::No);
        guest.rings[TX].kick();
    });
}

#[test]
fn a_broken_tx_ring_leaves_the_other_direction_alone() {
    let (daemon, mut guest) = device();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    let ring = &mut guest.rings[TX];
    ring.set_avail_idx(ring.avail_idx().wrapping_add(9999));
    ring.kick();
    assert!(guest.rings[TX].wait_error(PATIENCE));
    (&stream).write_all(b"to the guest").unwrap();
    assert_same(&recv_bytes(&mut guest, &FLOW, 12), b"to the guest");
}

#[test]
fn heads_beyond_the_ring_do_no_harm() {
    let (daemon, mut guest) = device();
    for head in [128, 129, 40_000, 65_535] {
        guest.rings[TX].push_avail(head);
        guest.rings[TX].kick();
    }
    // The ring may go on or stop. The next start works.
    sleep(Duration::from_millis(50));
    daemon.assert_alive();
    give_up(&mut guest);
    guest.restart_fresh();
    guest.settle();
    assert_serves(&daemon, &mut guest);
}

#[test]
fn the_same_chain_offered_many_times() {
    let (daemon, mut guest) = device();
    let addr = place(&guest, &FLOW.packet(Op::Rst).bytes());
    let ring = &mut guest.rings[TX];
    let slots = ring.take_slots(1);
    ring.write_desc(slots[0], addr, 44, 0, 0);
    (0..100).for_each(|_| ring.push_avail(slots[0]));
    let wanted = ring.avail_idx();
    ring.kick();
    eventually("all are used", || {
        guest.rings[TX].device_used_idx() == wanted
    });
    daemon.assert_alive();
}

#[test]
fn rings_outside_the_memory() {
    let daemon = Daemon::start();
    for shift in [1 << 40, u64::MAX / 2, 30 << 20] {
        let guest = SimGuest::connect(&daemon, Setup::default());
        let mut ring = guest.rings[TX].addresses();
        for addr in [&mut ring.desc, &mut ring.avail, &mut ring.used] {
            *addr = addr.wrapping_add(shift);
        }
        let payload = [
            &[TX as u32, 0].map(u32::to_le_bytes).concat()[..],
            &[ring.desc, ring.used, ring.avail, 0]
                .map(u64::to_le_bytes)
                .concat(),
        ];
        // A refusal is as good as a ring that never runs.
        guest
            .frontend
            .send_message(Request::SetVringAddr as u32, 0, &payload.concat(), &[]);
        drop(guest);
        daemon.assert_alive();
    }
    assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
}

// --- Floods, and an idle device.

#[test]
fn a_flood_that_must_be_reset_with_no_rx_buffer() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::connect(&daemon, Setup::default());
    guest.start_rings();
    let before = daemon.anonymous_kib();
    for port in 0..20_000 {
        guest.send(&Flow::new(port, PORT).packet(Op::Request));
    }
    guest.wait_tx_done();
    assert!(
        daemon.anonymous_kib() <= before + SLACK_KIB,
        "the daemon grows"
    );
    guest.post_rx();
    // As many as were kept come, each an RST of its own; then there is room again for the answer to a probe.
    let mut resets = Vec::new();
    while let Some(packet) = guest.try_recv(Duration::from_secs(1)) {
        resets.push(packet);
    }
    assert!(
        resets.len() >= 128 && resets.len() <= 20_000,
        "{} resets",
        resets.len()
    );
    assert!(resets.iter().all(|packet| packet.is(Op::Rst)));
    assert_serves(&daemon, &mut guest);
}

#[test]
fn a_flood_of_credit_requests_with_no_rx_buffer() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::connect(&daemon, Setup::default());
    guest.auto_repost = false;
    guest.post_rx_some(1);
    guest.start_rings();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    for _ in 0..20_000 {
        guest.send(&FLOW.packet(Op::CreditRequest));
    }
    guest.wait_tx_done();
    guest.auto_repost = true;
    guest.post_rx();
    guest.recv().assert_is(Op::CreditUpdate, &FLOW);
    assert!(guest.settle().len() < 1000, "one answer is enough");
    assert_moves_bytes(&mut guest, &stream, &FLOW);
}

#[test]
fn connections_and_resets_in_a_flood() {
    let (daemon, mut guest) = device();
    let _listener = listen(&daemon, PORT);
    let (before, _) = daemon.at_rest();
    for round in 0..50 {
        for port in 0..60 {
            let flow = Flow::new(round * 100 + port, PORT);
            guest.send(&flow.packet(Op::Request));
            guest.send(&flow.rw(b"x"));
            guest.send(&flow.packet(Op::Rst));
        }
        guest.settle();
    }
    eventually("no descriptor stays", || {
        daemon.open_descriptors() <= before
    });
    assert_serves(&daemon, &mut guest);
}

#[test]
fn an_idle_device_uses_no_processor() {
    let (daemon, mut guest) = device();
    daemon.assert_idle();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    let (other, flow, _) = from_host(&daemon, &mut guest, PORT);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    assert_moves_bytes(&mut guest, &other, &flow);
    daemon.assert_idle();
}

#[test]
fn a_daemon_without_a_vmm_uses_no_processor() {
    let daemon = Daemon::start();
    daemon.assert_idle();
    drop(SimGuest::start(&daemon, Setup::default()));
    daemon.assert_idle();
}

#[test]
fn a_host_that_does_not_read_costs_no_processor() {
    let (daemon, mut guest) = device();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    fill(&mut guest, &FLOW);
    daemon.assert_idle();
    guest.send(&FLOW.shutdown(3));
    daemon.assert_idle();
    drop(stream);
}

/// Writes until the stream takes no more.
fn write_until_full(stream: &UnixStream) {
    stream
        .set_write_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let bytes = vec![1; 65_536];
    while { stream }.write(&bytes).is_ok() {}
}

#[test]
fn a_guest_that_gives_no_credit_costs_no_processor() {
    let (daemon, mut guest) = device();
    let flow = Flow {
        buf_alloc: 5000,
        ..FLOW
    };
    let stream = from_guest(&daemon, &mut guest, &flow);
    write_until_full(&stream);
    while guest.poll_packet().is_some() {}
    daemon.assert_idle();
    drop(stream);
    daemon.assert_idle();
}

#[test]
fn a_guest_without_rx_buffers_costs_no_processor() {
    let (daemon, mut guest) = device();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    guest.auto_repost = false;
    write_until_full(&stream);
    let client = dial(&daemon, PORT);
    daemon.assert_idle();
    drop(stream);
    drop(client);
    daemon.assert_idle();
}

#[test]
fn a_stopped_device_costs_no_processor() {
    let (daemon, mut guest) = device();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    guest.stop_rings();
    write_until_full(&stream);
    let _waiting = dial(&daemon, PORT);
    daemon.assert_idle();
    drop(stream);
    daemon.assert_idle();
}

#[test]
fn a_broken_ring_costs_no_processor() {
    let (daemon, mut guest) = device();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    let ring = &mut guest.rings[TX];
    ring.set_avail_idx(ring.avail_idx().wrapping_add(9999));
    ring.kick();
    assert!(guest.rings[TX].wait_error(PATIENCE));
    write_until_full(&stream);
    daemon.assert_idle();
}

#[test]
fn half_closed_peers_cost_no_processor() {
    let (daemon, mut guest) = device();
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    guest.recv().assert_is(Op::Shutdown, &FLOW);
    daemon.assert_idle();
    guest.send(&FLOW.shutdown(2));
    let mut rest = Vec::new();
    (&stream).read_to_end(&mut rest).unwrap();
    daemon.assert_idle();
}

#[test]
fn silent_clients_cost_no_processor() {
    let (daemon, _guest) = device();
    let clients: Vec<_> = (0..50).map(|_| connect(&daemon.uds_path())).collect();
    for client in &clients[..25] {
        { client }.write_all(b"CONN").unwrap();
    }
    daemon.assert_idle();
    drop(clients);
    daemon.assert_idle();
}

#[test]
fn a_writable_flag_on_a_buffer_for_the_device_is_not_believed() {
    let (daemon, mut guest) = device();
    let addr = place(&guest, &FLOW.packet(Op::Request).bytes());
    let ring = &mut guest.rings[TX];
    let slots = ring.take_slots(2);
    ring.write_desc(slots[0], addr, 20, F_NEXT | F_WRITE, slots[1]);
    ring.write_desc(slots[1], addr + 20, 24, 0, 0);
    ring.offer(slots);
    ring.kick();
    guest.wait_tx_done();
    assert!(guest.settle().is_empty());
    assert_serves(&daemon, &mut guest);
}
