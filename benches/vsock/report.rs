//! The results of all runs: medians, spreads and ratios, as a table and as JSON.

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, ContentArrangement, Table};
use serde_json::{Map, Value, json};

use crate::cases::{Case, Kind};
use crate::measure::{Sample, key};
use crate::traffic::Direction;

/// The width of the tables in characters; longer rows are wrapped.
const TABLE_WIDTH: u16 = 132;

/// The results of a daemon or of the machine's limit in one case.
pub struct Entry {
    /// The daemon's name.
    pub name: String,
    /// A sample for each run, and one for the system calls.
    pub runs: Vec<Sample>,
    /// Why other runs failed.
    pub failures: Vec<String>,
}

/// The results of one case.
pub struct CaseResult {
    /// The case.
    pub case: &'static Case,
    /// The machine's limit.
    pub limit: Option<Entry>,
    /// The daemons, in the order of the command line.
    pub entries: Vec<Entry>,
}

/// A median with its extremes.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The smallest value.
    pub min: f64,
    /// The largest value.
    pub max: f64,
}

impl Entry {
    /// An entry without results.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            runs: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Adds the result of a run.
    pub fn add(&mut self, result: Result<Sample, String>) {
        match result {
            Ok(sample) => self.runs.push(sample),
            Err(failure) => self.failures.push(failure),
        }
    }

    /// The median and the extremes of a result.
    pub fn spread(&self, key: &str) -> Option<Spread> {
        let runs = self.runs.iter();
        let mut values: Vec<f64> = runs.filter_map(|run| run.get(key).copied()).collect();
        values.sort_by(f64::total_cmp);
        let (&min, &max) = (values.first()?, values.last()?);
        let half = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[half]
        } else {
            (values[half - 1] + values[half]) / 2.0
        };
        Some(Spread { median, min, max })
    }

    /// The median of a result.
    pub fn median(&self, key: &str) -> Option<f64> {
        self.spread(key).map(|spread| spread.median)
    }

    fn json(&self) -> Value {
        let mut keys: Vec<_> = self.runs.iter().flat_map(Sample::keys).collect();
        keys.sort_unstable();
        keys.dedup();
        let results: Map<String, Value> = keys
            .into_iter()
            .filter_map(|key| {
                let spread = self.spread(key)?;
                let runs: Vec<_> = self.runs.iter().filter_map(|run| run.get(key)).collect();
                let value = json!({
                    "median": spread.median, "min": spread.min, "max": spread.max, "runs": runs,
                });
                Some(((*key).to_string(), value))
            })
            .collect();
        json!({ "name": self.name, "failures": self.failures, "results": results })
    }
}

