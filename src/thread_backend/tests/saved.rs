//! Tables that another process goes on with.

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::host::socket::HostSocket;
use crate::metrics::counters::CloseReason;
use crate::packet::header::ShutdownFlags;
use crate::saved::{LoadError, Loader, Saver};
use crate::testing::{mutate, mutation, rx_batch};

const WINDOW: u32 = 4096;

fn waits(config: &mut VmConfig) {
    config.wait_for_guest = Duration::from_secs(60);
}

impl Table {
    fn saved(&self, now: Instant) -> Loader {
        let file = tempfile::tempfile().unwrap();
        testing::loader(&file, |saver| self.backend.save(saver, now).unwrap())
    }

    fn document(&self, now: Instant) -> Value {
        self.saved(now).document().unwrap()
    }

    fn load(&mut self, state: Value, loader: &mut Loader, now: Instant) -> Result<(), LoadError> {
        let state = serde_json::from_value(state)?;
        self.backend.load(state, loader, now)
    }

    /// The table as another process gets it, which would save the same.
    fn handed_over(&self, change: impl FnOnce(&mut VmConfig)) -> Self {
        let now = Instant::now();
        let mut loader = self.saved(now);
        let state: Value = loader.document().unwrap();
        let mut next = Self::with(change);
        next.load(state.clone(), &mut loader, now).unwrap();
        assert_eq!(next.document(now), state);
        next
    }

    fn guest_sends(&mut self, port: u32, op: Op, flags: u32, payload: &[u8]) {
        let header = VsockHeader {
            flags,
            buf_alloc: WINDOW,
            ..VsockHeader::new(Cid::from_raw(4), GuestPort(port), PEER, op)
        };
        let memory = memory();
        let batch = tx_batch(&memory, &[(header, payload)]);
        self.backend.send_pkts(&batch);
    }

    /// A connection that the guest has opened.
    fn open(&mut self, port: u32) -> UnixStream {
        self.guest_sends(port, Op::Request, 0, b"");
        let program = self.listener.accept().unwrap().0;
        program.set_nonblocking(true).unwrap();
        self.take_packets();
        program
    }

    /// One with bytes for a host program that does not read.
    fn open_and_fill(&mut self, port: u32) -> UnixStream {
        let program = self.open(port);
        let key = ConnKey {
            guest: GuestPort(port),
            peer: PEER,
            packet_type: PacketType::Stream,
        };
        let token = self.backend.connections.find(&key).unwrap();
        let buffered = |table: &Self| {
            table
                .backend
                .connections
                .get(token)
                .unwrap()
                .conn
                .buffered()
        };
        while buffered(self) < 2000 {
            self.guest_sends(port, Op::Rw, 0, &[port as u8; 1000]);
            self.take_packets();
        }
        program
    }

    /// Lets the guest take all packets of connections, and returns their headers.
    fn take_packets(&mut self) -> Vec<VsockHeader> {
        let mut taken = Vec::new();
        for source in [RxSource::Packets, RxSource::Streams] {
            while let Some(size) = self.backend.rx_size(source) {
                let memory = memory();
                let mut batch = rx_batch(&memory, size);
                self.backend.recv_pkts(source, &mut batch);
                let received = testing::received(&memory, &batch);
                taken.extend(received.into_iter().map(|(header, _)| header));
            }
        }
        self.backend.rx_delivered();
        taken
    }

    fn client(&mut self, line: &str) -> UnixStream {
        let (theirs, mut ours) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        ours.set_nonblocking(true).unwrap();
        ours.write_all(line.as_bytes()).unwrap();
        self.backend.add_client(Entry::Host, theirs.into());
        ours
    }

    /// Lets the guest take a REQUEST for `port` and answer it.
    fn answer(&mut self, port: u32, op: Op) {
        let requests = self.take_packets();
        let request = requests
            .into_iter()
            .find(|header| (header.op, header.guest_port) == (Op::Request, GuestPort(port)));
        let mut answer = request.unwrap();
        (answer.op, answer.buf_alloc) = (op, WINDOW);
        self.backend
            .send_pkts(&tx_batch(&memory(), &[(answer, b"")]));
    }

