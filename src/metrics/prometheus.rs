//! A [`Snapshot`] in Prometheus' text format (version 0.0.4).
//!
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>: a metric is a `HELP` and a `TYPE` line and its samples,
//! all of them together. Samples of a VM carry the label `cid`, and `name` as well where those of several daemons are merged.
//! Each connection has series of its own. A server that keeps them all would soon have millions, so they are left out where they
//! are not asked for.

use std::collections::BTreeSet;
use std::fmt::{Display, Write};
use std::iter;
use std::rc::Rc;

use super::Chunks;
use super::counters::{CallFailure, CloseReason, ConnectionStats, Side, Snapshot, VmSnapshot};
use crate::packet::header::Cid;

/// What every name begins with.
const PREFIX: &str = "vhost_user_vsock";

/// The media type of [`chunks`].
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4";

/// Whether the connections have series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connections {
    /// Each has its own.
    Listed,
    /// They are in the sums of their VM alone.
    Summed,
}

/// The snapshot as text.
pub(super) fn chunks(snapshot: Rc<Snapshot>, connections: Connections) -> Chunks {
    let mut build = Text::default();
    if let Some(version) = &snapshot.version {
        build.header(&BUILD_INFO);
        build_info(&mut build, version, &Labels::default());
    }
    let labels = snapshot.vms.iter().map(|vm| {
        let mut labels = Labels::default();
        labels.add("cid", vm.cid.get());
        labels
    });
    let labels = labels.collect();
    let vms = labelled_chunks(snapshot, labels, connections);
    Box::new(iter::once(Ok(build.0)).chain(vms))
}

/// The snapshot as a whole text.
pub fn text(snapshot: Snapshot, connections: Connections) -> String {
    whole(chunks(Rc::new(snapshot), connections))
}

/// The snapshots of several daemons in one text, with their names. One without a snapshot has not answered.
pub fn merged(daemons: Vec<(String, Option<Snapshot>)>, connections: Connections) -> String {
    let (mut up, mut build) = (Text::default(), Text::default());
    if !daemons.is_empty() {
        up.header(&UP);
    }
    let (mut vms, mut labels) = (Vec::new(), Vec::new());
    for (name, snapshot) in daemons {
        let mut of_daemon = Labels::default();
        of_daemon.add("name", &name);
        Samples::new(&mut up, &UP, &of_daemon).value(snapshot.is_some().into());
        if let Some(version) = snapshot.as_ref().and_then(|from| from.version.as_ref()) {
            if build.0.is_empty() {
                build.header(&BUILD_INFO);
            }
            build_info(&mut build, version, &of_daemon);
        }
        for vm in snapshot.into_iter().flat_map(distinct) {
            let mut of_vm = of_daemon.clone();
            of_vm.add("cid", vm.cid.get());
            labels.push(of_vm);
            vms.push(vm);
        }
    }
    let vms = Rc::new(Snapshot::new(vms));
    up.0 + &build.0 + &whole(labelled_chunks(vms, labels.into(), connections))
}

fn build_info(text: &mut Text, version: &str, labels: &Labels) {
    Samples::new(text, &BUILD_INFO, labels).labelled("version", version, 1);
}

/// The VMs of a daemon and their connections, each of them once. Another program may answer in a daemon's place, and a reader
/// refuses a text that has a sample twice.
fn distinct(snapshot: Snapshot) -> impl Iterator<Item = VmSnapshot> {
    let mut cids = BTreeSet::new();
    let vms = snapshot.vms.into_iter();
    vms.filter(move |vm| cids.insert(vm.cid)).map(|mut vm| {
        let mut seen = BTreeSet::new();
        vm.connections
            .retain(|conn| seen.insert((conn.guest_port, conn.peer, conn.seqpacket)));
        vm
    })
}

fn whole(chunks: Chunks) -> String {
    // Generating them does not fail.
    chunks.filter_map(Result::ok).collect()
}

/// The snapshot as text. Each VM has labels.
fn labelled_chunks(
    snapshot: Rc<Snapshot>,
    labels: Rc<[Labels]>,
    connections: Connections,
) -> Chunks {
    if snapshot.vms.is_empty() {
        return Box::new(iter::empty());
    }
    let of_connections = (snapshot.clone(), labels.clone());
    let vms = VM_METRICS.iter().map(move |metric| {
        let mut text = Text::default();
        text.header(metric);
        for (vm, labels) in snapshot.vms.iter().zip(&*labels) {
            (metric.samples)(vm, &mut Samples::new(&mut text, metric, labels));
        }
        Ok(text.0)
    });
    if connections == Connections::Summed {
        return Box::new(vms);
    }
    let connections = CONNECTION_METRICS.iter().flat_map(move |metric| {
        let (snapshot, labels) = of_connections.clone();
        connection_chunks(metric, snapshot, labels)
    });
    Box::new(vms.chain(connections))
}

