//! Misbehaving VMMs: each loses only its own device, and the daemon serves the next.

mod common;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;

use common::daemon::{Daemon, eventually};
use common::sim::guest::{RX, TX};
use common::sim::host::{
    FLOW, PORT, assert_closed, assert_serves, connect, dial, from_guest, from_host, listen,
};
use common::sim::ring::feature;
use common::sim::vhost_user::{F_PROTOCOL_FEATURES, Frontend, Request, protocol};
use common::sim::{Dice, Op, Setup, SimGuest, Survivor};
use nix::sys::signal::Signal;

/// Sends a message; the daemon may have closed the connection.
fn send(frontend: &Frontend, head: [u32; 3], payload: &[u8], fds: &[BorrowedFd]) {
    let bytes = [&head.map(u32::to_le_bytes).concat()[..], payload].concat();
    let _ = frontend.try_send_raw(&bytes, fds);
}

/// A VMM that has come as far as `step` in its setup.
fn frontend(daemon: &Daemon, step: u64) -> Frontend {
    let mut frontend = Frontend::connect(&daemon.vhost_socket());
    if step > 0 {
        frontend.set_owner();
    }
    if step > 1 {
        frontend.set_features(F_PROTOCOL_FEATURES | feature::VERSION_1);
    }
    if step > 2 {
        frontend.set_protocol_features(protocol::CONFIG | protocol::MQ);
    }
    frontend
}

#[test]
fn messages_of_every_number_size_and_content() {
    let daemon = Survivor::start();
    let mut dice = Dice::new(1);
    let file = File::open("/dev/null").unwrap();
    for number in (0..60).chain([255, 0xffff, u32::MAX]) {
        for _ in 0..8 {
            let frontend = frontend(&daemon, dice.below(4));
            let size = dice.one_of(&[0, 1, 7, 8, 12, 16, 40, 72, 264, 4096]);
            let payload: Vec<u8> = match dice.below(3) {
                0 => vec![0; size],
                1 => vec![0xff; size],
                _ => (0..size).map(|_| dice.any() as u8).collect(),
            };
            // Flags with a wrong version, of a reply, with and without NEED_REPLY; sizes that are wrong.
            let flags = dice.one_of(&[1, 9, 9, 5, 0, 2, u32::MAX]);
            let announced = dice.one_of(&[size as u32, size as u32, 0, 4097, 0x10000, u32::MAX]);
            let fds = vec![file.as_fd(); dice.one_of(&[0, 0, 1, 2, 8, 32, 33, 253])];
            send(&frontend, [number, flags, announced], &payload, &fds);
        }
    }
    daemon.assert_unharmed();
}

#[test]
fn messages_that_are_cut_off_anywhere() {
    let daemon = Survivor::start();
    for bytes in 0..20 {
        let frontend = frontend(&daemon, 3);
        let message = [8u32, 1, 8, 0, 128].map(u32::to_le_bytes).concat();
        frontend.send_raw(&message[..bytes], &[]);
    }
    daemon.assert_unharmed();
}

#[test]
fn garbage_without_an_end() {
    let daemon = Survivor::start();
    for byte in [0, 1, 8, 0xff] {
        let frontend = frontend(&daemon, 0);
        let mut stream = frontend.stream();
        let mut sent = 0;
        // The daemon drops it before it has read much.
        while let Ok(count) = stream.write(&[byte; 4096]) {
            sent += count;
            assert!(sent < 64 << 20, "somebody reads it all");
        }
    }
    daemon.assert_unharmed();
}

#[test]
fn messages_about_rings_in_any_order() {
    let daemon = Survivor::start();
    let mut dice = Dice::new(7);
    for _ in 0..150 {
        let mut guest = SimGuest::connect(&daemon, Setup::default());
        guest.post_rx();
        for _ in 0..dice.below(40) {
            let index = dice.one_of(&[RX as u32, TX as u32, TX as u32, 2, 3, 255]);
            let ring = &guest.rings[(index as usize).min(TX)];
            let words = ring.addresses();
            let state = |word: u32| [index, word].map(u32::to_le_bytes).concat();
            let event = u64::from(index).to_le_bytes().to_vec();
            let none = (u64::from(index) | 0x100).to_le_bytes().to_vec();
            let addresses = [words.desc, words.used, words.avail, 0]
                .map(u64::to_le_bytes)
                .concat();
            let (kick, call) = (ring.kick_fd.as_fd(), ring.call_fd.as_fd());
            let memory = guest.memory.regions()[0].fd.as_fd();
            let (request, payload, fd) = match dice.below(14) {
                0 | 1 => (
                    Request::SetVringNum,
                    state(dice.one_of(&[128, 128, 2, 1024])),
                    None,
                ),
                2 => (
                    Request::SetVringBase,
                    state(dice.one_of(&[0, 0, 1, 65_535])),
                    None,
                ),
                3 | 4 => (Request::SetVringAddr, [state(0), addresses].concat(), None),
                5 | 6 => (Request::SetVringKick, event, Some(kick)),
                7 => (Request::SetVringKick, event, Some(memory)),
                8 => (Request::SetVringKick, none, None),
                9 => (Request::SetVringCall, event, Some(call)),
                10 => (Request::SetVringCall, event, Some(memory)),
                11 => (Request::SetVringErr, event, Some(memory)),
                12 => (
                    Request::SetVringEnable,
                    state(dice.one_of(&[1, 1, 1, 0])),
                    None,
                ),
                _ => (Request::GetVringBase, state(0), None),
            };
            let fds: Vec<_> = fd.into_iter().collect();
            send(
                &guest.frontend,
                [request as u32, 1, payload.len() as u32],
                &payload,
                &fds,
            );
            guest.try_send(
                &FLOW.packet(Op::Request),
                guest.setup.tx,
                guest.setup.indirect,
            );
            guest.rings[TX].kick();
        }
    }
    daemon.assert_unharmed();
}

