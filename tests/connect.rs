//! The command `connect`, with a Unix socket of the test in place of the daemon.

mod common;

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Instant;

use common::daemon::{Daemon, PATIENCE, binary, eventually};
use common::guest::installed;
use common::host::Pattern;
use common::sim::host::{from_host, recv_bytes};
use common::sim::{Flow, Op, Setup, SimGuest};
use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// A running `connect` and the daemon's end of its connection.
struct Session {
    program: Child,
    daemon: UnixStream,
    _directory: TempDir,
}

impl Session {
    /// Starts `connect` for port 1234 and takes its connection; nothing is answered yet.
    fn start() -> Self {
        Self::start_on(Stdio::piped(), Stdio::piped())
    }

    /// The same with these for standard input and output.
    fn start_on(input: Stdio, output: Stdio) -> Self {
        let directory = TempDir::with_prefix("vsock-test-").unwrap();
        let path = directory.path().join("vm.vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut command = connect(&[path.to_str().unwrap(), "1234"]);
        let program = command.stdin(input).stdout(output).spawn().unwrap();
        // The test's copies of them would keep them open.
        drop(command);
        let daemon = accept(&listener);
        Self {
            program,
            daemon,
            _directory: directory,
        }
    }

    /// The same, connected to a guest, which has sent `first` in one piece with the answer.
    fn connect(first: &str) -> Self {
        Self::start().accepted(first)
    }

    /// The same with these for standard input and output.
    fn connect_on(input: impl Into<Stdio>, output: impl Into<Stdio>) -> Self {
        Self::start_on(input.into(), output.into()).accepted("")
    }

    fn accepted(mut self, first: &str) -> Self {
        take_line(&mut self.daemon);
        self.answer(&format!("OK 65535\n{first}"));
        self
    }

    fn answer(&mut self, text: &str) {
        self.daemon.write_all(text.as_bytes()).unwrap();
    }

    /// Closes the daemon's end, with whatever it has not read.
    fn close(&mut self) {
        (self.daemon, _) = UnixStream::pair().unwrap();
    }

    /// Writes `text` to standard input.
    fn write(&mut self, text: &str) {
        let input = self.program.stdin.as_mut().unwrap();
        input.write_all(text.as_bytes()).unwrap();
    }

    fn read(&mut self, size: usize) -> String {
        let mut text = vec![0; size];
        let output = self.program.stdout.as_mut().unwrap();
        output.read_exact(&mut text).unwrap();
        String::from_utf8(text).unwrap()
    }

    /// What the guest gets up to the end of the stream.
    fn guest_gets(&mut self) -> String {
        let mut text = String::new();
        self.daemon.read_to_string(&mut text).unwrap();
        text
    }

    /// What is written up to the end of standard output.
    fn rest(&mut self) -> String {
        let mut text = String::new();
        let mut output = self.program.stdout.take().unwrap();
        output.read_to_string(&mut text).unwrap();
        text
    }

    /// Waits for the program's end; gives what it complains of, too.
    fn end(mut self) -> (ExitStatus, String) {
        let status = wait(&mut self.program);
        let mut complaint = String::new();
        let mut stderr = self.program.stderr.take().unwrap();
        stderr.read_to_string(&mut complaint).unwrap();
        (status, complaint)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// The command `connect` with these arguments. It ends by itself when a test hangs.
fn connect(arguments: &[&str]) -> Command {
    let mut command = Command::new(installed("python3"));
    // An alarm outlives exec: it bounds who waits for the program's output.
    let limited = "import os, signal, sys; signal.alarm(60); os.execv(sys.argv[1], sys.argv[1:])";
    command
        .args(["-c", limited])
        .arg(binary())
        .arg("connect")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn take_line(daemon: &mut UnixStream) {
    let mut line = [0; b"CONNECT 1234\n".len()];
    daemon.read_exact(&mut line).unwrap();
    assert_eq!(line, *b"CONNECT 1234\n");
}

fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let mut accepted = None;
    eventually("the program to connect", || {
        accepted = listener.accept().ok();
        accepted.is_some()
    });
    let (stream, _) = accepted.unwrap();
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn wait(program: &mut Child) -> ExitStatus {
    let mut status = None;
    eventually("the program to end", || {
        status = program.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

#[test]
fn what_comes_in_one_piece_with_the_answer_is_the_guests() {
    let mut session = Session::connect("OK is what the guest says\n");
    assert_eq!(session.read(26), "OK is what the guest says\n");
    session.daemon.shutdown(Shutdown::Both).unwrap();
    assert_eq!(session.rest(), "");
    assert!(session.end().0.success());
}

#[test]
fn the_guest_answers_after_the_end_of_the_input() {
    let mut session = Session::connect("");
    session.write("question");
    session.program.stdin = None;
    assert_eq!(session.guest_gets(), "question");
    session.answer("long ");
    assert_eq!(session.read(5), "long ");
    session.answer("answer");
    session.daemon.shutdown(Shutdown::Write).unwrap();
    assert_eq!(session.rest(), "answer");
    assert!(session.end().0.success());
}

#[test]
fn the_input_is_passed_on_after_the_guests_last_byte() {
    let mut session = Session::connect("last");
    session.daemon.shutdown(Shutdown::Write).unwrap();
    assert_eq!(session.rest(), "last");
    session.write("more");
    session.program.stdin = None;
    assert_eq!(session.guest_gets(), "more");
    assert!(session.end().0.success());
}

#[test]
fn the_guests_close_ends_it_though_the_input_goes_on() {
    let mut session = Session::connect("bye");
    session.daemon.shutdown(Shutdown::Both).unwrap();
    assert_eq!(session.read(3), "bye");
    assert!(session.end().0.success());
}

#[test]
fn the_guest_is_told_when_nobody_reads_any_more() {
    let mut session = Session::connect("first");
    assert_eq!(session.read(5), "first");
    session.program.stdout = None;
    let deadline = Instant::now() + PATIENCE;
    while session.daemon.write_all(b"more").is_ok() {
        assert!(
            Instant::now() < deadline,
            "the guest's bytes are still taken"
        );
    }
    session.write("still sent");
    session.program.stdin = None;
    assert_eq!(session.guest_gets(), "still sent");
    let (status, complaint) = session.end();
    assert!(status.success());
    assert_eq!(complaint, "");
}

#[test]
fn every_byte_arrives_both_ways_at_once() {
    let mut session = Session::connect("");
    let (mut input, mut output) = (
        session.program.stdin.take().unwrap(),
        session.program.stdout.take().unwrap(),
    );
    let (mut from_host, mut to_host) = (
        session.daemon.try_clone().unwrap(),
        session.daemon.try_clone().unwrap(),
    );
    std::thread::scope(|scope| {
        scope.spawn(move || send(&mut input, "host"));
        scope.spawn(move || {
            send(&mut to_host, "guest");
            to_host.shutdown(Shutdown::Write).unwrap();
        });
        scope.spawn(move || check(&mut from_host, "host"));
        scope.spawn(move || check(&mut output, "guest"));
    });
    assert!(session.end().0.success());
}

fn send(to: &mut impl Write, seed: &str) {
    let pattern = Pattern::new(seed);
    for index in 0..16 * MIB / 60_000 {
        to.write_all(pattern.at(index * 60_000, 60_000)).unwrap();
    }
}

fn check(from: &mut impl Read, seed: &str) {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), 16 * MIB / 60_000 * 60_000);
    let pattern = Pattern::new(seed);
    for (index, part) in bytes.chunks(1 << 17).enumerate() {
        pattern.check(index << 17, part);
    }
}

#[test]
fn a_refusal_is_told() {
    for line_is_read in [true, false] {
        let mut session = Session::start();
        if line_is_read {
            session.daemon.read_exact(&mut [0; 13]).unwrap();
        }
        session.close();
        let (status, complaint) = session.end();
        assert_eq!(status.code(), Some(1));
        assert_eq!(
            complaint,
            "vhost-user-vsock: nobody listens on port 1234 of the guest\n"
        );
    }
}

/// Runs `connect` for this port of a daemon's guest. It must fail; gives the exit code and what it complains of.
fn refused(daemon: &Daemon, port: &str) -> (Option<i32>, String) {
    let path = daemon.uds_path();
    let program = connect(&[path.to_str().unwrap(), port]).spawn().unwrap();
    let (status, complaint) = end(program);
    assert_eq!(complaint.lines().count(), 1, "{complaint}");
    (status.code(), complaint)
}

#[track_caller]
fn assert_told((code, complaint): &(Option<i32>, String), wanted: i32, told: &str) {
    assert_eq!(*code, Some(wanted), "{complaint}");
    assert!(complaint.contains(told), "{complaint}");
}

#[test]
fn a_daemon_says_why_there_is_no_connection() {
    let daemon = Daemon::start_with(&["--max-connections=1"]);
    assert_told(&refused(&daemon, "99"), 3, "no VMM is connected");
    let mut guest = SimGuest::connect(&daemon, Setup::default());
    eventually("the VMM to be served", || {
        daemon.log().contains("a VMM connected")
    });
    assert_told(&refused(&daemon, "99"), 4, "driver has not started");
    guest.start_rings();
    guest.post_rx();
    thread::scope(|scope| {
        let caller = scope.spawn(|| refused(&daemon, "99"));
        let request = guest.recv();
        guest.send(&Flow::new(99, request.src_port).packet(Op::Rst));
        let told = caller.join().unwrap();
        assert_told(&told, 5, "nobody listens on port 99");
    });
    let (_client, _, _) = from_host(&daemon, &mut guest, 98);
    assert_told(&refused(&daemon, "99"), 6, "a limit of the daemon");
}

#[test]
fn what_a_daemon_says_is_an_exit_code() {
    for (answer, code, told) in [
        ("ERR no_vmm\n", 3, "no VMM"),
        ("ERR timeout\n", 7, "no answer from port 1234"),
        ("ERR other\n", 1, "refused"),
        ("ERR what_is_not_known\n", 1, "is not a socket of"),
    ] {
        for line_is_read in [true, false] {
            let mut session = Session::start();
            if line_is_read {
                take_line(&mut session.daemon);
            }
            session.answer(answer);
            session.close();
            let (status, complaint) = session.end();
            assert_told(&(status.code(), complaint), code, told);
        }
    }
}

#[test]
fn who_has_waited_is_told_what_the_daemon_has_said_last() {
    let daemon = Daemon::start();
    let path = daemon.uds_path();
    let program = connect(&[path.to_str().unwrap(), "99", "--wait=1"]).spawn();
    let (status, complaint) = end(program.unwrap());
    assert_told(&(status.code(), complaint), 3, "running (tried for 1 s)");
}

#[test]
fn a_socket_of_something_else_is_told() {
    for answer in ["SSH-2.0-OpenSSH_9.2\r\n", "OK 1234567890123", "KO 65535\n"] {
        let mut session = Session::start();
        session.answer(answer);
        let (status, complaint) = session.end();
        assert_eq!(status.code(), Some(1), "{answer}");
        assert!(complaint.contains("is not a socket of"), "{complaint}");
    }
}

#[test]
fn a_socket_that_is_not_there_and_wrong_arguments_are_told() {
    for (arguments, code, told) in [
        (
            &["/nowhere/vm.vsock", "22"][..],
            1,
            "/nowhere/vm.vsock: No such file",
        ),
        (&["/nowhere/vm.vsock"], 2, "<PORT>"),
        (&["/nowhere/vm.vsock", "ssh"], 2, "'ssh'"),
        (&["/nowhere/vm.vsock", "4294967296"], 2, "4294967296"),
        (&["/nowhere/vm.vsock", "22", "23"], 2, "'23'"),
        (&["/nowhere/vm.vsock", "22", "--wait=x"], 2, "--wait"),
    ] {
        let program = connect(arguments).spawn().unwrap();
        let (status, complaint) = end(program);
        assert_eq!(status.code(), Some(code), "{arguments:?}: {complaint}");
        assert!(complaint.contains(told), "{complaint}");
        assert_eq!(complaint.lines().count(), 1, "{complaint}");
    }
}

#[test]
fn a_reset_is_told() {
    let mut session = Session::connect("last words");
    session.write("unread");
    eventually("the input at the daemon", || has_bytes(&session.daemon));
    session.close();
    assert_eq!(session.read(10), "last words");
    let (status, complaint) = session.end();
    assert_eq!(status.code(), Some(1));
    assert_eq!(complaint, "vhost-user-vsock: the connection was reset\n");
}

#[test]
fn a_reset_is_told_whichever_direction_meets_it() {
    let mut session = Session::connect("");
    let mut input = session.program.stdin.take().unwrap();
    thread::scope(|scope| {
        // Until nobody takes more.
        scope.spawn(move || while input.write_all(&[0; 4096]).is_ok() {});
        eventually("the input at the daemon", || has_bytes(&session.daemon));
        session.close();
    });
    let (status, complaint) = session.end();
    assert_eq!(status.code(), Some(1));
    assert_eq!(complaint, "vhost-user-vsock: the connection was reset\n");
}

/// Whether there is a byte to read.
fn has_bytes(stream: &UnixStream) -> bool {
    use nix::sys::socket::{MsgFlags, recv};
    use std::os::fd::AsRawFd;
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(stream.as_raw_fd(), &mut [0], flags) == Ok(1)
}

/// A socket pair: the test's end, with patience, and the program's.
fn socket() -> (UnixStream, OwnedFd) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    ours.set_write_timeout(Some(PATIENCE)).unwrap();
    (ours, theirs.into())
}

/// What the stream has up to its end.
fn all(mut stream: &UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn the_guests_end_is_passed_on_where_one_socket_is_input_and_output() {
    let (mut ours, theirs) = socket();
    let mut session = Session::connect_on(theirs.try_clone().unwrap(), theirs);
    session.answer("answer");
    session.daemon.shutdown(Shutdown::Write).unwrap();
    assert_eq!(all(&ours), "answer");
    // The other direction goes on.
    ours.write_all(b"late question").unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    assert_eq!(session.guest_gets(), "late question");
    assert!(session.end().0.success());
}

#[test]
fn the_end_of_a_socket_that_is_input_and_output_is_passed_on() {
    let (mut ours, theirs) = socket();
    let mut session = Session::connect_on(theirs.try_clone().unwrap(), theirs);
    ours.write_all(b"question").unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    assert_eq!(session.guest_gets(), "question");
    session.answer("late answer");
    session.daemon.shutdown(Shutdown::Write).unwrap();
    assert_eq!(all(&ours), "late answer");
    assert!(session.end().0.success());
}

#[test]
fn the_ends_of_two_sockets_are_passed_on() {
    let ((input, their_input), (output, their_output)) = (socket(), socket());
    let mut session = Session::connect_on(their_input, their_output);
    session.answer("answer");
    session.daemon.shutdown(Shutdown::Write).unwrap();
    assert_eq!(all(&output), "answer");
    (&input).write_all(b"question").unwrap();
    input.shutdown(Shutdown::Write).unwrap();
    assert_eq!(session.guest_gets(), "question");
    assert!(session.end().0.success());
}

#[test]
fn files_are_read_and_written() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, "from a file").unwrap();
    let mut written = tempfile::tempfile().unwrap();
    let input = File::open(path).unwrap();
    let mut session = Session::connect_on(input, written.try_clone().unwrap());
    assert_eq!(session.guest_gets(), "from a file");
    session.answer("into a file");
    session.daemon.shutdown(Shutdown::Write).unwrap();
    assert!(session.end().0.success());
    let mut text = String::new();
    written.rewind().unwrap();
    written.read_to_string(&mut text).unwrap();
    assert_eq!(text, "into a file");
}

#[test]
fn a_terminal_is_read_and_written() {
    let pty = nix::pty::openpty(None, None).unwrap();
    let mut session = Session::connect_on(pty.slave.try_clone().unwrap(), pty.slave);
    let mut terminal = File::from(pty.master);
    // The end is what a user types for it.
    terminal.write_all(b"typed\n\x04").unwrap();
    assert_eq!(session.guest_gets(), "typed\n");
    session.answer("shown\n");
    session.daemon.shutdown(Shutdown::Write).unwrap();
    assert!(session.end().0.success());
    let mut shown = Vec::new();
    // With nobody at the other end it fails after the last byte.
    let _ = terminal.read_to_end(&mut shown);
    assert_eq!(String::from_utf8(shown).unwrap(), "typed\r\nshown\r\n");
}

#[test]
fn non_blocking_input_and_output_are_waited_for() {
    let (mut ours, theirs) = socket();
    let theirs = UnixStream::from(theirs);
    theirs.set_nonblocking(true).unwrap();
    let theirs: OwnedFd = theirs.into();
    let mut session = Session::connect_on(theirs.try_clone().unwrap(), theirs);
    let pattern = Pattern::new("guest");
    let mut daemon = session.daemon.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            for block in 0..64 {
                daemon.write_all(pattern.at(block << 17, 1 << 17)).unwrap();
            }
            daemon.shutdown(Shutdown::Write).unwrap();
        });
        let mut bytes = Vec::new();
        ours.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), 64 << 17);
        for (block, bytes) in bytes.chunks(1 << 17).enumerate() {
            pattern.check(block << 17, bytes);
        }
    });
    ours.write_all(b"more").unwrap();
    drop(ours);
    assert_eq!(session.guest_gets(), "more");
    assert!(session.end().0.success());
}

