//! Misbehaving host programs: each hurts only itself.

mod common;

use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use common::daemon::eventually;
use common::sim::host::{
    FLOW, PORT, assert_closed, assert_moves_bytes, assert_serves, connect, dial, fill, from_guest,
    from_host, listen, recv_other,
};
use common::sim::survivor::SLACK_KIB;
use common::sim::{Flow, Op, Setup, SimGuest, Survivor};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

fn start() -> (Survivor, SimGuest) {
    let daemon = Survivor::start();
    let guest = SimGuest::start(&daemon, Setup::default());
    (daemon, guest)
}

#[test]
fn thousands_of_silent_clients_at_once_keep_nobody_out() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(65_536), hard).unwrap();
    let (daemon, mut guest) = start();
    let before = daemon.open_descriptors();
    let clients: Vec<_> = (0..3000)
        .map(|number| {
            let mut client = connect(&daemon.uds_path());
            if number % 2 == 0 {
                client.write_all(b"CONNECT 12").unwrap();
            }
            client
        })
        .collect();
    // The oldest have been evicted.
    clients[..1900].iter().for_each(assert_closed);
    assert!(daemon.open_descriptors() <= before + 1024);
    let growth = daemon.growth_kib();
    assert!(growth <= 1024 + SLACK_KIB, "{growth} KiB for 1024 clients");
    assert_serves(&daemon, &mut guest);
    drop((clients, guest));
    daemon.assert_unharmed();
}

