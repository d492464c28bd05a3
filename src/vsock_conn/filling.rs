//! Fills the guest's buffers with a connection's packets.

use std::time::Instant;

use super::mover::Filled;
use super::state::State;
use super::{CLOSE_TIMEOUT, Verdict, VsockConnection};
use crate::host::socket::ReceiveError;
use crate::metrics::counters::CloseReason;
use crate::packet::RxBatch;
use crate::packet::header::{MessageFlags, Op, ShutdownFlags, VsockHeader};

impl VsockConnection {
    pub(super) fn header(&self, op: Op) -> VsockHeader {
        VsockHeader {
            packet_type: self.key.packet_type,
            ..VsockHeader::new(self.guest_cid, self.key.guest, self.key.peer, op)
        }
    }

    pub(super) fn fill(&mut self, batch: &mut RxBatch<'_>, op: Op) -> Verdict {
        let mut header = self.header(op);
        self.credit.write_to(&mut header);
        batch.fill_header(&header);
        Verdict::Open
    }

    pub(super) fn fill_shutdown(&mut self, batch: &mut RxBatch<'_>) -> Verdict {
        if !self.shutdown.host_closed && self.shutdown.host == ShutdownFlags::RECEIVE {
            // A program that closes stops receiving an instant before it is seen to have closed.
            self.receiver_closed();
            if !self.shutdown.is_due() {
                return Verdict::Open;
            }
        }
        let mut header = self.header(Op::Shutdown);
        header.flags = self.shutdown.host.bits();
        self.credit.write_to(&mut header);
        batch.fill_header(&header);
        self.shutdown.sent = self.shutdown.host;
        if self.shutdown.sent.is_all() {
            self.state = State::Closing;
            self.deadline = Some(Instant::now() + CLOSE_TIMEOUT);
        }
        Verdict::Open
    }

    pub(super) fn fill_payload(&mut self, batch: &mut RxBatch<'_>) -> Verdict {
        match self.mover.receive(batch, self.credit.guest_window()) {
            Ok(Filled::End) => self.host_sends_no_more(),
            Ok(Filled::Nothing) => {}
            Ok(Filled::Bytes { bytes, ends }) => {
                let mut header = self.header(Op::Rw);
                self.credit.write_to(&mut header);
                self.credit.count_sent(bytes);
                let last = if ends {
                    MessageFlags::EOM
                } else {
                    MessageFlags::empty()
                };
                batch.fill(&header, bytes, last);
            }
            Ok(Filled::TooLong) => return Verdict::Reset(CloseReason::MessageTooLong),
            Err(ReceiveError::Empty) => {}
            Err(ReceiveError::Reset) => {
                self.host_closed();
                self.host_sends_no_more();
            }
            Err(ReceiveError::GuestMemory) => {
                // What the guest gets has a hole, but not what the host program gets.
                self.state = State::Flushing;
                self.rx_queue.clear();
                return Verdict::Reset(CloseReason::Protocol);
            }
            Err(ReceiveError::Failed(_)) => {
                return Verdict::Reset(CloseReason::HostGone);
            }
        }
        Verdict::Open
    }

    /// The host program's last byte was read. Whether it has closed or only stopped writing is asked, for the event that
    /// says so may not have come yet.
    pub(super) fn host_sends_no_more(&mut self) {
        self.shutdown.host |= ShutdownFlags::SEND;
        if !self.shutdown.host_closed && self.mover.socket().peer_closed() {
            self.shutdown.host_closed = true;
            self.stop_delivering();
        }
    }
}
