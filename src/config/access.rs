//! Who may connect to a socket: the mode and the group of its file. Connecting takes write permission (unix(7)).

use std::str::FromStr;

use nix::unistd::{Gid, Group};
use thiserror::Error;

/// A mode or a group that can't be read from text.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum AccessError {
    /// Not the permissions of a file.
    #[error("permissions are octal digits, from 0 to 777")]
    Mode,
    /// Neither the name of a group nor a group id.
    #[error("there is no group of this name, and it is not a group id")]
    Group,
    /// The system failed to look the group up.
    #[error("the groups can't be read: {0}")]
    Lookup(nix::Error),
}

/// The permissions of a socket's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketMode(pub u32);

impl SocketMode {
    /// For the owner only.
    pub const OWNER: Self = Self(0o600);
    /// For the owner and the group.
    pub const GROUP: Self = Self(0o660);
}

impl FromStr for SocketMode {
    type Err = AccessError;

    /// Reads octal digits.
    fn from_str(digits: &str) -> Result<Self, AccessError> {
        let is_octal = digits.bytes().all(|digit| (b'0'..b'8').contains(&digit));
        let mode = u32::from_str_radix(digits, 8).ok();
        let mode = mode.filter(|mode| is_octal && *mode <= 0o777);
        mode.map(Self).ok_or(AccessError::Mode)
    }
}

/// The group of a socket's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketGroup(pub Gid);

impl FromStr for SocketGroup {
    type Err = AccessError;

    /// Looks the group up by name. A number that is not a name is a group id.
    fn from_str(name: &str) -> Result<Self, AccessError> {
        let group = Group::from_name(name).map_err(AccessError::Lookup)?;
        // The highest number means "no change" to chown.
        let number = || name.parse().ok().filter(|number| *number != u32::MAX);
        let gid = group.map(|group| group.gid);
        let gid = gid.or_else(|| number().map(Gid::from_raw));
        gid.map(Self).ok_or(AccessError::Group)
    }
}

/// Who may connect to a socket. The default is its owner only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketAccess {
    /// The permissions of its file.
    pub mode: SocketMode,
    /// The group of its file, if not the process's.
    pub group: Option<SocketGroup>,
}

impl SocketAccess {
    /// This mode and group. Without a mode, a group that is given may connect.
    pub fn new(mode: Option<SocketMode>, group: Option<SocketGroup>) -> Self {
        let default = match group {
            Some(_) => SocketMode::GROUP,
            None => SocketMode::OWNER,
        };
        Self {
            mode: mode.unwrap_or(default),
            group,
        }
    }
}

impl Default for SocketAccess {
    fn default() -> Self {
        Self::new(None, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal() {
        for (digits, mode) in [("600", 0o600), ("0660", 0o660), ("0", 0), ("777", 0o777)] {
            assert_eq!(digits.parse(), Ok(SocketMode(mode)), "{digits}");
        }
        for digits in [
            "",
            "1000",
            "0o600",
            "+600",
            "-1",
            "8",
            "rw-",
            "77777777777777",
        ] {
            let mode = digits.parse::<SocketMode>();
            assert_eq!(mode, Err(AccessError::Mode), "{digits}");
        }
    }

    #[test]
    fn a_group_is_a_name_or_a_number() {
        assert_eq!("root".parse(), Ok(SocketGroup(Gid::from_raw(0))));
        assert_eq!("54321".parse(), Ok(SocketGroup(Gid::from_raw(54321))));
        for group in ["", "no such group", "-1", "4294967295", "4294967296"] {
            let read = group.parse::<SocketGroup>();
            assert_eq!(read, Err(AccessError::Group), "{group}");
        }
    }

    #[test]
    fn a_named_group_may_connect() {
        let group = Some(SocketGroup(Gid::from_raw(5)));
        assert_eq!(SocketAccess::new(None, None).mode, SocketMode::OWNER);
        assert_eq!(SocketAccess::new(None, group).mode, SocketMode::GROUP);
        let given = Some(SocketMode(0o640));
        assert_eq!(SocketAccess::new(given, group).mode, SocketMode(0o640));
    }
}