    fn serve_clients(&mut self) {
        while self.backend.has_ready_clients() {
            self.backend.serve_client();
        }
    }

    fn flush(&mut self) {
        while self.backend.can_flush() {
            self.backend.flush();
        }
    }
}

/// The ends of everything in a table that has something of each kind.
struct Ends {
    open: UnixStream,
    filled: UnixStream,
    lingering: [UnixStream; 2],
    again: UnixStream,
    requested: UnixStream,
    waiting: [UnixStream; 2],
    half: UnixStream,
    sibling: UnixStream,
    reset: UnixStream,
}

fn busy_table() -> (Table, Ends) {
    let mut table = Table::with(waits);
    let lingering = [2, 1].map(|port| {
        let program = table.open_and_fill(port);
        table.guest_sends(port, Op::Shutdown, ShutdownFlags::all().bits(), b"");
        table.guest_sends(port, Op::Rst, 0, b"");
        program
    });
    let open = table.open(3);
    let filled = table.open_and_fill(4);
    let sibling = table.sibling("CONNECT 83 5:7");
    let reset = table.open(5);
    table.guest_sends(5, Op::Request, 0, b"");
    table.guest_sends(6, Op::CreditRequest, 0, b"");
    let waiting = [97, 96].map(|port| {
        let client = table.client(&format!("CONNECT {port}\n"));
        table.answer(port, Op::Rst);
        client
    });
    for port in [99, 98] {
        let mut client = table.client(&format!("CONNECT {port}\n"));
        client.write_all(b"last words").unwrap();
        table.take_packets();
        drop(client);
        let is_it = |conn: &VsockConnection| conn.key().guest == GuestPort(port);
        let mut all = table.backend.connections.iter();
        let (token, _) = all.find(|(_, conn)| is_it(conn)).unwrap();
        drop(all);
        let ready = Readiness {
            readable: true,
            hung_up: true,
            ..Readiness::default()
        };
        table.backend.socket_ready(token, ready);
    }
    let ends = Ends {
        open,
        filled,
        lingering,
        // While what was left for its ports lingers.
        again: table.open(1),
        requested: table.client("CONNECT 95\n"),
        waiting,
        half: table.client("CONNECT 9"),
        sibling,
        reset,
    };
    (table, ends)
}

fn read_all(mut program: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = program.read_to_end(&mut bytes);
    bytes
}

#[test]
fn a_table_goes_on_in_another_process() {
    let (table, mut ends) = busy_table();
    let counts = |table: &Table| {
        let backend = &table.backend;
        let connections = &backend.connections;
        (
            (connections.len(), connections.open()),
            (
                connections.lingering().count(),
                connections.deserted().count(),
            ),
            (backend.clients.handshaking(), backend.clients.waiting()),
            backend.pending.resets.len(),
            backend.counters.clone(),
            (backend.next_host_port, backend.has_guest),
        )
    };
    let before = counts(&table);
    assert_eq!((before.0, before.1, before.2), ((8, 6), (2, 2), (2, 5)));
    let mut next = table.handed_over(waits);
    assert_eq!(counts(&next), before);
    drop(table);

    // Who waited, in turn.
    ends.half.write_all(b"4\n").unwrap();
    next.serve_clients();
    let requests = next.take_packets();
    let ports: Vec<_> = requests
        .iter()
        .map(|header| (header.op, header.guest_port.0))
        .collect();
    assert_eq!(ports, [(Op::Request, 95), (Op::Request, 94)]);
    assert!(ends.waiting.iter().all(is_open) && is_open(&ends.requested));
    ends.sibling.write_all(b"7\n").unwrap();
    let sibling = next.backend.clients.oldest().unwrap();
    next.backend.client_ready(sibling, Readiness::default());
    next.serve_clients();
    assert!(next.is_connected(83));

    // What is left for those who have gone leaves, and nobody hears of it.
    let resets = next.backend.pending.resets.len();
    ends.lingering.iter().for_each(|program| {
        read_all(program);
    });
    next.flush();
    for (program, byte) in ends.lingering.iter().zip([2, 1]) {
        assert!(read_all(program).iter().all(|read| *read == byte));
    }
    assert_eq!(next.backend.connections.lingering().count(), 0);
    assert_eq!(next.backend.pending.resets.len(), resets);
    next.guest_sends(1, Op::Rw, 0, b"again");
    next.guest_sends(3, Op::Rw, 0, b"open");
    assert_eq!(read_all(&ends.again), b"again");
    assert_eq!(read_all(&ends.open), b"open");
    assert!(read_all(&ends.filled).len() > 2000);

    // The socket of a reset is closed when the guest has it.
    assert!(is_open(&ends.reset));
    while next.take_reset() {}
    next.backend.rx_delivered();
    assert!(!is_open(&ends.reset));
}

