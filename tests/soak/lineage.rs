//! A daemon that others replace while it serves.

use std::sync::Arc;

use tempfile::TempDir;

use super::common::daemon::Daemon;
use super::common::handover::{Way, spawn};
use super::common::manager::Manager;

/// A daemon and its successors, which have one directory and one command line. What it is called by does not change.
pub struct Lineage {
    daemon: Arc<Daemon>,
    directory: Arc<TempDir>,
    manager: Option<Manager>,
    options: Vec<String>,
}

impl Lineage {
    /// Starts the first.
    pub fn start(way: Way) -> Self {
        let directory = Arc::new(TempDir::with_prefix("vsock-test-").unwrap());
        let at = |name: &str| directory.path().join(name).display().to_string();
        let mut options = vec![
            "--guest-cid=4".to_owned(),
            format!("--socket={}", at("vhost.socket")),
            format!("--uds-path={}", at("vm.vsock")),
        ];
        let manager = match way {
            Way::Manager => Some(Manager::new(&directory)),
            Way::Path => {
                options.push(format!("--handover-path={}", at("handover")));
                None
            }
        };
        let daemon = match &manager {
            Some(manager) => manager.start(&options),
            None => spawn(&directory, &options),
        };
        daemon.wait_for_sockets();
        Self {
            daemon: Arc::new(daemon),
            directory,
            manager,
            options,
        }
    }

    /// The one that serves now.
    pub fn daemon(&self) -> &Arc<Daemon> {
        &self.daemon
    }

    /// The next takes over.
    pub fn hand_over(&self) -> Result<(), String> {
        let successor = match &self.manager {
            Some(manager) => {
                manager.stop(&self.daemon);
                manager.start(&self.options)
            }
            None => spawn(&self.directory, &self.options),
        };
        match self.daemon.replace_by(successor).code() {
            Some(0) => Ok(()),
            code => Err(format!("a predecessor has ended with {code:?}")),
        }
    }

    /// The daemon is killed, and the next is started.
    pub fn crash(&self) {
        if let Some(manager) = &self.manager {
            manager.kill(&self.daemon);
            self.daemon.replace_by(manager.start(&self.options));
        }
    }
}
