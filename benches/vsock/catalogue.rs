//! All cases by name.

use crate::apps::Requests;
use crate::cases::{Case, Guests, Kind};
use crate::daemon::Vms;
use crate::floods::{Flood, Measured};
use crate::guest::RING_SIZE;
use crate::limits::Limit;
use crate::packet::MAX_PAYLOAD;
use crate::quiet::Busy;
use crate::traffic::Direction;
use crate::{stand_still, uml};

const fn stream(name: &'static str, direction: Direction, write: usize) -> Case {
    let limit = match direction {
        Direction::Both => None,
        // A daemon may merge small writes of the guest, so that a socket pair with the same writes is no limit.
        Direction::ToHost if write < MAX_PAYLOAD => None,
        _ => Some(Limit::SocketPair(write)),
    };
    let kind = Kind::Streams { direction, write };
    Case { name, kind, limit }
}

const fn messages(name: &'static str, direction: Direction, size: usize) -> Case {
    let kind = Kind::Messages { direction, size };
    other(name, kind, Some(Limit::Messages(size)))
}

const fn siblings(name: &'static str, vms: Vms, write: usize) -> Case {
    // Smaller writes may be merged on the way.
    let limit = if write < MAX_PAYLOAD {
        None
    } else {
        Some(Limit::SocketPair(write))
    };
    other(name, Kind::Siblings { vms, write }, limit)
}

const fn other(name: &'static str, kind: Kind, limit: Option<Limit>) -> Case {
    Case { name, kind, limit }
}

const fn real(name: &'static str, direction: Direction, write: usize) -> Case {
    let traffic = uml::Traffic::Streams { direction, write };
    other(name, Kind::Uml(traffic), None)
}

const fn fairness(name: &'static str, guests: Guests, write: usize) -> Case {
    other(name, Kind::Fairness { guests, write }, None)
}

const fn quiet(name: &'static str, out: usize, into: usize) -> Case {
    let busy = Busy { out, into };
    other(name, Kind::Quiet { count: 100, busy }, None)
}

const fn growth(name: &'static str, count: usize) -> Case {
    other(name, Kind::Growth(count), None)
}

const fn daemons(name: &'static str, count: usize) -> Case {
    other(name, Kind::IdleDaemons(count), None)
}

const fn hand_over(
    name: &'static str,
    measured: stand_still::Measured,
    connections: usize,
) -> Case {
    let kind = Kind::StandStill {
        measured,
        connections,
    };
    other(name, kind, None)
}

const fn flooded(name: &'static str, measured: Measured, flood: Flood) -> Case {
    other(name, Kind::Flooded { measured, flood }, None)
}

/// REQUESTs to so many ports on which nobody listens, in so many descriptors of the TX ring.
const fn refused(descriptors: u16, ports: u32) -> Flood {
    Flood::RefusedRequests(Requests { descriptors, ports })
}

