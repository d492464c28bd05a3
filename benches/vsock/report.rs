//! The results of all runs: medians, spreads and ratios, as a table and as JSON.

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table, Width};
use serde_json::{Map, Value, json};

use crate::cases::Case;
use crate::columns::{Column, columns, is_worst};
use crate::failure::Failure;
use crate::machine::Machine;
use crate::measure::{Sample, key};

/// The width of the tables in characters; longer rows are wrapped.
const TABLE_WIDTH: u16 = 132;
/// The spaces beside the content of a cell.
const CELL_PADDING: u16 = 2;
/// The heading of a ratio to the baseline.
pub const TIMES: &str = "×";

/// The results of a daemon or of the machine's limit in one case.
pub struct Entry {
    /// The daemon's name.
    pub name: String,
    /// A sample for each run, and one for the system calls.
    pub runs: Vec<Sample>,
    /// Why other runs failed.
    pub failures: Vec<String>,
    /// What the daemon does not have that the case is about.
    pub unsupported: Option<String>,
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
            unsupported: None,
        }
    }

    /// Adds the result of a run.
    pub fn add(&mut self, result: Result<Sample, Failure>) {
        match result {
            Ok(sample) => self.runs.push(sample),
            Err(Failure::Failed(why)) => self.failures.push(why),
            Err(Failure::Unsupported(what)) => self.unsupported = Some(what),
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

    /// In place of results.
    pub fn without_results(&self) -> String {
        match &self.unsupported {
            Some(_) => "not supported".into(),
            None => failed(&self.failures),
        }
    }

    /// What it does not have, and why runs failed, in a line each.
    fn notes(&self) -> impl Iterator<Item = String> + '_ {
        let unsupported = self.unsupported.iter();
        let unsupported = unsupported.map(|what| format!("{}: not supported: {what}", self.name));
        let mut failures: Vec<&String> = self.failures.iter().collect();
        failures.dedup();
        unsupported.chain(
            failures
                .into_iter()
                .map(|why| format!("{}: {why}", self.name)),
        )
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
        json!({
            "name": self.name,
            "unsupported": self.unsupported,
            "failures": self.failures,
            "results": results,
        })
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

    /// What is to be said of the case beside its table, in a line each.
    pub fn notes(&self) -> impl Iterator<Item = String> + '_ {
        let entries = self.limit.iter().chain(&self.entries);
        entries.flat_map(Entry::notes)
    }

    /// The case as a table.
    pub fn table(&self, baseline: &str) -> Table {
        let mut table = Table::new();
        table
            .load_preset(UTF8_FULL_CONDENSED)
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_width(TABLE_WIDTH);
        let base = self.baseline(baseline);
        let has = |key| base.is_some_and(|base| base.median(key).is_some());
        // No ratios to what is not there.
        let columns = columns(self.case.kind).iter();
        let columns = columns.map(|&(key, heading, ratio)| (key, heading, ratio && has(key)));
        let columns = &columns.collect::<Vec<_>>();
        let mut headings = vec![self.case.name.to_string()];
        for &(key, heading, ratio) in columns {
            headings.push(heading.into());
            headings.extend(ratio.then(|| TIMES.into()));
            let has_limit = key == self.case.kind.headline() && self.limit.is_some();
            headings.extend(has_limit.then(|| "of limit".into()));
        }
        table.set_header(headings);
        for entry in self.limit.iter().chain(&self.entries) {
            table.add_row(self.row(entry, base, columns));
        }
        let longest = |name: &str| name.split(' ').map(str::len).max();
        let names = self.entries.iter().filter_map(|entry| longest(&entry.name));
        let width = names.max().unwrap_or_default() as u16 + CELL_PADDING;
        if let Some(column) = table.column_mut(0) {
            column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(width)));
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
                Some(spread) if is_worst(key) => number(spread.max),
                Some(spread) => number(spread.median),
                None if headline => entry.without_results(),
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

/// All results, and what they were measured on.
pub fn json(results: &[CaseResult], machine: &Machine, runs: usize, seconds: f64) -> Value {
    json!({
        "machine": machine.json(),
        "runs": runs,
        "seconds_per_run": seconds,
        "cases": results.iter().map(CaseResult::json).collect::<Vec<_>>(),
    })
}

fn headline_cell(spread: Spread, failures: &[String]) -> String {
    let [median, min, max] = [spread.median, spread.min, spread.max].map(number);
    let mut cell = format!("{median} ({min}-{max})");
    if !failures.is_empty() {
        cell += &format!(", {}", failed(failures));
    }
    cell
}

fn failed(failures: &[String]) -> String {
    match failures.len() {
        0 => String::new(),
        count => format!("{count} failed"),
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
