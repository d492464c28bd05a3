//! What an event of the worker's epoll set belongs to.

/// Names an entry of a table. A slot is used again, with another serial number, so that an event for an entry that is gone
/// finds nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token {
    /// Where in the table.
    pub slot: u32,
    /// Which of the slot's users, modulo 2^24: an event does not wait that long.
    pub serial: u32,
}

/// The source of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventSource {
    /// A ring's kick: this ring.
    Kick(u32),
    /// The listening socket of this number.
    Listener(u32),
    /// The timer for the next deadline.
    Timer,
    /// Another thread wants the worker to take a turn.
    Wake,
    /// A host program that has not named a port yet.
    Client(Token),
    /// A connection's socket.
    Connection(Token),
}

const SERIAL_MASK: u32 = 0x00ff_ffff;

impl Token {
    fn number(self) -> u64 {
        u64::from(self.serial & SERIAL_MASK) << 32 | u64::from(self.slot)
    }

    fn from_number(number: u64) -> Self {
        Self {
            slot: number as u32,
            serial: (number >> 32) as u32 & SERIAL_MASK,
        }
    }

    /// The next serial number behind this one.
    pub(super) fn next_serial(serial: u32) -> u32 {
        serial.wrapping_add(1) & SERIAL_MASK
    }
}

impl EventSource {
    /// The number that stands for it in an epoll event.
    pub fn to_data(self) -> u64 {
        let (kind, number) = match self {
            Self::Kick(ring) => (0, ring.into()),
            Self::Listener(number) => (1, number.into()),
            Self::Timer => (2, 0),
            Self::Wake => (3, 0),
            Self::Client(token) => (4, token.number()),
            Self::Connection(token) => (5, token.number()),
        };
        kind << 56 | number
    }

    /// The source that a number from [`EventSource::to_data`] stands for.
    pub fn from_data(data: u64) -> Option<Self> {
        let token = Token::from_number(data);
        match data >> 56 {
            0 => Some(Self::Kick(data as u32)),
            1 => Some(Self::Listener(data as u32)),
            2 => Some(Self::Timer),
            3 => Some(Self::Wake),
            4 => Some(Self::Client(token)),
            5 => Some(Self::Connection(token)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_as_numbers() {
        let token = Token {
            slot: u32::MAX,
            serial: SERIAL_MASK,
        };
        for source in [
            EventSource::Kick(1),
            EventSource::Listener(2),
            EventSource::Timer,
            EventSource::Wake,
            EventSource::Client(token),
            EventSource::Connection(Token { slot: 0, serial: 0 }),
            EventSource::Connection(token),
        ] {
            assert_eq!(EventSource::from_data(source.to_data()), Some(source));
        }
        assert_eq!(EventSource::from_data(u64::MAX), None);
    }
}
