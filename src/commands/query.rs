//! Asks daemons for their statistics: one by the path of its [stats socket](crate::metrics::socket), or all below a directory.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use thiserror::Error;

use super::socket;
use crate::metrics::counters::Snapshot;
use crate::metrics::json;

/// Where the service keeps a directory for each daemon.
pub(super) const RUN_DIRECTORY: &str = "/run/vhost-user-vsock";

/// The files of a daemon in its directory, as the service has them. The first one serves the statistics.
const SOCKETS: [&str; 3] = ["stats", "vhost.socket", "vm.vsock"];

/// How many seconds a daemon has to answer, from the connection to the last byte.
const ANSWER_SECONDS: u32 = 5;

/// The longest answer that is read, in bytes: many times that of 65,536 connections.
const MAX_ANSWER: usize = 64 << 20;

/// How much is read at once, in bytes.
const BLOCK: usize = 64 << 10;

/// The stack of a thread that asks a daemon, in bytes. The depth of the JSON that it parses is limited.
const STACK: usize = 512 << 10;

/// Why a daemon's statistics are not known.
#[derive(Debug, Error)]
pub enum QueryError {
    /// The socket can't be reached.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The server does not accept the connection, or does not complete its answer.
    #[error("no answer within {ANSWER_SECONDS} seconds: is this the path of --stats-path?")]
    Timeout,
    /// The server is another program, or another socket of a daemon.
    #[error("this is not the stats socket of a vhost-user-vsock daemon, see --stats-path: {0}")]
    Foreign(String),
    /// Its directory has sockets of a daemon, but not this one.
    #[error("no stats socket")]
    NoSocket,
}

/// A daemon of several.
pub(super) struct Daemon {
    /// The name of its directory. The service calls it the instance.
    pub(super) name: String,
    /// What it has answered.
    pub(super) answer: Result<Snapshot, QueryError>,
}

/// Asks all daemons whose directories are in `directory`, at the same time, and returns within seconds. They are in the order
/// of their names, CIDs by their value. Without a directory it is [`RUN_DIRECTORY`], which the first daemon creates.
///
/// # Errors
/// The directory can't be read.
pub(super) fn all(directory: Option<&Path>) -> io::Result<Vec<Daemon>> {
    let entries = fs::read_dir(directory.unwrap_or(Path::new(RUN_DIRECTORY)));
    let entries = match entries {
        Err(error) if directory.is_none() && error.kind() == ErrorKind::NotFound => {
            return Ok(Vec::new());
        }
        entries => entries?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry?.path());
    }
    paths.retain(|path| path.is_dir());
    paths.sort_by_cached_key(|path| {
        let name = name(path);
        (name.parse::<u64>().unwrap_or(u64::MAX), name)
    });
    allow_many_descriptors();
    Ok(thread::scope(|scope| {
        let asked = paths.iter().map(|path| {
            let thread = thread::Builder::new().stack_size(STACK);
            (path, thread.spawn_scoped(scope, move || in_directory(path)))
        });
        let asked: Vec<_> = asked.collect();
        let answers = asked.into_iter().filter_map(|(path, thread)| {
            let answer = match thread {
                Ok(thread) => thread.join().ok()?.transpose()?,
                Err(error) => Err(error.into()),
            };
            let name = name(path);
            Some(Daemon { name, answer })
        });
        answers.collect()
    }))
}

/// The name of a daemon, with escapes for what would confuse a terminal.
fn name(path: &Path) -> String {
    let name = path.file_name().map(OsStr::to_string_lossy);
    name.unwrap_or_default().escape_debug().to_string()
}

/// There may be more daemons than the default limit of descriptors allows.
fn allow_many_descriptors() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Asks the daemon whose directory this is, if it is one's.
fn in_directory(directory: &Path) -> Result<Option<Snapshot>, QueryError> {
    let [stats, others @ ..] = SOCKETS.map(|name| directory.join(name));
    if stats.try_exists()? {
        return one(&stats).map(Some);
    }
    if others.iter().any(|path: &PathBuf| path.exists()) {
        return Err(QueryError::NoSocket);
    }
    Ok(None)
}

/// Asks the daemon whose stats socket is at `path`. Fails within seconds if there is no answer.
///
/// # Errors
/// There is no answer, or it is not a daemon's.
pub(super) fn one(path: &Path) -> Result<Snapshot, QueryError> {
    parse(&request(path)?)
}

/// Asks for JSON and returns the HTTP response.
fn request(path: &Path) -> Result<Vec<u8>, QueryError> {
    let limit = Duration::from_secs(ANSWER_SECONDS.into());
    let deadline = Instant::now() + limit;
    let mut stream = socket::connect(path, Some(limit)).map_err(classify)?;
    let request = format!(
        "GET {} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        json::PATH
    );
    stream.write_all(request.as_bytes()).map_err(classify)?;
    let mut answer = Vec::new();
    let mut part = vec![0; BLOCK];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(QueryError::Timeout);
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part) {
            Ok(0) => return Ok(answer),
            Ok(count) => answer.extend_from_slice(&part[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(classify(error)),
        }
        if answer.len() > MAX_ANSWER {
            return Err(QueryError::Foreign("its answer does not end".into()));
        }
    }
}

/// Tells an expired timeout and a closed connection from other errors of the socket.
fn classify(error: io::Error) -> QueryError {
    match error.kind() {
        ErrorKind::WouldBlock => QueryError::Timeout,
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
            QueryError::Foreign("it closes the connection".into())
        }
        _ => QueryError::Io(error),
    }
}

/// Parses an HTTP response.
fn parse(response: &[u8]) -> Result<Snapshot, QueryError> {
    let foreign = |why: &str| QueryError::Foreign(why.to_owned());
    let end = b"\r\n\r\n";
    let header = response
        .windows(end.len())
        .position(|window| window == end)
        .filter(|_| response.starts_with(b"HTTP/1."))
        .ok_or_else(|| foreign("it does not answer with HTTP"))?;
    let status = response[..header].split(u8::is_ascii_whitespace).nth(1);
    if status != Some(b"200") {
        return Err(foreign("its HTTP status is not 200"));
    }
    let snapshot: Snapshot = serde_json::from_slice(&response[header + end.len()..])
        .map_err(|error| QueryError::Foreign(format!("unexpected JSON: {error}")))?;
    match snapshot.vms.is_empty() {
        true => Err(foreign("its JSON has no VM")),
        false => Ok(snapshot),
    }
}
