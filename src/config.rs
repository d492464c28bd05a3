//! The configuration of a process and its VMs, and the check for mistakes in it.
//!
//! The command line makes a [`ProcessConfig`]; an embedder makes a [`VmConfig`] with [`VmConfig::new`] and changes what
//! should differ from the defaults. Nothing here touches a socket or changes a file.

mod access;
mod check;
mod error;
pub mod file;
pub mod options;
mod paths;
mod yaml;

use std::fmt;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

pub use self::access::{AccessError, SocketAccess, SocketGroup, SocketMode};
pub use self::check::Mistake;
pub use self::error::ConfigError;
pub use self::paths::{PathError, directory_of, sibling_path, with_suffix};
use crate::packet::header::{Cid, PacketType};

/// The configuration of a process: its VMs, and what they share.
#[derive(Clone, Debug)]
pub struct ProcessConfig {
    /// The VMs that the process serves.
    pub vms: Vec<VmConfig>,
    /// Path of the statistics socket. The default is none.
    pub stats_path: Option<PathBuf>,
    /// Path of the socket at which a successor takes the VMs over. The default is none.
    pub handover_path: Option<PathBuf>,
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
    /// Whether the guest has connections of messages (SOCK_SEQPACKET) beside streams.
    pub seqpacket: bool,
    /// How long a host program waits for a VMM, the guest's driver, or a guest program that listens. Zero: not at all.
    pub wait_for_guest: Duration,
    /// How many bytes from the guest each connection buffers for its host program, from 1 to 2^30.
    pub tx_buffer_size: u32,
    /// The largest ring that is offered to the guest, in entries: a power of two from 2 to 32768.
    pub queue_size: u16,
    /// The most connections at once that the guest has opened, the most that host programs have, and the most that siblings have;
    /// at least 1. A third of that is kept for each, whatever the others have.
    pub max_connections: usize,
    /// The most host programs at once that have connected and not said which port they want, at least 1. One more ends the wait
    /// of the oldest. Also the most that wait for the guest; one more does not.
    pub max_clients: usize,
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
        listen: Vec<VsockPort>,
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

/// A port of the host's AF_VSOCK to listen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VsockPort {
    /// The port.
    pub port: u32,
    /// What its connections carry.
    pub packet_type: PacketType,
}

/// A port, and the Unix socket that stands for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortPath {
    /// The port.
    pub port: u32,
    /// What its connections carry.
    pub packet_type: PacketType,
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

impl ProcessConfig {
    /// A process that serves these VMs, without a statistics socket and with the default sandbox.
    pub fn new(vms: Vec<VmConfig>) -> Self {
        Self {
            vms,
            stats_path: None,
            handover_path: None,
            access: SocketAccess::default(),
            sandbox: Sandbox::default(),
        }
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
    /// The default of [`max_clients`](Self::max_clients).
    pub const MAX_CLIENTS: usize = 1024;
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
            seqpacket: true,
            wait_for_guest: Duration::ZERO,
            tx_buffer_size: Self::DEFAULT_TX_BUFFER_SIZE,
            queue_size: Self::DEFAULT_QUEUE_SIZE,
            max_connections: Self::DEFAULT_MAX_CONNECTIONS,
            max_clients: Self::MAX_CLIENTS,
            busy_poll: Self::DEFAULT_BUSY_POLL,
            access: SocketAccess::default(),
        }
    }

    /// The types of connections that the guest may have.
    pub fn packet_types(&self) -> impl Iterator<Item = PacketType> {
        let messages = self.seqpacket.then_some(PacketType::Seqpacket);
        [PacketType::Stream].into_iter().chain(messages)
    }

    /// Path of the socket for host programs that send messages: that of streams with `_seqpacket` behind it.
    pub fn seqpacket_path(&self) -> Option<PathBuf> {
        let path = self.host.uds_path().filter(|_| self.seqpacket)?;
        Some(with_suffix(path, paths::SEQPACKET_SUFFIX))
    }
}
