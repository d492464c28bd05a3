//! The session thread of a VM: it accepts a VMM and handles its messages, one VMM after the other.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use log::{info, warn};
use nix::poll::{PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Mutex, MutexGuard};

use super::parked::{Keep, Parts, Sockets};
use crate::daemon::threads::{wait_for, wait_readable};
use crate::packet::header::Cid;
use crate::vhu_vsock::VhostUserVsockBackend;
use crate::vhu_vsock::session::{Session, SessionError};

/// How long no VMM is accepted after an error.
const PAUSE: Duration = Duration::from_millis(100);

/// Ends the session thread.
#[derive(Debug)]
pub(super) struct Stop {
    requested: AtomicBool,
    event: EventFd,
}

impl Stop {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            requested: AtomicBool::new(false),
            event: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
        })
    }

    pub(super) fn request(&self) {
        self.requested.store(true, Ordering::SeqCst);
        let _ = self.event.write(1);
    }

    fn is_requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }
}

/// What the session thread works with. Whoever has the lock of `session` has it between two messages, and between two VMMs.
pub(super) struct SessionThread {
    pub(super) guest_cid: Cid,
    pub(super) device: Arc<VhostUserVsockBackend>,
    pub(super) session: Arc<Mutex<Option<Session>>>,
    pub(super) sockets: Arc<Mutex<Sockets>>,
    pub(super) stop: Arc<Stop>,
    pub(super) keeper: Option<Box<dyn Keep>>,
}

impl SessionThread {
    /// Serves the VMM whose session was loaded, if one was, and then one VMM after the other until the end is requested.
    pub(super) fn serve_all(mut self, listener: &UnixListener) {
        self.serve_session();
        let mut is_short = false;
        while !self.stop.is_requested() {
            let fds = [listener.as_fd(), self.stop.event.as_fd()];
            let waited = wait_readable(&fds, PollTimeout::NONE);
            if self.stop.is_requested() {
                return;
            }
            let is_shut_down =
                matches!(waited, Ok([events, _]) if events.contains(PollFlags::POLLHUP));
            let accept = || Ok(listener.accept()?.0);
            match waited.and_then(|_| self.begin_session(accept)) {
                Ok(()) => {
                    is_short = false;
                    self.serve_session();
                }
                Err(error) if is_shut_down => {
                    warn!("can't serve a VMM: the listener was shut down: {error}");
                    let _ = wait_readable(&[self.stop.event.as_fd()], PollTimeout::NONE);
                }
                Err(error) => match error.kind() {
                    // Somebody else who has the listener was faster, or the VMM has left already.
                    io::ErrorKind::WouldBlock
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::Interrupted => {}
                    // Nothing left to accept with, whatever it is: it may pass.
                    _ => {
                        if !std::mem::replace(&mut is_short, true) {
                            warn!("can't serve a VMM: {error}");
                        }
                        let pause = PollTimeout::try_from(PAUSE).unwrap_or(PollTimeout::ZERO);
                        let _ = wait_readable(&[self.stop.event.as_fd()], pause);
                    }
                },
            }
        }
    }

    /// Serves the VMM whose session was loaded, or else the one that is connected by `socket`: no other will come.
    pub(super) fn serve_one(mut self, socket: UnixStream) {
        if self.session.lock().is_some() {
            drop(socket);
        } else if let Err(error) = self.begin_session(|| Ok(socket)) {
            warn!("can't serve a VMM: {error}");
        }
        self.serve_session();
    }

    /// Begins the session of a VMM. It is accepted with the session's lock: a VM that is parked has all that it has accepted.
    fn begin_session(&mut self, accept: impl FnOnce() -> io::Result<UnixStream>) -> io::Result<()> {
        let session = self.session.clone();
        let mut session = session.lock();
        let socket = accept()?;
        info!("a VMM connected");
        self.device.begin_session();
        *session = Some(Session::begin(socket, self.device.clone()));
        self.keep(session.as_ref());
        Ok(())
    }

    /// Serves the VMM whose session has begun, until it is gone or the end is requested.
    fn serve_session(&mut self) {
        let waits = self.session.lock().as_ref().map(waits);
        let Some((socket, mut events)) = waits else {
            return;
        };
        loop {
            let fds = [
                (socket.as_fd(), events),
                (self.stop.event.as_fd(), PollFlags::POLLIN),
            ];
            if let Err(error) = wait_for(&fds, PollTimeout::NONE) {
                warn!("can't wait for the VMM: {error}");
                thread::sleep(PAUSE);
            }
            match self.handle_request() {
                Some(next) => events = next,
                None => return,
            }
        }
    }

    /// Takes what has come from the VMM, and returns what to wait for. None when the session has ended.
    fn handle_request(&mut self) -> Option<PollFlags> {
        let session = self.session.clone();
        let mut slot = session.lock();
        if self.stop.is_requested() {
            self.end_session(slot, None);
            return None;
        }
        let session = slot.as_mut()?;
        let has_changed = match session.handle_request() {
            Ok(has_changed) => has_changed,
            // A VMM that wanted an answer gets it. The session goes on.
            Err(error) if error.is_refusal() => {
                warn!("refused the VMM: {error}");
                true
            }
            Err(error) => {
                self.end_session(slot, Some(error));
                return None;
            }
        };
        // Before the reply: what the VMM knows to be done must not be lost.
        if has_changed {
            self.keep(Some(session));
        }
        if let Err(error) = session.send_reply() {
            self.end_session(slot, Some(error));
            return None;
        }
        if session.has_unsent() {
            self.keep(Some(session));
        }
        let (_, events) = waits(session);
        // A VMM that sends one message after the other would not let others have the lock.
        MutexGuard::unlock_fair(slot);
        Some(events)
    }

    /// Ends the session, because of `error` or because the VM is no longer served.
    fn end_session(
        &mut self,
        mut session: MutexGuard<'_, Option<Session>>,
        error: Option<SessionError>,
    ) {
        *session = None;
        self.device.end_session();
        self.keep(None);
        drop(session);
        match error {
            Some(error) if !error.is_end() => warn!("the VMM is no longer served: {error}"),
            _ => info!("the VMM disconnected"),
        }
    }

    /// Shows the keeper what there is before anything is served.
    pub(super) fn keep_first(&mut self) {
        let session = self.session.clone();
        self.keep(session.lock().as_ref());
    }

    /// Shows the keeper what the session is now. The caller has the session's lock.
    fn keep(&mut self, session: Option<&Session>) {
        let Some(keeper) = &mut self.keeper else {
            return;
        };
        let worker = self.device.worker();
        let sockets = self.sockets.lock();
        keeper.keep(Parts {
            guest_cid: self.guest_cid,
            session,
            worker: &worker,
            sockets: &sockets,
        });
        drop((worker, sockets));
        keeper.store();
    }
}

/// A session's socket, and what to wait for there.
fn waits(session: &Session) -> (Arc<UnixStream>, PollFlags) {
    let events = match session.has_unsent() {
        true => PollFlags::POLLOUT,
        false => PollFlags::POLLIN,
    };
    (session.socket(), events)
}
