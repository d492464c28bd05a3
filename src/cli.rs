//! The command line: its options, their help, and the configuration that they make.

mod activation;

use std::mem;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};

pub use self::activation::Activation;
use crate::commands::connect::ConnectArgs;
use crate::commands::list::ListArgs;
use crate::commands::stats::StatsArgs;
use crate::config::file::{self, ProcessOptions, VmSource};
use crate::config::options::{OptionReader, VmOptions};
use crate::config::{ConfigError, Mistake, ProcessConfig, Sandbox};

/// What `--print-capabilities` prints (QEMU, docs/interop/vhost-user.json).
pub const CAPABILITIES: &str = r#"{ "type": "vsock" }"#;

/// Options that say which VMs there are, instead of `--guest-cid`.
const OTHER_VMS: [&str; 2] = ["vm", "config"];

/// Options that only one VM can have.
const OF_ONE_VM: [&str; 6] = [
    "guest_cid",
    "socket",
    "uds_path",
    "fd",
    "forward_listen",
    "guest_port",
];

const EXAMPLE: &str = "\
Example:
  vhost-user-vsock --guest-cid=4 --socket=/tmp/vhost4.socket --uds-path=/tmp/vm4.vsock

  qemu-system-x86_64 <your options> -m 512M \\
    -object memory-backend-memfd,id=mem0,size=512M,share=on -machine q35,memory-backend=mem0 \\
    -chardev socket,id=char0,path=/tmp/vhost4.socket \\
    -device vhost-user-vsock-pci,chardev=char0

  guest$ nc --vsock -l -p 1234         host$  nc -U /tmp/vm4.vsock
                                              CONNECT 1234
  host$  nc -l -U /tmp/vm4.vsock_1234  guest$ nc --vsock 2 1234

Exit status: 0 after SIGTERM, SIGINT or SIGHUP, after a hand-over, and when the only VMM of --fd has disconnected; 1 after a failure; 2 for a mistake in the options or in the file of --config.";

/// Gives a virtual machine its virtio-vsock device.
///
/// A VMM connects to SOCKET (vhost-user). Programs in the guest use AF_VSOCK; a program on the host connects to UDS_PATH
/// and writes `CONNECT <port>`, or listens at `UDS_PATH_<port>` for the guest's connections to CID 2.
#[derive(Parser)]
#[command(version, after_help = EXAMPLE, max_term_width = 100, args_conflicts_with_subcommands = true, args_override_self = true,
    subcommand_negates_reqs = true, disable_help_subcommand = true)]
pub struct Args {
    /// The VM, or what the VMs of --vm and --config have that say nothing else.
    #[command(flatten)]
    options: VmOptions,

    /// A VM with options of its own, by their names: guest-cid=CID,socket=SOCKET,uds-path=UDS_PATH,... Repeatable. Options
    /// outside --vm are defaults for all VMs
    #[arg(long, value_name = "KEY=VALUE,...", action = ArgAction::Append, conflicts_with_all = OF_ONE_VM)]
    vm: Vec<Vm>,

    /// YAML file with the VMs: a list `vms`, each with options by their names
    #[arg(long, value_name = "FILE", conflicts_with = "vm", conflicts_with_all = OF_ONE_VM)]
    config: Option<PathBuf>,

    /// Path of a Unix socket that serves statistics, in Prometheus text format or JSON
    #[arg(long, value_name = "STATS_PATH")]
    stats_path: Option<PathBuf>,

    /// Path of a Unix socket for hand-over. A daemon that is started with the same path as a running one takes its VMs over
    #[arg(long, value_name = "HANDOVER_PATH")]
    handover_path: Option<PathBuf>,

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
struct Vm(VmOptions);

impl FromStr for Vm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut reader = OptionReader::default();
        for pair in pairs(text.trim()) {
            let pair_of = pair.split_once('=');
            let (key, value) = pair_of.ok_or_else(|| format!("{pair}: not KEY=VALUE"))?;
            reader.add(key, value).map_err(|error| error.to_string())?;
        }
        let options = reader.finish().map_err(|error| error.to_string())?;
        Ok(Self(options))
    }
}

