mod saved;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::host::connect_line::Line;
use crate::packet::header::{GuestPort, PeerAddr};
use crate::testing::{memory, received, rx_batch, tx_batch};

const KEY: ConnKey = ConnKey {
    guest: GuestPort(1234),
    peer: PeerAddr::host(40000),
    packet_type: PacketType::Stream,
};
const WINDOW: u32 = 4096;
const CID: Cid = Cid::from_raw(4);

/// A connection and its two ends: the host program's socket, and the packets of the guest.
struct Ends {
    conn: VsockConnection,
    program: UnixStream,
}

fn packet(op: Op) -> VsockHeader {
    VsockHeader {
        buf_alloc: WINDOW,
        ..VsockHeader::new(CID, KEY.guest, KEY.peer, op)
    }
}

fn shutdown(flags: ShutdownFlags) -> VsockHeader {
    VsockHeader {
        flags: flags.bits(),
        ..packet(Op::Shutdown)
    }
}

impl Ends {
    fn of(make: impl FnOnce(HostSocket) -> VsockConnection) -> Self {
        let (stream, program) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        program
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        Self {
            conn: make(stream.into()),
            program,
        }
    }

    /// A connection that the guest has opened and whose RESPONSE is out.
    fn established(buf_alloc: u32) -> Self {
        let mut ends =
            Self::of(|stream| VsockConnection::accepted(&packet(Op::Request), stream, buf_alloc));
        assert_eq!(ends.ops(), [Op::Response]);
        ends
    }

    /// A connection that the host program has asked for and whose REQUEST is out.
    fn requested() -> Self {
        let mut ends =
            Self::of(|stream| VsockConnection::requested(CID, KEY, stream, Greeting::Ok, WINDOW));
        assert_eq!(ends.ops(), [Op::Request]);
        ends
    }

    fn guest(&mut self, header: &VsockHeader) -> Verdict {
        self.conn.send_pkt(header)
    }

    fn guest_writes(&mut self, payload: &[u8]) -> Verdict {
        let memory = memory();
        let batch = tx_batch(&memory, &[(packet(Op::Rw), payload)]);
        self.conn.send_payload(&batch, batch.packets())
    }

    /// Everything the guest gets now.
    fn packets(&mut self) -> Vec<(VsockHeader, Vec<u8>)> {
        let mut packets = Vec::new();
        while let Some(size) = self.conn.rx_size() {
            let memory = memory();
            let mut batch = rx_batch(&memory, size);
            assert_eq!(self.conn.recv_pkt(&mut batch), Verdict::Open);
            packets.extend(received(&memory, &batch));
        }
        packets
    }

    fn ops(&mut self) -> Vec<Op> {
        self.packets().iter().map(|(header, _)| header.op).collect()
    }

    fn readable(&mut self) -> Verdict {
        self.conn.socket_ready(Readiness {
            readable: true,
            ..Readiness::default()
        })
    }

    fn ended(&mut self) -> Verdict {
        self.conn.socket_ready(Readiness {
            readable: true,
            until_empty: true,
            ..Readiness::default()
        })
    }

    /// Room in the socket, and what the table does next.
    fn writable(&mut self) -> Verdict {
        let verdict = self.conn.socket_ready(Readiness {
            writable: true,
            ..Readiness::default()
        });
        if verdict == Verdict::Open && self.conn.can_flush() {
            return self.conn.flush();
        }
        verdict
    }

    fn gone(&mut self) -> Verdict {
        self.conn.socket_ready(Readiness {
            readable: true,
            until_empty: true,
            writable: true,
            hung_up: true,
        })
    }

    /// Tells the connection of room in its socket until it has written all that waits for a reading program.
    fn flush_to_reader(&mut self) -> Verdict {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let verdict = self.writable();
            if self.conn.mover.buffered() == 0 {
                return verdict;
            }
            assert!(
                Instant::now() < deadline,
                "the program reads, and nothing is written"
            );
        }
    }

    /// Lets the guest write until the host program's socket is full and `waiting` bytes wait for it.
    fn fill(&mut self, waiting: usize) -> Vec<u8> {
        let mut written = Vec::new();
        while self.conn.mover.buffered() < waiting {
            let chunk: Vec<u8> = (0..1000).map(|i| (written.len() + i) as u8).collect();
            assert_eq!(self.guest_writes(&chunk), Verdict::Open);
            written.extend(chunk);
            // What the guest would learn from the packets to it.
            self.packets();
        }
        written
    }
}

