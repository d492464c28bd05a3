//! RSTs that wait for a buffer of the guest's.

use std::collections::VecDeque;

use crate::host::socket::HostSocket;
use crate::packet::header::VsockHeader;

/// How many resets may wait. One more is dropped: a guest that provokes so many and takes none has lost its own.
pub(super) const MAX_RESETS: usize = 1024;

/// The RSTs, in order. Where one ends a connection, its host socket is closed only after the guest has got the RST: when the
/// host program sees the end, the guest's ports must be free.
#[derive(Debug, Default)]
pub(super) struct Resets {
    waiting: VecDeque<(VsockHeader, Option<HostSocket>)>,
    /// The sockets of those that are in the guest's buffers.
    sent: Vec<HostSocket>,
}

/// The reset was dropped: there are too many.
#[derive(Debug)]
pub(super) struct Dropped;

impl Resets {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn push(
        &mut self,
        header: VsockHeader,
        socket: Option<HostSocket>,
    ) -> Result<(), Dropped> {
        if self.waiting.len() >= MAX_RESETS {
            return Err(Dropped);
        }
        self.waiting.push_back((header, socket));
        Ok(())
    }

    /// The next one, which is in the guest's buffer from now on.
    pub(super) fn pop(&mut self) -> Option<VsockHeader> {
        let (header, socket) = self.waiting.pop_front()?;
        self.sent.extend(socket);
        Some(header)
    }

    /// Closes the sockets of the resets that were sent.
    pub(super) fn close_sent(&mut self) {
        self.sent.clear();
    }

    /// Closes all sockets: the guest takes no packets now, and the host programs must not wait for that.
    pub(super) fn close_waiting(&mut self) {
        for (_, socket) in &mut self.waiting {
            *socket = None;
        }
    }

    pub(super) fn clear(&mut self) {
        self.waiting.clear();
        self.sent.clear();
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }
}
