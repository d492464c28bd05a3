//! Connections that are forwarded to AF_VSOCK of the host. That of the machine which runs the tests belongs to the machine: the
//! host is a real Linux guest with the loopback of AF_VSOCK, and in it run the daemon, a simulated guest and host programs on
//! CID 1.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::{sleep, spawn};
use std::time::Duration;

use common::daemon::{Daemon, GUEST_CID, PATIENCE, binary, eventually};
use common::sim::host::{
    assert_closed, assert_moves_bytes, assert_same, pattern, read_to_end, recv_bytes, recv_other,
};
use common::sim::packet::{NO_RECEIVE, NO_SEND};
use common::sim::{Flow, GuestStack, GuestStream, Op, Setup, SimGuest};
use common::uml::Uml;
use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::TempDir;

/// Set where AF_VSOCK may be used.
const IN_GUEST: &str = "VSOCK_TEST_IN_GUEST";

/// The CID of the loopback.
const LOOPBACK: u32 = 1;

/// The host port of [`open`].
const PORT: u32 = 5000;

#[test]
fn connections_are_forwarded_in_a_guest() {
    let daemon = Daemon::start();
    let guest = Uml::boot(&daemon);
    guest.run_ok("insmod $MODULES/vsock_loopback.ko");
    let tests = std::env::current_exe().unwrap();
    let command = format!(
        "{IN_GUEST}=1 {} --ignored --test-threads=1 2>&1",
        tests.display()
    );
    let output = guest.run(&command);
    assert_eq!(output.status, 0, "{}", output.stdout);
    assert!(output.stdout.contains(" 6 passed"), "{}", output.stdout);
}

/// A daemon that forwards, and its guest. Killed on drop.
struct Forwarding {
    child: Child,
    directory: TempDir,
}

