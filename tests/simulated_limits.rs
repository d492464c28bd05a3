//! Exhausted resources: descriptors, connections, ports, time, and the VMM itself.

mod common;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::daemon::{Daemon, eventually};
use common::sim::host::{
    accept, assert_closed, assert_moves_bytes, assert_same, assert_serves, connect, dial, fill,
    from_guest, from_host, listen, read_to_end, recv_bytes,
};
use common::sim::vhost_user::Request;
use common::sim::{Flow, Op, Setup, SimGuest};
use nix::sys::eventfd::{EfdFlags, EventFd};

const PORT: u32 = 1234;
const TX: u32 = 1;

fn flow(guest_port: u32) -> Flow {
    Flow::new(guest_port, PORT)
}

/// Limits the daemon's descriptors. Open ones stay open.
fn limit_descriptors(daemon: &Daemon, limit: usize) {
    daemon.set_limit("nofile", limit);
}

#[test]
fn without_descriptors_clients_wait_and_the_others_go_on() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let stream = from_guest(&daemon, &mut guest, &flow(1));
    limit_descriptors(&daemon, daemon.at_rest().0 + 4);
    let clients: Vec<_> = (0..20).map(|_| connect(&daemon.uds_path())).collect();
    eventually("accept to pause", || {
        daemon.log().contains("clients must wait")
    });
    daemon.assert_idle();
    assert_moves_bytes(&mut guest, &stream, &flow(1));
    assert_eq!(
        daemon.log().matches("clients must wait").count(),
        1,
        "{}",
        daemon.log()
    );

    // The guest's own connections are refused, not forgotten.
    let _listener = listen(&daemon, PORT + 1);
    let refused = Flow::new(2, PORT + 1);
    guest.send(&refused.packet(Op::Request));
    guest.recv().assert_is(Op::Rst, &refused);

    drop(clients);
    // Clients still in the backlog take descriptors once more. One that connects now is served after all of them.
    let (last, last_flow, _) = from_host(&daemon, &mut guest, PORT);
    guest.send(&last_flow.packet(Op::Rst));
    assert_closed(&last);
    assert_serves(&daemon, &mut guest);
}

#[test]
fn without_descriptors_a_vmm_waits_until_it_can_be_served() {
    let daemon = Daemon::start();
    limit_descriptors(&daemon, 3);
    drop(UnixStream::connect(daemon.vhost_socket()).unwrap());
    eventually("the shortage to be noticed", || {
        daemon.log().contains("can't serve")
    });
    daemon.assert_alive();
    limit_descriptors(&daemon, 100);
    let mut guest = SimGuest::start(&daemon, Setup::default());
    assert_serves(&daemon, &mut guest);
}

#[test]
fn an_orphan_gives_way_to_a_new_connection() {
    let daemon = Daemon::start_with(&["--max-connections=1"]);
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let unread = from_guest(&daemon, &mut guest, &flow(1));
    let sent = fill(&mut guest, &flow(1));
    guest.send(&flow(2).packet(Op::Request));
    guest.recv().assert_is(Op::Rst, &flow(2));

    guest.send(&flow(1).shutdown(3));
    guest.send(&flow(1).packet(Op::Rst));
    guest.settle();
    let _second = from_guest(&daemon, &mut guest, &flow(2));
    let got = read_to_end(&unread);
    assert!(got.len() < sent.len(), "its bytes were given up");
    assert_same(&got, &sent[..got.len()]);
}

#[test]
fn what_a_guest_sent_before_it_closed_survives_its_vmm() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let unread = from_guest(&daemon, &mut guest, &flow(1));
    let sent = fill(&mut guest, &flow(1));
    guest.send(&flow(1).shutdown(3));
    guest.settle();
    let aborted = from_guest(&daemon, &mut guest, &flow(2));
    drop(guest);
    assert_closed(&aborted);
    let mut next = SimGuest::start(&daemon, Setup::default());
    assert_serves(&daemon, &mut next);
    assert_same(&read_to_end(&unread), &sent);
}

#[test]
fn a_client_of_a_stopped_device_does_not_wait_forever() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    guest.stop_rings();
    let mut client = dial(&daemon, PORT);
    let mut answer = Vec::new();
    client.set_read_timeout(None).unwrap();
    client.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"", "no OK");
    guest.start_rings();
    assert_serves(&daemon, &mut guest);
}

#[test]
fn host_ports_of_clients_avoid_those_the_guest_uses() {
    let daemon = Daemon::start_with(&["--max-connections=100"]);
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let first = dial(&daemon, PORT);
    let taken = guest.recv().src_port;
    // The guest itself takes the next host ports, from the same guest port.
    let listeners: Vec<_> = (1..=3)
        .map(|next| {
            let host_port = if taken + next > 65535 {
                taken + next - 64512
            } else {
                taken + next
            };
            let listener = listen(&daemon, host_port);
            let flow = Flow::new(PORT, host_port);
            guest.send(&flow.packet(Op::Request));
            guest.recv().assert_is(Op::Response, &flow);
            (accept(&listener), flow)
        })
        .collect();
    let _second = dial(&daemon, PORT);
    let request = guest.recv();
    assert!(request.is(Op::Request));
    assert!(request.src_port != taken);
    for (stream, flow) in &listeners {
        assert!(request.src_port != flow.host_port);
        assert_moves_bytes(&mut guest, stream, flow);
    }
    drop(first);
}

