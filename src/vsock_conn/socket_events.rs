//! What the events of a connection's socket do.

use std::net::Shutdown as Direction;

use super::dialing::Answer;
use super::mover::Flushed;
use super::state::State;
use super::{Verdict, VsockConnection};
use crate::metrics::counters::CloseReason;
use crate::packet::header::ShutdownFlags;
use crate::rxops::RxOps;

impl VsockConnection {
    /// The peer has the guest's REQUEST.
    pub(super) fn accept(&mut self) {
        self.state = State::Established;
        self.deadline = None;
        self.rx_queue.add(RxOps::Response);
    }

    /// Looks whether the peer has answered.
    pub(super) fn continue_dialing(&mut self) -> Verdict {
        let State::Dialing(dialing) = &mut self.state else {
            return Verdict::Open;
        };
        match dialing.poll(self.mover.socket()) {
            Answer::None => return Verdict::Open,
            Answer::Refused => return Verdict::Reset(CloseReason::Refused),
            Answer::Accepted => self.accept(),
        }
        Verdict::Open
    }

    /// Looks whether the host program has stopped receiving, which causes no event of its own. A socket with room seems to
    /// have got more, as when the program has read something; a full one has no event at all.
    pub(super) fn probe_receiver(&mut self) {
        // Behind the last byte it is we who have shut this direction down.
        let ours = self.shutdown.guest.contains(ShutdownFlags::SEND) && self.mover.buffered() == 0;
        if !ours && self.mover.peer_stopped_receiving() {
            self.stop_delivering();
        }
    }

    /// The host program receives no more, as a send has shown. If it has closed, and all that it sent was read, one SHUTDOWN says
    /// both.
    pub(super) fn receiver_closed(&mut self) {
        if !self.mover.socket().peer_closed() {
            return self.stop_delivering();
        }
        self.host_closed();
        if !self.mover.has_unread() {
            self.shutdown.host |= ShutdownFlags::SEND;
        }
    }

    /// The client has left before the guest has answered. Where the guest knows nothing of it, and nothing was written for it,
    /// it never will.
    pub(super) fn client_closed(&mut self) -> Verdict {
        self.client_left = true;
        if self.mover.has_unread() || self.known_to_guest() {
            Verdict::Open
        } else {
            Verdict::Close(CloseReason::HostGone)
        }
    }

    /// Both directions of the socket are over. What it holds can still be read.
    pub(super) fn host_closed(&mut self) {
        self.shutdown.host_closed = true;
        self.mover.set_readable();
        self.stop_delivering();
    }

    /// The host program receives no more: what comes for it is dropped from now on.
    pub(super) fn stop_delivering(&mut self) {
        self.shutdown.host |= ShutdownFlags::RECEIVE;
        self.credit.count_forwarded(self.mover.drop_buffered());
    }

    /// Sends what waits for the host program, and does what was to happen behind the last byte.
    pub(super) fn flush_buffered(&mut self) -> Verdict {
        let credit = &mut self.credit;
        match self.mover.flush(|sent| credit.count_forwarded(sent)) {
            Flushed::All => {}
            Flushed::Part => return Verdict::Open,
            Flushed::Closed => self.stop_delivering(),
            Flushed::Failed => return Verdict::Reset(CloseReason::HostGone),
        }
        if matches!(self.state, State::Flushing) {
            return Verdict::Reset(CloseReason::Done);
        }
        if self.shutdown.guest.contains(ShutdownFlags::SEND) {
            self.mover.socket().shutdown(Direction::Write);
        }
        Verdict::Open
    }
}
