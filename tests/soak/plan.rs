//! What happens, drawn from the seed: lives of a VMM, rounds of connections in each, and what befalls the guest meanwhile.

use std::fmt;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

/// The most bytes that one end sends.
const MAX_BYTES: usize = 16 << 20;

/// The most bytes of one write, or of a message. Some are larger than any packet.
pub const MAX_WRITE: usize = 1 << 18;

/// The longest time for which an end does not read, or a guest does nothing. Linux forgets a connection that its peer has
/// closed 8 s later, with what was not read by then.
const MAX_STALL: u64 = 800;

/// The most connections of a flood.
const MAX_FLOOD: usize = 500;

/// In milliseconds, within which all connections of a round begin, and all that befalls the guest.
const ROUND: u64 = 1500;

/// One of the two ends of a connection. Between siblings, one of the two guests is the host.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Side {
    Guest,
    Host,
}

impl Side {
    pub fn other(self) -> Self {
        match self {
            Self::Guest => Self::Host,
            Self::Host => Self::Guest,
        }
    }
}

/// How a connection goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd)]
pub enum Kind {
    /// Both ends send, close their writing sides and read to the end.
    Exchange,
    /// The guest closes behind its last byte, while the host sends.
    GuestCloses,
    /// The host closes behind its last byte, while the guest sends.
    HostCloses,
    /// The guest resets the connection, while the host sends.
    GuestResets,
    /// The host sends its line and its bytes and closes, without waiting for the answer.
    HostRushes,
    /// The host gives up within the line.
    LineCut,
    /// Nobody listens.
    Refused,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exchange => "exchanged",
            Self::GuestCloses => "closed by the guest",
            Self::HostCloses => "closed by the host",
            Self::GuestResets => "reset by the guest",
            Self::HostRushes => "rushed",
            Self::LineCut => "cut in the handshake",
            Self::Refused => "refused",
        })
    }
}

/// What an end does behind its last byte.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ending {
    /// Closes its writing side, reads to the end and closes.
    HalfClose,
    /// Closes at once, with what has come for it unread.
    Close,
    /// Resets the connection.
    Reset,
    /// There is none: it sends until the other end is gone.
    Endless,
}

impl Ending {
    /// Whether the other end may find its bytes unwanted.
    pub fn is_abrupt(self) -> bool {
        matches!(self, Self::Close | Self::Reset)
    }
}

/// What one end of a connection does.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// How many bytes it sends.
    pub bytes: usize,
    /// The most bytes of one write.
    pub write: usize,
    /// After how many bytes it stops to read for a while.
    pub stall_at: usize,
    /// How long.
    pub stall: Duration,
    pub ending: Ending,
}

/// A connection to be.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its name, and what its bytes depend on.
    pub number: u32,
    pub kind: Kind,
    pub opener: Side,
    /// It carries messages: each write is one.
    pub messages: bool,
    /// When it begins, from the beginning of the round.
    pub delay: Duration,
    pub guest: Part,
    pub host: Part,
}

impl Plan {
    /// The port where the end that is no opener listens. Every connection has one of its own.
    pub fn port(&self) -> u32 {
        20_000 + self.number
    }

    pub fn part(&self, side: Side) -> &Part {
        match side {
            Side::Guest => &self.guest,
            Side::Host => &self.host,
        }
    }

    /// Whether one end listens for the other.
    pub fn is_met(&self) -> bool {
        !matches!(self.kind, Kind::LineCut | Kind::Refused)
    }

    /// Whether the guest has anything to do with it.
    pub fn concerns_guest(&self) -> bool {
        self.is_met() || self.opener == Side::Guest
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, kind, .. } = self;
        let what = if self.messages {
            "messages"
        } else {
            "connection"
        };
        write!(
            f,
            "{what} {number}, opened by the {:?}, {kind}",
            self.opener
        )
    }
}

/// What befalls a guest.
#[derive(Clone, Copy, Debug)]
pub enum Blow {
    /// It returns no RX buffers for a while.
    NoBuffers(Duration),
    /// The VMM pauses it for a while.
    Paused(Duration),
    /// It requests so many connections at once where nobody listens.
    Refused(usize),
    /// It opens so many connections at once to a host program that closes them.
    Accepted(usize),
    /// So many host programs ask for one of its ports and leave at once.
    Deserted(usize),
    /// Another daemon takes over.
    HandedOver,
    /// The daemon is killed, and another is started.
    Crashed,
    /// The VMM is killed.
    Killed,
}

impl Blow {
    /// How many connections it is made of.
    pub fn connections(self) -> usize {
        match self {
            Self::Refused(count) | Self::Accepted(count) | Self::Deserted(count) => count,
            Self::NoBuffers(_)
            | Self::Paused(_)
            | Self::HandedOver
            | Self::Crashed
            | Self::Killed => 0,
        }
    }
}

/// Connections at once, and what befalls the guest at which time.
#[derive(Clone, Debug)]
pub struct Round {
    pub plans: Vec<Plan>,
    pub blows: Vec<(Duration, Blow)>,
}

