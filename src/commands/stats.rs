//! `stats`: the statistics of one daemon or of all, as a text for a terminal, in Prometheus' text format or in JSON.

mod output;
mod screen;
mod watch;

use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Serialize;
use thiserror::Error;

use super::page;
use super::query::{self, Daemon, QueryError, RUN_DIRECTORY};
use crate::metrics::counters::{Snapshot, VmSnapshot};
use crate::metrics::prometheus::{self, Connections};

/// The arguments of `stats`.
#[derive(Args)]
pub struct StatsArgs {
    /// The STATS_PATH of the daemon; with --all the directory of the daemons' directories [default: /run/vhost-user-vsock]
    #[arg(required_unless_present = "all")]
    path: Option<PathBuf>,

    /// Show all daemons
    #[arg(long)]
    all: bool,

    /// How to show them
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Table)]
    format: Format,

    /// Write them to a file instead, which is replaced as a whole
    #[arg(long, value_name = "FILE", conflicts_with = "watch")]
    output: Option<PathBuf>,

    /// In Prometheus format, list each connection
    #[arg(long)]
    connections: bool,

    /// Show them again every so many seconds, until interrupted, with rates and what moves most first
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "2")]
    watch: Option<u32>,
}

/// How statistics are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Tables for a terminal.
    Table,
    /// Prometheus' text format.
    Prometheus,
    /// JSON.
    Json,
}

/// Why there is nothing to show.
#[derive(Debug, Error)]
pub enum StatsError {
    /// The daemon does not answer.
    #[error("{}: {source}", path.display())]
    Query {
        /// Its stats socket.
        path: PathBuf,
        /// Why not.
        source: QueryError,
    },
    /// A file can't be written, or a directory not be read.
    #[error("{}: {source}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Standard output can't be written.
    #[error("standard output: {0}")]
    Output(io::Error),
}

impl StatsError {
    /// The directory of the daemons can't be read.
    pub(super) fn directory(directory: Option<&Path>, source: io::Error) -> Self {
        let path = directory.unwrap_or(Path::new(RUN_DIRECTORY)).to_owned();
        Self::File { path, source }
    }
}

/// Shows the statistics, once or again and again. A closed pipe at stdout ends it without an error.
///
/// # Errors
/// The one daemon does not answer, the directory of all can't be read, or the output not be written.
pub fn run(args: &StatsArgs) -> Result<(), StatsError> {
    if let Some(seconds) = args.watch {
        return watch::run(args, seconds);
    }
    let text = ask(args)?.text(args).map_err(StatsError::Output)?;
    match &args.output {
        Some(path) => output::replace(path, text.as_bytes()).map_err(|source| StatsError::File {
            path: path.clone(),
            source,
        }),
        None => print(&text).map(drop).map_err(StatsError::Output),
    }
}

/// Writes to stdout. False where nobody reads it.
pub(super) fn print(text: &str) -> io::Result<bool> {
    let mut output = io::stdout().lock();
    // The end of a screen is no end of a line.
    match output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
    {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true),
    }
}

/// What the daemons have answered.
enum Answers {
    /// The only one.
    One(Snapshot),
    /// All of a directory.
    All(Vec<Daemon>),
}

/// Asks one daemon or all.
fn ask(args: &StatsArgs) -> Result<Answers, StatsError> {
    match args.path.as_deref() {
        Some(path) if !args.all => {
            let answer = query::one(path).map_err(|source| StatsError::Query {
                path: path.to_owned(),
                source,
            });
            answer.map(Answers::One)
        }
        directory => {
            let daemons = query::all(directory);
            let daemons = daemons.map_err(|error| StatsError::directory(directory, error));
            daemons.map(Answers::All)
        }
    }
}

impl Answers {
    fn text(self, args: &StatsArgs) -> io::Result<String> {
        let connections = match args.connections {
            true => Connections::Listed,
            false => Connections::Summed,
        };
        match self {
            Self::One(snapshot) => of_one(snapshot, args.format, connections),
            Self::All(daemons) => of_all(daemons, args.format, connections),
        }
    }
}

fn of_one(snapshot: Snapshot, format: Format, connections: Connections) -> io::Result<String> {
    Ok(match format {
        Format::Table => page::page(&snapshot) + "\n",
        Format::Prometheus => prometheus::text(snapshot, connections),
        Format::Json => serde_json::to_string(&snapshot)? + "\n",
    })
}

/// A daemon in the JSON of all.
#[derive(Serialize)]
struct DaemonJson<'d> {
    name: &'d str,
    /// Why it has not answered.
    error: Option<String>,
    vms: &'d [VmSnapshot],
}

/// The JSON of all.
#[derive(Serialize)]
struct AllJson<'d> {
    daemons: Vec<DaemonJson<'d>>,
}

fn of_all(daemons: Vec<Daemon>, format: Format, connections: Connections) -> io::Result<String> {
    Ok(match format {
        Format::Table => {
            let pages = daemons.iter().flat_map(pages);
            pages.map(|page| page + "\n").collect::<Vec<_>>().join("\n")
        }
        Format::Prometheus => {
            let answers = daemons
                .into_iter()
                .map(|daemon| (daemon.name, daemon.answer.ok()));
            prometheus::merged(answers.collect(), connections)
        }
        Format::Json => {
            let daemons = daemons.iter().map(|Daemon { name, answer }| DaemonJson {
                name,
                error: answer.as_ref().err().map(ToString::to_string),
                vms: answer.as_ref().map_or(&[], |snapshot| &snapshot.vms),
            });
            let all = AllJson {
                daemons: daemons.collect(),
            };
            serde_json::to_string(&all)? + "\n"
        }
    })
}

/// A page for each VM of a daemon.
fn pages(Daemon { name, answer }: &Daemon) -> Vec<String> {
    match answer {
        Ok(snapshot) => {
            let vms = snapshot.vms.iter();
            vms.map(|vm| page::named(name, vm)).collect()
        }
        Err(error) => vec![format!("{name}: {error}")],
    }
}
