//! The whole worker, between a guest's rings and the sockets of host programs.
//!
//! It is driven as in the daemon: it takes a turn when its epoll set has events, or when its last turn has left something to
//! do. Connections are streams, or carry messages. The guest kicks when it was asked to, and must be interrupted when it asks for that. So what is lost here would be
//! lost there.

mod conn;
mod host;
mod world;

use arbitrary::{Arbitrary, Unstructured};

use super::ring::{self, Layout, Malformed};
use host::Host;
use world::World;

/// What happens next. Connections, host programs and ports are named by any number.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Step {
    /// The worker takes its turns, until nothing wakes it any more.
    Run,
    /// A host program asks for a guest port.
    Connect {
        pieces: u8,
    },
    /// A host program writes what is no CONNECT line.
    ConnectWithGarbage {
        text: [u8; 12],
    },
    Listen {
        port: u8,
    },
    Unlisten {
        port: u8,
    },
    ProgramWrites {
        conn: u8,
        len: u16,
    },
    ProgramReads {
        conn: u8,
        len: u16,
    },
    ProgramShuts {
        conn: u8,
        reading: bool,
    },
    ProgramCloses {
        conn: u8,
    },
    GuestAnswers {
        conn: u8,
        accept: bool,
    },
    /// The guest requests a connection of the type that is accepted there, or with the upper two bits of its port of the other.
    GuestRequests {
        port: u8,
        guest_port: u8,
    },
    /// Of messages, the upper two bits of `part` say whether each packet is one, and whether the last goes on.
    GuestWrites {
        conn: u8,
        len: u16,
        part: u16,
        layout: Layout,
    },
    GuestOverruns {
        conn: u8,
        more: u8,
    },
    GuestTakes {
        conn: u8,
        len: u16,
    },
    GuestBuffer {
        conn: u8,
        size: u16,
    },
    GuestShuts {
        conn: u8,
        flags: u8,
    },
    GuestAborts {
        conn: u8,
    },
    GuestAsksForCredit {
        conn: u8,
    },
    /// The guest sends any header, to a connection or to none.
    GuestSendsGarbage {
        conn: Option<u8>,
        cid: u8,
        kind: u8,
        op: u8,
        len: u8,
    },
    GuestOffers {
        buffers: u8,
        len: u16,
        layout: Layout,
    },
    GuestReceives,
    GuestOffersMalformed {
        is_rx: bool,
        malformed: Malformed,
    },
    GuestWantsInterrupts {
        wanted: bool,
    },
    /// The VMM stops a ring, or starts it again.
    Pause {
        is_rx: bool,
    },
    /// The guest's driver starts afresh, with or without a reset of the device.
    Restart {
        reset: bool,
        breaks: u8,
    },
    /// The guest requests many connections to where nobody listens.
    GuestFloods {
        requests: u8,
    },
    /// The guest offers buffers in as many descriptors as a chain may have, most of which are empty.
    GuestOffersHollow {
        buffers: u8,
        len: u16,
    },
    /// Host programs ask for a guest port and leave without waiting for the answer.
    ClientsLeave {
        clients: u8,
        is_known: bool,
    },
}

/// How the device is set up.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Setup {
    rx_size: u8,
    tx_size: u8,
    event_idx: bool,
    notify_on_empty: bool,
    /// Where the rings' indices begin.
    start: u16,
    tx_buffer_size: u16,
    /// So many times that, and whether host programs connect for messages, in the upper two bits: from 2 on, all of them; with 3
    /// every other one.
    factor: u8,
    /// Which host ports have a listener from the beginning, bit by bit; in the upper half, whose listeners are for messages.
    listening: u8,
    /// Whenever the worker has run, the guest takes all packets, accepts all connections and offers new buffers.
    is_eager: bool,
}

#[derive(Arbitrary, Debug)]
struct Input {
    setup: Setup,
    steps: Vec<Step>,
}

/// Runs the target.
pub fn run(bytes: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(bytes)) else {
        return;
    };
    ring::with_memory(|memory| {
        Host::with(|host| {
            let mut world = World::new(input.setup, memory, host);
            for step in input.steps.iter().take(200) {
                super::show(step);
                world.take(*step);
            }
            world.settle();
        });
    });
}
