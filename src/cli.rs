//! The command line: its options, their help, and the configuration that they make.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::commands::connect::ConnectArgs;
use crate::commands::list::ListArgs;
use crate::commands::stats::StatsArgs;
use crate::config::{
    ConfigError, ProcessConfig, Sandbox, Socket, SocketAccess, SocketGroup, SocketMode, VmConfig,
};
use crate::packet::header::Cid;

/// What `--print-capabilities` prints (QEMU, docs/interop/vhost-user.json).
pub const CAPABILITIES: &str = r#"{ "type": "vsock" }"#;

/// How many VMs a process serves.
const MAX_VMS: usize = 1;

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

Exit status: 0 after SIGTERM, SIGINT or SIGHUP, and when the only VMM of --fd is gone; 1 after a failure; 2 for a mistake in the options.";

/// Gives a virtual machine its virtio-vsock device.
///
/// A VMM connects to SOCKET (vhost-user). Programs in the guest use AF_VSOCK; a program on the host connects to UDS_PATH
/// and writes `CONNECT <port>`, or listens at `UDS_PATH_<port>` for the guest's connections to CID 2.
#[derive(Parser)]
#[command(version, after_help = EXAMPLE, max_term_width = 100, args_conflicts_with_subcommands = true, args_override_self = true,
    subcommand_negates_reqs = true, disable_help_subcommand = true)]
pub struct Args {
    /// The guest's CID, from 3 to 4294967294
    #[arg(long, value_name = "CID", required_unless_present = "vm")]
    guest_cid: Option<u64>,

    /// Path of the Unix socket that the VMM connects to; it is created
    #[arg(long, visible_alias = "socket-path", value_name = "SOCKET")]
    socket: Option<PathBuf>,

    /// Path of the Unix socket that host programs connect to; it is created
    #[arg(long, value_name = "UDS_PATH", required_unless_present = "vm")]
    uds_path: Option<PathBuf>,

    /// Inherited descriptor instead of SOCKET: a listening Unix socket, or one that is connected to a VMM
    #[arg(long, value_name = "FD", conflicts_with = "socket")]
    fd: Option<RawFd>,

    /// The first three options and the sizes in one: guest-cid=CID,socket=SOCKET,uds-path=UDS_PATH
    #[arg(long, value_name = "KEY=VALUE,...", action = ArgAction::Append,
        conflicts_with_all = ["guest_cid", "socket", "uds_path", "fd", "tx_buffer_size", "queue_size"])]
    vm: Vec<Vm>,

    /// Bytes from the guest that one connection buffers for a host program that does not read
    #[arg(long, value_name = "BYTES", default_value_t = VmConfig::DEFAULT_TX_BUFFER_SIZE)]
    tx_buffer_size: u32,

    /// Largest ring offered to the guest, a power of two
    #[arg(long, value_name = "ENTRIES", default_value_t = VmConfig::DEFAULT_QUEUE_SIZE)]
    queue_size: u16,

    /// Maximum number of connections that the guest has opened, and of those that host programs have; a third more for both
    /// together. Further ones are refused
    #[arg(long, value_name = "COUNT", default_value_t = VmConfig::DEFAULT_MAX_CONNECTIONS)]
    max_connections: usize,

    /// How long to poll for more work before sleeping, when the device is busy; 0 turns it off
    #[arg(long, value_name = "MICROSECONDS", default_value_t = VmConfig::DEFAULT_BUSY_POLL.as_micros() as u64)]
    busy_poll: u64,

    /// Path of a Unix socket that serves statistics, in Prometheus text format or JSON
    #[arg(long, value_name = "STATS_PATH")]
    stats_path: Option<PathBuf>,

    /// Permissions of the sockets, in octal; connecting takes `w` [default: 600, with a group 660]
    #[arg(long, value_name = "MODE")]
    socket_mode: Option<SocketMode>,

    /// Group of the sockets, by name or number, instead of the daemon's own
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<SocketGroup>,

    /// Drop privileges before serving: all that the kernel supports, all or fail, or none
    #[arg(long, value_name = "SANDBOX", default_value_t,
        value_parser = PossibleValuesParser::new(Sandbox::NAMES).try_map(|name| name.parse::<Sandbox>()))]
    sandbox: Sandbox,

    /// Print the kind of this vhost-user device in JSON and exit
    #[arg(long)]
    print_capabilities: bool,

    /// Log more: -v each connection, -vv everything. RUST_LOG=FILTER overrides it
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,

    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What the program does instead of serving.
