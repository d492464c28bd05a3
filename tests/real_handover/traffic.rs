//! What goes on between a guest and its host while the daemon is replaced: connections that stay, messages, and connections that
//! come and go.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{JoinHandle, spawn};

use super::common::daemon::{Daemon, eventually};
use super::common::guest::{Guest, GuestProcess};
use super::common::host::{
    EchoServer, HostProgram, Pattern, assert_is_ok, connect, new_port, try_connect_at,
};
use super::common::sim::host::{assert_closed, connect_for_messages, read_message, write_message};
use super::common::ssh;
use super::common::{messages, scenarios::spawn_peer};

/// The most bytes of a message.
const MAX_MESSAGE: usize = 100_000;

/// A session in the guest: what is written comes back.
pub struct Session {
    program: HostProgram,
    _sshd: GuestProcess,
    lines: usize,
}

impl Session {
    /// An ssh session by way of the guest's port, which has a plain socket.
    pub fn by_ssh(guest: &Guest, daemon: &Daemon, port: u32) -> Self {
        let (key, socket) = (
            daemon.directory().join("key"),
            daemon.directory().join("ssh"),
        );
        ssh::make_key(&key);
        let sshd = ssh::serve(guest, port, &key);
        eventually("the guest's sshd", || {
            let mut greeting = [0; 4];
            let stream = UnixStream::connect(&socket);
            stream.unwrap().read_exact(&mut greeting).is_ok() && &greeting == b"SSH-"
        });
        // It makes its standard error non-blocking: that of the test must not be.
        let script = format!("exec \"$@\" 2>{}/ssh-errors", daemon.directory().display());
        let start = ["-c", &script, "sh", "ssh"].map(str::to_owned);
        let arguments = [&start[..], &ssh::arguments(&socket, &key, "cat")].concat();
        Self {
            program: HostProgram::start("sh", arguments),
            _sshd: sshd,
            lines: 0,
        }
    }

    #[track_caller]
    pub fn answers(&mut self) {
        self.lines += 1;
        let line = format!("line {}\n", self.lines);
        self.program.write(&line);
        assert_eq!(self.program.next_line().as_deref(), Some(&*line));
    }

    #[track_caller]
    pub fn finish(mut self) {
        self.answers();
        self.program.close_stdin();
        assert_eq!(self.program.next_line(), None);
    }
}

/// A connection to an echo in the guest, without words until it is asked.
pub struct Chat {
    stream: UnixStream,
    _echo: GuestProcess,
    port: u32,
    pattern: Pattern,
    exchanged: usize,
}

impl Chat {
    pub fn start(guest: &Guest, daemon: &Daemon) -> Self {
        let port = new_port();
        let echo = spawn_peer(guest, &format!("echo {port}"));
        Self {
            stream: connect(daemon, port),
            _echo: echo,
            port,
            pattern: Pattern::new("host"),
            exchanged: 0,
        }
    }

    /// The connection ends, and there is another.
    #[track_caller]
    pub fn start_again(&mut self, daemon: &Daemon) {
        assert_closed(&self.stream);
        self.stream = connect(daemon, self.port);
    }

    #[track_caller]
    pub fn answers(&mut self) {
        let mut answer = [0; 1000];
        let question = self.pattern.at(self.exchanged, answer.len());
        self.stream.write_all(question).unwrap();
        self.stream.read_exact(&mut answer).unwrap();
        self.pattern.check(self.exchanged, &answer);
        self.exchanged += answer.len();
    }
}

/// Messages to the guest, and back.
pub struct Messages {
    echo: GuestProcess,
    over: Arc<AtomicBool>,
    sender: JoinHandle<usize>,
    receiver: JoinHandle<usize>,
    received: Arc<AtomicUsize>,
}

