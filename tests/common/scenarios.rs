//! What users do with a guest. Each function is one scenario and works with any guest.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use super::daemon::{Daemon, eventually};
use super::guest::{Guest, GuestProcess};
use super::host::{
    EchoServer, HostProgram, Listener, Pattern, assert_is_ok, connect, new_port, try_connect,
};

/// Who opens a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Opener {
    Guest,
    Host,
}

/// Starts peer.py in the guest with `arguments`.
pub fn spawn_peer(guest: &Guest, arguments: &str) -> GuestProcess {
    guest.spawn(&format!("exec /usr/bin/python3 $GUEST/peer.py {arguments}"))
}

/// The guest listens with nc and the host connects with nc: lines flow both ways.
pub fn guest_listens_with_nc(guest: &Guest, daemon: &Daemon) {
    let listening = guest.spawn("nc --vsock -l -p 1234");
    let mut client = connect_with_nc(daemon, 1234);
    client.write("from the host\n");
    listening.write("from the guest\n");
    assert_eq!(client.next_line().as_deref(), Some("from the guest\n"));
    drop(client);
    assert_eq!(listening.wait_ok(), "from the host\n");
}

/// `nc -U` that has sent `CONNECT port` and received its OK.
fn connect_with_nc(daemon: &Daemon, port: u32) -> HostProgram {
    let mut connected = None;
    eventually("nc to connect", || {
        let mut client = HostProgram::start("nc", ["-U".as_ref(), daemon.uds_path().as_os_str()]);
        client.write(&format!("CONNECT {port}\n"));
        let Some(line) = client.next_line() else {
            return false;
        };
        assert_is_ok(&line);
        connected = Some(client);
        true
    });
    connected.unwrap()
}

/// The host listens with nc and the guest connects with nc: lines flow both ways.
pub fn host_listens_with_nc(guest: &Guest, daemon: &Daemon) {
    let path = daemon.host_port_path(1234);
    let mut listening = HostProgram::start("nc", ["-l", "-U", path.to_str().unwrap()]);
    eventually("nc to listen", || path.exists());
    let client = guest.spawn("nc --vsock 2 1234 | tee $TMPDIR/heard");
    client.write("from the guest\n");
    assert_eq!(listening.next_line().as_deref(), Some("from the guest\n"));
    listening.write("from the host\n");
    eventually("the line to arrive", || {
        guest.run_ok("cat $TMPDIR/heard") == "from the host\n"
    });
    drop(listening);
    // ncat still waits for its standard input to end.
    client.close_stdin();
    client.wait_ok();
    std::fs::remove_file(path).unwrap();
}

/// The same with socat at all ends.
pub fn both_listen_with_socat(guest: &Guest, daemon: &Daemon) {
    let port = new_port();
    let listening = guest.spawn(&format!("socat - VSOCK-LISTEN:{port}"));
    let mut stream = connect(daemon, port);
    stream.write_all(b"from the host\n").unwrap();
    listening.write("from the guest\n");
    assert_eq!(
        read_text(&mut stream, "from the guest\n".len()),
        "from the guest\n"
    );
    drop(stream);
    assert_eq!(listening.wait_ok(), "from the host\n");

    let path = daemon.host_port_path(port);
    let address = format!("UNIX-LISTEN:{}", path.display());
    let mut listening = HostProgram::start("socat", ["-", &address]);
    eventually("socat to listen", || path.exists());
    let client = guest.spawn(&format!("socat - VSOCK-CONNECT:2:{port}"));
    client.write("from the guest\n");
    assert_eq!(listening.next_line().as_deref(), Some("from the guest\n"));
    listening.write("from the host\n");
    listening.close_stdin();
    client.close_stdin();
    assert_eq!(client.wait_ok(), "from the host\n");
}