/// The pairs of a `--vm`. The value of a port may end in `,seqpacket`.
fn pairs(text: &str) -> Vec<String> {
    let mut pairs: Vec<String> = Vec::new();
    for part in text.split(',') {
        match pairs.last_mut() {
            Some(pair) if part == "seqpacket" => *pair += ",seqpacket",
            _ => pairs.push(part.into()),
        }
    }
    pairs
}

impl Args {
    /// Reads the command line. With a socket for the VMM in `activation`, `--socket` is not required.
    ///
    /// # Errors
    /// A mistake in the options, or a request for the help or the version.
    pub fn parse_with(activation: &Activation) -> Result<Self, clap::Error> {
        let command = Self::command()
            .mut_arg("guest_cid", |arg| {
                arg.required_unless_present_any(OTHER_VMS)
            })
            .mut_arg("uds_path", |arg| {
                arg.required_unless_present_any([&OTHER_VMS[..], &["forward_cid"]].concat())
            })
            .mut_arg("socket", |arg| match activation.has_vmm_socket() {
                true => arg,
                false => arg.required_unless_present_any([&OTHER_VMS[..], &["fd"]].concat()),
            });
        Self::from_arg_matches(&command.try_get_matches()?)
    }

    /// The configuration that the options make.
    ///
    /// # Errors
    /// Options that clap accepts and that make no configuration, or a configuration file that can't be read.
    pub fn config(&self, activation: &Activation) -> Result<ProcessConfig, ConfigError> {
        let (sources, of_file) = self.sources()?;
        activation.check(sources.iter().filter_map(|vm| vm.options.guest_cid))?;
        let is_only = sources.len() == 1;
        let mut vms = Vec::new();
        for source in &sources {
            let cid = source.options.guest_cid.unwrap_or_default();
            let vm = source.options.clone().vm(activation.sockets(cid, is_only));
            vms.push(vm.map_err(|error| source.locate(error.option(), error))?);
        }
        let config = ProcessConfig {
            stats_path: self.stats_path.clone(),
            handover_path: self.handover_path.clone().or(of_file.handover_path),
            access: self.options.access(),
            sandbox: self.sandbox,
            ..ProcessConfig::new(vms)
        };
        config
            .find_mistake()
            .map_err(|Mistake { vm, option, error }| {
                let source = vm.and_then(|index| sources.get(index));
                match source {
                    Some(source) => source.locate(Some(option), error),
                    None => error,
                }
            })?;
        Ok(config)
    }

    /// The options of each VM, with the defaults, and where they come from. Those of the process come from the file.
    fn sources(&self) -> Result<(Vec<VmSource>, ProcessOptions), ConfigError> {
        let mut of_process = ProcessOptions::default();
        let mut sources = match (&self.config, &self.vm[..]) {
            (Some(path), _) => {
                let (vms, options) = file::read(path)?;
                of_process = options;
                vms
            }
            (None, []) => vec![VmSource::only(VmOptions::default())],
            (None, [vm]) => vec![VmSource::only(vm.0.clone())],
            (None, vms) => {
                let vms = vms.iter().zip(1..);
                vms.map(|(vm, number)| VmSource::numbered(vm.0.clone(), number))
                    .collect()
            }
        };
        for source in &mut sources {
            source.options = mem::take(&mut source.options).or(&self.options);
        }
        Ok((sources, of_process))
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
    let mut message = String::new();
    for line in lines.into_iter().filter(|line| *line != about_help) {
        let (separator, line) = match line.strip_prefix("tip: ") {
            Some(tip) => ("; ", tip),
            None => (" ", line),
        };
        if !message.is_empty() {
            message += separator;
        }
        message += line;
    }
    let hint = if error.kind() == ErrorKind::MissingRequiredArgument {
        " (try --help)"
    } else {
        ""
    };
    format!("{}{hint}", message.trim_start_matches("error: "))
}

#[cfg(test)]
mod tests;