#[test]
fn an_accepted_request_answers_and_carries_bytes_both_ways() {
    let mut ends = Ends::established(WINDOW);
    assert_eq!(ends.guest_writes(b"hello"), Verdict::Open);
    let mut bytes = [0; 5];
    ends.program.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");

    ends.program.write_all(b"answer").unwrap();
    assert_eq!(ends.readable(), Verdict::Open);
    let (header, payload) = &ends.packets()[0];
    assert_eq!((header.op, &payload[..]), (Op::Rw, &b"answer"[..]));
    assert_eq!((header.buf_alloc, header.fwd_cnt), (WINDOW, 5));
}

#[test]
fn a_response_brings_ok_and_then_the_bytes_behind_the_line() {
    let mut ends = Ends::requested();
    ends.program.write_all(b"early").unwrap();
    assert_eq!(ends.readable(), Verdict::Open);
    assert_eq!(ends.packets(), [], "nothing flows before the answer");
    assert_eq!(ends.guest(&packet(Op::Response)), Verdict::Open);
    let mut line = [0; 9];
    ends.program.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK 40000\n");
    assert_eq!(ends.packets()[0].1, b"early");
    assert_eq!(
        ends.guest(&packet(Op::Response)),
        Verdict::Open,
        "a second one is ignored"
    );
    assert!(ends.conn.deadline().is_none());
}

#[test]
fn a_dead_client_is_reset_unless_it_left_bytes() {
    let mut ends = Ends::requested();
    ends.program = UnixStream::pair().unwrap().0;
    assert_eq!(
        ends.guest(&packet(Op::Response)),
        Verdict::Reset(CloseReason::HostGone)
    );

    let mut ends = Ends::requested();
    ends.program.write_all(b"last words").unwrap();
    ends.program = UnixStream::pair().unwrap().0;
    assert_eq!(ends.guest(&packet(Op::Response)), Verdict::Open);
    let packets = ends.packets();
    assert_eq!(packets[0].1, b"last words");
    assert_eq!(packets[1].0.shutdown_flags(), ShutdownFlags::all());
}

/// A connection whose peer is to answer with an `OK` line.
fn dialing() -> Ends {
    Ends::of(|socket| {
        let dialing = Dialing::Answer(Line::answer());
        VsockConnection::dialing(&packet(Op::Request), socket, dialing, WINDOW)
    })
}

#[test]
fn a_request_is_answered_when_the_peer_has_answered() {
    let mut ends = dialing();
    assert_eq!(ends.ops(), [], "the guest waits");
    ends.program.write_all(b"OK 10").unwrap();
    assert_eq!(ends.readable(), Verdict::Open);
    assert_eq!(ends.ops(), [], "half an answer");
    ends.program.write_all(b"24\nfirst bytes").unwrap();
    assert_eq!(ends.readable(), Verdict::Open);
    let packets = ends.packets();
    assert_eq!(packets[0].0.op, Op::Response);
    assert_eq!(packets[1].1, b"first bytes", "what follows is payload");
    assert!(ends.conn.deadline().is_none());
}

#[test]
fn a_peer_that_refuses_or_answers_something_else_resets_the_request() {
    let mut ends = dialing();
    ends.program.write_all(b"no\n").unwrap();
    assert_eq!(ends.readable(), Verdict::Reset(CloseReason::Refused));
    let mut ends = dialing();
    ends.program = UnixStream::pair().unwrap().0;
    assert_eq!(ends.gone(), Verdict::Reset(CloseReason::Refused));
}

#[test]
fn a_connect_that_has_not_waited_is_answered_when_it_has_succeeded() {
    let mut ends = Ends::of(|socket| {
        VsockConnection::dialing(&packet(Op::Request), socket, Dialing::Connect, WINDOW)
    });
    assert!(ends.conn.deadline().is_some(), "it does not wait forever");
    assert_eq!(ends.writable(), Verdict::Open);
    assert_eq!(ends.ops(), [Op::Response]);
}

