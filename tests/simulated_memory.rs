//! Memory after a flood: when it is over, the daemon has at most 1 MiB more than before.

mod common;

use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use common::daemon::eventually;
use common::sim::host::{PORT, accept, connect, dial, listen, read_to_end};
use common::sim::{Flow, Op, Setup, SimGuest, Survivor};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tempfile::TempDir;

/// How long nothing comes when nothing is left to come.
const QUIET: Duration = Duration::from_millis(300);

/// What may stay, in KiB.
const REST_KIB: u64 = 1024;

/// As many descriptors as the system allows.
fn raise_descriptor_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

/// Waits until the memory is back.
#[track_caller]
fn assert_comes_back(daemon: &Survivor) {
    eventually("the memory comes back", || daemon.growth_kib() <= REST_KIB);
}

/// Connections that the guest opens, each from a port of its own.
fn open(guest: &mut SimGuest, listener: &UnixListener, count: u32) -> Vec<(Flow, UnixStream)> {
    let opened = (0..count).map(|port| {
        let flow = Flow::new(port, PORT);
        guest.send(&flow.packet(Op::Request));
        guest.recv().assert_is(Op::Response, &flow);
        (flow, accept(listener))
    });
    opened.collect()
}

/// Sends until the buffer of a connection is full: the guest has no credit left.
fn fill(guest: &mut SimGuest, flow: &Flow, tx_buffer_size: u32) {
    let piece = vec![7; 16 * 1024];
    let mut sent = 0u32;
    let mut taken = 0;
    loop {
        guest.send(&flow.packet(Op::CreditRequest));
        let updates = guest.settle();
        let update = updates.last().unwrap();
        update.assert_is(Op::CreditUpdate, flow);
        let stalled = update.fwd_cnt == taken && sent - taken == tx_buffer_size;
        if stalled {
            return;
        }
        taken = update.fwd_cnt;
        while sent - taken < tx_buffer_size {
            let len = (tx_buffer_size - (sent - taken)).min(piece.len() as u32);
            guest.send(&flow.rw(&piece[..len as usize]));
            sent += len;
        }
    }
}

#[test]
fn full_buffers_of_a_thousand_connections() {
    const TX_BUFFER_SIZE: u32 = 65_536;
    raise_descriptor_limit();
    let daemon = Survivor::start_with(&[&format!("--tx-buffer-size={TX_BUFFER_SIZE}")]);
    let listener = listen(&daemon, PORT);
    // Twice: an allocator may treat what it has seen before in another way.
    for _ in 0..2 {
        let mut guest = SimGuest::start(&daemon, Setup::default());
        let connections = open(&mut guest, &listener, 1000);
        for (flow, _) in &connections {
            fill(&mut guest, flow, TX_BUFFER_SIZE);
        }
        let growth = daemon.growth_kib();
        assert!(growth > 1000 * 60, "{growth} KiB: the buffers are not full");
        // One that stays must not keep the memory of the others.
        let last = Flow::new(1_000_000, PORT);
        guest.send(&last.packet(Op::Request));
        guest.recv().assert_is(Op::Response, &last);
        let _last = accept(&listener);
        fill(&mut guest, &last, TX_BUFFER_SIZE);
        for (_, stream) in connections {
            drop(stream);
        }
        assert_comes_back(&daemon);
        drop(guest);
    }
    daemon.assert_unharmed();
}

fn statistics(path: &Path) -> String {
    let stream = connect(path);
    stream.shutdown(Shutdown::Write).unwrap();
    String::from_utf8(read_to_end(&stream)).unwrap()
}

#[test]
fn thousands_of_connections_and_their_statistics() {
    const CONNECTIONS: u32 = 9000;
    raise_descriptor_limit();
    let directory = TempDir::with_prefix("vsock-test-").unwrap();
    let path = directory.path().join("stats");
    let daemon = Survivor::start_with(&[
        &format!("--stats-path={}", path.display()),
        &format!("--max-connections={CONNECTIONS}"),
    ]);
    statistics(&path);
    let listener = listen(&daemon, PORT);
    let mut guest = SimGuest::start(&daemon, Setup::default());
    for _ in 0..2 {
        let connections = open(&mut guest, &listener, CONNECTIONS);
        for _ in 0..3 {
            let text = statistics(&path);
            assert!(text.len() > 1 << 20, "{} bytes", text.len());
        }
        for (flow, _) in &connections {
            guest.send(&flow.packet(Op::Rst));
        }
        drop(connections);
        guest.settle();
        assert_comes_back(&daemon);
    }
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn clients_and_resets_by_the_thousand() {
    raise_descriptor_limit();
    let daemon = Survivor::start_with(&["--max-connections=9000"]);
    let mut guest = SimGuest::start(&daemon, Setup::default());
    for _ in 0..2 {
        // Clients that say nothing, and clients whose guest takes no packets.
        let silent: Vec<_> = (0..1500).map(|_| connect(&daemon.uds_path())).collect();
        guest.auto_repost = false;
        let waiting: Vec<_> = (0..4000).map(|port| dial(&daemon, port)).collect();
        (0..20_000).for_each(|port| guest.send(&Flow::new(port, 9).packet(Op::Request)));
        guest.wait_tx_done();
        drop((silent, waiting));
        guest.auto_repost = true;
        guest.post_rx();
        // The guest refuses the requests of the clients, which are gone.
        while let Some(packet) = guest.try_recv(QUIET) {
            if packet.is(Op::Request) {
                guest.send(&Flow::of(&packet).packet(Op::Rst));
            }
        }
        assert_comes_back(&daemon);
    }
    drop(guest);
    daemon.assert_unharmed();
}
