//! Misused rings and guest memory: whatever they contain, the daemon survives and serves the next VMM.

mod common;

use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::daemon::PATIENCE;
use common::sim::guest::{RX, TX};
use common::sim::host::{
    FLOW, assert_moves_bytes, assert_same, assert_serves, from_guest, pattern, read_exactly,
    read_to_end, recv_bytes, recv_other,
};
use common::sim::memory::GuestMemory;
use common::sim::packet::HEADER_LEN;
use common::sim::ring::{F_INDIRECT, F_NEXT, Indirect, Part, Ring};
use common::sim::vhost_user::{Request, RingAddresses};
use common::sim::{Dice, Op, Packet, Setup, SimGuest, Survivor};

/// Descriptors that the device reads.
fn parts(addr: u64, lengths: &[usize]) -> Vec<Part> {
    let mut addr = addr;
    let part = |&len: &usize| {
        let len = len as u32;
        addr += u64::from(len);
        Part {
            addr: addr - u64::from(len),
            len,
            write: false,
        }
    };
    lengths.iter().map(part).collect()
}

/// Memory with these bytes in it.
fn place(guest: &SimGuest, bytes: &[u8]) -> u64 {
    let addr = guest.memory.alloc(bytes.len() as u64, 1);
    guest.memory.write(addr, bytes);
    addr
}

/// Sends a chain that is an indirect table of any length, and waits for it to come back.
fn send_table(guest: &mut SimGuest, parts: &[Part]) {
    let table = guest.memory.alloc(16 * parts.len() as u64, 16);
    let ring = &mut guest.rings[TX];
    for (index, part) in parts.iter().enumerate() {
        let flags = if index + 1 < parts.len() { F_NEXT } else { 0 };
        let next = index as u16 + 1;
        ring.write_desc_in(table, index as u16, part.addr, part.len, flags, next);
    }
    let slots = ring.take_slots(1);
    ring.write_desc(slots[0], table, 16 * parts.len() as u32, F_INDIRECT, 0);
    ring.offer(slots);
    ring.kick();
    guest.wait_tx_done();
}

// --- Chains.