#[test]
fn a_table_that_was_saved_goes_on_if_nobody_takes_it() {
    let (mut table, ends) = busy_table();
    let now = Instant::now();
    let state = table.document(now);
    drop(table.handed_over(waits));
    assert_eq!(table.document(now), state);
    table.guest_sends(3, Op::Rw, 0, b"open");
    assert_eq!(read_all(&ends.open), b"open");
}

#[test]
fn deadlines_are_those_from_before() {
    let (table, _ends) = busy_table();
    let mut next = table.handed_over(waits);
    let (before, after) = (table.backend.next_deadline(), next.backend.next_deadline());
    let passed = before.unwrap().saturating_duration_since(after.unwrap());
    assert!(passed <= Duration::from_millis(1), "whole milliseconds");
    next.backend
        .expire(Instant::now() + Duration::from_secs(120));
    assert_eq!(next.backend.next_deadline(), None);
    assert_eq!(next.backend.clients.len(), 0);
    assert_eq!(
        next.backend.connections.open(),
        3,
        "those that are established"
    );
}

#[test]
fn smaller_limits_lose_nothing() {
    let (table, ends) = busy_table();
    let next = table.handed_over(|config| {
        config.max_connections = 3;
        config.max_clients = 1;
    });
    drop(table);
    assert!(is_open(&ends.half) && is_open(&ends.sibling) && is_open(&ends.requested));
    assert_eq!(next.backend.connections.len(), 8);
    assert!(!next.backend.connections.has_place(Side::Host));
}

#[test]
fn a_client_of_a_directory_that_is_gone_is_dropped() {
    let (table, ends) = busy_table();
    let now = Instant::now();
    let mut loader = table.saved(now);
    let state = loader.document().unwrap();
    let mut next = Table::with(|config| config.sibling_dirs.clear());
    next.load(state, &mut loader, now).unwrap();
    drop((table, loader));
    assert!(!is_open(&ends.sibling) && is_open(&ends.half));
    assert_eq!(next.backend.counters.clients_dropped, 1);
}

#[test]
fn a_table_that_can_not_be_is_refused_and_leaves_nothing() {
    let (table, _ends) = busy_table();
    let now = Instant::now();
    for (place, value) in [
        ("/connections/1/connection/key/guest", json!(3)),
        ("/connections/0/connection/credit/received", json!(u64::MAX)),
        ("/deserted/0/connection/key", json!({})),
        ("/lingering/0/connection/state", json!("established")),
        ("/clients/0/stage/line/role", json!("answer")),
        ("/clients/1/stage/line/len", json!(32)),
        ("/clients/2/sibling_dir", json!(0)),
        ("/clients/3/socket/fd", json!(10_000)),
        ("/resets/waiting/0/socket/fd", json!(0)),
        ("/counters", json!("none")),
        ("/counters/kicks", json!(u64::MAX)),
        ("/counters/opened/guest", json!(u64::MAX)),
    ] {
        let mut loader = table.saved(now);
        let mut state: Value = loader.document().unwrap();
        *state.pointer_mut(place).expect(place) = value;
        let mut next = Table::new();
        assert!(next.load(state, &mut loader, now).is_err(), "{place}");
        let backend = &next.backend;
        assert_eq!((backend.connections.len(), backend.clients.len()), (0, 0));
        assert!(next.has_nothing_pending() && !next.backend.can_flush());
        assert_eq!(next.backend.next_deadline(), None);
    }
}

