//! The `stats` command: asks a daemon's [stats socket](crate::metrics::socket) for JSON and shows it on a terminal.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, Table, presets};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use thiserror::Error;

use crate::metrics::counters::{CloseReason, ConnectionStats, Side, Snapshot, VmSnapshot};
use crate::metrics::json;
use crate::packet::header::{Cid, PeerAddr};

/// Moves the cursor home and clears the terminal.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// How many seconds the daemon has to accept the connection, and then to answer.
const ANSWER_SECONDS: u32 = 5;

/// The longest answer that is read, in bytes: many times that of 65,536 connections.
const MAX_ANSWER: u64 = 64 << 20;

/// Why there is nothing to show.
#[derive(Debug, Error)]
pub enum StatsError {
    /// The socket can't be reached, or stdout can't be written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The server does not accept the connection, or does not complete its answer.
    #[error("no answer within {ANSWER_SECONDS} seconds")]
    Timeout,
    /// The server is another program, or another socket of a daemon.
    #[error("this is not the stats socket of a vhost-user-vsock daemon: {0}")]
    Foreign(String),
}

/// Prints the statistics of the daemon whose stats socket is at `path`, once or every `every` seconds. A closed pipe at
/// stdout ends it without an error.
pub fn show(path: &Path, every: Option<u32>) -> Result<(), StatsError> {
    loop {
        let page = page(&read(path)?);
        let page = match every {
            Some(_) => format!("{CLEAR}{page}\n"),
            None => format!("{page}\n"),
        };
        match io::stdout().write_all(page.as_bytes()) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            written => written?,
        }
        let Some(seconds) = every else {
            return Ok(());
        };
        thread::sleep(Duration::from_secs(seconds.max(1).into()));
    }
}

/// Reads a snapshot from the stats socket at `path`. Fails within seconds if there is no answer.
pub fn read(path: &Path) -> Result<Snapshot, StatsError> {
    parse(&request(path)?)
}

/// Asks for JSON and returns the HTTP response.
fn request(path: &Path) -> Result<Vec<u8>, StatsError> {
    let mut stream = connect_with_timeout(path).map_err(classify)?;
    let request = format!(
        "GET {} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        json::PATH
    );
    stream.write_all(request.as_bytes()).map_err(classify)?;
    let deadline = Instant::now() + Duration::from_secs(ANSWER_SECONDS.into());
    let mut answer = Vec::new();
    let mut part = vec![0; 64 * 1024];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(StatsError::Timeout);
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part) {
            Ok(0) => return Ok(answer),
            Ok(count) => answer.extend_from_slice(&part[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(classify(error)),
        }
        if answer.len() as u64 > MAX_ANSWER {
            return Err(StatsError::Foreign("its answer does not end".into()));
        }
    }
}

/// Connects with a send timeout, which also applies to `connect`: with a full backlog it would block forever.
fn connect_with_timeout(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let limit = TimeVal::seconds(ANSWER_SECONDS.into());
    setsockopt(&socket, sockopt::SendTimeout, &limit)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}

/// Tells an expired timeout and a closed connection from other errors of the socket.
fn classify(error: io::Error) -> StatsError {
    match error.kind() {
        ErrorKind::WouldBlock => StatsError::Timeout,
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
            StatsError::Foreign("it closes the connection".into())
        }
        _ => StatsError::Io(error),
    }
}

/// Parses an HTTP response.
fn parse(response: &[u8]) -> Result<Snapshot, StatsError> {
    let foreign = |why: &str| StatsError::Foreign(why.to_owned());
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
    serde_json::from_slice(&response[header + end.len()..])
        .map_err(|error| StatsError::Foreign(format!("unexpected JSON: {error}")))
}

/// Lays out all VMs. Where there are several, each is headed by its CID.
fn page(snapshot: &Snapshot) -> String {
    let is_named = snapshot.vms.len() > 1;
    let vms = snapshot.vms.iter().map(|vm| {
        let table = table(&vm.connections);
        let page = format!("{}\n{}", summary(vm), table.trim_end());
        if is_named {
            format!("CID {}: {page}", vm.cid)
        } else {
            page
        }
    });
    vms.collect::<Vec<_>>().join("\n\n")
}

/// The lines above the table: the device, and its connections since the daemon started.
fn summary(vm: &VmSnapshot) -> String {
    let counters = &vm.counters;
    let vmm = if vm.vmm_connected {
        "a VMM is connected"
    } else {
        "no VMM"
    };
    let ended = CloseReason::ALL.iter().zip(counters.ended);
    let ended = ended.filter(|(_, count)| *count > 0);
    let ended: Vec<String> = ended
        .map(|(reason, count)| format!("{count} {}", reason.name()))
        .collect();
    let siblings = match counters.opened[Side::Sibling as usize] {
        0 => String::new(),
        count => format!(", {count} by siblings"),
    };
    format!(
        "{vmm}, {} so far; {} kicks, {} interrupts\n\
         from the guest: {} packets, {}; to the guest: {} packets, {}\n\
         connections: {} now, {} by the guest, {} by host programs{siblings}, {} refused; ended: {}\n\
         resets: {}, {} lost; malformed: {}; foreign: {}; credit stalls: {}; dropped clients: {} of {}\n",
        counters.sessions,
        counters.kicks,
        counters.interrupts,
        counters.from_guest.packets,
        bytes(counters.from_guest.bytes),
        counters.to_guest.packets,
        bytes(counters.to_guest.bytes),
        vm.connections.len(),
        counters.opened[Side::Guest as usize],
        counters.opened[Side::Host as usize],
        counters.refused,
        if ended.is_empty() {
            "none".to_owned()
        } else {
            ended.join(", ")
        },
        counters.resets,
        counters.resets_lost,
        counters.malformed,
        counters.foreign,
        counters.credit_stalls,
        counters.clients_dropped,
        counters.clients,
    )
}

/// The connections, sorted by port.
fn table(connections: &[ConnectionStats]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header([
        "GUEST PORT",
        "HOST PORT",
        "STATE",
        "FROM GUEST",
        "TO GUEST",
        "BUFFERED",
        "CREDIT",
        "WAITS FOR",
    ]);
    for column in [0, 1, 3, 4, 5, 6] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut connections: Vec<&ConnectionStats> = connections.iter().collect();
    connections.sort_by_key(|conn| (conn.guest_port, conn.peer));
    for conn in connections {
        table.add_row([
            conn.guest_port.0.to_string(),
            peer(conn.peer),
            conn.state.to_string(),
            bytes(conn.from_guest),
            bytes(conn.to_guest),
            bytes(conn.buffered as u64),
            bytes(conn.credit as u64),
            conn.waits_for.map_or("nobody", Side::name).to_owned(),
        ]);
    }
    table.to_string()
}

/// A port of the host's, or the address of another guest's.
fn peer(peer: PeerAddr) -> String {
    if peer.cid == Cid::HOST {
        peer.port.0.to_string()
    } else {
        peer.to_string()
    }
}

/// A number of bytes in a readable unit.
fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" {
                format!("{value} B")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}
