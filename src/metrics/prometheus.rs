//! A [`Snapshot`] in Prometheus' text format (version 0.0.4).
//!
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>: a metric is a `HELP` and a `TYPE` line and its samples,
//! all of them together. Samples carry the label `cid` where the process serves several VMs. No name or label here contains
//! a character that would have to be escaped.

use std::fmt::{Display, Write};
use std::iter;
use std::rc::Rc;

use super::Chunks;
use super::counters::{CloseReason, ConnectionStats, Side, Snapshot, VmSnapshot};
use crate::packet::header::Cid;

/// What every name begins with.
const PREFIX: &str = "vhost_user_vsock";

/// The media type of [`chunks`].
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4";

/// The snapshot as text.
pub(super) fn chunks(snapshot: Rc<Snapshot>) -> Chunks {
    let of_connections = snapshot.clone();
    let vms = VM_METRICS.iter().map(move |metric| {
        let mut text = Text::default();
        text.header(metric);
        for vm in &snapshot.vms {
            (metric.samples)(vm, &mut Samples::new(&mut text, metric, &snapshot, vm));
        }
        Ok(text.0)
    });
    let connections = CONNECTION_METRICS
        .iter()
        .flat_map(move |metric| connection_chunks(metric, of_connections.clone()));
    Box::new(vms.chain(connections))
}

/// A metric that each connection has samples of. Without any connection there is no metric.
fn connection_chunks(metric: &'static Metric<ConnectionStats>, snapshot: Rc<Snapshot>) -> Chunks {
    let connections = |vm: &VmSnapshot| 0..vm.connections.len();
    let places: Vec<_> = snapshot.vms.iter().map(connections).collect();
    if places.iter().all(|connections| connections.is_empty()) {
        return Box::new(iter::empty());
    }
    let mut header = Text::default();
    header.header(metric);
    let places = places.into_iter().enumerate();
    let samples = places.flat_map(|(vm, connections)| connections.map(move |index| (vm, index)));
    let samples = samples.map(move |(vm, index)| {
        let vm = &snapshot.vms[vm];
        let conn = &vm.connections[index];
        let mut text = Text::default();
        let mut samples = Samples::new(&mut text, metric, &snapshot, vm);
        samples.label("guest_port", conn.guest_port.0);
        samples.label("host_port", conn.peer.port.0);
        if conn.peer.cid != Cid::HOST {
            samples.label("peer_cid", conn.peer.cid);
        }
        (metric.samples)(conn, &mut samples);
        Ok(text.0)
    });
    Box::new(iter::once(Ok(header.0)).chain(samples))
}

