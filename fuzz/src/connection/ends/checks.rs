//! What the guest receives, and what has come of everything in the end.

use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, recv};
use vhost_user_vsock::metrics::counters::CloseReason;
use vhost_user_vsock::packet::header::{MessageFlags, Op, ShutdownFlags, VsockHeader};
use vhost_user_vsock::vsock_conn::{ConnKey, Verdict};

use super::super::super::guest::MAX_BATCH;
use super::super::super::ring::Layout;
use super::super::super::shutdown::Ended;
use super::super::Opening;
use super::{CID, Ends, MAX_SOCKET, SCRATCH};

// What the guest receives.
impl Ends<'_> {
    /// The guest takes what is pending for it, in batches of so many buffers. False when there is nothing.
    pub(in super::super) fn guest_receives(&mut self, buffers: usize, layout: Layout) -> bool {
        let buffers = 1 + buffers % MAX_BATCH;
        let mut received = false;
        let mut without_payload = 0;
        while !self.is_lingering
            && let Some(conn) = &mut self.conn
            && let Some(size) = conn.rx_size()
        {
            let (verdict, packets) = self
                .guest
                .receive(size, buffers, layout, |batch| conn.recv_pkt(batch));
            let has_payload = packets.iter().any(|(header, _)| header.len > 0);
            without_payload = if has_payload { 0 } else { without_payload + 1 };
            assert!(without_payload < 10 + self.empty, "packets without end");
            if verdict != Verdict::Open {
                assert_eq!(verdict, Verdict::Reset(CloseReason::MessageTooLong));
                assert!(self.is_next_too_long() && packets.is_empty());
                self.settle_verdict(verdict);
                break;
            }
            assert!(size <= self.guest_credit(), "no credit for {size} bytes");
            for (header, payload) in packets {
                received = true;
                self.check_packet(&header, &payload);
            }
        }
        received
    }

    /// Whether the program's next message, or one that the guest has got a part of, can't fit its buffer.
    fn is_next_too_long(&self) -> bool {
        let len = self.guest_borders.next_message();
        self.has_messages() && len.is_some_and(|len| len > self.guest_window)
    }

    fn check_packet(&mut self, header: &VsockHeader, payload: &[u8]) {
        assert_eq!((header.guest_cid, ConnKey::of(header)), (CID, self.key));
        assert_eq!(header.buf_alloc, self.window);
        self.check_forwarded(header.fwd_cnt);
        assert!(!self.sent_shutdown.is_all() || header.op == Op::CreditUpdate);
        match header.op {
            Op::Request => {
                assert!(self.opening == Opening::Requested && !self.is_established);
                assert!(!std::mem::replace(&mut self.has_request, true));
            }
            Op::Response => {
                assert!(self.opening != Opening::Requested && self.is_established);
                assert!(!std::mem::replace(&mut self.has_response, true));
            }
            Op::Rw => self.check_payload(header, payload),
            Op::Shutdown => self.check_shutdown(header),
            Op::CreditRequest => assert!(self.is_established),
            Op::CreditUpdate => assert!(self.is_established || self.has_request),
            Op::Rst | Op::Unknown(_) => panic!("a connection does not send {header:?}"),
        }
        assert!(header.op == Op::Rw || payload.is_empty());
    }

    /// What is said to have left the buffer is what the program has, or what its socket holds.
    fn check_forwarded(&mut self, forwarded: u32) {
        assert!(
            (self.forwarded..=self.to_host.sent).contains(&forwarded),
            "{forwarded} of {}",
            self.to_host.sent
        );
        self.forwarded = forwarded;
        if self.has_messages() {
            return self.check_forwarded_messages();
        }
        let Some(program) = self.program.as_ref().filter(|_| self.program_receives()) else {
            return;
        };
        let unread = SCRATCH.with_borrow_mut(|scratch| {
            recv(program.as_raw_fd(), scratch, MsgFlags::MSG_PEEK).unwrap_or(0)
        });
        let unread = unread - self.ok.len().min(unread);
        assert_eq!(forwarded as usize, self.to_host.received as usize + unread);
    }

    /// What has left the buffer is whole messages, and one that will have no end.
    fn check_forwarded_messages(&self) {
        if !self.program_receives() {
            return;
        }
        assert!(
            self.to_host.received <= self.forwarded,
            "{:?}",
            self.to_host
        );
        let has_end = self.guest_shutdown.contains(ShutdownFlags::SEND);
        assert!(
            self.host_borders
                .may_have_left(self.forwarded, self.to_host.sent, has_end),
            "{} bytes are no whole messages: {:?}",
            self.forwarded,
            self.host_borders
        );
    }

    fn check_payload(&mut self, header: &VsockHeader, payload: &[u8]) {
        assert!(self.is_established && !payload.is_empty());
        assert!(payload.len() <= self.guest_credit());
        assert!(!self.guest_shutdown.contains(ShutdownFlags::RECEIVE));
        assert!(!self.sent_shutdown.contains(ShutdownFlags::SEND));
        if !self.has_messages() {
            assert_eq!(header.flags, 0);
            return self.to_guest.check(payload);
        }
        self.to_guest.check(payload);
        let is_last = header.flags == MessageFlags::EOM.bits();
        assert!(is_last || header.flags == 0);
        self.guest_borders
            .check_part(self.to_guest.received, is_last);
    }

    fn check_shutdown(&mut self, header: &VsockHeader) {
        let ended = Ended {
            by_guest: self.guest_shutdown,
            by_program: self.program_shutdown,
            sent: self.sent_shutdown,
        };
        self.sent_shutdown = ended.check(header, self.to_guest.is_complete());
    }
}