/// A metric that each connection has samples of. Without any connection there is no metric.
fn connection_chunks(
    metric: &'static Metric<ConnectionStats>,
    snapshot: Rc<Snapshot>,
    labels: Rc<[Labels]>,
) -> Chunks {
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
        let conn = &snapshot.vms[vm].connections[index];
        let mut text = Text::default();
        let mut samples = Samples::new(&mut text, metric, &labels[vm]);
        samples.labels.add("guest_port", conn.guest_port.0);
        samples.labels.add("host_port", conn.peer.port.0);
        if conn.peer.cid != Cid::HOST {
            samples.labels.add("peer_cid", conn.peer.cid.get());
        }
        if conn.seqpacket {
            samples.labels.add("type", "seqpacket");
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

/// Where daemons are merged.
static UP: Metric<()> = gauge("up", "Whether the daemon has answered", |(), _| {});

static BUILD_INFO: Metric<()> = gauge("build_info", "The version of the daemon", |(), _| {});

static VM_METRICS: [Metric<VmSnapshot>; 22] = [
    gauge("vmm_connected", "Whether a VMM is connected", |vm, out| {
        out.value(vm.vmm_connected.into());
    }),
    gauge(
        "driver_started",
        "Whether the guest's driver has started the device",
        |vm, out| out.value(vm.driver_started.into()),
    ),
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
        "Connection requests of the guest that were refused, or not answered in time",
        |vm, out| out.value(vm.counters.refused),
    ),
    counter(
        "calls_failed_total",
        "Calls that came to nothing, by the side that called and the reason",
        |vm, out| {
            for (side, counts) in Side::ALL.into_iter().zip(vm.counters.failed) {
                let shared = out.labels.0.len();
                out.labels.add("by", side.name());
                for (failure, count) in CallFailure::ALL.into_iter().zip(counts) {
                    out.labelled("reason", failure.name(), count);
                }
                out.labels.0.truncate(shared);
            }
        },
    ),
    counter(
        "clients_total",
        "Host programs and siblings that have connected",
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
        "Host programs and siblings that were closed before they had a connection",
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
            out.labels.add("state", &conn.state);
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

/// Labels with their values, with commas between.
#[derive(Clone, Default)]
struct Labels(String);

impl Labels {
    fn add(&mut self, name: &str, value: impl Display) {
        let separator = if self.0.is_empty() { "" } else { "," };
        let _ = write!(self.0, "{separator}{name}=\"");
        // Another daemon's text may be anything.
        for character in value.to_string().chars() {
            match character {
                '"' | '\\' => self.0.extend(['\\', character]),
                '\n' => self.0.push_str("\\n"),
                _ => self.0.push(character),
            }
        }
        self.0.push('"');
    }
}

/// The samples of one metric for one VM or connection.
struct Samples<'t> {
    text: &'t mut Text,
    name: &'static str,
    /// The labels of all samples from now on.
    labels: Labels,
}

impl<'t> Samples<'t> {
    fn new<T>(text: &'t mut Text, metric: &Metric<T>, labels: &Labels) -> Self {
        Self {
            text,
            name: metric.name,
            labels: labels.clone(),
        }
    }

    /// A sample without further labels.
    fn value(&mut self, value: u64) {
        let Self { text, name, labels } = self;
        if labels.0.is_empty() {
            text.push(format_args!("{PREFIX}_{name} {value}\n"));
        } else {
            text.push(format_args!("{PREFIX}_{name}{{{}}} {value}\n", labels.0));
        }
    }

    /// A sample with one more label.
    fn labelled(&mut self, name: &str, label: &str, value: u64) {
        let shared = self.labels.0.len();
        self.labels.add(name, label);
        self.value(value);
        self.labels.0.truncate(shared);
    }

    fn by_sender(&mut self, from_guest: u64, to_guest: u64) {
        self.labelled("from", Side::Guest.name(), from_guest);
        self.labelled("from", Side::Host.name(), to_guest);
    }
}
