//! The host programs: plain programs on plain Unix sockets, which block where a plain program blocks.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::guest::GUEST_PORT;
use crate::pattern::{Checker, Marker, REQUEST_LEN};
use crate::shared::Shared;

/// The port on which host programs listen for the guest's connections.
pub const HOST_PORT: u32 = 5000;
/// The most bytes that a host program reads at once.
const READ_SIZE: usize = 64 * 1024;
/// How often a program that waits for a connection checks whether the run is over, in milliseconds.
const STOP_CHECK: u16 = 50;
/// How often a program that waits for an answer checks whether the run is over.
const ANSWER_CHECK: Duration = Duration::from_millis(5);
/// How long a connection to the guest may take to be accepted.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest `OK <port>\n`.
const REPLY_LEN: usize = 32;

/// Accepts a connection and drains it.
pub fn accept_and_drain(
    listener: &UnixListener,
    write: usize,
    shared: &Shared,
) -> Result<(), String> {
    let Some(stream) = accept(listener, shared)? else {
        return Ok(());
    };
    drain(stream, write, shared)
}

/// Reads and checks a stream that is written in `write` bytes until the run is over.
pub fn drain(stream: UnixStream, write: usize, shared: &Shared) -> Result<(), String> {
    drain_noting(stream, write, shared, || {})
}

/// The same, and calls `note` after each read.
pub fn drain_noting(
    mut stream: UnixStream,
    write: usize,
    shared: &Shared,
    mut note: impl FnMut(),
) -> Result<(), String> {
    let mut checker = Checker::new(write);
    let mut buffer = vec![0; READ_SIZE];
    while !shared.stopped() {
        let len = stream.read(&mut buffer).map_err(text)?;
        if len == 0 {
            return Err("the stream to the host ended".into());
        }
        checker.check(&buffer[..len])?;
        shared.add_to_host(len);
        note();
    }
    Ok(())
}

/// Connects to the guest and fills the connection.
pub fn connect_and_fill(uds_path: &Path, write: usize, shared: &Shared) -> Result<(), String> {
    let stream = connect(uds_path, GUEST_PORT).map_err(text)?;
    fill(stream, write, shared, |_| {})
}

/// Writes a stream, `write` bytes at a time, until the run is over. Calls `wrote` after each write.
pub fn fill(
    mut stream: UnixStream,
    write: usize,
    shared: &Shared,
    wrote: impl Fn(usize),
) -> Result<(), String> {
    let mut marker = Marker::new(write);
    let mut buffer = vec![0xa5; write];
    while !shared.stopped() {
        marker.mark(&mut buffer);
        stream.write_all(&buffer).map_err(text)?;
        wrote(write);
    }
    Ok(())
}

/// Echoes requests, one connection after the other.
pub fn answer(listener: &UnixListener, shared: &Shared) -> Result<(), String> {
    while let Some(mut stream) = accept(listener, shared)? {
        let mut request = [0; REQUEST_LEN];
        loop {
            match stream.read_exact(&mut request) {
                Ok(()) => stream.write_all(&request).map_err(text)?,
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(text(error)),
            }
        }
    }
    Ok(())
}

/// Connects to the guest, and exchanges requests for echoes on the connection.
pub fn connect_and_request_echoes(uds_path: &Path, shared: &Shared) -> Result<Vec<u64>, String> {
    let stream = connect(uds_path, GUEST_PORT).map_err(text)?;
    request_echoes(stream, shared)
}

/// Sends requests on a connection and waits for each echo until the run is over. Returns how long the operations of the
/// measured window took, in nanoseconds.
pub fn request_echoes(mut stream: UnixStream, shared: &Shared) -> Result<Vec<u64>, String> {
    stream.set_read_timeout(Some(ANSWER_CHECK)).map_err(text)?;
    let mut number = 0_u64;
    repeat(shared, || {
        let mut request = [0x11; REQUEST_LEN];
        number += 1;
        request[..8].copy_from_slice(&number.to_le_bytes());
        stream.write_all(&request)?;
        let mut response = Vec::new();
        let complete = |response: &[u8]| response.len() == REQUEST_LEN;
        read_until(&mut stream, &mut response, complete, shared)?;
        if response == request {
            Ok(())
        } else {
            Err(io::Error::other("a wrong echo"))
        }
    })
}

/// Connects to the guest, waits for the OK, and closes, until the run is over. Returns how long the connections of the
/// measured window took to be accepted, in nanoseconds.
pub fn reconnect(uds_path: &Path, shared: &Shared) -> Result<Vec<u64>, String> {
    repeat(shared, || {
        let mut stream = request(uds_path, GUEST_PORT)?;
        stream.set_read_timeout(Some(ANSWER_CHECK))?;
        let mut reply = Vec::new();
        read_until(&mut stream, &mut reply, |r| r.ends_with(b"\n"), shared)
    })
}

/// Repeats an operation until the run is over. One that is not complete then counts with the time it has taken so far, so
/// that an operation that is never answered shows.
fn repeat(
    shared: &Shared,
    mut operation: impl FnMut() -> io::Result<()>,
) -> Result<Vec<u64>, String> {
    let mut latencies = Vec::new();
    while !shared.stopped() {
        let begin = Instant::now();
        let result = operation();
        let latency = begin.elapsed().as_nanos() as u64;
        if shared.stopped() {
            latencies.push(latency);
            break;
        }
        result.map_err(text)?;
        shared.note_pause(begin.elapsed());
        if shared.add_op() {
            latencies.push(latency);
        }
    }
    Ok(latencies)
}

/// Reads until `complete`, or until the run is over.
fn read_until(
    stream: &mut UnixStream,
    bytes: &mut Vec<u8>,
    complete: impl Fn(&[u8]) -> bool,
    shared: &Shared,
) -> io::Result<()> {
    let mut buffer = [0; REQUEST_LEN];
    while !complete(bytes) && !shared.stopped() {
        match stream.read(&mut buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(len) => bytes.extend(&buffer[..len]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Connects to a port of the guest and waits until it is accepted.
pub fn connect(uds_path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = request(uds_path, port)?;
    stream.set_read_timeout(Some(CONNECT_TIMEOUT))?;
    let mut reply = Vec::new();
    while reply.last() != Some(&b'\n') && reply.len() < REPLY_LEN {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        reply.extend(byte);
    }
    if !reply.starts_with(b"OK ") {
        return Err(io::Error::other("no OK after CONNECT"));
    }
    stream.set_read_timeout(None)?;
    Ok(stream)
}

/// Asks for a connection to a port of the guest.
pub fn request(uds_path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(uds_path)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    Ok(stream)
}

/// Accepts a connection; None when the run is over.
pub fn accept(listener: &UnixListener, shared: &Shared) -> Result<Option<UnixStream>, String> {
    while !shared.stopped() {
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(STOP_CHECK)).map_err(|error| error.to_string())? > 0 {
            let (stream, _) = listener.accept().map_err(text)?;
            return Ok(Some(stream));
        }
    }
    Ok(None)
}

/// The failure of a host program.
pub fn text(error: io::Error) -> String {
    format!("host program: {error}")
}
