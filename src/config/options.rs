//! The options of one VM. The command line, `--vm` and a configuration file have the same ones, and all are read here.
//!
//! clap reads the command line into [`VmOptions`]. `--vm` and a file consist of keys and values; an [`OptionReader`] gives
//! each pair to clap as if it stood on the command line, so that an option has one definition, one parser and one help text.

use std::collections::HashSet;
use std::ffi::OsString;
use std::num::ParseIntError;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, Args, Command, FromArgMatches, ValueEnum};
use thiserror::Error;

use super::{
    ConfigError, HostSide, PortPath, Socket, SocketAccess, SocketGroup, SocketMode, VmConfig,
    VsockPort,
};
use crate::packet::header::{Cid, PacketType};

/// A key or a value that no option of a VM has.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OptionError {
    /// There is no such option.
    #[error("{0}: no such key")]
    Unknown(String),
    /// The option takes one value.
    #[error("{0}: given twice")]
    Twice(String),
    /// The pairs can't be read together.
    #[error("{0}")]
    Together(String),
    /// The value can't be read.
    #[error("{key}={value}: {mistake}")]
    Value {
        /// The key as it was written.
        key: String,
        /// The value.
        value: String,
        /// What is wrong.
        mistake: String,
    },
}

/// The options of one VM, or what all VMs have that give no value of their own. Without a value, the default of
/// [`VmConfig::new`] holds.
#[derive(Args, Clone, Debug, Default)]
pub struct VmOptions {
    /// The guest's CID, from 3 to 4294967294
    #[arg(long, value_name = "CID")]
    pub guest_cid: Option<u64>,

    /// Path of the Unix socket that the VMM connects to; it is created
    #[arg(long, visible_alias = "socket-path", value_name = "SOCKET")]
    pub socket: Option<PathBuf>,

    /// Path of the Unix socket that host programs connect to; it is created
    #[arg(long, value_name = "UDS_PATH")]
    pub uds_path: Option<PathBuf>,

    /// Inherited descriptor instead of SOCKET: a listening Unix socket, or one that is connected to a VMM
    #[arg(long, value_name = "FD")]
    pub fd: Option<RawFd>,

    /// Instead of UDS_PATH: the guest's connections go to the same port of this CID of the host's AF_VSOCK
    #[arg(long, value_name = "CID")]
    pub forward_cid: Option<u32>,

    /// With --forward-cid: ports of the host's AF_VSOCK, joined by `+`, that lead to the guest's ports of the same
    /// numbers; with `,seqpacket` behind PORT, for messages
    #[arg(long, value_name = "PORT+...", value_delimiter = '+', action = ArgAction::Append)]
    pub forward_listen: Vec<VsockPort>,

    /// A Unix socket for one port of the guest: every connection goes to the guest's PORT, without CONNECT and OK. It carries
    /// messages with `,seqpacket` behind PATH. Repeatable
    #[arg(long, value_name = "PORT=PATH", action = ArgAction::Append)]
    pub guest_port: Vec<PortPath>,

    /// The Unix socket to which the guest's connections to CID 2 and PORT go, instead of `UDS_PATH_<port>`; with
    /// `,seqpacket` behind PATH, those that carry messages. Repeatable
    #[arg(long, value_name = "PORT=PATH", action = ArgAction::Append)]
    pub host_port: Vec<PortPath>,

    /// Groups of the VM, joined by `+`. VMs of this process that share a group reach each other [default: default]
    #[arg(long, value_name = "GROUP+...", value_delimiter = '+', action = ArgAction::Append)]
    pub groups: Vec<String>,

    /// Directory through which VMs of several processes reach each other: each listens at `DIR/<CID>.vsock`. Repeatable
    #[arg(long, value_name = "DIR", action = ArgAction::Append)]
    pub sibling_dir: Vec<PathBuf>,

    /// Whether the guest has connections of messages (SOCK_SEQPACKET) beside streams, with a socket for host programs at
    /// `UDS_PATH_seqpacket` [default: on]
    #[arg(long, value_name = "on|off", hide_possible_values = true)]
    pub seqpacket: Option<Switch>,