#[test]
fn a_line_without_an_end_is_not_read_to_its_end() {
    let (daemon, mut guest) = start();
    let mut client = connect(&daemon.uds_path());
    let mut sent = 0;
    let error = loop {
        match client.write(&[b'a'; 4096]) {
            Ok(count) => sent += count,
            Err(error) => break error,
        }
        assert!(sent < 64 << 20, "somebody reads it all");
    };
    assert!(matches!(
        error.kind(),
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
    ));
    assert!(guest.settle().is_empty(), "the guest heard of it");
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn clients_that_leave_at_each_step_of_the_handshake() {
    let (daemon, mut guest) = start();
    let line = format!("CONNECT {PORT}\n");
    let leave: [fn(&UnixStream); 4] = [
        |_| (),
        |client| client.shutdown(Shutdown::Write).unwrap(),
        |client| client.shutdown(Shutdown::Read).unwrap(),
        |client| client.shutdown(Shutdown::Both).unwrap(),
    ];
    for bytes in 0..=line.len() {
        for leave in leave {
            let mut client = connect(&daemon.uds_path());
            client.write_all(&line.as_bytes()[..bytes]).unwrap();
            leave(&client);
        }
    }
    // Some have come as far as a REQUEST. They are accepted, and then end in one way or another.
    let requests = guest.settle();
    assert!(
        requests.iter().all(|packet| packet.is(Op::Request)),
        "{requests:?}"
    );
    for request in &requests {
        guest.send(&Flow::of(request).packet(Op::Response));
    }
    guest.settle();
    for request in &requests {
        guest.send(&Flow::of(request).packet(Op::Rst));
    }
    guest.settle();
    assert_serves(&daemon, &mut guest);
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn a_client_that_leaves_with_its_ok_unread() {
    let (daemon, mut guest) = start();
    for _ in 0..20 {
        let client = dial(&daemon, PORT);
        let flow = Flow::of(&guest.recv());
        guest.send(&flow.packet(Op::Response));
        guest.settle();
        drop(client);
        let packet = recv_other(&mut guest);
        assert!(
            packet.is(Op::Shutdown) && packet.flags == 3 && flow.owns(&packet),
            "{packet:?}"
        );
        guest.send(&flow.packet(Op::Rst));
    }
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn a_program_that_resets_with_bytes_unread_ends_its_connection_alone() {
    let (daemon, mut guest) = start();
    let (other, other_flow, _) = from_host(&daemon, &mut guest, PORT + 1);
    // With a few bytes unread, and with all buffers full.
    for full in [false, true] {
        let stream = from_guest(&daemon, &mut guest, &FLOW);
        if full {
            fill(&mut guest, &FLOW);
        } else {
            guest.send(&FLOW.rw(b"unread"));
            guest.settle();
        }
        drop(stream);
        let packet = recv_other(&mut guest);
        packet.assert_is(Op::Shutdown, &FLOW);
        assert_eq!(packet.flags, 3);
        // What still comes is dropped and uses no credit.
        guest.send(&FLOW.rw(&[1; 1000]));
        guest.send(&FLOW.packet(Op::Rst));
        assert_moves_bytes(&mut guest, &other, &other_flow);
    }
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn a_program_that_stops_reading_a_full_socket_is_reported_to_the_guest_when_it_writes() {
    let (daemon, mut guest) = start();
    let mut stream = from_guest(&daemon, &mut guest, &FLOW);
    fill(&mut guest, &FLOW);
    stream.shutdown(Shutdown::Read).unwrap();
    stream.write_all(b"an error of mine").unwrap();
    let mut ops = [recv_other(&mut guest), recv_other(&mut guest)];
    ops.sort_by_key(|packet| packet.op);
    assert_eq!((ops[0].op, ops[0].flags), (Op::Shutdown as u16, 1));
    assert_eq!(ops[1].payload, b"an error of mine");
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn listeners_that_vanish_with_connections_in_their_backlog() {
    let (daemon, mut guest) = start();
    for _ in 0..20 {
        let listener = listen(&daemon, PORT);
        let flows: Vec<_> = (1..=5).map(|port| Flow::new(port, PORT)).collect();
        for flow in &flows {
            guest.send(&flow.packet(Op::Request));
            guest.recv().assert_is(Op::Response, flow);
            guest.send(&flow.rw(b"to nobody"));
        }
        drop(listener);
        let mut ended = 0;
        while ended < flows.len() {
            let packet = recv_other(&mut guest);
            assert!(packet.is(Op::Shutdown) && packet.flags == 3, "{packet:?}");
            guest.send(&Flow::of(&packet).packet(Op::Rst));
            ended += 1;
        }
    }
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn listeners_that_close_whatever_they_accept() {
    let (daemon, mut guest) = start();
    let listener = listen(&daemon, PORT);
    let closer = std::thread::spawn(move || {
        for accepted in listener.incoming().take(200) {
            drop(accepted);
        }
    });
    for port in 1..=200 {
        let flow = Flow::new(port, PORT);
        guest.send(&flow.packet(Op::Request));
        guest.recv().assert_is(Op::Response, &flow);
        let packet = recv_other(&mut guest);
        assert!(packet.is(Op::Shutdown) && flow.owns(&packet), "{packet:?}");
        guest.send(&flow.packet(Op::Rst));
    }
    closer.join().unwrap();
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn a_full_backlog_refuses_until_somebody_accepts() {
    let (daemon, mut guest) = start();
    let path = daemon.host_port_path(PORT);
    let listener = UnixListener::bind(&path).unwrap();
    // A backlog of none: one connection waits, the next is refused.
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let flow = |port| Flow::new(port, PORT);
    guest.send(&flow(1).packet(Op::Request));
    guest.recv().assert_is(Op::Response, &flow(1));
    guest.send(&flow(2).packet(Op::Request));
    guest.recv().assert_is(Op::Rst, &flow(2));
    assert_serves(&daemon, &mut guest);
    let first = listener.accept().unwrap().0;
    assert_moves_bytes(&mut guest, &first, &flow(1));
    guest.send(&flow(2).packet(Op::Request));
    guest.recv().assert_is(Op::Response, &flow(2));
    eventually("the second to wait", || listener.accept().is_ok());
    drop(guest);
    daemon.assert_unharmed();
}
