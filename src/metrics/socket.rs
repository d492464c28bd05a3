//! The socket that tells whoever connects what the daemon has counted: `nc -U`, or `curl --unix-socket`.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use log::{debug, warn};

use crate::metrics::counters::Snapshot;
use crate::metrics::prometheus;
use crate::syscalls::{Argument, Syscall};

/// To accept as `listener` says, to read a request and to answer it in a bounded time.
pub(crate) const SYSCALLS: &[Syscall] = &[
    Syscall::only(libc::SYS_setsockopt, &timeout(libc::SO_RCVTIMEO)),
    Syscall::only(libc::SYS_setsockopt, &timeout(libc::SO_SNDTIMEO)),
    Syscall::any(libc::SYS_read),
    Syscall::any(libc::SYS_recvfrom),
    Syscall::any(libc::SYS_sendto),
    Syscall::any(libc::SYS_write),
    Syscall::any(libc::SYS_shutdown),
    Syscall::any(libc::SYS_clock_nanosleep),
];

const fn timeout(option: libc::c_int) -> [Argument; 2] {
    [Argument::Is(1, libc::SOL_SOCKET), Argument::Is(2, option)]
}

/// How long a client may take to say that it speaks HTTP. One that says nothing gets the bare text then.
const REQUEST_TIME: Duration = Duration::from_millis(200);
/// How long a client may take to read, before it is left.
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// How much of an answer is written at once, in bytes.
const ANSWER_PART: usize = 16 * 1024;
/// The longest request that is read to its end, in bytes.
const MAX_REQUEST: usize = 8192;
/// How long no client is accepted when there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers the clients of `listener`, one after the other, in a thread of its own and until the process ends.
pub fn serve(
    listener: UnixListener,
    snapshot: impl Fn() -> Snapshot + Send + 'static,
) -> io::Result<()> {
    thread::Builder::new().name("stats".into()).spawn(move || {
        loop {
            let answered = match listener.accept() {
                Ok((stream, _)) => answer(stream, &snapshot),
                Err(error) => {
                    thread::sleep(ACCEPT_PAUSE);
                    Err(error)
                }
            };
            if let Err(error) = answered {
                debug!("a client was not told the counters: {error}");
            }
        }
    })?;
    Ok(())
}

fn answer(mut stream: UnixStream, snapshot: &impl Fn() -> Snapshot) -> io::Result<()> {
    let is_http = speaks_http(&mut stream)?;
    let text = prometheus::text(&snapshot()).map_err(|error| {
        warn!("the counters can't be shown: {error}");
        io::Error::other(error)
    })?;
    let answer = if is_http {
        let (content_type, len) = (prometheus::CONTENT_TYPE, text.len());
        format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n{text}"
        )
    } else {
        text
    };
    // A socket's timeout is for a write that takes nothing, and starts anew with each that takes a part.
    let until = Instant::now() + ANSWER_TIME;
    for part in answer.as_bytes().chunks(ANSWER_PART) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_write_timeout(Some(left))?;
        stream.write_all(part)?;
    }
    stream.shutdown(Shutdown::Write)
}

/// Whether the client asks by HTTP: a request line, and an empty line behind the headers.
fn speaks_http(stream: &mut UnixStream) -> io::Result<bool> {
    let until = Instant::now() + REQUEST_TIME;
    let mut request = Vec::new();
    let mut part = [0; 1024];
    while request.len() < MAX_REQUEST && !request.ends_with(b"\r\n\r\n") {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(count) => request.extend_from_slice(&part[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(request.starts_with(b"GET "))
}
