//! The benchmark. It runs daemons as processes and drives them from both sides: a simulated or real guest, and host
//! programs.
//!
//! `cargo bench --bench vsock -- --help` lists the options; `make bench` compares this crate's daemon with
//! `vhost-device-vsock`. `guest` describes the simulated guest, `catalogue` lists what is measured.

mod apps;
mod cases;
mod catalogue;
mod chart;
mod columns;
mod common;
mod conns;
mod daemon;
mod echo_clients;
mod failure;
mod fairness;
mod flooders;
mod floods;
mod growth;
mod guest;
mod host;
mod idle;
mod limits;
mod machine;
mod measure;
mod messages;
mod mixed;
mod packet;
mod pattern;
mod quiet;
mod report;
mod ring;
mod session;
mod shared;
mod short;
mod siblings;
mod stand_still;
mod threads;
mod traffic;
mod uml;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use cases::{Case, Group};
use catalogue::CASES;
use daemon::Binary;
use failure::Failure;
use machine::Machine;
use measure::Timing;
use report::{CaseResult, Entry, TIMES};

/// With more CPUs busy for other programs, a case is reported as disturbed.
const FOREIGN_CPUS_TOLERATED: f64 = 0.1;

/// Compares vsock daemons.
#[derive(Parser)]
#[command(name = "cargo bench --bench vsock --")]
struct Options {
    /// A daemon to measure, this crate's by default; may be repeated. Options for the daemon follow its path, each after a
    /// comma
    #[arg(long = "binary", value_name = "NAME=PATH[,OPTION]...", value_parser = Binary::parse)]
    binaries: Vec<Binary>,

    /// The daemon that the others are compared with, by default the last one
    #[arg(long, value_name = "NAME")]
    baseline: Option<String>,

    /// Number of runs of each case
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    runs: usize,

    /// Length of the measured window of each run
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    seconds: f64,

    /// Run the cases with TEXT in their names, or those of a group: `speed` (the default), `fairness`, `growth`, `floods` or
    /// `hand-over`; may be repeated
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,

    /// List the cases of all groups, or those that --only chooses
    #[arg(long)]
    list: bool,

    /// Do not count system calls
    #[arg(long)]
    no_syscalls: bool,

    /// Write all results to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw a chart of the results
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// `cargo bench` passes it, `cargo test` does not: then nothing is measured
    #[arg(long, hide = true)]
    bench: bool,

    #[arg(long, hide = true)]
    test: bool,
}

impl Options {
    fn cases(&self) -> impl Iterator<Item = &'static Case> + '_ {
        let by_default = |case: &Case| self.only.is_empty() && case.group() == Group::Speed;
        CASES
            .iter()
            .filter(move |case| by_default(case) || self.chooses(case))
    }

    fn chooses(&self, case: &Case) -> bool {
        self.only.iter().any(|text| case.matches(text))
    }

    fn list(&self) {
        for case in CASES {
            if self.only.is_empty() || self.chooses(case) {
                println!("{:9}  {}", case.group().name(), case.name);
            }
        }
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
        options.list();
        return ExitCode::SUCCESS;
    }
    if options.binaries.is_empty() {
        options.binaries.push(Binary {
            name: env!("CARGO_PKG_NAME").into(),
            path: env!("CARGO_BIN_EXE_vhost-user-vsock").into(),
            args: Vec::new(),
        });
    }
    // For more than 1,000 connections; the daemons inherit it.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    // A panic is a failure of the case, which the table shows.
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
        println!("perf can't count system calls here: they are not measured");
    }
    let missing = uml::missing();
    if let Some(missing) = missing {
        println!("{missing}: the cases with a real guest are skipped");
    }
    let cases: Vec<&'static Case> = options
        .cases()
        .filter(|case| missing.is_none() || !case.kind.takes_linux())
        .collect();
    let last = options.binaries.last().map(|binary| &binary.name);
    let baseline = options.baseline.as_ref().or(last).cloned();
    let baseline = baseline.unwrap_or_default();
    let machine = Machine::describe(&options.binaries);
    println!("{}", machine.text());
    println!(
        "Medians of {} runs; {TIMES} is the ratio to {baseline}.",
        options.runs
    );
    let bar = progress_bar(&cases, options, syscalls);
    let mut results = Vec::new();
    for case in cases {
        let result = measure_case(case, options, syscalls, &bar);
        bar.suspend(|| {
            println!("{}", result.table(&baseline));
            result.notes().for_each(|note| println!("{note}"));
            if let Some(cpus) = result
                .foreign_cpus()
                .filter(|&cpus| cpus > FOREIGN_CPUS_TOLERATED)
            {
                println!("other programs kept {cpus:.1} CPUs busy meanwhile");
            }
        });
        results.push(result);
    }
    bar.finish_and_clear();
    if let Some(path) = &options.svg {
        chart::draw(path, &results, &machine, &baseline, options.runs)
            .map_err(|error| error.to_string())?;
    }
    if let Some(path) = &options.json {
        let json = report::json(&results, &machine, options.runs, options.seconds);
        std::fs::write(path, format!("{json:#}\n")).map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn progress_bar(cases: &[&Case], options: &Options, syscalls: bool) -> ProgressBar {
    let steps: usize = cases
        .iter()
        .map(|case| {
            let counted =
                options.binaries.len() * usize::from(syscalls && case.kind.counts_syscalls());
            let each = options.binaries.len() + usize::from(case.limit.is_some());
            options.runs * each + counted
        })
        .sum();
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg}, {eta} left");
    let bar = ProgressBar::new(steps as u64);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// All runs of one case. Each measures the limit and every daemon in turn, so that a machine whose speed drifts affects all
/// of them alike.
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
            entry.add(kind.measure(&timing).map_err(Failure::from));
        }
        for (binary, entry) in options.binaries.iter().zip(&mut entries) {
            step(bar, case, &entry.name);
            if entry.unsupported.is_none() {
                entry.add(case.kind.run(binary, &timing, false));
            }
        }
    }
    if syscalls && case.kind.counts_syscalls() {
        for (binary, entry) in options.binaries.iter().zip(&mut entries) {
            step(bar, case, &entry.name);
            // If it fails, so did the runs before.
            if entry.unsupported.is_none()
                && let Ok(sample) = case.kind.run(binary, &timing, true)
            {
                entry.add(Ok(measure::only_syscalls(sample)));
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
