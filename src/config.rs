//! The configuration of a process and its VMs, and the check for mistakes in it.
//!
//! The command line makes a [`ProcessConfig`]; an embedder makes a [`VmConfig`] with [`VmConfig::new`] and changes what
//! should differ from the defaults. Nothing here touches a socket or changes a file.

mod access;
mod paths;

use std::fmt;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;

pub use self::access::{AccessError, SocketAccess, SocketGroup, SocketMode};
use self::paths::SocketPath;
pub use self::paths::{PathError, directory_of};
use crate::packet::header::{Cid, InvalidCid};

/// The largest buffer of a connection, in bytes.
const MAX_TX_BUFFER: u32 = 1 << 30;

/// The largest ring, in entries (virtio 1.2, 2.7).
const MAX_QUEUE_SIZE: u16 = 32768;

/// The longest busy poll.
const MAX_BUSY_POLL: Duration = Duration::from_millis(10);

/// The configuration of a process: its VMs, and what they share.
#[derive(Clone, Debug)]
pub struct ProcessConfig {
    /// The VMs that the process serves.
    pub vms: Vec<VmConfig>,
    /// Path of the statistics socket. The default is none.
    pub stats_path: Option<PathBuf>,
    /// Who may connect to the statistics socket.
    pub access: SocketAccess,
    /// What the process gives up before it serves.
    pub sandbox: Sandbox,
}

/// The configuration of one VM's device.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// The guest's CID.
    pub guest_cid: Cid,
    /// The vhost-user socket, for the VMM.
    pub socket: Socket,
    /// Where host programs are.
    pub host: HostSide,
    /// Sockets for one port of the guest each: a program that connects to one is connected to that port, without a CONNECT line.
    pub guest_ports: Vec<PortPath>,
    /// Where the guest's connections to these ports of the host lead, in place of [`HostSide`].
    pub host_ports: Vec<PortPath>,
    /// The groups of VMs in this process that the guest belongs to. It reaches the guests of VMs with which it shares one.
    pub groups: Vec<String>,
    /// Directories of sockets through which the guests of other processes are reached, and reach this one. The guest with CID n
    /// listens at `n.vsock` there.
    pub sibling_dirs: Vec<PathBuf>,
    /// How long a host program waits for a VMM, the guest's driver, or a guest program that listens. Zero: not at all.
    pub wait_for_guest: Duration,
    /// How many bytes from the guest each connection buffers for its host program, from 1 to 2^30.
    pub tx_buffer_size: u32,
    /// The largest ring that is offered to the guest, in entries: a power of two from 2 to 32768.
    pub queue_size: u16,
    /// The most connections at once that the guest has opened, and the most that host programs have; at least 1. Both together
    /// may have a third more, so that a quarter of all places is kept for each.
    pub max_connections: usize,
    /// How long the worker polls for more work before it sleeps, at most 10 ms. Zero turns busy polling off.
    pub busy_poll: Duration,
    /// Who may connect to the sockets of this VM.
    pub access: SocketAccess,
}

/// Where host programs are, for the connections between them and the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostSide {
    /// Behind Unix sockets.
    Unix {
        /// Path of the socket for host programs, and with `_<port>` behind it the path where they listen.
        path: PathBuf,
        /// The listening socket for host programs, if it is inherited instead of bound at `path`.
        fd: Option<RawFd>,
    },
    /// Behind AF_VSOCK sockets of the host.
    Vsock {
        /// The CID that the guest's connections lead to: to the same port there.
        cid: Cid,
        /// The ports of the host's AF_VSOCK, of any CID, that lead to the guest's ports of the same numbers.
        listen: Vec<u32>,
    },
}

impl HostSide {
    /// Unix sockets; that for host programs is bound at `path`.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self::Unix {
            path: path.into(),
            fd: None,
        }
    }

    /// The path of the socket for host programs.
    pub fn uds_path(&self) -> Option<&Path> {
        match self {
            Self::Unix { path, .. } => Some(path),
            Self::Vsock { .. } => None,
        }
    }
}