impl Forwarding {
    fn start(options: &[&str]) -> (Self, SimGuest) {
        assert!(std::env::var_os(IN_GUEST).is_some(), "not in a guest");
        let directory = TempDir::new().unwrap();
        let socket = directory.path().join("vhost.socket");
        let child = Command::new(binary())
            .arg(format!("--guest-cid={GUEST_CID}"))
            .arg(format!("--forward-cid={LOOPBACK}"))
            .arg("--socket")
            .arg(&socket)
            .args(options)
            .stdin(Stdio::null())
            .stderr(File::create(directory.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let forwarding = Self { child, directory };
        let vmm = connect_soon(&socket);
        (forwarding, SimGuest::start_over(vmm, Setup::default()))
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// The number of its open descriptors.
    fn descriptors(&self) -> usize {
        let directory = format!("/proc/{}/fd", self.child.id());
        std::fs::read_dir(directory).unwrap().count()
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            println!("--- the daemon's log\n{}", self.log());
        }
    }
}

fn connect_soon(path: &Path) -> UnixStream {
    let mut stream = None;
    eventually("the daemon listens", || {
        stream = UnixStream::connect(path).ok();
        stream.is_some()
    });
    stream.unwrap()
}

fn new_socket() -> Socket {
    Socket::new(Domain::VSOCK, Type::STREAM, None).unwrap()
}

/// A host program that listens on a port.
fn listen(port: u32) -> Socket {
    let socket = new_socket();
    socket.bind(&SockAddr::vsock(u32::MAX, port)).unwrap();
    socket.listen(128).unwrap();
    socket
}

/// A stream as any other, with patience.
fn stream(socket: Socket) -> UnixStream {
    let stream = UnixStream::from(OwnedFd::from(socket));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn accept(listener: &Socket) -> UnixStream {
    stream(listener.accept().unwrap().0)
}

/// A host program that connects to a port of the loopback.
fn connect(port: u32) -> UnixStream {
    let socket = new_socket();
    socket.connect(&SockAddr::vsock(LOOPBACK, port)).unwrap();
    stream(socket)
}

/// A connection that the guest opens.
#[track_caller]
fn open(guest: &mut SimGuest, listener: &Socket, guest_port: u32) -> (UnixStream, Flow) {
    let flow = Flow::new(guest_port, PORT);
    guest.send(&flow.packet(Op::Request));
    let stream = accept(listener);
    guest.recv().assert_is(Op::Response, &flow);
    (stream, flow)
}

#[track_caller]
fn assert_shutdown(guest: &mut SimGuest, flow: &Flow, flags: u32) {
    let shutdown = recv_other(guest);
    shutdown.assert_is(Op::Shutdown, flow);
    assert_eq!(shutdown.flags, flags);
}

#[test]
#[ignore = "runs in a guest"]
fn bytes_go_both_ways_and_each_end_may_stop() {
    let (_daemon, mut guest) = Forwarding::start(&[]);
    let listener = listen(PORT);
    let bytes = pattern(1, 30_000);

    let (mut program, flow) = open(&mut guest, &listener, 40_000);
    assert_moves_bytes(&mut guest, &program, &flow);
    program.write_all(b"last").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    assert_same(&recv_bytes(&mut guest, &flow, 4), b"last");
    assert_shutdown(&mut guest, &flow, NO_SEND);
    guest.send(&flow.rw(&bytes));
    guest.send(&flow.shutdown(NO_SEND));
    assert_same(&read_to_end(&program), &bytes);
    assert_shutdown(&mut guest, &flow, NO_SEND | NO_RECEIVE);
    guest.send(&flow.packet(Op::Rst));

    let (mut program, flow) = open(&mut guest, &listener, 40_001);
    guest.send(&flow.rw(&bytes));
    guest.send(&flow.shutdown(NO_SEND));
    assert_same(&read_to_end(&program), &bytes);
    program.write_all(&bytes).unwrap();
    assert_same(&recv_bytes(&mut guest, &flow, bytes.len()), &bytes);
    drop(program);
    assert_shutdown(&mut guest, &flow, NO_SEND | NO_RECEIVE);
    guest.send(&flow.packet(Op::Rst));

    let (program, flow) = open(&mut guest, &listener, 40_002);
    program.shutdown(Shutdown::Read).unwrap();
    assert_shutdown(&mut guest, &flow, NO_RECEIVE);
}

#[test]
#[ignore = "runs in a guest"]
fn a_close_comes_behind_the_last_byte_and_a_reset_at_once() {
    let (_daemon, mut guest) = Forwarding::start(&[]);
    let listener = listen(PORT);
    let bytes = pattern(2, 200_000);

    let (mut program, flow) = open(&mut guest, &listener, 40_000);
    program.write_all(&bytes).unwrap();
    drop(program);
    assert_same(&recv_bytes(&mut guest, &flow, bytes.len()), &bytes);
    assert_shutdown(&mut guest, &flow, NO_SEND | NO_RECEIVE);
    guest.send(&flow.packet(Op::Rst));

    let (program, flow) = open(&mut guest, &listener, 40_001);
    for part in bytes.chunks(50_000) {
        guest.send(&flow.rw(part));
    }
    guest.send(&flow.shutdown(NO_SEND | NO_RECEIVE));
    assert_same(&read_to_end(&program), &bytes);
    recv_other(&mut guest).assert_is(Op::Rst, &flow);

    let (program, flow) = open(&mut guest, &listener, 40_002);
    guest.send(&flow.packet(Op::Rst));
    assert_closed(&program);
    assert!(guest.settle().is_empty());
}

#[test]
#[ignore = "runs in a guest"]
fn every_cid_leads_there_and_a_refusal_comes_from_the_one_that_was_dialed() {
    let (daemon, mut guest) = Forwarding::start(&[]);
    let before = daemon.descriptors();
    let listener = listen(PORT);
    for peer_cid in [2, 77] {
        let flow_to = |guest_port, host_port| Flow {
            peer_cid,
            ..Flow::new(guest_port, host_port)
        };
        for guest_port in 40_000..40_050 {
            let nobody = flow_to(guest_port, PORT + 1);
            guest.send(&nobody.packet(Op::Request));
            guest.recv().assert_is(Op::Rst, &nobody);
        }
        let flow = flow_to(40_000, PORT);
        guest.send(&flow.packet(Op::Request));
        let program = accept(&listener);
        guest.recv().assert_is(Op::Response, &flow);
        assert_moves_bytes(&mut guest, &program, &flow);
        guest.send(&flow.packet(Op::Rst));
        assert_closed(&program);
    }
    eventually("all is closed", || daemon.descriptors() == before);
}

#[test]
#[ignore = "runs in a guest"]
fn ports_that_are_listened_on_lead_to_the_guests() {
    let (_daemon, mut guest) = Forwarding::start(&["--forward-listen=9001+9002"]);
    for port in [9001, 9002] {
        let mut program = connect(port);
        program.write_all(b"early").unwrap();
        let request = guest.recv();
        let flow = Flow::new(port, request.src_port);
        request.assert_is(Op::Request, &flow);
        guest.send(&flow.packet(Op::Response));
        assert_same(&recv_bytes(&mut guest, &flow, 5), b"early");
        assert_moves_bytes(&mut guest, &program, &flow);
        drop(program);
        assert_shutdown(&mut guest, &flow, NO_SEND | NO_RECEIVE);
        guest.send(&flow.packet(Op::Rst));
    }
    let refused = connect(9001);
    let flow = Flow::of(&guest.recv());
    guest.send(&flow.packet(Op::Rst));
    assert_closed(&refused);
    let leaves = connect(9001);
    let flow = Flow::of(&guest.recv());
    drop(leaves);
    // The daemon sees that when it looks.
    sleep(Duration::from_millis(100));
    guest.send(&flow.packet(Op::Response));
    recv_other(&mut guest).assert_is(Op::Rst, &flow);
}

#[test]
#[ignore = "runs in a guest"]
fn a_program_that_does_not_read_keeps_only_its_own_connection_waiting() {
    let (_daemon, guest) = Forwarding::start(&[]);
    let listener = listen(PORT);
    let stack = GuestStack::new(guest);
    let mut slow = stack.connect(PORT).unwrap();
    let program = accept(&listener);
    let bytes = pattern(3, 2 << 20);
    let sent = bytes.clone();
    let writer = spawn(move || {
        slow.write_all(&sent).unwrap();
        slow.close();
    });
    let (fast, other) = (stack.connect(PORT).unwrap(), accept(&listener));
    echo(vec![fast], vec![other]);
    assert_same(&read_to_end(&program), &bytes);
    writer.join().unwrap();
}

#[test]
#[ignore = "runs in a guest"]
fn many_connections_carry_many_bytes_both_ways_at_once() {
    let (_daemon, guest) = Forwarding::start(&["--forward-listen=9001"]);
    let listener = listen(PORT);
    let stack = GuestStack::new(guest);
    stack.listen(9001);
    let (mut guests, mut programs) = (Vec::new(), Vec::new());
    for _ in 0..4 {
        guests.push(stack.connect(PORT).unwrap());
        programs.push(accept(&listener));
        let program = connect(9001);
        guests.push(stack.accept(9001));
        programs.push(program);
    }
    echo(guests, programs);
}

/// Each program returns all that its guest's stream sends.
fn echo(guests: Vec<GuestStream>, programs: Vec<UnixStream>) {
    let mut threads = Vec::new();
    for mut program in programs {
        threads.push(spawn(move || {
            let mut bytes = vec![0; 70_000];
            while let Ok(count @ 1..) = program.read(&mut bytes) {
                program.write_all(&bytes[..count]).unwrap();
            }
        }));
    }
    for (seed, mut writer) in (0..).zip(guests) {
        let mut reader = writer.handle();
        let bytes = pattern(seed, 1 << 20);
        let sent = bytes.clone();
        threads.push(spawn(move || {
            sent.chunks(50_001)
                .for_each(|part| writer.write_all(part).unwrap());
            writer.shutdown(NO_SEND);
        }));
        threads.push(spawn(move || {
            let mut got = Vec::new();
            reader.read_to_end(&mut got).unwrap();
            assert_same(&got, &bytes);
        }));
    }
    for thread in threads {
        thread.join().unwrap();
    }
}
