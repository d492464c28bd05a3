//! Ports as plain sockets (`--guest-port`, `--host-port`), clients that come before the guest (`--wait-for-guest`), and the
//! name under which a guest's program calls a host program.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::PathBuf;

use common::daemon::{Daemon, eventually};
use common::sim::host::{
    FLOW, PORT, accept, assert_closed, assert_moves_bytes, assert_same, assert_serves, connect,
    dial, from_guest, listen, pattern, read_exactly, read_ok, read_to_end, recv_bytes, recv_other,
};
use common::sim::packet::{NO_RECEIVE, NO_SEND};
use common::sim::{Flow, GuestStack, Op, Setup, SimGuest};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tempfile::TempDir;

/// The guest's port behind the plain socket.
const SSH: u32 = 22;
/// A host port that has a socket of its own.
const WEB: u32 = 80;

/// A daemon with a plain socket for a port of either side.
struct Ports {
    daemon: Daemon,
    folder: TempDir,
}

impl Ports {
    fn start(options: &[&str]) -> Self {
        let folder = TempDir::with_prefix("vsock-test-").unwrap();
        let path = |name| folder.path().join(name).display().to_string();
        let guest_ports = [
            format!("--guest-port={SSH}={}", path("ssh")),
            format!("--guest-port={}={}", SSH + 1, path("other")),
            format!("--host-port={WEB}={}", path("web")),
            format!("--stats-path={}", path("stats")),
        ];
        let all: Vec<&str> = guest_ports.iter().map(String::as_str).collect();
        Self {
            daemon: Daemon::start_with(&[&all[..], options].concat()),
            folder,
        }
    }

    /// One that lets clients wait for longer than a test takes.
    fn patient() -> Self {
        Self::start(&["--wait-for-guest=600"])
    }

    fn device(&self) -> SimGuest {
        SimGuest::start(&self.daemon, Setup::default())
    }

    /// The plain socket of the guest's port [`SSH`].
    fn ssh(&self) -> PathBuf {
        self.folder.path().join("ssh")
    }

    fn web(&self) -> PathBuf {
        self.folder.path().join("web")
    }

    /// The value of the sample with this name and label.
    fn number(&self, name: &str, label: &str) -> u64 {
        let stream = connect(&self.folder.path().join("stats"));
        stream.shutdown(Shutdown::Write).unwrap();
        let text = String::from_utf8(read_to_end(&stream)).unwrap();
        let is_wanted = |line: &&str| {
            let rest = line.strip_prefix("vhost_user_vsock_");
            let rest = rest.and_then(|rest| rest.strip_prefix(name));
            rest.is_some_and(|rest| rest.starts_with([' ', '{']) && rest.contains(label))
        };
        let sample = text.lines().find(is_wanted);
        let value = sample.and_then(|line| line.rsplit(' ').next());
        let value = value.unwrap_or_else(|| panic!("no {name} in {text}"));
        value.parse().unwrap()
    }

    #[track_caller]
    fn wait_for_vmms_end(&self) {
        eventually("the VMM is gone", || self.number("vmm_connected", "") == 0);
    }
}

/// A guest whose rings have just started; nothing was received.
fn boot(daemon: &Daemon) -> SimGuest {
    let mut guest = SimGuest::connect(daemon, Setup::default());
    guest.post_rx();
    guest.start_rings();
    guest
}

/// The next packet, which must be a REQUEST for `port`.
#[track_caller]
fn recv_request(guest: &mut SimGuest, port: u32) -> Flow {
    let request = guest.recv();
    let flow = Flow::new(port, request.src_port);
    request.assert_is(Op::Request, &flow);
    flow
}

#[track_caller]
fn accept_request(guest: &mut SimGuest, port: u32) -> Flow {
    let flow = recv_request(guest, port);
    guest.send(&flow.packet(Op::Response));
    flow
}

/// Refuses as many REQUESTs for `port`.
#[track_caller]
fn refuse(guest: &mut SimGuest, port: u32, times: usize) {
    for _ in 0..times {
        let flow = recv_request(guest, port);
        guest.send(&flow.packet(Op::Rst));
    }
}

