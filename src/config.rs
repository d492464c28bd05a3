//! What the daemon is told to do, and the mistakes in it.

use std::fmt;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use nix::unistd::{Gid, Group};
use thiserror::Error;

use crate::packet::header::{Cid, InvalidCid};

/// The longest path that a Unix socket address holds, in bytes, its closing NUL not counted.
const MAX_SOCKET_PATH: usize = 107;

/// What stands behind the uds path for the highest port that a guest can connect to.
const LONGEST_PORT: &str = "_4294967295";

/// The largest buffer per connection, in bytes.
const MAX_TX_BUFFER: u32 = 1 << 30;

/// The largest ring (virtio 1.2, 2.7).
const MAX_QUEUE_SIZE: u16 = 32768;

/// The longest look before sleep.
const MAX_BUSY_POLL: Duration = Duration::from_millis(10);

/// The configuration of a process: its VMs, and what they share.
#[derive(Clone, Debug)]
pub struct ProcessConfig {
    /// The VMs that the process serves.
    pub vms: Vec<VmConfig>,
    /// Path of the statistics socket.
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
    /// The socket for host programs, and the beginning of the paths where they listen themselves.
    pub uds_path: PathBuf,
    /// The descriptor of the socket for host programs, where somebody has made it already.
    pub uds_fd: Option<RawFd>,
    /// The buffer of each connection for bytes that the guest sends, in bytes.
    pub tx_buffer_size: u32,
    /// The largest ring that is offered to the guest, in entries.
    pub queue_size: u16,
    /// How many connections there may be at once.
    pub max_connections: usize,
    /// How long to look for more work before the worker sleeps.
    pub busy_poll: Duration,
    /// Who may connect to the sockets that the daemon makes.
    pub access: SocketAccess,
}

/// Where a listening socket comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Socket {
    /// The daemon makes it at this path, and removes it in the end.
    Path(PathBuf),
    /// It is there already, as this descriptor.
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

/// What the daemon gives up before it serves. [`sandbox`](crate::daemon::sandbox) says what that is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sandbox {
    /// All that the kernel lets it give up.
    #[default]
    Auto,
    /// All of it, or it does not serve.
    Strict,
    /// Nothing.
    Off,
}

impl Sandbox {
    /// The names of all of them, as they are written.
    pub const NAMES: [&str; 3] = ["auto", "strict", "off"];
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

/// The permissions of a socket's file. To connect takes the one to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketMode(pub u32);

impl SocketMode {
    /// The owner alone.
    pub const OWNER: Self = Self(0o600);
    /// The owner and the group.
    pub const GROUP: Self = Self(0o660);
}

impl FromStr for SocketMode {
    type Err = ConfigError;

    /// Reads octal digits.
    fn from_str(digits: &str) -> Result<Self, ConfigError> {
        let is_octal = digits.bytes().all(|digit| (b'0'..b'8').contains(&digit));
        let mode = u32::from_str_radix(digits, 8).ok();
        let mode = mode.filter(|mode| is_octal && *mode <= 0o777);
        mode.map(Self).ok_or(ConfigError::SocketMode)
    }
}

/// The group of a socket's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketGroup(pub Gid);

impl FromStr for SocketGroup {
    type Err = ConfigError;

    /// Looks for a group of this name, and takes a number that is no name as it is.
    fn from_str(name: &str) -> Result<Self, ConfigError> {
        let group = Group::from_name(name).map_err(ConfigError::Groups)?;
        // The highest number stands for none.
        let number = || name.parse().ok().filter(|number| *number != u32::MAX);
        let gid = group.map(|group| group.gid);
        let gid = gid.or_else(|| number().map(Gid::from_raw));
        gid.map(Self).ok_or(ConfigError::SocketGroup)
    }
}

/// Who may connect to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketAccess {
    /// The permissions of its file.
    pub mode: SocketMode,
    /// The group of its file, where it is not the daemon's.
    pub group: Option<SocketGroup>,
}

