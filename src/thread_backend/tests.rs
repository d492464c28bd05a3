mod saved;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use vmm_sys_util::eventfd::EventFd;

use super::connections::{Connections, Places};
use super::resets::MAX_RESETS;
use super::*;
use crate::host::entry::Entry;
use crate::host::siblings::Siblings;
use crate::metrics::counters::Side;
use crate::packet::header::{GuestPort, PeerPort};
use crate::testing::{self, NoEvents, memory, tx_batch};
use crate::vsock_conn::{Greeting, VsockConnection};

/// The table of a guest that never takes a packet, and a host program that listens for it.
struct Table {
    backend: VsockThreadBackend,
    listener: UnixListener,
    _folder: TempDir,
}

const PEER: PeerAddr = PeerAddr::host(1234);

impl Table {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut VmConfig)) -> Self {
        let folder = TempDir::new().unwrap();
        let mut config = testing::config(folder.path());
        config.sibling_dirs = vec![folder.path().into()];
        change(&mut config);
        Self {
            backend: VsockThreadBackend::new(&config, Box::new(NoEvents)),
            listener: UnixListener::bind(
                Routes::new(&config)
                    .host_path(PEER.port, PacketType::Stream)
                    .unwrap(),
            )
            .unwrap(),
            _folder: folder,
        }
    }

    fn has_nothing_pending(&self) -> bool {
        !RxSource::ALL
            .into_iter()
            .any(|source| self.backend.has_pending(source))
    }

    /// Lets the guest take a reset. False when there is none.
    fn take_reset(&mut self) -> bool {
        self.backend.pending.resets.pop().is_some()
    }

    fn send(&mut self, port: u32, op: Op) {
        let memory = memory();
        let header = VsockHeader::new(Cid::from_raw(4), GuestPort(port), PEER, op);
        self.backend.send_pkts(&tx_batch(&memory, &[(header, b"")]));
    }
}

#[test]
fn connections_that_come_and_go_while_the_guest_takes_nothing_leave_nothing() {
    let mut table = Table::new();
    for port in 0..1000 {
        table.send(port, Op::Request);
        table.listener.accept().unwrap();
        assert_eq!(table.backend.connections.len(), 1);
        table.send(port, Op::Rst);
        assert!(table.has_nothing_pending());
    }
    let backend = &table.backend;
    assert_eq!(
        (backend.connections.len(), backend.connections.open()),
        (0, 0)
    );
    assert!(backend.deadlines.is_empty());
    assert_eq!((backend.clients.len(), backend.flushable.len()), (0, 0));
}

#[test]
fn packets_are_left_in_the_ring_until_their_answers_find_a_place() {
    let mut table = Table::new();
    let mut port = 0;
    while table.backend.has_room() {
        table.send(port, Op::CreditRequest);
        port += 1;
    }
    assert_eq!(
        table.backend.pending.resets.len(),
        MAX_RESETS - MAX_BATCH + 1
    );
    // Those that the guest has sent before, if not one by one.
    (0..MAX_BATCH as u32).for_each(|port| table.send(port, Op::CreditRequest));
    assert_eq!(table.backend.counters.resets_lost, 0);
    assert!(table.take_reset() && table.backend.counters.resets_lost == 0);
    (0..MAX_BATCH).for_each(|_| assert!(table.take_reset()));
    assert!(table.backend.has_room());
}

#[test]
fn a_guest_that_takes_nothing_for_long_loses_resets() {
    let mut table = Table::new();
    let send_many = |table: &mut Table| {
        (0..2 * MAX_RESETS as u32).for_each(|port| table.send(port, Op::CreditRequest));
    };
    (0..MAX_RESETS as u32).for_each(|port| table.send(port, Op::CreditRequest));
    assert_eq!(table.backend.next_deadline(), None, "it may have buffers");
    table.backend.rx_starved();
    let deadline = table.backend.next_deadline().unwrap();
    table.backend.rx_starved();
    assert_eq!(table.backend.next_deadline(), Some(deadline), "put off");
    table.backend.expire(deadline);
    assert!(table.backend.gave_up());
    send_many(&mut table);
    assert_eq!(table.backend.pending.resets.len(), MAX_RESETS);
    assert_eq!(table.backend.counters.resets_lost, 2 * MAX_RESETS as u64);
    assert_eq!(table.backend.next_deadline(), None);
    // The newest is kept: it may be waited for.
    table.send(7777, Op::CreditRequest);
    let newest = table.backend.pending.resets.newest().unwrap();
    assert_eq!(newest.guest_port, GuestPort(7777));
    // It takes one again.
    assert!(table.take_reset());
    assert!(!table.backend.gave_up() && !table.backend.has_room());
}

