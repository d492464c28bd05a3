//! Moves the bytes of a stream between guest memory and the host's socket.
//!
//! *From the guest*, bytes are sent straight from guest memory. What the socket does not take is copied to the
//! [`LocalTxBuf`], which is flushed before anything newer is sent.
//!
//! *To the guest*, one receive fills as many of its buffers as the connection may fill at a time. How much that is adapts
//! to what came last.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use log::debug;
use serde::{Deserialize, Serialize};

use super::mover::{Delivered, Flushed, Wants};
use crate::host::socket::{HostSocket, ReceiveError, SendError};
use crate::packet::{Payload, RxBatch};
use crate::saved::{LoadError, Loader, SavedBytes, Saver};
use crate::txbuf::LocalTxBuf;

/// The least and the most that is received at a time, in bytes.
const RECEIVE_SIZE: (usize, usize) = (4 * 1024, 256 * 1024);

/// One receive fills at most this fraction of the guest's buffer. With much more, the stream becomes stop-and-wait: the guest's
/// program has nothing to read while the next batch is made, and we have no credit while it reads. Below the least of
/// [`RECEIVE_SIZE`] the fraction is not applied: Linux counts some 600 bytes of its own for each packet that waits to be
/// read, and resets a connection whose buffer can't hold these.
const WINDOW_FRACTION: usize = 4;

/// The most that is flushed at a time, in bytes: other connections get their turn in between.
const FLUSH_SIZE: usize = 256 * 1024;

/// A stream's socket and the bytes that wait for it.
#[derive(Debug)]
pub(super) struct StreamMover {
    socket: HostSocket,
    tx_buf: LocalTxBuf,
    /// The socket may have bytes: the last receive did not show otherwise.
    readable: bool,
    /// A short receive does not mean that the socket is drained: out-of-band data stops one, and the event for the end of
    /// the stream may have come together with the bytes before it. So receive until there is nothing.
    until_empty: bool,
    /// The socket may have room: the last send did not show otherwise.
    writable: bool,
    receive_size: usize,
}

/// What a [`StreamMover`] holds, in a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StreamState {
    /// From the guest.
    #[serde(default)]
    bytes: SavedBytes,
    #[serde(default)]
    receive_size: usize,
}

impl StreamMover {
    pub(super) fn save(&self, saver: &mut Saver<'_>) -> io::Result<StreamState> {
        Ok(StreamState {
            bytes: self.tx_buf.save(saver)?,
            receive_size: self.receive_size,
        })
    }

    /// For `socket`, whose state is to be seen anew.
    pub(super) fn load(
        state: &StreamState,
        socket: HostSocket,
        buf_alloc: u32,
        loader: &Loader,
    ) -> Result<Self, LoadError> {
        Ok(Self {
            tx_buf: LocalTxBuf::load(buf_alloc, state.bytes, loader)?,
            receive_size: state.receive_size.clamp(RECEIVE_SIZE.0, RECEIVE_SIZE.1),
            ..Self::new(socket, buf_alloc)
        })
    }

    pub(super) fn new(socket: HostSocket, buf_alloc: u32) -> Self {
        Self {
            socket,
            tx_buf: LocalTxBuf::new(buf_alloc),
            readable: true,
            // Events before it became a connection's socket were not seen here.
            until_empty: true,
            writable: true,
            receive_size: RECEIVE_SIZE.0,
        }
    }

    pub(super) fn socket(&self) -> &HostSocket {
        &self.socket
    }

    pub(super) fn into_socket(self) -> HostSocket {
        self.socket
    }

    /// How many bytes from the guest wait for the socket.
    pub(super) fn buffered(&self) -> usize {
        self.tx_buf.len()
    }

    /// Whether bytes wait although the socket may have room: there will be no event.
    pub(super) fn can_flush(&self) -> bool {
        self.writable && !self.tx_buf.is_empty()
    }

    pub(super) fn set_readable(&mut self) {
        self.readable = true;
    }

    pub(super) fn set_until_empty(&mut self) {
        self.until_empty = true;
    }