impl fmt::Display for HostSide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { path, .. } => path.display().fmt(f),
            Self::Vsock { cid, .. } => write!(f, "CID {cid} of AF_VSOCK"),
        }
    }
}

/// A port, and the Unix socket that stands for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortPath {
    /// The port.
    pub port: u32,
    /// Path of the socket.
    pub path: PathBuf,
}

/// Where a listening socket comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Socket {
    /// The daemon binds it at this path, and removes it when it stops.
    Path(PathBuf),
    /// The process has inherited it as this descriptor.
    Inherited(RawFd),
}

impl fmt::Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Inherited(fd) => write!(f, "descriptor {fd}"),
        }
    }
}

/// How much of the [sandbox](crate::daemon::sandbox) there must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sandbox {
    /// As much as the kernel provides.
    #[default]
    Auto,
    /// All of it, or the daemon does not start.
    Strict,
    /// Nothing.
    Off,
}

impl Sandbox {
    /// The names of all of them, as the command line has them.
    pub const NAMES: [&str; 3] = ["auto", "strict", "off"];
}

impl fmt::Display for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Strict => "strict",
            Self::Off => "off",
        })
    }
}

impl FromStr for Sandbox {
    type Err = ConfigError;

    fn from_str(name: &str) -> Result<Self, ConfigError> {
        match name {
            "auto" => Ok(Self::Auto),
            "strict" => Ok(Self::Strict),
            "off" => Ok(Self::Off),
            _ => Err(ConfigError::Sandbox),
        }
    }
}

/// A mistake in a configuration. Each message says which option is wrong and what to do about it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The CID can't be that of a guest.
    #[error("--guest-cid={number}: {0}", number = .0.0)]
    Cid(#[from] InvalidCid),
    /// Two VMs have the same CID.
    #[error("--guest-cid={0}: another VM has this CID, each needs its own")]
    DuplicateCid(Cid),
    /// The path of a socket is wrong.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The buffer is too small or too large.
    #[error("--tx-buffer-size={0}: a buffer has from 1 to {MAX_TX_BUFFER} bytes")]
    TxBufferSize(u32),
    /// A ring can't have this size (virtio 1.2, 2.7).
    #[error("--queue-size={0}: a ring has a power of two from 2 to {MAX_QUEUE_SIZE} entries")]
    QueueSize(u16),
    /// No connection would be possible.
    #[error("--max-connections=0: at least one connection must be possible")]
    MaxConnections,
    /// The busy poll is too long. The number is in microseconds.
    #[error("--busy-poll={0}: poll for at most {max} microseconds", max = MAX_BUSY_POLL.as_micros())]
    BusyPoll(u128),
    /// The name is not that of a [`Sandbox`].
    #[error("it is one of {}", Sandbox::NAMES.join(", "))]
    Sandbox,
    /// There is no VM to serve.
    #[error("no VM is given: say --guest-cid, --socket and --uds-path, or --vm")]
    NoVm,
    /// The command line has more VMs than a process serves today.
    #[error("{0} times --vm: a process serves one VM, start another for each")]
    TooManyVms(usize),
    /// The sockets of the service manager (`LISTEN_FDS`) are not the ones that the daemon can use.
    #[error("the sockets of the service manager: {0}")]
    Activation(String),
}

impl ProcessConfig {
    /// A process that serves these VMs, without a statistics socket and with the default sandbox.
    pub fn new(vms: Vec<VmConfig>) -> Self {
        Self {
            vms,
            stats_path: None,
            access: SocketAccess::default(),
            sandbox: Sandbox::default(),
        }
    }

