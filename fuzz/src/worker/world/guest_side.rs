//! The guest's side: what it sends and receives.

use vhost_user_vsock::packet::header::{
    Cid, GuestPort, HEADER_LEN, HOST_CID, HostPort, Op, SHUTDOWN_BOTH, TYPE_STREAM, VsockHeader,
};
use vhost_user_vsock::vhost_user_vsock_thread::{RX_RING, TX_RING};
use vhost_user_vsock::vsock_conn::ConnKey;

use super::super::super::guest::{self, MAX_PAYLOAD};
use super::super::super::ring::{Layout, MAX_PACKET, Nonsense};
use super::super::end::{End, Promise, State};
use super::{CID, PORTS, World};

impl World<'_> {
    // What it sends.

    pub(super) fn can_send_now(&self) -> bool {
        self.rings[TX_RING].has_room()
    }

    pub(super) fn can_send(&mut self) -> bool {
        if !self.can_send_now() {
            self.run();
        }
        self.can_send_now()
    }

    pub(super) fn send(&mut self, header: VsockHeader, payload: &[u8], layout: Layout) {
        if header.op != Op::Rst as u16 {
            *self.resets.entry(ConnKey::of(&header)).or_default() += 1;
        }
        self.sent += 1;
        let ring = &mut self.rings[TX_RING];
        ring.offer(layout, &guest::bytes(&header, payload));
        ring.kick();
    }

    /// Sends a packet of this connection; `change` puts into it what is special.
    pub(super) fn say(&mut self, index: usize, op: Op, change: impl FnOnce(&mut VsockHeader)) {
        let end = &mut self.ends[index];
        let mut header = VsockHeader::to_guest(CID, end.key.guest, end.key.host, op);
        end.say(&mut header);
        change(&mut header);
        self.send(header, &[], Layout::PLAIN);
    }

    /// The index of this connection, if the guest can send for it and it is in this state.
    fn ready(&mut self, end: u8, state: State) -> Option<usize> {
        let index = usize::from(end).checked_rem(self.ends.len())?;
        (self.can_send() && self.ends[index].state == state).then_some(index)
    }

    pub(super) fn answer(&mut self, end: u8, accept: bool) {
        let Some(index) = self.ready(end, State::Asked) else {
            return;
        };
        if accept {
            self.ends[index].state = State::Open;
            self.say(index, Op::Response, |_| {});
        } else {
            self.ends[index].end();
            self.ends[index].taint();
            self.say(index, Op::Rst, |_| {});
        }
    }

    pub(super) fn request(&mut self, port: u8, guest_port: u8) {
        let key = ConnKey {
            guest: GuestPort(1 + u32::from(guest_port % 8)),
            host: HostPort(1 + u32::from(port % PORTS)),
        };
        let is_live = |end: &End| end.key == key && end.state != State::Over;
        let was_used = self.resets.contains_key(&key);
        if self.ends.iter().any(is_live) || !self.can_send() || (was_used && !self.sync()) {
            return;
        }
        let number = self.ends.len() as u32;
        self.asking.push_back((self.ends.len(), self.sent));
        self.ends
            .push(End::new(number, key, State::Asking, self.window));
        self.say(self.ends.len() - 1, Op::Request, |_| {});
    }

    pub(super) fn write(&mut self, end: u8, len: u16, part: u16, layout: Layout) {
        let Some(index) = self.ready(end, State::Open) else {
            return;
        };
        if !self.ends[index].guest_may_write() {
            return;
        }
        let len = u32::from(len).min(self.ends[index].room()) as usize;
        let part = (usize::from(part) % MAX_PAYLOAD).max(len / 64) + 1;
        let mut left = len;
        while left > 0 && self.can_send() {
            let end = &mut self.ends[index];
            let payload = end.to_host.next(part.min(left).min(MAX_PAYLOAD));
            end.to_host.sent += payload.len() as u32;
            left -= payload.len();
            self.say_payload(index, &payload, layout);
        }
    }

    fn say_payload(&mut self, index: usize, payload: &[u8], layout: Layout) {
        let end = &mut self.ends[index];
        let mut header = VsockHeader::to_guest(CID, end.key.guest, end.key.host, Op::Rw);
        end.say(&mut header);
        header.len = payload.len() as u32;
        self.send(header, payload, layout);
    }

    /// The guest sends more than it may. What it may depends on what it has heard, so that it hears everything before.
    pub(super) fn overrun(&mut self, end: u8, more: u8) {
        if !self.sync() {
            return;
        }
        let Some(index) = self.ready(end, State::Open) else {
            return;
        };
        let len = self.ends[index].room() as usize + 1 + usize::from(more);
        if self.ends[index].guest_may_write() && len <= MAX_PAYLOAD {
            let end = &mut self.ends[index];
            end.overran = true;
            end.taint();
            let payload = end.to_host.next(len);
            self.say_payload(index, &payload, Layout::PLAIN);
        }
    }

    pub(super) fn update(&mut self, end: u8, change: impl FnOnce(&mut End)) {
        if let Some(index) = self.ready(end, State::Open) {
            change(&mut self.ends[index]);
            self.say(index, Op::CreditUpdate, |_| {});
        }
    }

    pub(super) fn shut(&mut self, end: u8, flags: u8) {
        if let Some(index) = self.ready(end, State::Open) {
            let flags = u32::from(flags);
            self.ends[index].guest_shutdown |= flags & SHUTDOWN_BOTH;
            self.say(index, Op::Shutdown, |header| header.flags = flags);
        }
    }

    pub(super) fn abort(&mut self, end: u8) {
        if let Some(index) = self.ready(end, State::Open) {
            self.ends[index].end();
            self.ends[index].taint();
            self.say(index, Op::Rst, |_| {});
        }
    }

    pub(super) fn ask(&mut self, end: u8) {
        if let Some(index) = self.ready(end, State::Open) {
            self.say(index, Op::CreditRequest, |_| {});
        }
    }

    /// The guest sends a packet that is not in order, but carries no byte of a stream.
    pub(super) fn guest_babbles(&mut self, end: Option<u8>, [cid, kind, op, len]: [u8; 4]) {
        if !self.can_send() {
            return;
        }
        let mut key = ConnKey {
            guest: GuestPort(99),
            host: HostPort(2000 + u32::from(op)),
        };
        if let Some(index) = end.and_then(|end| usize::from(end).checked_rem(self.ends.len())) {
            let end = &self.ends[index];
            if !matches!(end.state, State::Unknown | State::Asked) && end.key.host.0 > 0 {
                key = end.key;
            }
        }
        let op = u16::from(op) % 10;
        let is_ours = cid % 4 > 1 && kind % 4 > 0;
        // A request or payload in order would be what the other steps do.
        let op = if is_ours && op == Op::Request as u16 {
            0
        } else {
            op
        };
        let len = if is_ours && op == Op::Rw as u16 {
            0
        } else {
            usize::from(len)
        };
        let mut header = VsockHeader::to_guest(CID, key.guest, key.host, Op::Rw);
        header.op = op;
        header.len = len as u32;
        match cid % 4 {
            0 => header.guest_cid = Cid(77),
            1 => header.host_cid = Cid(u64::from(cid)),
            _ => {}
        }
        if kind.is_multiple_of(4) {
            header.kind = u16::from(kind) / 4 + 2;
        }
        if header.guest_cid == CID {
            self.ends
                .iter_mut()
                .filter(|end| end.key == key)
                .for_each(End::taint);
        }
        self.send(header, &vec![0xee; len], Layout::PLAIN);
    }

    pub(super) fn offer_nonsense(&mut self, is_rx: bool, nonsense: Nonsense) {
        let ring = &mut self.rings[if is_rx { RX_RING } else { TX_RING }];
        if ring.has_room() {
            ring.offer_nonsense(nonsense);
            ring.kick();
        }
    }

    // What it receives.

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

    /// The driver asks for an interrupt, or for none.
    pub(super) fn arm(&mut self, wanted: bool) {
        for (ring, armed) in self.rings.iter_mut().zip(&mut self.armed) {
            ring.ask_for_interrupt(wanted);
            *armed = wanted && !ring.has_returned();
        }
        for (armed, paused) in self.armed.iter_mut().zip(self.paused) {
            *armed &= !paused;
        }
    }

    /// The guest takes the packets that are there. True when there was one.
    pub(super) fn receive(&mut self) -> bool {
        let mut received = false;
        while let Some(returned) = self.rings[RX_RING].take() {
            assert_eq!(
                returned.is_sound,
                !returned.bytes.is_empty(),
                "which buffers get packets"
            );
            if returned.is_sound {
                let (header, payload) = guest::packet(returned.bytes);
                self.receive_packet(&header, &payload);
                received = true;
            }
        }
        self.send_replies();
        received
    }

    /// The guest sends its answers, as far as there is room for them.
    pub(super) fn send_replies(&mut self) {
        while self.can_send_now()
            && let Some(reply) = self.replies.pop_front()
        {
            self.send(reply, &[], Layout::PLAIN);
        }
    }

    fn receive_packet(&mut self, header: &VsockHeader, payload: &[u8]) {
        assert_eq!(header.guest_cid, CID);
        let key = ConnKey::of(header);
        if header.op == Op::Rst as u16 {
            return self.receive_reset(header, key);
        }
        assert_eq!((header.host_cid, header.kind), (HOST_CID, TYPE_STREAM));
        let is_request = header.op == Op::Request as u16;
        let is_it = |end: &End| match end.state {
            State::Over => false,
            State::Unknown => is_request && end.key.guest == key.guest,
            _ => end.key == key,
        };
        let Some(index) = self.ends.iter().position(is_it) else {
            let is_late = self.ends.iter().any(|end| end.key == key);
            return assert!(
                is_late && !is_request,
                "a packet of no connection: {header:?}"
            );
        };
        let end = &mut self.ends[index];
        end.key = key;
        end.receive(header, payload);
        assert!(end.is_accepted, "nobody listens there: {end:?}");
        let mut reply = VsockHeader::to_guest(CID, key.guest, key.host, Op::CreditUpdate);
        if header.op == Op::CreditRequest as u16 {
            end.say(&mut reply);
            self.replies.push_back(reply);
        } else if end.told_shutdown == SHUTDOWN_BOTH && end.state == State::Open {
            // It confirms.
            end.end();
            reply.op = Op::Rst as u16;
            self.replies.push_back(reply);
        }
    }

    fn receive_reset(&mut self, header: &VsockHeader, key: ConnKey) {
        // What answers a packet of another type or to another machine is not about the connection.
        let is_stream = (header.host_cid, header.kind) == (HOST_CID, TYPE_STREAM);
        let is_live = |end: &&mut End| {
            is_stream && end.key == key && !matches!(end.state, State::Over | State::Unknown)
        };
        if let Some(end) = self.ends.iter_mut().find(is_live) {
            let is_refused = end.state == State::Asking && !end.is_accepted;
            // A program that has gone before the answer, and has left no byte.
            let is_idle = end.by_host && end.is_deaf() && end.to_guest.sent == 0;
            let is_due =
                is_refused || is_idle || end.promise == Promise::Prefix || end.guest_is_done();
            assert!(is_due, "reset without a reason: {end:?}");
            end.end();
        } else {
            let allowed = self.resets.get_mut(&key).filter(|count| **count > 0);
            *allowed.unwrap_or_else(|| panic!("a reset that nobody asked for: {header:?}")) -= 1;
        }
    }
}
