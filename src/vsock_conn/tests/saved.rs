//! Streams that another process goes on with.

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::saved::{LoadError, Loader};
use crate::testing::{self, Mutation, mutate, mutation};
use crate::vsock_conn::saved::ConnectionState;

fn loader(conn: &VsockConnection, now: Instant) -> Loader {
    let file = tempfile::tempfile().unwrap();
    testing::loader(&file, |saver| conn.save(saver, now).unwrap())
}

fn load(state: Value, loader: &mut Loader, now: Instant) -> Result<VsockConnection, LoadError> {
    VsockConnection::load(serde_json::from_value(state)?, CID, loader, now)
}

/// What a connection is in a document.
fn document(conn: &VsockConnection, now: Instant) -> Value {
    loader(conn, now).document().unwrap()
}

/// The connection as another process gets it. It would save the same.
fn handed_over(conn: &VsockConnection, now: Instant) -> VsockConnection {
    let mut loader = loader(conn, now);
    let state: Value = loader.document().unwrap();
    let mut loaded = load(state.clone(), &mut loader, now).unwrap();
    assert_eq!(document(&loaded, now), state);
    loaded.resume();
    loaded
}

impl Ends {
    /// Another process goes on with the connection.
    fn hand_over(&mut self) {
        self.conn = handed_over(&self.conn, Instant::now());
    }
}

#[test]
fn an_answer_that_has_come_in_part_is_read_on() {
    let mut ends = dialing();
    ends.program.write_all(b"OK 10").unwrap();
    assert_eq!(ends.readable(), Verdict::Open);
    ends.hand_over();
    assert!(ends.conn.is_dialing() && ends.ops().is_empty());
    assert!(ends.conn.deadline().is_some());
    ends.program.write_all(b"24\nfirst bytes").unwrap();
    assert_eq!(ends.readable(), Verdict::Open);
    ends.hand_over();
    let packets = ends.packets();
    assert_eq!(packets[0].0.op, Op::Response);
    assert_eq!(packets[1].1, b"first bytes");
}

#[test]
fn a_connect_that_goes_on_is_answered_by_the_next_process() {
    let mut ends = Ends::of(|socket| {
        VsockConnection::dialing(&packet(Op::Request), socket, Dialing::Connect, WINDOW)
    });
    ends.hand_over();
    assert_eq!(ends.writable(), Verdict::Open);
    assert_eq!(ends.ops(), [Op::Response]);
}

#[test]
fn a_request_is_sent_once_and_greeted_once() {
    let mut ends =
        Ends::of(|stream| VsockConnection::requested(CID, KEY, stream, Greeting::Ok, WINDOW));
    ends.program.write_all(b"early").unwrap();
    ends.hand_over();
    assert_eq!(ends.ops(), [Op::Request]);
    ends.hand_over();
    assert_eq!(ends.ops(), []);
    assert!(ends.conn.is_requested() && ends.conn.known_to_guest());
    assert_eq!(ends.guest(&packet(Op::Response)), Verdict::Open);
    ends.hand_over();
    let mut line = [0; 9];
    ends.program.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK 40000\n");
    assert_eq!(ends.packets()[0].1, b"early");
    assert!(ends.conn.deadline().is_none());
}

#[test]
fn a_client_that_has_left_stays_gone() {
    let mut ends = Ends::requested();
    ends.program.write_all(b"last words").unwrap();
    ends.program = UnixStream::pair().unwrap().0;
    assert_eq!(ends.gone(), Verdict::Open);
    ends.hand_over();
    assert!(ends.conn.is_deserted());
    assert_eq!(ends.guest(&packet(Op::Response)), Verdict::Open);
    ends.hand_over();
    let packets = ends.packets();
    assert_eq!(packets[0].1, b"last words");
    assert_eq!(packets[1].0.shutdown_flags(), ShutdownFlags::all());
}

