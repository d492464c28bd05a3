//! A daemon at the other end of a sibling socket that does as it likes: at most, it spoils its own connections.

mod common;

use std::fs::{self, Permissions};
use std::io::{IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::thread::spawn;

use common::daemon::{Daemon, eventually};
use common::siblings::{Kind, Vms, flow};
use common::sim::host::{
    PORT, accept, assert_closed, assert_moves_bytes, assert_same, assert_serves, connect, dial,
    from_guest, pattern, read_exactly, read_ok, recv_bytes, recv_other,
};
use common::sim::packet::{NO_RECEIVE, NO_SEND};
use common::sim::{Flow, Op, SimGuest};
use nix::sys::socket::{Backlog, ControlMessage, MsgFlags, listen, send, sendmsg};
use nix::unistd::geteuid;

/// The guest's CID, and that of the sibling which this test is.
const GUEST: u64 = 4;
const SIBLING: u64 = 5;

/// The daemon of a guest with a directory of siblings, in which this test has a socket.
struct Victim {
    vms: Vms,
    guest: SimGuest,
    listener: UnixListener,
    before: (usize, usize),
    ports: u32,
}

impl Victim {
    fn new() -> Self {
        Self::with("")
    }

    /// One with more options.
    fn with(options: &str) -> Self {
        let mut vms = Vms::none();
        let options = format!("{}{options}", vms.sibling_dir());
        vms.add_daemon(&[(GUEST, options)]);
        let listener = UnixListener::bind(vms.sibling_path(SIBLING)).unwrap();
        let mut guest = vms.guest(GUEST);
        let daemon = vms.daemon(GUEST);
        assert_serves(daemon, &mut guest);
        let before = daemon.at_rest();
        Self {
            vms,
            guest,
            listener,
            before,
            ports: 1000,
        }
    }

    fn daemon(&mut self) -> &Daemon {
        self.vms.daemon(GUEST)
    }

    /// A connection from a new port of the guest's to the sibling's.
    fn flow(&mut self) -> Flow {
        self.ports += 1;
        flow((GUEST, self.ports), (SIBLING, PORT))
    }

    /// The guest calls, and the sibling has read who.
    #[track_caller]
    fn called(&mut self) -> (UnixStream, Flow) {
        let flow = self.flow();
        self.guest.send(&flow.packet(Op::Request));
        let stream = accept(&self.listener);
        let line = format!("CONNECT {PORT} {GUEST}:{}\n", flow.guest_port);
        assert_same(&read_exactly(&stream, line.len()), line.as_bytes());
        (stream, flow)
    }

    /// The guest calls, and the sibling accepts.
    #[track_caller]
    fn answered(&mut self) -> (UnixStream, Flow) {
        let (mut stream, flow) = self.called();
        stream.write_all(b"OK 1\n").unwrap();
        self.guest.recv().assert_is(Op::Response, &flow);
        (stream, flow)
    }

    /// The sibling connects and writes this.
    fn call(&self, line: &str) -> UnixStream {
        let mut stream = connect(&self.vms.sibling_path(GUEST));
        // A daemon that refuses may have closed by now.
        let _ = stream.write_all(line.as_bytes());
        stream
    }

    /// The sibling connects to the guest's port, and the guest accepts.
    #[track_caller]
    fn accepted(&mut self, port: u32, from: u32) -> (UnixStream, Flow) {
        let stream = self.call(&format!("CONNECT {port} {SIBLING}:{from}\n"));
        let flow = flow((GUEST, port), (SIBLING, from));
        self.guest.recv().assert_is(Op::Request, &flow);
        self.guest.send(&flow.packet(Op::Response));
        assert_eq!(read_ok(&stream), from);
        (stream, flow)
    }

    #[track_caller]
    fn assert_refused(&mut self, line: &str) {
        let stream = self.call(line);
        assert_closed(&stream);
        assert_eq!(self.guest.settle(), [], "{line:?}");
    }

    /// Host programs and the guest are served as ever.
    #[track_caller]
    fn assert_serves(&mut self) {
        assert_serves(self.vms.daemon(GUEST), &mut self.guest);
    }

    /// So is the next sibling, and nothing is left of the others.
    #[track_caller]
    fn assert_unharmed(mut self) {
        self.assert_serves();
        for (stream, flow) in [self.answered(), self.accepted(80, 99)] {
            assert_moves_bytes(&mut self.guest, &stream, &flow);
            self.guest.send(&flow.packet(Op::Rst));
            assert_closed(&stream);
        }
        assert_eq!(self.guest.settle(), []);
        let before = self.before;
        assert_eq!(self.vms.daemon(GUEST).at_rest(), before);
        self.vms.assert_idle();
    }
}

// --- Where the guest calls.

#[test]
fn an_answer_that_is_none_refuses() {
    let mut victim = Victim::new();
    let longest = "0".repeat(200);
    for answer in [
        "",
        "\n",
        "O",
        "OK",
        "OK\n",
        "OK \n",
        "OK 4294967296\n",
        "OK 1 2\n",
        "OK 1 4:5\n",
        "NO 1\n",
        "CONNECT 1 4:5\n",
        "\0",
        &format!("OK {longest}1\n"),
        &longest,
    ] {
        let (mut stream, flow) = victim.called();
        let _ = stream.write_all(answer.as_bytes());
        drop(stream);
        victim.guest.recv().assert_is(Op::Rst, &flow);
    }
    victim.assert_unharmed();
}

#[test]
fn an_answer_that_can_be_none_any_more_refuses_at_once() {
    let mut victim = Victim::new();
    for answer in ["X", "OK x", "OK 42949672950", "OK               "] {
        let (mut stream, flow) = victim.called();
        stream.write_all(answer.as_bytes()).unwrap();
        victim.guest.recv().assert_is(Op::Rst, &flow);
        assert_closed(&stream);
    }
    victim.assert_unharmed();
}

#[test]
fn an_answer_in_pieces_is_one_and_what_follows_is_payload() {
    let mut victim = Victim::new();
    let (mut stream, flow) = victim.called();
    for piece in ["o", "k ", " 12", "34 \r"] {
        stream.write_all(piece.as_bytes()).unwrap();
        assert_eq!(victim.guest.settle(), []);
    }
    let payload = pattern(1, 20_000);
    stream.write_all(&[b"\n", &payload[..]].concat()).unwrap();
    drop(stream);
    victim.guest.recv().assert_is(Op::Response, &flow);
    assert_same(
        &recv_bytes(&mut victim.guest, &flow, payload.len()),
        &payload,
    );
    let shutdown = recv_other(&mut victim.guest);
    shutdown.assert_is(Op::Shutdown, &flow);
    victim.guest.send(&flow.packet(Op::Rst));
    victim.assert_unharmed();
}

#[test]
fn without_an_answer_the_guest_is_refused_after_a_while() {
    let mut victim = Victim::new();
    let (mut stream, flow) = victim.called();
    stream.write_all(b"OK 1").unwrap();
    victim.assert_serves();
    victim.guest.recv().assert_is(Op::Rst, &flow);
    assert_closed(&stream);
    victim.assert_unharmed();
}

#[test]
fn a_sibling_that_accepts_nobody_keeps_only_its_callers_waiting() {
    let mut victim = Victim::new();
    listen(&victim.listener, Backlog::new(50).unwrap()).unwrap();
    let flows: Vec<_> = (0..200).map(|_| victim.flow()).collect();
    for flow in &flows {
        victim.guest.send(&flow.packet(Op::Request));
    }
    let refused = victim.guest.settle();
    assert!(!refused.is_empty() && refused.len() < flows.len());
    assert!(refused.iter().all(|packet| packet.is(Op::Rst)));
    victim.assert_serves();
    // The listener goes, and with it all that wait.
    let path = victim.vms.sibling_path(SIBLING);
    fs::remove_file(&path).unwrap();
    victim.listener = UnixListener::bind(&path).unwrap();
    for _ in refused.len()..flows.len() {
        assert!(victim.guest.recv().is(Op::Rst));
    }
    victim.assert_unharmed();
}

#[test]
fn a_caller_that_gives_up_is_not_answered() {
    let mut victim = Victim::new();
    for answer in ["", "OK 1", "OK 1\n"] {
        let (mut stream, flow) = victim.called();
        victim.guest.send(&flow.packet(Op::Rst));
        let _ = stream.write_all(answer.as_bytes());
        victim.guest.settle();
        assert_closed(&stream);
    }
    victim.assert_unharmed();
}

#[test]
fn what_is_no_socket_is_no_sibling() {
    let mut victim = Victim::new();
    let path = victim.vms.sibling_path(SIBLING);
    let other = victim.vms.directory().join("other");
    let makers: [&dyn Fn(&Path); 6] = [
        &|path| fs::write(path, "text").unwrap(),
        &|path| fs::create_dir(path).unwrap(),
        &|path| symlink("nowhere", path).unwrap(),
        &|path| symlink(path, path).unwrap(),
        &|path| drop(UnixDatagram::bind(path).unwrap()),
        &|path| drop(UnixListener::bind(path).unwrap()),
    ];
    fs::rename(&path, &other).unwrap();
    for make in makers {
        make(&path);
        let flow = victim.flow();
        victim.guest.send(&flow.packet(Op::Request));
        victim.guest.recv().assert_is(Op::Rst, &flow);
        fs::remove_file(&path)
            .or_else(|_| fs::remove_dir(&path))
            .unwrap();
    }
    let living = UnixDatagram::bind(&path).unwrap();
    let flow = victim.flow();
    victim.guest.send(&flow.packet(Op::Request));
    victim.guest.recv().assert_is(Op::Rst, &flow);
    assert_eq!(victim.guest.settle(), []);
    drop(living);
    fs::remove_file(&path).unwrap();
    // Where a link leads is followed: so are hosts reached that know only `CONNECT <port>`.
    symlink(&other, &path).unwrap();
    victim.assert_unharmed();
}

// --- Where the sibling calls.

#[test]
fn a_caller_says_who_it_is_or_is_refused() {
    let mut victim = Victim::new();
    for line in [
        "CONNECT 80\n",
        "CONNECT 80 \n",
        "CONNECT 80 5\n",
        "CONNECT 80 5:\n",
        "CONNECT 80 5:1:2\n",
        "CONNECT 80 0:7\n",
        "CONNECT 80 1:7\n",
        "CONNECT 80 2:7\n",
        "CONNECT 80 4:7\n",
        "CONNECT 80 4294967295:7\n",
        "CONNECT 80 4294967296:7\n",
        "CONNECT 80 18446744073709551621:7\n",
        "CONNECT 80 5:4294967296\n",
        "OK 80\n",
        "GET / HTTP/1.1\r\n\r\n",
        &"CONNECT 80 5:".repeat(100),
        &format!("CONNECT 80 5:{}1\n", "0".repeat(64)),
    ] {
        victim.assert_refused(line);
    }
    // Nor may a host program say that it is a guest's.
    let mut program = connect(&victim.daemon().uds_path());
    program.write_all(b"CONNECT 80 5:7\n").unwrap();
    assert_closed(&program);
    victim.assert_unharmed();
}

#[test]
fn an_address_that_is_taken_is_refused() {
    let mut victim = Victim::new();
    let (stream, flow) = victim.accepted(80, 7);
    victim.assert_refused("CONNECT 80 5:7\n");
    // It is the same connection if the guest has opened it.
    let (called, other) = victim.answered();
    victim.assert_refused(&format!("CONNECT {} 5:{PORT}\n", other.guest_port));
    for (stream, flow) in [(stream, flow), (called, other)] {
        assert_moves_bytes(&mut victim.guest, &stream, &flow);
        victim.guest.send(&flow.packet(Op::Rst));
        assert_closed(&stream);
    }
    victim.assert_unharmed();
}

#[test]
fn a_line_in_pieces_is_one_and_what_follows_is_payload() {
    let mut victim = Victim::new();
    let mut stream = victim.call("");
    for piece in ["conn", "ect  8", "0 ", " 5", ":", "7", " \r"] {
        stream.write_all(piece.as_bytes()).unwrap();
        assert_eq!(victim.guest.settle(), []);
    }
    let payload = pattern(1, 20_000);
    stream.write_all(&[b"\n", &payload[..]].concat()).unwrap();
    let flow = flow((GUEST, 80), (SIBLING, 7));
    victim.guest.recv().assert_is(Op::Request, &flow);
    victim.guest.send(&flow.packet(Op::Response));
    assert_eq!(read_ok(&stream), 7);
    assert_same(
        &recv_bytes(&mut victim.guest, &flow, payload.len()),
        &payload,
    );
    victim.guest.send(&flow.packet(Op::Rst));
    victim.assert_unharmed();
}

#[test]
fn lines_that_do_not_end_keep_no_host_program_waiting() {
    let mut victim = Victim::new();
    let waiting = connect(&victim.daemon().uds_path());
    let flood: Vec<_> = (0..1500).map(|_| victim.call("CONNECT 80 5:7")).collect();
    victim.assert_serves();
    // The first host program is still there.
    (&waiting).write_all(b"CONNECT 81\n").unwrap();
    let request = victim.guest.recv();
    assert!(request.is(Op::Request) && request.src_cid == 2 && request.dst_port == 81);
    victim.guest.send(&Flow::of(&request).packet(Op::Rst));
    assert_closed(&waiting);
    // Most of the others are not.
    flood[..1200].iter().for_each(assert_closed);
    drop(flood);
    victim.assert_unharmed();
}

#[test]
fn siblings_take_only_their_own_places() {
    let mut victim = Victim::with(",max-connections=9");
    let taken: Vec<_> = (0..9).map(|from| victim.accepted(80, from)).collect();
    victim.assert_refused("CONNECT 80 5:100\n");
    let host: Vec<_> = (0..3).map(|_| dial(victim.daemon(), 81)).collect();
    for _ in &host {
        let request = victim.guest.recv();
        assert!(
            request.is(Op::Request) && request.src_cid == 2,
            "{request:?}"
        );
        victim.guest.send(&Flow::of(&request).packet(Op::Response));
    }
    let programs: Vec<_> = (0..3)
        .map(|port| {
            let flow = Flow::new(2000 + port, 3000 + port);
            (
                from_guest(victim.vms.daemon(GUEST), &mut victim.guest, &flow),
                flow,
            )
        })
        .collect();
    for (stream, flow) in taken.iter().chain(&programs) {
        victim.guest.send(&flow.packet(Op::Rst));
        assert_closed(stream);
    }
    drop(host);
    for _ in 0..3 {
        let shutdown = recv_other(&mut victim.guest);
        assert!(shutdown.is(Op::Shutdown), "{shutdown:?}");
        victim.guest.send(&Flow::of(&shutdown).packet(Op::Rst));
    }
    victim.assert_unharmed();
}

#[test]
fn a_caller_may_leave_at_any_time() {
    let mut victim = Victim::new();
    drop(victim.call(""));
    drop(victim.call("CONNECT 80"));
    // Before the guest answers, with payload behind and without.
    for payload in ["", "payload"] {
        let stream = victim.call(&format!("CONNECT 80 5:7\n{payload}"));
        let flow = flow((GUEST, 80), (SIBLING, 7));
        victim.guest.recv().assert_is(Op::Request, &flow);
        drop(stream);
        victim.guest.settle();
        victim.guest.send(&flow.packet(Op::Response));
        let mut packet = victim.guest.recv();
        if !payload.is_empty() {
            packet.assert_is(Op::Rw, &flow);
            assert_same(&packet.payload, payload.as_bytes());
            packet = victim.guest.recv();
        }
        assert!(packet.is(Op::Rst) || packet.is(Op::Shutdown), "{packet:?}");
        victim.guest.send(&flow.packet(Op::Rst));
        victim.guest.settle();
    }
    // After that, in the middle of what the guest sends.
    let (stream, flow) = victim.accepted(80, 8);
    victim.guest.send(&flow.rw(&pattern(1, 50_000)));
    drop(stream);
    let shutdown = recv_other(&mut victim.guest);
    shutdown.assert_is(Op::Shutdown, &flow);
    assert_eq!(shutdown.flags, NO_RECEIVE | NO_SEND);
    victim.guest.send(&flow.packet(Op::Rst));
    victim.assert_unharmed();
}

// --- On a connection.

/// A descriptor is sent along with the bytes.
fn send_with_descriptor(stream: &UnixStream, bytes: &[u8]) {
    let descriptors = [stream.as_raw_fd(); 3];
    let control = [ControlMessage::ScmRights(&descriptors)];
    let parts = [IoSlice::new(bytes)];
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &parts,
        &control,
        MsgFlags::empty(),
        None,
    );
    assert_eq!(sent, Ok(bytes.len()));
}