#[test]
fn a_chain_as_long_as_the_ring_is_a_packet_and_a_longer_one_is_none() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(
        &daemon,
        Setup {
            ring_size: 8,
            ..Setup::default()
        },
    );
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    let longest = place(&guest, &FLOW.rw(b"1234567").bytes());
    let longer = place(&guest, &FLOW.rw(b"8 bytes!").bytes());
    send_table(&mut guest, &parts(longer, &[44, 1, 1, 1, 1, 1, 1, 1, 1]));
    send_table(&mut guest, &parts(longest, &[44, 1, 1, 1, 1, 1, 1, 1]));
    assert_same(&read_exactly(&stream, 7), b"1234567");
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn a_packet_of_single_bytes() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    let bytes = pattern(3, 80);
    let addr = place(&guest, &FLOW.rw(&bytes).bytes());
    send_table(&mut guest, &parts(addr, &[1; HEADER_LEN + 80]));
    assert_same(&read_exactly(&stream, 80), &bytes);
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn every_len_that_the_chain_holds() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(
        &daemon,
        Setup {
            tx_payload: 66_000,
            ..Setup::default()
        },
    );
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    for len in [0, 1, 65_535, 65_536, 65_537, 0, 1] {
        let bytes = pattern(len as u64, len);
        guest.send(&FLOW.rw(&bytes));
        assert_same(&read_exactly(&stream, len), &bytes);
    }
    assert!(
        guest
            .settle()
            .iter()
            .all(|packet| packet.is(Op::CreditUpdate))
    );
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn gigabytes_in_one_chain_are_past_the_credit() {
    let daemon = Survivor::start();
    let setup = Setup {
        regions: vec![2 << 20, 62 << 20],
        ..Setup::default()
    };
    let mut guest = SimGuest::start(&daemon, setup);
    // Many descriptors that refer to the same valid memory.
    let piece = parts(guest.memory.end() - (40 << 20), &[40 << 20])[0];
    let send = |guest: &mut SimGuest, len: u32, pieces: usize| {
        let addr = place(
            guest,
            &Packet {
                len,
                ..FLOW.packet(Op::Rw)
            }
            .bytes(),
        );
        let chain = [parts(addr, &[HEADER_LEN]), vec![piece; pieces]].concat();
        send_table(guest, &chain);
    };
    for len in [1 << 31, 4000 << 20] {
        let stream = from_guest(&daemon, &mut guest, &FLOW);
        send(&mut guest, len, 102);
        guest.recv().assert_is(Op::Rst, &FLOW);
        assert_same(&read_to_end(&stream), b"");
    }
    // More than 2^32 bytes are no chain at all (virtio 1.2, 2.7.5).
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    send(&mut guest, u32::MAX, 110);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn a_len_in_a_packet_without_payload_means_nothing() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    let ops = [
        Op::Response,
        Op::CreditUpdate,
        Op::CreditRequest,
        Op::Shutdown,
    ];
    for op in ops {
        let packet = Packet {
            op: op as u16,
            ..FLOW.rw(&[1; 5000])
        };
        guest.send(&packet);
    }
    guest
        .settle()
        .iter()
        .for_each(|packet| packet.assert_is(Op::CreditUpdate, &FLOW));
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn a_header_that_changes_while_it_is_read() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    let reader = thread::spawn(move || read_to_end(&stream));
    let addr = place(
        &guest,
        &[FLOW.rw(&[b'x'; 100]).bytes(), vec![b'y'; 5000]].concat(),
    );
    let stop = Arc::new(AtomicBool::new(false));
    let writer = thread::spawn({
        let (memory, stop) = (guest.memory.clone(), stop.clone());
        move || {
            let store = |len: u32| {
                memory.store_u16(addr + 24, len as u16);
                memory.store_u16(addr + 26, (len >> 16) as u16);
            };
            while !stop.load(Ordering::Relaxed) {
                [10, 100, 5000, 1 << 31, u32::MAX]
                    .into_iter()
                    .for_each(store);
            }
        }
    });
    for _ in 0..2000 {
        guest.send_chain(&parts(addr, &[HEADER_LEN + 100]), Indirect::No);
        guest.wait_tx_done();
        // Credit updates come in between.
        while let Some(packet) = guest.poll_packet() {
            packet.assert_is(Op::CreditUpdate, &FLOW);
        }
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    guest.memory.write(addr, &FLOW.shutdown(3).bytes());
    guest.send_chain(&parts(addr, &[HEADER_LEN]), Indirect::No);
    recv_other(&mut guest).assert_is(Op::Rst, &FLOW);
    let bytes = reader.join().unwrap();
    assert!(
        !bytes.is_empty() && bytes.len() <= 200_000,
        "{}",
        bytes.len()
    );
    assert!(
        bytes.iter().all(|&byte| byte == b'x'),
        "bytes from behind the chain"
    );
    drop(guest);
    daemon.assert_unharmed();
}

// --- Rings at invalid places.

/// Starts a ring anywhere in memory. The daemon may refuse it.
fn start_anywhere(guest: &SimGuest, index: usize, addresses: RingAddresses) {
    let ring = &guest.rings[index];
    let frontend = &guest.frontend;
    let words = [addresses.desc, addresses.used, addresses.avail, 0];
    let mut payload = (index as u64).to_le_bytes().to_vec();
    payload.extend(words.map(u64::to_le_bytes).concat());
    frontend.set_vring_num(index as u32, ring.size().into());
    frontend.set_vring_base(index as u32, 0);
    frontend.set(Request::SetVringAddr, &payload, &[]);
    frontend.set_vring_fd(Request::SetVringErr, index as u32, ring.err_fd.as_fd());
    frontend.set_vring_fd(Request::SetVringCall, index as u32, ring.call_fd.as_fd());
    frontend.set_vring_fd(Request::SetVringKick, index as u32, ring.kick_fd.as_fd());
    frontend.set_vring_enable(index as u32, true);
}

#[test]
fn rings_over_each_other_and_over_packets() {
    let daemon = Survivor::start();
    let mut dice = Dice::new(1);
    for _ in 0..40 {
        let mut guest = SimGuest::connect(&daemon, Setup::default());
        // All parts of both rings, their descriptors' buffers among them, within two pages.
        let page = guest.memory.alloc(8192, 4096);
        let user = guest.memory.user_addr(page);
        let mut any = |align| user + dice.below(4096) / align * align;
        for index in [RX, TX] {
            let (desc, used, avail) = (any(16), any(4), any(2));
            start_anywhere(&guest, index, RingAddresses { desc, used, avail });
        }
        for _ in 0..50 {
            // Small indices and addresses within the pages: plausible rings.
            for at in (0..8192).step_by(16) {
                let mut entry = (page + dice.below(8192)).to_le_bytes().to_vec();
                entry.extend((dice.below(200) as u32).to_le_bytes());
                entry.extend(
                    [dice.below(8) as u16, dice.below(130) as u16]
                        .map(u16::to_le_bytes)
                        .concat(),
                );
                guest.memory.write(page + at, &entry);
            }
            guest.rings[TX].kick();
            guest.rings[RX].kick();
            // By the reply, the worker has run or is running.
            guest.frontend.features();
        }
    }
    daemon.assert_unharmed();
}

#[test]
fn a_used_ring_over_the_avail_ring_keeps_nobody_from_serving_the_next() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::connect(&daemon, Setup::default());
    for index in [RX, TX] {
        let ring = guest.rings[index].addresses();
        // Returning a buffer offers it again.
        start_anywhere(
            &guest,
            index,
            RingAddresses {
                used: ring.avail & !3,
                ..ring
            },
        );
    }
    let packet = place(&guest, &FLOW.packet(Op::Request).bytes());
    guest.rings[TX].write_desc(0, packet, HEADER_LEN as u32, 0, 0);
    guest.rings[TX].push_avail(0);
    guest.rings[TX].kick();
    guest.frontend.features();
    drop(guest);
    daemon.assert_unharmed();
}