#[test]
fn a_device_that_is_reset_again_and_again_in_mid_transfer() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    for _ in 0..50 {
        let stream = from_guest(&daemon, &mut guest, &FLOW);
        (0..10).for_each(|_| guest.send(&FLOW.rw(&[1; 5000])));
        guest.frontend.reset_device();
        eventually("the stream to end", || {
            let mut byte = [0; 65_536];
            std::io::Read::read(&mut &stream, &mut byte).is_ok_and(|count| count == 0)
        });
        (0..2).for_each(|ring| _ = guest.frontend.vring_base(ring));
        guest.frontend.set_features(guest.features);
        guest.restart_fresh();
        guest.settle();
    }
    assert_serves(&daemon, &mut guest);
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn vmms_that_die_in_mid_transfer() {
    let daemon = Survivor::start();
    for round in 0..60 {
        let mut guest = SimGuest::start(&daemon, Setup::default());
        let down = from_guest(&daemon, &mut guest, &FLOW);
        let (up, _, _) = from_host(&daemon, &mut guest, PORT);
        // Host programs that write, and one that reads, until the end.
        let writer = thread::spawn(move || while (&up).write(&[1; 30_000]).is_ok() {});
        let reader = thread::spawn(move || std::io::copy(&mut &down, &mut std::io::sink()));
        let waiting = dial(&daemon, PORT + 1);
        for _ in 0..round {
            guest.send(&FLOW.rw(&[1; 2000]));
            guest.poll_packet();
        }
        drop(guest);
        writer.join().unwrap();
        // A reset is as good as an end.
        let _ = reader.join().unwrap();
        assert_closed(&waiting);
    }
    daemon.assert_unharmed();
}

#[test]
fn vmms_that_die_with_clients_at_each_step_of_their_handshake() {
    let daemon = Survivor::start();
    for _ in 0..30 {
        let mut guest = SimGuest::start(&daemon, Setup::default());
        let silent = connect(&daemon.uds_path());
        let mut half = connect(&daemon.uds_path());
        half.write_all(b"CONNECT 1").unwrap();
        let asked = dial(&daemon, PORT);
        assert!(guest.recv().is(Op::Request));
        let _listener = listen(&daemon, PORT);
        guest.send(&FLOW.packet(Op::Request));
        drop(guest);
        [silent, half, asked].iter().for_each(assert_closed);
    }
    daemon.assert_unharmed();
}

#[test]
fn vmms_that_wait_in_a_queue_are_served_one_after_the_other() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let mut waiting: Vec<_> = (0..20)
        .map(|_| Frontend::connect(&daemon.vhost_socket()))
        .collect();
    for frontend in &waiting {
        send(frontend, [Request::GetFeatures as u32, 1, 0], &[], &[]);
    }
    assert_serves(&daemon, &mut guest);
    drop(guest);
    // Half of them have gone before it was their turn.
    waiting.truncate(10);
    for frontend in waiting {
        assert_eq!(frontend.reply(Request::GetFeatures).len(), 8);
    }
    daemon.assert_unharmed();
}

#[test]
fn a_vmm_that_reads_no_answers_hinders_no_stop() {
    let daemon = Daemon::start();
    let frontend = frontend(&daemon, 3);
    frontend.stream().set_nonblocking(true).unwrap();
    let message = [Request::GetFeatures as u32, 1, 0]
        .map(u32::to_le_bytes)
        .concat();
    // Until both directions of the socket are full.
    eventually("the daemon to wait for us", || {
        while frontend.stream().write(&message).is_ok() {}
        thread::sleep(std::time::Duration::from_millis(100));
        frontend.stream().write(&message).is_err()
    });
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
}
