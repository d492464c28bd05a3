//! The stats socket of the daemon.
//!
//! A client that sends an HTTP request (`curl --unix-socket`) gets an HTTP response: JSON for `GET /json`, Prometheus text
//! for any other path, with the connections' series for `GET /metrics?connections=1`. A client that sends anything else, or
//! nothing (`nc -U`), gets the bare Prometheus text with these.
//!
//! One thread serves all clients with `poll`, so no client waits for another. A client has a deadline to send its request,
//! then one to read the answer. When the limit of clients is reached, the deadlines of the oldest ones expire early: a
//! client that has not completed its request is answered as it stands, one that does not read its answer is closed. Either
//! way its place becomes free. Answers are generated while they are written, so a client costs a snapshot and a buffer,
//! however long the text is.

use std::io::{self, ErrorKind, Read, Write};
use std::iter;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use log::{debug, warn};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::metrics::counters::Snapshot;
use crate::metrics::prometheus::Connections;
use crate::metrics::{Chunks, json, prometheus};
use crate::syscalls::{Argument, Syscall};

/// To accept and wait for clients, to read requests and to write answers.
pub(crate) const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_accept4),
    Syscall::only(
        libc::SYS_ioctl,
        &[Argument::Is(1, libc::FIONBIO as libc::c_int)],
    ),
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_poll),
    Syscall::any(libc::SYS_ppoll),
    Syscall::any(libc::SYS_restart_syscall),
    Syscall::any(libc::SYS_clock_nanosleep),
    Syscall::any(libc::SYS_read),
    Syscall::any(libc::SYS_recvfrom),
    Syscall::any(libc::SYS_write),
    Syscall::any(libc::SYS_sendto),
    Syscall::any(libc::SYS_shutdown),
    Syscall::any(libc::SYS_close),
];

/// How long a client may take to send its request. A client that has sent nothing by then gets the bare text.
const REQUEST_TIME: Duration = Duration::from_millis(200);
/// How long a client may take to read its answer before it is closed.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// The longest request that is read to its end, in bytes.
const MAX_REQUEST: usize = 8192;
/// How much of an answer is buffered before it is written, in bytes. The last chunk may exceed it.
const BUFFER: usize = 16 * 1024;
/// How many buffers are written to a client before it is the next one's turn.
const WRITES_PER_TURN: usize = 4;
/// How many clients are served at once.
const MAX_CLIENTS: usize = 256;
/// How many of them expire early when another one waits to be accepted.
const EVICTED_AT_ONCE: usize = 64;
/// How long to wait after a failed accept, which mostly means that the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers the clients of `listener` in a thread of its own until the process ends. Fails if the thread can't be started or
/// the listener can't be made non-blocking.
pub fn serve(
    listener: UnixListener,
    snapshot: impl Fn() -> Snapshot + Send + 'static,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    thread::Builder::new().name("stats".into()).spawn(move || {
        let mut server = Server {
            listener,
            snapshot,
            clients: Vec::new(),
            paused_until: None,
        };
        loop {
            server.turn();
        }
    })?;
    Ok(())
}

struct Server<S> {
    listener: UnixListener,
    snapshot: S,
    /// In the order in which they were accepted.
    clients: Vec<Client>,
    /// Set by a failed accept, cleared by the next successful one.
    paused_until: Option<Instant>,
}

impl<S: Fn() -> Snapshot> Server<S> {
    fn turn(&mut self) {
        let (is_backlogged, ready) = self.wait();
        let ready = self.clients.iter_mut().zip(ready);
        for (client, _) in ready.filter(|(_, is_ready)| *is_ready) {
            client.advance();
        }
        if is_backlogged && self.clients.len() >= MAX_CLIENTS {
            self.make_room();
        } else if is_backlogged {
            self.accept();
        }
        self.answer();
        self.clients.retain(|client| !client.is_over());
    }

