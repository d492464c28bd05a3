//! The command line of `vhost-user-vsock`: arguments, logging, signals, exit code.

#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::env;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Parser;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use env_logger::{Target, WriteStyle};
use log::LevelFilter;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vhost_user_vsock::config::{Config, Sandbox, SocketAccess, SocketGroup, SocketMode};
use vhost_user_vsock::header::Cid;
use vhost_user_vsock::log_writer::LogWriter;
use vhost_user_vsock::server::{Server, ServerError, Stop};

const USAGE_ERROR: u8 = 2;

/// How long the last lines of the log may take, where nobody seems to read them.
const LAST_LINES: Duration = Duration::from_millis(300);

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

Exit status: 0 after SIGTERM or SIGINT, 1 when something failed, 2 for a mistake in the options.";

/// Gives a virtual machine its virtio-vsock device.
///
/// A VMM connects to SOCKET (vhost-user). Programs in the guest use AF_VSOCK; a program on the host connects to UDS_PATH
/// and writes `CONNECT <port>`, or listens at UDS_PATH_<port> for the guest's connections to CID 2.
#[derive(Parser)]
#[command(version, after_help = EXAMPLE, max_term_width = 100)]
struct Args {
    /// The guest's CID, from 3 to 4294967294
    #[arg(long, value_name = "CID")]
    guest_cid: u64,

    /// Path of the Unix socket to make for the VMM
    #[arg(long, value_name = "SOCKET")]
    socket: PathBuf,

    /// Path of the Unix socket to make for host programs
    #[arg(long, value_name = "UDS_PATH")]
    uds_path: PathBuf,

    /// Bytes from the guest that one connection holds for a host program that does not read
    #[arg(long, value_name = "BYTES", default_value_t = 262_144)]
    tx_buffer_size: u32,

    /// Largest ring offered to the guest, a power of two
    #[arg(long, value_name = "ENTRIES", default_value_t = 1024)]
    queue_size: u16,

    /// Most connections at once; one more is refused
    #[arg(long, value_name = "COUNT", default_value_t = 1024)]
    max_connections: usize,

    /// How long to look for more work before sleeping, while that pays; 0 never looks
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 100)]
    busy_poll: u64,

    /// Who may connect to both sockets, in octal [default: 600, or 660 with a group]
    #[arg(long, value_name = "MODE")]
    socket_mode: Option<SocketMode>,

    /// Name or number of the group of both sockets
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<SocketGroup>,

    /// Give up what serving does not need: as far as the kernel can, wholly or not at all
    #[arg(long, value_name = "SANDBOX", default_value = "auto",
        value_parser = PossibleValuesParser::new(Sandbox::NAMES).try_map(|name| name.parse::<Sandbox>()))]
    sandbox: Sandbox,

    /// Log more: -v what connections do, -vv everything. RUST_LOG=<filter> overrides it
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

impl Args {
    fn config(&self) -> Config {
        Config {
            guest_cid: Cid(self.guest_cid),
            socket: self.socket.clone(),
            uds_path: self.uds_path.clone(),
            tx_buffer_size: self.tx_buffer_size,
            queue_size: self.queue_size,
            max_connections: self.max_connections,
            busy_poll: Duration::from_micros(self.busy_poll),
            sandbox: self.sandbox,
            access: SocketAccess::new(self.socket_mode, self.socket_group),
        }
    }
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if error.use_stderr() => {
            return fail(io::stderr(), &one_line(&error), USAGE_ERROR);
        }
        Err(error) => {
            // Help or version. A closed stdout leaves nobody to tell.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
    };
    let mut log = LogWriter::default();
    init_log(args.verbose, log.clone());
    let started = start(&args.config());
    // A thread that was there before would not be in the sandbox.
    if let Err(error) = log.start(io::stderr()) {
        return fail(io::stderr(), &format!("can't log: {error}"), 1);
    }
    let code = match started.and_then(|(server, signals)| run(server, signals)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ ServerError::Config(_)) => fail(&mut log, &error.to_string(), USAGE_ERROR),
        Err(error) => fail(&mut log, &error.to_string(), 1),
    };
    log.drain(LAST_LINES);
    code
}

/// Starts the server. A signal that comes meanwhile waits until it runs.
fn start(config: &Config) -> Result<(Server, Signals), ServerError> {
    let signals = Signals::new([SIGTERM, SIGINT])?;
    Ok((Server::start(config)?, signals))
}

/// Serves until SIGTERM or SIGINT. SIGPIPE is ignored, as Rust does it for every program.
fn run(server: Server, mut signals: Signals) -> Result<(), ServerError> {
    let stop = Stop::new()?;
    let signalled = stop.clone();
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for _ in signals.forever() {
                signalled.request();
            }
        })?;
    server.run(&stop)
}

fn fail(mut out: impl Write, message: &str, code: u8) -> ExitCode {
    // A closed or full stderr leaves nobody to tell.
    let _ = out.write_all(format!("vhost-user-vsock: {message}\n").as_bytes());
    ExitCode::from(code)
}

/// clap's message without its usage lines.
fn one_line(error: &clap::Error) -> String {
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

fn init_log(verbose: u8, log: LogWriter) {
    let level = match verbose {
        0 => LevelFilter::Info,
        1 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    let in_colour =
        io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|no| no.is_empty());
    let style = if in_colour {
        WriteStyle::Always
    } else {
        WriteStyle::Never
    };
    env_logger::Builder::new()
        .filter_level(level)
        .write_style(style)
        .parse_default_env()
        .target(Target::Pipe(Box::new(log)))
        .init();
}
