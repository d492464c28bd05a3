//! Moves the bytes between standard input and output and the stream to the guest, until both directions have ended.
//!
//! Each direction has a thread. The end of one is passed on alone: standard input's as `shutdown(SHUT_WR)` of the stream, and
//! the guest's by closing standard output, after a `shutdown(SHUT_WR)` where that is a socket. Under inetd, or socat's EXEC,
//! the same socket is standard input, and goes on being read. Where nobody takes the bytes of a direction any more, its source
//! is closed in the same way.
//!
//! Standard input and output may be shared with other processes, so they stay in the mode that they have, blocking or not.
//! Where output is a pipe, `splice` moves pages instead of copying them, up to three times as fast. It holds the
//! pipe's lock, and a reader that waits for that can't be killed, so it is never let wait. From a pipe to the stream it is no
//! faster than copying: most programs write little at a time.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::thread;

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket;
use nix::unistd::{dup2_stdin, dup2_stdout, read, write};
use parking_lot::Mutex;

use super::ConnectError;

/// How much is moved at once, in bytes.
const BLOCK: usize = 256 << 10;

/// Joins standard input and output to the stream, which must be non-blocking. Returns when both directions have ended or the
/// guest has closed it.
pub(super) fn join(stream: UnixStream) -> Result<(), ConnectError> {
    let stream = Arc::new(stream);
    let [sending, receiving] = [(); 2].map(|()| Arc::new(Mutex::new(false)));
    let (ended, end) = mpsc::channel();
    let ways: [(Way, _, _); 2] = [
        (to_guest, &sending, &receiving),
        (from_guest, &receiving, &sending),
    ];
    for (way, own, other) in ways {
        let guest = Guest {
            stream: stream.clone(),
            was_reset: own.clone(),
            other_was_reset: other.clone(),
        };
        let ended = ended.clone();
        let run = move || {
            // The receiver leaves with the first result.
            way(&guest).map(|result| ended.send(result));
        };
        let thread = thread::Builder::new().spawn(run);
        thread.map_err(ConnectError::Thread)?;
    }
    drop(ended);
    // The other thread may wait for standard input, and ends with the process.
    end.recv().unwrap_or(Ok(()))
}

/// One direction. Gives the result of the whole, if that is decided by its end.
type Way = fn(&Guest) -> Option<Result<(), ConnectError>>;

fn to_guest(guest: &Guest) -> Option<Result<(), ConnectError>> {
    let input = io::stdin();
    match copy(&Plain(input.as_fd()), guest) {
        Ok(()) => {
            // It fails where the guest has closed.
            let _ = guest.stream.shutdown(Shutdown::Write);
            None
        }
        // What the guest still sends is received.
        Err(Failure::To(_)) => {
            close_input();
            None
        }
        Err(Failure::From(error)) => Some(Err(ConnectError::Input(error))),
    }
}

fn from_guest(guest: &Guest) -> Option<Result<(), ConnectError>> {
    let output = io::stdout();
    match move_pages(guest, &Plain(output.as_fd())) {
        Err(Failure::To(Errno::EPIPE | Errno::ECONNRESET)) => {
            let _ = guest.stream.shutdown(Shutdown::Read);
            // With bytes left unread, the close at the end would be a reset.
            drain(guest);
        }
        Err(Failure::To(error)) => return Some(Err(ConnectError::Output(error))),
        Err(Failure::From(_)) | Ok(()) => {}
    }
    close_output();
    // Until both directions are shut down.
    wait(guest.fd(), PollFlags::empty());
    let was_reset = *guest.was_reset.lock() || *guest.other_was_reset.lock();
    Some(if was_reset {
        Err(ConnectError::Reset)
    } else {
        Ok(())
    })
}

/// Tells the writer of standard input that nobody reads it any more.
fn close_input() {
    let input = io::stdin();
    // It fails for anything but a socket.
    let _ = socket::shutdown(input.as_fd().as_raw_fd(), socket::Shutdown::Read);
    if let Ok((reader, _)) = io::pipe() {
        // Not just closed: another file could get its number.
        let _ = dup2_stdin(reader);
    }
}