/// What a guest can do, which sets what is drawn for it.
#[derive(Clone, Copy, Debug)]
pub struct Abilities {
    /// Connections in a round.
    pub connections: usize,
    /// Its programs can reset a connection.
    pub resets: bool,
    /// They connect for messages too.
    pub messages: bool,
    /// The other end is a program that writes CONNECT lines.
    pub lines: bool,
    /// What may befall it for a time, or with so many connections, besides its end.
    pub blows: fn(Duration, usize) -> Vec<Blow>,
}

/// Draws what happens.
pub struct Dice {
    rng: SmallRng,
    abilities: Abilities,
    connections: u32,
}

impl Dice {
    /// Everything that is drawn follows from `seed`.
    pub fn new(seed: u64, abilities: Abilities) -> Self {
        Self {
            rng: SmallRng::seed_from_u64(seed),
            abilities,
            connections: 0,
        }
    }

    /// How many rounds a VMM lives.
    pub fn life(&mut self) -> usize {
        self.rng.random_range(1..=4)
    }

    /// Any of `things`.
    pub fn one_of<'a, T>(&mut self, things: &'a [T]) -> &'a T {
        things.choose(&mut self.rng).unwrap()
    }

    /// Whether a VMM goes before its guest has begun to use the device.
    pub fn is_stillborn(&mut self) -> bool {
        self.rng.random_bool(0.2)
    }

    /// The next round. In the last of its life the VMM is killed.
    pub fn round(&mut self, is_last: bool) -> Round {
        let plans = (0..self.abilities.connections)
            .map(|_| self.plan())
            .collect();
        let mut blows: Vec<_> = (0..self.rng.random_range(0..=3))
            .map(|_| {
                let stall = self.stall();
                let flood = self.rng.random_range(1..=MAX_FLOOD);
                let kinds = (self.abilities.blows)(stall, flood);
                (self.moment(), *self.one_of(&kinds))
            })
            .collect();
        blows.sort_by_key(|(moment, _)| *moment);
        if is_last {
            // Now and then all connections have ended by then.
            let moment = self.rng.random_range(0..=2 * ROUND);
            blows.retain(|(earlier, _)| earlier.as_millis() < moment.into());
            blows.push((Duration::from_millis(moment), Blow::Killed));
        }
        Round { plans, blows }
    }

    fn plan(&mut self) -> Plan {
        use Kind::*;
        const KINDS: [Kind; 12] = [
            Exchange,
            Exchange,
            Exchange,
            Exchange,
            GuestCloses,
            GuestCloses,
            HostCloses,
            HostCloses,
            GuestResets,
            HostRushes,
            LineCut,
            Refused,
        ];
        self.connections += 1;
        let kind = match *self.one_of(&KINDS) {
            GuestResets if !self.abilities.resets => GuestCloses,
            HostRushes if !self.abilities.lines => HostCloses,
            LineCut if !self.abilities.lines => Refused,
            kind => kind,
        };
        let (guest, host) = match kind {
            GuestCloses => (Ending::Close, self.ending_of_the_left()),
            HostCloses => (self.ending_of_the_left(), Ending::Close),
            GuestResets => (Ending::Reset, self.ending_of_the_left()),
            HostRushes => (Ending::HalfClose, Ending::Close),
            Exchange | LineCut | Refused => (Ending::HalfClose, Ending::HalfClose),
        };
        let opener = match kind {
            HostRushes | LineCut => Side::Host,
            _ if self.rng.random_bool(0.5) => Side::Host,
            _ => Side::Guest,
        };
        let mut plan = Plan {
            number: self.connections,
            kind,
            opener,
            messages: self.abilities.messages && self.rng.random_bool(0.5),
            delay: self.moment(),
            guest: self.part(guest),
            host: self.part(host),
        };
        if kind == HostRushes {
            // Without a byte there would be nobody to connect for.
            plan.host.bytes = plan.host.bytes.max(1);
        }
        plan
    }

    /// An end whose peer leaves is taken by surprise, or has nothing more to say.
    fn ending_of_the_left(&mut self) -> Ending {
        *self.one_of(&[Ending::Endless, Ending::HalfClose])
    }

    fn part(&mut self, ending: Ending) -> Part {
        let bytes = match self.rng.random_range(0..8) {
            0 => 0,
            _ => any_size(&mut self.rng, MAX_BYTES),
        };
        Part {
            bytes,
            // Large enough for few thousand writes.
            write: any_size(&mut self.rng, MAX_WRITE).max(bytes / 1000),
            stall_at: any_size(&mut self.rng, MAX_BYTES),
            stall: self.stall(),
            ending,
        }
    }

    fn stall(&mut self) -> Duration {
        Duration::from_millis(self.rng.random_range(1..=MAX_STALL))
    }

    fn moment(&mut self) -> Duration {
        Duration::from_millis(self.rng.random_range(0..ROUND))
    }
}

/// A size from 1 to `most`, small ones as often as large ones.
pub fn any_size(rng: &mut SmallRng, most: usize) -> usize {
    (most as f64).powf(rng.random::<f64>()) as usize
}
