//! RSTs that wait for a buffer of the guest's.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::MAX_BATCH;
use super::journal::Listed;
use crate::host::socket::{HostSocket, SocketState};
use crate::packet::header::{Cid, Op, VsockHeader};
use crate::saved::{LoadError, Loader, Saver};
use crate::vsock_conn::ConnKey;
use crate::vsock_conn::saved::{deadline, remaining};

/// How many resets may wait until the guest's packets are left in the TX ring.
pub(super) const MAX_RESETS: usize = 1024;

/// For how many there is always memory.
const KEPT: usize = MAX_BATCH;

/// How long packets are left in the TX ring of a guest that offers no buffer for the resets.
const PATIENCE: Duration = Duration::from_secs(1);

/// The RSTs, in order. Where one ends a connection, its host socket is closed only after the guest has got the RST: when the
/// host program sees the end, the guest's ports must be free.
///
/// No packet is taken whose reset might find no place (virtio 1.2, 5.10.6.1: the device stops where it has no room for replies).
/// Both sides would wait for each other if the driver did the same, so a guest that takes nothing for [`PATIENCE`] loses
/// the oldest resets instead. Resets that no packet has caused always find a place: there is at most one for each connection that
/// the guest knows, and opening one takes a packet.
#[derive(Debug, Default)]
pub(super) struct Resets {
    waiting: VecDeque<(VsockHeader, Held)>,
    /// What is held for those that are in the guest's buffers.
    sent: Vec<Held>,
    /// When the guest begins to lose what exceeds the limit.
    gives_up_at: Option<Instant>,
    gave_up: bool,
}

/// What is given up when the guest has got a reset, or never will.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// The ports in the journal. They go first: once the socket is closed, anybody may know that the connection has ended.
    pub(super) listed: Listed,
    /// The host socket of the connection that it ends.
    pub(super) socket: Option<HostSocket>,
}

impl From<Listed> for Held {
    fn from(listed: Listed) -> Self {
        Self {
            socket: None,
            listed,
        }
    }
}

/// The oldest reset was dropped: there are too many.
#[derive(Debug)]
pub(super) struct Dropped;

/// The RSTs in a document.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct ResetsState {
    waiting: Vec<ResetState>,
    /// The remaining time, in milliseconds.
    gives_up_at: Option<u64>,
    gave_up: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ResetState {
    key: ConnKey,
    #[serde(default)]
    socket: Option<SocketState>,
}

/// The RST for a connection.
pub(super) fn header(guest_cid: Cid, key: ConnKey) -> VsockHeader {
    VsockHeader {
        packet_type: key.packet_type,
        ..VsockHeader::new(guest_cid, key.guest, key.peer, Op::Rst)
    }
}

impl Resets {
    /// Saves them. A socket that is relayed ends here.
    pub(super) fn save<'fd>(&'fd self, saver: &mut Saver<'fd>, now: Instant) -> ResetsState {
        let waiting = self.waiting.iter().map(|(header, held)| ResetState {
            key: ConnKey::of(header),
            socket: held
                .socket
                .as_ref()
                .filter(|socket| !socket.is_relayed())
                .map(|socket| socket.save(saver)),
        });
        ResetsState {
            waiting: waiting.collect(),
            gives_up_at: self.gives_up_at.map(|at| remaining(at, now)),
            gave_up: self.gave_up,
        }
    }

    /// Those that were saved, for the guest `guest_cid`.
    pub(super) fn load(
        state: ResetsState,
        guest_cid: Cid,
        loader: &mut Loader,
        now: Instant,
    ) -> Result<Self, LoadError> {
        let mut waiting = VecDeque::new();
        let reserved = waiting.try_reserve(state.waiting.len());
        reserved.map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        for reset in state.waiting {
            let socket = match reset.socket.map(|socket| HostSocket::load(&socket, loader)) {
                None | Some(Err(LoadError::Lost)) => None,
                Some(socket) => Some(socket?),
            };
            let held = Held {
                socket,
                listed: Listed::default(),
            };
            waiting.push_back((header(guest_cid, reset.key), held));
        }
        let gives_up_at = state.gives_up_at.map(|left| deadline(left, now));
        Ok(Self {
            waiting,
            sent: Vec::new(),
            gives_up_at: gives_up_at.transpose()?,
            gave_up: state.gave_up,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether there is room for the resets that a batch of the guest's packets may cause.
    pub(super) fn has_room(&self) -> bool {
        self.waiting.len() + MAX_BATCH <= MAX_RESETS
    }

    /// Whether the guest has taken nothing for so long that it loses what there is no room for.
    pub(super) fn gave_up(&self) -> bool {
        self.gave_up
    }

    pub(super) fn push(&mut self, header: VsockHeader, held: Held) -> Result<(), Dropped> {
        self.waiting.push_back((header, held));
        if self.gave_up && self.waiting.len() > MAX_RESETS {
            // The guest may offer buffers just now, and wait for the newest.
            self.waiting.pop_front();
            return Err(Dropped);
        }
        Ok(())
    }

    /// The next one, which is in the guest's buffer from now on.
    pub(super) fn pop(&mut self) -> Option<VsockHeader> {
        let (header, held) = self.waiting.pop_front()?;
        if self.waiting.is_empty() {
            self.waiting.shrink_to(KEPT);
        }
        if held.socket.is_some() || held.listed.is_some() {
            self.sent.push(held);
        }
        self.gives_up_at = None;
        self.gave_up = false;
        Some(header)
    }

    /// Gives up what was held for the resets that were sent.
    pub(super) fn close_sent(&mut self) {
        self.sent.clear();
    }

    /// The guest takes no packets now. The sockets are closed: the host programs must not wait for that.
    pub(super) fn starved(&mut self) {
        for (_, held) in &mut self.waiting {
            held.socket = None;
        }
        if !self.has_room() && !self.gave_up && self.gives_up_at.is_none() {
            self.gives_up_at = Some(Instant::now() + PATIENCE);
        }
    }

    /// Lists in the journal what is not there.
    pub(super) fn list_all(&mut self, list: impl Fn(ConnKey) -> Listed) {
        for (header, held) in &mut self.waiting {
            held.listed = list(ConnKey::of(header));
        }
    }

    /// When to call [`Resets::expire`].
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.gives_up_at
    }

    /// Gives up on a guest that has taken nothing for too long.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.gives_up_at.is_some_and(|at| at <= now) {
            self.gives_up_at = None;
            self.gave_up = true;
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    #[cfg(test)]
    pub(super) fn newest(&self) -> Option<&VsockHeader> {
        self.waiting.back().map(|(header, _)| header)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }
}