#[track_caller]
fn assert_open(mut stream: &UnixStream) {
    stream.set_nonblocking(true).unwrap();
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    stream.set_nonblocking(false).unwrap();
}

/// A client at a plain socket, to which the guest has answered.
fn plain(ports: &Ports, guest: &mut SimGuest) -> (UnixStream, Flow) {
    let client = connect(&ports.ssh());
    let flow = accept_request(guest, SSH);
    (client, flow)
}

// --- Guest ports.

#[test]
fn a_client_of_a_plain_socket_writes_no_line_and_gets_none() {
    let ports = Ports::start(&[]);
    let mut guest = ports.device();
    let (client, flow) = plain(&ports, &mut guest);
    // The guest's first bytes are the client's first bytes.
    guest.send(&flow.rw(b"SSH-2.0"));
    assert_same(&read_exactly(&client, 7), b"SSH-2.0");
    assert_moves_bytes(&mut guest, &client, &flow);
    guest.send(&flow.packet(Op::Rst));
    assert_closed(&client);
    assert_serves(&ports.daemon, &mut guest);
}

#[test]
fn what_a_client_of_a_plain_socket_writes_before_the_guest_answers_is_payload() {
    let ports = Ports::start(&[]);
    let mut guest = ports.device();
    let mut client = connect(&ports.ssh());
    client.write_all(b"CONNECT 5\n").unwrap();
    let flow = recv_request(&mut guest, SSH);
    assert!(guest.settle().is_empty(), "bytes before the answer");
    guest.send(&flow.packet(Op::Response));
    assert_same(&recv_bytes(&mut guest, &flow, 10), b"CONNECT 5\n");
    assert_moves_bytes(&mut guest, &client, &flow);
}

#[test]
fn each_plain_socket_leads_to_its_port() {
    let ports = Ports::start(&[]);
    let mut guest = ports.device();
    let (ssh, ssh_flow) = plain(&ports, &mut guest);
    let other = connect(&ports.folder.path().join("other"));
    let other_flow = accept_request(&mut guest, SSH + 1);
    assert_moves_bytes(&mut guest, &other, &other_flow);
    assert_moves_bytes(&mut guest, &ssh, &ssh_flow);
}

#[test]
fn either_end_of_a_plain_socket_may_stop_sending() {
    let ports = Ports::start(&[]);
    let mut guest = ports.device();
    let (mut client, flow) = plain(&ports, &mut guest);
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_same(&recv_bytes(&mut guest, &flow, 8), b"question");
    let shutdown = recv_other(&mut guest);
    shutdown.assert_is(Op::Shutdown, &flow);
    assert_eq!(shutdown.flags, NO_SEND);
    guest.send(&flow.rw(b"answer"));
    guest.send(&flow.shutdown(NO_SEND));
    assert_same(&read_to_end(&client), b"answer");
}

#[test]
fn a_client_of_a_plain_socket_that_closes_is_followed_by_its_bytes() {
    let ports = Ports::start(&[]);
    let mut guest = ports.device();
    let (mut client, flow) = plain(&ports, &mut guest);
    let bytes = pattern(1, 50_000);
    client.write_all(&bytes).unwrap();
    drop(client);
    assert_same(&recv_bytes(&mut guest, &flow, bytes.len()), &bytes);
    let shutdown = recv_other(&mut guest);
    shutdown.assert_is(Op::Shutdown, &flow);
    assert_eq!(shutdown.flags, NO_SEND | NO_RECEIVE);
    guest.send(&flow.packet(Op::Rst));
    assert!(guest.settle().is_empty());
}

#[test]
fn a_plain_socket_closes_where_nobody_listens() {
    let ports = Ports::start(&[]);
    let mut guest = ports.device();
    let client = connect(&ports.ssh());
    refuse(&mut guest, SSH, 1);
    assert_closed(&client);
    assert!(guest.settle().is_empty(), "asked again");
}