fn read_text(stream: &mut UnixStream, size: usize) -> String {
    let mut bytes = vec![0; size];
    stream.read_exact(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

/// A connection over which both ends send a pattern at once and compare every byte received.
pub struct Transfer {
    peer: GuestProcess,
    stream: UnixStream,
    sender: JoinHandle<bool>,
    receiver: JoinHandle<bool>,
    received: Arc<AtomicUsize>,
}

impl Transfer {
    /// Starts to move `total` bytes each way, in writes of `write` bytes.
    pub fn start(
        guest: &Guest,
        daemon: &Daemon,
        opener: Opener,
        total: usize,
        write: usize,
    ) -> Self {
        let port = new_port();
        let listener = (opener == Opener::Guest).then(|| Listener::bind(daemon, port));
        let word = if opener == Opener::Guest {
            "guest"
        } else {
            "host"
        };
        let peer = spawn_peer(guest, &format!("transfer {word} {port} {total} {write}"));
        let stream = listener.map_or_else(|| connect(daemon, port), |listener| listener.accept());
        let received = Arc::new(AtomicUsize::new(0));
        let (outgoing, incoming) = (stream.try_clone().unwrap(), stream.try_clone().unwrap());
        let counter = Arc::clone(&received);
        Self {
            peer,
            stream,
            sender: spawn(move || send_pattern(outgoing, total, write)),
            receiver: spawn(move || check_pattern(incoming, total, &counter)),
            received,
        }
    }

    /// Waits until `count` bytes have come from the guest.
    pub fn wait_for(&self, count: usize) {
        eventually("bytes to flow", || self.received() >= count);
    }

    /// How many bytes have come from the guest so far.
    pub fn received(&self) -> usize {
        self.received.load(Ordering::Relaxed)
    }

    /// Waits until every byte is there at both ends.
    pub fn finish(mut self) {
        let complete = self.receiver.join().unwrap() & self.sender.join().unwrap();
        let peer = self.peer.wait();
        assert!(complete, "the host's stream ended early; guest: {peer:?}");
        assert_eq!(peer.status, 0, "{peer:?}");
        assert!(is_at_end(&mut self.stream), "bytes behind the last one");
    }

    /// Waits until the host's ends see the stream break.
    pub fn expect_cut(self) {
        self.wait_for_cut();
    }

    /// Waits until both ends see the stream break; returns what the guest's program has said.
    pub fn expect_cut_at_both(self) -> String {
        let peer = self.wait_for_cut().wait();
        assert_ne!(peer.status, 0, "the guest's end was not cut");
        peer.stderr
    }

    fn wait_for_cut(self) -> GuestProcess {
        assert!(!self.receiver.join().unwrap(), "nothing was cut");
        // The writer may have finished already.
        self.sender.join().unwrap();
        self.peer
    }
}

/// Sends the host's pattern; false if the stream breaks.
fn send_pattern(mut stream: UnixStream, total: usize, write: usize) -> bool {
    let pattern = Pattern::new("host");
    let mut sent = 0;
    while sent < total {
        match stream.write(pattern.at(sent, write.min(total - sent))) {
            Ok(size) => sent += size,
            Err(error) if is_cut(error.kind()) => return false,
            Err(error) => panic!("after {sent} bytes to the guest: {error}"),
        }
    }
    true
}

/// Compares received bytes with the guest's pattern; false if the stream breaks.
fn check_pattern(mut stream: UnixStream, total: usize, received: &AtomicUsize) -> bool {
    let pattern = Pattern::new("guest");
    let mut buffer = vec![0; 1 << 18];
    let mut offset = 0;
    while offset < total {
        let wanted = buffer.len().min(total - offset);
        let size = match stream.read(&mut buffer[..wanted]) {
            Ok(0) => return false,
            Ok(size) => size,
            Err(error) if is_cut(error.kind()) => return false,
            Err(error) => panic!("after {offset} bytes from the guest: {error}"),
        };
        pattern.check(offset, &buffer[..size]);
        offset += size;
        received.store(offset, Ordering::Relaxed);
    }
    true
}

fn is_cut(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

/// Waits for end of stream; false if there are bytes before it.
fn is_at_end(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(size) => size == 0,
        Err(error) if is_cut(error.kind()) => true,
        Err(error) => panic!("waiting for the stream's end: {error}"),
    }
}

/// Moves `total` bytes each way at once, in writes of `write` bytes, and compares them all.
pub fn transfer(guest: &Guest, daemon: &Daemon, opener: Opener, total: usize, write: usize) {
    let start = Instant::now();
    Transfer::start(guest, daemon, opener, total, write).finish();
    println!(
        "{total} bytes each way, {write} a write, opened by the {opener:?}: {:?}",
        start.elapsed()
    );
}

/// 50 connections opened by the guest and 50 by the host, all open before the first byte flows.
pub fn fifty_connections_at_once(guest: &Guest, daemon: &Daemon) {
    const COUNT: usize = 50;
    let (from_guest, from_host) = (new_port(), new_port());
    let server = EchoServer::start(daemon, from_guest);
    let _guest_server = spawn_peer(guest, &format!("echo {from_host}"));
    let clients = spawn_peer(guest, &format!("clients {from_guest} {COUNT}"));
    let streams: Vec<_> = (0..COUNT).map(|_| connect(daemon, from_host)).collect();
    eventually("all connections", || server.accepted() == COUNT);
    clients.write("go\n");
    let pattern = Arc::new(Pattern::new("host"));
    let exchanges: Vec<_> = streams
        .into_iter()
        .enumerate()
        .map(|(index, stream)| {
            let pattern = Arc::clone(&pattern);
            spawn(move || exchange(stream, &pattern, index * 977, 1 + index * 131))
        })
        .collect();
    for exchange in exchanges {
        exchange.join().unwrap();
    }
    clients.wait_ok();
}

/// Sends a part of the pattern to an echo and compares what comes back.
fn exchange(mut stream: UnixStream, pattern: &Pattern, offset: usize, size: usize) {
    stream.write_all(pattern.at(offset, size)).unwrap();
    let mut answer = vec![0; size];
    stream.read_exact(&mut answer).unwrap();
    pattern.check(offset, &answer);
}

/// The guest fills the pipe and closes; the host, which starts to read 15 s later, gets every byte.
pub fn late_reader_gets_all(guest: &Guest, daemon: &Daemon) {
    let port = new_port();
    let listener = Listener::bind(daemon, port);
    let peer = spawn_peer(guest, &format!("fill {port}"));
    let mut stream = listener.accept();
    let sent: usize = peer.wait_ok().trim().parse().unwrap();
    println!("{sent} bytes wait for a late reader");
    assert!(sent >= 1 << 16, "only {sent} bytes were taken");
    // Longer than the guest's own close timer, which is 8 s.
    sleep(Duration::from_secs(15));
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), sent, "bytes that reached the host");
    let pattern = Pattern::new("guest");
    for (index, part) in bytes.chunks(1 << 18).enumerate() {
        pattern.check(index << 18, part);
    }
}