/// All cases, in the order of the report.
pub const CASES: &[Case] = &[
    stream("guest to host 64 KiB", Direction::ToHost, 64 << 10),
    stream("guest to host 4 KiB", Direction::ToHost, 4 << 10),
    stream("guest to host 256 B", Direction::ToHost, 256),
    stream("guest to host 64 B", Direction::ToHost, 64),
    stream("host to guest 64 KiB", Direction::ToGuest, 64 << 10),
    stream("host to guest 4 KiB", Direction::ToGuest, 4 << 10),
    stream("host to guest 256 B", Direction::ToGuest, 256),
    stream("host to guest 64 B", Direction::ToGuest, 64),
    stream("both directions 64 KiB", Direction::Both, 64 << 10),
    other(
        "request-response 64 B",
        Kind::RequestResponse,
        Some(Limit::RoundTrip),
    ),
    messages(
        "messages out of the guest, 64 KiB",
        Direction::ToHost,
        64 << 10,
    ),
    messages(
        "messages out of the guest, 4 KiB",
        Direction::ToHost,
        4 << 10,
    ),
    messages("messages out of the guest, 64 B", Direction::ToHost, 64),
    messages(
        "messages into the guest, 64 KiB",
        Direction::ToGuest,
        64 << 10,
    ),
    messages(
        "messages into the guest, 4 KiB",
        Direction::ToGuest,
        4 << 10,
    ),
    messages("messages into the guest, 64 B", Direction::ToGuest, 64),
    other(
        "messages, round trip 64 B",
        Kind::MessageRoundTrip,
        Some(Limit::RoundTrip),
    ),
    siblings("guest to guest 64 KiB", Vms::OneProcess, 64 << 10),
    siblings("guest to guest 4 KiB", Vms::OneProcess, 4 << 10),
    other(
        "guest to guest round trip 64 B",
        Kind::SiblingRoundTrip(Vms::OneProcess),
        None,
    ),
    siblings(
        "guests of two processes 64 KiB",
        Vms::TwoProcesses,
        64 << 10,
    ),
    siblings("guests of two processes 4 KiB", Vms::TwoProcesses, 4 << 10),
    other(
        "guests of two processes, round trip",
        Kind::SiblingRoundTrip(Vms::TwoProcesses),
        None,
    ),
    other("connect-exchange-close", Kind::Connect, None),
    other("10,000 short connections", Kind::Short(10_000), None),
    other("100 connections echo 4 KiB", Kind::Echo(100), None),
    other("1000 connections echo 4 KiB", Kind::Echo(1000), None),
    other("1000 idle connections", Kind::Idle(1000), None),
    other("start-up", Kind::StartUp, None),
    real("Linux guest to host 64 KiB", Direction::ToHost, 64 << 10),
    real("Linux guest to host 4 KiB", Direction::ToHost, 4 << 10),
    real("host to Linux guest 64 KiB", Direction::ToGuest, 64 << 10),
    real("host to Linux guest 4 KiB", Direction::ToGuest, 4 << 10),
    real(
        "Linux guest, both directions 64 KiB",
        Direction::Both,
        64 << 10,
    ),
    other(
        "Linux guest, round trip 64 B",
        Kind::Uml(uml::Traffic::RequestResponse),
        None,
    ),
    fairness(
        "each direction beside the other, 64 KiB",
        Guests::Simulated,
        64 << 10,
    ),
    fairness(
        "each direction beside the other, 4 KiB",
        Guests::Simulated,
        4 << 10,
    ),
    fairness(
        "Linux guest, each direction beside the other, 64 KiB",
        Guests::Linux,
        64 << 10,
    ),
    fairness(
        "Linux guest, each direction beside the other, 4 KiB",
        Guests::Linux,
        4 << 10,
    ),
    quiet("100 quiet connections alone", 0, 0),
    quiet("100 quiet beside a stream out", 1, 0),
    quiet("100 quiet beside a stream in", 0, 1),
    quiet("100 quiet beside 4 streams each way", 4, 4),
    growth("1 connection", 1),
    growth("10 connections", 10),
    growth("100 connections", 100),
    growth("1,000 connections", 1000),
    growth("4,000 connections", 4000),
    daemons("1 idle daemon", 1),
    daemons("10 idle daemons", 10),
    daemons("100 idle daemons", 100),
    daemons("1,000 idle daemons", 1000),
    hand_over("hand-over of a stream", stand_still::Measured::Stream, 1),
    hand_over(
        "hand-over of a stream among 1,000 connections",
        stand_still::Measured::Stream,
        1000,
    ),
    hand_over(
        "hand-over of a round trip",
        stand_still::Measured::RoundTrip,
        1,
    ),
    hand_over(
        "hand-over of a round trip among 1,000 connections",
        stand_still::Measured::RoundTrip,
        1000,
    ),
    flooded("stream out alone", Measured::ToHost, Flood::None),
    flooded(
        "stream out, refused REQUESTs",
        Measured::ToHost,
        refused(RING_SIZE, 1),
    ),
    flooded(
        "stream out, REQUESTs in half the ring",
        Measured::ToHost,
        refused(RING_SIZE / 2, 1),
    ),
    flooded(
        "stream out, REQUESTs to 1000 ports",
        Measured::ToHost,
        refused(RING_SIZE, 1000),
    ),
    flooded(
        "stream out, 64 streams in",
        Measured::ToHost,
        Flood::Streams(64),
    ),
    flooded("stream in alone", Measured::ToGuest, Flood::None),
    flooded(
        "stream in, refused REQUESTs",
        Measured::ToGuest,
        refused(RING_SIZE, 1),
    ),
    flooded(
        "stream in, REQUESTs to 1000 ports",
        Measured::ToGuest,
        refused(RING_SIZE, 1000),
    ),
    flooded(
        "stream in, refused CONNECTs",
        Measured::ToGuest,
        Flood::RefusedConnects,
    ),
    flooded(
        "stream in, accepted CONNECTs",
        Measured::ToGuest,
        Flood::AcceptedConnects,
    ),
    flooded(
        "stream in, 1000 byte writers",
        Measured::ToGuest,
        Flood::Bytes(1000),
    ),
    flooded("echo alone", Measured::Echo, Flood::None),
    flooded(
        "echo, refused REQUESTs",
        Measured::Echo,
        refused(RING_SIZE, 1),
    ),
    flooded(
        "echo, REQUESTs to 1000 ports",
        Measured::Echo,
        refused(RING_SIZE, 1000),
    ),
    flooded(
        "echo, refused CONNECTs",
        Measured::Echo,
        Flood::RefusedConnects,
    ),
    flooded(
        "echo, accepted CONNECTs",
        Measured::Echo,
        Flood::AcceptedConnects,
    ),
    flooded(
        "echo, 1000 byte writers",
        Measured::Echo,
        Flood::Bytes(1000),
    ),
    flooded("echo, 64 streams in", Measured::Echo, Flood::Streams(64)),
    flooded("CONNECT alone", Measured::Connect, Flood::None),
    flooded(
        "CONNECT, refused REQUESTs",
        Measured::Connect,
        refused(RING_SIZE, 1),
    ),
];
