//! contrib/vsock-connect, with a Unix socket of the test in place of the daemon.

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use common::daemon::{PATIENCE, eventually};
use common::guest::installed;
use common::host::Pattern;
use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// A running vsock-connect and the daemon's end of its connection.
struct Session {
    program: Child,
    daemon: UnixStream,
    _directory: TempDir,
}

impl Session {
    /// Starts vsock-connect for port 1234 and takes its connection; nothing is answered yet.
    fn start() -> Self {
        let directory = TempDir::with_prefix("vsock-connect-").unwrap();
        let path = directory.path().join("vm.vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let program = vsock_connect(&[path.to_str().unwrap(), "1234"]);
        let daemon = accept(&listener);
        Self {
            program,
            daemon,
            _directory: directory,
        }
    }

    /// The same, connected to a guest, which has sent `first` in one piece with the answer.
    fn connect(first: &str) -> Self {
        let mut session = Self::start();
        let mut line = [0; b"CONNECT 1234\n".len()];
        session.daemon.read_exact(&mut line).unwrap();
        assert_eq!(line, *b"CONNECT 1234\n");
        session.answer(&format!("OK 65535\n{first}"));
        session
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

fn vsock_connect(arguments: &[&str]) -> Child {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/vsock-connect");
    // An alarm outlives exec: it bounds who waits for the program's output.
    let limited = "import os, signal, sys; signal.alarm(60); os.execv(sys.argv[1], sys.argv[1:])";
    let python = installed("python3");
    Command::new(&python)
        .args(["-c", limited])
        .arg(&python)
        .arg(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let mut accepted = None;
    eventually("vsock-connect to connect", || {
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
    eventually("vsock-connect to end", || {
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
    assert!(session.end().0.success());
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
            "vsock-connect: nobody listens on port 1234 of the guest\n"
        );
    }
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
        (
            &["/nowhere/vm.vsock"],
            2,
            "usage: vsock-connect UDS_PATH PORT",
        ),
        (&["/nowhere/vm.vsock", "ssh"], 2, "usage: "),
        (&["/nowhere/vm.vsock", "22", "23"], 2, "usage: "),
    ] {
        let mut program = vsock_connect(arguments);
        assert_eq!(wait(&mut program).code(), Some(code), "{arguments:?}");
        let mut complaint = String::new();
        let mut stderr = program.stderr.take().unwrap();
        stderr.read_to_string(&mut complaint).unwrap();
        assert!(complaint.contains(told), "{complaint}");
        assert_eq!(complaint.lines().count(), 1, "{complaint}");
    }
}