    /// How long a host program that connects before the guest's program listens waits for it [default: 0]
    #[arg(long, value_name = "SECONDS")]
    pub wait_for_guest: Option<u32>,

    #[arg(long, value_name = "BYTES", help = with_default(
        "Bytes from the guest that one connection buffers for a host program that does not read",
        VmConfig::DEFAULT_TX_BUFFER_SIZE as u64))]
    #[allow(missing_docs)]
    pub tx_buffer_size: Option<u32>,

    #[arg(long, value_name = "ENTRIES", help = with_default(
        "Largest ring offered to the guest, a power of two", VmConfig::DEFAULT_QUEUE_SIZE as u64))]
    #[allow(missing_docs)]
    pub queue_size: Option<u64>,

    #[arg(long, value_name = "COUNT", help = with_default(
        "Maximum number of open connections for each side: those opened by the guest, by host programs and by siblings. A third is \
         reserved for each side. Further ones are refused", VmConfig::DEFAULT_MAX_CONNECTIONS as u64))]
    #[allow(missing_docs)]
    pub max_connections: Option<usize>,

    #[arg(long, value_name = "MICROSECONDS", help = with_default(
        "Poll for more work for at most this long before sleeping, where polling pays off; 0 turns it off",
        VmConfig::DEFAULT_BUSY_POLL.as_micros() as u64))]
    #[allow(missing_docs)]
    pub busy_poll: Option<u64>,

    /// Permissions of the sockets, in octal; connecting takes `w` [default: 600, with a group 660]
    #[arg(long, value_name = "MODE")]
    pub socket_mode: Option<SocketMode>,

    /// Group of the sockets, by name or number, instead of the daemon's own
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<SocketGroup>,
}

fn with_default(help: &str, default: u64) -> String {
    format!("{help} [default: {default}]")
}

/// The listening sockets of one VM that the process has inherited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InheritedSockets {
    /// For the VMM.
    pub socket: Option<RawFd>,
    /// For host programs.
    pub uds: Option<RawFd>,
}

impl VmOptions {
    /// These options, with `defaults` for those that have no value. A list replaces the default one.
    pub fn or(self, defaults: &Self) -> Self {
        // A VM that has one side for host programs has the other not even by default.
        let has_host = self.uds_path.is_some() || self.forward_cid.is_some();
        let default_host = if has_host { &Self::default() } else { defaults };
        Self {
            guest_cid: self.guest_cid.or(defaults.guest_cid),
            socket: self.socket.or_else(|| defaults.socket.clone()),
            uds_path: self.uds_path.or_else(|| default_host.uds_path.clone()),
            fd: self.fd.or(defaults.fd),
            forward_cid: self.forward_cid.or(default_host.forward_cid),
            forward_listen: or_list(self.forward_listen, &defaults.forward_listen),
            guest_port: or_list(self.guest_port, &defaults.guest_port),
            host_port: or_list(self.host_port, &defaults.host_port),
            groups: or_list(self.groups, &defaults.groups),
            sibling_dir: or_list(self.sibling_dir, &defaults.sibling_dir),
            seqpacket: self.seqpacket.or(defaults.seqpacket),
            wait_for_guest: self.wait_for_guest.or(defaults.wait_for_guest),
            tx_buffer_size: self.tx_buffer_size.or(defaults.tx_buffer_size),
            queue_size: self.queue_size.or(defaults.queue_size),
            max_connections: self.max_connections.or(defaults.max_connections),
            busy_poll: self.busy_poll.or(defaults.busy_poll),
            socket_mode: self.socket_mode.or(defaults.socket_mode),
            socket_group: self.socket_group.or(defaults.socket_group),
        }
    }