#[test]
fn a_client_of_a_plain_socket_may_leave_before_the_guest_answers() {
    let ports = Ports::start(&[]);
    let mut guest = ports.device();
    let client = connect(&ports.ssh());
    let flow = recv_request(&mut guest, SSH);
    drop(client);
    assert!(guest.settle().is_empty());
    guest.send(&flow.packet(Op::Response));
    guest.recv().assert_is(Op::Rst, &flow);
    assert_serves(&ports.daemon, &mut guest);
}

#[test]
fn a_plain_socket_closes_without_a_guest() {
    let ports = Ports::start(&[]);
    assert_closed(&connect(&ports.ssh()));
    let _guest = SimGuest::connect(&ports.daemon, Setup::default());
    assert_closed(&connect(&ports.ssh()));
}

#[test]
fn plain_sockets_go_with_the_daemon() {
    let ports = Ports::start(&[]);
    assert!(ports.ssh().exists());
    ports.daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(ports.daemon.wait_exit().success());
    assert!(!ports.ssh().exists());
}

// --- Host ports.

#[test]
fn a_host_port_with_a_path_leads_there_and_the_others_to_the_uds_path() {
    let ports = Ports::start(&[]);
    let mut guest = ports.device();
    let named = UnixListener::bind(ports.web()).unwrap();
    let unnamed = listen(&ports.daemon, WEB);
    let flow = Flow::new(40_000, WEB);
    guest.send(&flow.packet(Op::Request));
    guest.recv().assert_is(Op::Response, &flow);
    let web = accept(&named);
    assert_moves_bytes(&mut guest, &web, &flow);
    unnamed.set_nonblocking(true).unwrap();
    assert_eq!(unnamed.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    let stream = from_guest(&ports.daemon, &mut guest, &FLOW);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
}

#[test]
fn a_host_port_with_a_path_is_refused_where_nobody_listens_there() {
    let ports = Ports::start(&[]);
    let mut guest = ports.device();
    let _unnamed = listen(&ports.daemon, WEB);
    let flow = Flow::new(40_000, WEB);
    guest.send(&flow.packet(Op::Request));
    guest.recv().assert_is(Op::Rst, &flow);
}

// --- The caller's name.

/// Accepts, and returns the stream and the name of its other end.
fn accept_named(listener: &UnixListener) -> (UnixStream, Option<String>) {
    let stream = accept(listener);
    let address = stream.peer_addr().unwrap();
    let name = address.as_abstract_name();
    let name = name.map(|name| String::from_utf8(name.to_vec()).unwrap());
    (stream, name)
}

/// The number at the end of a name that tells of a call from `flow`.
#[track_caller]
fn number_of(daemon: &Daemon, flow: &Flow, name: Option<String>) -> u64 {
    let name = name.expect("no name");
    let (host, guest) = (flow.host_port, flow.guest_port);
    let start = format!("vhost-user-vsock/2:{host}/4:{guest}/{}.", daemon.pid());
    let number = name.strip_prefix(&start);
    number
        .unwrap_or_else(|| panic!("{name} does not start with {start}"))
        .parse()
        .unwrap()
}

fn call(daemon: &Daemon, guest: &mut SimGuest, flow: &Flow) -> (UnixStream, Option<String>) {
    let listener = listen(daemon, flow.host_port);
    guest.send(&flow.packet(Op::Request));
    guest.recv().assert_is(Op::Response, flow);
    accept_named(&listener)
}

#[test]
fn a_host_program_can_ask_who_calls() {
    let ports = Ports::start(&[]);
    let mut guest = ports.device();
    let web = UnixListener::bind(ports.web()).unwrap();
    let mut numbers = Vec::new();
    let mut streams = Vec::new();
    for guest_port in [40_000, 40_001, u32::MAX - 1] {
        let flow = Flow::new(guest_port, PORT);
        let (stream, name) = call(&ports.daemon, &mut guest, &flow);
        numbers.push(number_of(&ports.daemon, &flow, name));
        assert_moves_bytes(&mut guest, &stream, &flow);
        streams.push(stream);
    }
    let flow = Flow::new(40_000, WEB);
    guest.send(&flow.packet(Op::Request));
    guest.recv().assert_is(Op::Response, &flow);
    let (_stream, name) = accept_named(&web);
    numbers.push(number_of(&ports.daemon, &flow, name));
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
}

#[test]
fn the_same_ports_have_a_new_name_while_a_host_program_keeps_the_old_one() {
    let ports = Ports::start(&[]);
    let mut guest = ports.device();
    let (_kept, name) = call(&ports.daemon, &mut guest, &FLOW);
    let first = number_of(&ports.daemon, &FLOW, name);
    guest.send(&FLOW.packet(Op::Rst));
    let (_stream, name) = call(&ports.daemon, &mut guest, &FLOW);
    assert!(number_of(&ports.daemon, &FLOW, name) > first);
}

#[test]
fn a_name_that_another_program_has_taken_refuses_nothing() {
    let ports = Ports::start(&[]);
    let mut guest = ports.device();
    let (_stream, name) = call(&ports.daemon, &mut guest, &FLOW);
    let next = number_of(&ports.daemon, &FLOW, name) + 1;
    guest.send(&FLOW.packet(Op::Rst));
    let taken = (next..next + 8).map(|number| {
        let pid = ports.daemon.pid();
        let name = format!("vhost-user-vsock/2:{PORT}/4:40000/{pid}.{number}");
        UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap()
    });
    let _taken: Vec<_> = taken.collect();
    let (stream, name) = call(&ports.daemon, &mut guest, &FLOW);
    assert_eq!(name, None);
    assert_moves_bytes(&mut guest, &stream, &FLOW);
}

#[test]
fn a_guest_that_asks_for_nobody_again_and_again_takes_no_names() {
    let ports = Ports::start(&[]);
    let mut guest = ports.device();
    let (_stream, name) = call(&ports.daemon, &mut guest, &FLOW);
    let before = number_of(&ports.daemon, &FLOW, name);
    drop(listen(&ports.daemon, 70));
    for guest_port in 1..=300 {
        for host_port in [70, 71] {
            let nobody = Flow::new(guest_port, host_port);
            guest.send(&nobody.packet(Op::Request));
            guest.recv().assert_is(Op::Rst, &nobody);
        }
    }
    let flow = Flow::new(40_001, PORT);
    let (_stream, name) = call(&ports.daemon, &mut guest, &flow);
    let taken = number_of(&ports.daemon, &flow, name) - before;
    assert!(taken < 5, "{taken} names were taken");
}

// --- Clients that wait for the guest.

/// A client of each kind, both with payload behind what they have to say.
fn early_clients(ports: &Ports) -> [UnixStream; 2] {
    let line = dial(&ports.daemon, PORT);
    let plain = connect(&ports.ssh());
    let clients = [line, plain];
    for mut client in &clients {
        client.write_all(b"early").unwrap();
    }
    clients
}

/// Accepts both of [`early_clients`], in any order.
#[track_caller]
fn assert_both_get_in(guest: &mut SimGuest, clients: &[UnixStream; 2]) {
    let flows = [(); 2].map(|()| Flow::of(&guest.recv()));
    let flow_of = |port| flows.iter().find(|flow| flow.guest_port == port).unwrap();
    let (line, plain) = (flow_of(PORT), flow_of(SSH));
    guest.send(&line.packet(Op::Response));
    assert_eq!(read_ok(&clients[0]), line.host_port);
    assert_same(&recv_bytes(guest, line, 5), b"early");
    guest.send(&plain.packet(Op::Response));
    assert_same(&recv_bytes(guest, plain, 5), b"early");
    assert_moves_bytes(guest, &clients[0], line);
    assert_moves_bytes(guest, &clients[1], plain);
}

#[test]
fn clients_wait_for_the_vmm() {
    let ports = Ports::patient();
    let clients = early_clients(&ports);
    ports.daemon.assert_idle();
    clients.iter().for_each(assert_open);
    let mut guest = boot(&ports.daemon);
    assert_both_get_in(&mut guest, &clients);
}

#[test]
fn clients_wait_for_the_driver() {
    let ports = Ports::patient();
    let before = early_clients(&ports);
    let mut guest = SimGuest::connect(&ports.daemon, Setup::default());
    before.iter().for_each(assert_open);
    guest.post_rx();
    guest.start_rings();
    assert_both_get_in(&mut guest, &before);
}

#[test]
fn clients_wait_for_the_guests_program() {
    let ports = Ports::patient();
    let mut guest = ports.device();
    let mut client = dial(&ports.daemon, PORT);
    client.write_all(b"early").unwrap();
    refuse(&mut guest, PORT, 5);
    assert_open(&client);
    let flow = accept_request(&mut guest, PORT);
    assert_eq!(read_ok(&client), flow.host_port);
    assert_same(&recv_bytes(&mut guest, &flow, 5), b"early");
    assert_moves_bytes(&mut guest, &client, &flow);
    let plain = connect(&ports.ssh());
    refuse(&mut guest, SSH, 3);
    let flow = accept_request(&mut guest, SSH);
    assert_moves_bytes(&mut guest, &plain, &flow);
    guest.send(&flow.packet(Op::Rst));
    assert_closed(&plain);
    assert!(
        guest.settle().is_empty(),
        "asked again once it was accepted"
    );
}

#[test]
fn a_client_that_has_stopped_sending_waits_as_well() {
    let ports = Ports::patient();
    let mut client = connect(&ports.ssh());
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut guest = boot(&ports.daemon);
    refuse(&mut guest, SSH, 2);
    let flow = accept_request(&mut guest, SSH);
    assert_same(&recv_bytes(&mut guest, &flow, 8), b"question");
    recv_other(&mut guest).assert_is(Op::Shutdown, &flow);
    guest.send(&flow.rw(b"answer"));
    guest.send(&flow.shutdown(NO_SEND));
    assert_same(&read_to_end(&client), b"answer");
}

#[test]
fn clients_wait_while_the_vmm_is_replaced_and_the_guest_reboots() {
    let ports = Ports::patient();
    let clients = early_clients(&ports);
    // Its REQUESTs are on the way, or in its buffers, when the VMM goes.
    let mut guest = boot(&ports.daemon);
    recv_request_of(&mut guest, &[PORT, SSH]);
    drop(guest);
    ports.wait_for_vmms_end();
    clients.iter().for_each(assert_open);
    let mut guest = boot(&ports.daemon);
    recv_request_of(&mut guest, &[PORT, SSH]);
    recv_request_of(&mut guest, &[PORT, SSH]);
    guest.stop_rings();
    guest.restart_fresh();
    assert_both_get_in(&mut guest, &clients);
}

#[track_caller]
fn recv_request_of(guest: &mut SimGuest, ports: &[u32]) {
    let request = guest.recv();
    assert!(request.is(Op::Request), "{request:?}");
    assert!(ports.contains(&request.dst_port), "{request:?}");
}

#[test]
fn a_client_without_a_whole_line_stays_while_the_vmm_is_replaced() {
    let ports = Ports::patient();
    let guest = ports.device();
    let mut client = connect(&ports.daemon.uds_path());
    client.write_all(b"CONN").unwrap();
    drop(guest);
    ports.wait_for_vmms_end();
    client.write_all(b"ECT 1234\n").unwrap();
    let mut guest = boot(&ports.daemon);
    let flow = accept_request(&mut guest, PORT);
    assert_eq!(read_ok(&client), flow.host_port);
}

#[test]
fn a_client_that_leaves_is_not_asked_for_any_more() {
    let ports = Ports::patient();
    let (before, _) = ports.daemon.at_rest();
    drop(early_clients(&ports));
    eventually("its descriptors are closed", || {
        ports.daemon.open_descriptors() == before
    });
    let mut guest = boot(&ports.daemon);
    assert!(guest.settle().is_empty(), "a client that has left");
    let dropped = ports.number("clients_dropped_total", "");
    let client = dial(&ports.daemon, PORT);
    refuse(&mut guest, PORT, 2);
    drop(client);
    // A REQUEST may be on the way. No other follows it.
    let is_over = || {
        ports.number("clients_dropped_total", "") == dropped + 1
            || ports.number("connections_ended_total", "refused") == 1
    };
    eventually("nobody waits any more", || {
        for packet in guest.settle() {
            guest.send(&Flow::of(&packet).packet(Op::Rst));
        }
        is_over()
    });
    assert!(guest.settle().is_empty());
    assert_serves(&ports.daemon, &mut guest);
}

#[test]
fn a_wait_comes_to_an_end() {
    let ports = Ports::start(&["--wait-for-guest=1"]);
    let clients = early_clients(&ports);
    clients.iter().for_each(assert_closed);
    let stack = GuestStack::new(ports.device());
    let clients = early_clients(&ports);
    clients.iter().for_each(assert_closed);
    stack.listen(PORT);
    let client = dial(&ports.daemon, PORT);
    read_ok(&client);
}

#[test]
fn a_wait_counts_as_one_client_and_one_connection() {
    let ports = Ports::patient();
    let opened = || ports.number("connections_opened_total", "host");
    let refused = || ports.number("connections_ended_total", "refused");
    let clients = ports.number("clients_total", "");
    let mut guest = ports.device();
    let client = dial(&ports.daemon, PORT);
    refuse(&mut guest, PORT, 4);
    assert_eq!((opened(), refused()), (0, 0));
    assert_eq!(ports.number("clients_waiting", ""), 1);
    accept_request(&mut guest, PORT);
    read_ok(&client);
    eventually("the connection is counted", || opened() == 1);
    assert_eq!(ports.number("clients_waiting", ""), 0);
    assert_eq!(refused(), 0);
    assert_eq!(ports.number("clients_total", ""), clients + 1);
}

#[test]
fn one_more_than_1024_does_not_wait() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(65_536), hard).unwrap();
    let ports = Ports::patient();
    let before = ports.number("clients_total", "");
    let clients: Vec<_> = (0..1024).map(|_| connect(&ports.ssh())).collect();
    eventually("all are accepted", || {
        ports.number("clients_total", "") == before + 1024
    });
    let surplus = [dial(&ports.daemon, PORT), connect(&ports.ssh())];
    surplus.iter().for_each(assert_closed);
    clients.iter().for_each(assert_open);
    // Where there is a guest, its first answer counts for one more.
    let mut guest = boot(&ports.daemon);
    let flows: Vec<_> = (0..clients.len())
        .map(|_| recv_request(&mut guest, SSH))
        .collect();
    assert_eq!(flows.len(), clients.len());
    for flow in &flows {
        guest.send(&flow.packet(Op::Response));
    }
    guest.settle();
    let mut first = &clients[0];
    first.write_all(b"x").unwrap();
    assert!(guest.recv().is(Op::Rw));
}

