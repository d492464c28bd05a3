//! The host programs: plain programs on plain Unix sockets, blocking where a plain program blocks.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::apps::REQUEST_LEN;
use crate::pattern::{Checker, Marker};
use crate::shared::Shared;

/// The port in the guest that host programs connect to.
pub const GUEST_PORT: u32 = 1234;
/// The bytes a host program reads at most.
const READ_SIZE: usize = 64 * 1024;
/// How often somebody who waits for a connection looks whether the run is over, in milliseconds.
const STOP_CHECK: u16 = 50;
/// How long a connection to the guest may take.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// Reads a stream that is written in `write` bytes, as long as the run lasts.
pub fn take_stream(listener: &UnixListener, write: usize, shared: &Shared) -> Result<(), String> {
    let Some(stream) = accept(listener, shared)? else {
        return Ok(());
    };
    drain(stream, write, shared)
}

/// Reads and checks everything that comes.
pub fn drain(mut stream: UnixStream, write: usize, shared: &Shared) -> Result<(), String> {
    let mut checker = Checker::new(write);
    let mut buffer = vec![0; READ_SIZE];
    while !shared.stopped() {
        let len = stream.read(&mut buffer).map_err(text)?;
        if len == 0 {
            return Err("the stream to the host ended".into());
        }
        checker.check(&buffer[..len])?;
        shared.add_bytes(len);
    }
    Ok(())
}

/// Writes a stream into the guest, `write` bytes at a time, as long as the run lasts.
pub fn give_stream(uds_path: &Path, write: usize, shared: &Shared) -> Result<(), String> {
    fill(connect(uds_path).map_err(text)?, write, shared, false)
}

/// Writes for as long as the run lasts; counts the bytes where nobody can on the other side.
pub fn fill(
    mut stream: UnixStream,
    write: usize,
    shared: &Shared,
    count: bool,
) -> Result<(), String> {
    let mut marker = Marker::new(write);
    let mut buffer = vec![0xa5; write];
    while !shared.stopped() {
        marker.mark(&mut buffer);
        stream.write_all(&buffer).map_err(text)?;
        if count {
            shared.add_bytes(write);
        }
    }
    Ok(())
}

/// Answers requests with their own bytes, one connection after the other.
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

/// Connects to the guest's port, as DESIGN section 1 says.
pub fn connect(uds_path: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(uds_path)?;
    stream.set_read_timeout(Some(CONNECT_PATIENCE))?;
    stream.write_all(format!("CONNECT {GUEST_PORT}\n").as_bytes())?;
    let mut reply = Vec::new();
    while reply.last() != Some(&b'\n') {
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

/// The next connection; None when the run is over.
fn accept(listener: &UnixListener, shared: &Shared) -> Result<Option<UnixStream>, String> {
    while !shared.stopped() {
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(STOP_CHECK)).map_err(|error| error.to_string())? > 0 {
            let (stream, _) = listener.accept().map_err(text)?;
            return Ok(Some(stream));
        }
    }
    Ok(None)
}

fn text(error: io::Error) -> String {
    format!("host program: {error}")
}