    /// Waits until a connection can be accepted, a client is ready, or a deadline expires. Returns whether there is a
    /// connection to accept, and for each client whether it is ready.
    fn wait(&self) -> (bool, Vec<bool>) {
        let listens = match self.paused_until {
            Some(until) if Instant::now() < until => PollFlags::empty(),
            _ => PollFlags::POLLIN,
        };
        let mut fds: Vec<PollFd<'_>> = iter::once(PollFd::new(self.listener.as_fd(), listens))
            .chain(self.clients.iter().map(Client::poll_fd))
            .collect();
        let deadlines = self.clients.iter().map(|client| client.deadline);
        let pause = self.paused_until.filter(|_| listens.is_empty());
        let timeout = deadlines.chain(pause).min().map(timeout);
        match poll(&mut fds, timeout.unwrap_or(PollTimeout::NONE)) {
            Ok(_) => {}
            Err(nix::Error::EINTR) => return (false, Vec::new()),
            Err(error) => {
                // Out of memory, or RLIMIT_NOFILE was lowered below the number of clients. Try them all, but don't spin.
                debug!("can't wait for clients: {error}");
                thread::sleep(ACCEPT_PAUSE);
                return (true, vec![true; self.clients.len()]);
            }
        }
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(true));
        (ready.next().unwrap_or(false), ready.collect())
    }

    /// Accepts pending connections up to the limit.
    fn accept(&mut self) {
        while self.clients.len() < MAX_CLIENTS {
            let accepted = self.listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(stream)
            });
            match accepted {
                Ok(stream) => {
                    self.paused_until = None;
                    let mut client = Client::new(stream);
                    client.advance();
                    self.clients.push(client);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    if self.paused_until.is_none() {
                        warn!("can't accept a client of the stats socket: {error}");
                    }
                    self.paused_until = Some(Instant::now() + ACCEPT_PAUSE);
                    return;
                }
            }
        }
    }

    /// Lets the deadlines of the oldest clients expire.
    fn make_room(&mut self) {
        let now = Instant::now();
        for client in self.clients.iter_mut().take(EVICTED_AT_ONCE) {
            client.deadline = now;
        }
    }

    /// Starts to answer every client whose request is complete or overdue. They share a snapshot, which is taken after the
    /// last of these requests was read.
    fn answer(&mut self) {
        let now = Instant::now();
        let mut asking = self.clients.iter_mut().filter(|client| client.asks(now));
        let Some(first) = asking.next() else {
            return;
        };
        let snapshot = Rc::new((self.snapshot)());
        for client in iter::once(first).chain(asking) {
            client.answer(&snapshot);
        }
    }
}

/// The time until `deadline`, rounded up: no turn comes too early and finds nothing to do.
fn timeout(deadline: Instant) -> PollTimeout {
    let left = deadline.saturating_duration_since(Instant::now());
    let milliseconds = left.as_micros().div_ceil(1000);
    PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX)
}

struct Client {
    stream: UnixStream,
    /// When the current stage expires.
    deadline: Instant,
    stage: Stage,
}

enum Stage {
    Request {
        received: Vec<u8>,
        is_complete: bool,
    },
    Answer(Answer),
    Over,
}

/// The rest of an answer.
struct Answer {
    chunks: Chunks,
    buffer: Vec<u8>,
    /// How many bytes of the buffer were written.
    written: usize,
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            deadline: Instant::now() + REQUEST_TIME,
            stage: Stage::Request {
                received: Vec::new(),
                is_complete: false,
            },
        }
    }

    fn poll_fd(&self) -> PollFd<'_> {
        let events = match self.stage {
            Stage::Request { .. } => PollFlags::POLLIN,
            Stage::Answer(_) | Stage::Over => PollFlags::POLLOUT,
        };
        PollFd::new(self.stream.as_fd(), events)
    }

    /// Reads what has arrived of the request, or writes what the client takes of the answer.
    fn advance(&mut self) {
        let advanced = match &mut self.stage {
            Stage::Request {
                received,
                is_complete,
            } => read_request(&mut self.stream, received).map(|completed| {
                *is_complete = completed;
                false
            }),
            Stage::Answer(answer) => answer.write(&mut self.stream),
            Stage::Over => Ok(true),
        };
        match advanced {
            Ok(false) => {}
            Ok(true) => self.stage = Stage::Over,
            Err(error) => {
                debug!("lost a client of the stats socket: {error}");
                self.stage = Stage::Over;
            }
        }
    }

    /// Whether its request is complete or overdue.
    fn asks(&self, now: Instant) -> bool {
        matches!(self.stage, Stage::Request { is_complete, .. } if is_complete || self.deadline <= now)
    }

    /// Starts to answer the request.
    fn answer(&mut self, snapshot: &Rc<Snapshot>) {
        let Stage::Request { received, .. } = &self.stage else {
            return;
        };
        match respond(received, snapshot) {
            Ok(chunks) => {
                self.stage = Stage::Answer(Answer::new(chunks));
                self.deadline = Instant::now() + ANSWER_TIME;
                self.advance();
            }
            Err(error) => {
                warn!("can't encode the statistics: {error}");
                self.stage = Stage::Over;
            }
        }
    }

    /// Whether it is to be closed: it has its answer, failed, or did not read in time.
    fn is_over(&self) -> bool {
        match self.stage {
            Stage::Request { .. } => false,
            Stage::Answer(_) => self.deadline <= Instant::now(),
            Stage::Over => true,
        }
    }
}

