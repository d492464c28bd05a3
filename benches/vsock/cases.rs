//! What a case is, and one run of a case against one daemon.

use crate::apps::After;
use crate::daemon::{Binary, Daemon, HAND_OVER, Vms};
use crate::failure::Failure;
use crate::floods::{self, Flood, Measured};
use crate::limits::Limit;
use crate::measure::{Sample, Timing, key};
use crate::packet::SocketType;
use crate::quiet::{self, Busy};
use crate::session::Session;
use crate::threads::catch_panics;
use crate::traffic::{self, Direction};
use crate::{fairness, growth, idle, short, siblings, stand_still, uml};

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
    /// Traffic of a real guest.
    Uml(uml::Traffic),
    /// So many connections, one after another but for a few at the same time.
    Short(usize),
    /// Streams in both directions, alone and both at once.
    Fairness {
        /// Whose they are.
        guests: Guests,
        /// Bytes per write.
        write: usize,
    },
    /// Connections with little traffic beside busy ones.
    Quiet {
        /// How many.
        count: usize,
        /// The busy ones.
        busy: Busy,
    },
    /// As `Echo`, with the memory of each connection.
    Growth(usize),
    /// So many daemons, each of which has a guest that does nothing.
    IdleDaemons(usize),
    /// Traffic over a hand-over to another daemon.
    StandStill {
        /// What stands still.
        measured: stand_still::Measured,
        /// How many connections are handed over.
        connections: usize,
    },
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

/// A kind of guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guests {
    /// The simulated one.
    Simulated,
    /// Linux, as a User-Mode Linux kernel.
    Linux,
}

/// Which cases run together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// What a user waits for or pays for. These run unless others are chosen.
    Speed,
    /// What one program can take from another. They are for comparing versions of this daemon, and run when asked for.
    Floods,
    /// Whether one direction, or one busy connection, leaves the others what is theirs.
    Fairness,
    /// What more connections and more daemons cost.
    Growth,
    /// How long traffic stands still when a new daemon takes a VM over.
    HandOver,
}

impl Group {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Speed => "speed",
            Self::Floods => "floods",
            Self::Fairness => "fairness",
            Self::Growth => "growth",
            Self::HandOver => "hand-over",
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

impl Case {
    /// The group it belongs to.
    pub fn group(&self) -> Group {
        match self.kind {
            Kind::Flooded { .. } => Group::Floods,
            Kind::Fairness { .. } | Kind::Quiet { .. } => Group::Fairness,
            Kind::Growth(_) | Kind::IdleDaemons(_) => Group::Growth,
            Kind::StandStill { .. } => Group::HandOver,
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
            Self::Streams { .. }
            | Self::Messages { .. }
            | Self::Siblings { .. }
            | Self::Uml(uml::Traffic::Streams { .. }) => key::MIB_PER_S,
            Self::Flooded { measured, .. } if measured.is_stream() => key::MIB_PER_S,
            Self::Flooded { .. } => key::P99_US,
            Self::RequestResponse
            | Self::MessageRoundTrip
            | Self::SiblingRoundTrip(_)
            | Self::Uml(uml::Traffic::RequestResponse) => key::P50_US,
            Self::Connect | Self::Short(_) | Self::Echo(_) => key::OPS_PER_S,
            Self::Growth(_) => key::US_PER_OP,
            Self::Fairness { .. } => key::KEPT,
            Self::Quiet { .. } => key::P99_US,
            Self::IdleDaemons(_) => key::ANON_KIB,
            Self::StandStill { .. } => key::STILL_P50_MS,
            Self::Idle(_) => key::ANON_KIB_PER_CONN,
            Self::StartUp => key::START_UP_MS,
        }
    }

    /// Whether its system calls are counted, in a run of their own.
    pub fn counts_syscalls(self) -> bool {
        match self {
            Self::Streams { .. } | Self::Messages { .. } | Self::Siblings { .. } => true,
            Self::RequestResponse | Self::MessageRoundTrip | Self::SiblingRoundTrip(_) => true,
            Self::Connect | Self::Echo(_) | Self::Growth(_) | Self::Uml(_) => true,
            Self::Short(_) | Self::Idle(_) | Self::IdleDaemons(_) | Self::StartUp => false,
            Self::Fairness { .. } | Self::Quiet { .. } => false,
            Self::Flooded { .. } | Self::StandStill { .. } => false,
        }
    }

    /// Whether it takes a real guest.
    pub fn takes_linux(self) -> bool {
        let guests = match self {
            Self::Uml(_) => Guests::Linux,
            Self::Fairness { guests, .. } => guests,
            _ => Guests::Simulated,
        };
        guests == Guests::Linux
    }

    /// The option without which a daemon can't run it.
    fn option(self) -> Option<&'static str> {
        match self {
            Self::StandStill { .. } => Some(HAND_OVER),
            _ => self.vms().option(),
        }
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
    pub fn run(self, binary: &Binary, timing: &Timing, syscalls: bool) -> Result<Sample, Failure> {
        if let Some(option) = self.option().filter(|option| !binary.offers(option)) {
            return Err(Failure::Unsupported(format!("no {option}")));
        }
        catch_panics(|| match self {
            Self::Fairness { guests, write } => fairness::run(binary, guests, write, timing),
            Self::IdleDaemons(count) => growth::daemons(binary, count, timing),
            Self::StandStill {
                measured,
                connections,
            } => stand_still::run(binary, measured, connections, timing),
            _ => {
                let daemon = match self {
                    Self::Growth(count) => Daemon::start_for_many(binary, count),
                    _ => Daemon::start(binary, self.vms()),
                };
                let daemon = daemon?;
                self.run_one(daemon, timing, syscalls)
            }
        })
    }

    fn run_one(self, daemon: Daemon, timing: &Timing, syscalls: bool) -> Result<Sample, Failure> {
        match self {
            Self::StartUp => Ok(idle::start_up(&daemon)?),
            Self::Uml(traffic) => Ok(traffic.run(daemon, timing, syscalls)?),
            _ => {
                let session = Session::begin(daemon, self.socket_type())?;
                Ok(self.run_simulated(session, timing, syscalls)?)
            }
        }
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
            Self::Short(count) => short::run(session, count),
            Self::Quiet { count, busy } => quiet::run(session, count, busy, timing),
            Self::Growth(count) => growth::connections(session, count, timing, syscalls),
            Self::StartUp
            | Self::Uml(_)
            | Self::Fairness { .. }
            | Self::IdleDaemons(_)
            | Self::StandStill { .. } => Err("this case is not run this way".into()),
        }
    }
}
