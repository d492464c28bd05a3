//! Host programs: plain Unix sockets, with timeouts.

use std::fs::Permissions;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect as connect_to,
    listen as listen_on, socket,
};

use super::guest::SimGuest;
use super::packet::{EOM, Flow, HEADER_LEN, HOST_CID, Op, Packet, STREAM};
use super::ring::{Indirect, Part};
use super::setup::Setup;
use crate::common::daemon::{Daemon, GUEST_CID, PATIENCE};

/// The host port of [`FLOW`].
pub const PORT: u32 = 1234;

/// The default connection made by the guest.
pub const FLOW: Flow = Flow {
    guest_cid: GUEST_CID,
    peer_cid: HOST_CID,
    guest_port: 40_000,
    host_port: PORT,
    kind: STREAM,
    buf_alloc: 262_144,
    fwd_cnt: 0,
};

/// A daemon with a guest whose device runs.
pub fn device() -> (Daemon, SimGuest) {
    let daemon = Daemon::start();
    let guest = SimGuest::start(&daemon, Setup::default());
    (daemon, guest)
}

/// Connects to a socket; reads and writes end after `PATIENCE`.
pub fn connect(path: &Path) -> UnixStream {
    with_patience(UnixStream::connect(path).unwrap())
}

fn with_patience(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A client that has sent `CONNECT <port>`.
pub fn dial(daemon: &Daemon, port: u32) -> UnixStream {
    let mut stream = connect(&daemon.uds_path());
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .unwrap();
    stream
}

/// Reads the `OK <host port>` line, and not a byte more.
#[track_caller]
pub fn read_ok(mut stream: &UnixStream) -> u32 {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("no OK line");
        line.push(byte[0]);
        assert!(line.len() <= 9, "no OK line: {line:?}");
    }
    let text = std::str::from_utf8(&line).unwrap();
    let port = text
        .strip_prefix("OK ")
        .and_then(|rest| rest.strip_suffix('\n'));
    port.and_then(|port| port.parse().ok())
        .unwrap_or_else(|| panic!("no OK line: {text:?}"))
}

/// Panics unless the stream ends, by close or reset, with no byte before.
#[track_caller]
pub fn assert_closed(mut stream: &UnixStream) {
    let mut byte = [0];
    match stream.read(&mut byte) {
        Ok(0) => (),
        Ok(_) => panic!("a byte instead of the end: {byte:?}"),
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
    }
}

