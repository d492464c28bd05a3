//! What the service manager keeps from one daemon to the next.
//!
//! A descriptor that is stored may hold others: a parcel stands in a socket, and the socket is what is stored. So a thousand
//! connections take five places in the store.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};

use log::warn;
use nix::sys::socket::MsgFlags;
use rustix::net::RecvFlags;

use super::names::StoredName;
use super::parcels::{self, Opened, Parcel, ParcelError};
use crate::daemon::service::ServiceManager;
use crate::host::listener::take_inherited;

/// Stores all parcels, or none. Returns how many descriptors could not be stored.
pub(super) fn store(manager: &ServiceManager, parcels: Vec<Parcel<'_>>) -> io::Result<usize> {
    let mut missing = 0;
    let mut stored = Vec::new();
    for mut parcel in parcels {
        let name = StoredName::Parcel(parcel.number()).to_string();
        let sent = parcel.send(
            |text, fds| {
                let (ours, theirs) = parcels::pair()?;
                parcels::send_message(ours.as_fd(), text, fds, MsgFlags::MSG_DONTWAIT)?;
                // The other end is closed at once: that is no reason to drop it.
                manager.store(&name, theirs.as_fd(), false)
            },
            parcels::is_nested,
        );
        stored.push(name);
        match sent {
            Ok(count) => missing += count,
            Err(error) => {
                // They would be taken for a part of something later.
                forget(manager, &stored);
                return Err(error);
            }
        }
    }
    Ok(missing)
}

/// Makes the manager close what it keeps under these names.
pub(super) fn forget(manager: &ServiceManager, names: &[String]) {
    for name in names {
        if let Err(error) = manager.forget(name) {
            return warn!("the service manager may keep {name} and more: {error}");
        }
    }
}

/// What the manager has passed to this process.
#[derive(Debug, Default)]
pub(super) struct Stored {
    /// The sockets with parcels, by their numbers.
    pub(super) parcels: BTreeMap<u32, OwnedFd>,
    /// What is kept for a crash. There is one of each name, or the manager was told something twice.
    pub(super) kept: Vec<(StoredName, OwnedFd)>,
    /// The names of all that makes no sense.
    pub(super) strange: Vec<String>,
}

impl Stored {
    /// Takes descriptors, which are closed where they were.
    pub(super) fn take(passed: &[(RawFd, String)]) -> Self {
        let mut stored = Self::default();
        for (number, name) in passed {
            let fd = match take_inherited(*number) {
                Ok(fd) => fd,
                Err(error) => {
                    warn!("descriptor {number} ({name}): {error}");
                    stored.strange.push(name.clone());
                    continue;
                }
            };
            match name.parse() {
                Ok(StoredName::Parcel(number)) => {
                    if stored.parcels.insert(number, fd).is_some() {
                        stored.strange.push(name.clone());
                    }
                }
                Ok(kept) => stored.kept.push((kept, fd)),
                Err(()) => stored.strange.push(name.clone()),
            }
        }
        stored
    }

    /// The names of the parcels.
    pub(super) fn names(&self) -> Vec<String> {
        let numbers = self.parcels.keys();
        numbers
            .map(|number| StoredName::Parcel(*number).to_string())
            .collect()
    }

    /// Opens the parcels, and leaves them to the next if this process dies.
    pub(super) fn open(&self) -> Result<Opened, ParcelError> {
        let mut opened = Opened::default();
        for socket in self.parcels.values() {
            let (label, fds) = parcels::peek(socket.as_fd())?;
            opened.open(&label, fds)?;
        }
        Ok(opened)
    }

    /// Closes what is in the parcels. The service manager has copies of their sockets for some time yet, and what listens at this
    /// process's paths would be taken for another daemon.
    pub(super) fn discard(&self) {
        for socket in self.parcels.values() {
            // What can't be received has no descriptors.
            let _ = parcels::receive_message(socket.as_fd(), RecvFlags::DONTWAIT);
        }
    }
}
