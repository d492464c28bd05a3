//! The guest's side: the packets that it sends and receives.

use vhost_user_vsock::packet::header::{
    Cid, GuestPort, HEADER_LEN, MessageFlags, Op, PacketType, PeerAddr, ShutdownFlags, VsockHeader,
};
use vhost_user_vsock::vhost_user_vsock_thread::{RX_RING, TX_RING};
use vhost_user_vsock::vsock_conn::ConnKey;

use super::super::super::guest::{self, MAX_PAYLOAD};
use super::super::super::ring::{Layout, MAX_PACKET, Malformed};
use super::super::conn::{Conn, Promise, State};
use super::super::host::PORTS;
use super::{
    CID, FIRST_DEPARTED, FIRST_FLOOD, MAX_CONNS, MAX_DEPARTED, MAX_REFUSED, NOBODY, World,
};

// What it sends.
impl World<'_> {
    fn can_send(&self) -> bool {
        self.rings[TX_RING].has_room()
    }

    /// Lets the worker take packets where the TX ring is full. False when it takes none.
    pub(super) fn make_room(&mut self) -> bool {
        if !self.can_send() {
            self.run();
        }
        self.can_send()
    }

    fn send(&mut self, header: VsockHeader, payload: &[u8], layout: Layout) {
        if header.op != Op::Rst {
            let key = (ConnKey::of(&header), header.packet_type.into());
            *self.resets.entry(key).or_default() += 1;
        }
        self.put(header, payload, layout);
    }

    fn put(&mut self, header: VsockHeader, payload: &[u8], layout: Layout) {
        self.sent += 1;
        let ring = &mut self.rings[TX_RING];
        ring.offer(layout, &guest::bytes(&header, payload));
        ring.kick();
    }

    /// Sends a packet of this connection, which `change` completes.
    pub(super) fn send_for(&mut self, index: usize, op: Op, change: impl FnOnce(&mut VsockHeader)) {
        let conn = &mut self.conns[index];
        let mut header = header(conn.key, op);
        conn.give_credit(&mut header);
        change(&mut header);
        self.send(header, &[], Layout::PLAIN);
    }

    /// The index of this connection, if the guest can send for it and it is in this state.
    fn ready(&mut self, conn: u8, state: State) -> Option<usize> {
        let index = usize::from(conn).checked_rem(self.conns.len())?;
        (self.make_room() && self.conns[index].state == state).then_some(index)
    }

    pub(super) fn answer(&mut self, conn: u8, accept: bool) {
        let Some(index) = self.ready(conn, State::Asked) else {
            return;
        };
        if accept {
            self.conns[index].state = State::Open;
            self.send_for(index, Op::Response, |_| {});
        } else {
            self.reset(index);
        }
    }

    fn reset(&mut self, index: usize) {
        self.conns[index].end();
        self.conns[index].abort();
        self.send_for(index, Op::Rst, |_| {});
    }

    pub(super) fn request(&mut self, port: u8, guest_port: u8) {
        let port = 1 + port % PORTS;
        let packet_type = match self.type_of(port) {
            accepted if self.message_ports == 0 || guest_port < 0xc0 => accepted,
            PacketType::Seqpacket => PacketType::Stream,
            _ => PacketType::Seqpacket,
        };
        let key = ConnKey {
            packet_type,
            guest: GuestPort(1 + u32::from(guest_port % 8)),
            peer: PeerAddr::host(port.into()),
        };
        if self.conns.len() == MAX_CONNS {
            return;
        }
        let mut earlier = self.conns.iter().filter(|conn| conn.key == key);
        if earlier.any(|conn| conn.state != State::Over) || !self.make_room() {
            return;
        }
        // What is on the way for an earlier connection would be taken for this one's.
        let was_used = self.conns.iter().any(|conn| conn.key == key)
            || self.resets.contains_key(&(key, packet_type.into()));
        if was_used && !self.sync() {
            return;
        }
        let number = self.conns.len() as u32;
        self.asking.push_back((self.conns.len(), self.sent));
        self.conns
            .push(Conn::new(number, key, State::Asking, self.window));
        self.send_for(self.conns.len() - 1, Op::Request, |_| {});
    }

    /// Requests connections to where nobody listens. Each is answered with an RST, once.
    pub(super) fn flood(&mut self, requests: u8) {
        for _ in 0..=requests {
            if self.refused.len() == MAX_REFUSED || !self.make_room() {
                return;
            }
            let key = ConnKey {
                packet_type: PacketType::Stream,
                guest: GuestPort(FIRST_FLOOD + self.floods),
                peer: PeerAddr::host(NOBODY),
            };
            self.floods += 1;
            self.refused.insert(key);
            let header = VsockHeader::new(CID, key.guest, key.peer, Op::Request);
            self.put(header, &[], Layout::PLAIN);
        }
    }

    pub(super) fn write(&mut self, conn: u8, len: u16, part: u16, layout: Layout) {
        let Some(index) = self.ready(conn, State::Open) else {
            return;
        };
        if !self.conns[index].guest_may_write() {
            return;
        }
        let len = u32::from(len).min(self.conns[index].credit()) as usize;
        let (all_end, goes_on) = (part & 0x4000 != 0, part & 0x8000 != 0);
        let part = (usize::from(part) % MAX_PAYLOAD).max(len / 64) + 1;
        let mut left = len;
        while left > 0 && self.make_room() {
            let conn = &mut self.conns[index];
            let payload = conn.to_host.next(part.min(left).min(MAX_PAYLOAD));
            left -= payload.len();
            let ends = all_end || left == 0 && !goes_on;
            let ends = conn.count_sent(payload.len(), ends);
            self.send_payload(index, &payload, ends, layout);
        }
    }

    fn send_payload(&mut self, index: usize, payload: &[u8], ends: bool, layout: Layout) {
        let conn = &mut self.conns[index];
        let mut header = header(conn.key, Op::Rw);
        conn.give_credit(&mut header);
        header.len = payload.len() as u32;
        if ends {
            header.flags = MessageFlags::EOM.bits();
        }
        self.send(header, payload, layout);
    }

    /// The guest sends more than it has credit for. It takes all packets before, so that it knows its credit.
    pub(super) fn overrun(&mut self, conn: u8, more: u8) {
        if !self.sync() {
            return;
        }
        let Some(index) = self.ready(conn, State::Open) else {
            return;
        };
        let len = self.conns[index].credit() as usize + 1 + usize::from(more);
        if self.conns[index].guest_may_write() && len <= MAX_PAYLOAD {
            let conn = &mut self.conns[index];
            conn.overran = true;
            conn.abort();
            let payload = conn.to_host.next(len);
            self.send_payload(index, &payload, true, Layout::PLAIN);
        }
    }

    pub(super) fn update(&mut self, conn: u8, change: impl FnOnce(&mut Conn)) {
        if let Some(index) = self.ready(conn, State::Open) {
            change(&mut self.conns[index]);
            self.send_for(index, Op::CreditUpdate, |_| {});
        }
    }

    pub(super) fn shut(&mut self, conn: u8, flags: u8) {
        if let Some(index) = self.ready(conn, State::Open) {
            let flags = u32::from(flags);
            self.conns[index].guest_shutdown |= ShutdownFlags::from_bits_truncate(flags);
            self.send_for(index, Op::Shutdown, |header| header.flags = flags);
        }
    }

    pub(super) fn abort(&mut self, conn: u8) {
        if let Some(index) = self.ready(conn, State::Open) {
            self.reset(index);
        }
    }

    pub(super) fn ask_for_credit(&mut self, conn: u8) {
        if let Some(index) = self.ready(conn, State::Open) {
            self.send_for(index, Op::CreditRequest, |_| {});
        }
    }

    /// The guest sends a packet that is out of place and carries no byte of a stream.
    pub(super) fn send_garbage(&mut self, conn: Option<u8>, [cid, kind, op, len]: [u8; 4]) {
        if !self.make_room() {
            return;
        }
        let mut key = ConnKey {
            packet_type: PacketType::Stream,
            guest: GuestPort(99),
            peer: PeerAddr::host(2000 + u32::from(op)),
        };
        if let Some(index) = conn.and_then(|conn| usize::from(conn).checked_rem(self.conns.len())) {
            let conn = &self.conns[index];
            if !matches!(conn.state, State::Unknown | State::Asked) && conn.key.peer.port.0 > 0 {
                key = conn.key;
            }
        }
        let mut header = header(key, Op::from(u16::from(op) % 10));
        header.len = len.into();
        match cid % 4 {
            0 => header.guest_cid = Cid::from_raw(77),
            1 => header.peer.cid = Cid::from_raw(cid.into()),
            _ => {}
        }
        if kind.is_multiple_of(4) {
            header.packet_type = PacketType::from(u16::from(kind) / 4 + 2);
        }
        let is_known = matches!(
            header.packet_type,
            PacketType::Stream | PacketType::Seqpacket
        );
        if cid % 4 > 1 && is_known {
            // Other steps send requests and payload that are in order.
            match header.op {
                Op::Request => header.op = Op::Unknown(0),
                Op::Rw => header.len = 0,
                _ => {}
            }
        }
        if header.guest_cid == CID && is_known {
            let key = ConnKey::of(&header);
            for conn in self.conns.iter_mut().filter(|conn| conn.key == key) {
                conn.garble();
            }
        }
        self.send(header, &vec![0xee; header.len as usize], Layout::PLAIN);
    }

    pub(super) fn offer_malformed(&mut self, is_rx: bool, malformed: Malformed) {
        let ring = &mut self.rings[if is_rx { RX_RING } else { TX_RING }];
        if ring.has_room() {
            ring.offer_malformed(malformed);
            ring.kick();
        }
    }
}