/// Tells the reader of standard output that this is the end.
fn close_output() {
    let output = io::stdout();
    let _ = socket::shutdown(output.as_fd().as_raw_fd(), socket::Shutdown::Write);
    if let Ok((_, writer)) = io::pipe() {
        let _ = dup2_stdout(writer);
    }
}

/// Reads the guest's bytes to their end.
fn drain(guest: &Guest) {
    let mut bytes = vec![0; BLOCK];
    loop {
        match guest.call(|| read(guest.fd(), &mut bytes)) {
            Ok(0) => return,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait(guest.fd(), PollFlags::POLLIN),
            Err(_) => return,
        }
    }
}

/// An end of a direction.
trait End {
    fn fd(&self) -> BorrowedFd<'_>;

    /// Makes a system call with it.
    fn call<T>(&self, call: impl FnOnce() -> nix::Result<T>) -> nix::Result<T> {
        call()
    }
}

/// Standard input or output.
struct Plain<'f>(BorrowedFd<'f>);

impl End for Plain<'_> {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0
    }
}

/// The stream to the guest.
struct Guest {
    stream: Arc<UnixStream>,
    /// Whether a call of this direction has met a reset. The kernel tells only the first call after it, of either direction.
    was_reset: Arc<Mutex<bool>>,
    /// The same of the other direction.
    other_was_reset: Arc<Mutex<bool>>,
}

impl End for Guest {
    fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// The call does not wait, and holds the lock. So a thread that learns that the stream has ended, and then takes the
    /// other's lock, learns of a reset that a call of the other's has met.
    fn call<T>(&self, call: impl FnOnce() -> nix::Result<T>) -> nix::Result<T> {
        let mut was_reset = self.was_reset.lock();
        let result = call();
        *was_reset |= matches!(result, Err(Errno::ECONNRESET));
        result
    }
}

/// Which end has failed.
enum Failure {
    From(Errno),
    To(Errno),
}

/// Moves bytes until the end of `from`, by `splice` if `to` is a pipe.
fn move_pages(from: &impl End, to: &impl End) -> Result<(), Failure> {
    loop {
        match from.call(|| splice_once(from.fd(), to.fd())) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                wait(from.fd(), PollFlags::POLLIN);
                wait(to.fd(), PollFlags::POLLOUT);
            }
            Err(Errno::EPIPE) => return Err(Failure::To(Errno::EPIPE)),
            // It is no pipe, or `read` or `write` will say which end has failed.
            Err(_) => return copy(from, to),
        }
    }
}

fn splice_once(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> nix::Result<usize> {
    splice(from, None, to, None, BLOCK, SpliceFFlags::SPLICE_F_NONBLOCK)
}

/// Moves bytes until the end of `from`.
fn copy(from: &impl End, to: &impl End) -> Result<(), Failure> {
    let mut block = vec![0; BLOCK];
    loop {
        match from.call(|| read(from.fd(), &mut block)) {
            Ok(0) => return Ok(()),
            Ok(count) => write_all(to, &block[..count])?,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait(from.fd(), PollFlags::POLLIN),
            Err(error) => return Err(Failure::From(error)),
        }
    }
}

fn write_all(to: &impl End, mut bytes: &[u8]) -> Result<(), Failure> {
    while !bytes.is_empty() {
        match to.call(|| write(to.fd(), bytes)) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait(to.fd(), PollFlags::POLLOUT),
            Err(error) => return Err(Failure::To(error)),
        }
    }
    Ok(())
}

/// Waits until one of these events, an error or a hang-up.
fn wait(fd: BorrowedFd<'_>, events: PollFlags) {
    let mut fds = [PollFd::new(fd, events)];
    while poll(&mut fds, PollTimeout::NONE) == Err(Errno::EINTR) {}
}