    /// The VM that these options describe. Inherited sockets take the place of its paths.
    ///
    /// # Errors
    /// An option is missing, or does not go with another. [`ProcessConfig::check`](super::ProcessConfig::check) finds the other
    /// mistakes.
    pub fn vm(self, inherited: InheritedSockets) -> Result<VmConfig, ConfigError> {
        let access = self.access();
        let guest_cid = self.guest_cid.ok_or(ConfigError::Missing("guest-cid"))?;
        let guest_cid = Cid::try_from(guest_cid)?;
        let socket = match (self.fd.or(inherited.socket), self.socket) {
            (Some(_), Some(_)) if self.fd.is_some() => {
                return Err(ConfigError::Conflict("fd", "socket"));
            }
            (Some(fd), _) => Socket::Inherited(fd),
            (None, Some(path)) => Socket::Path(path),
            (None, None) => return Err(ConfigError::Missing("socket")),
        };
        let host = match (self.uds_path, self.forward_cid) {
            (Some(_), Some(_)) => return Err(ConfigError::Conflict("forward-cid", "uds-path")),
            (Some(_), None) if !self.forward_listen.is_empty() => {
                return Err(ConfigError::ForwardListenAlone);
            }
            (Some(path), None) => HostSide::Unix {
                path,
                fd: inherited.uds,
            },
            (None, Some(cid)) => HostSide::Vsock {
                cid: Cid::from_raw(cid.into()),
                listen: self.forward_listen,
            },
            (None, None) => return Err(ConfigError::Missing("uds-path")),
        };
        let default = VmConfig::new(guest_cid, "", "");
        let seconds = |count: u32| Duration::from_secs(count.into());
        Ok(VmConfig {
            guest_cid,
            socket,
            host,
            guest_ports: self.guest_port,
            host_ports: self.host_port,
            groups: groups(self.groups)?,
            sibling_dirs: self.sibling_dir,
            seqpacket: self.seqpacket != Some(Switch::Off),
            wait_for_guest: self.wait_for_guest.map_or(default.wait_for_guest, seconds),
            tx_buffer_size: self.tx_buffer_size.unwrap_or(default.tx_buffer_size),
            queue_size: match self.queue_size {
                Some(size) => u16::try_from(size).map_err(|_| ConfigError::QueueSize(size))?,
                None => default.queue_size,
            },
            max_connections: self.max_connections.unwrap_or(default.max_connections),
            max_clients: default.max_clients,
            busy_poll: self
                .busy_poll
                .map_or(default.busy_poll, Duration::from_micros),
            access,
        })
    }

    /// Who may connect to the sockets.
    pub fn access(&self) -> SocketAccess {
        SocketAccess::new(self.socket_mode, self.socket_group)
    }
}

fn or_list<T: Clone>(own: Vec<T>, default: &[T]) -> Vec<T> {
    if own.is_empty() {
        default.to_vec()
    } else {
        own
    }
}

/// The groups of a VM. One that names none is in the default group; one that names the empty group is in no group.
fn groups(names: Vec<String>) -> Result<Vec<String>, ConfigError> {
    let mut groups: Vec<String> = Vec::new();
    match &names[..] {
        [] => groups.push(VmConfig::DEFAULT_GROUP.into()),
        [name] if name.is_empty() => {}
        names if names.iter().any(String::is_empty) => return Err(ConfigError::GroupName),
        _ => {}
    }
    for name in names {
        if !name.is_empty() && !groups.contains(&name) {
            groups.push(name);
        }
    }
    Ok(groups)
}

/// Whether something is there. YAML's words for it are understood as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// It is.
    #[value(alias = "true", alias = "yes")]
    On,
    /// It is not.
    #[value(alias = "false", alias = "no")]
    Off,
}

/// What follows the path of a port's socket that carries messages.
const SEQPACKET: &str = ",seqpacket";

impl FromStr for VsockPort {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        let (port, packet_type) = typed(text);
        let port = port.parse()?;
        Ok(Self { port, packet_type })
    }
}

/// A text, and the type that it names at its end.
fn typed(text: &str) -> (&str, PacketType) {
    match text.strip_suffix(SEQPACKET) {
        Some(text) => (text, PacketType::Seqpacket),
        None => (text, PacketType::Stream),
    }
}

