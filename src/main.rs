//! The command line of `vhost-user-vsock`: arguments, logging, signals, exit code.

#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::env;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vhost_user_vsock::cli::{self, Activation, Args, Command};
use vhost_user_vsock::commands::{connect, list, stats};
use vhost_user_vsock::config::ProcessConfig;
use vhost_user_vsock::daemon::log_writer::{self, LogWriter};
use vhost_user_vsock::daemon::server::{Server, ServerError};

const USAGE_ERROR: u8 = 2;

/// How long the last lines of the log may take, where nobody seems to read them.
const LAST_LINES: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    // Whatever else is asked for: QEMU's conventions have it so.
    if env::args_os().any(|arg| arg == "--print-capabilities") {
        return print(cli::CAPABILITIES);
    }
    let activation = match Activation::from_env() {
        Ok(activation) => activation,
        Err(error) => return fail(io::stderr(), &error.to_string(), USAGE_ERROR),
    };
    let args = match Args::parse_with(&activation) {
        Ok(args) => args,
        Err(error) if error.use_stderr() => {
            return fail(io::stderr(), &cli::one_line(&error), USAGE_ERROR);
        }
        Err(error) => {
            // Help or version. A closed stdout leaves nobody to tell.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
    };
    let done = match &args.command {
        Some(Command::Connect(args)) => {
            connect::run(args).map_err(|error| (error.to_string(), error.exit_code()))
        }
        Some(Command::List(args)) => list::run(args).map_err(|error| (error.to_string(), 1)),
        Some(Command::Stats(args)) => stats::run(args).map_err(|error| (error.to_string(), 1)),
        None => return serve(&args, &activation),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err((message, code)) => fail(io::stderr(), &message, code),
    }
}

/// Runs the daemon.
fn serve(args: &Args, activation: &Activation) -> ExitCode {
    let mut log = LogWriter::install(args.verbose);
    let config = args.config(activation).map_err(ServerError::from);
    let started = config.and_then(|config| start(&config, activation));
    // A thread that was there before would not be in the sandbox.
    if let Err(error) = log.start(io::stderr()) {
        return fail(io::stderr(), &format!("can't log: {error}"), 1);
    }
    let code = match started.and_then(|(server, signalled)| server.run(signalled.as_fd())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ ServerError::Config(_)) => fail(&mut log, &error.to_string(), USAGE_ERROR),
        Err(error) => fail(&mut log, &error.to_string(), 1),
    };
    log.drain(LAST_LINES);
    code
}

fn print(text: &str) -> ExitCode {
    match writeln!(io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Starts the server. A signal that comes meanwhile waits until it runs.
fn start(
    config: &ProcessConfig,
    activation: &Activation,
) -> Result<(Server, UnixStream), ServerError> {
    let (signalled, signal) = UnixStream::pair()?;
    for number in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::low_level::pipe::register(number, signal.try_clone()?)?;
    }
    Ok((Server::start(config, activation.stored())?, signalled))
}

fn fail(mut out: impl Write, message: &str, code: u8) -> ExitCode {
    let priority = if log_writer::is_journal(io::stderr()) {
        "<3>"
    } else {
        ""
    };
    // A closed or full stderr leaves nobody to tell.
    let _ = out.write_all(format!("{priority}vhost-user-vsock: {message}\n").as_bytes());
    ExitCode::from(code)
}
