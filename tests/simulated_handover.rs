//! A new daemon takes over from the one that serves a VM: neither the guest nor a host program notices. Streams, and what comes
//! before one.

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread::spawn;

use common::handover::{Service, Way, flow_with_room, take_bytes, write_until_full};
use common::sim::host::{
    FLOW, PORT, accept, assert_closed, assert_moves_bytes, assert_same, assert_serves, connect,
    dial, fill, from_guest, from_host, listen, pattern, read_exactly, read_ok, read_to_end,
    recv_bytes, recv_other,
};
use common::sim::packet::{NO_RECEIVE, NO_SEND};
use common::sim::{Flow, GuestStack, Op, Setup, SimGuest};

/// What a client waits for at most, in seconds, where it waits for the guest: longer than a test takes.
const PATIENT: &str = "--wait-for-guest=600";

/// The guest's port behind a plain socket, and a host port that has one.
const PLAIN: [&str; 2] = ["--guest-port=22={}/ssh", "--host-port=80={}/web"];

with_either_way! {
    an_idle_guest_and_its_streams_go_on
    what_the_host_has_not_read_is_kept
    what_the_guest_has_no_credit_for_is_kept
    an_end_by_the_guest_is_kept
    an_end_by_the_host_is_kept
    an_end_behind_bytes_comes_behind_them
    what_happens_while_nobody_serves_is_seen_later
    what_a_guest_sent_before_it_closed_is_flushed
    a_close_that_the_guest_has_not_confirmed_is_confirmed_later
    resets_that_wait_for_buffers_come_once
    a_client_in_its_line_goes_on
    what_comes_behind_the_line_is_kept
    a_client_that_waits_for_the_guests_answer_gets_it
    a_client_that_waits_for_a_guest_gets_it
    plain_sockets_go_on
    clients_that_come_during_a_hand_over_are_served
    counters_go_on
    ten_hand_overs_under_load
    a_thousand_streams
}

/// A daemon, with a guest whose device runs.
fn device(way: Way, options: &[&str]) -> (Service, SimGuest) {
    let service = Service::start(way, options);
    let guest = SimGuest::start(&service, Setup::default());
    (service, guest)
}

fn an_idle_guest_and_its_streams_go_on(way: Way) {
    let (mut service, mut guest) = device(way, &[]);
    let by_guest = from_guest(&service, &mut guest, &FLOW);
    let (by_host, flow, _) = from_host(&service, &mut guest, 22);
    for _ in 0..3 {
        service.hand_over();
        assert_moves_bytes(&mut guest, &by_guest, &FLOW);
        assert_moves_bytes(&mut guest, &by_host, &flow);
        assert_serves(&service, &mut guest);
    }
    assert!(guest.settle().is_empty());
    guest.send(&FLOW.packet(Op::Rst));
    assert_closed(&by_guest);
    drop(guest);
    assert_closed(&by_host);
    assert_serves(&service, &mut SimGuest::start(&service, Setup::default()));
}

fn what_the_host_has_not_read_is_kept(way: Way) {
    let (mut service, mut guest) = device(way, &[]);
    let program = from_guest(&service, &mut guest, &FLOW);
    let sent = fill(&mut guest, &FLOW);
    service.hand_over();
    assert_same(&read_exactly(&program, sent.len()), &sent);
    // There is credit for more again, and nothing came twice.
    assert_moves_bytes(&mut guest, &program, &FLOW);
    let sent = pattern(3, 200_000);
    sent.chunks(50_000)
        .for_each(|piece| guest.send(&FLOW.rw(piece)));
    assert_same(&read_exactly(&program, sent.len()), &sent);
    program.shutdown(Shutdown::Write).unwrap();
    recv_other(&mut guest).assert_is(Op::Shutdown, &FLOW);
}

