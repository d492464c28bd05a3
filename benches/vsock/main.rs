//! The benchmark: a simulated guest drives daemons from outside, as processes, case by case.
//!
//! `cargo bench --bench vsock -- --help` says how to call it; `make bench` compares this crate's daemon with
//! `vhost-device-vsock`. What the guest does and why is in `guest`.

mod apps;
mod cases;
mod chart;
mod conns;
mod daemon;
mod echo_clients;
mod guest;
mod host;
mod idle;
mod limits;
mod measure;
mod packet;
mod pattern;
mod report;
mod ring;
mod shared;
mod uml;

// The tests' frontend and guest memory.
#[allow(dead_code)]
#[path = "../../tests/common/sim/memory.rs"]
mod memory;
#[allow(dead_code)]
#[path = "../../tests/common/sim/vhost_user.rs"]
mod vhost_user;

/// The tests' proxy between a UML kernel and a daemon.
#[allow(dead_code)]
#[path = "../../tests/common/uml_proxy.rs"]
mod uml_proxy;

/// What the two files from the tests expect of their surroundings.
mod common {
    pub(crate) mod daemon {
        /// How long a daemon may take to answer the VMM.
        pub(crate) const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);
    }
}

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use cases::{CASES, Case, Kind};
use daemon::Binary;
use measure::Timing;
use report::{CaseResult, Entry};

/// From how many busy processors on a case is marked as disturbed.
const FOREIGN_CPUS_NOTED: f64 = 0.1;

/// Measures vsock daemons beside each other.
#[derive(Parser)]
#[command(name = "cargo bench --bench vsock --")]
struct Options {
    /// A daemon to measure; may be repeated. Options for it follow its path, each after a comma. Without it, this crate's
    #[arg(long = "binary", value_name = "NAME=PATH[,OPTION]...", value_parser = Binary::parse)]
    binaries: Vec<Binary>,

    /// The name of the daemon that the others are compared with; without it, the last
    #[arg(long, value_name = "NAME")]
    baseline: Option<String>,

    /// How often each case runs
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    runs: usize,

    /// How long each run is measured
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    seconds: f64,

    /// Only cases with this in their name; may be repeated
    #[arg(long, value_name = "SUBSTRING")]
    only: Vec<String>,

    /// List the cases
    #[arg(long)]
    list: bool,

    /// Do not count system calls
    #[arg(long)]
    no_syscalls: bool,

    /// Write all results here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw a chart here
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// cargo passes it; without it (`cargo test`) nothing is measured
    #[arg(long, hide = true)]
    bench: bool,

    #[arg(long, hide = true)]
    test: bool,
}

impl Options {
    fn cases(&self) -> impl Iterator<Item = &'static Case> + '_ {
        CASES.iter().filter(|case| {
            self.only.is_empty()
                || self
                    .only
                    .iter()
                    .any(|only| case.name.contains(only.as_str()))
        })
    }

    fn timing(&self) -> Timing {
        let window = Duration::from_secs_f64(self.seconds);
        Timing {
            warm_up: (window / 4).min(Duration::from_millis(250)),
            window,
        }
    }
}

fn main() -> ExitCode {
    let mut options = Options::parse();
    if !options.bench || options.test {
        return ExitCode::SUCCESS;
    }
    if options.list {
        options.cases().for_each(|case| println!("{}", case.name));
        return ExitCode::SUCCESS;
    }
    if options.binaries.is_empty() {
        options.binaries.push(Binary {
            name: "ours".into(),
            path: env!("CARGO_BIN_EXE_vhost-user-vsock").into(),
            args: Vec::new(),
        });
    }
    // 1,000 connections and more; the daemons inherit it.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    // Panics become failures of a case, which the table tells.
    std::panic::set_hook(Box::new(|_| {}));
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), String> {
    let syscalls = !options.no_syscalls && measure::can_count_syscalls();
    if !syscalls && !options.no_syscalls {
        println!("perf can't count system calls here: they are left out");
    }
    let missing = uml::missing();
    if let Some(missing) = missing {
        println!("{missing}: the cases with a real guest are left out");
    }
    let cases: Vec<&'static Case> = options
        .cases()
        .filter(|case| missing.is_none() || !matches!(case.kind, Kind::Uml(_)))
        .collect();
    let last = options.binaries.last().map(|binary| &binary.name);
    let baseline = options.baseline.as_ref().or(last).cloned();
    let baseline = baseline.unwrap_or_default();
    let bar = progress_bar(&cases, options, syscalls);
    let mut results = Vec::new();
    for case in cases {
        let result = measure_case(case, options, syscalls, &bar);
        bar.suspend(|| {
            println!("{}", result.table(&baseline));
            if let Some(cpus) = result
                .foreign_cpus()
                .filter(|&cpus| cpus > FOREIGN_CPUS_NOTED)
            {
                println!("other programs kept {cpus:.1} processors busy meanwhile");
            }
        });
        results.push(result);
    }
    bar.finish_and_clear();
    if let Some(path) = &options.svg {
        chart::draw(path, &results, &baseline, options.runs).map_err(|error| error.to_string())?;
    }
    if let Some(path) = &options.json {
        let json = report::json(&results, options.runs, options.seconds);
        std::fs::write(path, format!("{json:#}\n")).map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn progress_bar(cases: &[&Case], options: &Options, syscalls: bool) -> ProgressBar {
    let steps: usize = cases
        .iter()
        .map(|case| {
            let counted = options.binaries.len() * usize::from(syscalls && case.kind.has_traffic());
            let each = options.binaries.len() + usize::from(case.limit.is_some());
            options.runs * each + counted
        })
        .sum();
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg}, {eta} left");
    let bar = ProgressBar::new(steps as u64);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// All runs of one case: in each, the limit and every daemon in turn, so that a drifting machine hits all alike.
fn measure_case(
    case: &'static Case,
    options: &Options,
    syscalls: bool,
    bar: &ProgressBar,
) -> CaseResult {
    let timing = options.timing();
    let mut limit = case.limit.map(|_| Entry::new("limit"));
    let names = options.binaries.iter().map(|binary| &binary.name);
    let mut entries: Vec<Entry> = names.map(|name| Entry::new(name)).collect();
    for _ in 0..options.runs {
        if let (Some(kind), Some(entry)) = (case.limit, limit.as_mut()) {
            step(bar, case, &entry.name);
            entry.take(kind.measure(&timing));
        }
        for (binary, entry) in options.binaries.iter().zip(&mut entries) {
            step(bar, case, &entry.name);
            entry.take(case.kind.run(binary, &timing, false));
        }
    }
    if syscalls && case.kind.has_traffic() {
        for (binary, entry) in options.binaries.iter().zip(&mut entries) {
            step(bar, case, &entry.name);
            // The other results of this run are disturbed, and its failure adds nothing to those of the others.
            if let Ok(sample) = case.kind.run(binary, &timing, true) {
                entry.take(Ok(measure::only_syscalls(sample)));
            }
        }
    }
    CaseResult {
        case,
        limit,
        entries,
    }
}

fn step(bar: &ProgressBar, case: &Case, name: &str) {
    bar.inc(1);
    bar.set_message(format!("{}: {name}", case.name));
}