#[test]
fn bytes_that_wait_arrive_once_and_credit_goes_on() {
    let mut ends = Ends::established(1 << 20);
    let mut written = ends.fill(300_000);
    // So that what waits goes over the end of its ring.
    let mut read = vec![0; 150_000];
    ends.program.read_exact(&mut read).unwrap();
    assert_eq!(ends.writable(), Verdict::Open);
    while ends.conn.mover.buffered() < 320_000 {
        let chunk: Vec<u8> = (0..1000).map(|i| (written.len() + i) as u8).collect();
        assert_eq!(ends.guest_writes(&chunk), Verdict::Open);
        written.extend(chunk);
    }
    let before = (ends.conn.credit.clone(), ends.conn.mover.buffered());
    ends.hand_over();
    let after = (ends.conn.credit.clone(), ends.conn.mover.buffered());
    assert_eq!(after, before);
    assert!(ends.conn.can_flush(), "room is looked for without an event");
    assert_eq!(ends.guest(&shutdown(ShutdownFlags::SEND)), Verdict::Open);
    ends.hand_over();
    let mut program = ends.program.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        program.read_to_end(&mut read).unwrap();
        read
    });
    assert_eq!(ends.flush_to_reader(), Verdict::Open);
    assert!(reader.join().unwrap() == written, "lost or repeated");
}

#[test]
fn a_predecessor_may_go_on() {
    let mut ends = Ends::established(1 << 20);
    let written = ends.fill(100_000);
    drop(handed_over(&ends.conn, Instant::now()));
    assert_eq!(ends.guest(&shutdown(ShutdownFlags::SEND)), Verdict::Open);
    let mut program = ends.program.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let mut read = Vec::new();
        program.read_to_end(&mut read).unwrap();
        read
    });
    assert_eq!(ends.flush_to_reader(), Verdict::Open);
    assert!(reader.join().unwrap() == written, "lost or repeated");
}

#[test]
fn a_guest_that_has_closed_is_flushed_and_gets_its_reset() {
    let mut ends = Ends::established(1 << 20);
    let written = ends.fill(100_000);
    assert_eq!(ends.guest(&shutdown(ShutdownFlags::all())), Verdict::Open);
    ends.hand_over();
    assert!(ends.conn.is_flushing() && ends.ops().is_empty());
    let mut program = ends.program.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let mut read = vec![0; written.len()];
        program.read_exact(&mut read).unwrap();
        read == written
    });
    assert_eq!(ends.flush_to_reader(), Verdict::Reset(CloseReason::Done));
    assert!(reader.join().unwrap(), "lost or repeated");
}

#[test]
fn halves_that_are_over_stay_so() {
    let mut ends = Ends::established(WINDOW);
    assert_eq!(ends.guest(&shutdown(ShutdownFlags::RECEIVE)), Verdict::Open);
    ends.hand_over();
    assert_eq!(ends.guest_writes(b"still"), Verdict::Open);
    assert_eq!(
        ends.guest(&shutdown(ShutdownFlags::SEND)),
        Verdict::Reset(CloseReason::Done)
    );

    let mut ends = Ends::established(WINDOW);
    ends.program.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(ends.ended(), Verdict::Open);
    ends.hand_over();
    let packets = ends.packets();
    assert_eq!(packets.len(), 1);
    assert_eq!(packets[0].0.shutdown_flags(), ShutdownFlags::SEND);
    ends.hand_over();
    assert_eq!(ends.ops(), [], "said once");
    assert_eq!(ends.guest_writes(b"x"), Verdict::Open);
}

#[test]
fn a_program_that_has_closed_is_waited_for_no_longer_than_before() {
    let mut ends = Ends::established(WINDOW);
    ends.program = UnixStream::pair().unwrap().0;
    assert_eq!(ends.gone(), Verdict::Open);
    assert_eq!(ends.ops(), [Op::Shutdown]);
    let deadline = ends.conn.deadline().unwrap();
    ends.hand_over();
    assert_eq!(ends.ops(), []);
    let left = deadline - ends.conn.deadline().unwrap();
    assert!(left <= Duration::from_millis(1), "whole milliseconds");
    assert_eq!(
        ends.guest(&packet(Op::Rst)),
        Verdict::Close(CloseReason::Done)
    );
}

#[test]
fn credit_is_asked_for_once() {
    let mut ends = Ends::established(WINDOW);
    let mut full = packet(Op::CreditUpdate);
    full.buf_alloc = 0;
    assert_eq!(ends.guest(&full), Verdict::Open);
    ends.program.write_all(b"waits").unwrap();
    assert_eq!(ends.readable(), Verdict::Open);
    assert_eq!(ends.ops(), [Op::CreditRequest]);
    ends.hand_over();
    assert_eq!(ends.ops(), []);
    assert_eq!(ends.guest(&packet(Op::CreditUpdate)), Verdict::Open);
    assert_eq!(ends.packets()[0].1, b"waits");
}