#[test]
fn the_writer_of_the_input_is_told_when_the_guest_receives_no_more() {
    let mut session = Session::connect("");
    session.daemon.shutdown(Shutdown::Read).unwrap();
    let mut input = session.program.stdin.take().unwrap();
    eventually("the input to be closed", || input.write_all(b"x").is_err());
    session.answer("still sent");
    session.daemon.shutdown(Shutdown::Write).unwrap();
    assert_eq!(session.rest(), "still sent");
    assert!(session.end().0.success());
}

#[test]
fn output_that_fails_is_told() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut session = Session::connect_on(Stdio::piped(), full);
    session.answer("more than there is room for");
    let (status, complaint) = session.end();
    assert_eq!(status.code(), Some(1));
    assert!(
        complaint.contains("standard output: No space left"),
        "{complaint}"
    );
}

/// Waits for the listener that `connect` waits for, at a path that does not exist yet.
struct Late {
    program: Child,
    path: PathBuf,
    _directory: TempDir,
}

impl Late {
    fn start(wait: &str) -> Self {
        let directory = TempDir::with_prefix("vsock-test-").unwrap();
        let path = directory.path().join("later/vm.vsock");
        let mut command = connect(&[path.to_str().unwrap(), "1234", wait]);
        Self {
            program: command.spawn().unwrap(),
            path,
            _directory: directory,
        }
    }
}