#[derive(Subcommand)]
pub enum Command {
    /// Connect standard input and output to a port of the guest
    Connect(ConnectArgs),
    /// List the VMs of all daemons
    List(ListArgs),
    /// Show a daemon's statistics and connections, or those of all daemons
    Stats(StatsArgs),
}

/// The value of `--vm`, which `vhost-device-vsock` has as well.
#[derive(Clone)]
struct Vm(VmConfig);

impl FromStr for Vm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut guest_cid, mut socket, mut uds_path) = (None, None, None);
        let (mut tx_buffer_size, mut queue_size) = (None, None);
        for pair in text.split(',') {
            let (key, value) = pair
                .split_once('=')
                .ok_or(format!("{pair}: not KEY=VALUE"))?;
            let not_a_number = |_| format!("{pair}: not a number in range");
            match key.replace('_', "-").as_str() {
                "guest-cid" => guest_cid = Some(value.parse::<u64>().map_err(not_a_number)?),
                "socket" => socket = Some(value),
                "uds-path" => uds_path = Some(value),
                "tx-buffer-size" => tx_buffer_size = Some(value.parse().map_err(not_a_number)?),
                "queue-size" => queue_size = Some(value.parse().map_err(not_a_number)?),
                _ => return Err(format!("{key}: no such key")),
            }
        }
        let missing = |key| format!("{key}= is missing");
        let guest_cid = guest_cid.ok_or_else(|| missing("guest-cid"))?;
        let guest_cid = Cid::try_from(guest_cid).map_err(|error| format!("guest-cid: {error}"))?;
        let socket = socket.ok_or_else(|| missing("socket"))?;
        let uds_path = uds_path.ok_or_else(|| missing("uds-path"))?;
        let mut vm = VmConfig::new(guest_cid, socket, uds_path);
        vm.tx_buffer_size = tx_buffer_size.unwrap_or(vm.tx_buffer_size);
        vm.queue_size = queue_size.unwrap_or(vm.queue_size);
        Ok(Self(vm))
    }
}

/// The descriptors of the sockets that a service manager passes to the daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activation {
    /// For the VMM.
    pub socket: Option<RawFd>,
    /// For host programs.
    pub uds: Option<RawFd>,
}

impl Activation {
    /// Takes the sockets from the environment (sd_listen_fds(3)). One that is named `vhost-user` is for the VMM, one named
    /// `host` for host programs; others are assigned in this order.
    ///
    /// # Errors
    /// The environment can't be read, or there are more sockets than the daemon can use.
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
    /// Reads the command line. With a socket for the VMM in `activation`, `--socket` is not required.
    ///
    /// # Errors
    /// A mistake in the options, or a request for the help or the version.
    pub fn parse_with(activation: &Activation) -> Result<Self, clap::Error> {
        let command = Self::command().mut_arg("socket", |socket| match activation.socket {
            Some(_) => socket,
            None => socket.required_unless_present_any(["vm", "fd"]),
        });
        Self::from_arg_matches(&command.try_get_matches()?)
    }

    /// The configuration that the options make.
    ///
    /// # Errors
    /// Options that clap accepts and that make no configuration. [`ProcessConfig::check`] finds the other mistakes.
    pub fn config(&self, activation: &Activation) -> Result<ProcessConfig, ConfigError> {
        let mut vms = match &self.vm[..] {
            [] => vec![self.single_vm()?],
            vms => vms.iter().map(|vm| vm.0.clone()).collect(),
        };
        if vms.len() > MAX_VMS {
            return Err(ConfigError::TooManyVms(vms.len()));
        }
        // Inherited sockets are those of the first VM.
        if let Some(vm) = vms.first_mut() {
            if let Some(fd) = self.fd.or(activation.socket) {
                vm.socket = Socket::Inherited(fd);
            }
            vm.uds_fd = activation.uds;
        }
        let access = SocketAccess::new(self.socket_mode, self.socket_group);
        for vm in &mut vms {
            vm.max_connections = self.max_connections;
            vm.busy_poll = Duration::from_micros(self.busy_poll);
            vm.access = access;
        }
        Ok(ProcessConfig {
            stats_path: self.stats_path.clone(),
            access,
            sandbox: self.sandbox,
            ..ProcessConfig::new(vms)
        })
    }