#[test]
fn operations_that_are_pending_stay_so() {
    let mut ends =
        Ends::of(|stream| VsockConnection::accepted(&packet(Op::Request), stream, WINDOW));
    assert_eq!(ends.guest(&packet(Op::CreditRequest)), Verdict::Open);
    ends.hand_over();
    assert_eq!(ends.ops(), [Op::Response, Op::CreditUpdate]);
}

/// A document of the first version. It must be understood for ever.
const SAMPLE: &str = r#"{
    "key": {"guest": 1234, "peer": {"cid": 2, "port": 40000}, "packet_type": "stream"},
    "state": {"dialing": {"answer": {
        "role": "answer", "len": 4, "part": "port", "port": 1, "caller": [0, 0]
    }}},
    "greeting": "nothing",
    "deadline": 10000,
    "pending": ["response", "credit_update"],
    "credit": {
        "buf_alloc": 4096, "received": 8, "forwarded": 3, "forwarded_sent": 2,
        "guest_buf_alloc": 4096, "guest_forwarded": 7, "sent": 9
    },
    "credit_requested": true,
    "client_left": false,
    "shutdown": {
        "guest": {"receive": false, "send": true}, "host": {"receive": true, "send": false},
        "sent": {"receive": false, "send": false}, "host_closed": false, "dropped": true
    },
    "socket": {"fd": 0, "family": "unix", "packet_type": "stream"},
    "payload": {"stream": {"bytes": {"offset": 24, "len": 5}, "receive_size": 8192}}
}"#;

#[test]
fn a_document_of_the_first_version_is_understood() {
    let sample: Value = serde_json::from_str(SAMPLE).unwrap();
    let state: ConnectionState = serde_json::from_str(SAMPLE).unwrap();
    assert_eq!(serde_json::to_value(&state).unwrap(), sample);
    let (socket, _program) = UnixStream::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    let mut loader = testing::loader(&file, |saver| {
        saver.fd(socket.as_fd());
        saver.bytes(&[b"12345"]).unwrap();
    });
    let now = Instant::now();
    let conn = load(sample.clone(), &mut loader, now).unwrap();
    assert_eq!(document(&conn, now), sample);
    // A later version may say more, and need not say what has a default.
    let mut other = sample;
    other["new"] = 1.into();
    for field in [
        "deadline",
        "pending",
        "credit_requested",
        "client_left",
        "shutdown",
    ] {
        other.as_object_mut().unwrap().remove(field);
    }
    serde_json::from_value::<ConnectionState>(other).unwrap();
}

#[test]
fn what_can_not_be_is_refused() {
    for (place, value) in [
        ("/credit/buf_alloc", 4.into()),
        ("/credit/received", 7.into()),
        ("/credit/received", u64::MAX.into()),
        ("/credit/sent", u64::MAX.into()),
        ("/credit/forwarded", 4.into()),
        ("/credit/forwarded_sent", 4.into()),
        ("/payload/stream/bytes/len", 5000.into()),
        ("/payload/stream/bytes/offset", u64::MAX.into()),
        ("/payload", serde_json::json!({"messages": {}})),
        ("/key/packet_type", "seqpacket".into()),
        ("/socket/packet_type", "seqpacket".into()),
        ("/socket/packet_type", serde_json::json!({"unknown": 7})),
        ("/socket/fd", 1.into()),
        ("/state", "flushing".into()),
        ("/state/dialing/answer/len", 14.into()),
        ("/state/dialing/answer/role", "request".into()),
    ] {
        let mut state: Value = serde_json::from_str(SAMPLE).unwrap();
        *state.pointer_mut(place).unwrap() = value;
        let (socket, _program) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let mut loader = testing::loader(&file, |saver| {
            saver.fd(socket.as_fd());
            saver.bytes(&[b"12345"]).unwrap();
        });
        let loaded = load(state, &mut loader, Instant::now());
        assert!(loaded.is_err(), "{place}");
    }
}

