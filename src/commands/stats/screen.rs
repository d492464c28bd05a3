//! The page of `--watch`: a line for each VM, then its connections, with rates and what moves most first.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Instant;

use super::Answers;
use crate::commands::page::{age, bytes, failed_calls, peer, state, waits_for};
use crate::commands::query::Daemon;
use crate::metrics::counters::{ConnectionStats, Snapshot, VmSnapshot};
use crate::packet::header::{Cid, GuestPort, PeerAddr};

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) columns: usize,
    pub(super) rows: usize,
}

/// Bytes in each direction.
#[derive(Clone, Copy, Debug, Default)]
struct Moved {
    from_guest: u64,
    to_guest: u64,
}

/// What names a connection: its VM and its addresses.
type Key = (String, Cid, GuestPort, PeerAddr, bool);

/// What all VMs have shown at one time.
pub(super) struct Moment {
    at: Instant,
    /// With the names of their daemons.
    vms: Vec<(String, VmSnapshot)>,
    /// One line for each daemon that has not answered.
    silent: Vec<String>,
    /// Only one daemon was asked.
    is_one: bool,
    moved: BTreeMap<Key, Moved>,
}

impl Moment {
    pub(super) fn new(answers: Answers) -> Self {
        let is_one = matches!(answers, Answers::One(_));
        let (mut vms, mut silent) = (Vec::new(), Vec::new());
        let mut add = |name: &str, snapshot: Snapshot| {
            vms.extend(snapshot.vms.into_iter().map(|vm| (name.to_owned(), vm)));
        };
        match answers {
            Answers::One(snapshot) => add("", snapshot),
            Answers::All(daemons) => {
                for Daemon { name, answer } in daemons {
                    match answer {
                        Ok(snapshot) => add(&name, snapshot),
                        Err(error) => silent.push(format!("{name}: {error}")),
                    }
                }
            }
        }
        let moved = vms.iter().flat_map(|(name, vm)| {
            let connections = vm.connections.iter();
            connections.map(move |conn| (key(name, vm, conn), moved(conn)))
        });
        Self {
            at: Instant::now(),
            moved: moved.collect(),
            vms,
            silent,
            is_one,
        }
    }

    /// Whether lines and connections name their VM.
    fn names_vms(&self) -> bool {
        !self.is_one || self.vms.len() > 1
    }

    /// What a line calls a VM.
    fn name(&self, name: &str, vm: &VmSnapshot) -> String {
        match (self.is_one, self.names_vms()) {
            (false, _) => format!("{name} (CID {})", vm.cid),
            (true, true) => format!("CID {}", vm.cid),
            (true, false) => String::new(),
        }
    }
}

fn key(name: &str, vm: &VmSnapshot, conn: &ConnectionStats) -> Key {
    let ConnectionStats {
        guest_port,
        peer,
        seqpacket,
        ..
    } = conn;
    (name.to_owned(), vm.cid, *guest_port, *peer, *seqpacket)
}

fn moved(conn: &ConnectionStats) -> Moved {
    Moved {
        from_guest: conn.from_guest,
        to_guest: conn.to_guest,
    }
}

/// What has moved in each second since the moment before. There is no rate at first.
struct Rates<'m> {
    before: Option<&'m Moment>,
    seconds: f64,
}

impl<'m> Rates<'m> {
    fn new(now: &Moment, before: Option<&'m Moment>) -> Self {
        let since = |before: &Moment| now.at.saturating_duration_since(before.at);
        let seconds = before.map_or(0.0, |before| since(before).as_secs_f64());
        Self {
            before: before.filter(|_| seconds > 0.0),
            seconds,
        }
    }

    /// The rate of one connection. One that was not there before, or that has taken the ports of another, has begun with nothing.
    fn of(&self, key: &Key, now: Moved) -> Option<Moved> {
        let before = self.before?.moved.get(key).copied().unwrap_or_default();
        let rate = |now: u64, before: u64| {
            let bytes = now.checked_sub(before).unwrap_or(now);
            (bytes as f64 / self.seconds) as u64
        };
        Some(Moved {
            from_guest: rate(now.from_guest, before.from_guest),
            to_guest: rate(now.to_guest, before.to_guest),
        })
    }
}

/// A connection in the table.
struct Row<'m> {
    vm: String,
    conn: &'m ConnectionStats,
    rate: Option<Moved>,
}

impl Row<'_> {
    fn moves(&self) -> u64 {
        let total = |rate: Moved| rate.from_guest.saturating_add(rate.to_guest);
        self.rate.map_or(0, total)
    }
}