// --- Kicks, starts and stops.

#[test]
fn a_storm_of_kicks_keeps_nobody_from_being_served() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    let stop = Arc::new(AtomicBool::new(false));
    let kicks = [RX, TX].map(|ring| guest.rings[ring].kick_fd.as_fd().try_clone_to_owned());
    let storm = thread::spawn({
        let stop = stop.clone();
        move || {
            let mut kicks = kicks.map(|kick| std::fs::File::from(kick.unwrap()));
            while !stop.load(Ordering::Relaxed) {
                kicks
                    .iter_mut()
                    .for_each(|kick| kick.write_all(&1u64.to_ne_bytes()).unwrap());
            }
        }
    });
    (0..100).for_each(|_| assert_moves_bytes(&mut guest, &stream, &FLOW));
    assert_serves(&daemon, &mut guest);
    // The VMM is served too.
    (0..100).for_each(|_| _ = guest.frontend.features());
    stop.store(true, Ordering::Relaxed);
    storm.join().unwrap();
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn rings_start_again_in_another_size() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    for size in [8, 1024, 2, 256, 4, 128] {
        guest.stop_rings();
        guest.setup.ring_size = size;
        for ring in &mut guest.rings {
            *ring = Ring::new(guest.memory.clone(), size, guest.features);
        }
        guest.restart_fresh();
        assert_serves(&daemon, &mut guest);
    }
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn a_size_that_is_none_runs_no_ring() {
    let daemon = Survivor::start();
    for size in [0, 3, 127, 2048, 65_535, 65_536 + 128, u32::MAX] {
        let guest = SimGuest::connect(&daemon, Setup::default());
        let payload = [TX as u32, size].map(u32::to_le_bytes).concat();
        // The daemon may refuse it or drop the VMM.
        guest
            .frontend
            .send_message(Request::SetVringNum as u32, 0, &payload, &[]);
    }
    daemon.assert_unharmed();
}

