//! The device's state, as a VMM saves it with a snapshot or takes it to another host (vhost-user, "Migrating back-end state").
//!
//! Connections can't be saved: their host programs stay where they are. So there is little in it, and who loads it loses all
//! connections. The rings are the VMM's to save.
//!
//! ```json
//! {"version":1,"guest_cid":4}
//! ```

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::packet::header::Cid;
use crate::saved::{LoadError, Loader, SavedFd, Saver};
use crate::syscalls::Syscall;

/// To read a state and to write one.
pub(super) const SYSCALLS: &[Syscall] =
    &[Syscall::any(libc::SYS_read), Syscall::any(libc::SYS_write)];

/// The version that is written, and the only one that is understood.
const VERSION: u32 = 1;

/// The longest state that is read, in bytes.
const MAX_LEN: u64 = 4096;

/// Why a state can't be saved or loaded.
#[derive(Debug, Error)]
pub(super) enum StateError {
    /// The VMM's end fails.
    #[error("can't be transferred: {0}")]
    Transfer(#[from] io::Error),
    /// The state is not one of ours.
    #[error("can't be understood: {0}")]
    Broken(#[from] serde_json::Error),
    /// Another version has written it.
    #[error("has version {0}, and only {VERSION} is understood")]
    Version(u32),
    /// The predecessor of this daemon could not save it.
    #[error("could not be saved before this daemon took over")]
    BeforeHandOver,
    /// The VMM asks how a transfer has ended that it has not begun.
    #[error("is not being transferred")]
    None,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct DeviceState {
    version: u32,
    /// The CID of the guest that was saved. It may be restored with another.
    guest_cid: Cid,
}

/// A transfer that the VMM has begun (SET_DEVICE_STATE_FD).
#[derive(Debug, Default)]
pub(super) enum Transfer {
    #[default]
    None,
    /// The state was saved, or not.
    Saved(Result<(), StateError>),
    /// The state comes through this file. The VMM has written all when it asks how the transfer has ended.
    Loading(File),
}

/// A transfer in a document.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum TransferState {
    #[default]
    None,
    /// Whether the device's state was saved.
    Saved(bool),
    Loading(SavedFd),
}

impl Transfer {
    pub(super) fn save<'a>(&'a self, saver: &mut Saver<'a>) -> TransferState {
        match self {
            Self::None => TransferState::None,
            Self::Saved(saved) => TransferState::Saved(saved.is_ok()),
            Self::Loading(file) => TransferState::Loading(saver.fd(file.as_fd())),
        }
    }

    pub(super) fn load(state: TransferState, loader: &mut Loader) -> Result<Self, LoadError> {
        Ok(match state {
            TransferState::None => Self::None,
            TransferState::Saved(true) => Self::Saved(Ok(())),
            TransferState::Saved(false) => Self::Saved(Err(StateError::BeforeHandOver)),
            TransferState::Loading(file) => Self::Loading(loader.take_fd(file)?.into()),
        })
    }

    /// Writes the state of a guest's device.
    pub(super) fn write(guest_cid: Cid, mut file: File) -> Self {
        let version = VERSION;
        let saved = serde_json::to_vec(&DeviceState { version, guest_cid });
        let saved = saved.map_err(StateError::from);
        Self::Saved(saved.and_then(|bytes| Ok(file.write_all(&bytes)?)))
    }

    /// How the transfer has ended (CHECK_DEVICE_STATE). The CID of the guest that was loaded, if one was.
    pub(super) fn finish(self) -> Result<Option<Cid>, StateError> {
        match self {
            Self::None => Err(StateError::None),
            Self::Saved(saved) => saved.map(|()| None),
            Self::Loading(file) => load(file).map(|state| Some(state.guest_cid)),
        }
    }
}

fn load(file: impl Read) -> Result<DeviceState, StateError> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let mut bytes = Vec::new();
    file.take(MAX_LEN).read_to_end(&mut bytes)?;
    let Versioned { version } = serde_json::from_slice(&bytes)?;
    if version != VERSION {
        return Err(StateError::Version(version));
    }
    Ok(serde_json::from_slice(&bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_version_is_read_for_ever() {
        let state = load(&br#"{"version":1,"guest_cid":4}"#[..]).unwrap();
        let guest_cid = Cid::from_raw(4);
        assert_eq!(
            state,
            DeviceState {
                version: 1,
                guest_cid
            }
        );
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let message = |bytes: &[u8]| load(bytes).unwrap_err().to_string();
        assert!(message(br#"{"version":2,"other":4}"#).contains("has version 2"));
        for broken in [
            &b""[..],
            b"{}",
            br#"{"version":1}"#,
            b"[1]",
            &[b'['; 1 << 16],
        ] {
            assert!(message(broken).contains("can't be understood"));
        }
    }
}
