//! The log under a misbehaving guest: mistakes are logged, at a limited rate.

mod common;

use std::time::Instant;

use common::daemon::{Daemon, PATIENCE, eventually};
use common::sim::guest::{RX, TX};
use common::sim::host::{FLOW, assert_serves, device};
use common::sim::packet::HEADER_LEN;
use common::sim::ring::{F_INDIRECT, F_NEXT, Indirect, Part, TABLE_LEN};
use common::sim::{Flow, Op, Packet, Setup, SimGuest};

/// The lines of the log, without what is before their text.
fn lines(daemon: &Daemon) -> Vec<String> {
    let log = daemon.log();
    let texts = log.lines().filter_map(|line| line.split_once("] "));
    texts.map(|(_, text)| text.to_owned()).collect()
}

#[test]
fn the_first_line_names_the_version() {
    let daemon = Daemon::start();
    eventually("a line", || !lines(&daemon).is_empty());
    let version = format!("vhost-user-vsock {}", env!("CARGO_PKG_VERSION"));
    assert_eq!(lines(&daemon)[0], version);
    assert_eq!(daemon.log().matches(&version).count(), 1);
}

#[test]
fn a_driver_that_starts_the_device_is_logged() {
    let (daemon, guest) = device();
    let started = "the guest's driver has started the device";
    eventually("the start to be logged", || {
        lines(&daemon).iter().any(|line| line == started)
    });
    drop(guest);
    assert!(!daemon.log().contains("WARN"), "{}", daemon.log());
}

#[test]
fn a_driver_that_is_missing_is_warned_of_once_and_what_to_check() {
    let daemon = Daemon::start();
    // It knows the device and shares memory; the guest does not start.
    let mut guest = SimGuest::connect(&daemon, Setup::default());
    let warnings = || warnings(&daemon);
    eventually("a warning", || !warnings().is_empty());
    let warning = &warnings()[0];
    for text in ["connected for 5 s", "has not started", "share=on"] {
        assert!(warning.contains(text), "{warning}");
    }
    guest.post_rx();
    guest.start_rings();
    assert_serves(&daemon, &mut guest);
    assert_eq!(warnings().len(), 1, "{}", daemon.log());
}

/// What the daemon has warned of.
fn warnings(daemon: &Daemon) -> Vec<String> {
    let log = daemon.log();
    let warnings = log.lines().filter(|line| line.contains("WARN"));
    warnings.map(str::to_owned).collect()
}

#[test]
fn rings_that_stay_empty_are_warned_of_and_those_of_a_sound_guest_are_not() {
    let (sound, mut served) = device();
    assert_serves(&sound, &mut served);
    let daemon = Daemon::start();
    // As the daemon sees a guest whose memory is private: the VMM starts the rings, and nothing is ever in them.
    let mut guest = SimGuest::connect(&daemon, Setup::default());
    guest.start_rings();
    eventually("a warning", || !warnings(&daemon).is_empty());
    let warning = &warnings(&daemon)[0];
    for text in ["5 s ago", "no buffers", "share=on"] {
        assert!(warning.contains(text), "{warning}");
    }
    guest.post_rx();
    assert_serves(&daemon, &mut guest);
    assert_eq!(warnings(&daemon).len(), 1, "{}", daemon.log());
    assert!(warnings(&sound).is_empty(), "{}", sound.log());
}

/// How often a guest repeats a mistake.
const ROUNDS: usize = 500;

/// Lines allowed per second for one kind of mistake, which may be logged at several places, and at the beginning.
const LINES: usize = 5;

/// Repeats a mistake `ROUNDS` times. The log may report it, in few lines. Returns the number of lines before.
#[track_caller]
fn assert_few_lines(mistake: impl Fn(&mut SimGuest, usize)) -> (Daemon, usize) {
    let (daemon, mut guest) = device();
    let before = daemon.log().lines().count();
    let start = Instant::now();
    for round in 0..ROUNDS {
        mistake(&mut guest, round);
    }
    guest.auto_repost = true;
    guest.post_rx();
    assert_serves(&daemon, &mut guest);
    let seconds = start.elapsed().as_secs() as usize + 1;
    let lines = daemon.log().lines().count() - before;
    assert!(
        lines <= LINES * (seconds + 1),
        "{lines} lines in {seconds} s for {ROUNDS} times"
    );
    (daemon, before)
}

/// The same for a mistake that must be logged.
#[track_caller]
fn assert_logged_in_few_lines(mistake: impl Fn(&mut SimGuest, usize)) {
    let (daemon, before) = assert_few_lines(mistake);
    eventually("a line about it", || daemon.log().lines().count() > before);
}

/// Waits until a ring is reported broken, and restarts both from index 0.
#[track_caller]
fn restart_broken(guest: &mut SimGuest, ring: usize) {
    assert!(
        guest.rings[ring].wait_error(PATIENCE),
        "the error eventfd is silent"
    );
    (0..2).for_each(|index| _ = guest.frontend.vring_base(index));
    guest.restart_fresh();
    guest.settle();
}

#[test]
fn a_tx_ring_that_breaks_again_and_again() {
    assert_logged_in_few_lines(|guest, round| {
        let jump = [129, 1000, 32_768, 60_000][round % 4];
        let ring = &mut guest.rings[TX];
        ring.set_avail_idx(ring.avail_idx().wrapping_add(jump));
        ring.kick();
        restart_broken(guest, TX);
    });
}

