use std::os::unix::net::UnixListener;

use tempfile::TempDir;

use super::resets::MAX_RESETS;
use super::*;
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
            listener: UnixListener::bind(Routes::new(&config.uds_path).host_path(PEER.port))
                .unwrap(),
            _folder: folder,
        }
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
        assert_eq!(table.backend.ready.len(), 0);
    }
    let backend = &table.backend;
    assert_eq!(
        (backend.connections.len(), backend.connections.open()),
        (0, 0)
    );
    assert!(backend.deadlines.is_empty() && backend.resets.is_empty());
    assert_eq!((backend.clients.len(), backend.flushable.len()), (0, 0));
}

#[test]
fn resets_that_the_guest_does_not_take_are_dropped_beyond_a_limit() {
    let mut table = Table::new();
    for port in 0..2 * MAX_RESETS as u32 {
        table.send(port, Op::CreditRequest);
        table.send(port, Op::Rst);
    }
    assert_eq!(table.backend.resets.len(), MAX_RESETS);
    assert_eq!(table.backend.counters.resets_lost, MAX_RESETS as u64);
}