/// A connection in one of five states.
fn in_state(which: usize) -> Ends {
    let mut ends = match which {
        0 => dialing(),
        1 => Ends::requested(),
        2 | 3 => Ends::established(1 << 18),
        _ => Ends::established(WINDOW),
    };
    let verdict = match which {
        0 => {
            ends.program.write_all(b"OK 10").unwrap();
            ends.readable()
        }
        1 => Verdict::Open,
        2 | 3 => {
            ends.fill(1000);
            let over = ShutdownFlags::from_bits_truncate(which as u32);
            ends.guest(&shutdown(over))
        }
        _ => {
            ends.program = UnixStream::pair().unwrap().0;
            ends.gone()
        }
    };
    assert_eq!(verdict, Verdict::Open);
    ends.packets();
    ends
}

/// Does whatever may be done to a connection, however wrong.
fn exercise(ends: &mut Ends) {
    ends.conn.resume();
    let mut is_open = true;
    for step in 0..4 {
        let memory = memory();
        for _ in 0..8 {
            if let Some(size) = ends.conn.rx_size() {
                let mut batch = rx_batch(&memory, size.min(1 << 16));
                is_open &= ends.conn.recv_pkt(&mut batch) == Verdict::Open;
            }
        }
        let _ = (
            ends.conn.stats(),
            ends.conn.too_long(),
            ends.conn.is_flushing(),
        );
        is_open &= match step {
            0 => ends.guest_writes(b"hello") == Verdict::Open,
            1 => ends.flush_once() == Verdict::Open,
            2 => ends.guest(&packet(Op::CreditUpdate)) == Verdict::Open,
            _ => ends.gone() == Verdict::Open,
        };
        if !is_open {
            return;
        }
    }
}

impl Ends {
    fn flush_once(&mut self) -> Verdict {
        if self.conn.can_flush() {
            self.conn.flush()
        } else {
            self.writable()
        }
    }
}

proptest! {
    #[test]
    fn no_document_does_harm(which in 0usize..5, mutations in prop::collection::vec(mutation(), 1..4)) {
        no_harm(which, mutations);
    }

    #[test]
    fn bytes_arrive_whoever_moves_them(steps in prop::collection::vec((0u8..6, 1usize..3000), 1..60)) {
        moved(&steps);
    }
}

fn no_harm(which: usize, mutations: Vec<Mutation>) {
    let mut ends = in_state(which);
    let now = Instant::now();
    let mut loader = loader(&ends.conn, now);
    let mut state: Value = loader.document().unwrap();
    for mutation in mutations {
        mutate(&mut state, mutation);
    }
    if let Ok(loaded) = load(state, &mut loader, now) {
        ends.conn = loaded;
        document(&ends.conn, now);
        exercise(&mut ends);
    }
}

/// Moves bytes both ways, from one process to the next in between.
fn moved(steps: &[(u8, usize)]) {
    let mut ends = Ends::established(1 << 16);
    ends.program.set_nonblocking(true).unwrap();
    let [mut to_host, mut to_guest, mut at_host, mut at_guest] = [const { Vec::<u8>::new() }; 4];
    let bytes =
        |from: usize, len: usize| -> Vec<u8> { (from..from + len).map(|i| i as u8).collect() };
    let mut steps = Vec::from(steps);
    steps.extend([(5, 0), (2, 1 << 16)]);
    // The guest takes the rest, a window at a time.
    steps.extend([(4, 0), (3, 0)].repeat(50));
    for (step, len) in steps {
        match step {
            0 => {
                let written = bytes(to_host.len(), len.min(ends.conn.credit.guests()));
                assert_eq!(ends.guest_writes(&written), Verdict::Open);
                to_host.extend(written);
            }
            1 => {
                let written = bytes(to_guest.len(), len);
                let count = ends.program.write(&written).unwrap_or(0);
                to_guest.extend(&written[..count]);
                assert_eq!(ends.readable(), Verdict::Open);
            }
            2 => {
                let mut read = vec![0; len];
                while let Ok(count @ 1..) = ends.program.read(&mut read) {
                    at_host.extend(&read[..count]);
                    assert_eq!(ends.flush_once(), Verdict::Open);
                }
            }
            3 => at_guest.extend(ends.packets().into_iter().flat_map(|(_, bytes)| bytes)),
            4 => {
                let update = VsockHeader {
                    fwd_cnt: at_guest.len() as u32,
                    ..packet(Op::CreditUpdate)
                };
                assert_eq!(ends.guest(&update), Verdict::Open);
            }
            _ => ends.hand_over(),
        }
    }
    assert!(
        at_host == to_host && at_guest == to_guest,
        "lost or repeated"
    );
}