#[test]
fn descriptors_that_are_sent_along_are_not_kept() {
    let mut victim = Victim::new();
    let (stream, flow) = victim.called();
    send_with_descriptor(&stream, b"OK ");
    send_with_descriptor(&stream, b"1\n");
    victim.guest.recv().assert_is(Op::Response, &flow);
    let caller = victim.call("");
    send_with_descriptor(&caller, b"CONNECT 80 5:");
    send_with_descriptor(&caller, b"7\n");
    let other = common::siblings::flow((GUEST, 80), (SIBLING, 7));
    victim.guest.recv().assert_is(Op::Request, &other);
    victim.guest.send(&other.packet(Op::Response));
    assert_eq!(read_ok(&caller), 7);
    for (stream, flow) in [(stream, flow), (caller, other)] {
        for _ in 0..5 {
            send_with_descriptor(&stream, b"payload");
        }
        let got = recv_bytes(&mut victim.guest, &flow, 35);
        assert_same(&got, "payload".repeat(5).as_bytes());
        victim.guest.send(&flow.packet(Op::Rst));
        assert_closed(&stream);
    }
    victim.assert_unharmed();
}

#[test]
fn out_of_band_data_spoils_only_its_own_connection() {
    let mut victim = Victim::new();
    let urgent = |stream: &UnixStream, bytes: &[u8]| {
        let _ = send(
            stream.as_raw_fd(),
            bytes,
            MsgFlags::MSG_OOB | MsgFlags::MSG_NOSIGNAL,
        );
    };
    let (stream, flow) = victim.called();
    urgent(&stream, b"O");
    urgent(&stream, b"K 1\n");
    victim.guest.settle();
    victim.assert_serves();
    victim.guest.send(&flow.packet(Op::Rst));
    drop(stream);
    victim.guest.settle();
    let caller = victim.call("CONNECT 8");
    urgent(&caller, b"0");
    urgent(&caller, b" 5:7\n");
    victim.assert_serves();
    drop(caller);
    let (stream, flow) = victim.answered();
    urgent(&stream, b"urgent");
    (&stream).write_all(b"more").unwrap();
    let mut seen = Vec::new();
    eventually("the guest has all that is not out of band", || {
        for packet in victim.guest.settle() {
            seen.extend(packet.payload);
        }
        seen.ends_with(b"more")
    });
    victim.assert_serves();
    victim.guest.send(&flow.packet(Op::Rst));
    drop(stream);
    victim.guest.settle();
    victim.assert_unharmed();
}