    pub(super) fn set_writable(&mut self) {
        self.writable = true;
    }

    /// Drops the bytes that wait, and returns how many they were.
    pub(super) fn drop_buffered(&mut self) -> usize {
        let dropped = self.tx_buf.len();
        self.tx_buf.clear();
        dropped
    }

    /// Sends bytes from the guest, and buffers what the socket does not take.
    pub(super) fn deliver(&mut self, payload: &Payload<'_>) -> Delivered {
        let len = payload.bytes();
        let mut sent = 0;
        if self.writable && self.tx_buf.is_empty() {
            match self.socket.send(payload) {
                Ok(count) => sent = count,
                Err(SendError::Full) => {}
                Err(SendError::Closed) => return Delivered::Closed,
                Err(SendError::Failed(error)) => {
                    debug!("can't send to the host program: {error}");
                    return Delivered::Failed;
                }
            }
            self.writable = sent == len;
        }
        let buffered = self.tx_buf.push(len - sent, |offset, place| {
            payload.copy_to(sent + offset, place);
        });
        // The guest's credit is the room in this buffer: it fails only where the system has no memory.
        if buffered {
            Delivered::Sent(sent)
        } else {
            Delivered::Failed
        }
    }

    /// Sends what is buffered, as far as the socket takes it now and a turn allows. `count` gets the numbers of bytes.
    pub(super) fn flush(&mut self, mut count: impl FnMut(usize)) -> Flushed {
        let mut limit = FLUSH_SIZE;
        while !self.tx_buf.is_empty() {
            if limit == 0 {
                return Flushed::Part;
            }
            let socket = &self.socket;
            match self.tx_buf.flush(limit, |slices| socket.send_bytes(slices)) {
                Ok(sent) => {
                    count(sent);
                    limit -= sent;
                }
                Err(SendError::Full) => {
                    self.writable = false;
                    return Flushed::Part;
                }
                Err(SendError::Closed) => return Flushed::Closed,
                Err(SendError::Failed(error)) => {
                    debug!("can't send to the host program: {error}");
                    return Flushed::Failed;
                }
            }
        }
        Flushed::All
    }

    /// What the next bytes need of a guest with `credit` left.
    pub(super) fn wants(&self, credit: usize) -> Wants {
        match (self.readable, credit) {
            (false, _) => Wants::Nothing,
            (true, 0) => Wants::Credit,
            (true, _) => Wants::Buffers,
        }
    }

    /// How many bytes to receive next for a guest with a buffer of `window` bytes and `credit` left.
    pub(super) fn receive_size(&self, window: usize, credit: usize) -> usize {
        let batch = (window / WINDOW_FRACTION).max(RECEIVE_SIZE.0);
        self.receive_size.min(batch).min(credit)
    }

    /// Whether the last receives have brought more than messages do.
    pub(super) fn receives_much(&self) -> bool {
        self.receive_size > 4 * RECEIVE_SIZE.0
    }

    /// Receives into the guest's buffers, and returns how many bytes; 0 at the end of the stream.
    pub(super) fn receive(&mut self, batch: &RxBatch<'_>) -> Result<usize, ReceiveError> {
        let received = match self.socket.receive(batch) {
            Ok(received) => received,
            Err(error) => {
                match &error {
                    ReceiveError::Empty => {
                        self.readable = false;
                        self.until_empty = false;
                    }
                    ReceiveError::Failed(error) => {
                        debug!("can't receive from the host program: {error}");
                    }
                    ReceiveError::Reset | ReceiveError::GuestMemory => {}
                }
                return Err(error);
            }
        };
        let bytes = received.bytes;
        if bytes == 0 {
            self.readable = false;
            return Ok(0);
        }
        let next = if bytes == batch.capacity() {
            4 * bytes
        } else {
            2 * bytes
        };
        self.receive_size = next.clamp(RECEIVE_SIZE.0, RECEIVE_SIZE.1);
        self.readable = !received.drained || self.until_empty;
        Ok(bytes)
    }
}

impl AsFd for StreamMover {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