/// The lines, as many and as long as the size allows.
pub(super) fn screen(now: &Moment, before: Option<&Moment>, size: Option<Size>) -> Vec<String> {
    let rates = Rates::new(now, before);
    let mut rows = Vec::new();
    let mut vms = Vec::new();
    for (name, vm) in &now.vms {
        let shown = now.name(name, vm);
        let first = rows.len();
        rows.extend(vm.connections.iter().map(|conn| Row {
            vm: shown.clone(),
            conn,
            rate: rates.of(&key(name, vm, conn), moved(conn)),
        }));
        let moves = rows[first..]
            .iter()
            .map(Row::moves)
            .fold(0, u64::saturating_add);
        vms.push((moves, vm_line(&shown, vm, &rows[first..])));
    }
    vms.sort_by_key(|(moves, _)| Reverse(*moves));
    rows.sort_by_key(|row| (Reverse(row.moves()), row.conn.guest_port, row.conn.peer));
    let mut lines: Vec<String> = vms.into_iter().map(|(_, line)| line).collect();
    if let [(_, vm)] = &now.vms[..] {
        lines.extend(failed_calls(vm));
    }
    lines.extend(now.silent.iter().cloned());
    let height = size.map_or(usize::MAX, |size| size.rows);
    let for_vms = match rows.is_empty() {
        true => height,
        false => (height / 2).max(1),
    };
    shorten(&mut lines, for_vms, "VMs");
    // A blank line and the heading.
    let for_rows = height.saturating_sub(lines.len() + 2);
    if !rows.is_empty() && for_rows > 0 {
        lines.push(String::new());
        let more = rows.len().saturating_sub(for_rows);
        // The last line says how many are missing.
        let shown = rows
            .len()
            .min(if more > 0 { for_rows - 1 } else { for_rows });
        lines.extend(table(&rows[..shown], now.names_vms(), size));
        if more > 0 {
            lines.push(format!("and {} more", rows.len() - shown));
        }
    }
    if let Some(size) = size {
        lines.iter_mut().for_each(|line| cut(line, size.columns));
    }
    lines
}

/// The line of one VM, whose connections are `rows`.
fn vm_line(name: &str, vm: &VmSnapshot, rows: &[Row<'_>]) -> String {
    let sum = |part: fn(&Moved) -> u64| {
        let rates = rows.iter().filter_map(|row| row.rate.as_ref());
        rates.map(part).fold(0, u64::saturating_add)
    };
    let separator = if name.is_empty() { "" } else { ": " };
    let rates = match rows.iter().all(|row| row.rate.is_none()) {
        true => String::new(),
        false => format!(
            "; {}/s from the guest, {}/s to the guest",
            bytes(sum(|rate| rate.from_guest)),
            bytes(sum(|rate| rate.to_guest))
        ),
    };
    let count = rows.len();
    format!("{name}{separator}{}; {count} connections{rates}", state(vm))
}

/// Leaves so many lines. The last one says how many are missing.
fn shorten(lines: &mut Vec<String>, max: usize, what: &str) {
    if lines.len() > max {
        let kept = max.saturating_sub(1);
        let missing = lines.len() - kept;
        lines.truncate(kept);
        lines.push(format!("and {missing} more {what}"));
    }
}

fn cut(line: &mut String, columns: usize) {
    if let Some((end, _)) = line.char_indices().nth(columns) {
        line.truncate(end);
    }
}

/// A column of the table.
struct Column {
    heading: &'static str,
    is_number: bool,
    cells: Vec<String>,
}

impl Column {
    fn width(&self) -> usize {
        let cells = self.cells.iter().map(|cell| cell.chars().count());
        cells.chain([self.heading.len()]).max().unwrap_or(0)
    }

    fn cell(&self, text: &str, width: usize) -> String {
        match self.is_number {
            true => format!("{text:>width$}"),
            false => format!("{text:<width$}"),
        }
    }
}

/// What is between two columns.
const GAP: &str = "  ";

/// The heading and a line for each row, with as many columns as the terminal has room for. What matters most is on the left.
fn table(rows: &[Row<'_>], names_vms: bool, size: Option<Size>) -> Vec<String> {
    let mut columns = columns(rows);
    if !names_vms {
        columns.remove(0);
    }
    if let Some(size) = size {
        let mut width = 0;
        let fits = |column: &Column| {
            width += column.width() + GAP.len();
            width <= size.columns + GAP.len()
        };
        let fitting = columns.iter().map(fits).take_while(|fits| *fits).count();
        // The ports are always there.
        columns.truncate(fitting.max(2));
    }
    let widths: Vec<usize> = columns.iter().map(Column::width).collect();
    let line = |cell: &dyn Fn(&Column) -> String| {
        let cells = columns.iter().zip(&widths);
        let cells = cells.map(|(column, width)| column.cell(&cell(column), *width));
        cells.collect::<Vec<_>>().join(GAP).trim_end().to_owned()
    };
    let heading = line(&|column| column.heading.to_owned());
    let rows = (0..rows.len()).map(|index| line(&|column| column.cells[index].clone()));
    [heading].into_iter().chain(rows).collect()
}

fn columns(rows: &[Row<'_>]) -> Vec<Column> {
    let column = |heading, is_number, cell: &dyn Fn(&Row<'_>) -> String| Column {
        heading,
        is_number,
        cells: rows.iter().map(cell).collect(),
    };
    let rate = |row: &Row<'_>, part: fn(Moved) -> u64| match row.rate {
        Some(rate) => bytes(part(rate)),
        None => "-".to_owned(),
    };
    vec![
        column("VM", false, &|row| row.vm.clone()),
        column("GUEST PORT", true, &|row| row.conn.guest_port.0.to_string()),
        column("HOST PORT", true, &|row| peer(row.conn.peer)),
        column("FROM GUEST/s", true, &|row| {
            rate(row, |rate| rate.from_guest)
        }),
        column("TO GUEST/s", true, &|row| rate(row, |rate| rate.to_guest)),
        column("AGE", true, &|row| age(row.conn.age)),
        column("WAITS FOR", false, &|row| waits_for(row.conn).to_owned()),
        column("STATE", false, &|row| {
            crate::commands::page::conn_state(row.conn)
        }),
        column("FROM GUEST", true, &|row| bytes(row.conn.from_guest)),
        column("TO GUEST", true, &|row| bytes(row.conn.to_guest)),
        column("BUFFERED", true, &|row| bytes(row.conn.buffered as u64)),
        column("CREDIT", true, &|row| bytes(row.conn.credit as u64)),
    ]
}
