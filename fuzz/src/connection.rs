//! One connection between a guest and a host program, each of which does what it likes.
//!
//! The socket's events are those of an epoll set, edge-triggered as the worker's, and come as late as the input wants. The
//! model knows what each side has written, read and ended, and from that what the connection must do. Of a connection of
//! messages it knows where each ends: none may be merged, split, lost or invented.

mod ends;

use arbitrary::{Arbitrary, Unstructured};
use vhost_user_vsock::packet::header::Op;
use vhost_user_vsock::vsock_conn::Readiness;

use super::ring::{self, Layout};
use ends::Ends;

/// What happens next.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Step {
    /// The guest sends as much of this as it has credit for. Of messages, `pieces` says bit by bit which packets end none.
    GuestWrites {
        len: u16,
        pieces: u8,
        layout: Layout,
    },
    /// The guest sends this much more than it has credit for.
    GuestOverruns {
        more: u8,
    },
    GuestTakes {
        len: u16,
    },
    GuestBuffer {
        size: u16,
    },
    GuestShuts {
        flags: u8,
    },
    GuestSends {
        op: GuestOp,
    },
    GuestReceives {
        buffers: u8,
        layout: Layout,
    },
    ProgramWrites {
        len: u16,
    },
    ProgramReads {
        len: u16,
    },
    ProgramShuts {
        side: Side,
    },
    ProgramCloses,
    /// The socket's events come, or where there are none, a flush goes on.
    Events,
    /// An event that says little comes.
    Spurious {
        readable: bool,
        until_empty: bool,
        writable: bool,
    },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum GuestOp {
    Request,
    Response,
    Rst,
    CreditRequest,
    Unknown,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Side {
    Read,
    Write,
}

/// How a connection begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opening {
    /// The guest has asked for it, and the host program has it.
    Accepted,
    /// The guest has asked for it, and the end of connect(2) is waited for.
    Connecting,
    /// The guest has asked for it, and the answer to our CONNECT line is waited for: this one.
    Answering(&'static [u8]),
    /// The host program has asked for it.
    Requested,
}

/// Answers to a CONNECT line. Each is complete or wrong, whatever follows it.
const ANSWERS: [&[u8]; 8] = [
    b"OK 40000\n",
    b"ok  7 \r\n",
    b"OK 4294967295\n",
    b"Ok 0\r\n",
    b"OK 4294967296\n",
    b"OK\n",
    b"NO 1\n",
    b"OK 1 2\n",
];

#[derive(Arbitrary, Debug)]
struct Input {
    /// How it begins, bit by bit.
    opening: u8,
    /// The buffers, bit by bit.
    buffers: u8,
    window: u16,
    guest_window: u16,
    steps: Vec<Step>,
}

impl Input {
    fn opening(&self) -> Opening {
        match self.opening & 7 {
            2 => Opening::Connecting,
            4 | 6 => Opening::Answering(ANSWERS[usize::from(self.opening >> 5)]),
            bits if bits & 1 == 0 => Opening::Accepted,
            _ => Opening::Requested,
        }
    }

    /// It carries messages.
    fn has_messages(&self) -> bool {
        self.opening & 24 == 24
    }

    /// The socket holds little, so that the connection must.
    fn is_narrow(&self) -> bool {
        self.buffers & 1 != 0
    }

    /// The connection's buffer, in bytes: up to 64 KiB, or up to 512 KiB, which is more than a flush sends at a time.
    fn window(&self) -> u32 {
        let factor = if self.buffers & 6 == 6 { 8 } else { 1 };
        factor * (u32::from(self.window) + 1)
    }
}

/// Runs the target.
pub fn run(bytes: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(bytes)) else {
        return;
    };
    ring::with_memory(|memory| {
        let mut ends = Ends::new(&input, memory);
        for step in input.steps.iter().take(200) {
            super::show(step);
            take(&mut ends, *step);
            if ends.is_over() {
                break;
            }
            ends.check_state();
        }
        ends.settle();
    });
}

fn take(ends: &mut Ends<'_>, step: Step) {
    match step {
        Step::GuestWrites {
            len,
            pieces,
            layout,
        } => ends.guest_writes(len.into(), pieces, layout),
        Step::GuestOverruns { more } => ends.guest_overruns(more.into()),
        Step::GuestTakes { len } => ends.guest_takes(len.into()),
        Step::GuestBuffer { size } => ends.guest_resizes(size.into()),
        Step::GuestShuts { flags } => ends.guest_shuts(flags.into()),
        Step::GuestSends { op } => ends.guest_sends(match op {
            GuestOp::Request => Op::Request,
            GuestOp::Response => Op::Response,
            GuestOp::Rst => Op::Rst,
            GuestOp::CreditRequest => Op::CreditRequest,
            GuestOp::Unknown => Op::Unknown(8),
        }),
        Step::GuestReceives { buffers, layout } => {
            ends.guest_receives(buffers.into(), layout);
        }
        Step::ProgramWrites { len } => {
            ends.program_writes(len.into());
        }
        Step::ProgramReads { len } => {
            ends.program_reads(len.into());
        }
        Step::ProgramShuts { side } => ends.program_shuts(side),
        Step::ProgramCloses => ends.program_closes(),
        Step::Events => {
            if !ends.events() {
                ends.flush();
            }
        }
        Step::Spurious {
            readable,
            until_empty,
            writable,
        } => ends.socket_ready(Readiness {
            readable,
            until_empty,
            writable,
            hung_up: false,
        }),
    }
}