impl FromStr for PortPath {
    type Err = PortPathError;

    fn from_str(text: &str) -> Result<Self, PortPathError> {
        let (port, path) = text.split_once('=').ok_or(PortPathError)?;
        let port = port.parse().map_err(|_| PortPathError)?;
        let (path, packet_type) = typed(path);
        Ok(Self {
            port,
            packet_type,
            path: path.into(),
        })
    }
}

/// The text is not that of a port and a path.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("say PORT=PATH or PORT=PATH,seqpacket, with a port from 0 to 4294967294")]
pub struct PortPathError;

/// How many values an option has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionKind {
    /// One.
    Single,
    /// Any number.
    List,
    /// Any number, each a port and a path.
    PortPaths,
}

/// Reads the options of one VM from keys and values.
pub struct OptionReader {
    command: Command,
    /// The pairs so far, as arguments of the command line.
    args: Vec<OsString>,
    seen: HashSet<String>,
}

impl Default for OptionReader {
    fn default() -> Self {
        let command = Command::new("vm").no_binary_name(true);
        let command = command.disable_help_flag(true).disable_version_flag(true);
        Self {
            command: VmOptions::augment_args(command),
            args: Vec::new(),
            seen: HashSet::new(),
        }
    }
}

impl OptionReader {
    /// How many values the option of this key has.
    ///
    /// # Errors
    /// There is no such option.
    pub fn kind(&self, key: &str) -> Result<OptionKind, OptionError> {
        let arg = self.find(key)?;
        Ok(match (arg.get_action(), arg.get_long()) {
            (ArgAction::Append, Some("guest-port" | "host-port")) => OptionKind::PortPaths,
            (ArgAction::Append, _) => OptionKind::List,
            _ => OptionKind::Single,
        })
    }

    /// Adds a pair. A key is the name of an option, with `-` or `_` between its words.
    ///
    /// # Errors
    /// There is no such option, it has a value already, or can't have this one.
    pub fn add(&mut self, key: &str, value: &str) -> Result<(), OptionError> {
        let is_single = self.kind(key)? == OptionKind::Single;
        let id = self.find(key)?.get_id().to_string();
        if !self.seen.insert(id) && is_single {
            return Err(OptionError::Twice(key.to_owned()));
        }
        let option = OsString::from(format!("--{}={value}", key.replace('_', "-")));
        if let Err(error) = self.command.try_get_matches_from_mut([&option]) {
            return Err(OptionError::Value {
                key: key.to_owned(),
                value: value.to_owned(),
                mistake: mistake(&error),
            });
        }
        self.args.push(option);
        Ok(())
    }

    /// The options that have been read.
    ///
    /// # Errors
    /// None, where each pair was added without one.
    pub fn finish(mut self) -> Result<VmOptions, OptionError> {
        let read = self.command.try_get_matches_from_mut(self.args);
        let read = read.and_then(|matches| VmOptions::from_arg_matches(&matches));
        read.map_err(|error| OptionError::Together(mistake(&error)))
    }

    fn find(&self, key: &str) -> Result<&Arg, OptionError> {
        let name = key.replace('_', "-");
        let mut args = self.command.get_arguments();
        let found = args.find(|arg| {
            let aliases = arg.get_all_aliases().unwrap_or_default();
            arg.get_long() == Some(&name) || aliases.contains(&name.as_str())
        });
        found.ok_or_else(|| OptionError::Unknown(key.to_owned()))
    }
}

/// What clap says about a value, without the option and the value.
fn mistake(error: &clap::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) if source.is::<ParseIntError>() => "not a number in range".into(),
        Some(source) => source.to_string(),
        None => match error.get(ContextKind::ValidValue) {
            Some(ContextValue::Strings(names)) if !names.is_empty() => {
                format!("say {}", names.join(" or "))
            }
            _ => "a value is missing".into(),
        },
    }
}