#[test]
fn a_sibling_that_does_not_read_keeps_only_its_connection_waiting() {
    let mut victim = Victim::new();
    let (stream, flow) = victim.answered();
    let sent = common::sim::host::fill(&mut victim.guest, &flow);
    victim.assert_serves();
    let (other, others) = victim.accepted(80, 7);
    assert_moves_bytes(&mut victim.guest, &other, &others);
    victim.guest.send(&others.packet(Op::Rst));
    assert_closed(&other);
    assert_same(&read_exactly(&stream, sent.len()), &sent);
    victim.guest.send(&flow.packet(Op::Rst));
    victim.guest.settle();
    assert_closed(&stream);
    victim.assert_unharmed();
}

#[test]
fn hosts_that_know_only_the_port_are_reached() {
    let mut victim = Victim::new();
    let path = victim.vms.sibling_path(SIBLING);
    let elsewhere = victim.vms.directory().join("firecracker.sock");
    fs::rename(&path, &elsewhere).unwrap();
    symlink(&elsewhere, &path).unwrap();
    let (mut stream, flow) = victim.called();
    stream.write_all(b"OK 1073741824\n").unwrap();
    victim.guest.recv().assert_is(Op::Response, &flow);
    assert_moves_bytes(&mut victim.guest, &stream, &flow);
    victim.guest.send(&flow.packet(Op::Rst));
    assert_closed(&stream);
    victim.assert_unharmed();
}