/// Reads what has arrived. Returns whether the request is complete: the header of an HTTP request has ended, the client has
/// shut down its sending side, or the request is too long.
fn read_request(stream: &mut UnixStream, received: &mut Vec<u8>) -> io::Result<bool> {
    let mut part = [0; 1024];
    loop {
        match stream.read(&mut part) {
            Ok(0) => return Ok(true),
            Ok(count) => received.extend_from_slice(&part[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if received.ends_with(b"\r\n\r\n") || received.len() >= MAX_REQUEST {
            return Ok(true);
        }
    }
}

/// The answer to a request.
fn respond(request: &[u8], snapshot: &Rc<Snapshot>) -> io::Result<Chunks> {
    let Some(request) = request.strip_prefix(b"GET ") else {
        return Ok(prometheus::chunks(snapshot.clone(), Connections::Listed));
    };
    let target = request.split(u8::is_ascii_whitespace).next();
    let target = target.unwrap_or_default();
    let is_json = target == json::PATH.as_bytes();
    let chunks = || match is_json {
        true => json::chunks(snapshot.clone()),
        false => prometheus::chunks(snapshot.clone(), connections(target)),
    };
    let content_type = match is_json {
        true => json::CONTENT_TYPE,
        false => prometheus::CONTENT_TYPE,
    };
    // Generated twice, for Content-Length first, rather than held in memory.
    let len = chunks()
        .map(|chunk| chunk.map(|chunk| chunk.len()))
        .sum::<io::Result<usize>>()?;
    let header = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n"
    );
    Ok(Box::new(iter::once(Ok(header)).chain(chunks())))
}

/// Whether this target of a request asks for the connections' series.
fn connections(target: &[u8]) -> Connections {
    let mut parts = target.splitn(2, |byte| *byte == b'?').skip(1);
    let query = parts.next().unwrap_or_default();
    let mut pairs = query.split(|byte| *byte == b'&');
    match pairs.any(|pair| pair == b"connections=1") {
        true => Connections::Listed,
        false => Connections::Summed,
    }
}

impl Answer {
    fn new(chunks: Chunks) -> Self {
        Self {
            chunks,
            buffer: Vec::new(),
            written: 0,
        }
    }

    /// Writes what the client takes, up to its share of a turn. Returns whether the answer is complete.
    fn write(&mut self, stream: &mut UnixStream) -> io::Result<bool> {
        for _ in 0..WRITES_PER_TURN {
            if self.written == self.buffer.len() {
                self.fill()?;
            }
            if self.buffer.is_empty() {
                stream.shutdown(Shutdown::Write)?;
                return Ok(true);
            }
            match stream.write(&self.buffer[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Replaces the buffer, which was written, by the next chunks.
    fn fill(&mut self) -> io::Result<()> {
        self.buffer.clear();
        self.written = 0;
        while self.buffer.len() < BUFFER {
            match self.chunks.next() {
                Some(chunk) => self.buffer.extend_from_slice(chunk?.as_bytes()),
                None => break,
            }
        }
        Ok(())
    }
}
