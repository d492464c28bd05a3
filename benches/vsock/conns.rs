//! The guest's connections: their ports, their states, and the credit both ways (virtio 1.2, 5.10.6.3).

use std::collections::HashMap;

use crate::packet::{BUF_ALLOC, Header, MAX_PAYLOAD};

/// The index of a connection.
pub type ConnId = usize;

/// How far a connection has come.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// REQUEST sent.
    Asked,
    /// Bytes can flow.
    Open,
    /// SHUTDOWN sent; the device owes an RST.
    Closing,
}

/// One connection. All counts are of bytes, and wrap.
pub struct Conn {
    guest_port: u32,
    host_port: u32,
    /// How far it has come.
    pub state: State,
    /// Bytes sent.
    pub tx_cnt: u32,
    /// The host's space.
    pub peer_alloc: u32,
    /// What the host has taken of what was sent.
    pub peer_fwd: u32,
    fwd_cnt: u32,
    /// What the host was told last of what was read.
    pub told_fwd: u32,
}

impl Conn {
    /// How much may be sent.
    pub fn credit(&self) -> u32 {
        let flying = self.tx_cnt.wrapping_sub(self.peer_fwd);
        self.peer_alloc.saturating_sub(flying)
    }

    /// A program has read `len` bytes. True when the host must be told: it knows of less than 64 KiB of free space.
    pub fn has_read(&mut self, len: u32) -> bool {
        self.fwd_cnt = self.fwd_cnt.wrapping_add(len);
        let untold = self.fwd_cnt.wrapping_sub(self.told_fwd);
        (BUF_ALLOC.saturating_sub(untold) as usize) < MAX_PAYLOAD
    }
}

/// All connections.
#[derive(Default)]
pub struct Conns {
    all: Vec<Option<Conn>>,
    by_ports: HashMap<(u32, u32), ConnId>,
}

impl Conns {
    /// A connection, unless it is gone.
    pub fn get(&mut self, id: ConnId) -> Option<&mut Conn> {
        self.all.get_mut(id)?.as_mut()
    }

    /// The connection between a guest port and a host port.
    pub fn find(&self, ports: (u32, u32)) -> Option<ConnId> {
        self.by_ports.get(&ports).copied()
    }

    /// A new connection between a guest port and a host port.
    pub fn insert(&mut self, guest_port: u32, host_port: u32, state: State) -> ConnId {
        let conn = Conn {
            guest_port,
            host_port,
            state,
            tx_cnt: 0,
            peer_alloc: 0,
            peer_fwd: 0,
            fwd_cnt: 0,
            told_fwd: 0,
        };
        let free = self.all.iter().position(Option::is_none);
        let id = free.unwrap_or(self.all.len());
        match self.all.get_mut(id) {
            Some(place) => *place = Some(conn),
            None => self.all.push(Some(conn)),
        }
        self.by_ports.insert((guest_port, host_port), id);
        id
    }

    /// Forgets a connection.
    pub fn remove(&mut self, id: ConnId) {
        if let Some(conn) = self.all.get_mut(id).and_then(Option::take) {
            self.by_ports.remove(&(conn.guest_port, conn.host_port));
        }
    }

    /// The header of a packet, with what the host is to know about credit.
    pub fn header(&mut self, id: ConnId, op: u16, flags: u32, len: u32) -> Header {
        let Some(conn) = self.get(id) else {
            return Header::default();
        };
        conn.told_fwd = conn.fwd_cnt;
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
