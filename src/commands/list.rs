//! `list`: one line for each VM of all daemons.

use std::path::PathBuf;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};

use super::page::bytes;
use super::query::{self, Daemon};
use super::stats::{StatsError, print};
use crate::metrics::counters::VmSnapshot;

/// The arguments of `list`.
#[derive(Args)]
pub struct ListArgs {
    /// The directory of the daemons' directories, with their sockets as the service has them [default: /run/vhost-user-vsock]
    dir: Option<PathBuf>,
}

/// The columns, and whether they are numbers.
const COLUMNS: [(&str, bool); 7] = [
    ("NAME", false),
    ("CID", true),
    ("VMM", false),
    ("DRIVER", false),
    ("CONNECTIONS", true),
    ("FROM GUEST", true),
    ("TO GUEST", true),
];

/// Prints the list. A daemon that does not answer has a line that says so.
///
/// # Errors
/// The directory can't be read, or stdout can't be written.
pub fn run(args: &ListArgs) -> Result<(), StatsError> {
    let directory = args.dir.as_deref();
    let daemons = query::all(directory).map_err(|error| StatsError::directory(directory, error))?;
    print(&(list(&daemons) + "\n")).map_err(StatsError::Output)?;
    Ok(())
}

fn list(daemons: &[Daemon]) -> String {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_header(COLUMNS.map(|(name, _)| name));
    for (index, (_, is_number)) in COLUMNS.iter().enumerate() {
        if *is_number && let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for Daemon { name, answer } in daemons {
        match answer {
            Ok(snapshot) => snapshot.vms.iter().for_each(|vm| {
                table.add_row(row(name, vm));
            }),
            Err(error) => {
                table.add_row([name.clone(), "-".into(), format!("unknown: {error}")]);
            }
        }
    }
    let text = table.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    lines.join("\n")
}

fn row(name: &str, vm: &VmSnapshot) -> [String; COLUMNS.len()] {
    [
        name.to_owned(),
        vm.cid.to_string(),
        (if vm.vmm_connected {
            "connected"
        } else {
            "none"
        })
        .to_owned(),
        (if vm.driver_started { "started" } else { "none" }).to_owned(),
        vm.connections.len().to_string(),
        bytes(vm.counters.from_guest.bytes),
        bytes(vm.counters.to_guest.bytes),
    ]
}