fn what_the_guest_has_no_credit_for_is_kept(way: Way) {
    let (mut service, mut guest) = device(way, &[]);
    let mut flow = flow_with_room(1000, PORT, 5000);
    let program = from_guest(&service, &mut guest, &flow);
    let sent = write_until_full(&program, 1);
    let mut got = recv_bytes(&mut guest, &flow, 5000);
    flow.fwd_cnt = 5000;
    service.hand_over();
    assert!(guest.settle().iter().all(|packet| !packet.is(Op::Rw)));
    guest.send(&flow.packet(Op::CreditUpdate));
    got.extend(take_bytes(&mut guest, &mut flow, sent.len() - got.len()));
    assert_same(&got, &sent);
    // The last byte may have taken the last credit, and then more was asked for.
    assert!(guest.settle().iter().all(|packet| !packet.is(Op::Rw)));
    assert_moves_bytes(&mut guest, &program, &flow);
}

fn an_end_by_the_guest_is_kept(way: Way) {
    let (mut service, mut guest) = device(way, &[]);
    let program = from_guest(&service, &mut guest, &FLOW);
    guest.send(&FLOW.rw(b"last"));
    guest.send(&FLOW.shutdown(NO_SEND));
    assert_eq!(read_to_end(&program), b"last");
    service.hand_over();
    let answer = pattern(1, 3000);
    (&program).write_all(&answer).unwrap();
    assert_same(&recv_bytes(&mut guest, &FLOW, 3000), &answer);
    drop(program);
    recv_other(&mut guest).assert_is(Op::Shutdown, &FLOW);
}

fn an_end_by_the_host_is_kept(way: Way) {
    let (mut service, mut guest) = device(way, &[]);
    let program = from_guest(&service, &mut guest, &FLOW);
    program.shutdown(Shutdown::Write).unwrap();
    let end = guest.recv();
    end.assert_is(Op::Shutdown, &FLOW);
    assert_eq!(end.flags, NO_SEND);
    service.hand_over();
    // Once.
    assert!(guest.settle().is_empty());
    guest.send(&FLOW.rw(b"answer"));
    assert_eq!(read_exactly(&program, 6), b"answer");
    guest.send(&FLOW.shutdown(NO_SEND));
    assert_closed(&program);
}

fn an_end_behind_bytes_comes_behind_them(way: Way) {
    let (mut service, mut guest) = device(way, &[]);
    // From the guest: the program has not read.
    let by_guest = from_guest(&service, &mut guest, &FLOW);
    let sent = fill(&mut guest, &FLOW);
    guest.send(&FLOW.shutdown(NO_SEND));
    guest.settle();
    // From the host: the guest gives no credit.
    let mut flow = flow_with_room(1000, PORT + 1, 100);
    let program = from_guest(&service, &mut guest, &flow);
    let written = write_until_full(&program, 2);
    program.shutdown(Shutdown::Write).unwrap();
    let mut got = recv_bytes(&mut guest, &flow, 100);
    guest.settle();
    service.hand_over();
    assert_same(&read_to_end(&by_guest), &sent);
    flow.fwd_cnt = 100;
    flow.buf_alloc = 65_536;
    guest.settle();
    guest.send(&flow.packet(Op::CreditUpdate));
    let missing = written.len() - got.len();
    got.extend(take_bytes(&mut guest, &mut flow, missing));
    assert_same(&got, &written);
    let mut end = recv_other(&mut guest);
    if end.is(Op::CreditRequest) {
        // The last byte took the last credit, and the daemon had not seen the end yet.
        end = recv_other(&mut guest);
    }
    end.assert_is(Op::Shutdown, &flow);
    assert_eq!(end.flags, NO_SEND);
}