impl Messages {
    pub fn start(guest: &Guest, daemon: &Daemon) -> Self {
        let port = new_port();
        let echo = messages::spawn(guest, "echo", &port.to_string(), "");
        let path = daemon.directory().join("vm.vsock_seqpacket");
        let mut stream = None;
        eventually("the guest's echo of messages", || {
            let client = connect_for_messages(&path);
            write_message(&client, format!("CONNECT {port}\n").as_bytes());
            let mut answer = [0; 100];
            let size = (&client).read(&mut answer).unwrap_or(0);
            if size > 0 {
                assert_is_ok(std::str::from_utf8(&answer[..size]).unwrap());
                stream = Some(client);
            }
            size > 0
        });
        let outgoing = stream.unwrap();
        let incoming = outgoing.try_clone().unwrap();
        let (over, received) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (is_over, count) = (over.clone(), Arc::clone(&received));
        Self {
            echo,
            over,
            sender: spawn(move || send_messages(&outgoing, &is_over)),
            receiver: spawn(move || check_messages(&incoming, &count)),
            received,
        }
    }

    /// Waits for more of them.
    #[track_caller]
    pub fn go_on(&self) {
        let before = self.received.load(Ordering::Relaxed);
        eventually("messages to come back", || {
            self.received.load(Ordering::Relaxed) > before
        });
    }

    /// Stops, and waits until all have come back; returns how many those were.
    #[track_caller]
    pub fn finish(self) -> usize {
        self.over.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap();
        assert_eq!(self.receiver.join().unwrap(), sent, "messages came back");
        assert_eq!(self.echo.wait_ok(), "done\n");
        sent
    }
}

/// The message of this number.
fn message(pattern: &Pattern, number: usize) -> &[u8] {
    pattern.at(number * 977, 1 + number * 7919 % MAX_MESSAGE)
}

fn send_messages(stream: &UnixStream, is_over: &AtomicBool) -> usize {
    let pattern = Pattern::new("host");
    let mut number = 0;
    while !is_over.load(Ordering::Relaxed) {
        write_message(stream, message(&pattern, number));
        number += 1;
    }
    stream.shutdown(Shutdown::Write).unwrap();
    number
}

fn check_messages(stream: &UnixStream, count: &AtomicUsize) -> usize {
    let pattern = Pattern::new("host");
    for number in 0.. {
        let got = read_message(stream);
        if got.is_empty() {
            return number;
        }
        let expected = message(&pattern, number);
        assert!(
            got == expected,
            "message {number}: {} bytes, not {}",
            got.len(),
            expected.len()
        );
        count.store(number + 1, Ordering::Relaxed);
    }
    unreachable!("more messages than numbers")
}

/// Connections that exchange a few bytes and end, from the guest and from the host, each behind the one before.
pub struct Callers {
    guest: GuestProcess,
    _server: EchoServer,
    host: JoinHandle<usize>,
    over: Arc<AtomicBool>,
    _guest_server: GuestProcess,
}

impl Callers {
    pub fn start(guest: &Guest, daemon: &Daemon) -> Self {
        let (from_guest, from_host) = (new_port(), new_port());
        let server = EchoServer::start(daemon, from_guest);
        let guest_server = spawn_peer(guest, &format!("echo {from_host}"));
        drop(connect(daemon, from_host));
        let over = Arc::new(AtomicBool::new(false));
        let (path, is_over) = (daemon.uds_path(), over.clone());
        Self {
            guest: spawn_peer(guest, &format!("repeat {from_guest}")),
            _server: server,
            host: spawn(move || call(path, from_host, &is_over)),
            over,
            _guest_server: guest_server,
        }
    }

    /// Stops; returns how many connections there were.
    #[track_caller]
    pub fn finish(self) -> [usize; 2] {
        self.over.store(true, Ordering::Relaxed);
        self.guest.close_stdin();
        let from_guest = self.guest.wait_ok().trim().parse().unwrap();
        [from_guest, self.host.join().unwrap()]
    }
}

fn call(path: PathBuf, port: u32, is_over: &AtomicBool) -> usize {
    let mut count = 0;
    while !is_over.load(Ordering::Relaxed) {
        let stream = try_connect_at(&path, port);
        let mut stream = stream.unwrap_or_else(|| panic!("connection {count} is refused"));
        let question = format!("number {count}");
        stream.write_all(question.as_bytes()).unwrap();
        let mut answer = vec![0; question.len()];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, question.as_bytes());
        count += 1;
    }
    count
}