/// A program in the guest closes its writing side; the host's answer still reaches it.
pub fn guest_half_closes(guest: &Guest, daemon: &Daemon) {
    let port = new_port();
    let listener = Listener::bind(daemon, port);
    let client = guest.spawn(&format!(
        "printf question | socat -t30 - VSOCK-CONNECT:2:{port}"
    ));
    let mut stream = listener.accept();
    let mut question = String::new();
    stream.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    // Two pieces with a pause: the other direction stays open, it is not just flushed.
    stream.write_all(b"long ").unwrap();
    sleep(Duration::from_millis(300));
    stream.write_all(b"answer").unwrap();
    drop(stream);
    assert_eq!(client.wait_ok(), "long answer");
}

/// A program on the host closes its writing side; the guest's answer still reaches it.
pub fn host_half_closes(guest: &Guest, daemon: &Daemon) {
    let port = new_port();
    // The shell answers only after cat has seen the end of the question.
    let answer = "cat >/dev/null; echo long; sleep 0.3; echo answer";
    let server = guest.spawn(&format!(
        "socat -t30 VSOCK-LISTEN:{port},fork SYSTEM:'{answer}'"
    ));
    drop(connect(daemon, port));
    let address = format!("UNIX-CONNECT:{}", daemon.uds_path().display());
    let mut client = HostProgram::start("socat", ["-t30", "-", &address]);
    client.write(&format!("CONNECT {port}\nquestion"));
    client.close_stdin();
    assert_is_ok(&client.next_line().unwrap());
    assert_eq!(client.next_line().as_deref(), Some("long\n"));
    assert_eq!(client.next_line().as_deref(), Some("answer\n"));
    assert_eq!(client.next_line(), None);
    drop(server);

    // The same with the shutdown apart from the CONNECT, and a server that reads to the end itself.
    let port = new_port();
    let server = guest.spawn(&format!("socat -u VSOCK-LISTEN:{port} -"));
    let mut stream = connect(daemon, port);
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(server.wait_ok(), "question");
    assert!(is_at_end(&mut stream));
}

