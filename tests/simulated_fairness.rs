//! Nobody takes everything: neither time nor places, however many REQUESTs and CONNECTs there are. What is bounded here is
//! counted in packets, not in time.

mod common;

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::daemon::{Daemon, eventually};
use common::sim::host::{
    PORT, accept, assert_closed, assert_moves_bytes, assert_same, assert_serves, connect, dial,
    from_guest, from_host, listen, pattern, read_ok,
};
use common::sim::ring::Indirect;
use common::sim::{Flow, Op, Packet, Setup, SimGuest, TxLayout};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// From here on nobody listens, and the guest's ports are the flood's.
const CLOSED: u32 = 500_000;

/// How many REQUESTs the flood may send while something else gets through: those that are in the rings and that wait for
/// answers, a few times over.
const MAX_BESIDE: usize = 10_000;

/// A flood of REQUESTs to ports on which nobody listens, each from a port of its own.
struct Flood {
    guest: SimGuest,
    /// The RSTs for each of them.
    answers: Vec<u32>,
    others: Vec<Packet>,
}

impl Flood {
    fn new(daemon: &Daemon) -> Self {
        Self {
            guest: SimGuest::start(daemon, Setup::default()),
            answers: Vec::new(),
            others: Vec::new(),
        }
    }

    /// Fills the TX ring, and takes a single packet: answers leave much more slowly than REQUESTs could come.
    fn go_on(&mut self) {
        let flow = |number: usize| Flow::new(CLOSED + number as u32, CLOSED + number as u32 % 7);
        while self.guest.try_send(
            &flow(self.answers.len()).packet(Op::Request),
            TxLayout::LINUX,
            Indirect::No,
        ) {
            self.answers.push(0);
        }
        self.guest.rings[1].kick_if_needed();
        self.take();
    }

    /// Takes a packet, if there is one.
    fn take(&mut self) {
        if let Some(packet) = self.guest.poll_packet() {
            self.count(packet);
        }
    }

    fn count(&mut self, packet: Packet) {
        if packet.dst_port >= CLOSED && packet.is(Op::Rst) {
            self.answers[(packet.dst_port - CLOSED) as usize] += 1;
        } else {
            self.others.push(packet);
        }
    }

    /// Sends a packet that is none of the flood's. False when the ring is full.
    fn send(&mut self, packet: &Packet) -> bool {
        self.guest.try_send(packet, TxLayout::LINUX, Indirect::No)
    }

    /// Goes on until something has happened.
    #[track_caller]
    fn until(&mut self, mut happened: impl FnMut() -> bool) {
        let limit = self.answers.len() + MAX_BESIDE;
        while !happened() {
            assert!(self.answers.len() < limit, "not beside the flood");
            self.go_on();
        }
    }

    /// Goes on until a packet comes that is none of the flood's.
    #[track_caller]
    fn next_other(&mut self) -> Packet {
        let limit = self.answers.len() + MAX_BESIDE;
        while self.others.is_empty() {
            assert!(self.answers.len() < limit, "none came beside the flood");
            self.go_on();
        }
        self.others.remove(0)
    }

    /// Takes all answers that are left.
    #[track_caller]
    fn end(mut self) -> SimGuest {
        while let missing = self.answers.iter().filter(|count| **count == 0).count()
            && missing > 0
        {
            let packet = self.guest.try_recv(Duration::from_secs(10));
            let packet = packet.unwrap_or_else(|| panic!("{missing} RSTs are lost"));
            self.count(packet);
        }
        for packet in self.guest.settle() {
            self.count(packet);
        }
        assert!(self.answers.iter().all(|count| *count == 1));
        assert!(self.others.is_empty(), "{:?}", self.others);
        self.guest
    }
}

#[test]
fn every_refused_request_is_answered_once() {
    let daemon = Daemon::start();
    let mut flood = Flood::new(&daemon);
    while flood.answers.len() < 20_000 {
        flood.go_on();
    }
    let mut guest = flood.end();
    assert_serves(&daemon, &mut guest);
}

