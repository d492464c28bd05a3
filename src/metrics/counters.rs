//! What the daemon counts. The data path increments these where a thing happens; how they are reported is not known here.
//!
//! The serde names of the fields are the members of the JSON that the stats socket answers with. It is extended by adding
//! members: a reader ignores those it does not know, and counters that are missing are 0. None is renamed or removed.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::memory::give_back;
use crate::packet::header::{Cid, GuestPort, PeerAddr};

/// An end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The guest program.
    Guest,
    /// The host program.
    Host,
    /// Another guest's program.
    Sibling,
}

impl Side {
    /// Every side, in the order of their discriminants.
    pub const ALL: [Self; 3] = [Self::Guest, Self::Host, Self::Sibling];

    /// The name that it is exported by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Host => "host",
            Self::Sibling => "sibling",
        }
    }
}

/// Why a connection was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// Both programs have finished, and all their data was delivered.
    Done,
    /// The guest refused it. What the guest asks for and nobody accepts was no connection, and is counted elsewhere.
    Refused,
    /// The guest aborted it with an RST.
    GuestReset,
    /// The guest violated the protocol: an operation that the state does not allow, more data than its credit, an unknown
    /// type.
    Protocol,
    /// The host program has closed its socket, or the system failed: an error of the socket, no memory for its data.
    HostGone,
    /// The guest did not answer in time.
    Timeout,
    /// It was closed to make room for another one, at the limit of connections.
    Evicted,
    /// The guest's driver reset the device, or the VMM disconnected.
    DeviceReset,
    /// A message of the host program is longer than the guest's receive buffer.
    MessageTooLong,
}

impl CloseReason {
    /// Every reason, in the order of their discriminants.
    pub const ALL: [Self; 9] = [
        Self::Done,
        Self::Refused,
        Self::GuestReset,
        Self::Protocol,
        Self::HostGone,
        Self::Timeout,
        Self::Evicted,
        Self::DeviceReset,
        Self::MessageTooLong,
    ];

    /// The name that it is exported by.
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
            Self::MessageTooLong => "message_too_long",
        }
    }

    /// What it means for a call that was not answered yet, where a VMM is connected.
    pub fn failure(self) -> CallFailure {
        match self {
            Self::Refused => CallFailure::NobodyListens,
            Self::Timeout => CallFailure::Timeout,
            Self::Evicted => CallFailure::Limit,
            Self::DeviceReset => CallFailure::NoDriver,
            Self::Done
            | Self::GuestReset
            | Self::Protocol
            | Self::HostGone
            | Self::MessageTooLong => CallFailure::Other,
        }
    }
}

/// Why a call came to nothing: no connection was made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallFailure {
    /// No VMM is connected.
    NoVmm,
    /// The guest's driver has not started the device.
    NoDriver,
    /// Nobody listens on the port, in the guest or on the host.
    NobodyListens,
    /// A limit of the daemon's is reached.
    Limit,
    /// The called side has not answered in time.
    Timeout,
    /// The caller has not said which port it wants: no valid CONNECT line, or none in time.
    NoLine,
    /// Anything else: the caller has left, it may not call, the system has failed.
    Other,
}

impl CallFailure {
    /// Every failure, in the order of their discriminants.
    pub const ALL: [Self; 7] = [
        Self::NoVmm,
        Self::NoDriver,
        Self::NobodyListens,
        Self::Limit,
        Self::Timeout,
        Self::NoLine,
        Self::Other,
    ];

    /// The name that it is exported by, and that a client is told.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoVmm => "no_vmm",
            Self::NoDriver => "no_driver",
            Self::NobodyListens => "nobody_listens",
            Self::Limit => "limit",
            Self::Timeout => "timeout",
            Self::NoLine => "no_line",
            Self::Other => "other",
        }
    }
}

/// Calls that failed, by the side that called, in the order of [`Side::ALL`], and by [`CallFailure`].
pub type FailedCalls = [[u64; CallFailure::ALL.len()]; Side::ALL.len()];

/// The packets in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Traffic {
    /// Packets of any operation.
    pub packets: u64,
    /// Bytes of payload in them.
    pub bytes: u64,
}

/// The counters of one VM's device, since the daemon started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// VMMs that have connected.
    pub sessions: u64,
    /// Kicks seen. Several that arrive before the worker reads the eventfd are one.
    pub kicks: u64,
    /// Interrupts sent to the guest.
    pub interrupts: u64,
    /// Packets from the guest.
    pub from_guest: Traffic,
    /// Packets to the guest.
    pub to_guest: Traffic,
    /// Connections opened, by the side that opened them, in the order of [`Side::ALL`].
    #[serde(with = "by_side")]
    pub opened: [u64; Side::ALL.len()],
    /// Connections closed, by the reason, in the order of [`CloseReason::ALL`].
    #[serde(with = "by_reason")]
    pub ended: [u64; CloseReason::ALL.len()],
    /// Connection requests of the guest that were refused: nobody listens or answers in time, or the limit is reached.
    pub refused: u64,
    /// Calls that came to nothing, by the side that called and the reason. Those of the guest are the ones in `refused`.
    #[serde(with = "by_failure")]
    pub failed: FailedCalls,
    /// Host programs and siblings that have connected.
    pub clients: u64,
    /// Those of them that were closed before they had a connection: no valid CONNECT line, or a limit was reached.
    pub clients_dropped: u64,
    /// RSTs to the guest.
    pub resets: u64,
    /// Those of them that were dropped because the guest provided no buffers.
    pub resets_lost: u64,
    /// How often data of a host program had to wait for credit from the guest.
    pub credit_stalls: u64,
    /// Malformed descriptor chains from the guest: no packet in a TX chain, no usable buffer in an RX chain.
    pub malformed: u64,
    /// Packets from the guest that were dropped because their source CID is not its own.
    pub foreign: u64,
    /// How often host programs had to wait because the daemon was out of file descriptors.
    pub shortages: u64,
}