/// Reads to the end.
#[track_caller]
pub fn read_to_end(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Reads exactly `len` bytes.
#[track_caller]
pub fn read_exactly(mut stream: &UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// A host program that listens for the guest's connections to `port`, replacing a previous one.
pub fn listen(daemon: &Daemon, port: u32) -> UnixListener {
    let path = daemon.host_port_path(port);
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    // A daemon of another user connects as a member of the group.
    std::fs::set_permissions(path, Permissions::from_mode(0o660)).unwrap();
    listener
}

/// Accepts one connection, with patience.
#[track_caller]
pub fn accept(listener: &UnixListener) -> UnixStream {
    use std::os::fd::AsFd;
    let deadline = std::time::Instant::now() + PATIENCE;
    assert!(
        super::ring::wait_readable(listener.as_fd(), deadline),
        "nobody connects"
    );
    with_patience(listener.accept().unwrap().0)
}

/// A connection the guest made to a listener on host port `host_port`.
#[track_caller]
pub fn from_guest(daemon: &Daemon, guest: &mut SimGuest, flow: &Flow) -> UnixStream {
    let listener = listen(daemon, flow.host_port);
    guest.send(&flow.packet(Op::Request));
    guest.recv().assert_is(Op::Response, flow);
    accept(&listener)
}

/// A connection the host made to the guest's `port`: the client, the flow and the guest's REQUEST.
#[track_caller]
pub fn from_host(daemon: &Daemon, guest: &mut SimGuest, port: u32) -> (UnixStream, Flow, Packet) {
    let stream = dial(daemon, port);
    let request = guest.recv();
    let flow = Flow::new(port, request.src_port);
    request.assert_is(Op::Request, &flow);
    guest.send(&flow.packet(Op::Response));
    assert_eq!(read_ok(&stream), flow.host_port);
    (stream, flow, request)
}

/// Opens a connection from either side, moves bytes both ways, and resets it: the device serves.
#[track_caller]
pub fn assert_serves(daemon: &Daemon, guest: &mut SimGuest) {
    static PORTS: AtomicU32 = AtomicU32::new(700_000);
    let port = PORTS.fetch_add(1, Ordering::Relaxed);
    let flow = Flow::new(port, port);
    let stream = from_guest(daemon, guest, &flow);
    assert_moves_bytes(guest, &stream, &flow);
    guest.send(&flow.packet(Op::Rst));
    assert_closed(&stream);
    let (stream, flow, _) = from_host(daemon, guest, port);
    assert_moves_bytes(guest, &stream, &flow);
    guest.send(&flow.packet(Op::Rst));
    assert_closed(&stream);
}

/// Moves a few bytes both ways over an open connection.
#[track_caller]
pub fn assert_moves_bytes(guest: &mut SimGuest, mut stream: &UnixStream, flow: &Flow) {
    let bytes = pattern(flow.guest_port.into(), 300);
    guest.send(&flow.rw(&bytes));
    assert_same(&read_exactly(stream, 300), &bytes);
    stream.write_all(&bytes).unwrap();
    let got = recv_bytes(guest, flow, 300);
    assert_same(&got, &bytes);
}

/// Receives `len` bytes of one connection; nothing but bytes and credit may come.
#[track_caller]
pub fn recv_bytes(guest: &mut SimGuest, flow: &Flow, len: usize) -> Vec<u8> {
    let mut got = Vec::new();
    while got.len() < len {
        let packet = guest.recv();
        if !packet.is(Op::CreditUpdate) {
            packet.assert_is(Op::Rw, flow);
            got.extend(packet.payload);
        }
    }
    got
}

/// Sends a packet from the region of this index, and waits for its buffers to come back.
#[track_caller]
pub fn send_from(guest: &mut SimGuest, region: usize, flow: &Flow, payload: &[u8]) {
    let addr = guest.memory.regions()[region].guest_addr + 100;
    guest.memory.write(addr, &flow.rw(payload).bytes());
    let part = |addr, len: usize| Part {
        addr,
        len: len as u32,
        write: false,
    };
    let parts = [
        part(addr, HEADER_LEN),
        part(addr + HEADER_LEN as u64, payload.len()),
    ];
    guest.send_chain(&parts, Indirect::No);
    guest.wait_tx_done();
}

/// Sends bytes within credit until the connection stalls, since the host program does not read.
#[track_caller]
pub fn fill(guest: &mut SimGuest, flow: &Flow) -> Vec<u8> {
    fill_behind(guest, flow, 0)
}

/// The same, after so many bytes that the host program has read.
#[track_caller]
pub fn fill_behind(guest: &mut SimGuest, flow: &Flow, read: usize) -> Vec<u8> {
    let mut sent = Vec::new();
    let mut before = None;
    loop {
        guest.send(&flow.packet(Op::CreditRequest));
        let mut update = guest.recv();
        for later in guest.settle() {
            update.assert_is(Op::CreditUpdate, flow);
            update = later;
        }
        update.assert_is(Op::CreditUpdate, flow);
        if before == Some(update.fwd_cnt) {
            // One update may be due by itself, another requested.
            guest
                .settle()
                .iter()
                .for_each(|packet| packet.assert_is(Op::CreditUpdate, flow));
            return sent;
        }
        before = Some(update.fwd_cnt);
        let in_flight = (read + sent.len()) as u32 - update.fwd_cnt;
        let credit = (update.buf_alloc - in_flight) as usize;
        let bytes = pattern(sent.len() as u64, credit);
        for piece in bytes.chunks(guest.setup.tx_payload) {
            guest.send(&flow.rw(piece));
        }
        sent.extend(bytes);
    }
}

/// The next packet other than CREDIT_UPDATE, which may come at any time.
#[track_caller]
pub fn recv_other(guest: &mut SimGuest) -> Packet {
    loop {
        let packet = guest.recv();
        if !packet.is(Op::CreditUpdate) {
            return packet;
        }
    }
}

/// Panics unless the RW packets of one connection, which may come with credit in between, are this message.
#[track_caller]
pub fn assert_message(guest: &mut SimGuest, flow: &Flow, message: &[u8]) {
    assert_same(&recv_message(guest, flow), message);
}

/// Receives one message of a connection; nothing but its packets and credit may come.
#[track_caller]
pub fn recv_message(guest: &mut SimGuest, flow: &Flow) -> Vec<u8> {
    let mut got = Vec::new();
    loop {
        let packet = recv_other(guest);
        packet.assert_is(Op::Rw, flow);
        assert!(packet.len > 0 && packet.flags & !EOM == 0, "{packet:?}");
        got.extend(packet.payload);
        if packet.flags == EOM {
            return got;
        }
    }
}

/// A host program that listens at `path` for connections of messages.
pub fn listen_for_messages(path: &Path) -> UnixListener {
    let _ = std::fs::remove_file(path);
    let fd = message_socket();
    bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen_on(&fd, Backlog::new(128).unwrap()).unwrap();
    std::fs::set_permissions(path, Permissions::from_mode(0o660)).unwrap();
    fd.into()
}

/// Connects to a socket of messages. One write is one message, and so is one read.
pub fn connect_for_messages(path: &Path) -> UnixStream {
    let fd = message_socket();
    connect_to(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    with_patience(fd.into())
}

fn message_socket() -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap()
}

/// Reads one message, which has at most a MiB; none at the end.
#[track_caller]
pub fn read_message(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    let len = stream.read(&mut bytes).expect("no message");
    bytes.truncate(len);
    bytes
}

/// Writes one message.
#[track_caller]
pub fn write_message(mut stream: &UnixStream, message: &[u8]) {
    assert_eq!(stream.write(message).unwrap(), message.len());
}

/// Pseudo-random bytes for a seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Panics, with the place, unless both are the same.
#[track_caller]
pub fn assert_same(got: &[u8], wanted: &[u8]) {
    if let Some(place) = got.iter().zip(wanted).position(|(a, b)| a != b) {
        panic!(
            "byte {place} differs, of {} and {}",
            got.len(),
            wanted.len()
        );
    }
    assert_eq!(got.len(), wanted.len(), "length");
}