#[test]
fn connections_whose_sockets_got_lost_are_reset() {
    let mut table = Table::with(waits);
    let _programs = [1000, 1001].map(|port| table.open(port));
    let _client = table.client("CONNECT ");
    let file = tempfile::tempfile().unwrap();
    let now = Instant::now();
    let mut saver = Saver::new(&file).unwrap();
    let state = table.backend.save(&mut saver, now).unwrap();
    let fds = saver.finish(&state).unwrap();
    let fds = fds.iter().map(|_| None).collect();
    let mut loader = Loader::open(file.try_clone().unwrap(), fds).unwrap();
    let mut next = Table::with(waits);
    next.backend.load(state, &mut loader, now).unwrap();
    assert_eq!(next.backend.connections(), 0);
    for port in [1000, 1001] {
        let reset = next.backend.pending.resets.pop().unwrap();
        assert_eq!((reset.op, reset.guest_port.0), (Op::Rst, port));
    }
    assert!(next.backend.pending.resets.is_empty());
    assert_eq!(next.backend.counters().clients_dropped, 1);
    assert_eq!(next.document(now)["clients"], json!([]));
}

#[test]
fn connections_whose_process_is_gone_are_reset() {
    let mut table = Table::new();
    let keys =
        [(1, PacketType::Stream), (2, PacketType::Seqpacket)].map(|(port, packet_type)| ConnKey {
            guest: GuestPort(port),
            peer: PEER,
            packet_type,
        });
    table.backend.reset_lost(keys.to_vec());
    for key in keys {
        let reset = table.backend.pending.resets.pop().unwrap();
        assert_eq!((reset.op, reset.guest_cid), (Op::Rst, Cid::from_raw(4)));
        assert_eq!(ConnKey::of(&reset), key);
    }
    assert_eq!(table.backend.counters.resets, 2);
}

#[test]
fn forwarded_messages_are_reset() {
    let mut table = Table::new();
    table.backend.set_types(Types {
        stream: true,
        seqpacket: true,
    });
    table.backend.guest_started();
    // In place of AF_VSOCK.
    let (family, kind) = (AddressFamily::Unix, SockType::SeqPacket);
    let programs = [7, 8].map(|port| {
        let (vsock, program) = socketpair(family, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let vsock = HostSocket::vsock(PacketType::Seqpacket, vsock);
        table
            .backend
            .add_client(Entry::Vsock(GuestPort(port)), vsock);
        if port == 7 {
            table.take_packets();
        }
        program
    });
    let now = Instant::now();
    let mut loader = table.saved(now);
    let mut next = Table::new();
    next.load(loader.document().unwrap(), &mut loader, now)
        .unwrap();
    assert_eq!(next.backend.connections.len(), 0);
    let reset = next.backend.pending.resets.pop().unwrap();
    assert_eq!(
        reset.guest_port,
        GuestPort(7),
        "the other is unknown to the guest"
    );
    assert!(next.has_nothing_pending());
    let counters = &next.backend.counters;
    assert_eq!(counters.ended[CloseReason::HostGone as usize], 2);
    assert_eq!(counters.opened.iter().sum::<u64>(), 2);
    assert_eq!(
        table.backend.connections.len(),
        2,
        "the predecessor may go on"
    );
    drop(programs);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_document_does_harm(mutations in prop::collection::vec(mutation(), 1..4)) {
        let (table, _ends) = busy_table();
        let now = Instant::now();
        let mut loader = table.saved(now);
        let mut state: Value = loader.document().unwrap();
        mutations.into_iter().for_each(|mutation| mutate(&mut state, mutation));
        let mut next = Table::with(waits);
        if next.load(state, &mut loader, now).is_ok() {
            next.document(now);
            next.serve_clients();
            next.take_packets();
            next.guest_sends(3, Op::Rw, 0, b"bytes");
            next.flush();
            while next.take_reset() {}
            next.backend.expire(Instant::now() + Duration::from_secs(120));
            next.backend.disconnect();
        }
    }
}
