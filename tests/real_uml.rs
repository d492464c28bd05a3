//! A real Linux 6.1 guest under User-Mode Linux talks to its host.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use common::daemon::Daemon;
use common::scenarios::{self, Held, Opener, Transfer};
use common::uml::Uml;
use tempfile::TempDir;

const MIB: usize = 1 << 20;

#[test]
fn programs_talk_in_both_directions() {
    let daemon = Daemon::start();
    let guest = Uml::boot(&daemon);
    scenarios::guest_listens_with_nc(&guest, &daemon);
    scenarios::host_listens_with_nc(&guest, &daemon);
    scenarios::both_listen_with_socat(&guest, &daemon);
    scenarios::guest_half_closes(&guest, &daemon);
    scenarios::host_half_closes(&guest, &daemon);
    scenarios::refusals_are_immediate(&guest, &daemon);
}

#[test]
fn bytes_arrive_whatever_the_size_of_writes() {
    let daemon = Daemon::start();
    let guest = Uml::boot(&daemon);
    for (write, opener) in [
        (4096, Opener::Guest),
        (32768, Opener::Host),
        (32769, Opener::Guest),
        (65536, Opener::Host),
        (262_144, Opener::Guest),
    ] {
        scenarios::transfer(&guest, &daemon, opener, 64 * MIB, write);
    }
    scenarios::transfer(&guest, &daemon, Opener::Host, MIB, 1);
    scenarios::transfer(&guest, &daemon, Opener::Guest, MIB, 777);
}

#[test]
fn many_connections_at_once_and_in_turn() {
    let daemon = Daemon::start();
    let guest = Uml::boot(&daemon);
    scenarios::fifty_connections_at_once(&guest, &daemon);
    scenarios::thousand_connections_leave_nothing(&guest, &daemon);
}

#[test]
fn a_late_reader_gets_all_that_a_closing_guest_wrote() {
    let daemon = Daemon::start();
    let guest = Uml::boot(&daemon);
    scenarios::late_reader_gets_all(&guest, &daemon);
}

#[test]
fn a_killed_guest_ends_its_streams_and_the_next_is_served() {
    let daemon = Daemon::start();
    let guest = Uml::boot(&daemon);
    let held = Held::open(&guest, &daemon);
    let transfer = Transfer::start(&guest, &daemon, Opener::Guest, 1024 * MIB, 65536);
    transfer.wait_for(MIB);
    guest.kill();
    transfer.expect_cut();
    held.expect_end();

    let next = Uml::boot(&daemon);
    scenarios::works(&next, &daemon);
}

#[test]
fn the_driver_comes_back() {
    let daemon = Daemon::start();
    let guest = Uml::boot(&daemon);
    scenarios::driver_comes_back(&guest, &daemon);
}

#[test]
fn programs_that_came_before_the_vm_get_in() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("plain");
    let daemon = Daemon::start_with(&[
        "--wait-for-guest=600",
        &format!("--guest-port=2300={}", path.display()),
    ]);
    let connect = |path: &Path| {
        let stream = UnixStream::connect(path).unwrap();
        // Longer than a boot.
        let patience = Duration::from_secs(120);
        stream.set_read_timeout(Some(patience)).unwrap();
        BufReader::new(stream)
    };
    let (mut plain, mut line) = (connect(&path), connect(&daemon.uds_path()));
    line.get_mut().write_all(b"CONNECT 2301\n").unwrap();
    let guest = Uml::boot(&daemon);
    let _listeners = [
        guest.spawn("echo for the plain socket | nc --vsock -l -p 2300"),
        guest.spawn("echo for the other | nc --vsock -l -p 2301"),
    ];
    let next = |stream: &mut BufReader<UnixStream>| {
        let mut text = String::new();
        stream.read_line(&mut text).unwrap();
        text
    };
    assert_eq!(next(&mut plain), "for the plain socket\n");
    assert!(next(&mut line).starts_with("OK "));
    assert_eq!(next(&mut line), "for the other\n");
}