#[test]
fn who_waits_gets_in_when_all_are_there() {
    for wait in ["--wait", "--wait=60"] {
        let mut late = Late::start(wait);
        // Nothing of it is there for as long as a few tries.
        thread::sleep(std::time::Duration::from_millis(250));
        assert!(late.program.try_wait().unwrap().is_none());
        std::fs::create_dir(late.path.parent().unwrap()).unwrap();
        // A daemon has died here.
        drop(UnixListener::bind(&late.path).unwrap());
        thread::sleep(std::time::Duration::from_millis(150));
        std::fs::remove_file(&late.path).unwrap();
        let listener = UnixListener::bind(&late.path).unwrap();
        // No VMM, then no listener.
        drop(accept(&listener));
        let mut refused = accept(&listener);
        take_line(&mut refused);
        drop(refused);
        let mut daemon = accept(&listener);
        take_line(&mut daemon);
        daemon.write_all(b"OK 1\nhello").unwrap();
        drop(daemon);
        let (status, complaint) = end(late.program);
        assert!(status.success(), "{complaint}");
        assert_eq!(complaint, "");
    }
}

#[test]
fn who_waits_at_a_daemon_gets_in_when_the_guest_listens() {
    let daemon = Daemon::start();
    let path = daemon.uds_path();
    let mut command = connect(&[path.to_str().unwrap(), "99", "--wait"]);
    let mut program = command.spawn().unwrap();
    let mut input = program.stdin.take().unwrap();
    input.write_all(b"hello").unwrap();
    drop(input);
    let mut guest = SimGuest::start(&daemon, Setup::default());
    // First there is no listener.
    let request = guest.recv();
    let flow = Flow::new(99, request.src_port);
    request.assert_is(Op::Request, &flow);
    guest.send(&flow.packet(Op::Rst));
    let request = guest.recv();
    let flow = Flow::new(99, request.src_port);
    request.assert_is(Op::Request, &flow);
    guest.send(&flow.packet(Op::Response));
    assert_eq!(recv_bytes(&mut guest, &flow, 5), b"hello");
    guest.send(&flow.rw(b"answer"));
    guest.send(&flow.shutdown(3));
    let mut text = String::new();
    let mut output = program.stdout.take().unwrap();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(text, "answer");
    let (status, complaint) = end(program);
    assert!(status.success(), "{complaint}");
}

