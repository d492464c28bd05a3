//! The whole worker, between a guest's rings and the sockets of host programs.
//!
//! It is driven as in the daemon: it takes a turn when its epoll set has something to say, or when a ring was started. The
//! guest kicks when it was asked to, and has been interrupted when it asked for that. So what is lost here would be lost
//! there.

mod end;
mod world;

use arbitrary::{Arbitrary, Unstructured};

use super::ring::{Layout, Nonsense};
use world::World;

/// What happens next. Connections, host programs and ports are named by any number.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Step {
    /// The worker takes its turns, as long as something wakes it.
    Run,
    /// A host program asks for a guest port.
    Connect {
        pieces: u8,
    },
    /// A host program says what is no CONNECT line.
    Babble {
        text: [u8; 12],
    },
    Listen {
        port: u8,
    },
    Unlisten {
        port: u8,
    },
    ProgramWrites {
        end: u8,
        len: u16,
    },
    ProgramReads {
        end: u8,
        len: u16,
    },
    ProgramShuts {
        end: u8,
        reading: bool,
    },
    ProgramCloses {
        end: u8,
    },
    GuestAnswers {
        end: u8,
        accept: bool,
    },
    GuestRequests {
        port: u8,
        guest_port: u8,
    },
    GuestWrites {
        end: u8,
        len: u16,
        part: u16,
        layout: Layout,
    },
    GuestOverruns {
        end: u8,
        more: u8,
    },
    GuestTakes {
        end: u8,
        len: u16,
    },
    GuestBuffer {
        end: u8,
        size: u16,
    },
    GuestShuts {
        end: u8,
        flags: u8,
    },
    GuestAborts {
        end: u8,
    },
    GuestAsks {
        end: u8,
    },
    /// The guest sends any header, to a connection or to none.
    GuestBabbles {
        end: Option<u8>,
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
    GuestOffersNonsense {
        is_rx: bool,
        nonsense: Nonsense,
    },
    GuestWantsInterrupts {
        wanted: bool,
    },
    /// The VMM stops a ring, or lets it go on.
    Pause {
        is_rx: bool,
    },
    /// The guest's driver begins anew, with or without a reset of the device.
    Restart {
        reset: bool,
        breaks: u8,
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
    /// So many times that.
    factor: u8,
    /// Which host ports have a listener from the beginning, bit by bit.
    listening: u8,
    /// Whenever the worker has run, the guest takes what there is, accepts what it is asked for, and offers new buffers.
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
    let memory = super::ring::memory();
    let mut world = World::new(input.setup, &memory);
    for step in input.steps.iter().take(200) {
        super::show(step);
        world.take(*step);
    }
    world.settle();
}