#[test]
fn clients_that_wait_in_vain_take_little_time() {
    let ports = Ports::patient();
    let stack = GuestStack::new(ports.device());
    let clients = early_clients(&ports);
    ports.daemon.assert_idle();
    stack.listen(SSH);
    stack.accept(SSH);
    drop(clients);
}

#[test]
fn without_the_option_nobody_waits() {
    let ports = Ports::start(&[]);
    let clients = [connect(&ports.daemon.uds_path()), connect(&ports.ssh())];
    clients.iter().for_each(assert_closed);
    let mut guest = ports.device();
    let client = dial(&ports.daemon, PORT);
    refuse(&mut guest, PORT, 1);
    assert_closed(&client);
    assert!(guest.settle().is_empty());
}

#[test]
fn a_flood_of_clients_that_wait_keeps_nobody_out() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(65_536), hard).unwrap();
    let ports = Ports::patient();
    let stack = GuestStack::new(ports.device());
    stack.listen(PORT);
    let _flood: Vec<_> = (0..2000).map(|_| connect(&ports.ssh())).collect();
    eventually("as many wait as may", || {
        ports.number("clients_waiting", "") == 1024
    });
    for _ in 0..20 {
        let client = dial(&ports.daemon, PORT);
        read_ok(&client);
        let listener = listen(&ports.daemon, WEB + 1);
        let _stream = stack.connect(WEB + 1).unwrap();
        accept(&listener);
    }
}