// What it receives.
impl World<'_> {
    pub(super) fn offer(&mut self, buffers: u8, len: u16, layout: Layout) {
        let ring = &mut self.rings[RX_RING];
        for _ in 0..buffers {
            if ring.has_room() {
                let room = usize::from(len) % (MAX_PACKET - HEADER_LEN);
                ring.offer_buffer(layout, HEADER_LEN + 1 + room);
            }
        }
        ring.kick();
    }

    pub(super) fn offer_hollow(&mut self, buffers: u8, len: u16) {
        let ring = &mut self.rings[RX_RING];
        for _ in 0..buffers {
            if ring.has_room() {
                ring.offer_hollow_buffer(HEADER_LEN + 1 + usize::from(len) % MAX_PAYLOAD);
            }
        }
        ring.kick();
    }

    /// The driver asks for an interrupt, or for none.
    pub(super) fn arm(&mut self, wanted: bool) {
        self.owed = false;
        for (ring, armed) in self.rings.iter_mut().zip(&mut self.armed) {
            ring.ask_for_interrupt(wanted);
            *armed = wanted && !ring.has_returned();
        }
        for (armed, paused) in self.armed.iter_mut().zip(self.paused) {
            *armed &= !paused;
        }
    }

    /// The guest takes the chains that were returned to it, and the packets in them. False when there are none.
    pub(super) fn receive(&mut self) -> bool {
        let mut received = false;
        while let Some(returned) = self.rings[RX_RING].take() {
            received = true;
            assert_eq!(
                returned.is_sound,
                !returned.bytes.is_empty(),
                "sound buffers get packets, and others none"
            );
            if returned.is_sound {
                let (header, payload) = guest::packet(returned.bytes);
                self.receive_packet(&header, &payload);
            }
        }
        self.send_replies();
        received
    }

    /// The guest sends its answers, as far as there is room for them.
    pub(super) fn send_replies(&mut self) {
        while self.can_send()
            && let Some(reply) = self.replies.pop_front()
        {
            self.send(reply, &[], Layout::PLAIN);
        }
    }

    fn receive_packet(&mut self, header: &VsockHeader, payload: &[u8]) {
        assert_eq!(header.guest_cid, CID);
        let key = ConnKey::of(header);
        if header.op == Op::Rst {
            return self.receive_reset(header, key);
        }
        assert_eq!(key.peer.cid, Cid::HOST);
        let is_request = header.op == Op::Request;
        if is_departed(key) {
            return self.receive_departed(header, key);
        }
        let is_it = |conn: &Conn| match conn.state {
            State::Over => false,
            State::Unknown => {
                let theirs = (conn.key.guest, conn.key.packet_type);
                is_request && theirs == (key.guest, key.packet_type)
            }
            _ => conn.key == key,
        };
        let Some(index) = self.conns.iter().position(is_it) else {
            let is_late = self.conns.iter().any(|conn| conn.key == key);
            return assert!(
                is_late && !is_request,
                "a packet of no connection: {header:?}"
            );
        };
        let conn = &mut self.conns[index];
        conn.key = key;
        conn.receive(header, payload);
        assert!(conn.is_accepted, "nobody listens there: {conn:?}");
        let mut reply = self::header(key, Op::CreditUpdate);
        if header.op == Op::CreditRequest {
            conn.give_credit(&mut reply);
            self.replies.push_back(reply);
        } else if conn.sent_shutdown.is_all() && conn.state == State::Open {
            // It confirms.
            conn.end();
            reply.op = Op::Rst;
            self.replies.push_back(reply);
        }
    }

    /// Takes a packet of a connection whose host program was gone before it was known. The guest refuses every other one.
    fn receive_departed(&mut self, header: &VsockHeader, key: ConnKey) {
        let mut reply = self::header(key, Op::Rst);
        match header.op {
            Op::Request => {
                assert!(self.departed.insert(key), "requested twice: {header:?}");
                if key.guest.0.is_multiple_of(2) {
                    self.departed.remove(&key);
                } else {
                    reply.op = Op::Response;
                    reply.buf_alloc = 8192;
                }
            }
            Op::Shutdown if ShutdownFlags::from_bits_truncate(header.flags).is_all() => {
                self.departed.remove(&key);
            }
            Op::Shutdown | Op::CreditUpdate | Op::CreditRequest => return,
            _ => panic!("from nobody: {header:?}"),
        }
        self.replies.push_back(reply);
    }

    fn receive_reset(&mut self, header: &VsockHeader, key: ConnKey) {
        if key.peer == PeerAddr::host(NOBODY) {
            return assert!(self.refused.remove(&key), "reset twice: {header:?}");
        }
        if is_departed(key) {
            self.departed.remove(&key);
            return;
        }
        // One that answers a packet of another type is not about the connection.
        let is_it = |conn: &&mut Conn| {
            conn.key == key && !matches!(conn.state, State::Over | State::Unknown)
        };
        if let Some(conn) = self.conns.iter_mut().find(is_it) {
            let is_refused = conn.state == State::Asking && !conn.is_accepted;
            // A program that has gone before the answer, and has left no byte.
            let is_idle = conn.by_host && !conn.program_receives() && conn.to_guest.sent == 0;
            let is_too_long = conn.is_next_too_long();
            if is_too_long {
                // Perhaps before the guest has closed it.
                conn.promise = Promise::Prefix;
            }
            let is_due =
                is_refused || is_idle || conn.promise == Promise::Prefix || conn.guest_is_done();
            assert!(is_due, "reset without a reason: {conn:?}");
            conn.end();
        } else {
            // One for a message that is too long may have been on the way when the guest has ended it.
            let mut earlier = self.conns.iter_mut().filter(|conn| conn.key == key);
            if earlier.any(|conn| conn.is_next_too_long() && conn.may_be_reset_late()) {
                return;
            }
            let key = (key, header.packet_type.into());
            let allowed = self.resets.get_mut(&key).filter(|count| **count > 0);
            *allowed.unwrap_or_else(|| panic!("nothing is to be reset: {header:?}")) -= 1;
        }
    }
}

/// A packet of the guest's for the connection that this names.
fn header(key: ConnKey, op: Op) -> VsockHeader {
    VsockHeader {
        packet_type: key.packet_type,
        ..VsockHeader::new(CID, key.guest, key.peer, op)
    }
}

fn is_departed(key: ConnKey) -> bool {
    (FIRST_DEPARTED..FIRST_DEPARTED + MAX_DEPARTED).contains(&key.guest.0)
}
