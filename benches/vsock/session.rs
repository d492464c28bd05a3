//! One run against one daemon: the daemon, the simulated guest, and the threads of both sides.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::daemon::{Daemon, Vms};
use crate::failure::Failure;
use crate::guest::{App, Guest};
use crate::host::HOST_PORT;
use crate::measure::Probe;
use crate::messages;
use crate::packet::{GUEST_CID, HOST_CID, Link, SIBLING_CID, SocketType};
use crate::ring::Notifications;
use crate::shared::Shared;
use crate::threads::{self, Running};

/// How long traffic may take to begin.
const TRAFFIC_TIMEOUT: Duration = Duration::from_secs(30);

/// The thread of a guest. It gives the guest back, whose connections would end with it.
pub type RunningGuest<A> = Running<(Guest, A)>;

/// A daemon with its guest, or two.
pub struct Session {
    /// The daemon.
    pub daemon: Daemon,
    /// What the threads share.
    pub shared: Arc<Shared>,
    notifications: Arc<Notifications>,
    socket_type: SocketType,
    guest: Option<Guest>,
    sibling: Option<Guest>,
}

impl Session {
    /// Connects a guest to a daemon, or two to each other, that use sockets of this type.
    pub fn begin(daemon: Daemon, socket_type: SocketType) -> Result<Self, Failure> {
        let notifications = Arc::new(Notifications::default());
        let start = |socket: PathBuf, own, peer| {
            let link = Link {
                own,
                peer,
                socket_type,
            };
            Guest::start(&socket, &notifications, link)
        };
        let (guest, sibling) = match daemon.vms() {
            Vms::One => (start(daemon.vhost_socket(), GUEST_CID, HOST_CID)?, None),
            Vms::OneProcess | Vms::TwoProcesses => {
                let sibling = start(daemon.sibling_socket(), SIBLING_CID, GUEST_CID)?;
                let guest = start(daemon.vhost_socket(), GUEST_CID, SIBLING_CID)?;
                (guest, Some(sibling))
            }
        };
        Ok(Self {
            daemon,
            shared: Arc::new(Shared::default()),
            notifications,
            socket_type,
            guest: Some(guest),
            sibling,
        })
    }

    /// Starts the guest's thread.
    pub fn start_guest<A: App + Send + 'static>(
        &mut self,
        app: A,
    ) -> Result<RunningGuest<A>, String> {
        let guest = self.guest.take().ok_or("the guest runs already")?;
        Ok(self.serve(guest, app))
    }

    /// Starts the other guest's thread.
    pub fn start_sibling<A: App + Send + 'static>(
        &mut self,
        app: A,
    ) -> Result<RunningGuest<A>, String> {
        let sibling = self.sibling.take().ok_or("there is no other guest")?;
        Ok(self.serve(sibling, app))
    }

    fn serve<A: App + Send + 'static>(&self, mut guest: Guest, mut app: A) -> RunningGuest<A> {
        self.spawn(move |shared| guest.serve(&mut app, shared).map(|()| (guest, app)))
    }

    /// Starts the thread of a host program.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T, String> + Send + 'static,
    ) -> Running<T> {
        threads::spawn(&self.shared, work)
    }

    /// Listens where the guest's connections to `HOST_PORT` arrive.
    pub fn listen(&self) -> Result<UnixListener, String> {
        let path = self.daemon.host_port_path(HOST_PORT);
        match self.socket_type {
            SocketType::Stream => UnixListener::bind(path),
            SocketType::Seqpacket => messages::listen(&path),
        }
        .map_err(|error| error.to_string())
    }

    /// What to measure.
    pub fn probe(&mut self) -> Probe<'_> {
        Probe {
            daemon: &mut self.daemon,
            shared: &self.shared,
            notifications: &self.notifications,
            timeout: TRAFFIC_TIMEOUT,
        }
    }

    /// Ends the run: the guest first, then the daemon, so that every blocked host program wakes up.
    pub fn end<A>(&mut self, guest: RunningGuest<A>) -> Result<Option<A>, String> {
        self.shared.end();
        let ended = threads::join(guest);
        self.daemon.kill();
        Ok(ended?.map(|(_, app)| app))
    }
}

impl Drop for Session {
    /// Ends the threads of a run that failed.
    fn drop(&mut self) {
        self.shared.end();
    }
}