#[test]
fn who_has_waited_in_vain_is_told_of_the_last_try() {
    let late = Late::start("--wait=1");
    let (status, complaint) = end(late.program);
    assert_eq!(status.code(), Some(1));
    assert!(complaint.contains("No such file"), "{complaint}");
    assert!(complaint.contains("tried for 1 s"), "{complaint}");

    // A daemon that accepts and does not answer is waited for no longer.
    let directory = TempDir::with_prefix("vsock-test-").unwrap();
    let path = directory.path().join("vm.vsock");
    let _listener = UnixListener::bind(&path).unwrap();
    let program = connect(&[path.to_str().unwrap(), "1234", "--wait=1"]).spawn();
    let (status, complaint) = end(program.unwrap());
    assert_eq!(status.code(), Some(1));
    assert!(complaint.contains("no answer"), "{complaint}");
}

#[test]
fn another_programs_socket_is_not_waited_for() {
    let directory = TempDir::with_prefix("vsock-test-").unwrap();
    let path = directory.path().join("vm.vsock");
    let listener = UnixListener::bind(&path).unwrap();
    let program = connect(&[path.to_str().unwrap(), "1234", "--wait"]).spawn();
    let mut other = accept(&listener);
    other.write_all(b"220 mail\r\n").unwrap();
    let (status, complaint) = end(program.unwrap());
    assert_eq!(status.code(), Some(1));
    assert!(complaint.contains("220 mail"), "{complaint}");
}

