//! A daemon that is replaced by another, in either way, and what a guest and its host programs do over it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::ops::Deref;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;

use tempfile::TempDir;

use super::daemon::{Daemon, PATIENCE, eventually, program};
use super::manager::{Manager, append_to_log};
use super::sim::host::{connect, pattern, read_to_end};
use super::sim::{Flow, Op, SimGuest};

/// How a daemon takes over from the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A service manager stops the one, keeps its state, and starts the other.
    Manager,
    /// The other connects to the first at `--handover-path`.
    Path,
}

/// Runs each scenario with a hand-over of either way.
#[macro_export]
macro_rules! with_either_way {
    ($($scenario:ident)*) => {
        mod by_the_service_manager {
            $(#[test] fn $scenario() { super::$scenario(super::Way::Manager) })*
        }
        mod by_the_path {
            $(#[test] fn $scenario() { super::$scenario(super::Way::Path) })*
        }
    };
}

/// The daemon that serves now.
pub struct Service {
    daemon: Daemon,
    options: Vec<String>,
    manager: Option<Manager>,
}

impl Deref for Service {
    type Target = Daemon;

    fn deref(&self) -> &Daemon {
        &self.daemon
    }
}

impl Service {
    /// Starts the first daemon, of one VM. In `options`, `{}` is its directory.
    #[track_caller]
    pub fn start(way: Way, options: &[&str]) -> Self {
        let one = [
            "--guest-cid=4",
            "--socket={}/vhost.socket",
            "--uds-path={}/vm.vsock",
        ];
        Self::start_vms(way, &[&one, options].concat())
    }

    /// The same where `options` say which VMs there are. The first has the paths that a [`Daemon`] expects.
    #[track_caller]
    pub fn start_vms(way: Way, options: &[&str]) -> Self {
        Self::start_by(way, options, |_| ())
    }

    /// The same with a service manager that was prepared.
    #[track_caller]
    pub fn start_by(way: Way, options: &[&str], prepare: impl FnMut(&mut Manager)) -> Self {
        let directory = Arc::new(TempDir::with_prefix("vsock-test-").unwrap());
        let common = ["--stats-path={}/stats", "-v"];
        let own = match way {
            Way::Manager => &[][..],
            Way::Path => &["--handover-path={}/handover"],
        };
        let options = [options, &common, own].concat();
        let path = directory.path().to_str().unwrap();
        let options: Vec<_> = options.iter().map(|o| o.replace("{}", path)).collect();
        let mut manager = (way == Way::Manager).then(|| Manager::new(&directory));
        manager.iter_mut().for_each(prepare);
        let daemon = match &manager {
            Some(manager) => manager.start(&options),
            None => {
                let daemon = spawn(&directory, &options);
                daemon.wait_for_sockets();
                daemon
            }
        };
        Self {
            daemon,
            options,
            manager,
        }
    }

    /// The daemon itself.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// The service manager.
    #[track_caller]
    pub fn manager(&self) -> &Manager {
        self.manager.as_ref().expect("no service manager")
    }

    /// Adds an option to the command lines of the next daemons.
    pub fn add_option(&mut self, option: &str) {
        let path = self.directory().display().to_string();
        self.options.push(option.replace("{}", &path));
    }

    /// Changes the command lines of the next daemons.
    pub fn set_options(&mut self, options: Vec<String>) {
        self.options = options;
    }

    /// The command line.
    pub fn options(&self) -> &[String] {
        &self.options
    }

    /// Replaces the daemon. The old one ends well, and no socket in the directory is made anew.
    #[track_caller]
    pub fn hand_over(&mut self) {
        let before = self.sockets();
        self.hand_over_to(self.options.clone());
        let mut after = self.sockets();
        // Host programs may come and go.
        after.retain(|path, _| before.contains_key(path));
        assert_eq!(after, before, "sockets and their inodes");
    }

    /// Starts a daemon that is to take over, at the path.
    pub fn spawn_successor(&self) -> Daemon {
        assert!(self.manager.is_none());
        spawn(self.shared_directory(), &self.options)
    }

    /// Waits until the daemon has made way for this one.
    #[track_caller]
    pub fn expect_successor(&mut self, successor: Daemon) {
        assert_eq!(self.daemon.wait_exit().code(), Some(0), "{}", self.log());
        successor.assert_alive();
        self.daemon = successor;
    }

    /// Replaces the daemon by one with another command line.
    #[track_caller]
    pub fn hand_over_to(&mut self, options: Vec<String>) {
        self.set_options(options);
        if self.manager.is_some() {
            self.stop();
            self.start_again();
        } else {
            let successor = self.spawn_successor();
            self.expect_successor(successor);
        }
    }

    /// Has the service manager stop the daemon.
    #[track_caller]
    pub fn stop(&mut self) {
        let manager = self.manager.as_ref().expect("no service manager");
        manager.stop(&self.daemon);
        assert!(manager.has_parcels(), "nothing is left for a successor");
    }

    /// Kills the daemon, as a crash would.
    #[track_caller]
    pub fn kill(&mut self) {
        let manager = self.manager.as_ref().expect("no service manager");
        manager.kill(&self.daemon);
        // A copy of its sockets would hide their end.
        assert!(!manager.has_parcels());
    }

    /// Has the service manager start a daemon after that. What it took over is no longer stored.
    #[track_caller]
    pub fn start_again(&mut self) {
        self.daemon = self.manager().start(&self.options);
        assert!(!self.manager().has_parcels(), "stored for ever");
    }

    /// A crash, and the restart after it.
    #[track_caller]
    pub fn crash(&mut self) {
        self.kill();
        self.start_again();
    }

    /// Starts a daemon again and again after one that has died by itself; all but the last are killed.
    #[track_caller]
    pub fn kill_and_start_some(&mut self, times: usize) {
        for _ in 0..times {
            self.start_again();
            self.kill();
        }
        self.start_again();
    }

    /// The sockets in the directory, and their inodes. That of the hand-over itself, and the service manager's, are not meant.
    fn sockets(&self) -> BTreeMap<PathBuf, u64> {
        let entries = fs::read_dir(self.directory()).unwrap();
        let mut sockets = BTreeMap::new();
        for entry in entries.map(Result::unwrap) {
            let is_ours = entry.file_name() != "handover" && entry.file_name() != "notify";
            if is_ours && entry.file_type().unwrap().is_socket() {
                sockets.insert(entry.path(), entry.metadata().unwrap().ino());
            }
        }
        sockets
    }

    /// The sum of all samples of a metric that have this label.
    #[track_caller]
    pub fn number(&self, name: &str, label: &str) -> u64 {
        let stream = connect(&self.directory().join("stats"));
        stream.shutdown(Shutdown::Write).unwrap();
        let text = String::from_utf8(read_to_end(&stream)).unwrap();
        let samples = text.lines().filter(|line| {
            let rest = line.strip_prefix("vhost_user_vsock_");
            let rest = rest.and_then(|rest| rest.strip_prefix(name));
            rest.is_some_and(|rest| rest.starts_with([' ', '{']) && rest.contains(label))
        });
        let values = samples.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>());
        values.map(Result::unwrap).sum()
    }

    /// Waits until there are as many connections.
    #[track_caller]
    pub fn wait_for_connections(&self, count: u64) {
        eventually("the number of connections", || {
            self.number("connections", "") == count
        });
    }
}

/// Takes all descriptors that the daemon may have, with host programs that say nothing.
#[track_caller]
pub fn take_descriptors(service: &Service) -> Vec<UnixStream> {
    let few = service.open_descriptors() + 10;
    service.set_limit("nofile", few);
    let clients = (0..50).map(|_| connect(&service.uds_path())).collect();
    eventually("the daemon is out of descriptors", || {
        service.log().contains("clients must wait")
    });
    clients
}

/// Starts a daemon in a directory, without a service manager.
pub fn spawn(directory: &Arc<TempDir>, options: &[String]) -> Daemon {
    let mut command = program();
    command
        .args(options)
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let log = append_to_log(directory);
    Daemon::spawn(&mut command, directory, log, PATIENCE, &[])
}

/// Writes a pattern until the socket takes no more; returns what it took.
#[track_caller]
pub fn write_until_full(mut stream: &UnixStream, seed: u64) -> Vec<u8> {
    let mut bytes = pattern(seed, 4 << 20);
    stream.set_nonblocking(true).unwrap();
    let mut written = 0;
    while written < bytes.len() {
        match stream.write(&bytes[written..]) {
            Ok(count) => written += count,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
    }
    stream.set_nonblocking(false).unwrap();
    bytes.truncate(written);
    bytes
}

/// The guest's program takes bytes of a connection, and tells the daemon of each packet.
#[track_caller]
pub fn take_bytes(guest: &mut SimGuest, flow: &mut Flow, len: usize) -> Vec<u8> {
    let mut got = Vec::new();
    while got.len() < len {
        let packet = guest.recv();
        if packet.is(Op::CreditUpdate) {
            continue;
        }
        if !packet.is(Op::CreditRequest) {
            packet.assert_is(Op::Rw, flow);
            flow.fwd_cnt = flow.fwd_cnt.wrapping_add(packet.len);
            got.extend(packet.payload);
        }
        guest.send(&flow.packet(Op::CreditUpdate));
    }
    got
}

/// A connection that takes so many bytes before the guest's program has taken some.
pub fn flow_with_room(guest_port: u32, host_port: u32, room: u32) -> Flow {
    Flow {
        buf_alloc: room,
        ..Flow::new(guest_port, host_port)
    }
}
