//! The cases, and one run of a case against one daemon.

use crate::apps::{After, Requests};
use crate::daemon::{Binary, Daemon, Vms};
use crate::floods::{self, Flood, Measured};
use crate::guest::RING_SIZE;
use crate::limits::Limit;
use crate::measure::{Sample, Timing, key};
use crate::packet::{MAX_PAYLOAD, SocketType};
use crate::session::Session;
use crate::siblings;
use crate::threads::catch_panics;
use crate::traffic::{self, Direction};
use crate::{idle, uml};

/// What a case does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Streams, in writes of `write` bytes.
    Streams {
        /// Where they lead.
        direction: Direction,
        /// Bytes per write.
        write: usize,
    },
    /// Messages.
    Messages {
        /// Where they lead, which is one direction.
        direction: Direction,
        /// Bytes per message.
        size: usize,
    },
    /// As `RequestResponse`, with messages.
    MessageRoundTrip,
    /// A stream from a guest to another.
    Siblings {
        /// Who serves the two.
        vms: Vms,
        /// Bytes per write.
        write: usize,
    },
    /// A program of a guest exchanges a request and a response with a program of another, again and again.
    SiblingRoundTrip(Vms),
    /// A guest program exchanges a request and a response with a host program, again and again.
    RequestResponse,
    /// As `RequestResponse`, with a new connection for each exchange.
    Connect,
    /// So many connections on which host programs send 4 KiB and wait for the echo.
    Echo(usize),
    /// So many connections without traffic.
    Idle(usize),
    /// A stream of a real guest.
    Uml(uml::Stream),
    /// The start of a daemon.
    StartUp,
    /// Traffic beside a flood.
    Flooded {
        /// The traffic.
        measured: Measured,
        /// The flood.
        flood: Flood,
    },
}

/// Which cases run together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// What a user waits for or pays for. These run unless others are chosen.
    Speed,
    /// What one program can take from another. They are for comparing versions of this daemon, and run when asked for.
    Floods,
}

impl Group {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Speed => "speed",
            Self::Floods => "floods",
        }
    }
}

/// A case.
pub struct Case {
    /// Its name on the command line and in the report.
    pub name: &'static str,
    /// What it does.
    pub kind: Kind,
    /// What the machine can do at best.
    pub limit: Option<Limit>,
}

const fn stream(name: &'static str, direction: Direction, write: usize) -> Case {
    let limit = match direction {
        Direction::Both => None,
        // A daemon may merge small writes of the guest, so that a socket pair with the same writes is no limit.
        Direction::ToHost if write < MAX_PAYLOAD => None,
        _ => Some(Limit::SocketPair(write)),
    };
    let kind = Kind::Streams { direction, write };
    Case { name, kind, limit }
}

const fn messages(name: &'static str, direction: Direction, size: usize) -> Case {
    let kind = Kind::Messages { direction, size };
    other(name, kind, Some(Limit::Messages(size)))
}

const fn siblings(name: &'static str, vms: Vms, write: usize) -> Case {
    // Smaller writes may be merged on the way.
    let limit = if write < MAX_PAYLOAD {
        None
    } else {
        Some(Limit::SocketPair(write))
    };
    other(name, Kind::Siblings { vms, write }, limit)
}

const fn other(name: &'static str, kind: Kind, limit: Option<Limit>) -> Case {
    Case { name, kind, limit }
}

const fn real(name: &'static str, to_host: bool, write: usize) -> Case {
    other(name, Kind::Uml(uml::Stream { to_host, write }), None)
}

const fn flooded(name: &'static str, measured: Measured, flood: Flood) -> Case {
    other(name, Kind::Flooded { measured, flood }, None)
}

/// REQUESTs to so many ports on which nobody listens, in so many descriptors of the TX ring.
const fn refused(descriptors: u16, ports: u32) -> Flood {
    Flood::RefusedRequests(Requests { descriptors, ports })
}