/// Waits for a program's end; gives what it complains of, too.
fn end(mut program: Child) -> (ExitStatus, String) {
    let status = wait(&mut program);
    let mut complaint = String::new();
    let mut stderr = program.stderr.take().unwrap();
    stderr.read_to_string(&mut complaint).unwrap();
    (status, complaint)
}

/// A program of the test's. Killed on drop.
struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An HTTP client keeps its connection open until the server's end is passed on to it.
#[test]
fn curl_gets_a_page_through_socat_that_executes_it() {
    let directory = TempDir::with_prefix("vsock-test-").unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (uds, http) = (at("vm.vsock"), at("http"));
    let listener = UnixListener::bind(&uds).unwrap();
    let listen = format!("UNIX-LISTEN:{http}");
    let execute = format!("EXEC:{} connect {uds} 1234", binary().display());
    let socat = Command::new(installed("socat"))
        .args([&listen, &execute])
        .stdin(Stdio::null())
        .spawn();
    let _socat = Helper(socat.unwrap());
    eventually("socat to listen", || Path::new(&http).exists());
    // The answer has no length: it ends with the stream. A client that gets no end gives up with an error.
    let curl = Command::new(installed("curl"))
        .args([
            "-sS",
            "--max-time",
            "10",
            "--unix-socket",
            &http,
            "http://vm/",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut curl = curl.unwrap();
    let mut daemon = accept(&listener);
    take_line(&mut daemon);
    daemon.write_all(b"OK 1\n").unwrap();
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        daemon.read_exact(&mut byte).unwrap();
        request.push(byte[0]);
    }
    let page = b"HTTP/1.0 200 OK\r\n\r\na page";
    daemon.write_all(page).unwrap();
    daemon.shutdown(Shutdown::Write).unwrap();
    let mut text = String::new();
    curl.stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    let (status, complaint) = end(curl);
    assert!(status.success(), "{complaint}");
    assert_eq!(text, "a page");
    // curl closes then, which reaches the guest.
    assert_eq!(all(&daemon), "");
}
