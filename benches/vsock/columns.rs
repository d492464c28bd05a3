//! Which results the table of a case shows.

use crate::cases::Kind;
use crate::measure::key;
use crate::traffic::Direction;
use crate::uml;

/// A column: the key, the heading, and whether a ratio to the baseline follows.
pub type Column = (&'static str, &'static str, bool);

/// The columns of a case's table.
pub fn columns(kind: Kind) -> &'static [Column] {
    match kind {
        Kind::Streams {
            direction: Direction::Both,
            ..
        } => BOTH_DIRECTIONS,
        Kind::Streams { .. } | Kind::Siblings { .. } => STREAM,
        Kind::Messages { .. } => MESSAGES,
        Kind::Uml(uml::Traffic::Streams {
            direction: Direction::Both,
            ..
        }) => REAL_BOTH_DIRECTIONS,
        Kind::Uml(uml::Traffic::Streams { .. }) => REAL_STREAM,
        Kind::Uml(uml::Traffic::RequestResponse) => REAL_REQUEST_RESPONSE,
        Kind::RequestResponse | Kind::MessageRoundTrip | Kind::SiblingRoundTrip(_) => {
            REQUEST_RESPONSE
        }
        Kind::Connect => CONNECT,
        Kind::Echo(_) => ECHO,
        Kind::Flooded { measured, .. } if measured.is_stream() => FLOODED_STREAM,
        Kind::Flooded { .. } => FLOODED_OPS,
        Kind::Idle(_) => IDLE,
        Kind::StartUp => START_UP,
        Kind::Short(_) => SHORT,
        Kind::Fairness { .. } => FAIRNESS,
        Kind::Quiet { .. } => QUIET,
        Kind::Growth(_) => GROWTH,
        Kind::IdleDaemons(_) => IDLE_DAEMONS,
        Kind::StandStill { .. } => STAND_STILL,
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

const REAL_REQUEST_RESPONSE: &[Column] = &[
    (key::P50_US, "p50 us (min-max)", true),
    (key::P99_US, "p99 us", true),
    (key::CPU_US_PER_OP, "CPU us", true),
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

const REAL_BOTH_DIRECTIONS: &[Column] = &[
    (key::MIB_PER_S, "MiB/s (min-max)", true),
    (key::TO_HOST_MIB_PER_S, "out", false),
    (key::TO_GUEST_MIB_PER_S, "in", false),
    (key::CPU_S_PER_GIB, "CPU s/GiB", true),
    (key::SYSCALLS_PER_MIB, "syscalls/MiB", false),
];

const SHORT: &[Column] = &[
    (key::OPS_PER_S, "per second (min-max)", true),
    (key::P99_US, "p99 us", true),
    (key::CPU_US_PER_OP, "CPU us", true),
    (key::OTHERS_CPU_US_PER_OP, "others us", false),
    (key::ANON_KIB_LEFT, "KiB left behind", false),
];

const FAIRNESS: &[Column] = &[
    (key::KEPT, "least kept (min-max)", false),
    (key::OUT_ALONE_MIB_PER_S, "out alone", false),
    (key::TO_HOST_MIB_PER_S, "beside in", true),
    (key::KEPT_OUT, "kept", false),
    (key::IN_ALONE_MIB_PER_S, "in alone", false),
    (key::TO_GUEST_MIB_PER_S, "beside out", true),
    (key::KEPT_IN, "kept", false),
    (key::CPU_S_PER_GIB, "CPU s/GiB", true),
];

const QUIET: &[Column] = &[
    (key::P99_US, "p99 us (min-max)", true),
    (key::P50_US, "p50 us", true),
    (key::WORST_US, "worst us", false),
    (key::OPS_PER_S, "ops/s", false),
    (key::TO_HOST_MIB_PER_S, "MiB/s out", false),
    (key::TO_GUEST_MIB_PER_S, "MiB/s in", false),
    (key::DAEMON_CPUS, "CPUs", false),
];

const GROWTH: &[Column] = &[
    (key::US_PER_OP, "us per message (min-max)", true),
    (key::CPU_US_PER_OP, "CPU us", true),
    (key::OTHERS_CPU_US_PER_OP, "others us", false),
    (key::ANON_KIB_PER_CONN, "KiB each", true),
    (key::FAIRNESS, "slowest/fastest", false),
    (key::SYSCALLS_PER_OP, "syscalls", false),
];

const IDLE_DAEMONS: &[Column] = &[
    (key::ANON_KIB, "anonymous KiB each (min-max)", true),
    (key::RSS_KIB, "resident KiB each", true),
    (key::CPU_US_PER_S, "CPU us/s each", false),
    (key::START_UP_MS, "ms each until ready", true),
];

const STAND_STILL: &[Column] = &[
    (key::STILL_P50_MS, "stands still, p50 ms (min-max)", true),
    (key::STILL_WORST_MS, "worst", false),
    (key::PAUSE_P50_MS, "without, p50 ms", false),
    (key::PAUSE_WORST_MS, "worst", false),
    (key::TOOK_P50_MS, "hand-over takes, p50 ms", false),
    (key::TOOK_WORST_MS, "worst", false),
];

/// Whether it is the worst of a run: then that of all runs counts, and not the median.
pub fn is_worst(key: &str) -> bool {
    [
        key::WORST_US,
        key::STILL_WORST_MS,
        key::PAUSE_WORST_MS,
        key::TOOK_WORST_MS,
    ]
    .contains(&key)
}