#[test]
fn a_third_of_the_places_is_kept_for_each_side() {
    for per_side in [1, 2, 3, 4, 100, 1024] {
        let places = Places::new(per_side);
        let mut connections = Connections::new(places);
        let mut taken = [0; 2];
        for side in [Side::Guest, Side::Host] {
            while connections.has_place(side) {
                let port = GuestPort(connections.len() as u32);
                let key = ConnKey {
                    guest: port,
                    peer: PEER,
                    packet_type: PacketType::Stream,
                };
                let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
                let conn = VsockConnection::requested(
                    Cid::from_raw(4),
                    key,
                    socket.into(),
                    Greeting::Ok,
                    1 << 16,
                );
                let inserted = connections.try_insert(side, |_| io::Result::Ok(conn));
                inserted.unwrap();
                taken[side as usize] += 1;
            }
        }
        assert_eq!(taken, [per_side, per_side / 3]);
    }
}

/// Opens as many connections as `side` may have, and returns how many.
fn fill(connections: &mut Connections, side: Side) -> usize {
    let before = connections.len();
    while connections.has_place(side) {
        let port = GuestPort(connections.len() as u32);
        let key = ConnKey {
            guest: port,
            peer: PEER,
            packet_type: PacketType::Stream,
        };
        let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
        let (cid, socket) = (Cid::from_raw(4), socket.into());
        let conn = VsockConnection::requested(cid, key, socket, Greeting::Ok, 1 << 16);
        let inserted = connections.try_insert(side, |_| io::Result::Ok(conn));
        inserted.unwrap();
    }
    connections.len() - before
}

#[test]
fn siblings_take_no_place_that_is_kept_for_others() {
    for per_side in [3, 4, 100, 400] {
        for order in [
            [Side::Sibling, Side::Guest, Side::Host],
            [Side::Guest, Side::Sibling, Side::Host],
            [Side::Host, Side::Guest, Side::Sibling],
        ] {
            let mut connections = Connections::new(Places::new(per_side));
            let counts = order.map(|side| fill(&mut connections, side));
            assert_eq!(counts, [per_side, per_side / 3, per_side / 3]);
        }
    }
}

const CALLER: PeerAddr = PeerAddr {
    cid: Cid::from_raw(5),
    port: PeerPort(77),
};

impl Table {
    /// A sibling that has connected in the directory of siblings and written this.
    fn sibling(&mut self, line: &str) -> UnixStream {
        self.backend.guest_started();
        let (theirs, mut ours) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        ours.set_nonblocking(true).unwrap();
        ours.write_all(line.as_bytes()).unwrap();
        self.backend.add_client(Entry::Sibling(0), theirs.into());
        ours
    }

    fn is_connected(&self, guest: u32) -> bool {
        let key = ConnKey {
            packet_type: PacketType::Stream,
            guest: GuestPort(guest),
            peer: CALLER,
        };
        self.backend.connections.contains(&key)
    }

    /// A socket file in the directory of siblings.
    fn bind(&self, cid: u32) -> UnixListener {
        UnixListener::bind(self._folder.path().join(format!("{cid}.vsock"))).unwrap()
    }
}

