use std::os::unix::net::UnixListener;

use tempfile::TempDir;

use super::connections::{Connections, Places};
use super::resets::MAX_RESETS;
use super::*;
use crate::metrics::counters::Side;
use crate::packet::header::GuestPort;
use crate::vsock_conn::{Greeting, VsockConnection};
use crate::testing::{self, memory, tx_batch};

/// An event loop in which nothing happens.
struct NoEvents;

impl Registry for NoEvents {
    fn register(&self, _socket: BorrowedFd<'_>, _source: EventSource) -> io::Result<()> {
        Ok(())
    }
}

/// The table of a guest that never takes a packet, and a host program that listens for it.
struct Table {
    backend: VsockThreadBackend,
    listener: UnixListener,
    _folder: TempDir,
}

const PEER: PeerAddr = PeerAddr::host(1234);

impl Table {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let config = testing::config(folder.path());
        Self {
            backend: VsockThreadBackend::new(&config, Box::new(NoEvents)),
            listener: UnixListener::bind(Routes::new(&config).host_path(PEER.port, PacketType::Stream).unwrap())
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
    assert_eq!(table.backend.pending.resets.len(), MAX_RESETS - MAX_BATCH + 1);
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
fn a_quarter_of_the_places_is_kept_for_each_side() {
    for per_side in [1, 2, 3, 4, 100, 1024] {
        let places = Places::new(per_side);
        let mut connections = Connections::new(places);
        let mut taken = [0; 2];
        for side in [Side::Guest, Side::Host] {
            while connections.has_place(side) {
                let port = GuestPort(connections.len() as u32);
                let key = ConnKey { guest: port, peer: PEER, packet_type: PacketType::Stream };
                let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
                let conn =
                    VsockConnection::requested(Cid::from_raw(4), key, socket.into(), Greeting::Ok, 1 << 16);
                let inserted = connections.try_insert(side, |_| io::Result::Ok(conn));
                inserted.unwrap();
                taken[side as usize] += 1;
            }
        }
        assert_eq!(taken, [per_side, per_side / 3]);
    }
}
