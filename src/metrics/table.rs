//! What a daemon has counted, as a person reads it: the other end of [`crate::metrics::socket`].

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use prometheus_parse::{Sample, Scrape, Value};

use crate::metrics::prometheus::PREFIX;

/// Puts the cursor home and empties a terminal.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Prints what [`read`] gives, once or every so many seconds.
pub fn show(path: &Path, every: Option<u32>) -> io::Result<()> {
    let mut out = io::stdout();
    loop {
        let page = read(path)?;
        let Some(seconds) = every else {
            return writeln!(out, "{}", page.trim_end());
        };
        writeln!(out, "{CLEAR}{}", page.trim_end())?;
        thread::sleep(Duration::from_secs(seconds.max(1).into()));
    }
}

/// Reads the counters of the daemon whose stats socket is at `path`: a line for the device, one for its connections so
/// far, and a table of those at the moment.
pub fn read(path: &Path) -> io::Result<String> {
    let stream = UnixStream::connect(path)?;
    stream.shutdown(Shutdown::Write)?;
    let scrape = Scrape::parse(BufReader::new(stream).lines())?;
    let stats = Stats(scrape.samples);
    Ok(format!("{}\n{}", stats.summary(), stats.table()))
}

/// What the daemon has answered.
struct Stats(Vec<Sample>);

impl Stats {
    /// The samples with this name.
    fn named(&self, name: &str) -> impl Iterator<Item = &Sample> {
        let name = format!("{PREFIX}_{name}");
        self.0.iter().filter(move |sample| sample.metric == name)
    }

    /// The number of all samples with this name and, if one is given, with this label.
    fn number(&self, name: &str, label: Option<(&str, &str)>) -> u64 {
        self.named(name)
            .filter(|sample| label.is_none_or(|(key, value)| sample.labels.get(key) == Some(value)))
            .map(number)
            .sum()
    }

    fn summary(&self) -> String {
        let vmm = match self.number("vmm_connected", None) {
            0 => "no VMM",
            _ => "a VMM is connected",
        };
        let total = |name| self.number(name, None);
        let ended: Vec<String> = self
            .named("connections_ended_total")
            .filter(|sample| number(sample) > 0)
            .map(|sample| format!("{} {}", number(sample), label(sample, "how")))
            .collect();
        let from = |name, end| self.number(name, Some(("from", end)));
        format!(
            "{vmm}, {} so far; {} kicks, {} interrupts\n\
             from the guest: {} packets, {}; to the guest: {} packets, {}\n\
             connections: {} now, {} by the guest, {} by host programs, {} refused; ended: {}\n\
             resets: {}, {} lost; malformed: {}; foreign: {}; credit stalls: {}; dropped clients: {} of {}\n",
            total("vmm_sessions_total"),
            total("kicks_total"),
            total("interrupts_total"),
            from("packets_total", "guest"),
            bytes(from("payload_bytes_total", "guest")),
            from("packets_total", "host"),
            bytes(from("payload_bytes_total", "host")),
            total("connections"),
            self.number("connections_opened_total", Some(("by", "guest"))),
            self.number("connections_opened_total", Some(("by", "host"))),
            total("connections_refused_total"),
            if ended.is_empty() {
                "none".to_owned()
            } else {
                ended.join(", ")
            },
            total("resets_total"),
            total("resets_lost_total"),
            total("malformed_chains_total"),
            total("foreign_packets_total"),
            total("credit_stalls_total"),
            total("clients_dropped_total"),
            total("clients_total"),
        )
    }

    fn table(&self) -> String {
        let mut rows: BTreeMap<(u64, u64), [String; 6]> = BTreeMap::new();
        let mut put =
            |name: &str, filter: Option<&str>, column: usize, text: fn(&Sample) -> String| {
                for sample in self.named(name) {
                    if filter.is_none() || sample.labels.get("from") == filter {
                        rows.entry(ports(sample)).or_default()[column] = text(sample);
                    }
                }
            };
        let as_bytes = |sample: &Sample| bytes(number(sample));
        put("connection_info", None, 0, |sample| {
            label(sample, "state").into()
        });
        put("connection_payload_bytes_total", Some("guest"), 1, as_bytes);
        put("connection_payload_bytes_total", Some("host"), 2, as_bytes);
        put("connection_buffered_bytes", None, 3, as_bytes);
        put("connection_credit_bytes", None, 4, as_bytes);
        put("connection_info", None, 5, |sample| {
            label(sample, "waits_for").into()
        });
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_header([
            "GUEST PORT",
            "HOST PORT",
            "STATE",
            "FROM GUEST",
            "TO GUEST",
            "BUFFERED",
            "CREDIT",
            "WAITS FOR",
        ]);
        for column in [0, 1, 3, 4, 5, 6] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        for ((guest, host), columns) in rows {
            let ports = [guest.to_string(), host.to_string()];
            table.add_row(ports.into_iter().chain(columns));
        }
        table.to_string()
    }
}

fn number(sample: &Sample) -> u64 {
    match sample.value {
        Value::Counter(value) | Value::Gauge(value) | Value::Untyped(value) => value as u64,
        Value::Histogram(_) | Value::Summary(_) => 0,
    }
}

fn label<'s>(sample: &'s Sample, name: &str) -> &'s str {
    sample.labels.get(name).unwrap_or_default()
}

fn ports(sample: &Sample) -> (u64, u64) {
    let port = |name| label(sample, name).parse().unwrap_or_default();
    (port("guest_port"), port("host_port"))
}

/// A number of bytes in the unit that leaves it readable.
fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" {
                format!("{value} B")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}
