//! The host side of tests with a real guest: plain Unix sockets, and programs such as nc and socat.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::daemon::{Daemon, PATIENCE, eventually};
use super::guest::installed;

/// How long a stream may stand still; it bounds a failing run.
const STREAM_LIMIT: Duration = Duration::from_secs(60);

/// A port not used elsewhere in this test program.
pub fn new_port() -> u32 {
    static LAST: AtomicU32 = AtomicU32::new(10_000);
    LAST.fetch_add(1, Ordering::Relaxed)
}

/// Tries once to connect to the guest's `port`; `None` if the daemon closes the stream without an OK.
pub fn try_connect(daemon: &Daemon, port: u32) -> Option<UnixStream> {
    try_connect_at(&daemon.uds_path(), port)
}

/// The same at the daemon's socket, whichever daemon serves there.
pub fn try_connect_at(path: &Path, port: u32) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(STREAM_LIMIT)).unwrap();
    stream.set_write_timeout(Some(STREAM_LIMIT)).unwrap();
    // A daemon without a guest may close before this is written.
    let _ = stream.write_all(format!("CONNECT {port}\n").as_bytes());
    let answer = read_line(&mut stream);
    if answer.is_empty() {
        return None;
    }
    assert_is_ok(&answer);
    Some(stream)
}

/// Connects to the guest's `port` as soon as a program listens there.
pub fn connect(daemon: &Daemon, port: u32) -> UnixStream {
    let mut stream = None;
    eventually(&format!("a listener at guest port {port}"), || {
        stream = try_connect(daemon, port);
        stream.is_some()
    });
    stream.unwrap()
}

/// Checks the OK line.
pub fn assert_is_ok(line: &str) {
    let port = line
        .strip_prefix("OK ")
        .and_then(|rest| rest.strip_suffix('\n'));
    let valid = port.is_some_and(|port| port.parse::<u16>().is_ok_and(|port| port >= 1024));
    assert!(valid, "answer to CONNECT: {line:?}");
}

/// Reads one line and nothing beyond it; a partial one if the stream ends first.
fn read_line(stream: &mut UnixStream) -> String {
    let mut line = String::new();
    let mut byte = [0];
    while !line.ends_with('\n') {
        match stream.read(&mut byte) {
            Ok(0) => break,
            Ok(_) => line.push(byte[0].into()),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            Err(error) => panic!("reading the answer to CONNECT: {error}"),
        }
    }
    line
}

/// A host program that listens for the guest's connections to one port.
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    pub fn bind(daemon: &Daemon, port: u32) -> Self {
        Self::bind_at(daemon.host_port_path(port))
    }

    /// The same at a path.
    pub fn bind_at(path: PathBuf) -> Self {
        let _ = fs::remove_file(&path);
        let socket = UnixListener::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { socket, path }
    }

    /// Waits for the next connection.
    pub fn accept(&self) -> UnixStream {
        let mut accepted = None;
        eventually("a connection from the guest", || {
            accepted = self.try_accept();
            accepted.is_some()
        });
        accepted.unwrap()
    }

    /// The next connection, if one waits.
    pub fn try_accept(&self) -> Option<UnixStream> {
        match self.socket.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(STREAM_LIMIT)).unwrap();
                stream.set_write_timeout(Some(STREAM_LIMIT)).unwrap();
                Some(stream)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("accept: {error}"),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Echoes on every connection of the guest to one port. Stops on drop.
pub struct EchoServer {
    accepted: Arc<AtomicUsize>,
    _stop: std::sync::mpsc::Sender<()>,
}

impl EchoServer {
    pub fn start(daemon: &Daemon, port: u32) -> Self {
        let listener = Listener::bind(daemon, port);
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&accepted);
        let (stop, stopped) = channel();
        thread::spawn(move || serve_echo(&listener, &count, &stopped));
        Self {
            accepted,
            _stop: stop,
        }
    }

    /// How many connections have been accepted so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }
}

fn serve_echo(listener: &Listener, accepted: &AtomicUsize, stopped: &Receiver<()>) {
    use std::sync::mpsc::RecvTimeoutError::Timeout;
    while stopped.recv_timeout(Duration::from_millis(1)) == Err(Timeout) {
        while let Some(stream) = listener.try_accept() {
            accepted.fetch_add(1, Ordering::Relaxed);
            thread::spawn(move || echo(stream));
        }
    }
}

fn echo(mut stream: UnixStream) -> io::Result<()> {
    let mut buffer = [0; 65536];
    loop {
        let size = stream.read(&mut buffer)?;
        if size == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..size])?;
    }
}

/// An endless byte stream derived from a seed; the guest's peer.py computes the same.
pub struct Pattern(Vec<u8>);

impl Pattern {
    const BLOCK: usize = (1 << 20) + 32;
    const LONGEST: usize = 1 << 18;

    pub fn new(seed: &str) -> Self {
        let mut bytes = Vec::with_capacity(Self::BLOCK + Self::LONGEST);
        for index in 0..Self::BLOCK / 32 {
            bytes.extend(Sha256::digest(format!("{seed} {index}")));
        }
        bytes.extend_from_within(..Self::LONGEST);
        Self(bytes)
    }

    /// `size` bytes from `offset` on.
    pub fn at(&self, offset: usize, size: usize) -> &[u8] {
        let start = offset % Self::BLOCK;
        &self.0[start..start + size]
    }

    /// Panics unless the stream's bytes from `offset` on are `bytes`.
    pub fn check(&self, offset: usize, bytes: &[u8]) {
        if let Some(differs) = self.difference(offset, bytes) {
            panic!("a wrong byte at {}", offset + differs);
        }
    }

    /// The first of `bytes` that differs from the stream's bytes from `offset` on.
    pub fn difference(&self, offset: usize, bytes: &[u8]) -> Option<usize> {
        let expected = self.at(offset, bytes.len());
        if bytes == expected {
            return None;
        }
        bytes.iter().zip(expected).position(|(a, b)| a != b)
    }
}

/// A program on the host and its standard streams. Killed on drop.
pub struct HostProgram {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl HostProgram {
    /// Starts `program` with `arguments`.
    pub fn start<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> Self {
        let mut child = Command::new(installed(program))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || {
            let mut line = String::new();
            while output.read_line(&mut line).is_ok_and(|size| size > 0) {
                let _ = sender.send(std::mem::take(&mut line));
            }
        });
        Self {
            input: child.stdin.take(),
            child,
            lines,
        }
    }

    /// Writes to standard input. A program that has exited is noticed by its missing answer.
    pub fn write(&mut self, text: &str) {
        let input = self.input.as_mut().unwrap();
        let _ = input.write_all(text.as_bytes());
    }

    /// Closes the program's standard input.
    pub fn close_stdin(&mut self) {
        self.input = None;
    }

    /// The next line the program writes; none at its end.
    pub fn next_line(&self) -> Option<String> {
        use std::sync::mpsc::RecvTimeoutError::{Disconnected, Timeout};
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => Some(line),
            Err(Disconnected) => None,
            Err(Timeout) => panic!("no line from the host program within {PATIENCE:?}"),
        }
    }
}

impl Drop for HostProgram {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
