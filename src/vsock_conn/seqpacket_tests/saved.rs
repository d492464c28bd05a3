//! Connections of messages that another process goes on with.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::saved::{LoadError, Loader};
use crate::testing::{self, mutate, mutation};

fn loader(conn: &VsockConnection, now: Instant) -> Loader {
    let file = tempfile::tempfile().unwrap();
    testing::loader(&file, |saver| conn.save(saver, now).unwrap())
}

fn load(state: Value, loader: &mut Loader, now: Instant) -> Result<VsockConnection, LoadError> {
    VsockConnection::load(serde_json::from_value(state)?, CID, loader, now)
}

impl Ends {
    /// Another process goes on with the connection.
    fn hand_over(&mut self) {
        let now = Instant::now();
        let mut loader = self::loader(&self.conn, now);
        let state: Value = loader.document().unwrap();
        let mut loaded = load(state.clone(), &mut loader, now).unwrap();
        let again: Value = self::loader(&loaded, now).document().unwrap();
        assert_eq!(again, state);
        loaded.resume();
        self.conn = loaded;
    }

    /// Lets the guest write messages until the host program's socket is full and some wait. Returns how many.
    fn fill_messages(&mut self) -> u16 {
        let mut count = 0;
        while self.conn.messages() < 3 {
            let message = [&u16::to_le_bytes(count)[..], &[7; 998]].concat();
            assert_eq!(self.guest_writes(&[(&message, true)]), Verdict::Open);
            self.packets(WINDOW as usize);
            count += 1;
        }
        count
    }
}

#[test]
fn messages_that_wait_and_the_beginning_of_one_arrive_once() {
    let mut ends = Ends::new(1 << 16);
    let count = ends.fill_messages();
    assert_eq!(ends.guest_writes(&[(b"begin", false)]), Verdict::Open);
    ends.hand_over();
    assert_eq!(ends.guest_writes(&[(b"ning", true)]), Verdict::Open);
    ends.hand_over();
    for number in 0..count {
        let mut bytes = [0; 2000];
        assert_eq!(ends.program.read(&mut bytes).unwrap(), 1000);
        assert_eq!(bytes[..2], number.to_le_bytes());
        ends.conn.mover.set_writable();
        assert_eq!(ends.conn.flush(), Verdict::Open);
    }
    ends.assert_read(&[b"beginning"]);
    assert_eq!(ends.conn.mover.buffered(), 0);
}

#[test]
fn a_guest_that_has_closed_is_flushed() {
    let mut ends = Ends::new(1 << 16);
    let count = ends.fill_messages();
    let both = |header: &mut VsockHeader| header.flags = ShutdownFlags::all().bits();
    assert_eq!(ends.guest(Op::Shutdown, both), Verdict::Open);
    ends.hand_over();
    assert!(ends.conn.is_flushing());
    for _ in 0..count - 3 {
        assert_eq!(ends.program.read(&mut [0; 2000]).unwrap(), 1000);
    }
    assert_eq!(ends.conn.flush(), Verdict::Reset(CloseReason::Done));
}

#[test]
fn a_message_that_the_guest_has_in_part_goes_on() {
    let mut ends = Ends::new(WINDOW);
    ends.program.write_all(&[1; 3000]).unwrap();
    ends.program.write_all(&[2; 10]).unwrap();
    assert_eq!(ends.readable(), Verdict::Open);
    let memory = memory();
    let mut batch = rx_batch(&memory, 1000);
    assert_eq!(ends.conn.recv_pkt(&mut batch), Verdict::Open);
    let first = received(&memory, &batch);
    assert_eq!(first[0].1.len(), 1000);
    assert!(!first[0].0.ends_message());
    ends.hand_over();
    // Nothing has happened to the socket since.
    assert_eq!(ends.messages(1500), [vec![1; 2000], vec![2; 10]]);
}

#[test]
fn a_message_in_the_socket_is_measured_again() {
    let mut ends = Ends::new(WINDOW);
    ends.program.write_all(b"measured").unwrap();
    assert_eq!(ends.readable(), Verdict::Open);
    ends.hand_over();
    assert_eq!(ends.messages(1000), [b"measured"]);
}

/// A connection with whole messages and the beginning of one for the program, and the rest of one for the guest.
fn with_payload_everywhere() -> Ends {
    let mut ends = Ends::new(1 << 16);
    ends.fill_messages();
    assert_eq!(ends.guest_writes(&[(b"begin", false)]), Verdict::Open);
    ends.program.write_all(&[1; 3000]).unwrap();
    assert_eq!(ends.readable(), Verdict::Open);
    let memory = memory();
    let received = ends.conn.recv_pkt(&mut rx_batch(&memory, 1000));
    assert_eq!(received, Verdict::Open);
    ends
}

#[test]
fn messages_that_can_not_be_are_refused() {
    let ends = with_payload_everywhere();
    let now = Instant::now();
    for (place, value) in [
        ("/payload/messages/lengths", json!([1000, 1000])),
        ("/payload/messages/lengths", json!([1000, 1000, 1000, 0])),
        ("/payload/messages/lengths", json!([u32::MAX, u32::MAX])),
        ("/payload/messages/unfinished", json!(4)),
        ("/payload/messages/unfinished", json!(u32::MAX)),
        ("/payload/messages/kept/sent", json!(3000)),
        ("/payload/messages/kept/bytes/len", json!(1u64 << 40)),
        ("/payload/messages/bytes/len", json!(1u64 << 16)),
        ("/credit/buf_alloc", json!(100)),
    ] {
        let mut loader = loader(&ends.conn, now);
        let mut state: Value = loader.document().unwrap();
        *state.pointer_mut(place).unwrap() = value;
        assert!(load(state, &mut loader, now).is_err(), "{place}");
    }
}

proptest! {
    #[test]
    fn no_document_does_harm(mutations in prop::collection::vec(mutation(), 1..4)) {
        let mut ends = with_payload_everywhere();
        let memory = memory();
        let now = Instant::now();
        let mut loader = loader(&ends.conn, now);
        let mut state: Value = loader.document().unwrap();
        mutations.into_iter().for_each(|mutation| mutate(&mut state, mutation));
        if let Ok(loaded) = load(state, &mut loader, now) {
            ends.conn = loaded;
            ends.conn.resume();
            for _ in 0..4 {
                if let Some(size) = ends.conn.rx_size() {
                    let _ = ends.conn.recv_pkt(&mut rx_batch(&memory, size.min(1 << 16)));
                }
            }
            let _ = (ends.conn.stats(), ends.conn.too_long());
            let _ = ends.guest_writes(&[(b"more", false), (b"end", true)]);
            let _ = ends.conn.flush();
        }
    }
}
