//! The command line: its options, the help, and the configuration that they make.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::{
    ConfigError, ProcessConfig, Sandbox, Socket, SocketAccess, SocketGroup, SocketMode, VmConfig,
};
use crate::packet::header::Cid;

/// What `--print-capabilities` prints, as QEMU's docs/interop/vhost-user.json has it.
pub const CAPABILITIES: &str = r#"{ "type": "vsock" }"#;

const EXAMPLE: &str = "\
Example:
  vhost-user-vsock --guest-cid=4 --socket=/tmp/vhost4.socket --uds-path=/tmp/vm4.vsock

  qemu-system-x86_64 <your options> -m 512M \\
    -object memory-backend-memfd,id=mem0,size=512M,share=on -machine q35,memory-backend=mem0 \\
    -chardev socket,id=char0,reconnect=0,path=/tmp/vhost4.socket \\
    -device vhost-user-vsock-pci,chardev=char0

  guest$ nc --vsock -l 1234            host$  nc -U /tmp/vm4.vsock
                                              CONNECT 1234
  host$  nc -l -U /tmp/vm4.vsock_1234  guest$ nc --vsock 2 1234

Exit status: 0 after SIGTERM or SIGINT and when the only VMM of --fd is gone, 1 when something failed, 2 for a mistake in the options.";

/// Gives a virtual machine its virtio-vsock device.
///
/// A VMM connects to SOCKET (vhost-user). Programs in the guest use AF_VSOCK; a program on the host connects to UDS_PATH
/// and writes `CONNECT <port>`, or listens at UDS_PATH_<port> for the guest's connections to CID 2.
#[derive(Parser)]
#[command(version, after_help = EXAMPLE, max_term_width = 100, args_conflicts_with_subcommands = true, args_override_self = true,
    subcommand_negates_reqs = true, disable_help_subcommand = true)]
pub struct Args {
    /// The guest's CID, from 3 to 4294967294
    #[arg(long, value_name = "CID", required_unless_present = "vm")]
    guest_cid: Option<u64>,

    /// Path of the Unix socket to make for the VMM
    #[arg(long, visible_alias = "socket-path", value_name = "SOCKET")]
    socket: Option<PathBuf>,

    /// Path of the Unix socket to make for host programs
    #[arg(long, value_name = "UDS_PATH", required_unless_present = "vm")]
    uds_path: Option<PathBuf>,

    /// Number of a descriptor in place of SOCKET: a Unix socket that listens for VMMs, or one to a VMM
    #[arg(long, value_name = "FD", conflicts_with = "socket")]
    fd: Option<RawFd>,

    /// The first three options in one, and the sizes: guest-cid=CID,socket=SOCKET,uds-path=UDS_PATH
    #[arg(long, value_name = "KEY=VALUE,...", action = ArgAction::Append,
        conflicts_with_all = ["guest_cid", "socket", "uds_path", "fd", "tx_buffer_size", "queue_size"])]
    vm: Vec<Vm>,

    /// Bytes from the guest that one connection holds for a host program that does not read
    #[arg(long, value_name = "BYTES", default_value_t = TX_BUFFER_SIZE)]
    tx_buffer_size: u32,

    /// Largest ring offered to the guest, a power of two
    #[arg(long, value_name = "ENTRIES", default_value_t = QUEUE_SIZE)]
    queue_size: u16,

    /// Most connections at once; one more is refused
    #[arg(long, value_name = "COUNT", default_value_t = 1024)]
    max_connections: usize,

    /// How long to look for more work before sleeping, while that pays; 0 never looks
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 100)]
    busy_poll: u64,

    /// Path of a Unix socket that tells what the daemon counts, as Prometheus text
    #[arg(long, value_name = "STATS_PATH")]
    stats_path: Option<PathBuf>,

    /// Permissions of the sockets, in octal; to connect takes `w` [default: 600, with a group 660]
    #[arg(long, value_name = "MODE")]
    socket_mode: Option<SocketMode>,

    /// Group of the sockets, by name or number, in place of the daemon's own
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<SocketGroup>,

    /// Give up what serving does not need: as far as the kernel can, wholly or not start, or nothing
    #[arg(long, value_name = "SANDBOX", default_value = "auto",
        value_parser = PossibleValuesParser::new(Sandbox::NAMES).try_map(|name| name.parse::<Sandbox>()))]
    sandbox: Sandbox,

    /// Say in JSON what kind of vhost-user device this is, and end
    #[arg(long)]
    print_capabilities: bool,

    /// Log more: -v what connections do, -vv everything. RUST_LOG=<filter> overrides it
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,

    /// What to do other than to serve.
    #[command(subcommand)]
    pub command: Option<Command>,
}

