//! Several VMs whose guests reach each other: in one daemon, or each in a daemon of its own.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::daemon::{Daemon, PATIENCE, program};
use super::sim::vhost_user::Frontend;
use super::sim::{Flow, GuestStack, Setup, SimGuest};

/// How the VMs reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One daemon serves all.
    OneProcess,
    /// Each has its own daemon, and all have a directory in common.
    Processes,
}

/// The VMs, by their CIDs, with their daemons.
pub struct Vms {
    daemons: BTreeMap<u64, Daemon>,
    /// The daemon of a VM, by the CID of the first in it.
    homes: BTreeMap<u64, u64>,
    directory: TempDir,
}

impl Vms {
    /// No VMs, and a directory for their siblings' sockets.
    pub fn none() -> Self {
        Self {
            daemons: BTreeMap::new(),
            homes: BTreeMap::new(),
            directory: TempDir::with_prefix("vsock-test-").unwrap(),
        }
    }

    /// Siblings with these CIDs.
    pub fn start(kind: Kind, cids: &[u64]) -> Self {
        let mut vms = Self::none();
        match kind {
            Kind::OneProcess => {
                let options: Vec<_> = cids.iter().map(|cid| (*cid, String::new())).collect();
                vms.add_daemon(&options);
            }
            Kind::Processes => cids.iter().for_each(|cid| vms.add(*cid)),
        }
        vms
    }

    /// The directory of the siblings' sockets.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Where a VM is reached by those of other daemons.
    pub fn sibling_path(&self, cid: u64) -> PathBuf {
        self.directory().join(format!("{cid}.vsock"))
    }

    /// What a VM's options say so that it is reached by those of other daemons.
    pub fn sibling_dir(&self) -> String {
        format!("sibling-dir={}", self.directory().display())
    }

    /// Adds a VM with a daemon of its own, or starts that again.
    pub fn add(&mut self, cid: u64) {
        self.add_daemon(&[(cid, self.sibling_dir())]);
    }

    /// Adds VMs of one daemon: their CIDs, and what else their options say.
    pub fn add_daemon(&mut self, vms: &[(u64, String)]) {
        let directory = TempDir::with_prefix("vsock-test-").unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let mut command = program();
        let path = directory.path().display();
        for (index, (cid, more)) in vms.iter().enumerate() {
            // The first has the paths that a `Daemon` expects.
            let name = if index == 0 {
                String::new()
            } else {
                cid.to_string()
            };
            let more = if more.is_empty() {
                String::new()
            } else {
                format!(",{more}")
            };
            command.arg("--vm").arg(format!(
                "guest-cid={cid},socket={path}/vhost{name}.socket,uds-path={path}/vm{name}.vsock{more}"
            ));
            self.homes.insert(*cid, vms[0].0);
        }
        // Not -vv: a line for each packet is too much for a guest that sends many.
        command.arg("-v").stdin(Stdio::null()).stdout(Stdio::null());
        let daemon = Daemon::start_by(&mut command, directory, log, PATIENCE);
        self.daemons.insert(vms[0].0, daemon);
    }

    /// The daemon of a VM.
    pub fn daemon(&mut self, cid: u64) -> &mut Daemon {
        self.daemons.get_mut(&self.homes[&cid]).unwrap()
    }

    /// Kills a VM's daemon, as a crash would.
    pub fn kill_daemon(&mut self, cid: u64) {
        let daemon = self.daemons.remove(&self.homes[&cid]).unwrap();
        daemon.signal(Signal::SIGKILL);
        daemon.wait_exit();
    }

    /// A VMM's connection to the daemon of a VM.
    pub fn vmm(&self, cid: u64) -> UnixStream {
        UnixStream::connect(self.vhost_socket(cid)).unwrap()
    }

    /// Where the VMM of a VM connects.
    pub fn vhost_socket(&self, cid: u64) -> PathBuf {
        let home = self.homes[&cid];
        let name = if home == cid {
            String::new()
        } else {
            cid.to_string()
        };
        let directory = self.daemons[&home].directory();
        directory.join(format!("vhost{name}.socket"))
    }

    /// A VMM that has connected and done nothing else.
    pub fn silent_vmm(&self, cid: u64) -> Frontend {
        let vmm = Frontend::over(self.vmm(cid));
        vmm.set_owner();
        vmm
    }

    /// A guest whose device runs.
    pub fn guest(&self, cid: u64) -> SimGuest {
        let setup = Setup {
            cid,
            ..Setup::default()
        };
        SimGuest::start_over(self.vmm(cid), setup)
    }

    /// The sockets of such a guest.
    pub fn stack(&self, cid: u64) -> GuestStack {
        GuestStack::new(self.guest(cid))
    }

    /// Panics unless all daemons run and do nothing now.
    #[track_caller]
    pub fn assert_idle(&self) {
        self.daemons.values().for_each(Daemon::assert_alive);
        Daemon::assert_all_idle(&self.daemons.values().collect::<Vec<_>>());
    }
}

/// A connection from a guest's port to another guest's, as the first sees it.
pub fn flow(from: (u64, u32), to: (u64, u32)) -> Flow {
    Flow {
        guest_cid: from.0,
        peer_cid: to.0,
        ..Flow::new(from.1, to.1)
    }
}