/// A metric of each `T`, a VM or a connection.
struct Metric<T> {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    samples: fn(&T, &mut Samples<'_>),
}

const fn gauge<T>(
    name: &'static str,
    help: &'static str,
    samples: fn(&T, &mut Samples<'_>),
) -> Metric<T> {
    Metric {
        name,
        kind: "gauge",
        help,
        samples,
    }
}

const fn counter<T>(
    name: &'static str,
    help: &'static str,
    samples: fn(&T, &mut Samples<'_>),
) -> Metric<T> {
    Metric {
        name,
        kind: "counter",
        help,
        samples,
    }
}

static VM_METRICS: [Metric<VmSnapshot>; 20] = [
    gauge("vmm_connected", "Whether a VMM is connected", |vm, out| {
        out.value(vm.vmm_connected.into());
    }),
    counter(
        "vmm_sessions_total",
        "VMMs that have connected",
        |vm, out| {
            out.value(vm.counters.sessions);
        },
    ),
    gauge("connections", "Connections at the moment", |vm, out| {
        out.value(vm.connections.len() as u64);
    }),
    counter(
        "connections_opened_total",
        "Connections, by the side that opened them",
        |vm, out| {
            for side in Side::ALL {
                out.labelled("by", side.name(), vm.counters.opened[side as usize]);
            }
        },
    ),
    counter(
        "connections_ended_total",
        "Connections that were closed, by the reason",
        |vm, out| {
            for reason in CloseReason::ALL {
                out.labelled("how", reason.name(), vm.counters.ended[reason as usize]);
            }
        },
    ),
    counter(
        "connections_refused_total",
        "Connection requests of the guest that were refused",
        |vm, out| out.value(vm.counters.refused),
    ),
    counter(
        "clients_total",
        "Host programs that have connected",
        |vm, out| out.value(vm.counters.clients),
    ),
    gauge(
        "clients_handshaking",
        "Host programs that have connected and not named a port yet",
        |vm, out| out.value(vm.handshaking as u64),
    ),
    gauge(
        "clients_waiting",
        "Host programs that wait for the guest to accept them",
        |vm, out| out.value(vm.waiting as u64),
    ),
    counter(
        "clients_dropped_total",
        "Host programs that were closed before they had a connection",
        |vm, out| out.value(vm.counters.clients_dropped),
    ),
    counter(
        "packets_total",
        "Packets, by the side that sent them",
        |vm, out| {
            out.by_sender(vm.counters.from_guest.packets, vm.counters.to_guest.packets);
        },
    ),
    counter(
        "payload_bytes_total",
        "Bytes of payload, by the side that sent them",
        |vm, out| out.by_sender(vm.counters.from_guest.bytes, vm.counters.to_guest.bytes),
    ),
    counter(
        "kicks_total",
        "Kicks seen; several that arrive together are one",
        |vm, out| out.value(vm.counters.kicks),
    ),
    counter(
        "interrupts_total",
        "Interrupts sent to the guest",
        |vm, out| out.value(vm.counters.interrupts),
    ),
    counter("resets_total", "RST packets to the guest", |vm, out| {
        out.value(vm.counters.resets);
    }),
    counter(
        "resets_lost_total",
        "RST packets that were dropped because the guest provided no buffers",
        |vm, out| out.value(vm.counters.resets_lost),
    ),
    counter(
        "credit_stalls_total",
        "How often data of a host program had to wait for credit from the guest",
        |vm, out| out.value(vm.counters.credit_stalls),
    ),
    counter(
        "malformed_chains_total",
        "Malformed descriptor chains from the guest",
        |vm, out| out.value(vm.counters.malformed),
    ),
    counter(
        "foreign_packets_total",
        "Packets from the guest that were dropped because their source CID is not its own",
        |vm, out| out.value(vm.counters.foreign),
    ),
    counter(
        "descriptor_shortages_total",
        "How often host programs had to wait because the daemon was out of file descriptors",
        |vm, out| out.value(vm.counters.shortages),
    ),
];

static CONNECTION_METRICS: [Metric<ConnectionStats>; 4] = [
    gauge(
        "connection_info",
        "A connection: its state, and the side that keeps the other one waiting",
        |conn, out| {
            out.label("state", &conn.state);
            out.labelled("waits_for", conn.waits_for.map_or("nobody", Side::name), 1);
        },
    ),
    counter(
        "connection_payload_bytes_total",
        "Bytes of payload of a connection, by the side that sent them",
        |conn, out| out.by_sender(conn.from_guest, conn.to_guest),
    ),
    gauge(
        "connection_buffered_bytes",
        "Bytes from the guest that the host program has not taken yet",
        |conn, out| out.value(conn.buffered as u64),
    ),
    gauge(
        "connection_credit_bytes",
        "Bytes that the guest has room for, by its credit",
        |conn, out| out.value(conn.credit as u64),
    ),
];

/// A part of the text.
#[derive(Default)]
struct Text(String);

impl Text {
    fn header<T>(&mut self, metric: &Metric<T>) {
        let Metric {
            name, kind, help, ..
        } = metric;
        self.push(format_args!("# HELP {PREFIX}_{name} {help}\n"));
        self.push(format_args!("# TYPE {PREFIX}_{name} {kind}\n"));
    }

    fn push(&mut self, text: impl Display) {
        // Writing to a string can't fail.
        let _ = write!(self.0, "{text}");
    }
}

/// The samples of one metric for one VM or connection.
struct Samples<'t> {
    text: &'t mut Text,
    name: &'static str,
    /// The labels of all samples from now on, with commas between.
    labels: String,
}

impl<'t> Samples<'t> {
    fn new<T>(
        text: &'t mut Text,
        metric: &Metric<T>,
        snapshot: &Snapshot,
        vm: &VmSnapshot,
    ) -> Self {
        let mut samples = Self {
            text,
            name: metric.name,
            labels: String::new(),
        };
        if snapshot.vms.len() > 1 {
            samples.label("cid", vm.cid.get());
        }
        samples
    }

    fn label(&mut self, name: &str, value: impl Display) {
        let separator = if self.labels.is_empty() { "" } else { "," };
        let _ = write!(self.labels, "{separator}{name}=\"{value}\"");
    }

    /// A sample without further labels.
    fn value(&mut self, value: u64) {
        let Self { text, name, labels } = self;
        if labels.is_empty() {
            text.push(format_args!("{PREFIX}_{name} {value}\n"));
        } else {
            text.push(format_args!("{PREFIX}_{name}{{{labels}}} {value}\n"));
        }
    }

    /// A sample with one more label.
    fn labelled(&mut self, name: &str, label: &str, value: u64) {
        let shared = self.labels.len();
        self.label(name, label);
        self.value(value);
        self.labels.truncate(shared);
    }

    fn by_sender(&mut self, from_guest: u64, to_guest: u64) {
        self.labelled("from", Side::Guest.name(), from_guest);
        self.labelled("from", Side::Host.name(), to_guest);
    }
}