    /// Checks each VM alone and against the others. The directories of the sockets must exist.
    ///
    /// # Errors
    /// The first mistake that is found.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.vms.is_empty() {
            return Err(ConfigError::NoVm);
        }
        for (index, vm) in self.vms.iter().enumerate() {
            vm.check()?;
            let cid = vm.guest_cid;
            if self.vms[..index].iter().any(|other| other.guest_cid == cid) {
                return Err(ConfigError::DuplicateCid(cid));
            }
        }
        let paths: Vec<SocketPath<'_>> = self.paths().collect();
        Ok(paths::check(&paths)?)
    }

    /// The directories in which the process makes and removes sockets.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        self.paths().map(|socket| directory_of(socket.path))
    }

    fn paths(&self) -> impl Iterator<Item = SocketPath<'_>> {
        let stats = self.stats_path.as_deref().map(|path| SocketPath {
            option: "--stats-path",
            path,
            is_uds_path: false,
        });
        self.vms.iter().flat_map(VmConfig::paths).chain(stats)
    }
}

impl VmConfig {
    /// The group of a VM that names none.
    pub const DEFAULT_GROUP: &str = "default";
    /// The default of [`tx_buffer_size`](Self::tx_buffer_size).
    pub const DEFAULT_TX_BUFFER_SIZE: u32 = 256 * 1024;
    /// The default of [`queue_size`](Self::queue_size).
    pub const DEFAULT_QUEUE_SIZE: u16 = 1024;
    /// The default of [`max_connections`](Self::max_connections).
    pub const DEFAULT_MAX_CONNECTIONS: usize = 1024;
    /// The default of [`busy_poll`](Self::busy_poll).
    pub const DEFAULT_BUSY_POLL: Duration = Duration::from_micros(100);

    /// The device of the guest `cid`, with the default for everything else. A VMM connects to `socket`, host programs
    /// connect to `uds_path`; both are bound.
    pub fn new(cid: Cid, socket: impl Into<PathBuf>, uds_path: impl Into<PathBuf>) -> Self {
        Self {
            guest_cid: cid,
            socket: Socket::Path(socket.into()),
            host: HostSide::unix(uds_path),
            guest_ports: Vec::new(),
            host_ports: Vec::new(),
            groups: vec![Self::DEFAULT_GROUP.into()],
            sibling_dirs: Vec::new(),
            wait_for_guest: Duration::ZERO,
            tx_buffer_size: Self::DEFAULT_TX_BUFFER_SIZE,
            queue_size: Self::DEFAULT_QUEUE_SIZE,
            max_connections: Self::DEFAULT_MAX_CONNECTIONS,
            busy_poll: Self::DEFAULT_BUSY_POLL,
            access: SocketAccess::default(),
        }
    }

    /// Checks all but the paths.
    fn check(&self) -> Result<(), ConfigError> {
        // A `Cid` may also be the host's, or one that a packet carried.
        Cid::try_from(self.guest_cid.get())?;
        if !(1..=MAX_TX_BUFFER).contains(&self.tx_buffer_size) {
            return Err(ConfigError::TxBufferSize(self.tx_buffer_size));
        }
        if !(2..=MAX_QUEUE_SIZE).contains(&self.queue_size) || !self.queue_size.is_power_of_two() {
            return Err(ConfigError::QueueSize(self.queue_size));
        }
        if self.max_connections == 0 {
            return Err(ConfigError::MaxConnections);
        }
        if self.busy_poll > MAX_BUSY_POLL {
            return Err(ConfigError::BusyPoll(self.busy_poll.as_micros()));
        }
        Ok(())
    }