fn is_open(mut client: &UnixStream) -> bool {
    matches!(client.read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

#[test]
fn a_sibling_is_connected_in_its_own_name() {
    let mut table = Table::new();
    let first = table.sibling("CONNECT 80 5:77\n");
    assert!(is_open(&first) && table.is_connected(80));
    let again = table.sibling("CONNECT 80 5:77\n");
    assert!(!is_open(&again), "the same address again");
    let other = table.sibling("CONNECT 81 5:77\n");
    assert!(is_open(&other) && table.is_connected(81));
    let counters = &table.backend.counters;
    assert_eq!(counters.opened, [0, 0, 2]);
    assert_eq!((counters.clients, counters.clients_dropped), (3, 1));
}

#[test]
fn a_sibling_does_not_wait_for_the_guest() {
    let mut table = Table::with(|config| config.wait_for_guest = Duration::from_secs(60));
    let (first, mut half) = (
        table.sibling("CONNECT 80 5:77\n"),
        table.sibling("CONNECT 81 5:7"),
    );
    table.backend.reset();
    assert!(!is_open(&first));
    half.write_all(b"7\n").unwrap();
    while let Some(token) = table.backend.clients.oldest() {
        let ready = Readiness {
            readable: true,
            ..Readiness::default()
        };
        table.backend.client_ready(token, ready);
        table.backend.serve_client();
    }
    assert!(!is_open(&half) && table.backend.connections.is_empty());
}

#[test]
fn a_sibling_claims_only_what_it_may() {
    let mut table = Table::new();
    for line in [
        "CONNECT 80\n",
        "CONNECT 80 4:77\n",
        "CONNECT 80 0:77\n",
        "CONNECT 80 1:77\n",
        "CONNECT 80 2:77\n",
        "CONNECT 80 4294967295:77\n",
        "CONNECT 80 five:77\n",
    ] {
        assert!(!is_open(&table.sibling(line)), "{line:?}");
    }
    assert_eq!(table.backend.connections.len(), 0);
    // The socket for this CID is this user's.
    let _five = table.bind(5);
    assert!(is_open(&table.sibling("CONNECT 80 5:77\n")));
    let siblings = Arc::new(Siblings::default());
    let join = |cid: u32| {
        let mut config = testing::config(Path::new(""));
        config.guest_cid = Cid::from_raw(cid.into());
        let wake = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Arc::new(siblings.join(&config, wake))
    };
    table.backend.join(join(4));
    let _six = join(6);
    assert!(
        !is_open(&table.sibling("CONNECT 80 6:77\n")),
        "it is in this process"
    );
    assert!(is_open(&table.sibling("CONNECT 80 7:77\n")));
}

#[test]
fn host_programs_name_no_caller() {
    let mut table = Table::new();
    let (theirs, mut ours) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    ours.set_nonblocking(true).unwrap();
    ours.write_all(b"CONNECT 80 5:77\n").unwrap();
    table.backend.add_client(Entry::Host, theirs.into());
    assert!(!is_open(&ours));
}

#[test]
fn siblings_without_a_line_keep_no_host_program_out() {
    let mut table = Table::new();
    let (theirs, host) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    host.set_nonblocking(true).unwrap();
    table.backend.add_client(Entry::Host, theirs.into());
    let siblings: Vec<_> = (0..300).map(|_| table.sibling("CONNECT 80 5:")).collect();
    assert_eq!(table.backend.clients.len(), 1 + 256);
    assert!(is_open(&host));
    assert!(
        !is_open(&siblings[43]) && is_open(&siblings[44]),
        "the oldest give way"
    );
    drop(siblings);
    assert_eq!(table.backend.counters.clients_dropped, 44);
}

#[test]
fn a_guest_that_calls_itself_is_refused() {
    let mut table = Table::new();
    let _own = table.bind(4);
    let memory = memory();
    for cid in [0, 1, 3, 4, 5, u64::from(u32::MAX), u64::MAX] {
        let peer = PeerAddr {
            cid: Cid::from_raw(cid),
            port: PeerPort(80),
        };
        let header = VsockHeader::new(Cid::from_raw(4), GuestPort(1), peer, Op::Request);
        table
            .backend
            .send_pkts(&tx_batch(&memory, &[(header, b"")]));
        let reset = *table.backend.pending.resets.newest().unwrap();
        assert_eq!((reset.op, reset.peer), (Op::Rst, peer));
        assert!(table.take_reset());
    }
    assert_eq!(table.backend.connections.len(), 0);
}

#[test]
fn a_call_across_processes_says_who_calls() {
    let empty = TempDir::new().unwrap();
    let mut table = Table::with(|config| config.sibling_dirs.insert(0, empty.path().into()));
    // A dead socket comes before the one that is answered.
    drop(UnixListener::bind(empty.path().join("5.vsock")).unwrap());
    let five = table.bind(5);
    let memory = memory();
    let peer = PeerAddr {
        port: PeerPort(80),
        ..CALLER
    };
    let header = VsockHeader::new(Cid::from_raw(4), GuestPort(1), peer, Op::Request);
    table
        .backend
        .send_pkts(&tx_batch(&memory, &[(header, b"")]));
    let (mut called, _) = five.accept().unwrap();
    let mut line = [0; 15];
    called.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"CONNECT 80 4:1\n");
    assert!(table.has_nothing_pending(), "it has not answered yet");
    let token = table.backend.connections.token(0).unwrap();
    called.write_all(b"OK 1\n").unwrap();
    table.backend.socket_ready(
        token,
        Readiness {
            readable: true,
            ..Readiness::default()
        },
    );
    assert!(!table.has_nothing_pending());
}

#[test]
fn a_call_that_is_not_accepted_counts_as_refused() {
    let mut table = Table::new();
    let sibling = table.bind(5);
    let call = |table: &mut Table, port| {
        let to = PeerAddr {
            cid: Cid::from_raw(5),
            port: PeerPort(80),
        };
        let header = VsockHeader::new(Cid::from_raw(4), GuestPort(port), to, Op::Request);
        table
            .backend
            .send_pkts(&tx_batch(&memory(), &[(header, b"")]));
        let key = ConnKey::of(&header);
        (
            sibling.accept().unwrap().0,
            table.backend.connections.find(&key).unwrap(),
        )
    };
    let counts = |table: &Table| {
        let counters = &table.backend.counters;
        (
            counters.refused,
            counters.opened[Side::Guest as usize],
            counters.ended.iter().sum::<u64>(),
        )
    };
    let readable = Readiness {
        readable: true,
        ..Readiness::default()
    };
    let (refusing, token) = call(&mut table, 1);
    drop(refusing);
    table.backend.socket_ready(token, readable);
    assert_eq!(counts(&table), (1, 0, 0));
    let (_silent, _) = call(&mut table, 2);
    table
        .backend
        .expire(Instant::now() + Duration::from_secs(60));
    assert_eq!(counts(&table), (2, 0, 0));
    let (mut accepting, token) = call(&mut table, 3);
    assert_eq!(counts(&table), (2, 0, 0));
    accepting.write_all(b"OK 1\n").unwrap();
    table.backend.socket_ready(token, readable);
    assert_eq!(counts(&table), (2, 1, 0));
    // A guest that gives up has had a connection.
    let _calling = call(&mut table, 4);
    table.backend.reset();
    assert_eq!(counts(&table), (2, 2, 2));
}

#[test]
fn a_sibling_with_a_full_backlog_hides_those_in_the_next_directory() {
    let next = TempDir::new().unwrap();
    let mut table = Table::with(|config| config.sibling_dirs.push(next.path().into()));
    let other = UnixListener::bind(next.path().join("5.vsock")).unwrap();
    other.set_nonblocking(true).unwrap();
    let to = PeerAddr {
        cid: Cid::from_raw(5),
        port: PeerPort(80),
    };
    let call = |table: &mut Table, port| {
        let header = VsockHeader::new(Cid::from_raw(4), GuestPort(port), to, Op::Request);
        table
            .backend
            .send_pkts(&tx_batch(&memory(), &[(header, b"")]));
    };
    call(&mut table, 1);
    other.accept().unwrap();
    let busy = table.bind(5);
    nix::sys::socket::listen(&busy, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    for port in 2..6 {
        call(&mut table, port);
    }
    assert!(table.backend.counters.refused > 0);
    assert_eq!(
        other.accept().unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
}

/// A table with a journal, and that.
fn with_journal() -> (Table, Journal) {
    let mut table = Table::new();
    let journal = Journal::new(&testing::config(table._folder.path())).unwrap();
    table.backend.set_journal(journal.clone());
    (table, journal)
}

/// The guest's ports in a journal.
fn listed(journal: &Journal) -> Vec<u32> {
    let mut ports: Vec<u32> = journal.keys().iter().map(|key| key.guest.0).collect();
    ports.sort_unstable();
    ports
}

#[test]
fn a_connection_is_listed_until_the_guest_ends_it() {
    let (mut table, journal) = with_journal();
    for port in [7, 8] {
        table.send(port, Op::Request);
    }
    assert_eq!(listed(&journal), [7, 8]);
    table.send(7, Op::Rst);
    assert_eq!(listed(&journal), [8]);
    table.backend.disconnect();
    assert!(listed(&journal).is_empty());
}

#[test]
fn a_connection_that_is_reset_is_listed_until_the_guest_has_the_reset() {
    let (mut table, journal) = with_journal();
    table.send(7, Op::Request);
    // The second one ends it.
    table.send(7, Op::Request);
    assert_eq!(
        (table.backend.connections(), listed(&journal)),
        (0, vec![7])
    );
    table.backend.rx_starved();
    assert_eq!(listed(&journal), [7]);
    assert!(table.take_reset());
    assert_eq!(listed(&journal), [7], "not yet the guest's");
    table.backend.rx_delivered();
    assert!(listed(&journal).is_empty());
    // So is a packet that belongs to no connection.
    table.send(9, Op::CreditRequest);
    assert_eq!(listed(&journal), [9]);
    table.backend.reset();
    assert!(listed(&journal).is_empty());
}

#[test]
fn resets_that_the_guest_never_gets_are_not_listed() {
    let (mut table, journal) = with_journal();
    (0..MAX_RESETS as u32).for_each(|port| table.send(port, Op::CreditRequest));
    table.backend.rx_starved();
    let deadline = table.backend.next_deadline().unwrap();
    table.backend.expire(deadline);
    table.send(7777, Op::CreditRequest);
    let expected: Vec<u32> = (1..MAX_RESETS as u32).chain([7777]).collect();
    assert_eq!(listed(&journal), expected);
}

#[test]
fn a_journal_that_comes_later_lists_what_there_is() {
    let mut table = Table::new();
    table.send(7, Op::Request);
    table.send(8, Op::CreditRequest);
    let journal = Journal::new(&testing::config(table._folder.path())).unwrap();
    table.backend.set_journal(journal.clone());
    assert_eq!(listed(&journal), [7, 8]);
    table.send(7, Op::Rst);
    assert_eq!(listed(&journal), [8]);
}