/// All cases, in the order of the report.
pub const CASES: &[Case] = &[
    stream("guest to host 64 KiB", Direction::ToHost, 64 << 10),
    stream("guest to host 4 KiB", Direction::ToHost, 4 << 10),
    stream("guest to host 256 B", Direction::ToHost, 256),
    stream("guest to host 64 B", Direction::ToHost, 64),
    stream("host to guest 64 KiB", Direction::ToGuest, 64 << 10),
    stream("host to guest 4 KiB", Direction::ToGuest, 4 << 10),
    stream("host to guest 256 B", Direction::ToGuest, 256),
    stream("host to guest 64 B", Direction::ToGuest, 64),
    stream("both directions 64 KiB", Direction::Both, 64 << 10),
    other(
        "request-response 64 B",
        Kind::RequestResponse,
        Some(Limit::RoundTrip),
    ),
    messages(
        "messages out of the guest, 64 KiB",
        Direction::ToHost,
        64 << 10,
    ),
    messages(
        "messages out of the guest, 4 KiB",
        Direction::ToHost,
        4 << 10,
    ),
    messages("messages out of the guest, 64 B", Direction::ToHost, 64),
    messages(
        "messages into the guest, 64 KiB",
        Direction::ToGuest,
        64 << 10,
    ),
    messages(
        "messages into the guest, 4 KiB",
        Direction::ToGuest,
        4 << 10,
    ),
    messages("messages into the guest, 64 B", Direction::ToGuest, 64),
    other(
        "messages, round trip 64 B",
        Kind::MessageRoundTrip,
        Some(Limit::RoundTrip),
    ),
    siblings("guest to guest 64 KiB", Vms::OneProcess, 64 << 10),
    siblings("guest to guest 4 KiB", Vms::OneProcess, 4 << 10),
    other(
        "guest to guest round trip 64 B",
        Kind::SiblingRoundTrip(Vms::OneProcess),
        None,
    ),
    siblings(
        "guests of two processes 64 KiB",
        Vms::TwoProcesses,
        64 << 10,
    ),
    siblings("guests of two processes 4 KiB", Vms::TwoProcesses, 4 << 10),
    other(
        "guests of two processes, round trip",
        Kind::SiblingRoundTrip(Vms::TwoProcesses),
        None,
    ),
    other("connect-exchange-close", Kind::Connect, None),
    other("100 connections echo 4 KiB", Kind::Echo(100), None),
    other("1000 connections echo 4 KiB", Kind::Echo(1000), None),
    other("1000 idle connections", Kind::Idle(1000), None),
    other("start-up", Kind::StartUp, None),
    real("Linux guest to host 64 KiB", true, 64 << 10),
    real("Linux guest to host 4 KiB", true, 4 << 10),
    real("host to Linux guest 64 KiB", false, 64 << 10),
    real("host to Linux guest 4 KiB", false, 4 << 10),
    flooded("stream out alone", Measured::ToHost, Flood::None),
    flooded(
        "stream out, refused REQUESTs",
        Measured::ToHost,
        refused(RING_SIZE, 1),
    ),
    flooded(
        "stream out, REQUESTs in half the ring",
        Measured::ToHost,
        refused(RING_SIZE / 2, 1),
    ),
    flooded(
        "stream out, REQUESTs to 1000 ports",
        Measured::ToHost,
        refused(RING_SIZE, 1000),
    ),
    flooded(
        "stream out, 64 streams in",
        Measured::ToHost,
        Flood::Streams(64),
    ),
    flooded("stream in alone", Measured::ToGuest, Flood::None),
    flooded(
        "stream in, refused REQUESTs",
        Measured::ToGuest,
        refused(RING_SIZE, 1),
    ),
    flooded(
        "stream in, REQUESTs to 1000 ports",
        Measured::ToGuest,
        refused(RING_SIZE, 1000),
    ),
    flooded(
        "stream in, refused CONNECTs",
        Measured::ToGuest,
        Flood::RefusedConnects,
    ),
    flooded(
        "stream in, accepted CONNECTs",
        Measured::ToGuest,
        Flood::AcceptedConnects,
    ),
    flooded(
        "stream in, 1000 byte writers",
        Measured::ToGuest,
        Flood::Bytes(1000),
    ),
    flooded("echo alone", Measured::Echo, Flood::None),
    flooded(
        "echo, refused REQUESTs",
        Measured::Echo,
        refused(RING_SIZE, 1),
    ),
    flooded(
        "echo, REQUESTs to 1000 ports",
        Measured::Echo,
        refused(RING_SIZE, 1000),
    ),
    flooded(
        "echo, refused CONNECTs",
        Measured::Echo,
        Flood::RefusedConnects,
    ),
    flooded(
        "echo, accepted CONNECTs",
        Measured::Echo,
        Flood::AcceptedConnects,
    ),
    flooded(
        "echo, 1000 byte writers",
        Measured::Echo,
        Flood::Bytes(1000),
    ),
    flooded("echo, 64 streams in", Measured::Echo, Flood::Streams(64)),
    flooded("CONNECT alone", Measured::Connect, Flood::None),
    flooded(
        "CONNECT, refused REQUESTs",
        Measured::Connect,
        refused(RING_SIZE, 1),
    ),
];