#[test]
fn a_peer_that_closes_with_its_answer_is_gone_whether_or_not_the_guest_receives() {
    let mut ends = dialing();
    ends.program.write_all(b"OK 5\n").unwrap();
    ends.program = UnixStream::pair().unwrap().0;
    assert_eq!(ends.gone(), Verdict::Open);
    assert_eq!(ends.guest(&shutdown(ShutdownFlags::RECEIVE)), Verdict::Open);
    let packets = ends.packets();
    assert_eq!(packets[0].0.op, Op::Response);
    assert_eq!(packets[1].0.shutdown_flags(), ShutdownFlags::all());
}

#[test]
fn a_guest_that_does_not_wait_for_the_peers_answer_is_reset() {
    let mut ends = dialing();
    assert_eq!(
        ends.guest_writes(b"x"),
        Verdict::Reset(CloseReason::Protocol)
    );
    let mut ends = dialing();
    let both = shutdown(ShutdownFlags::all());
    assert_eq!(ends.guest(&both), Verdict::Reset(CloseReason::Protocol));
    let mut ends = dialing();
    assert_eq!(
        ends.guest(&packet(Op::Rst)),
        Verdict::Close(CloseReason::GuestReset)
    );
}

#[test]
fn a_flush_is_bounded_and_goes_on_without_an_event() {
    let mut ends = Ends::established(1 << 21);
    ends.fill(1 << 20);
    let mut reader = ends.program.try_clone().unwrap();
    let (done, drained) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while reader.read(&mut buffer).is_ok_and(|count| count > 0) {}
        let _ = done.send(());
    });
    let deadline = Instant::now() + Duration::from_secs(10);
    while ends.conn.mover.buffered() > 0 {
        assert!(Instant::now() < deadline, "nothing is flushed");
        let before = ends.conn.mover.buffered();
        let verdict = if ends.conn.can_flush() {
            ends.conn.flush()
        } else {
            ends.writable()
        };
        assert_eq!(verdict, Verdict::Open);
        assert!(before - ends.conn.mover.buffered() <= 256 * 1024);
    }
    drop(ends);
    drained.recv_timeout(Duration::from_secs(10)).unwrap();
    thread.join().unwrap();
}

#[test]
fn bytes_before_the_answer_or_after_the_end_reset_it() {
    let mut ends = Ends::requested();
    assert_eq!(
        ends.guest_writes(b"x"),
        Verdict::Reset(CloseReason::Protocol)
    );
    let mut ends = Ends::established(WINDOW);
    assert_eq!(ends.guest(&shutdown(ShutdownFlags::SEND)), Verdict::Open);
    assert_eq!(
        ends.guest_writes(b"x"),
        Verdict::Reset(CloseReason::Protocol)
    );
}

#[test]
fn bytes_past_the_credit_reset_it() {
    let mut ends = Ends::established(10);
    assert_eq!(ends.guest_writes(&[0; 10]), Verdict::Open);
    assert_eq!(
        ends.guest_writes(&[0; 1]),
        Verdict::Reset(CloseReason::Protocol),
        "the guest was told of no more room"
    );
    let mut ends = Ends::established(10);
    assert_eq!(
        ends.guest_writes(&[0; 11]),
        Verdict::Reset(CloseReason::Protocol)
    );
}

#[test]
fn a_program_that_does_not_read_costs_its_buffer_only_until_it_does() {
    let mut ends = Ends::established(WINDOW);
    let written = ends.fill(3000);
    assert!(ends.conn.mover.buffered() <= WINDOW as usize);
    ends.program.set_nonblocking(true).unwrap();
    let mut read = Vec::new();
    for _ in 0..10 {
        let error = ends.program.read_to_end(&mut read).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        assert_eq!(ends.writable(), Verdict::Open);
    }
    let _ = ends.program.read_to_end(&mut read);
    assert_eq!(read, written);
}

#[test]
fn a_credit_request_is_answered() {
    let mut ends = Ends::established(WINDOW);
    assert_eq!(ends.guest(&packet(Op::CreditRequest)), Verdict::Open);
    assert_eq!(ends.ops(), [Op::CreditUpdate]);
}

#[test]
fn a_credit_request_before_the_answer_does_not_hide_it() {
    let mut ends = Ends::requested();
    assert_eq!(ends.guest(&packet(Op::CreditRequest)), Verdict::Open);
    assert_eq!(ends.guest(&packet(Op::Response)), Verdict::Open);
    assert!(ends.conn.deadline().is_none(), "the answer was heard");
    let mut line = [0; 9];
    ends.program.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK 40000\n");
}