fn what_happens_while_nobody_serves_is_seen_later(way: Way) {
    let (mut service, mut guest) = device(way, &[]);
    let program = from_guest(&service, &mut guest, &FLOW);
    let other = Flow::new(1000, PORT + 1);
    let stays = from_guest(&service, &mut guest, &other);
    if way == Way::Manager {
        service.stop();
    }
    // The program is gone, and a request of the guest's lies in the ring.
    drop(program);
    let last = Flow::new(1001, PORT + 2);
    let listener = listen(&service, PORT + 2);
    guest.send(&last.packet(Op::Request));
    if way == Way::Manager {
        service.start_again();
    } else {
        service.hand_over();
    }
    let mut seen = [recv_other(&mut guest), recv_other(&mut guest)];
    seen.sort_by_key(|packet| packet.op);
    seen[0].assert_is(Op::Response, &last);
    seen[1].assert_is(Op::Shutdown, &FLOW);
    let called = accept(&listener);
    assert_moves_bytes(&mut guest, &called, &last);
    assert_moves_bytes(&mut guest, &stays, &other);
}

fn what_a_guest_sent_before_it_closed_is_flushed(way: Way) {
    let (mut service, mut guest) = device(way, &[]);
    let program = from_guest(&service, &mut guest, &FLOW);
    let sent = fill(&mut guest, &FLOW);
    guest.send(&FLOW.shutdown(NO_RECEIVE | NO_SEND));
    let before = guest.settle();
    service.hand_over();
    assert_same(&read_to_end(&program), &sent);
    let is_reset = |packet: &common::sim::Packet| packet.is(Op::Rst) && FLOW.owns(packet);
    if !before.iter().any(is_reset) {
        recv_other(&mut guest).assert_is(Op::Rst, &FLOW);
    }
    assert!(!guest.settle().iter().any(is_reset), "a second reset");
    service.wait_for_connections(0);
    // The ports are free.
    let program = from_guest(&service, &mut guest, &FLOW);
    assert_moves_bytes(&mut guest, &program, &FLOW);
}

fn a_close_that_the_guest_has_not_confirmed_is_confirmed_later(way: Way) {
    let (mut service, mut guest) = device(way, &[]);
    let program = from_guest(&service, &mut guest, &FLOW);
    drop(program);
    let close = recv_other(&mut guest);
    close.assert_is(Op::Shutdown, &FLOW);
    assert_eq!(close.flags, NO_RECEIVE | NO_SEND);
    service.hand_over();
    assert!(guest.settle().is_empty(), "once");
    guest.send(&FLOW.packet(Op::Rst));
    assert!(guest.settle().is_empty());
    service.wait_for_connections(0);
    let program = from_guest(&service, &mut guest, &FLOW);
    assert_moves_bytes(&mut guest, &program, &FLOW);
}

fn resets_that_wait_for_buffers_come_once(way: Way) {
    const COUNT: u32 = 20;
    let (mut service, mut guest) = device(way, &[]);
    guest.auto_repost = false;
    // All buffers come back filled, and none is posted again.
    let mut flow = flow_with_room(1000, PORT, 1 << 20);
    let program = from_guest(&service, &mut guest, &flow);
    let sent = pattern(1, 128 * 3732 + 1000);
    let copy = sent.clone();
    let writer = spawn(move || {
        (&program).write_all(&copy).unwrap();
        program
    });
    let mut got = Vec::new();
    while guest.rings[0].outstanding() > 0 {
        let packet = guest.recv();
        packet.assert_is(Op::Rw, &flow);
        got.extend(packet.payload);
    }
    let flows: Vec<_> = (0..COUNT).map(|port| Flow::new(port, 9)).collect();
    for flow in &flows {
        guest.send(&flow.packet(Op::Request));
    }
    guest.wait_tx_done();
    service.hand_over();
    guest.auto_repost = true;
    guest.post_rx();
    let mut resets: Vec<u32> = Vec::new();
    while got.len() < sent.len() || resets.len() < COUNT as usize {
        let packet = guest.recv();
        if packet.is(Op::Rst) {
            resets.push(packet.dst_port);
        } else if packet.is(Op::Rw) {
            packet.assert_is(Op::Rw, &flow);
            got.extend(packet.payload);
        }
        flow.fwd_cnt = got.len() as u32;
        guest.send(&flow.packet(Op::CreditUpdate));
    }
    resets.sort_unstable();
    assert!(resets.into_iter().eq(0..COUNT), "each once");
    assert_same(&got, &sent);
    assert!(!guest.settle().iter().any(|packet| packet.is(Op::Rst)));
    assert_moves_bytes(&mut guest, &writer.join().unwrap(), &flow);
}