impl SocketAccess {
    /// What was asked for, and what goes with it. Who names a group wants it to connect.
    pub fn new(mode: Option<SocketMode>, group: Option<SocketGroup>) -> Self {
        let usual = match group {
            Some(_) => SocketMode::GROUP,
            None => SocketMode::OWNER,
        };
        Self {
            mode: mode.unwrap_or(usual),
            group,
        }
    }
}

impl Default for SocketAccess {
    fn default() -> Self {
        Self::new(None, None)
    }
}

/// A mistake in a [`Config`].
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The CID is reserved (virtio 1.2, 5.10.4), or does not fit 32 bits.
    #[error("--guest-cid: {0}")]
    Cid(#[from] InvalidCid),
    /// The path does not fit a Unix socket address.
    #[error(
        "{option} {path}: {len} bytes are too long for a Unix socket, the limit is {limit}{why}"
    )]
    PathTooLong {
        /// The option that gave the path.
        option: &'static str,
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
        /// How many bytes it may have.
        limit: usize,
        /// Where the limit comes from.
        why: &'static str,
    },
    /// The path names no file.
    #[error("{option} {path}: this is not the path of a file")]
    NoFile {
        /// The option that gave the path.
        option: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The folder that would hold the socket is not there.
    #[error("{option} {path}: the folder {folder} does not exist, make it first")]
    NoFolder {
        /// The option that gave the path.
        option: &'static str,
        /// The path.
        path: PathBuf,
        /// The folder.
        folder: PathBuf,
    },
    /// Two sockets would be the same file.
    #[error("{0} {1}: this is the path of another socket, each needs its own")]
    SamePath(&'static str, PathBuf),
    /// The guest could connect to it.
    #[error("{0} {1}: this is where the guest's connections to a port go, choose another name")]
    SocketIsPort(&'static str, PathBuf),
    /// No connection could work with this buffer.
    #[error("--tx-buffer-size={0}: a buffer has from 1 to {MAX_TX_BUFFER} bytes")]
    TxBufferSize(u32),
    /// Rings have other sizes (virtio 1.2, 2.7).
    #[error("--queue-size={0}: a ring has a power of two from 2 to {MAX_QUEUE_SIZE} entries")]
    QueueSize(u16),
    /// Without a connection there is nothing to serve.
    #[error("--max-connections=0: at least one connection must be possible")]
    MaxConnections,
    /// A look is meant to be short.
    #[error("--busy-poll={0}: look for at most {max} microseconds", max = MAX_BUSY_POLL.as_micros())]
    BusyPoll(u128),
    /// There is no such sandbox.
    #[error("it is one of {}", Sandbox::NAMES.join(", "))]
    Sandbox,
    /// These are no permissions.
    #[error("permissions are octal digits, from 0 to 777")]
    SocketMode,
    /// There is no such group.
    #[error("there is no group of this name, and it is no number of one")]
    SocketGroup,
    /// The daemon serves one VM.
    #[error("{0} times --vm: each VM has a daemon of its own")]
    Vms(usize),
    /// The service manager has made something else than was expected.
    #[error("the sockets of the service manager: {0}")]
    Activation(String),
    /// Nobody knows whether there is.
    #[error("the groups can't be read: {0}")]
    Groups(nix::Error),
}

impl ProcessConfig {
    /// Looks for mistakes, and changes nothing.
    pub fn check(&self) -> Result<(), ConfigError> {
        let mut taken = Vec::new();
        for vm in &self.vms {
            vm.check()?;
        }
        for (option, path, suffix, why) in self.sockets() {
            let real = check_path(option, path, suffix, why)?;
            if taken.contains(&real) {
                return Err(ConfigError::SamePath(option, path.to_owned()));
            }
            taken.push(real);
        }
        for vm in &self.vms {
            let uds_path = check_path("--uds-path", &vm.uds_path, LONGEST_PORT, "")?;
            for (option, path, suffix, why) in self.sockets() {
                let real = check_path(option, path, suffix, why)?;
                if is_port_of(&real, &uds_path) {
                    return Err(ConfigError::SocketIsPort(option, path.to_owned()));
                }
            }
        }
        Ok(())
    }

    /// The paths of all sockets that the process makes, with the options that name them.
    fn sockets(&self) -> impl Iterator<Item = (&'static str, &Path, &'static str, &'static str)> {
        let stats = self.stats_path.as_deref();
        let stats = stats.map(|path| ("--stats-path", path, "", ""));
        self.vms.iter().flat_map(VmConfig::sockets).chain(stats)
    }

    /// The directories of all sockets.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        self.sockets().map(|(_, path, _, _)| directory_of(path))
    }
}

impl VmConfig {
    /// The device of the guest `cid` with a VMM's socket and a host programs' socket at these paths, and the defaults.
    pub fn new(cid: Cid, socket: impl Into<PathBuf>, uds_path: impl Into<PathBuf>) -> Self {
        Self {
            guest_cid: cid,
            socket: Socket::Path(socket.into()),
            uds_path: uds_path.into(),
            uds_fd: None,
            tx_buffer_size: 262_144,
            queue_size: 1024,
            max_connections: 1024,
            busy_poll: Duration::from_micros(100),
            access: SocketAccess::default(),
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
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

    /// The sockets that are made for it: option, path, what must fit behind it, and why.
    fn sockets(&self) -> impl Iterator<Item = (&'static str, &Path, &'static str, &'static str)> {
        let socket = match &self.socket {
            Socket::Path(path) => Some(("--socket", path.as_path(), "", "")),
            Socket::Inherited(_) => None,
        };
        let why = " so that the longest port fits behind it";
        let uds = ("--uds-path", self.uds_path.as_path(), LONGEST_PORT, why);
        [uds].into_iter().chain(socket)
    }
}

/// The folder that a path is in.
pub fn directory_of(path: &Path) -> &Path {
    let folder = path.parent();
    let folder = folder.filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

/// Whether a path is that of a host program which listens for a port of the guest's.
fn is_port_of(path: &Path, uds_path: &Path) -> bool {
    let path = path.as_os_str().as_bytes();
    let port = path.strip_prefix(uds_path.as_os_str().as_bytes());
    let digits = port.and_then(|port| port.strip_prefix(b"_"));
    digits.is_some_and(|digits| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit))
}

/// Checks the path of a socket, and answers how its folder and file are really named.
fn check_path(
    option: &'static str,
    path: &Path,
    suffix: &str,
    why: &'static str,
) -> Result<PathBuf, ConfigError> {
    let (len, limit) = (
        path.as_os_str().as_bytes().len(),
        MAX_SOCKET_PATH - suffix.len(),
    );
    if len > limit {
        let path = path.to_owned();
        return Err(ConfigError::PathTooLong {
            option,
            path,
            len,
            limit,
            why,
        });
    }
    let no_file = || ConfigError::NoFile {
        option,
        path: path.to_owned(),
    };
    let file = path.file_name().ok_or_else(no_file)?;
    let folder = directory_of(path);
    match folder.canonicalize() {
        Ok(real) if real.is_dir() => Ok(real.join(file)),
        _ => Err(ConfigError::NoFolder {
            option,
            path: path.to_owned(),
            folder: folder.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn config() -> VmConfig {
        testing::config(Path::new("/tmp"))
    }

    fn process(vm: VmConfig) -> ProcessConfig {
        ProcessConfig {
            vms: vec![vm],
            stats_path: None,
            access: SocketAccess::default(),
            sandbox: Sandbox::Off,
        }
    }

    fn refused(change: impl FnOnce(&mut VmConfig)) -> String {
        let mut config = config();
        change(&mut config);
        process(config).check().unwrap_err().to_string()
    }

    #[test]
    fn the_example_of_the_readme_is_right() {
        assert_eq!(process(config()).check(), Ok(()));
    }

    #[test]
    fn paths_must_fit_with_the_longest_port() {
        let path = |len: usize| PathBuf::from(format!("/tmp/{}", "x".repeat(len - 5)));
        assert!(
            refused(|config| config.socket = Socket::Path(path(108)))
                .contains("108 bytes are too long")
        );
        assert!(refused(|config| config.uds_path = path(97)).contains("the limit is 96"));
        let config = VmConfig {
            socket: Socket::Path(path(107)),
            uds_path: path(96),
            ..config()
        };
        assert_eq!(process(config).check(), Ok(()));
    }

    #[test]
    fn the_same_file_by_two_names_is_refused() {
        let message = refused(|config| config.uds_path = "/tmp/./vhost".into());
        assert!(message.contains("its own"), "{message}");
        let mut process = process(config());
        process.stats_path = Some("/tmp/./uds".into());
        let message = process.check().unwrap_err().to_string();
        assert!(message.starts_with("--stats-path"), "{message}");
    }

    #[test]
    fn the_guest_must_not_reach_the_vhost_user_socket() {
        assert!(
            refused(|config| config.socket = Socket::Path("/tmp/uds_1".into())).contains("port")
        );
        let config = VmConfig {
            socket: Socket::Path("/tmp/uds_vhost".into()),
            ..config()
        };
        assert_eq!(process(config).check(), Ok(()));
    }

    #[test]
    fn a_missing_folder_is_named() {
        let message =
            refused(|config| config.socket = Socket::Path("/nowhere/at/all.socket".into()));
        assert!(
            message.contains("the folder /nowhere/at does not exist"),
            "{message}"
        );
        assert!(
            refused(|config| config.socket = Socket::Path("/".into()))
                .contains("not the path of a file")
        );
    }

    #[test]
    fn sizes_that_cannot_work_are_refused() {
        assert!(refused(|config| config.tx_buffer_size = 0).contains("--tx-buffer-size=0"));
        assert!(refused(|config| config.tx_buffer_size = MAX_TX_BUFFER + 1).contains("bytes"));
        assert!(refused(|config| config.queue_size = 100).contains("power of two"));
        assert!(refused(|config| config.queue_size = 1).contains("power of two"));
        assert!(refused(|config| config.max_connections = 0).contains("at least one"));
        assert!(refused(|config| config.busy_poll = Duration::from_secs(1)).contains("10000"));
    }

    #[test]
    fn every_sandbox_has_a_name() {
        let read = Sandbox::NAMES.map(|name| name.parse::<Sandbox>().unwrap());
        assert_eq!(read, [Sandbox::Auto, Sandbox::Strict, Sandbox::Off]);
        assert_eq!("on".parse::<Sandbox>(), Err(ConfigError::Sandbox));
    }

    #[test]
    fn modes_are_octal() {
        for (digits, mode) in [("600", 0o600), ("0660", 0o660), ("0", 0), ("777", 0o777)] {
            assert_eq!(digits.parse(), Ok(SocketMode(mode)), "{digits}");
        }
        for digits in [
            "",
            "1000",
            "0o600",
            "+600",
            "-1",
            "8",
            "rw-",
            "77777777777777",
        ] {
            let mode = digits.parse::<SocketMode>();
            assert_eq!(mode, Err(ConfigError::SocketMode), "{digits}");
        }
    }

    #[test]
    fn a_group_has_a_name_or_a_number() {
        assert_eq!("root".parse(), Ok(SocketGroup(Gid::from_raw(0))));
        assert_eq!("54321".parse(), Ok(SocketGroup(Gid::from_raw(54321))));
        for group in ["", "no such group", "-1", "4294967295", "4294967296"] {
            let read = group.parse::<SocketGroup>();
            assert_eq!(read, Err(ConfigError::SocketGroup), "{group}");
        }
    }

    #[test]
    fn a_named_group_may_connect() {
        let group = Some(SocketGroup(Gid::from_raw(5)));
        assert_eq!(SocketAccess::new(None, None).mode, SocketMode::OWNER);
        assert_eq!(SocketAccess::new(None, group).mode, SocketMode::GROUP);
        let given = Some(SocketMode(0o640));
        assert_eq!(SocketAccess::new(given, group).mode, SocketMode(0o640));
    }
}