#[test]
fn an_rx_ring_that_breaks_again_and_again() {
    assert_logged_in_few_lines(|guest, _| {
        let ring = &mut guest.rings[RX];
        ring.set_avail_idx(ring.avail_idx().wrapping_add(5000));
        // The ring is read when there is a packet for it.
        guest.send(&FLOW.packet(Op::Request));
        restart_broken(guest, RX);
    });
}

#[test]
fn rings_whose_memory_is_taken_away_again_and_again() {
    assert_logged_in_few_lines(|guest, _| {
        guest.frontend.share(&guest.memory.regions()[1..]);
        guest.rings[TX].kick();
        assert!(guest.rings[TX].wait_error(PATIENCE));
        guest.frontend.set_mem_table(&guest.memory);
        restart_broken(guest, TX);
    });
}

/// Memory with these bytes in it.
fn place(guest: &SimGuest, bytes: &[u8]) -> u64 {
    let addr = guest.memory.alloc(bytes.len() as u64, 1);
    guest.memory.write(addr, bytes);
    addr
}

fn part(addr: u64, len: u32, write: bool) -> Part {
    Part { addr, len, write }
}

#[test]
fn malformed_chains_again_and_again() {
    assert_logged_in_few_lines(|guest, _| {
        let header = HEADER_LEN as u32;
        let addr = place(guest, &FLOW.packet(Op::Rst).bytes());
        let end = guest.memory.end();
        for parts in [
            [part(addr, 43, false)],
            [part(addr, 0, false)],
            [part(addr, header, true)],
            [part(8, header, false)],
            [part(end - 10, header, false)],
            [part(u64::MAX - 9, header, false)],
        ] {
            guest.send_chain(&parts, Indirect::No);
            guest.wait_tx_done();
        }
        let longer = Packet {
            len: 1 << 20,
            ..FLOW.rw(b"short")
        };
        let addr = place(guest, &longer.bytes());
        guest.send_chain(&[part(addr, header + 5, false)], Indirect::No);
        guest.wait_tx_done();
    });
}

#[test]
fn loops_and_invalid_tables_again_and_again() {
    assert_logged_in_few_lines(|guest, _| {
        let table = place(guest, &[0; 16 * TABLE_LEN]);
        let end = guest.memory.end();
        let offer = |guest: &mut SimGuest, addr: u64, len: u32, flags: u16, next: u16| {
            let ring = &mut guest.rings[TX];
            let slots = ring.take_slots(1);
            ring.write_desc(slots[0], addr, len, flags, next);
            ring.offer(slots);
            ring.kick();
            guest.wait_tx_done();
        };
        for (addr, len) in [
            (table, 0),
            (table, 24),
            (64, 64),
            (end - 16, 64),
            (table, 16 << 20),
        ] {
            offer(guest, addr, len, F_INDIRECT, 0);
        }
        offer(guest, table, 20, F_NEXT, 60_000);
        // A nested table, and one with a loop.
        guest.rings[TX].write_desc_in(table, 0, table, 32, F_INDIRECT, 0);
        offer(guest, table, 32, F_INDIRECT, 0);
        guest.rings[TX].write_desc_in(table, 0, table, 20, F_NEXT, 0);
        offer(guest, table, 32, F_INDIRECT, 0);
    });
}

#[test]
fn heads_beyond_the_ring_again_and_again() {
    assert_few_lines(|guest, round| {
        let head = [128, 129, 40_000, 65_535][round % 4];
        guest.rings[TX].push_avail(head);
        guest.rings[TX].kick();
        // By the reply, the worker has run. The ring may go on or stop.
        guest.frontend.features();
        (0..2).for_each(|index| _ = guest.frontend.vring_base(index));
        guest.restart_fresh();
        guest.settle();
    });
}

#[test]
fn unusable_rx_buffers_again_and_again() {
    assert_logged_in_few_lines(|guest, _| {
        guest.auto_repost = false;
        let answered = |guest: &mut SimGuest| {
            guest.send(&FLOW.packet(Op::CreditRequest));
            guest.recv().assert_is(Op::Rst, &FLOW);
        };
        while guest.rings[RX].outstanding() > 0 {
            answered(guest);
        }
        let inside = guest.memory.alloc(64, 4);
        let end = guest.memory.end();
        let bad = [
            part(inside, 43, true),
            part(inside, 64, false),
            part(8, 4096, true),
            part(end - 40, 4096, true),
        ];
        for part in bad {
            guest.rings[RX].add(&[part], Indirect::No).unwrap();
        }
        guest.post_rx_some(1);
        guest.send(&FLOW.packet(Op::CreditRequest));
        for _ in bad {
            assert!(guest.rings[RX].wait_used(PATIENCE));
            assert_eq!(guest.rings[RX].pop_used().unwrap().1, 0);
        }
        guest.recv().assert_is(Op::Rst, &FLOW);
    });
}

#[test]
fn packets_that_belong_to_nothing_again_and_again() {
    assert_few_lines(|guest, round| {
        let flow = Flow::new(round as u32, 1);
        let foreign = Packet {
            src_cid: 77,
            ..flow.packet(Op::Rw)
        };
        let unknown = Packet {
            op: 99,
            ..flow.packet(Op::Rw)
        };
        for packet in [foreign, unknown, flow.packet(Op::Request), flow.rw(b"x")] {
            guest.send(&packet);
        }
        guest.settle();
    });
}