// The end.
impl Ends<'_> {
    /// Both sides take what there is, and the guest has a large buffer, until nothing happens any more. Then everything that
    /// was promised has come.
    pub(in super::super) fn settle(&mut self) {
        self.guest_receives(MAX_BATCH - 1, Layout::PLAIN);
        if self.opening == Opening::Requested && !self.is_established && !self.is_over {
            self.guest_sends(Op::Response);
        }
        loop {
            let mut progress = self.events() | self.flush();
            progress |= self.guest_receives(MAX_BATCH - 1, Layout::PLAIN);
            while self.program_reads(MAX_SOCKET) {
                progress = true;
            }
            let answer = self.unwritten_answer().len();
            progress |= answer > 0 && self.program_writes(answer);
            let window = 1 << 16;
            if !self.is_over && (self.taken, self.guest_window) != (self.to_guest.received, window)
            {
                (self.taken, self.guest_window) = (self.to_guest.received, window);
                self.guest_sends(Op::CreditUpdate);
                progress = true;
            }
            if !progress {
                break;
            }
        }
        self.check_delivered();
        if !self.is_over && !self.is_lingering {
            self.check_open();
        }
    }

    /// The program has what the guest has sent to it.
    fn check_delivered(&self) {
        let is_done = self.guest_shutdown.is_all();
        if !self.program_receives() || (self.is_over && !is_done) {
            return;
        }
        assert_eq!(
            self.to_host.received,
            self.to_host.sent - self.unfinished(),
            "bytes of the guest's are lost"
        );
        assert!(!self.has_messages() || self.host_borders.is_complete());
        let has_ended = self.is_over || self.guest_shutdown.contains(ShutdownFlags::SEND);
        assert_eq!(self.program_sees_end(), has_ended);
    }

    /// What holds of a connection that goes on.
    fn check_open(&self) {
        assert!(self.is_established, "it still waits for an answer");
        assert!(self.opening == Opening::Requested || self.has_response);
        assert!(self.ok.is_empty() || !self.program_receives(), "no OK");
        assert!(
            !self.guest_shutdown.is_all(),
            "there is nothing more to wait for"
        );
        let window = self.window.min(self.guest_window);
        let left = window.saturating_sub(self.to_host.sent - self.forwarded);
        assert!(
            left >= (window / 2).max(1)
                || self.forwarded >= self.to_host.sent - self.unfinished()
                || !self.program_receives(),
            "the guest does not know what it may send"
        );
        if !self.guest_shutdown.contains(ShutdownFlags::RECEIVE) {
            assert!(
                self.to_guest.is_complete(),
                "bytes of the program's are lost: {:?}",
                self.to_guest
            );
            assert_eq!(
                self.sent_shutdown & ShutdownFlags::SEND,
                self.program_shutdown & ShutdownFlags::SEND,
                "the guest does not know whether the program still sends"
            );
        }
        if self.program.is_none() {
            assert!(self.sent_shutdown.is_all(), "the program is gone");
        }
    }
}
