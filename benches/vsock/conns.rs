//! The guest's connections: ports, state, and credit in both directions (virtio 1.2, 5.10.6.3).

use std::collections::HashMap;

use crate::packet::{BUF_ALLOC, Header, MAX_PAYLOAD};

/// The index of a connection.
pub type ConnId = usize;

/// The state of a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// REQUEST sent, RESPONSE expected.
    Connecting,
    /// Established.
    Open,
    /// SHUTDOWN sent, RST expected.
    Closing,
}

/// A connection. All counts are in bytes and wrap around.
pub struct Conn {
    guest_port: u32,
    host_port: u32,
    /// Its state.
    pub state: State,
    /// Bytes sent.
    pub tx_cnt: u32,
    /// The peer's `buf_alloc`.
    pub peer_alloc: u32,
    /// The peer's `fwd_cnt`.
    pub peer_fwd: u32,
    fwd_cnt: u32,
    /// The `fwd_cnt` of the last packet sent.
    pub sent_fwd: u32,
}

impl Conn {
    /// How many bytes may be sent.
    pub fn credit(&self) -> u32 {
        let in_flight = self.tx_cnt.wrapping_sub(self.peer_fwd);
        self.peer_alloc.saturating_sub(in_flight)
    }

    /// Counts `len` bytes that a program has read.
    pub fn count_read(&mut self, len: u32) {
        self.fwd_cnt = self.fwd_cnt.wrapping_add(len);
    }

    /// Whether a CREDIT_UPDATE is due: the peer knows of less than 64 KiB of free space.
    pub fn needs_credit_update(&self) -> bool {
        let unsent = self.fwd_cnt.wrapping_sub(self.sent_fwd);
        (BUF_ALLOC.saturating_sub(unsent) as usize) < MAX_PAYLOAD
    }
}

/// All connections.
#[derive(Default)]
pub struct Conns {
    all: Vec<Option<Conn>>,
    by_ports: HashMap<(u32, u32), ConnId>,
}

impl Conns {
    /// A connection, unless it was removed.
    pub fn get(&mut self, id: ConnId) -> Option<&mut Conn> {
        self.all.get_mut(id)?.as_mut()
    }

    /// Finds the connection between a guest port and a host port.
    pub fn find(&self, ports: (u32, u32)) -> Option<ConnId> {
        self.by_ports.get(&ports).copied()
    }

    /// Adds a connection between a guest port and a host port.
    pub fn insert(&mut self, guest_port: u32, host_port: u32, state: State) -> ConnId {
        let conn = Conn {
            guest_port,
            host_port,
            state,
            tx_cnt: 0,
            peer_alloc: 0,
            peer_fwd: 0,
            fwd_cnt: 0,
            sent_fwd: 0,
        };
        let free = self.all.iter().position(Option::is_none);
        let id = free.unwrap_or(self.all.len());
        match self.all.get_mut(id) {
            Some(slot) => *slot = Some(conn),
            None => self.all.push(Some(conn)),
        }
        self.by_ports.insert((guest_port, host_port), id);
        id
    }

    /// Removes a connection.
    pub fn remove(&mut self, id: ConnId) {
        if let Some(conn) = self.all.get_mut(id).and_then(Option::take) {
            self.by_ports.remove(&(conn.guest_port, conn.host_port));
        }
    }

    /// The header of a packet that is sent now, with the current credit.
    pub fn header(&mut self, id: ConnId, op: u16, flags: u32, len: u32) -> Header {
        let Some(conn) = self.get(id) else {
            return Header::default();
        };
        conn.sent_fwd = conn.fwd_cnt;
        Header {
            src_port: conn.guest_port,
            dst_port: conn.host_port,
            len,
            op,
            flags,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: conn.fwd_cnt,
        }
    }
}