fn a_client_in_its_line_goes_on(way: Way) {
    let (mut service, mut guest) = device(way, &[]);
    let clients: Vec<_> = (1..8).map(|_| connect(&service.uds_path())).collect();
    let line = b"CONNECT 22\n";
    for (written, mut client) in clients.iter().enumerate() {
        client.write_all(&line[..written]).unwrap();
    }
    // They have been accepted, and what they wrote was read.
    assert_serves(&service, &mut guest);
    service.hand_over();
    for (written, mut client) in clients.iter().enumerate() {
        client.write_all(&line[written..]).unwrap();
        let flow = Flow::of(&guest.recv());
        guest.send(&flow.packet(Op::Response));
        assert_eq!(read_ok(client), flow.host_port);
        assert_moves_bytes(&mut guest, client, &flow);
    }
}

fn what_comes_behind_the_line_is_kept(way: Way) {
    let (mut service, mut guest) = device(way, &[]);
    let client = dial(&service, 22);
    let bytes = pattern(1, 5000);
    (&client).write_all(&bytes).unwrap();
    let request = guest.recv();
    let flow = Flow::of(&request);
    request.assert_is(Op::Request, &flow);
    service.hand_over();
    guest.send(&flow.packet(Op::Response));
    assert_eq!(read_ok(&client), flow.host_port);
    assert_same(&recv_bytes(&mut guest, &flow, 5000), &bytes);
}

fn a_client_that_waits_for_the_guests_answer_gets_it(way: Way) {
    let (mut service, mut guest) = device(way, &[]);
    let clients = [22, 23, 24].map(|port| dial(&service, port));
    let requests = [guest.recv(), guest.recv(), guest.recv()];
    service.hand_over();
    for request in requests {
        let flow = Flow::of(&request);
        let client = &clients[request.dst_port as usize - 22];
        if request.dst_port == 24 {
            guest.send(&flow.packet(Op::Rst));
            assert_closed(client);
        } else {
            guest.send(&flow.packet(Op::Response));
            assert_eq!(read_ok(client), flow.host_port);
            assert_moves_bytes(&mut guest, client, &flow);
        }
    }
    assert!(guest.settle().is_empty(), "nobody was asked again");
}

fn a_client_that_waits_for_a_guest_gets_it(way: Way) {
    let mut service = Service::start(way, &[PATIENT]);
    let client = dial(&service, 22);
    let waits = |service: &Service| service.number("clients_waiting", "") == 1;
    common::daemon::eventually("the client waits", || waits(&service));
    service.hand_over();
    common::daemon::eventually("it waits still", || waits(&service));
    let mut guest = SimGuest::connect(&service, Setup::default());
    guest.post_rx();
    guest.start_rings();
    let request = guest.recv();
    let flow = Flow::of(&request);
    request.assert_is(Op::Request, &flow);
    guest.send(&flow.packet(Op::Response));
    assert_eq!(read_ok(&client), flow.host_port);
    assert_moves_bytes(&mut guest, &client, &flow);
}