#[test]
fn without_credit_it_asks_once_and_waits() {
    let mut ends = Ends::established(WINDOW);
    assert_eq!(
        ends.guest(&VsockHeader {
            buf_alloc: 3,
            ..packet(Op::CreditUpdate)
        }),
        Verdict::Open
    );
    ends.program.write_all(b"abcdef").unwrap();
    assert_eq!(ends.readable(), Verdict::Open);
    let packets = ends.packets();
    let sent: Vec<u8> = packets
        .iter()
        .flat_map(|(_, payload)| payload.clone())
        .collect();
    assert_eq!(sent, b"abc");
    assert_eq!(packets.last().unwrap().0.op, Op::CreditRequest);
    assert_eq!(ends.readable(), Verdict::Open);
    assert_eq!(ends.packets(), []);
    let update = VsockHeader {
        buf_alloc: 3,
        fwd_cnt: 3,
        ..packet(Op::CreditUpdate)
    };
    assert_eq!(ends.guest(&update), Verdict::Open);
    let sent: Vec<u8> = ends
        .packets()
        .into_iter()
        .flat_map(|(_, payload)| payload)
        .collect();
    assert_eq!(sent, b"def");
}

#[test]
fn a_small_buffer_is_filled_with_one_packet() {
    let mut ends = Ends::established(WINDOW);
    ends.program.write_all(&[7; 2 * WINDOW as usize]).unwrap();
    assert_eq!(ends.readable(), Verdict::Open);
    let lens: Vec<usize> = ends.packets().iter().map(|(_, p)| p.len()).collect();
    // The second is the CREDIT_REQUEST.
    assert_eq!(lens, [WINDOW as usize, 0]);
}

#[test]
fn a_host_program_that_stops_writing_ends_one_direction() {
    let mut ends = Ends::established(WINDOW);
    ends.program.write_all(b"question").unwrap();
    ends.program.shutdown(Direction::Write).unwrap();
    assert_eq!(ends.ended(), Verdict::Open);
    let packets = ends.packets();
    assert_eq!(packets[0].1, b"question");
    assert_eq!(
        (packets[1].0.op, packets[1].0.shutdown_flags()),
        (Op::Shutdown, ShutdownFlags::SEND)
    );
    assert_eq!(ends.guest_writes(b"answer"), Verdict::Open);
    assert_eq!(
        ends.guest(&shutdown(ShutdownFlags::all())),
        Verdict::Reset(CloseReason::Done)
    );
    drop(ends.conn);
    let mut answer = String::new();
    ends.program.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
}

#[test]
fn a_host_program_that_closes_ends_both_with_one_shutdown() {
    let mut ends = Ends::established(WINDOW);
    ends.program.write_all(&[7; 10_000]).unwrap();
    ends.program = UnixStream::pair().unwrap().0;
    assert_eq!(ends.gone(), Verdict::Open);
    let packets = ends.packets();
    let sent: usize = packets.iter().map(|(_, payload)| payload.len()).sum();
    assert_eq!(sent, WINDOW as usize);
    assert!(
        packets.iter().all(|(header, _)| header.op != Op::Shutdown),
        "bytes are left"
    );
    let mut taken = WINDOW;
    let mut last = Vec::new();
    for _ in 0..2 {
        let update = VsockHeader {
            fwd_cnt: taken,
            ..packet(Op::CreditUpdate)
        };
        assert_eq!(ends.guest(&update), Verdict::Open);
        last = ends.packets();
        taken += last
            .iter()
            .map(|(_, payload)| payload.len() as u32)
            .sum::<u32>();
    }
    assert_eq!(taken, 10_000);
    assert_eq!(
        last.last().unwrap().0.shutdown_flags(),
        ShutdownFlags::all()
    );
    assert!(ends.conn.deadline().is_some(), "the guest has to confirm");
    assert_eq!(
        ends.guest(&packet(Op::Rst)),
        Verdict::Close(CloseReason::Done)
    );
}

#[test]
fn what_comes_for_a_program_that_is_gone_is_taken_and_dropped() {
    let mut ends = Ends::established(WINDOW);
    ends.program = UnixStream::pair().unwrap().0;
    assert_eq!(ends.gone(), Verdict::Open);
    for _ in 0..10 {
        assert_eq!(ends.guest_writes(&[1; 1000]), Verdict::Open);
        ends.packets();
    }
    assert!(ends.conn.mover.buffered() == 0);
}