/// The state of one connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionStats {
    /// The guest's port.
    pub guest_port: GuestPort,
    /// The other end.
    pub peer: PeerAddr,
    /// It carries messages. A stream may have the same addresses.
    #[serde(default)]
    pub seqpacket: bool,
    /// The name of its state.
    pub state: Cow<'static, str>,
    /// Bytes received from the guest.
    pub from_guest: u64,
    /// Bytes sent to the guest.
    pub to_guest: u64,
    /// Bytes from the guest that the host program has not taken yet.
    pub buffered: usize,
    /// Bytes that the guest has room for, by its credit.
    pub credit: usize,
    /// The side that keeps the other one waiting, if any does.
    pub waits_for: Option<Side>,
    /// How long ago it was requested, in seconds. Older daemons do not say.
    #[serde(default)]
    pub age: Option<u64>,
}

/// The device of one VM at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSnapshot {
    /// The guest's CID.
    pub cid: Cid,
    /// Whether a VMM is connected.
    pub vmm_connected: bool,
    /// Whether the guest's driver has started the device.
    #[serde(default)]
    pub driver_started: bool,
    /// Host programs that have connected and not named a port yet.
    pub handshaking: usize,
    /// Host programs that wait for the guest to accept them, where they may.
    #[serde(default)]
    pub waiting: usize,
    /// Its counters.
    pub counters: Counters,
    /// Its connections, in no particular order. Must stay the last field, see `json`.
    pub connections: Vec<ConnectionStats>,
}

impl Drop for VmSnapshot {
    fn drop(&mut self) {
        give_back(&mut self.connections);
    }
}

/// Every VM of the process at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The version of the daemon. Older ones do not say.
    #[serde(default)]
    pub version: Option<Cow<'static, str>>,
    /// The VMs, in the order of the configuration. Must stay the last field, see `json`.
    pub vms: Vec<VmSnapshot>,
}

impl Snapshot {
    /// The VMs of a daemon of this version.
    pub fn new(vms: Vec<VmSnapshot>) -> Self {
        Self {
            version: Some(env!("CARGO_PKG_VERSION").into()),
            vms,
        }
    }
}

impl From<VmSnapshot> for Snapshot {
    fn from(vm: VmSnapshot) -> Self {
        Self::new(vec![vm])
    }
}

/// An array of counters as a map by the names of its indices.
mod by_name {
    use std::collections::HashMap;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer, const N: usize>(
        names: [&str; N],
        counts: &[u64; N],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(names.iter().zip(counts))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>, const N: usize>(
        names: [&str; N],
        deserializer: D,
    ) -> Result<[u64; N], D::Error> {
        let counts = HashMap::<String, u64>::deserialize(deserializer)?;
        Ok(names.map(|name| counts.get(name).copied().unwrap_or_default()))
    }
}

mod by_side {
    use serde::{Deserializer, Serializer};

    use super::{Side, by_name};

    const SIDES: usize = Side::ALL.len();

    pub(super) fn serialize<S: Serializer>(
        counts: &[u64; SIDES],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        by_name::serialize(Side::ALL.map(Side::name), counts, serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<[u64; SIDES], D::Error> {
        by_name::deserialize(Side::ALL.map(Side::name), deserializer)
    }
}

mod by_reason {
    use serde::{Deserializer, Serializer};

    use super::{CloseReason, by_name};

    const REASONS: usize = CloseReason::ALL.len();

    pub(super) fn serialize<S: Serializer>(
        counts: &[u64; REASONS],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        by_name::serialize(CloseReason::ALL.map(CloseReason::name), counts, serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<[u64; REASONS], D::Error> {
        by_name::deserialize(CloseReason::ALL.map(CloseReason::name), deserializer)
    }
}

/// A map by side of maps by failure.
mod by_failure {
    use std::collections::{BTreeMap, HashMap};

    use serde::{Deserialize, Deserializer, Serializer};

    use super::{CallFailure, FailedCalls, Side};

    pub(super) fn serialize<S: Serializer>(
        failed: &FailedCalls,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let of_side = |(side, counts): (Side, &[u64; CallFailure::ALL.len()])| {
            let names = CallFailure::ALL.map(CallFailure::name).into_iter();
            let counts: BTreeMap<&str, u64> = names.zip(counts.iter().copied()).collect();
            (side.name(), counts)
        };
        serializer.collect_map(Side::ALL.into_iter().zip(failed).map(of_side))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<FailedCalls, D::Error> {
        let failed = HashMap::<String, HashMap<String, u64>>::deserialize(deserializer)?;
        let count = |side: Side, failure: CallFailure| {
            let of_side = failed.get(side.name());
            of_side.and_then(|counts| counts.get(failure.name()).copied())
        };
        Ok(Side::ALL
            .map(|side| CallFailure::ALL.map(|failure| count(side, failure).unwrap_or_default())))
    }
}