// --- Changing memory.

/// SET_MEM_TABLE with some of the regions.
fn share(guest: &SimGuest, regions: &[usize]) {
    let all = guest.memory.regions();
    guest
        .frontend
        .share(regions.iter().map(|&index| &all[index]));
}

#[test]
fn memory_that_is_shared_again_under_load_loses_nothing() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    let mut flow = FLOW;
    for round in 0..100 {
        let bytes = pattern(round, 20_000);
        for piece in bytes.chunks(1000) {
            guest.send(&flow.rw(piece));
        }
        (&stream).write_all(&bytes).unwrap();
        share(&guest, &[0, 1]);
        assert_same(&read_exactly(&stream, bytes.len()), &bytes);
        assert_same(&recv_bytes(&mut guest, &flow, bytes.len()), &bytes);
        flow.fwd_cnt += bytes.len() as u32;
    }
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn memory_that_is_taken_away_under_load_stops_the_rings_until_they_start_again() {
    let daemon = Survivor::start();
    for _ in 0..10 {
        let mut guest = SimGuest::start(&daemon, Setup::default());
        let _stream = from_guest(&daemon, &mut guest, &FLOW);
        (0..20).for_each(|_| guest.send(&FLOW.rw(&[1; 1000])));
        // The rings lie in the first region.
        share(&guest, &[1]);
        guest.rings[TX].kick();
        assert!(
            guest.rings[TX].wait_error(PATIENCE),
            "the error eventfd is silent"
        );
        share(&guest, &[0, 1]);
        (0..2).for_each(|ring| _ = guest.frontend.vring_base(ring));
        guest.restart_fresh();
        guest.settle();
        assert_serves(&daemon, &mut guest);
    }
    daemon.assert_unharmed();
}

#[test]
fn buffers_whose_memory_is_taken_away_come_back_unused() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let stream = from_guest(&daemon, &mut guest, &FLOW);
    // The buffers lie in the second region.
    share(&guest, &[0]);
    guest.send(&FLOW.rw(b"lost"));
    guest.wait_tx_done();
    share(&guest, &[0, 1]);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn memory_tables_that_are_none() {
    let daemon = Survivor::start();
    let memory = GuestMemory::new(&[1 << 20], common::sim::memory::Backing::Pages);
    let region = &memory.regions()[0];
    let file = region.fd.as_fd();
    let (guest, size, user) = (region.guest_addr, region.size, region.user_addr);
    let word = u64::MAX;
    // Guest address, size, the frontend's address, offset in the file.
    let tables: [&[[u64; 4]]; 10] = [
        &[],
        &[[guest, 0, user, 0]],
        &[[guest, word, user, 0]],
        &[[word - 4095, size, user, 0]],
        &[[guest, size, word - 4095, 0]],
        &[[guest, size, user, word - 4095]],
        &[[guest, size, user, 1]],
        &[[guest, size, user, size]],
        &[[guest, 2 * size, user, 0]],
        &[[guest, size, user, 0], [guest + 4096, size, user, 0]],
    ];
    for table in tables {
        let frontend = SimGuest::connect(&daemon, Setup::default()).frontend;
        let mut payload = [table.len() as u32, 0].map(u32::to_le_bytes).concat();
        table
            .iter()
            .for_each(|words| payload.extend(words.map(u64::to_le_bytes).concat()));
        frontend.send_message(
            Request::SetMemTable as u32,
            0,
            &payload,
            &vec![file; table.len()],
        );
    }
    daemon.assert_unharmed();
}
