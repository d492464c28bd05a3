//! A [`Snapshot`] as Prometheus' text format (version 0.0.4).

use prometheus::core::Collector;
use prometheus::{Encoder, Error, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::metrics::counters::{CloseReason, ConnectionStats, Side, Snapshot};

/// What every name begins with.
pub const PREFIX: &str = "vhost_user_vsock";

/// The media type of [`text`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// The labels that name a connection.
const PORTS: [&str; 2] = ["guest_port", "host_port"];

/// The snapshot as text. An error only where the library refuses a name of ours.
pub fn text(snapshot: &Snapshot) -> Result<String, Error> {
    let page = Page(Registry::new_custom(Some(PREFIX.into()), None)?);
    let counters = &snapshot.counters;
    page.gauge(
        "vmm_connected",
        "Whether a VMM is connected",
        snapshot.has_vmm.into(),
    )?;
    page.gauge(
        "connections",
        "Connections at the moment",
        count(snapshot.connections.len()),
    )?;
    page.gauge(
        "clients_handshaking",
        "Host programs that have connected and not named a port yet",
        count(snapshot.handshaking),
    )?;
    for (name, help, value) in [
        (
            "vmm_sessions_total",
            "VMMs that have connected",
            counters.sessions,
        ),
        (
            "kicks_total",
            "Kicks seen, those that come together as one",
            counters.kicks,
        ),
        (
            "interrupts_total",
            "Interrupts of the guest",
            counters.interrupts,
        ),
        (
            "connections_refused_total",
            "Connections the guest asked for in vain",
            counters.refused,
        ),
        (
            "clients_total",
            "Host programs that have connected",
            counters.clients,
        ),
        (
            "clients_dropped_total",
            "Host programs that were closed before they had a connection",
            counters.clients_dropped,
        ),
        ("resets_total", "RST packets for the guest", counters.resets),
        (
            "resets_lost_total",
            "RST packets that were dropped, since the guest took none",
            counters.resets_lost,
        ),
        (
            "credit_stalls_total",
            "How often a host program's bytes had to wait for the guest's credit",
            counters.credit_stalls,
        ),
        (
            "malformed_chains_total",
            "Descriptor chains of the guest's that hold no packet or are no buffer",
            counters.malformed,
        ),
        (
            "foreign_packets_total",
            "Packets of the guest's that were dropped for a CID that is not its own",
            counters.foreign,
        ),
        (
            "descriptor_shortages_total",
            "How often host programs had to wait for want of descriptors",
            counters.shortages,
        ),
    ] {
        page.counters(name, help, &[], [(vec![], value)])?;
    }
    let by_sender = |from_guest, to_guest| {
        [(Side::Guest, from_guest), (Side::Host, to_guest)]
            .map(|(from, value)| (vec![from.name().to_owned()], value))
    };
    page.counters(
        "packets_total",
        "Packets, by the end that they come from",
        &["from"],
        by_sender(counters.from_guest.packets, counters.to_guest.packets),
    )?;
    page.counters(
        "payload_bytes_total",
        "Bytes of payload, by the end that they come from",
        &["from"],
        by_sender(counters.from_guest.bytes, counters.to_guest.bytes),
    )?;
    page.counters(
        "connections_opened_total",
        "Connections, by the end that began them",
        &["by"],
        Side::ALL.map(|side| (vec![side.name().to_owned()], counters.opened[side as usize])),
    )?;
    page.counters(
        "connections_ended_total",
        "Connections that are over, by how they ended",
        &["how"],
        CloseReason::ALL.map(|end| (vec![end.name().to_owned()], counters.ended[end as usize])),
    )?;
    page.connections(&snapshot.connections)?;
    page.text()
}

/// The metrics so far.
struct Page(Registry);

impl Page {
    fn add(&self, metric: impl Collector + 'static) -> Result<(), Error> {
        self.0.register(Box::new(metric))
    }

    fn gauge(&self, name: &str, help: &str, value: i64) -> Result<(), Error> {
        self.gauges(name, help, &[], [(vec![], value)])
    }

    fn gauges(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        values: impl IntoIterator<Item = (Vec<String>, i64)>,
    ) -> Result<(), Error> {
        let gauges = IntGaugeVec::new(Opts::new(name, help), labels)?;
        for (labels, value) in values {
            gauges.get_metric_with_label_values(&labels)?.set(value);
        }
        self.add(gauges)
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        values: impl IntoIterator<Item = (Vec<String>, u64)>,
    ) -> Result<(), Error> {
        let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
        for (labels, value) in values {
            counters
                .get_metric_with_label_values(&labels)?
                .inc_by(value);
        }
        self.add(counters)
    }

    fn connections(&self, connections: &[ConnectionStats]) -> Result<(), Error> {
        let with = |labels: &[&'static str]| [&PORTS[..], labels].concat();
        let ports = |conn: &ConnectionStats| {
            vec![conn.guest_port.0.to_string(), conn.host_port.0.to_string()]
        };
        let labelled = |conn: &ConnectionStats, labels: &[&str]| {
            let labels = labels.iter().map(|label| (*label).to_owned());
            ports(conn).into_iter().chain(labels).collect()
        };
        self.gauges(
            "connection_info",
            "A connection: its state, and who keeps the other end waiting",
            &with(&["state", "waits_for"]),
            connections.iter().map(|conn| {
                let waits_for = conn.waits_for.map_or("nobody", Side::name);
                (labelled(conn, &[conn.state, waits_for]), 1)
            }),
        )?;
        self.counters(
            "connection_payload_bytes_total",
            "Bytes of payload of a connection, by the end that they come from",
            &with(&["from"]),
            connections.iter().flat_map(|conn| {
                [(Side::Guest, conn.from_guest), (Side::Host, conn.to_guest)]
                    .map(|(from, bytes)| (labelled(conn, &[from.name()]), bytes))
            }),
        )?;
        self.gauges(
            "connection_buffered_bytes",
            "Bytes that the host program has not taken yet",
            &PORTS,
            connections
                .iter()
                .map(|conn| (ports(conn), count(conn.buffered))),
        )?;
        self.gauges(
            "connection_credit_bytes",
            "Bytes that the guest would take now",
            &PORTS,
            connections
                .iter()
                .map(|conn| (ports(conn), count(conn.credit))),
        )
    }

    fn text(&self) -> Result<String, Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.0.gather(), &mut text)?;
        String::from_utf8(text).map_err(|error| Error::Msg(error.to_string()))
    }
}

/// A count as a gauge has it.
fn count(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
