//! A VM that is parked: its worker and its session do nothing, between two turns and between two messages.
//!
//! Both threads take a lock for each turn and each message, and parking is to have these locks. Everything that comes meanwhile
//! waits where it is: messages, kicks and clients in the kernel, VMMs in the backlog. So a VM whose parking ends goes on as if
//! nothing had been.
//!
//! Locks are taken in this order: the session's, the worker's, that of the sockets.

use std::io;
use std::mem;
use std::time::Instant;

use parking_lot::MutexGuard;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::host::listener::{ListenerState, SocketFile};
use crate::host::vsock::VsockListener;
use crate::packet::header::Cid;
use crate::saved::Saver;
use crate::vhost_user_vsock_thread::VhostUserVsockThread;
use crate::vhost_user_vsock_thread::saved::TableState;
use crate::vhu_vsock::saved::SessionState;
use crate::vhu_vsock::session::Session;

/// Why a VM can't be parked.
#[derive(Debug, Error)]
pub(in crate::daemon) enum ParkError {
    /// The device's state, for example, comes through a pipe into which the VMM writes nothing.
    #[error("a message of the VMM's is not done in time")]
    Session,
    /// The worker is stuck, or has too much to do.
    #[error("the worker's turn does not end in time")]
    Worker,
    /// The sockets are being removed.
    #[error("its sockets are in use")]
    Sockets,
    /// A thread has panicked.
    #[error("it was given up")]
    GivenUp,
}

/// The listening sockets of a VM. None once they were removed.
#[derive(Debug)]
pub(super) struct Sockets(pub(super) Option<Listening>);

/// Held to be saved, and for their files.
#[derive(Debug, Default)]
pub(super) struct Listening {
    /// The VMM's is the first.
    pub(super) files: Vec<SocketFile>,
    pub(super) vsock: Vec<VsockListener>,
}

/// A VM in a document.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::daemon) struct VmState {
    pub(in crate::daemon) guest_cid: Cid,
    /// None if there is no VMM.
    pub(in crate::daemon) session: Option<SessionState>,
    #[serde(default)]
    pub(in crate::daemon) listeners: Vec<ListenerState>,
    /// None if the daemon has died, and with it all connections.
    #[serde(default)]
    pub(in crate::daemon) table: Option<TableState>,
}

impl VmState {
    /// How many connections it has.
    pub(in crate::daemon) fn connections(&self) -> usize {
        self.table.as_ref().map_or(0, TableState::connections)
    }
}

/// What there is of a VM to save, between two turns and two messages.
#[derive(Clone, Copy)]
pub(in crate::daemon) struct Parts<'vm> {
    pub(super) guest_cid: Cid,
    pub(super) session: Option<&'vm Session>,
    pub(super) worker: &'vm VhostUserVsockThread,
    pub(super) sockets: &'vm Sockets,
}

impl<'vm> Parts<'vm> {
    /// Whether a VMM is connected.
    #[cfg(test)]
    pub(in crate::daemon) fn has_session(&self) -> bool {
        self.session.is_some()
    }

    /// Saves the session and the listening sockets, but no connection.
    ///
    /// # Errors
    /// The system refuses.
    pub(in crate::daemon) fn save(self, saver: &mut Saver<'vm>) -> io::Result<VmState> {
        // What is always there comes first: a keeper gives it the same numbers in every process.
        let listening = self.sockets.0.as_ref();
        let files = listening.iter().flat_map(|listening| &listening.files);
        let mut listeners: Vec<_> = files.filter_map(|socket| socket.save(saver)).collect();
        let vsock = listening.iter().flat_map(|listening| &listening.vsock);
        listeners.extend(vsock.map(|socket| socket.save(saver)));
        let session = self.session.map(|session| session.save(self.worker, saver));
        Ok(VmState {
            guest_cid: self.guest_cid,
            session: session.transpose()?,
            listeners,
            table: None,
        })
    }
}

/// Keeps what a VM's session consists of outside of the process, for a successor after a crash.
pub(in crate::daemon) trait Keep: Send {
    /// Takes a copy of a session that has begun, changed or ended. The VM stands still until this returns, so it must not wait for
    /// anybody.
    fn keep(&mut self, vm: Parts<'_>);

    /// Puts the copy where it is safe. Only the session waits for that.
    fn store(&mut self);
}

/// A VM that is parked. It goes on when this is dropped.
pub(in crate::daemon) struct Parked<'vm> {
    pub(super) guest_cid: Cid,
    pub(super) session: MutexGuard<'vm, Option<Session>>,
    pub(super) worker: MutexGuard<'vm, VhostUserVsockThread>,
    pub(super) sockets: MutexGuard<'vm, Sockets>,
}

impl Parked<'_> {
    /// Saves everything. What is saved borrows the descriptors, which stay the VM's.
    ///
    /// # Errors
    /// The system refuses.
    pub(in crate::daemon) fn save<'a>(&'a self, saver: &mut Saver<'a>) -> io::Result<VmState> {
        let parts = Parts {
            guest_cid: self.guest_cid,
            session: self.session.as_ref(),
            worker: &self.worker,
            sockets: &self.sockets,
        };
        let mut state = parts.save(saver)?;
        state.table = Some(self.worker.save_table(saver, Instant::now())?);
        Ok(state)
    }

    /// Leaves the VM to a successor, and its sockets' files. Its threads wait until the process ends, and so does whoever drops the
    /// [`Vm`](super::Vm).
    pub(in crate::daemon) fn leave(mut self) {
        if let Some(listening) = self.sockets.0.take() {
            listening.files.into_iter().for_each(SocketFile::leave);
        }
        mem::forget(self);
    }
}

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        self.worker.wake();
    }
}
