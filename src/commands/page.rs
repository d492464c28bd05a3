//! The statistics of VMs as a text for a terminal.

use comfy_table::{CellAlignment, Table, presets};

use crate::metrics::counters::{
    CallFailure, CloseReason, ConnectionStats, Side, Snapshot, VmSnapshot,
};
use crate::packet::header::{Cid, PeerAddr};

/// Lays out the VMs of a daemon. Where there are several, each is headed by its CID.
pub(super) fn page(snapshot: &Snapshot) -> String {
    let is_named = snapshot.vms.len() > 1;
    let vms = snapshot.vms.iter().map(|vm| {
        if is_named {
            format!("CID {}: {}", vm.cid, device(vm))
        } else {
            device(vm)
        }
    });
    vms.collect::<Vec<_>>().join("\n\n")
}

/// One VM of several daemons, headed by its daemon's name and its CID.
pub(super) fn named(name: &str, vm: &VmSnapshot) -> String {
    format!("{name} (CID {}): {}", vm.cid, device(vm))
}

/// The device and its connections.
fn device(vm: &VmSnapshot) -> String {
    format!("{}\n{}", summary(vm), table(&vm.connections).trim_end())
}

/// The lines above the table: the device, and its connections since the daemon started.
fn summary(vm: &VmSnapshot) -> String {
    let counters = &vm.counters;
    let ended = CloseReason::ALL.iter().zip(counters.ended);
    let ended = ended.filter(|(_, count)| *count > 0);
    let ended: Vec<String> = ended
        .map(|(reason, count)| format!("{count} {}", reason.name()))
        .collect();
    let siblings = match counters.opened[Side::Sibling as usize] {
        0 => String::new(),
        count => format!(", {count} by siblings"),
    };
    format!(
        "{}, {} so far; {} kicks, {} interrupts\n\
         from the guest: {} packets, {}; to the guest: {} packets, {}\n\
         connections: {} now, {} by the guest, {} by host programs{siblings}, {} refused; ended: {}\n\
         resets: {}, {} lost; malformed: {}; foreign: {}; credit stalls: {}; dropped clients: {} of {}{}\n",
        state(vm),
        counters.sessions,
        counters.kicks,
        counters.interrupts,
        counters.from_guest.packets,
        bytes(counters.from_guest.bytes),
        counters.to_guest.packets,
        bytes(counters.to_guest.bytes),
        vm.connections.len(),
        counters.opened[Side::Guest as usize],
        counters.opened[Side::Host as usize],
        counters.refused,
        if ended.is_empty() {
            "none".to_owned()
        } else {
            ended.join(", ")
        },
        counters.resets,
        counters.resets_lost,
        counters.malformed,
        counters.foreign,
        counters.credit_stalls,
        counters.clients_dropped,
        counters.clients,
        failed_calls(vm).map_or(String::new(), |line| format!("\n{line}")),
    )
}

/// Whether there is a VMM and a driver.
pub(super) fn state(vm: &VmSnapshot) -> &'static str {
    match (vm.vmm_connected, vm.driver_started) {
        (false, _) => "no VMM",
        (true, false) => "a VMM is connected, driver not started",
        (true, true) => "a VMM is connected",
    }
}

/// A line about the calls that came to nothing, if there were any.
pub(super) fn failed_calls(vm: &VmSnapshot) -> Option<String> {
    let callers = ["the guest", "host programs", "siblings"];
    let by_side = callers.iter().zip(&vm.counters.failed);
    let parts = by_side.filter_map(|(caller, counts)| {
        let counts = CallFailure::ALL.iter().zip(counts);
        let reasons = counts.filter(|(_, count)| **count > 0);
        let reasons: Vec<String> = reasons
            .map(|(failure, count)| format!("{count} {}", words(*failure)))
            .collect();
        (!reasons.is_empty()).then(|| format!("by {caller}: {}", reasons.join(", ")))
    });
    let parts: Vec<String> = parts.collect();
    (!parts.is_empty()).then(|| format!("failed calls {}", parts.join("; ")))
}

fn words(failure: CallFailure) -> String {
    failure.name().replace('_', " ").replace("vmm", "VMM")
}

/// The connections, sorted by port.
fn table(connections: &[ConnectionStats]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header([
        "GUEST PORT",
        "HOST PORT",
        "STATE",
        "FROM GUEST",
        "TO GUEST",
        "BUFFERED",
        "CREDIT",
        "AGE",
        "WAITS FOR",
    ]);
    for column in [0, 1, 3, 4, 5, 6, 7] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut connections: Vec<&ConnectionStats> = connections.iter().collect();
    connections.sort_by_key(|conn| (conn.guest_port, conn.peer, conn.seqpacket));
    for conn in connections {
        table.add_row([
            conn.guest_port.0.to_string(),
            peer(conn.peer),
            conn_state(conn),
            bytes(conn.from_guest),
            bytes(conn.to_guest),
            bytes(conn.buffered as u64),
            bytes(conn.credit as u64),
            age(conn.age),
            waits_for(conn).to_owned(),
        ]);
    }
    table.to_string()
}

/// Its state, and what it carries if that is not bytes.
pub(super) fn conn_state(conn: &ConnectionStats) -> String {
    // Another program may answer in a daemon's place.
    let state = conn.state.escape_debug();
    match conn.seqpacket {
        true => format!("{state} (seqpacket)"),
        false => state.to_string(),
    }
}

/// A port of the host's, or the address of another guest's.
pub(super) fn peer(peer: PeerAddr) -> String {
    if peer.cid == Cid::HOST {
        peer.port.0.to_string()
    } else {
        peer.to_string()
    }
}

/// The side that keeps the other one waiting.
pub(super) fn waits_for(conn: &ConnectionStats) -> &'static str {
    conn.waits_for.map_or("nobody", Side::name)
}

/// A time in seconds in a readable unit.
pub(super) fn age(seconds: Option<u64>) -> String {
    match seconds {
        None => "-".into(),
        Some(seconds @ 0..120) => format!("{seconds} s"),
        Some(seconds @ 120..7_200) => format!("{} min", seconds / 60),
        Some(seconds @ 7_200..172_800) => format!("{} h", seconds / 3_600),
        Some(seconds) => format!("{} d", seconds / 86_400),
    }
}

/// A number of bytes in a readable unit.
pub(super) fn bytes(count: u64) -> String {
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