// --- A hostile guest.

/// Guests of two siblings. The second calls the first again and again, and does not wait for answers.
fn flood(kind: Kind, calls: u32) {
    let mut vms = Vms::start(kind, &[GUEST, SIBLING]);
    let mut hostile = vms.guest(SIBLING);
    let guest = vms.stack(GUEST);
    guest.listen(80);
    let listener = common::sim::host::listen(vms.daemon(GUEST), PORT);
    let before = vms.daemon(GUEST).at_rest();
    let flooding = spawn(move || {
        for call in 0..calls {
            let flow = flow((SIBLING, call % 1000), (GUEST, 80 + call % 2));
            hostile.send(&flow.packet(Op::Request));
            if call % 3 != 0 {
                hostile.send(&flow.packet(Op::Rst));
            }
        }
        hostile
    });
    for _ in 0..20 {
        let mut caller = guest.connect(PORT).unwrap();
        let mut program = accept(&listener);
        caller.write_all(b"from the guest").unwrap();
        assert_same(&read_exactly(&program, 14), b"from the guest");
        program.write_all(b"from the host").unwrap();
        let mut bytes = [0; 13];
        caller.read_exact(&mut bytes).unwrap();
        assert_same(&bytes, b"from the host");
        caller.reset();
        let client = dial(vms.daemon(GUEST), 80);
        read_ok(&client);
    }
    drop(flooding.join().unwrap());
    guest.kill();
    drop(guest);
    vms.guest(GUEST).settle();
    eventually("nothing to be left", || {
        vms.daemon(GUEST).at_rest() <= before
    });
    vms.assert_idle();
}

