//! Connections that are forwarded to AF_VSOCK of the host. That of the machine which runs the tests belongs to the machine: the
//! host is a real Linux guest with the loopback of AF_VSOCK, and in it run the daemon, a simulated guest and host programs on
//! CID 1.

mod common;
#[path = "real_forwarding/handover.rs"]
mod handover;
#[path = "real_forwarding/messages.rs"]
mod messages;

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep, spawn};
use std::time::{Duration, Instant};

use common::daemon::{Daemon, GUEST_CID, PATIENCE, binary, eventually};
use common::siblings::{Kind, Vms};
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

/// The CID of the sibling that is slow, and its port that never answers.
const SIBLING: u32 = 5;
const NEVER: u32 = 6000;

/// Runs tests of this file in a guest: those that `which` selects, and so many there are.
fn run_in(guest: &Uml, which: &str, count: usize) {
    guest.run_ok("insmod $MODULES/vsock_loopback.ko");
    let tests = std::env::current_exe().unwrap();
    let command = format!(
        "{IN_GUEST}=1 VSOCK_TEST_BINARY={} {} --ignored --test-threads=1 {which} 2>&1",
        binary().display(),
        tests.display()
    );
    let output = guest.run(&command);
    assert_eq!(output.status, 0, "{}", output.stdout);
    let all = format!(" {count} passed");
    assert!(output.stdout.contains(&all), "{}", output.stdout);
}

/// What uses AF_VSOCK calls this first. UML's processors say what they are.
fn assert_in_guest() {
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let is_guest = processor.contains("User Mode Linux");
    assert!(
        is_guest && std::env::var_os(IN_GUEST).is_some(),
        "this is for a guest"
    );
}

#[test]
fn connections_are_forwarded_in_a_guest() {
    let daemon = Daemon::start();
    let guest = Uml::boot(&daemon);
    run_in(
        &guest,
        "--skip=inside:: --skip=messages:: --skip=handover::",
        7,
    );
}

#[test]
fn messages_are_forwarded_in_a_guest() {
    let daemon = Daemon::start();
    let guest = Uml::boot(&daemon);
    run_in(&guest, "messages::", 9);
}

#[test]
fn ports_outlive_the_daemon_in_a_guest() {
    let daemon = Daemon::start();
    let guest = Uml::boot(&daemon);
    run_in(&guest, "handover::", 3);
}

/// The calls that seccomp looks at are the guest's: its kernel decides.
#[test]
fn the_sandbox_holds_in_a_guest() {
    let daemon = Daemon::start();
    let guest = Uml::boot(&daemon);
    run_in(&guest, "inside::sandbox", 3);
}

/// The host's AF_VSOCK is that of a Linux guest, and leads to a sibling of that guest's which answers as this test wants.
#[test]
fn a_connect_that_takes_long_keeps_nobody_waiting() {
    let vms = Vms::start(Kind::OneProcess, &[4, 5]);
    let sibling = vms.guest(u64::from(SIBLING));
    let guest = Uml::boot_at(&vms.vhost_socket(4));
    let done = AtomicBool::new(false);
    scope(|scope| {
        scope.spawn(|| echo_but_for_never(sibling, &done));
        let ran = catch_unwind(AssertUnwindSafe(|| run_in(&guest, "inside::slow", 1)));
        done.store(true, Ordering::Relaxed);
        ran.unwrap_or_else(|panic| resume_unwind(panic));
    });
}

/// Plays a guest that returns what comes to its ports, and does not answer those who call [`NEVER`].
fn echo_but_for_never(mut guest: SimGuest, done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        let Some(packet) = guest.try_recv(Duration::from_millis(50)) else {
            continue;
        };
        let flow = Flow::of(&packet);
        let answer = match packet.op {
            op if op == Op::Request as u16 && flow.guest_port == NEVER => continue,
            op if op == Op::Request as u16 => flow.packet(Op::Response),
            op if op == Op::Rw as u16 => flow.rw(&packet.payload),
            op if op == Op::Shutdown as u16 => flow.packet(Op::Rst),
            _ => continue,
        };
        guest.send(&answer);
    }
}