#[test]
fn a_guest_that_sends_to_a_program_that_is_gone_hears_so_before_it_has_read_all() {
    let mut ends = Ends::established(WINDOW);
    ends.program.write_all(&[7; 10_000]).unwrap();
    ends.program = UnixStream::pair().unwrap().0;
    assert_eq!(ends.gone(), Verdict::Open);
    let before = ends.packets();
    let is_shutdown = |(header, _): &(VsockHeader, _)| header.op == Op::Shutdown;
    assert!(!before.iter().any(is_shutdown), "bytes are left");
    assert_eq!(ends.guest_writes(&[1; 1000]), Verdict::Open);
    let told = ends.packets();
    let told: Vec<_> = told
        .iter()
        .map(|(it, _)| (it.op, it.shutdown_flags()))
        .collect();
    assert_eq!(told, [(Op::Shutdown, ShutdownFlags::RECEIVE)]);

    let update = VsockHeader {
        buf_alloc: 20_000,
        ..packet(Op::CreditUpdate)
    };
    assert_eq!(ends.guest(&update), Verdict::Open);
    let after = ends.packets();
    let bytes = |packets: &[(VsockHeader, Vec<u8>)]| packets.iter().map(|(_, it)| it.len()).sum();
    let (early, late): (usize, usize) = (bytes(&before), bytes(&after));
    assert_eq!(early + late, 10_000);
    assert_eq!(
        after.last().unwrap().0.shutdown_flags(),
        ShutdownFlags::all()
    );
}

#[test]
fn a_guest_that_stops_sending_ends_the_programs_reading_behind_the_last_byte() {
    let mut ends = Ends::established(WINDOW);
    let written = ends.fill(2000);
    assert_eq!(ends.guest(&shutdown(ShutdownFlags::SEND)), Verdict::Open);
    let reader = std::thread::spawn({
        let mut program = ends.program.try_clone().unwrap();
        move || {
            let mut bytes = Vec::new();
            program.read_to_end(&mut bytes).map(|_| bytes)
        }
    });
    assert_eq!(ends.flush_to_reader(), Verdict::Open);
    assert_eq!(reader.join().unwrap().unwrap(), written);
    ends.program.write_all(b"still heard").unwrap();
    assert_eq!(ends.readable(), Verdict::Open);
    assert_eq!(ends.packets()[0].1, b"still heard");
}

