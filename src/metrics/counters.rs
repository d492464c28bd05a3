//! What the daemon counts, and what it tells of its connections. Whoever sees a thing happen counts it here; how that is
//! shown is not known here.

use crate::packet::header::{GuestPort, HostPort};

/// An end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The guest program.
    Guest,
    /// The host program.
    Host,
}

impl Side {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Guest, Self::Host];

    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Host => "host",
        }
    }
}

/// How a connection came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// Both programs were done, and have all that was sent.
    Done,
    /// The guest refused the host program's connection.
    Refused,
    /// The guest gave it up with an RST.
    GuestReset,
    /// The guest sent what does not fit: an operation out of place, more than its credit, an unknown type.
    Protocol,
    /// The host program is gone, or the system failed: its socket, or memory for its bytes.
    HostGone,
    /// The guest did not answer in time.
    Timeout,
    /// It gave way to another one, at the limit of connections.
    Evicted,
    /// The guest's driver started afresh, or the VMM is gone.
    DeviceReset,
}

impl CloseReason {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Done,
        Self::Refused,
        Self::GuestReset,
        Self::Protocol,
        Self::HostGone,
        Self::Timeout,
        Self::Evicted,
        Self::DeviceReset,
    ];

    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "refused",
            Self::GuestReset => "guest_reset",
            Self::Protocol => "protocol",
            Self::HostGone => "host_gone",
            Self::Timeout => "timeout",
            Self::Evicted => "evicted",
            Self::DeviceReset => "device_reset",
        }
    }
}

/// Packets in one direction, and the bytes of payload in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// How many packets.
    pub packets: u64,
    /// How many bytes.
    pub bytes: u64,
}

/// What has happened since the daemon started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// VMMs that have connected.
    pub sessions: u64,
    /// Kicks seen. Those that come together are one.
    pub kicks: u64,
    /// Interrupts of the guest.
    pub interrupts: u64,
    /// What the guest has sent.
    pub from_guest: Traffic,
    /// What the guest was sent.
    pub to_guest: Traffic,
    /// Connections that were begun, by the one who began: see [`Side::ALL`].
    pub opened: [u64; Side::ALL.len()],
    /// Connections that have ended, by how: see [`CloseReason::ALL`].
    pub ended: [u64; CloseReason::ALL.len()],
    /// Connections the guest asked for in vain: nobody listens, or the limit is reached.
    pub refused: u64,
    /// Host programs that have connected.
    pub clients: u64,
    /// Those of them that were closed before they had a connection: without a CONNECT line, or at a limit.
    pub clients_dropped: u64,
    /// RSTs for the guest.
    pub resets: u64,
    /// Those of them that were dropped, since the guest took none.
    pub resets_lost: u64,
    /// How often a host program's bytes had to wait for credit of the guest's.
    pub credit_stalls: u64,
    /// Chains of the guest's that hold no packet, and buffers that hold none.
    pub malformed: u64,
    /// Packets of the guest's that were dropped for a CID that is not its own.
    pub foreign: u64,
    /// How often host programs had to wait since the daemon had no descriptor left.
    pub shortages: u64,
}

/// A connection at the moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionStats {
    /// The guest's port.
    pub guest_port: GuestPort,
    /// The host's port.
    pub host_port: HostPort,
    /// Where it is in its life.
    pub state: &'static str,
    /// Bytes that the guest has sent.
    pub from_guest: u64,
    /// Bytes that the guest was sent.
    pub to_guest: u64,
    /// Bytes that wait here for the host program.
    pub buffered: usize,
    /// How many bytes the guest would take now.
    pub credit: usize,
    /// Who keeps the other waiting, if anybody.
    pub waits_for: Option<Side>,
}

/// What there is to tell at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// A VMM is connected.
    pub has_vmm: bool,
    /// The counters.
    pub counters: Counters,
    /// Host programs that have not named a port yet.
    pub handshaking: usize,
    /// The connections.
    pub connections: Vec<ConnectionStats>,
}