/// A daemon that forwards, and its guest. Killed on drop.
struct Forwarding {
    child: Child,
    directory: TempDir,
}

impl Forwarding {
    fn start(options: &[&str]) -> (Self, SimGuest) {
        Self::start_to(LOOPBACK, options)
    }

    fn start_to(cid: u32, options: &[&str]) -> (Self, SimGuest) {
        Self::start_with(cid, options, Setup::default())
    }

    fn start_with(cid: u32, options: &[&str], setup: Setup) -> (Self, SimGuest) {
        assert_in_guest();
        let directory = TempDir::new().unwrap();
        let socket = directory.path().join("vhost.socket");
        let child = Command::new(binary())
            .arg(format!("--guest-cid={GUEST_CID}"))
            .arg(format!("--forward-cid={cid}"))
            .arg("--socket")
            .arg(&socket)
            .args(options)
            .stdin(Stdio::null())
            .stderr(File::create(directory.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let forwarding = Self { child, directory };
        // The log's thread starts last: all that the daemon holds is there from now on.
        eventually("the daemon has written to its log", || {
            !forwarding.log().is_empty()
        });
        let vmm = connect_soon(&socket);
        (forwarding, SimGuest::start_over(vmm, setup))
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// The numbers of its open descriptors and of its threads.
    fn holds(&self) -> [usize; 2] {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.child.id()));
        [self.descriptors(), threads.unwrap().count()]
    }

    /// Waits until it holds so many of both.
    #[track_caller]
    fn wait_until_it_holds(&self, expected: [usize; 2]) {
        let deadline = Instant::now() + PATIENCE;
        while self.holds() != expected {
            let holds = self.holds();
            assert!(Instant::now() < deadline, "{holds:?}, not {expected:?}");
            sleep(Duration::from_millis(5));
        }
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
    assert_in_guest();
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
fn ports_with_a_path_of_their_own_are_not_forwarded() {
    let folder = TempDir::new().unwrap();
    let [host_path, guest_path] = ["host", "guest"].map(|name| folder.path().join(name));
    let (_daemon, mut guest) = Forwarding::start(&[
        &format!("--host-port={PORT}={}", host_path.display()),
        &format!("--guest-port=22={}", guest_path.display()),
    ]);
    let _not_this_one = listen(PORT);
    let unix = UnixListener::bind(&host_path).unwrap();
    let flow = Flow::new(40_000, PORT);
    guest.send(&flow.packet(Op::Request));
    let program = unix.accept().unwrap().0;
    guest.recv().assert_is(Op::Response, &flow);
    assert_moves_bytes(&mut guest, &program, &flow);
    let client = UnixStream::connect(guest_path).unwrap();
    let flow = Flow::of(&guest.recv());
    assert_eq!(flow.guest_port, 22);
    guest.send(&flow.packet(Op::Response));
    assert_moves_bytes(&mut guest, &client, &flow);
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

mod inside {
    use nix::libc;
    use nix::sys::signal::Signal;

    use super::*;
    use crate::common::tracer::{Outcome, Traced};

    const SOCKET: [u64; 2] = [
        libc::AF_VSOCK as u64,
        (libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC) as u64,
    ];

    /// The outcome where a daemon with these options makes a socket of AF_VSOCK.
    fn make_socket(options: &[&str]) -> Outcome {
        assert_in_guest();
        let mut daemon = Traced::serving(options, Path::new("/"));
        daemon.call(libc::SYS_socket, &SOCKET)
    }

    #[test]
    #[ignore = "runs in a guest"]
    fn sandbox_without_forwarding_makes_no_socket_of_af_vsock() {
        assert_eq!(make_socket(&[]), Outcome::Killed(Signal::SIGSYS));
        let free = make_socket(&["--sandbox=off"]);
        assert!(matches!(free, Outcome::Returned(0..)), "{free:?}");
    }

    #[test]
    #[ignore = "runs in a guest"]
    fn sandbox_with_forwarding_makes_no_datagrams() {
        let forwarding = format!("--forward-cid={LOOPBACK}");
        let [family, stream] = SOCKET;
        let of_kind = |kind: i32| stream - libc::SOCK_STREAM as u64 + kind as u64;
        let mut daemon = Traced::serving(&[&forwarding], Path::new("/"));
        for kind in [libc::SOCK_STREAM, libc::SOCK_SEQPACKET] {
            let made = daemon.call(libc::SYS_socket, &[family, of_kind(kind)]);
            assert!(matches!(made, Outcome::Returned(0..)), "{made:?}");
        }
        let made = daemon.call(libc::SYS_socket, &[family, of_kind(libc::SOCK_DGRAM)]);
        assert_eq!(made, Outcome::Killed(Signal::SIGSYS));
    }

    /// All of it but Landlock, which UML's kernel has not.
    #[test]
    #[ignore = "runs in a guest"]
    fn sandbox_is_complete_where_the_kernel_has_it() {
        let (daemon, mut guest) = Forwarding::start(&["--forward-listen=9001"]);
        let status = format!("/proc/{}/status", daemon.child.id());
        let status = std::fs::read_to_string(status).unwrap();
        for line in [
            "Seccomp:\t2\n",
            "NoNewPrivs:\t1\n",
            "CapEff:\t0000000000000000\n",
        ] {
            assert!(status.contains(line), "{status}");
        }
        let log = daemon.log();
        let incomplete = log.lines().filter(|line| line.contains("incomplete"));
        let incomplete: Vec<_> = incomplete.collect();
        assert_eq!(incomplete.len(), 1, "{log}");
        assert!(incomplete[0].ends_with("the sandbox is incomplete: no Landlock in this kernel"));

        // It does in its sandbox all that forwarding takes.
        let (program, flow) = open(&mut guest, &listen(PORT), 40_000);
        assert_moves_bytes(&mut guest, &program, &flow);
        let program = connect(9001);
        let flow = Flow::of(&guest.recv());
        guest.send(&flow.packet(Op::Response));
        assert_moves_bytes(&mut guest, &program, &flow);
    }

    /// The guest's AF_VSOCK gives up a connect after 2 s. Meanwhile another connection is opened and used.
    #[test]
    #[ignore = "runs in a guest"]
    fn slow_connects_keep_nobody_waiting() {
        let (_daemon, mut guest) = Forwarding::start_to(SIBLING, &[]);
        // On a busy machine 2 s may be over before anything else happens.
        let overtaken = (0..5).any(|attempt| is_overtaken(&mut guest, 40_000 + 10 * attempt));
        assert!(
            overtaken,
            "a connect that takes long has kept others waiting"
        );
    }

    /// Whether a connection that is opened behind two that nobody answers is open, and used, before they are refused.
    fn is_overtaken(guest: &mut SimGuest, ports: u32) -> bool {
        let never = [
            Flow::new(ports, NEVER),
            Flow {
                peer_cid: 77,
                ..Flow::new(ports + 1, NEVER)
            },
        ];
        let fast = Flow::new(ports + 2, PORT);
        for flow in never.iter().chain([&fast]) {
            guest.send(&flow.packet(Op::Request));
        }
        let (mut refused, mut answer) = (0, Vec::new());
        let mut refused_before = None;
        while refused < never.len() || answer != b"question" {
            let packet = guest.recv();
            if fast.owns(&packet) && packet.is(Op::Response) {
                guest.send(&fast.rw(b"question"));
            } else if fast.owns(&packet) {
                answer.extend(packet.payload);
            } else {
                let flow = &never[(packet.dst_port - ports) as usize];
                packet.assert_is(Op::Rst, flow);
                refused += 1;
            }
            if answer == b"question" {
                refused_before.get_or_insert(refused);
            }
        }
        guest.send(&fast.packet(Op::Rst));
        refused_before == Some(0)
    }
}