    /// The VM of `--guest-cid`, `--socket` and `--uds-path`. Without `--socket`, its socket is an inherited one.
    fn single_vm(&self) -> Result<VmConfig, ConfigError> {
        let guest_cid = self.guest_cid.ok_or(ConfigError::NoVm)?.try_into()?;
        let uds_path = self.uds_path.as_ref().ok_or(ConfigError::NoVm)?;
        let socket = self.socket.clone().unwrap_or_default();
        Ok(VmConfig {
            tx_buffer_size: self.tx_buffer_size,
            queue_size: self.queue_size,
            ..VmConfig::new(guest_cid, socket, uds_path)
        })
    }
}

/// clap's message in one line, without its usage lines.
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

    fn config(args: &[&str], activation: Activation) -> Result<ProcessConfig, ConfigError> {
        let args = [&["vhost-user-vsock"], args].concat();
        Args::try_parse_from(args).unwrap().config(&activation)
    }

    const THREE: [&str; 3] = ["--guest-cid=4", "--socket=/a", "--uds-path=/b"];

    #[test]
    fn options_that_are_not_given_have_the_defaults_of_the_library() {
        let vm = "guest-cid=4,socket=/a,uds-path=/b";
        let expected = VmConfig::new(Cid::try_from(4u32).unwrap(), "/a", "/b");
        for args in [&THREE[..], &["--vm", vm]] {
            let config = config(args, Activation::default()).unwrap();
            let expected = ProcessConfig::new(vec![expected.clone()]);
            assert_eq!(format!("{config:?}"), format!("{expected:?}"), "{args:?}");
        }
    }

    #[test]
    fn options_change_the_configuration() {
        let more = [
            "--tx-buffer-size=9",
            "--queue-size=64",
            "--max-connections=7",
            "--busy-poll=8",
            "--socket-mode=606",
            "--sandbox=strict",
            "--stats-path=/c",
        ];
        let config = config(&[&THREE[..], &more].concat(), Activation::default()).unwrap();
        let [vm] = &config.vms[..] else { panic!() };
        assert_eq!((vm.tx_buffer_size, vm.queue_size), (9, 64));
        assert_eq!(vm.max_connections, 7);
        assert_eq!(vm.busy_poll, Duration::from_micros(8));
        assert_eq!(vm.access.mode, SocketMode(0o606));
        assert_eq!(config.access, vm.access);
        assert_eq!(config.sandbox, Sandbox::Strict);
        assert_eq!(config.stats_path, Some("/c".into()));
    }

    #[test]
    fn inherited_sockets_replace_those_of_the_paths() {
        let (socket, uds) = (Some(3), Some(4));
        let config = config(&THREE, Activation { socket, uds }).unwrap();
        assert_eq!(config.vms[0].socket, Socket::Inherited(3));
        assert_eq!(config.vms[0].uds_fd, Some(4));
    }

    #[test]
    fn a_vm_is_read_as_vhost_device_vsock_reads_it() {
        let Vm(vm) = "guest-cid=5,socket=/a,uds-path=/b,tx-buffer-size=9,queue-size=64"
            .parse()
            .unwrap();
        assert_eq!(vm.guest_cid.get(), 5);
        assert_eq!((vm.tx_buffer_size, vm.queue_size), (9, 64));
        assert_eq!(vm.socket, Socket::Path("/a".into()));
        assert_eq!(vm.uds_path, PathBuf::from("/b"));
        for (text, mistake) in [
            ("guest-cid=5,socket=/a", "uds-path= is missing"),
            (
                "guest-cid=x,socket=/a,uds-path=/b",
                "guest-cid=x: not a number",
            ),
            (
                "guest-cid=2,socket=/a,uds-path=/b",
                "guest-cid: 2 is not a guest's CID",
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