#[test]
fn clients_are_connected_beside_a_flood_of_refused_requests() {
    let daemon = Daemon::start();
    let mut flood = Flood::new(&daemon);
    let mut clients = Vec::new();
    for port in 1..=20 {
        let client = dial(&daemon, port);
        let request = flood.next_other();
        let flow = Flow::new(port, request.src_port);
        request.assert_is(Op::Request, &flow);
        while !flood.send(&flow.packet(Op::Response)) {
            flood.go_on();
        }
        let has_answer = |client: &UnixStream| {
            let mut fds = [PollFd::new(client.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
        };
        flood.until(|| has_answer(&client));
        assert_eq!(read_ok(&client), flow.host_port);
        clients.push(client);
    }
    flood.end();
}

#[test]
fn a_stream_goes_on_beside_a_flood_of_refused_requests() {
    let daemon = Daemon::start();
    let mut flood = Flood::new(&daemon);
    let flow = Flow::new(1, PORT);
    let mut stream = from_guest(&daemon, &mut flood.guest, &flow);
    stream.set_nonblocking(true).unwrap();
    let bytes = pattern(1, 200_000);
    let (mut written, mut got) = (0, Vec::new());
    while got.len() < bytes.len() {
        written += stream.write(&bytes[written..]).unwrap_or(0);
        let packet = flood.next_other();
        packet.assert_is(Op::Rw, &flow);
        got.extend(packet.payload);
    }
    assert_same(&got, &bytes);
    flood.end();
}

/// Clients that write `line` to a guest that offers no buffers, and leave, more than there are places.
fn departed_clients(daemon: &Daemon, guest: &mut SimGuest, line: &[u8]) {
    guest.auto_repost = false;
    // No buffer is left.
    while guest.rings[0].outstanding() > 0 {
        guest.send(&Flow::new(1, CLOSED).packet(Op::CreditRequest));
        guest.recv();
    }
    for _ in 0..2000 {
        let mut client = connect(&daemon.uds_path());
        client.write_all(line).unwrap();
    }
    eventually("the clients to be accepted", || {
        UnixStream::connect(daemon.uds_path()).is_ok()
    });
}

#[test]
fn clients_that_left_keep_no_places() {
    for line in [&b"CONNECT 1\n"[..], b"CONNECT 1\nbytes for the guest"] {
        let daemon = Daemon::start();
        let mut guest = SimGuest::start(&daemon, Setup::default());
        departed_clients(&daemon, &mut guest, line);
        let client = dial(&daemon, PORT);
        let listener = listen(&daemon, PORT);
        let flow = Flow::new(2, PORT);
        guest.send(&flow.packet(Op::Request));
        let program = accept(&listener);
        guest.auto_repost = true;
        guest.post_rx();
        let (mut has_response, mut request) = (false, None);
        while !has_response || request.is_none() {
            let packet = guest.recv();
            has_response |= packet.is(Op::Response);
            if packet.is(Op::Request) && packet.dst_port == PORT {
                request = Some(Flow::new(PORT, packet.src_port));
            }
        }
        let request = request.unwrap();
        guest.send(&request.packet(Op::Response));
        assert_eq!(read_ok(&client), request.host_port);
        drop(program);
    }
}

#[test]
fn bytes_of_a_client_that_left_reach_the_guest_while_there_are_places() {
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let mut client = connect(&daemon.uds_path());
    client.write_all(b"CONNECT 1234\nto be kept").unwrap();
    drop(client);
    let request = guest.recv();
    let flow = Flow::of(&request);
    request.assert_is(Op::Request, &flow);
    guest.send(&flow.packet(Op::Response));
    let packet = guest.recv();
    packet.assert_is(Op::Rw, &flow);
    assert_eq!(packet.payload, b"to be kept");
}

#[test]
fn a_third_of_the_places_is_the_hosts_however_many_the_guest_takes() {
    let daemon = Daemon::start_with(&["--max-connections=6"]);
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let listener = listen(&daemon, PORT);
    let request = |guest: &mut SimGuest, port| {
        let flow = Flow::new(port, PORT);
        guest.send(&flow.packet(Op::Request));
        let answer = guest.recv();
        let accepted = answer.is(Op::Response).then(|| accept(&listener));
        assert!(accepted.is_some() || answer.is(Op::Rst), "{answer:?}");
        accepted.map(|stream| (stream, flow))
    };
    let mut open: Vec<_> = (1..=6)
        .map(|port| request(&mut guest, port).expect("refused"))
        .collect();
    assert!(request(&mut guest, 7).is_none(), "the host's place");
    let (first, flow, _) = from_host(&daemon, &mut guest, PORT);
    let (second, _, _) = from_host(&daemon, &mut guest, PORT);
    assert_closed(&dial(&daemon, PORT));
    // A place that the guest gives back is anybody's.
    let (stream, closed) = open.remove(0);
    guest.send(&closed.packet(Op::Rst));
    assert_closed(&stream);
    let (third, _, _) = from_host(&daemon, &mut guest, PORT);
    assert!(request(&mut guest, 8).is_none(), "all are taken");
    assert_moves_bytes(&mut guest, &first, &flow);
    drop((second, third));
}