impl Case {
    /// The group it belongs to.
    pub fn group(&self) -> Group {
        match self.kind {
            Kind::Flooded { .. } => Group::Floods,
            _ => Group::Speed,
        }
    }

    /// Whether `text` chooses it: the name of its group, or a part of its own.
    pub fn matches(&self, text: &str) -> bool {
        self.group().name() == text || self.name.contains(text)
    }
}

impl Kind {
    /// The key of the main result.
    pub fn headline(self) -> &'static str {
        match self {
            Self::Streams { .. } | Self::Messages { .. } | Self::Siblings { .. } | Self::Uml(_) => {
                key::MIB_PER_S
            }
            Self::Flooded { measured, .. } if measured.is_stream() => key::MIB_PER_S,
            Self::Flooded { .. } => key::P99_US,
            Self::RequestResponse | Self::MessageRoundTrip | Self::SiblingRoundTrip(_) => {
                key::P50_US
            }
            Self::Connect | Self::Echo(_) => key::OPS_PER_S,
            Self::Idle(_) => key::ANON_KIB_PER_CONN,
            Self::StartUp => key::START_UP_MS,
        }
    }

    /// Whether its system calls are counted, in a run of their own.
    pub fn counts_syscalls(self) -> bool {
        !matches!(self, Self::Idle(_) | Self::StartUp | Self::Flooded { .. })
    }

    /// How many VMs it takes.
    fn vms(self) -> Vms {
        match self {
            Self::Siblings { vms, .. } | Self::SiblingRoundTrip(vms) => vms,
            _ => Vms::One,
        }
    }

    /// The type of the guests' sockets.
    fn socket_type(self) -> SocketType {
        match self {
            Self::Messages { .. } | Self::MessageRoundTrip => SocketType::Seqpacket,
            _ => SocketType::Stream,
        }
    }

    /// Runs once against a fresh daemon. With `syscalls`, they are counted, which disturbs all other results.
    pub fn run(self, binary: &Binary, timing: &Timing, syscalls: bool) -> Result<Sample, String> {
        catch_panics(|| {
            let daemon = Daemon::start(binary, self.vms()).map_err(|error| error.to_string())?;
            match self {
                Self::StartUp => idle::start_up(&daemon),
                Self::Uml(stream) => stream.run(daemon, timing, syscalls),
                _ => {
                    let session = Session::begin(daemon, self.socket_type())?;
                    self.run_simulated(session, timing, syscalls)
                }
            }
        })
    }

    fn run_simulated(
        self,
        session: Session,
        timing: &Timing,
        syscalls: bool,
    ) -> Result<Sample, String> {
        match self {
            Self::Streams { direction, write } => {
                traffic::streams(session, direction, write, timing, syscalls)
            }
            Self::Messages { direction, size } => {
                traffic::messages(session, direction, size, timing, syscalls)
            }
            Self::Siblings { write, .. } => siblings::stream(session, write, timing, syscalls),
            Self::SiblingRoundTrip(_) => siblings::round_trip(session, timing, syscalls),
            Self::RequestResponse | Self::MessageRoundTrip => {
                traffic::client(session, After::Continue, timing, syscalls)
            }
            Self::Connect => traffic::client(session, After::Reconnect, timing, syscalls),
            Self::Echo(count) => traffic::echo(session, count, timing, syscalls),
            Self::Idle(count) => idle::idle(session, count, timing),
            Self::Flooded { measured, flood } => floods::run(session, measured, flood, timing),
            Self::StartUp | Self::Uml(_) => Err("this case has no simulated guest".into()),
        }
    }
}