/// Connections that nobody listens for are refused, not left to time out.
pub fn refusals_are_immediate(guest: &Guest, daemon: &Daemon) {
    let nobody = new_port();
    expect_refusal_in_guest(guest, nobody);

    let dead = new_port();
    let path = daemon.host_port_path(dead);
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    expect_refusal_in_guest(guest, dead);

    let quickest = (0..5)
        .map(|_| {
            let start = Instant::now();
            assert!(try_connect(daemon, nobody).is_none(), "connected to nobody");
            start.elapsed()
        })
        .min()
        .unwrap();
    // The daemon's own handshake timeout is 2 s.
    assert!(
        quickest < Duration::from_secs(1),
        "refused after {quickest:?}"
    );
}

/// The guest's own time-out, which would be ETIMEDOUT, is 2 s.
fn expect_refusal_in_guest(guest: &Guest, port: u32) {
    let answer = spawn_peer(guest, &format!("refused {port}")).wait_ok();
    assert!(
        answer.starts_with("ECONNRESET ") || answer.starts_with("ECONNREFUSED "),
        "connecting to port {port}: {answer}"
    );
}

/// 1,000 connections one after another, from the guest and then from the host; nothing stays open.
pub fn thousand_connections_leave_nothing(guest: &Guest, daemon: &Daemon) {
    const COUNT: u32 = 1000;
    let (from_guest, from_host) = (new_port(), new_port());
    let (before, _) = daemon.at_rest();
    let _server = EchoServer::start(daemon, from_guest);
    spawn_peer(guest, &format!("sequence {from_guest} {COUNT}")).wait_ok();

    let _guest_server = spawn_peer(guest, &format!("echo {from_host}"));
    drop(connect(daemon, from_host));
    let pattern = Pattern::new("host");
    for index in 0..COUNT {
        let stream = try_connect(daemon, from_host);
        let stream = stream.unwrap_or_else(|| panic!("connection {index} refused"));
        exchange(stream, &pattern, index as usize, 10);
    }
    eventually("the descriptors to be closed", || {
        daemon.open_descriptors() <= before
    });
}

/// An idle connection, to see what ends it.
pub struct Held {
    stream: UnixStream,
    peer: GuestProcess,
}

impl Held {
    pub fn open(guest: &Guest, daemon: &Daemon) -> Self {
        let port = new_port();
        let listener = Listener::bind(daemon, port);
        let peer = spawn_peer(guest, &format!("hold {port}"));
        let mut stream = listener.accept();
        assert_eq!(read_text(&mut stream, 4), "held");
        Self { stream, peer }
    }

    /// The host's end must see the stream's end.
    pub fn expect_end(mut self) {
        assert!(is_at_end(&mut self.stream), "bytes from nowhere");
    }

    /// Both ends must see the stream's end.
    pub fn expect_end_at_both(self) {
        let answer = self.how_it_ends();
        assert!(["end\n", "ECONNRESET\n"].contains(&&*answer), "{answer}");
    }

    /// Both ends must see it; returns what the guest's end sees.
    pub fn how_it_ends(mut self) -> String {
        assert!(is_at_end(&mut self.stream), "bytes from nowhere");
        self.peer.wait_ok()
    }
}

/// The guest and its daemon still work.
pub fn works(guest: &Guest, daemon: &Daemon) {
    transfer(guest, daemon, Opener::Guest, 1 << 20, 65536);
    transfer(guest, daemon, Opener::Host, 1 << 20, 65536);
}

/// The guest's driver is unbound under an open connection and bound again; then it is unloaded and loaded.
pub fn driver_comes_back(guest: &Guest, daemon: &Daemon) {
    const DRIVER: &str = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport";
    let held = Held::open(guest, daemon);
    let device = guest.run_ok(&format!("ls {DRIVER} | grep virtio"));
    let device = device.trim();
    guest.run_ok(&format!("echo {device} > {DRIVER}/unbind"));
    guest.run_ok(&format!("echo {device} > {DRIVER}/bind"));
    held.expect_end_at_both();
    works(guest, daemon);

    // Each socket has it until the RST for its SHUTDOWN has come; where the driver was unbound in between, for 8 s.
    eventually("sockets to leave the driver", || {
        guest.run_ok("cat /sys/module/vmw_vsock_virtio_transport/refcnt") == "0\n"
    });
    guest.run_ok("rmmod vmw_vsock_virtio_transport");
    assert!(try_connect(daemon, new_port()).is_none());
    guest.run_ok("insmod $MODULES/vmw_vsock_virtio_transport.ko");
    works(guest, daemon);
}