fn plain_sockets_go_on(way: Way) {
    let (mut service, mut guest) = device(way, &PLAIN);
    let web = std::os::unix::net::UnixListener::bind(service.directory().join("web")).unwrap();
    let call = |guest: &mut SimGuest, port| {
        let flow = Flow::new(port, 80);
        guest.send(&flow.packet(Op::Request));
        guest.recv().assert_is(Op::Response, &flow);
        (accept(&web), flow)
    };
    let ssh = service.directory().join("ssh");
    let dial = |guest: &mut SimGuest| {
        let client = connect(&ssh);
        let flow = Flow::of(&guest.recv());
        assert_eq!(flow.guest_port, 22);
        guest.send(&flow.packet(Op::Response));
        (client, flow)
    };
    let mut streams = vec![call(&mut guest, 1), dial(&mut guest)];
    // One that the guest has not answered.
    let asked = connect(&ssh);
    let asked_flow = Flow::of(&guest.recv());
    service.hand_over();
    guest.send(&asked_flow.packet(Op::Response));
    streams.extend([call(&mut guest, 2), dial(&mut guest), (asked, asked_flow)]);
    for (stream, flow) in &streams {
        assert_moves_bytes(&mut guest, stream, flow);
    }
}

fn clients_that_come_during_a_hand_over_are_served(way: Way) {
    let (mut service, mut guest) = device(way, &[PLAIN[0]]);
    let paths = [service.uds_path(), service.directory().join("ssh")];
    let come = || {
        let clients = paths.each_ref().map(|path| connect(path));
        (&clients[0]).write_all(b"CONNECT 22\n").unwrap();
        clients
    };
    let clients = if way == Way::Manager {
        service.stop();
        let clients = come();
        service.start_again();
        clients
    } else {
        let successor = service.spawn_successor();
        let clients = come();
        service.expect_successor(successor);
        clients
    };
    let mut flows: Vec<Flow> = Vec::new();
    for _ in &clients {
        let flow = Flow::of(&guest.recv());
        guest.send(&flow.packet(Op::Response));
        flows.push(flow);
    }
    let host_port = read_ok(&clients[0]);
    let with_line = flows.iter().position(|flow| flow.host_port == host_port);
    let with_line = flows.remove(with_line.expect("the port of an OK line"));
    assert_moves_bytes(&mut guest, &clients[0], &with_line);
    assert_moves_bytes(&mut guest, &clients[1], &flows[0]);
}

fn counters_go_on(way: Way) {
    let (mut service, mut guest) = device(way, &[]);
    let program = from_guest(&service, &mut guest, &FLOW);
    assert_moves_bytes(&mut guest, &program, &FLOW);
    let counters = |service: &Service| {
        [
            ("connections_opened_total", "by=\"guest\""),
            ("connections", ""),
            ("payload_bytes_total", "from=\"guest\""),
            ("payload_bytes_total", "from=\"host\""),
            ("connection_payload_bytes_total", "from=\"guest\""),
            ("connection_payload_bytes_total", "from=\"host\""),
            ("vmm_sessions_total", ""),
            ("vmm_connected", ""),
        ]
        .map(|(name, label)| (name, service.number(name, label)))
    };
    let before = counters(&service);
    assert_eq!(before[2].1, 300);
    service.hand_over();
    assert_eq!(counters(&service), before);
    assert_moves_bytes(&mut guest, &program, &FLOW);
    assert_eq!(service.number("payload_bytes_total", "from=\"guest\""), 600);
}