const TX_BUFFER_SIZE: u32 = 262_144;
const QUEUE_SIZE: u16 = 1024;

/// What there is to do besides serving.
#[derive(Subcommand)]
pub enum Command {
    /// Show what a daemon counts, and its connections
    Stats {
        /// The STATS_PATH of the daemon
        path: PathBuf,
        /// Show it anew every so many seconds, until interrupted
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "2")]
        watch: Option<u32>,
    },
}

/// One virtual machine, as `vhost-device-vsock` takes it.
#[derive(Clone)]
struct Vm {
    guest_cid: u64,
    socket: PathBuf,
    uds_path: PathBuf,
    tx_buffer_size: u32,
    queue_size: u16,
}

impl FromStr for Vm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut guest_cid, mut socket, mut uds_path) = (None, None, None);
        let (mut tx_buffer_size, mut queue_size) = (TX_BUFFER_SIZE, QUEUE_SIZE);
        for pair in text.split(',') {
            let (key, value) = pair
                .split_once('=')
                .ok_or(format!("{pair}: not KEY=VALUE"))?;
            let no_number = |_| format!("{pair}: not a number in range");
            match key.replace('_', "-").as_str() {
                "guest-cid" => guest_cid = Some(value.parse().map_err(no_number)?),
                "socket" => socket = Some(value.into()),
                "uds-path" => uds_path = Some(value.into()),
                "tx-buffer-size" => tx_buffer_size = value.parse().map_err(no_number)?,
                "queue-size" => queue_size = value.parse().map_err(no_number)?,
                _ => return Err(format!("{key}: no such key")),
            }
        }
        let missing = |key| format!("{key}= is missing");
        Ok(Self {
            guest_cid: guest_cid.ok_or_else(|| missing("guest-cid"))?,
            socket: socket.ok_or_else(|| missing("socket"))?,
            uds_path: uds_path.ok_or_else(|| missing("uds-path"))?,
            tx_buffer_size,
            queue_size,
        })
    }
}

/// The sockets that a service manager has made, by their numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activation {
    /// For the VMM.
    pub socket: Option<RawFd>,
    /// For host programs.
    pub uds: Option<RawFd>,
}

impl Activation {
    /// Takes the sockets that the environment tells of (sd_listen_fds(3)). One that is named `vhost-user` is for the VMM,
    /// one named `host` for host programs; others come in this order.
    pub fn from_env() -> Result<Self, ConfigError> {
        match sd_notify::listen_fds_with_names() {
            Ok(sockets) => Self::new(sockets),
            Err(error) => Err(ConfigError::Activation(error.to_string())),
        }
    }

    fn new(sockets: impl Iterator<Item = (RawFd, String)>) -> Result<Self, ConfigError> {
        let mut taken = Self::default();
        let is_named = |(_, name): &(RawFd, String)| matches!(&name[..], "vhost-user" | "host");
        let (named, others): (Vec<_>, Vec<_>) = sockets.partition(is_named);
        for (fd, name) in named.into_iter().chain(others) {
            let place = match name.as_str() {
                "vhost-user" => &mut taken.socket,
                "host" => &mut taken.uds,
                _ if taken.socket.is_none() => &mut taken.socket,
                _ => &mut taken.uds,
            };
            if place.replace(fd).is_some() {
                let mistake = format!("descriptor {fd} ({name}) is one too many");
                return Err(ConfigError::Activation(mistake));
            }
        }
        Ok(taken)
    }
}

impl Args {
    /// Reads the command line. The sockets of `activation` need no option.
    pub fn parse_with(activation: &Activation) -> Result<Self, clap::Error> {
        let command = Self::command().mut_arg("socket", |socket| match activation.socket {
            Some(_) => socket,
            None => socket.required_unless_present_any(["vm", "fd"]),
        });
        Self::from_arg_matches(&command.try_get_matches()?)
    }

