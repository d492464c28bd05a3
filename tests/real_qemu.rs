//! A real guest under QEMU talks to its host: Debian's cloud kernels 6.1 and 6.12, with both kinds of shared memory.

mod common;

use std::thread::sleep;
use std::time::Duration;

use common::daemon::Daemon;
use common::qemu::{Kernel, Memory, Qemu};
use common::scenarios::{self, Held, Opener, Transfer};

const MIB: usize = 1 << 20;

#[test]
fn programs_talk_to_linux_6_1_in_a_memory_file() {
    let daemon = Daemon::start();
    let guest = Qemu::boot(&daemon, Kernel::V6_1, Memory::File);
    talk(&guest, &daemon);
    scenarios::fifty_connections_at_once(&guest, &daemon);
    scenarios::thousand_connections_leave_nothing(&guest, &daemon);
    scenarios::driver_comes_back(&guest, &daemon);
}

#[test]
fn programs_talk_to_linux_6_12_in_a_memfd() {
    let daemon = Daemon::start();
    let guest = Qemu::boot(&daemon, Kernel::V6_12, Memory::Memfd);
    talk(&guest, &daemon);
    scenarios::fifty_connections_at_once(&guest, &daemon);
    scenarios::late_reader_gets_all(&guest, &daemon);
}

fn talk(guest: &Qemu, daemon: &Daemon) {
    scenarios::guest_listens_with_nc(guest, daemon);
    scenarios::host_listens_with_nc(guest, daemon);
    scenarios::both_listen_with_socat(guest, daemon);
    scenarios::guest_half_closes(guest, daemon);
    scenarios::host_half_closes(guest, daemon);
    scenarios::refusals_are_immediate(guest, daemon);
}

#[test]
fn bytes_arrive_from_linux_6_12_whatever_the_size_of_writes() {
    let daemon = Daemon::start();
    let guest = Qemu::boot(&daemon, Kernel::V6_12, Memory::File);
    for (write, total, opener) in [
        (4096, 8 * MIB, Opener::Guest),
        (32768, 8 * MIB, Opener::Host),
        (32769, 8 * MIB, Opener::Guest),
        (65536, 64 * MIB, Opener::Host),
        (262_144, 64 * MIB, Opener::Guest),
        (777, MIB, Opener::Host),
        (1, MIB / 16, Opener::Guest),
    ] {
        scenarios::transfer(&guest, &daemon, opener, total, write);
    }
}

#[test]
fn bytes_arrive_from_linux_6_1_whatever_the_size_of_writes() {
    let daemon = Daemon::start();
    let guest = Qemu::boot(&daemon, Kernel::V6_1, Memory::Memfd);
    for (write, opener) in [
        (4096, Opener::Host),
        (32769, Opener::Guest),
        (65536, Opener::Host),
        (262_144, Opener::Guest),
    ] {
        scenarios::transfer(&guest, &daemon, opener, 8 * MIB, write);
    }
}

#[test]
fn a_paused_machine_loses_and_repeats_nothing() {
    let daemon = Daemon::start();
    for (kernel, memory) in [(Kernel::V6_12, Memory::Memfd), (Kernel::V6_1, Memory::File)] {
        let guest = Qemu::boot(&daemon, kernel, memory);
        let transfer = Transfer::start(&guest, &daemon, Opener::Guest, 32 * MIB, 65536);
        for pause in [3000, 100, 300] {
            transfer.wait_for(transfer.received() + 2 * MIB);
            guest.stop();
            sleep(Duration::from_millis(pause));
            guest.cont();
        }
        transfer.finish();
        scenarios::works(&guest, &daemon);
    }
}

#[test]
fn a_reset_machine_ends_its_streams_and_works_again() {
    let daemon = Daemon::start();
    let mut guest = Qemu::boot(&daemon, Kernel::V6_12, Memory::File);
    let (before, _) = daemon.at_rest();
    for _ in 0..2 {
        let held = Held::open(&guest, &daemon);
        let transfer = Transfer::start(&guest, &daemon, Opener::Host, 1024 * MIB, 65536);
        transfer.wait_for(MIB);
        guest.reset();
        transfer.expect_cut();
        held.expect_end();
        scenarios::works(&guest, &daemon);
    }
    common::daemon::eventually("the descriptors to be closed", || {
        daemon.open_descriptors() <= before
    });
}

#[test]
fn a_killed_machine_ends_its_streams_and_the_next_is_served() {
    let daemon = Daemon::start();
    let guest = Qemu::boot(&daemon, Kernel::V6_1, Memory::Memfd);
    let held = Held::open(&guest, &daemon);
    let transfer = Transfer::start(&guest, &daemon, Opener::Guest, 1024 * MIB, 65536);
    transfer.wait_for(MIB);
    guest.kill();
    transfer.expect_cut();
    held.expect_end();

    let next = Qemu::boot(&daemon, Kernel::V6_12, Memory::File);
    scenarios::works(&next, &daemon);
}
