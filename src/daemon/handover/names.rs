//! The names of what a daemon stores with the service manager.

use std::fmt;
use std::str::FromStr;

/// What every name begins with.
const PREFIX: &str = "handover-";

/// What a descriptor is that was stored. With several VMs, the CID says whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StoredName {
    /// `handover-<n>`: a socket from which a parcel can be received. All of them together are the state at a stop.
    Parcel(u32),
    /// `handover-<cid>-state`: the document of what is kept for a crash.
    State(u32),
    /// `handover-<cid>-connections`: the list of open port pairs.
    Connections(u32),
    /// `handover-<cid>-<number>`: a descriptor that the document names.
    Kept {
        /// The guest's CID.
        cid: u32,
        /// The descriptor's number in the document.
        number: u32,
    },
}

/// Whether a descriptor with this name was stored, and is no socket to listen on.
pub fn is_stored(name: &str) -> bool {
    name.starts_with(PREFIX)
}

impl fmt::Display for StoredName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        match self {
            Self::Parcel(number) => number.fmt(f),
            Self::State(cid) => write!(f, "{cid}-state"),
            Self::Connections(cid) => write!(f, "{cid}-connections"),
            Self::Kept { cid, number } => write!(f, "{cid}-{number}"),
        }
    }
}

impl FromStr for StoredName {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        let number = |digits: &str| digits.parse::<u32>().map_err(drop);
        let rest = name.strip_prefix(PREFIX).ok_or(())?;
        let Some((cid, what)) = rest.split_once('-') else {
            return Ok(Self::Parcel(number(rest)?));
        };
        let cid = number(cid)?;
        Ok(match what {
            "state" => Self::State(cid),
            "connections" => Self::Connections(cid),
            _ => Self::Kept {
                cid,
                number: number(what)?,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_as_it_was_written() {
        for (text, name) in [
            ("handover-0", StoredName::Parcel(0)),
            ("handover-4-state", StoredName::State(4)),
            ("handover-4-connections", StoredName::Connections(4)),
            ("handover-4-12", StoredName::Kept { cid: 4, number: 12 }),
        ] {
            assert_eq!(text.parse(), Ok(name));
            assert_eq!(name.to_string(), text);
        }
        for text in ["handover-", "handover-x", "handover--1", "handover-4-", "0"] {
            assert_eq!(text.parse::<StoredName>(), Err(()), "{text}");
        }
    }
}
