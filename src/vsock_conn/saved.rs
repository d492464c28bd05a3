//! A connection in a document (see [`crate::saved`]).
//!
//! The names of the fields and of the states, also of those types that are in a document as they are, belong to the format. Fields
//! may be added, with a default.
//!
//! What a socket has, or has room for, is not saved: a look at it tells. So payload for the guest is not among the pending operations
//! of a document.

use std::io;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::credit::Credit;
use super::dialing::Dialing;
use super::mover::{Mover, PayloadState};
use super::shutdown::Shutdown;
use super::state::State;
use super::{ConnKey, Greeting, VsockConnection};
use crate::host::connect_line::Role;
use crate::host::socket::{HostSocket, SocketState};
use crate::packet::header::Cid;
use crate::rxops::RxOps;
use crate::rxqueue::RxQueue;
use crate::saved::{LoadError, Loader, Saver};

/// How long it is until then, in milliseconds.
pub fn remaining(deadline: Instant, now: Instant) -> u64 {
    let left = deadline.saturating_duration_since(now).as_millis();
    u64::try_from(left).unwrap_or(u64::MAX)
}

/// When so many milliseconds are over.
///
/// # Errors
/// There is no such time.
pub fn deadline(remaining: u64, now: Instant) -> Result<Instant, LoadError> {
    now.checked_add(Duration::from_millis(remaining))
        .ok_or(LoadError::Invalid("a time that can't be"))
}

/// A [`VsockConnection`] in a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionState {
    key: ConnKey,
    state: State,
    greeting: Greeting,
    /// The remaining time, in milliseconds.
    #[serde(default)]
    deadline: Option<u64>,
    #[serde(default)]
    pending: RxQueue,
    credit: Credit,
    #[serde(default)]
    credit_requested: bool,
    #[serde(default)]
    client_left: bool,
    #[serde(default)]
    shutdown: Shutdown,
    socket: SocketState,
    payload: PayloadState,
}

impl ConnectionState {
    /// Its ports.
    pub fn key(&self) -> ConnKey {
        self.key
    }
}

impl VsockConnection {
    /// Saves it, and changes nothing. One that [`VsockConnection::is_relayed`] is of no use when it is loaded.
    ///
    /// # Errors
    /// The system refuses.
    pub fn save<'fd>(
        &'fd self,
        saver: &mut Saver<'fd>,
        now: Instant,
    ) -> io::Result<ConnectionState> {
        let mut pending = self.rx_queue;
        pending.remove(RxOps::Rw);
        Ok(ConnectionState {
            key: self.key,
            state: self.state.clone(),
            greeting: self.greeting,
            deadline: self.deadline.map(|deadline| remaining(deadline, now)),
            pending,
            credit: self.credit.clone(),
            credit_requested: self.credit_requested,
            client_left: self.client_left,
            shutdown: self.shutdown.clone(),
            socket: self.mover.socket().save(saver),
            payload: self.mover.save(saver)?,
        })
    }

    /// The connection of the guest `guest_cid` that was saved. It goes on with [`VsockConnection::resume`].
    ///
    /// # Errors
    /// It is not complete, it can't be, or there is no memory for it.
    pub fn load(
        state: ConnectionState,
        guest_cid: Cid,
        loader: &mut Loader,
        now: Instant,
    ) -> Result<Self, LoadError> {
        let socket = HostSocket::load(&state.socket, loader)?;
        if socket.packet_type() != state.key.packet_type {
            return Err(LoadError::Invalid("a socket of another type"));
        }
        let mover = Mover::load(state.payload, socket, state.credit.buf_alloc(), loader)?;
        state.credit.check(mover.buffered())?;
        match &state.state {
            State::Dialing(dialing) => {
                if let Dialing::Answer(line) = &**dialing {
                    line.check(Role::Answer)?;
                }
            }
            State::Flushing if state.pending != RxQueue::default() => {
                return Err(LoadError::Invalid("packets of a connection that is over"));
            }
            _ => {}
        }
        let deadline = state.deadline.map(|left| deadline(left, now));
        Ok(Self {
            guest_cid,
            key: state.key,
            state: state.state,
            greeting: state.greeting,
            deadline: deadline.transpose()?,
            rx_queue: state.pending,
            credit: state.credit,
            credit_requested: state.credit_requested,
            client_left: state.client_left,
            mover,
            shutdown: state.shutdown,
        })
    }

    /// Goes on after a load: looks for what waits on either side.
    pub fn resume(&mut self) {
        self.update_pending();
    }

    /// Whether the other end of its socket is in this process, so that another process can't have it.
    pub fn is_relayed(&self) -> bool {
        self.mover.socket().is_relayed()
    }
}