    fn paths(&self) -> impl Iterator<Item = SocketPath<'_>> {
        let socket = match &self.socket {
            Socket::Path(path) => Some(SocketPath {
                option: "--socket",
                path,
                is_uds_path: false,
            }),
            Socket::Inherited(_) => None,
        };
        let uds = self.host.uds_path().map(|path| SocketPath {
            option: "--uds-path",
            path,
            is_uds_path: true,
        });
        uds.into_iter().chain(socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(cid: u32) -> VmConfig {
        let path = |name| format!("/tmp/{name}{cid}");
        VmConfig::new(Cid::try_from(cid).unwrap(), path("vhost"), path("uds"))
    }

    fn check(vms: impl Into<Vec<VmConfig>>) -> Result<(), String> {
        let checked = ProcessConfig::new(vms.into()).check();
        checked.map_err(|error| error.to_string())
    }

    #[track_caller]
    fn assert_refused(vms: impl Into<Vec<VmConfig>>, message: &str) {
        let error = check(vms).unwrap_err();
        assert!(error.contains(message), "{error} should say {message}");
    }

    fn changed(change: impl FnOnce(&mut VmConfig)) -> [VmConfig; 1] {
        let mut vm = vm(4);
        change(&mut vm);
        [vm]
    }

    #[test]
    fn the_defaults_are_right() {
        assert_eq!(check([vm(4)]), Ok(()));
        assert_eq!(check([vm(4), vm(5), vm(6)]), Ok(()));
    }

    #[test]
    fn a_process_without_a_vm_is_refused() {
        assert_refused([], "no VM is given");
    }

    #[test]
    fn cids_that_are_no_guests_are_refused() {
        let message = "--guest-cid=2: ";
        assert_refused(changed(|vm| vm.guest_cid = Cid::HOST), message);
        let raw = Cid::from_raw(1 << 32);
        assert_refused(changed(|vm| vm.guest_cid = raw), "3 to 4294967294");
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        assert_refused(changed(|vm| vm.tx_buffer_size = 0), "--tx-buffer-size=0");
        assert_refused(changed(|vm| vm.tx_buffer_size = MAX_TX_BUFFER + 1), "bytes");
        assert_refused(changed(|vm| vm.queue_size = 100), "power of two");
        assert_refused(changed(|vm| vm.queue_size = 1), "power of two");
        assert_refused(changed(|vm| vm.max_connections = 0), "at least one");
        let second = Duration::from_secs(1);
        assert_refused(changed(|vm| vm.busy_poll = second), "10000 microseconds");
    }

    #[test]
    fn each_vm_is_checked() {
        let mut vms = [vm(4), vm(5)];
        vms[1].queue_size = 3;
        assert_refused(vms, "--queue-size=3");
    }

    #[test]
    fn two_vms_need_two_cids() {
        let mut vms = [vm(4), vm(5)];
        vms[1].guest_cid = vms[0].guest_cid;
        assert_refused(vms, "--guest-cid=4: another VM has this CID");
    }

    #[test]
    fn two_vms_share_no_path() {
        let mut vms = [vm(4), vm(5)];
        vms[1].host = HostSide::unix("/tmp/vhost4");
        assert_refused(vms, "--uds-path /tmp/vhost4: ");
        let mut vms = [vm(4), vm(5)];
        vms[1].socket = Socket::Path("/tmp/./vhost4".into());
        assert_refused(vms, "--socket /tmp/./vhost4: ");
    }

    #[test]
    fn a_guest_reaches_no_socket_of_another_vm_as_a_port() {
        let mut vms = [vm(4), vm(5)];
        vms[0].host = HostSide::unix("/tmp/vm");
        vms[1].host = HostSide::unix("/tmp/vm_4");
        let message = "--uds-path /tmp/vm_4: a guest's connections to a port of --uds-path /tmp/vm";
        assert_refused(vms.clone(), message);
        vms.reverse();
        assert_refused(vms, message);
    }

    #[test]
    fn the_statistics_socket_has_a_path_of_its_own() {
        for (path, message) in [("/tmp/./uds4", "its own"), ("/tmp/uds4_80", "to a port")] {
            let config = ProcessConfig {
                stats_path: Some(path.into()),
                ..ProcessConfig::new(vec![vm(4)])
            };
            let error = config.check().unwrap_err().to_string();
            assert!(error.starts_with("--stats-path"), "{error}");
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn an_inherited_socket_has_no_path() {
        assert_eq!(
            check(changed(|vm| vm.socket = Socket::Inherited(3))),
            Ok(())
        );
    }

    #[test]
    fn every_sandbox_has_a_name() {
        let read = Sandbox::NAMES.map(|name| name.parse::<Sandbox>().unwrap());
        assert_eq!(read, [Sandbox::Auto, Sandbox::Strict, Sandbox::Off]);
        assert_eq!(read.map(|sandbox| sandbox.to_string()), Sandbox::NAMES);
        assert_eq!("on".parse::<Sandbox>(), Err(ConfigError::Sandbox));
    }
}