fn ten_hand_overs_under_load(way: Way) {
    const LEN: usize = 1 << 20;
    let mut service = Service::start(way, &[]);
    let guest = GuestStack::new(SimGuest::start(&service, Setup::default()));
    let listener = listen(&service, PORT);
    guest.listen(22);
    let mut ends = Vec::new();
    for _ in 0..2 {
        let stream = guest.connect(PORT).unwrap();
        ends.push((stream, accept(&listener)));
        let client = dial(&service, 22);
        read_ok(&client);
        ends.push((guest.accept(22), client));
    }
    let mut threads = Vec::new();
    let until = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    for (seed, (stream, program)) in ends.into_iter().enumerate() {
        // Each end sends the pattern again and again until all is over, and then once more.
        let (to_host, to_guest) = (pattern(seed as u64, LEN), pattern(100 + seed as u64, LEN));
        let (done, done_too) = (until.clone(), until.clone());
        let (mut writer, mut reader) = (stream.handle(), stream);
        let (host_writer, host_reader) = (program.try_clone().unwrap(), program);
        let (sent, sent_too) = (to_host.clone(), to_guest.clone());
        threads.push(spawn(move || {
            repeat(&sent, &done, |bytes| writer.write_all(bytes).unwrap());
            writer.shutdown(NO_SEND);
        }));
        threads.push(spawn(move || {
            repeat(&sent_too, &done_too, |bytes| {
                (&host_writer).write_all(bytes).unwrap();
            });
            host_writer.shutdown(Shutdown::Write).unwrap();
        }));
        threads.push(spawn(move || {
            check(&to_host, |piece| (&host_reader).read(piece).unwrap())
        }));
        threads.push(spawn(move || {
            check(&to_guest, |piece| reader.read(piece).unwrap())
        }));
    }
    for _ in 0..10 {
        let before = service.number("payload_bytes_total", "");
        service.hand_over();
        common::daemon::eventually("bytes flow", || {
            service.number("payload_bytes_total", "") > before
        });
    }
    until.store(true, std::sync::atomic::Ordering::Relaxed);
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(service.number("vmm_sessions_total", ""), 1);
}

/// Writes the whole of `bytes` until `done`, at least once.
fn repeat(bytes: &[u8], done: &std::sync::atomic::AtomicBool, mut write: impl FnMut(&[u8])) {
    loop {
        bytes.chunks(50_000).for_each(&mut write);
        if done.load(std::sync::atomic::Ordering::Relaxed) {
            return;
        }
    }
}

/// Reads to the end, and panics unless that is `bytes`, once or several times.
fn check(bytes: &[u8], mut read: impl FnMut(&mut [u8]) -> usize) {
    let (mut piece, mut offset) = (vec![0; 65_536], 0);
    loop {
        let wanted = piece.len().min(bytes.len() - offset);
        let count = read(&mut piece[..wanted]);
        if count == 0 {
            return assert_eq!(offset, 0, "an end in the midst");
        }
        assert_same(&piece[..count], &bytes[offset..offset + count]);
        offset = (offset + count) % bytes.len();
    }
}

fn a_thousand_streams(way: Way) {
    const COUNT: u32 = 1000;
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(65_536), hard).unwrap();
    let (mut service, mut guest) = device(way, &[]);
    let listener = listen(&service, PORT);
    let mut streams = Vec::new();
    for port in 0..COUNT {
        let flow = Flow::new(port, PORT);
        guest.send(&flow.packet(Op::Request));
        guest.recv().assert_is(Op::Response, &flow);
        streams.push((accept(&listener), flow));
    }
    // Bytes under way in all of them, each way.
    for (mut stream, flow) in streams.iter().map(|(stream, flow)| (stream, flow)) {
        guest.send(&flow.rw(&pattern(flow.guest_port.into(), 500)));
        stream.write_all(&pattern(7, 10)).unwrap();
    }
    service.hand_over();
    let mut got = vec![Vec::new(); COUNT as usize];
    while got.iter().map(Vec::len).sum::<usize>() < 10 * COUNT as usize {
        let packet = recv_other(&mut guest);
        packet.assert_is(Op::Rw, &Flow::new(packet.dst_port, PORT));
        got[packet.dst_port as usize].extend(packet.payload);
    }
    for ((stream, flow), got) in streams.iter().zip(got) {
        assert_same(&got, &pattern(7, 10));
        let sent = pattern(flow.guest_port.into(), 500);
        assert_same(&read_exactly(stream, 500), &sent);
        assert_moves_bytes(&mut guest, stream, flow);
    }
    assert_serves(&service, &mut guest);
}