    /// The configuration that the options make.
    pub fn config(&self, activation: &Activation) -> Result<ProcessConfig, ConfigError> {
        let vm = match &self.vm[..] {
            [] => None,
            [vm] => Some(vm.clone()),
            more => return Err(ConfigError::Vms(more.len())),
        };
        let (guest_cid, socket, uds_path) = match &vm {
            Some(vm) => (vm.guest_cid, vm.socket.clone(), vm.uds_path.clone()),
            None => (
                self.guest_cid.unwrap_or_default(),
                self.socket.clone().unwrap_or_default(),
                self.uds_path.clone().unwrap_or_default(),
            ),
        };
        let access = SocketAccess::new(self.socket_mode, self.socket_group);
        let vm = VmConfig {
            guest_cid: Cid::try_from(guest_cid)?,
            socket: match self.fd.or(activation.socket) {
                Some(fd) => Socket::Inherited(fd),
                None => Socket::Path(socket),
            },
            uds_path,
            uds_fd: activation.uds,
            tx_buffer_size: vm
                .as_ref()
                .map_or(self.tx_buffer_size, |vm| vm.tx_buffer_size),
            queue_size: vm.as_ref().map_or(self.queue_size, |vm| vm.queue_size),
            max_connections: self.max_connections,
            busy_poll: Duration::from_micros(self.busy_poll),
            access,
        };
        Ok(ProcessConfig {
            vms: vec![vm],
            stats_path: self.stats_path.clone(),
            access,
            sandbox: self.sandbox,
        })
    }
}

/// clap's message without its usage lines.
pub fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines: Vec<&str> = lines
        .take_while(|line| !line.starts_with("Usage:"))
        .collect();
    let about_help = "For more information, try '--help'.";
    let message = lines
        .into_iter()
        .filter(|line| *line != about_help)
        .collect::<Vec<_>>()
        .join(" ");
    let hint = if error.kind() == ErrorKind::MissingRequiredArgument {
        " (try --help)"
    } else {
        ""
    };
    format!("{}{hint}", message.trim_start_matches("error: "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_read_as_the_other_daemon_reads_it() {
        let vm: Vm = "guest-cid=5,socket=/a,uds-path=/b,tx-buffer-size=9,queue-size=64"
            .parse()
            .unwrap();
        assert_eq!((vm.guest_cid, vm.tx_buffer_size, vm.queue_size), (5, 9, 64));
        assert_eq!((vm.socket, vm.uds_path), ("/a".into(), "/b".into()));
        for (text, mistake) in [
            ("guest-cid=5,socket=/a", "uds-path= is missing"),
            (
                "guest-cid=x,socket=/a,uds-path=/b",
                "guest-cid=x: not a number",
            ),
            (
                "guest-cid=5,socket=/a,uds-path=/b,groups=c",
                "groups: no such key",
            ),
            ("guest-cid", "not KEY=VALUE"),
        ] {
            let error = text.parse::<Vm>().err().unwrap();
            assert!(error.contains(mistake), "{error}");
        }
    }

    #[test]
    fn sockets_of_the_service_manager_have_names_or_an_order() {
        let new = |sockets: &[(RawFd, &str)]| {
            Activation::new(sockets.iter().map(|(fd, name)| (*fd, (*name).to_owned())))
        };
        let taken = |socket, uds| Ok(Activation { socket, uds });
        assert_eq!(new(&[]), taken(None, None));
        assert_eq!(new(&[(3, "x.socket")]), taken(Some(3), None));
        assert_eq!(new(&[(3, "x"), (4, "x")]), taken(Some(3), Some(4)));
        assert_eq!(
            new(&[(3, "host"), (4, "vhost-user")]),
            taken(Some(4), Some(3))
        );
        assert_eq!(new(&[(3, "x"), (4, "vhost-user")]), taken(Some(4), Some(3)));
        assert!(new(&[(3, "host"), (4, "host")]).is_err());
        assert!(new(&[(3, "a"), (4, "b"), (5, "c")]).is_err());
    }
}