#[test]
fn a_guest_that_floods_a_sibling_in_its_process_spoils_nothing() {
    flood(Kind::OneProcess, 20_000);
}

#[test]
fn a_guest_that_floods_a_sibling_of_another_process_spoils_nothing() {
    flood(Kind::Processes, 20_000);
}

// --- Who may call in whose name.

/// Another user than this test's.
const STRANGER: u32 = 54_321;

/// The user as whom others appear in a user namespace that does not know them.
const NOBODY: u32 = 65_534;

/// Another user's program, which connects, writes `line` and prints the answer: nothing if the daemon closes.
fn stranger(user: u32, path: &Path, line: &str) -> Command {
    let script = "
import socket, sys
stream = socket.socket(socket.AF_UNIX)
stream.connect(sys.argv[1])
stream.sendall(sys.argv[2].encode())
sys.stdout.write(stream.recv(100).decode())
";
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", script]).arg(path).arg(line);
    command.uid(user).gid(user).current_dir("/");
    command
}

#[test]
fn only_the_owner_of_a_sibling_calls_in_its_name() {
    if !geteuid().is_root() {
        println!("skipped: it takes root to be another user");
        return;
    }
    let mut victim = Victim::with(",socket-mode=666");
    fs::set_permissions(victim.vms.directory(), Permissions::from_mode(0o777)).unwrap();
    let path = victim.vms.sibling_path(GUEST);
    let heard = |user: u32, line: &str| {
        let output = stranger(user, &path, line).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        output.stdout
    };
    // This test's.
    assert_eq!(heard(STRANGER, "CONNECT 80 5:7\n"), b"");
    assert_eq!(victim.guest.settle(), []);
    // Nobody's, and then its own.
    let own = victim.vms.sibling_path(6);
    for _ in 0..2 {
        let child = stranger(STRANGER, &path, "CONNECT 80 6:7\n")
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let flow = flow((GUEST, 80), (6, 7));
        victim.guest.recv().assert_is(Op::Request, &flow);
        victim.guest.send(&flow.packet(Op::Response));
        assert_eq!(child.wait_with_output().unwrap().stdout, b"OK 7\n");
        recv_other(&mut victim.guest).assert_is(Op::Shutdown, &flow);
        victim.guest.send(&flow.packet(Op::Rst));
        victim.guest.settle();
        drop(UnixListener::bind(&own));
        chown(&own, Some(STRANGER), None).unwrap();
    }
    // A link is whose who has made it, wherever it leads.
    let link = victim.vms.sibling_path(7);
    symlink(&own, &link).unwrap();
    assert_eq!(heard(STRANGER, "CONNECT 80 7:7\n"), b"");
    // Two who can't be told from each other.
    chown(&own, Some(NOBODY), None).unwrap();
    assert_eq!(heard(NOBODY, "CONNECT 80 6:7\n"), b"");
    assert_eq!(victim.guest.settle(), []);
    victim.assert_unharmed();
}