impl CaseResult {
    /// The results of the daemon that the others are compared with.
    pub fn baseline(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// How many CPUs other programs kept busy in these runs, on average.
    pub fn foreign_cpus(&self) -> Option<f64> {
        let runs = self.entries.iter().flat_map(|entry| &entry.runs);
        let values: Vec<f64> = runs
            .filter_map(|run| run.get(key::FOREIGN_CPUS).copied())
            .collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    }

    /// The case as a table.
    pub fn table(&self, baseline: &str) -> Table {
        let mut table = Table::new();
        table
            .load_preset(UTF8_FULL_CONDENSED)
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_width(TABLE_WIDTH);
        let columns = columns(self.case.kind);
        let mut headings = vec![self.case.name.to_string()];
        for &(key, heading, ratio) in columns {
            headings.push(heading.into());
            headings.extend(ratio.then(|| format!("/{baseline}")));
            let has_limit = key == self.case.kind.headline() && self.limit.is_some();
            headings.extend(has_limit.then(|| "/limit".into()));
        }
        table.set_header(headings);
        let base = self.baseline(baseline);
        for entry in self.limit.iter().chain(&self.entries) {
            table.add_row(self.row(entry, base, columns));
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }

    fn row(&self, entry: &Entry, base: Option<&Entry>, columns: &[Column]) -> Vec<String> {
        let mut row = vec![entry.name.clone()];
        for &(key, _, ratio) in columns {
            let headline = key == self.case.kind.headline();
            row.push(match entry.spread(key) {
                Some(spread) if headline => headline_cell(spread, &entry.failures),
                Some(spread) => number(spread.median),
                None if headline => failed(&entry.failures),
                None => String::new(),
            });
            if ratio {
                row.push(ratio_cell(entry, base, key));
            }
            if headline && self.limit.is_some() {
                row.push(ratio_cell(entry, self.limit.as_ref(), key));
            }
        }
        row
    }

    fn json(&self) -> Value {
        json!({
            "case": self.case.name,
            "headline": self.case.kind.headline(),
            "limit": self.limit.as_ref().map(Entry::json),
            "daemons": self.entries.iter().map(Entry::json).collect::<Vec<_>>(),
        })
    }
}

/// All results and the machine's kernel and CPU, as JSON.
pub fn json(results: &[CaseResult], runs: usize, seconds: f64) -> Value {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let cpu = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name\t: "));
    json!({
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "cpu": cpu,
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "runs": runs,
        "seconds_per_run": seconds,
        "cases": results.iter().map(CaseResult::json).collect::<Vec<_>>(),
    })
}

/// A column: the key, the heading, and whether a ratio to the baseline follows.
type Column = (&'static str, &'static str, bool);

fn columns(kind: Kind) -> &'static [Column] {
    match kind {
        Kind::Streams {
            direction: Direction::Both,
            ..
        } => BOTH_DIRECTIONS,
        Kind::Streams { .. } | Kind::Siblings { .. } => STREAM,
        Kind::Messages { .. } => MESSAGES,
        Kind::Uml(_) => REAL_STREAM,
        Kind::RequestResponse | Kind::MessageRoundTrip | Kind::SiblingRoundTrip(_) => {
            REQUEST_RESPONSE
        }
        Kind::Connect => CONNECT,
        Kind::Echo(_) => ECHO,
        Kind::Flooded { measured, .. } if measured.is_stream() => FLOODED_STREAM,
        Kind::Flooded { .. } => FLOODED_OPS,
        Kind::Idle(_) => IDLE,
        Kind::StartUp => START_UP,
    }
}

const STREAM: &[Column] = &[
    (key::MIB_PER_S, "MiB/s (min-max)", true),
    (key::CPU_S_PER_GIB, "CPU s/GiB", true),
    (key::OTHERS_CPU_S_PER_GIB, "others s/GiB", false),
    (key::KICKS_PER_MIB, "kicks/MiB", false),
    (key::INTERRUPTS_PER_MIB, "irqs/MiB", false),
    (key::SYSCALLS_PER_MIB, "syscalls/MiB", false),
];

const MESSAGES: &[Column] = &[
    (key::MIB_PER_S, "MiB/s (min-max)", true),
    (key::OPS_PER_S, "messages/s", false),
    (key::CPU_S_PER_GIB, "CPU s/GiB", true),
    (key::OTHERS_CPU_S_PER_GIB, "others s/GiB", false),
    (key::KICKS_PER_MIB, "kicks/MiB", false),
    (key::INTERRUPTS_PER_MIB, "irqs/MiB", false),
    (key::SYSCALLS_PER_MIB, "syscalls/MiB", false),
];

const BOTH_DIRECTIONS: &[Column] = &[
    (key::MIB_PER_S, "MiB/s (min-max)", true),
    (key::TO_HOST_MIB_PER_S, "out", false),
    (key::TO_GUEST_MIB_PER_S, "in", false),
    (key::CPU_S_PER_GIB, "CPU s/GiB", true),
    (key::OTHERS_CPU_S_PER_GIB, "others s/GiB", false),
    (key::SYSCALLS_PER_MIB, "syscalls/MiB", false),
];

const REAL_STREAM: &[Column] = &[
    (key::MIB_PER_S, "MiB/s (min-max)", true),
    (key::CPU_S_PER_GIB, "CPU s/GiB", true),
    (key::SYSCALLS_PER_MIB, "syscalls/MiB", false),
];

const REQUEST_RESPONSE: &[Column] = &[
    (key::P50_US, "p50 us (min-max)", true),
    (key::P99_US, "p99 us", true),
    (key::CPU_US_PER_OP, "CPU us", true),
    (key::OTHERS_CPU_US_PER_OP, "others us", false),
    (key::KICKS_PER_OP, "kicks", false),
    (key::INTERRUPTS_PER_OP, "irqs", false),
    (key::SYSCALLS_PER_OP, "syscalls", false),
];

const CONNECT: &[Column] = &[
    (key::OPS_PER_S, "per second (min-max)", true),
    (key::P99_US, "p99 us", true),
    (key::CPU_US_PER_OP, "CPU us", true),
    (key::OTHERS_CPU_US_PER_OP, "others us", false),
    (key::KICKS_PER_OP, "kicks", false),
    (key::INTERRUPTS_PER_OP, "irqs", false),
    (key::SYSCALLS_PER_OP, "syscalls", false),
];

const ECHO: &[Column] = &[
    (key::OPS_PER_S, "messages/s (min-max)", true),
    (key::FAIRNESS, "slowest/fastest", false),
    (key::CPU_US_PER_OP, "CPU us", true),
    (key::OTHERS_CPU_US_PER_OP, "others us", false),
    (key::KICKS_PER_OP, "kicks", false),
    (key::INTERRUPTS_PER_OP, "irqs", false),
    (key::SYSCALLS_PER_OP, "syscalls", false),
];

const FLOODED_STREAM: &[Column] = &[
    (key::MIB_PER_S, "MiB/s (min-max)", true),
    (key::FLOOD_PER_S, "flood/s", true),
    (key::FLOOD_ANSWERED, "answered/sent", false),
    (key::DAEMON_CPUS, "CPUs", false),
];

const FLOODED_OPS: &[Column] = &[
    (key::P99_US, "p99 us (min-max)", true),
    (key::P50_US, "p50 us", true),
    (key::OPS_PER_S, "ops/s", false),
    (key::FLOOD_PER_S, "flood/s", true),
    (key::FLOOD_ANSWERED, "answered/sent", false),
    (key::DAEMON_CPUS, "CPUs", false),
];

const IDLE: &[Column] = &[
    (key::ANON_KIB_PER_CONN, "anonymous KiB each (min-max)", true),
    (key::RSS_KIB_PER_CONN, "resident KiB each", true),
    (key::CPU_US_PER_S, "CPU us/s", true),
];

const START_UP: &[Column] = &[
    (key::START_UP_MS, "ms until ready (min-max)", true),
    (key::ANON_KIB, "anonymous KiB", true),
    (key::RSS_KIB, "resident KiB", true),
];

fn headline_cell(spread: Spread, failures: &[String]) -> String {
    let [median, min, max] = [spread.median, spread.min, spread.max].map(number);
    let mut cell = format!("{median} ({min}-{max})");
    if !failures.is_empty() {
        cell += &format!(", {}", failed(failures));
    }
    cell
}

fn failed(failures: &[String]) -> String {
    match failures {
        [] => String::new(),
        [first, ..] => format!("{} failed: {first}", failures.len()),
    }
}

fn ratio_cell(entry: &Entry, base: Option<&Entry>, key: &str) -> String {
    let base = base.and_then(|base| base.median(key));
    let both = entry.median(key).zip(base.filter(|&base| base > 0.0));
    both.map_or_else(String::new, |(own, base)| format!("{:.2}", own / base))
}

/// Formats a number with three significant digits.
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 999.5 => thousands(value),
        v if v >= 99.95 => format!("{value:.0}"),
        v if v >= 9.995 => format!("{value:.1}"),
        v if v >= 0.1 || v == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
