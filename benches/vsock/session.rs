//! One run against one daemon: the daemon, the simulated guest, and the threads of both sides.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use crate::daemon::Daemon;
use crate::guest::{App, Guest};
use crate::host::HOST_PORT;
use crate::measure::Probe;
use crate::ring::Notifications;
use crate::shared::Shared;
use crate::threads::{self, Running};

/// How long traffic may take to begin.
const TRAFFIC_TIMEOUT: Duration = Duration::from_secs(10);

/// A daemon with its guest.
pub struct Session {
    /// The daemon.
    pub daemon: Daemon,
    /// What the threads share.
    pub shared: Arc<Shared>,
    notifications: Arc<Notifications>,
    guest: Option<Guest>,
}

impl Session {
    /// Connects a guest to a daemon.
    pub fn begin(daemon: Daemon) -> Result<Self, String> {
        let notifications = Arc::new(Notifications::default());
        let guest = Guest::start(&daemon.vhost_socket(), &notifications);
        Ok(Self {
            daemon,
            shared: Arc::new(Shared::default()),
            notifications,
            guest: Some(guest.map_err(|error| error.to_string())?),
        })
    }

    /// Starts the guest's thread.
    pub fn start_guest<A: App + Send + 'static>(
        &mut self,
        mut app: A,
    ) -> Result<Running<A>, String> {
        let mut guest = self.guest.take().ok_or("the guest runs already")?;
        Ok(self.spawn(move |shared| guest.serve(&mut app, shared).map(|()| app)))
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
        UnixListener::bind(path).map_err(|error| error.to_string())
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
    pub fn end<A>(&mut self, guest: Running<A>) -> Result<Option<A>, String> {
        self.shared.end();
        let app = threads::join(guest);
        self.daemon.kill();
        app
    }
}

impl Drop for Session {
    /// Ends the threads of a run that failed.
    fn drop(&mut self) {
        self.shared.end();
    }
}
