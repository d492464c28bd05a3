//! `connect`: joins standard input and output to a port of the guest.

mod join;

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use nix::errno::Errno;
use thiserror::Error;

use super::socket;
use crate::host::connect_line::{self, Line, Progress};
use crate::metrics::counters::CallFailure;

/// How long `--wait` waits before it tries again.
const RETRY: Duration = Duration::from_millis(100);

/// How much of the answer of another program's socket a message shows, in bytes.
const SHOWN: usize = 32;

/// The arguments of `connect`.
#[derive(Args)]
pub struct ConnectArgs {
    /// The UDS_PATH of the daemon
    #[arg(value_name = "UDS_PATH")]
    path: PathBuf,

    /// The guest's port
    port: u32,

    /// Try again until the daemon, the VM and the listener are there: for so many seconds, or without an end
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true)]
    wait: Option<Option<u32>>,
}

/// Why there is no connection, or why it has ended too early.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The socket can't be reached, or failed.
    #[error("{}: {source}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The daemon has closed the stream without an answer, as another program that serves this protocol does.
    #[error("nobody listens on port {0} of the guest")]
    Refused(u32),
    /// The daemon has said why there is no connection.
    #[error("{}", told(*.why, *.port))]
    Failed {
        /// The guest's port.
        port: u32,
        /// Why.
        why: CallFailure,
    },
    /// The daemon, or the guest, takes too long.
    #[error("no answer from port {0} of the guest")]
    NoAnswer(u32),
    /// The socket is another program's.
    #[error("{} is not a socket of vhost-user-vsock: it answers \"{answer}\"", path.display())]
    Foreign {
        /// Its path.
        path: PathBuf,
        /// The beginning of what it answers, with escapes.
        answer: String,
    },
    /// The time of `--wait` is over. The last try has failed so.
    #[error("{last} (tried for {seconds} s)")]
    Waited {
        /// How the last try has failed.
        last: Box<ConnectError>,
        /// How long it was tried.
        seconds: u32,
    },
    /// The connection has ended before all bytes were delivered.
    #[error("the connection was reset")]
    Reset,
    /// Standard input can't be read.
    #[error("standard input: {}", .0.desc())]
    Input(Errno),
    /// Standard output can't be written.
    #[error("standard output: {}", .0.desc())]
    Output(Errno),
    /// No memory for a thread.
    #[error("can't start a thread: {0}")]
    Thread(io::Error),
}

/// The message for a failure that the daemon has told.
fn told(why: CallFailure, port: u32) -> String {
    match why {
        CallFailure::NoVmm => "no VMM is connected to the daemon: the VM is not running".into(),
        CallFailure::NoDriver => "the guest's driver has not started the device: the guest is booting, has no virtio-vsock driver, or \
             its memory is not shared with the daemon"
            .into(),
        CallFailure::NobodyListens => format!("nobody listens on port {port} of the guest"),
        CallFailure::Limit => format!("port {port} of the guest: a limit of the daemon is reached"),
        CallFailure::Timeout => format!("no answer from port {port} of the guest in time"),
        CallFailure::NoLine | CallFailure::Other => {
            format!("the daemon has refused the connection to port {port} of the guest, its log may say why")
        }
    }
}

impl ConnectError {
    /// The exit code. It tells a script what is missing.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Failed { why, .. } => match why {
                CallFailure::NoVmm => 3,
                CallFailure::NoDriver => 4,
                CallFailure::NobodyListens => 5,
                CallFailure::Limit => 6,
                CallFailure::Timeout => 7,
                CallFailure::NoLine | CallFailure::Other => 1,
            },
            Self::Waited { last, .. } => last.exit_code(),
            _ => 1,
        }
    }

    /// Whether it may be otherwise when the daemon, the VMM, the driver or the listener has come.
    fn may_pass(&self) -> bool {
        match self {
            Self::Refused(_) | Self::NoAnswer(_) | Self::Failed { .. } => true,
            Self::Socket { source, .. } => matches!(
                source.kind(),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused
            ),
            _ => false,
        }
    }
}

/// Connects, and moves bytes until both directions have ended or the guest has closed the connection.
///
/// # Errors
/// There is no connection, it was reset, or standard input or output fails.
pub fn run(args: &ConnectArgs) -> Result<(), ConnectError> {
    join::join(open(args)?)
}

/// Opens the connection, now or within the time of `--wait`.
fn open(args: &ConnectArgs) -> Result<UnixStream, ConnectError> {
    let Some(wait) = args.wait else {
        return attempt(&args.path, args.port, None);
    };
    let deadline = wait.map(|seconds| Instant::now() + Duration::from_secs(seconds.into()));
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        match attempt(&args.path, args.port, left) {
            Err(error) if error.may_pass() => {
                if let (Some(left), Some(seconds)) = (left, wait)
                    && left <= RETRY
                {
                    let last = Box::new(error);
                    return Err(ConnectError::Waited { last, seconds });
                }
                thread::sleep(RETRY);
            }
            result => return result,
        }
    }
}

/// Connects to `port`, within `limit`.
fn attempt(path: &Path, port: u32, limit: Option<Duration>) -> Result<UnixStream, ConnectError> {
    // A limit of 0 would be none.
    let limit = limit.map(|limit| limit.max(RETRY));
    let fail = |source: io::Error| match source.kind() {
        ErrorKind::WouldBlock => ConnectError::NoAnswer(port),
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => ConnectError::Refused(port),
        _ => ConnectError::Socket {
            path: path.to_owned(),
            source,
        },
    };
    let mut stream = socket::connect_as(connect_line::ASKS_WHY, path, limit).map_err(fail)?;
    let sent = stream.write_all(connect_line::request(port).as_bytes());
    match sent {
        // Without a guest, the daemon closes before it has read the line. It has said why.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => return Err(fail(error)),
        _ => {}
    }
    stream.set_read_timeout(limit).map_err(fail)?;
    let answer = read_answer(&mut stream).map_err(fail)?;
    if let Some(why) = answer.as_deref().and_then(connect_line::refusal) {
        return Err(ConnectError::Failed { port, why });
    }
    match answer {
        None => {
            stream.set_nonblocking(true).map_err(fail)?;
            Ok(stream)
        }
        Some(answer) if answer.is_empty() => Err(ConnectError::Refused(port)),
        Some(answer) => Err(ConnectError::Foreign {
            path: path.to_owned(),
            answer: answer.escape_ascii().to_string(),
        }),
    }
}

/// Reads the answer, and no byte of what follows it. Gives what was read where that is no answer.
fn read_answer(stream: &mut UnixStream) -> io::Result<Option<Vec<u8>>> {
    let mut line = Line::answer();
    let mut answer = Vec::new();
    loop {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Ok(Some(answer)),
            Ok(_) => answer.push(byte[0]),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        match line.feed(&byte) {
            Progress::Incomplete => {}
            Progress::Complete { .. } => return Ok(None),
            Progress::Invalid => break,
        }
    }
    // For the message only.
    let mut more = [0; SHOWN];
    stream.set_nonblocking(true)?;
    let count = stream.read(&mut more).unwrap_or(0);
    answer.extend_from_slice(&more[..count]);
    answer.truncate(SHOWN);
    Ok(Some(answer))
}