#[test]
fn a_kick_eventfd_that_replaces_another_is_watched() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let stream = from_guest(&daemon, &mut guest, &flow(1));
    for _ in 0..40 {
        for index in 0..2 {
            let ring = &mut guest.rings[index as usize];
            ring.renew_eventfds();
            let (kick, call) = (ring.kick_fd.as_fd(), ring.call_fd.as_fd());
            guest
                .frontend
                .set_vring_fd(Request::SetVringCall, index, call);
            guest
                .frontend
                .set_vring_fd(Request::SetVringKick, index, kick);
        }
        guest.frontend.features();
        assert_moves_bytes(&mut guest, &stream, &flow(1));
    }
    daemon.assert_idle();
}

#[test]
fn kicks_that_are_not_read_cost_no_processor() {
    let daemon = Daemon::start();
    let guest = SimGuest::start(&daemon, Setup::default());
    let event = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    let kicks: Vec<_> = (0..40).map(|_| event()).collect();
    for kick in &kicks {
        guest
            .frontend
            .set_vring_fd(Request::SetVringKick, TX, kick.as_fd());
    }
    kicks.iter().for_each(|kick| _ = kick.write(1).unwrap());
    daemon.assert_idle();
    let (dead, peer) = UnixStream::pair().unwrap();
    guest
        .frontend
        .set_vring_fd(Request::SetVringKick, TX, dead.as_fd());
    drop(peer);
    daemon.assert_idle();
    // No kick at all, and the last one that was there goes on.
    let nothing = (u64::from(TX) | 0x100).to_le_bytes();
    guest.frontend.set(Request::SetVringKick, &nothing, &[]);
    guest.rings[TX as usize].kick_fd.write(1).unwrap();
    daemon.assert_idle();
}

#[test]
fn interrupts_that_were_due_before_their_call_came_are_not_lost() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let mut stream = from_guest(&daemon, &mut guest, &flow(1));
    guest.stop_rings();
    stream.write_all(b"hello").unwrap();
    // Like QEMU, which sets the call eventfd last when it resumes a ring.
    for index in 0..guest.rings.len() as u32 {
        let ring = &mut guest.rings[index as usize];
        ring.renew_eventfds();
        ring.arm();
        guest.frontend.set_vring_num(index, ring.size().into());
        guest.frontend.set_vring_base(index, ring.device_used_idx());
        guest.frontend.set_vring_addr(index, ring.addresses());
        guest
            .frontend
            .set_vring_fd(Request::SetVringKick, index, ring.kick_fd.as_fd());
        guest.frontend.set_vring_enable(index, true);
    }
    eventually("the packet to be there", || {
        guest.rings[0].device_has_more()
    });
    for index in 0..guest.rings.len() as u32 {
        let call = guest.rings[index as usize].call_fd.as_fd();
        guest
            .frontend
            .set_vring_fd(Request::SetVringCall, index, call);
    }
    assert_same(&recv_bytes(&mut guest, &flow(1), 5), b"hello");
    assert_moves_bytes(&mut guest, &stream, &flow(1));
}

#[test]
fn an_attempt_that_is_refused_takes_no_orphans_place() {
    let daemon = Daemon::start_with(&["--max-connections=1"]);
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let unread = from_guest(&daemon, &mut guest, &flow(1));
    let sent = fill(&mut guest, &flow(1));
    guest.send(&flow(1).shutdown(3));
    guest.send(&flow(1).packet(Op::Rst));
    let refused = Flow::new(2, PORT + 1);
    guest.send(&refused.packet(Op::Request));
    guest.recv().assert_is(Op::Rst, &refused);
    assert_same(&read_to_end(&unread), &sent);
}

#[test]
fn a_busy_guest_stops_no_clock() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let mut silent = connect(&daemon.uds_path());
    silent
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let waiting = std::thread::spawn(move || silent.read(&mut [0]).unwrap());
    while !waiting.is_finished() {
        // Packets that are not answered.
        (0..100).for_each(|port| guest.send(&flow(port).packet(Op::Rst)));
    }
    assert_eq!(
        waiting.join().unwrap(),
        0,
        "it is closed, like any silent client"
    );
}

#[test]
fn a_thousand_vmms_leave_nothing_behind() {
    let daemon = Daemon::start();
    let visit = || {
        let mut guest = SimGuest::start(&daemon, Setup::default());
        let mut stream = from_guest(&daemon, &mut guest, &flow(1));
        stream.write_all(b"unread").unwrap();
        drop(guest);
        assert_closed_after_bytes(&stream);
    };
    (0..20).for_each(|_| visit());
    let (settled, before) = (daemon.at_rest(), daemon.anonymous_kib());
    (0..1000).for_each(|_| visit());
    assert_eq!(daemon.at_rest(), settled, "descriptors and threads");
    // A leak of 2 KiB per VMM would show.
    let grown = daemon.anonymous_kib().saturating_sub(before);
    assert!(grown < 2000, "{grown} KiB");
}

/// The stream has ended, as an end or as a reset.
#[track_caller]
fn assert_closed_after_bytes(mut stream: &UnixStream) {
    let mut rest = Vec::new();
    let end = stream.read_to_end(&mut rest);
    assert!(end.is_ok() || end.unwrap_err().kind() == std::io::ErrorKind::ConnectionReset);
    assert!(rest.is_empty());
}