#[test]
fn a_guest_that_stops_receiving_makes_the_programs_writing_fail() {
    let mut ends = Ends::established(WINDOW);
    assert_eq!(ends.guest(&shutdown(ShutdownFlags::RECEIVE)), Verdict::Open);
    assert_eq!(
        ends.program.write_all(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    assert_eq!(ends.guest_writes(b"still sends"), Verdict::Open);
    assert_eq!(
        ends.guest(&shutdown(ShutdownFlags::SEND)),
        Verdict::Reset(CloseReason::Done),
        "the flags add up"
    );
    drop(ends.conn);
    let mut bytes = String::new();
    ends.program.read_to_string(&mut bytes).unwrap();
    assert_eq!(bytes, "still sends");
}

#[test]
fn a_host_program_that_stops_reading_ends_the_guests_sending() {
    let mut ends = Ends::established(WINDOW);
    ends.program.shutdown(Direction::Read).unwrap();
    assert_eq!(ends.writable(), Verdict::Open);
    let packets = ends.packets();
    assert_eq!(
        (packets[0].0.op, packets[0].0.shutdown_flags()),
        (Op::Shutdown, ShutdownFlags::RECEIVE)
    );
    ends.program.write_all(b"still speaks").unwrap();
    assert_eq!(ends.readable(), Verdict::Open);
    assert_eq!(ends.packets()[0].1, b"still speaks");
}

/// What may happen to a connection whose host program takes no bytes.
const ANYTHING: [fn(&mut Ends) -> Verdict; 3] = [
    |ends| ends.guest(&packet(Op::CreditRequest)),
    |ends| ends.guest(&packet(Op::CreditUpdate)),
    |ends| {
        ends.program.write_all(b"still speaks").unwrap();
        ends.readable()
    },
];

#[test]
fn a_host_program_that_stops_reading_a_full_socket_is_found_out_by_whatever_comes_next() {
    for next in ANYTHING {
        let mut ends = Ends::established(WINDOW);
        ends.fill(2000);
        ends.program.shutdown(Direction::Read).unwrap();
        assert_eq!(next(&mut ends), Verdict::Open);
        assert!(ends.conn.mover.buffered() == 0);
        let packets = ends.packets();
        let (last, _) = packets.last().unwrap();
        assert_eq!(
            (last.op, last.shutdown_flags()),
            (Op::Shutdown, ShutdownFlags::RECEIVE)
        );
        // What still comes is dropped, at the cost of no credit.
        (0..10).for_each(|_| {
            assert_eq!(ends.guest_writes(&[0; 1000]), Verdict::Open);
            ends.packets();
        });
    }
}

#[test]
fn a_close_towards_a_program_that_stops_reading_a_full_socket_is_confirmed() {
    for next in ANYTHING {
        let mut ends = Ends::established(WINDOW);
        ends.fill(2000);
        assert_eq!(ends.guest(&shutdown(ShutdownFlags::all())), Verdict::Open);
        ends.program.shutdown(Direction::Read).unwrap();
        assert_eq!(next(&mut ends), Verdict::Reset(CloseReason::Done));
    }
}

#[test]
fn a_close_waits_for_the_last_byte_and_survives_the_guests_timer() {
    let mut ends = Ends::established(WINDOW);
    let written = ends.fill(2000);
    assert_eq!(ends.guest(&shutdown(ShutdownFlags::all())), Verdict::Open);
    assert!(ends.conn.is_flushing());
    assert_eq!(
        ends.guest(&packet(Op::Rst)),
        Verdict::Close(CloseReason::Done)
    );
    assert!(ends.conn.is_flushing(), "the bytes are the host program's");
    let reader = std::thread::spawn({
        let mut program = ends.program.try_clone().unwrap();
        move || {
            let mut bytes = Vec::new();
            program.read_to_end(&mut bytes).map(|_| bytes)
        }
    });
    assert_eq!(ends.flush_to_reader(), Verdict::Reset(CloseReason::Done));
    drop(ends.conn);
    assert_eq!(reader.join().unwrap().unwrap(), written);
}

#[test]
fn an_abort_does_not_wait() {
    let mut ends = Ends::established(WINDOW);
    ends.fill(2000);
    assert_eq!(
        ends.guest(&packet(Op::Rst)),
        Verdict::Close(CloseReason::GuestReset)
    );
    assert!(!ends.conn.is_flushing());
}

#[test]
fn a_close_towards_a_program_that_is_gone_is_confirmed_at_once() {
    let mut ends = Ends::established(WINDOW);
    ends.fill(2000);
    assert_eq!(ends.guest(&shutdown(ShutdownFlags::all())), Verdict::Open);
    ends.program = UnixStream::pair().unwrap().0;
    assert_eq!(ends.gone(), Verdict::Reset(CloseReason::Done));
}

#[test]
fn a_request_for_a_living_connection_resets_it() {
    let mut ends = Ends::established(WINDOW);
    assert_eq!(
        ends.guest(&packet(Op::Request)),
        Verdict::Reset(CloseReason::Protocol)
    );
}

// Whatever else both sides may do is for the fuzz target `connection`, which has a model of it.

#[test]
fn a_client_that_leaves_early_is_noticed_without_a_hang_up() {
    let mut ends = Ends::requested();
    ends.program.shutdown(Direction::Write).unwrap();
    assert_eq!(ends.ended(), Verdict::Open);
    assert!(!ends.conn.is_deserted(), "it has only stopped sending");
    let mut ends = Ends::requested();
    drop(ends.program);
    let end = Readiness {
        readable: true,
        until_empty: true,
        ..Readiness::default()
    };
    assert_eq!(ends.conn.socket_ready(end), Verdict::Open);
    assert!(ends.conn.is_deserted());
}

#[test]
fn the_wait_for_an_answer_only_gets_shorter() {
    let mut ends = Ends::requested();
    let usual = ends.conn.deadline().unwrap();
    ends.conn.answer_by(usual + Duration::from_secs(1));
    assert_eq!(ends.conn.deadline(), Some(usual));
    ends.conn.answer_by(usual - Duration::from_secs(1));
    assert_eq!(ends.conn.deadline(), Some(usual - Duration::from_secs(1)));
}
