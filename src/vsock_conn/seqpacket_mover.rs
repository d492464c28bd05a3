//! Moves messages between guest memory and the host's SOCK_SEQPACKET socket (virtio 1.2, 5.10.6.5).
//!
//! A message is delivered whole or not at all, and never together with another. On the rings it is one or more RW packets, the
//! last of which has the flag EOM; at the socket it is one send or receive.
//!
//! *From the guest*, a whole message that lies in the TX ring is sent straight from guest memory: a batch that would end within
//! it leaves it to the next. One that comes in pieces, or that the socket does not take, is copied to the [`LocalTxBuf`], with its
//! length beside it.
//!
//! *To the guest*, a message is measured before it is received: the guest gives credit back only for whole messages, so one that is
//! longer than its buffer can't arrive. It is received straight into the guest's buffers where these, and the credit, hold it.
//! Otherwise it is kept here, and leaves in as many packets as it takes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use log::debug;
use serde::{Deserialize, Serialize};

use super::mover::{Delivered, Filled, Flushed, Wants};
use crate::host::socket::{HostSocket, ReceiveError, SendError};
use crate::packet::{Payload, RxBatch, TxBatch, VsockPacket};
use crate::saved::{LoadError, Loader, SavedBytes, Saver};
use crate::txbuf::LocalTxBuf;

/// The most bytes of a message that the guest's buffers take at a time.
const RECEIVE_SIZE: usize = 256 * 1024;

/// A message from which on its bytes count as a stream's.
const LARGE: usize = 16 * 1024;

/// The most messages, and the most bytes, that are flushed at a time: other connections get their turn in between.
const FLUSH_MESSAGES: usize = 64;
const FLUSH_SIZE: usize = 256 * 1024;

/// For how many waiting messages memory is kept.
const KEPT_LENGTHS: usize = 256;

/// The next message of the host program.
#[derive(Debug, Default)]
enum Next {
    /// Its length was not asked yet.
    #[default]
    Unknown,
    /// It has so many bytes, and is in the socket.
    Measured(usize),
    /// It was received; `sent` bytes of it were given to the guest.
    Kept { bytes: Vec<u8>, sent: usize },
}

/// A socket of messages, and the messages that wait on either side of it.
#[derive(Debug)]
pub(super) struct SeqpacketMover {
    socket: HostSocket,
    /// Messages from the guest: whole ones, and the beginning of one.
    tx_buf: LocalTxBuf,
    /// The lengths of the whole ones, in order.
    lengths: VecDeque<u32>,
    /// How many bytes there are of the one that is not whole.
    unfinished: usize,
    limit: usize,
    next: Next,
    /// The socket may have a message: the last look did not show otherwise.
    readable: bool,
    /// The socket may have room: the last send did not show otherwise.
    writable: bool,
}

/// What a [`SeqpacketMover`] holds, in a document.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct MessagesState {
    /// From the guest: whole messages, and the beginning of one.
    bytes: SavedBytes,
    lengths: VecDeque<u32>,
    unfinished: u32,
    /// For the guest. One that is in the socket is measured again.
    kept: Option<KeptState>,
}

/// A message for the guest that is no longer in the socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KeptState {
    bytes: SavedBytes,
    sent: usize,
}

impl KeptState {
    fn load(&self, loader: &Loader) -> Result<Next, LoadError> {
        if self.sent as u64 >= self.bytes.len() {
            return Err(LoadError::Invalid("a message of which nothing is left"));
        }
        Ok(Next::Kept {
            bytes: loader.read(self.bytes)?,
            sent: self.sent,
        })
    }
}

impl SeqpacketMover {
    pub(super) fn save(&self, saver: &mut Saver<'_>) -> io::Result<MessagesState> {
        let kept = match &self.next {
            Next::Unknown | Next::Measured(_) => None,
            Next::Kept { bytes, sent } => Some(KeptState {
                bytes: saver.bytes(&[bytes])?,
                sent: *sent,
            }),
        };
        Ok(MessagesState {
            bytes: self.tx_buf.save(saver)?,
            lengths: self.lengths.clone(),
            unfinished: self.unfinished as u32,
            kept,
        })
    }

    /// For `socket`, whose state is to be seen anew.
    pub(super) fn load(
        state: MessagesState,
        socket: HostSocket,
        buf_alloc: u32,
        loader: &Loader,
    ) -> Result<Self, LoadError> {
        let lengths = state.lengths.iter().copied().map(u64::from);
        let sum = lengths.sum::<u64>() + u64::from(state.unfinished);
        if sum != state.bytes.len() || state.lengths.contains(&0) {
            return Err(LoadError::Invalid("messages of other lengths"));
        }
        let kept = state.kept.map(|kept| kept.load(loader)).transpose()?;
        Ok(Self {
            tx_buf: LocalTxBuf::load(buf_alloc, state.bytes, loader)?,
            lengths: state.lengths,
            unfinished: state.unfinished as usize,
            next: kept.unwrap_or_default(),
            ..Self::new(socket, buf_alloc)
        })
    }

    pub(super) fn new(socket: HostSocket, buf_alloc: u32) -> Self {
        Self {
            socket,
            tx_buf: LocalTxBuf::new(buf_alloc),
            lengths: VecDeque::new(),
            unfinished: 0,
            limit: buf_alloc as usize,
            next: Next::Unknown,
            readable: true,
            writable: true,
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

    /// How many whole messages wait for the socket.
    pub(super) fn messages(&self) -> usize {
        self.lengths.len()
    }

    /// Whether messages wait although the socket may have room: there will be no event.
    pub(super) fn can_flush(&self) -> bool {
        self.writable && !self.lengths.is_empty()
    }

    pub(super) fn set_readable(&mut self) {
        self.readable = true;
    }

    pub(super) fn set_writable(&mut self) {
        self.writable = true;
    }

    /// Drops the messages that wait, and returns how many bytes they had.
    pub(super) fn drop_buffered(&mut self) -> usize {
        let dropped = self.tx_buf.len();
        self.tx_buf.clear();
        self.lengths = VecDeque::new();
        self.unfinished = 0;
        dropped
    }

    /// Drops what there is of a message whose end will not come, and returns how many bytes that is.
    pub(super) fn drop_unfinished(&mut self) -> usize {
        let dropped = std::mem::take(&mut self.unfinished);
        self.tx_buf.truncate(self.tx_buf.len() - dropped);
        dropped
    }

    /// Sends the messages in consecutive RW packets of `batch`, and buffers what is not whole or not taken.
    pub(super) fn deliver(&mut self, batch: &TxBatch<'_>, packets: &[VsockPacket]) -> Delivered {
        let mut sent = 0;
        let mut rest = packets;
        while !rest.is_empty() {
            let end = rest
                .iter()
                .position(|packet| packet.header().ends_message());
            let (pieces, after) = rest.split_at(end.map_or(rest.len(), |end| end + 1));
            // One that came in pieces leaves first, so that those behind it need not be copied.
            if self.writable && self.lengths.len() == 1 && self.unfinished == 0 {
                match self.flush(|bytes| sent += bytes) {
                    Flushed::All | Flushed::Part => {}
                    Flushed::Closed => return Delivered::Closed,
                    Flushed::Failed => return Delivered::Failed,
                }
            }
            match self.deliver_pieces(&batch.payload(pieces), end.is_some()) {
                Delivered::Sent(bytes) => sent += bytes,
                failed => return failed,
            }
            rest = after;
        }
        Delivered::Sent(sent)
    }

    /// Takes the next pieces of a message, with its end or without.
    fn deliver_pieces(&mut self, pieces: &Payload<'_>, ends: bool) -> Delivered {
        let len = pieces.bytes();
        let is_next = self.tx_buf.is_empty() && self.writable;
        if ends && len > 0 && is_next && pieces.fits_one_send() {
            match self.socket.send(pieces) {
                Ok(_) => return Delivered::Sent(len),
                Err(SendError::Full) => self.writable = false,
                Err(SendError::Closed) => return Delivered::Closed,
                Err(SendError::Failed(error)) => {
                    debug!("can't send a message of {len} bytes to the host program: {error}");
                    return Delivered::Failed;
                }
            }
        }
        // The guest's credit is the room in this buffer: it fails only where the system has no memory.
        if self.lengths.try_reserve(1).is_err()
            || !self
                .tx_buf
                .push(len, |offset, place| pieces.copy_to(offset, place))
        {
            return Delivered::Failed;
        }
        self.unfinished += len;
        if !ends {
            // With all of its credit in use, the guest can't send the rest of the message.
            return if self.unfinished < self.limit {
                Delivered::Sent(0)
            } else {
                Delivered::TooLong
            };
        }
        // There are no messages of no bytes.
        if self.unfinished > 0 {
            self.lengths.push_back(self.unfinished as u32);
        }
        self.unfinished = 0;
        Delivered::Sent(0)
    }

    /// Sends what is buffered, as far as the socket takes it now and a turn allows. `count` gets the numbers of bytes.
    pub(super) fn flush(&mut self, mut count: impl FnMut(usize)) -> Flushed {
        let mut bytes = 0;
        for _ in 0..FLUSH_MESSAGES {
            let Some(&len) = self.lengths.front() else {
                self.lengths.shrink_to(KEPT_LENGTHS);
                return Flushed::All;
            };
            if bytes >= FLUSH_SIZE {
                return Flushed::Part;
            }
            let socket = &self.socket;
            let sent = self
                .tx_buf
                .flush(len as usize, |slices| socket.send_bytes(slices));
            match sent {
                Ok(sent) => {
                    self.lengths.pop_front();
                    count(sent);
                    bytes += sent;
                }
                Err(SendError::Full) => {
                    self.writable = false;
                    return Flushed::Part;
                }
                Err(SendError::Closed) => return Flushed::Closed,
                Err(SendError::Failed(error)) => {
                    debug!("can't send a message of {len} bytes to the host program: {error}");
                    return Flushed::Failed;
                }
            }
        }
        if self.lengths.is_empty() {
            Flushed::All
        } else {
            Flushed::Part
        }
    }

    /// What the next message needs of a guest with a buffer of `window` bytes and `credit` left. Measures it if need be.
    pub(super) fn wants(&mut self, window: usize, credit: usize) -> Wants {
        if matches!(self.next, Next::Unknown) {
            if !self.readable {
                return Wants::Nothing;
            }
            match self.socket.next_message() {
                Ok(Some(len)) => self.next = Next::Measured(len),
                Ok(None) => {
                    self.readable = false;
                    return Wants::End;
                }
                Err(error) => return self.no_message(&error),
            }
        }
        // One that can't arrive is refused when its turn comes. A guest may report credit only when less than half of its buffer is
        // left to us, so a longer message is not held back for more than that.
        let enough = self.left().min((window / 2).max(1));
        if self.too_long(window).is_some() || credit >= enough {
            Wants::Buffers
        } else {
            Wants::Credit
        }
    }

    fn no_message(&mut self, error: &ReceiveError) -> Wants {
        self.readable = false;
        match error {
            ReceiveError::Empty => Wants::Nothing,
            ReceiveError::Reset => Wants::Reset,
            ReceiveError::GuestMemory | ReceiveError::Failed(_) => Wants::Failed,
        }
    }

    /// Takes the next message, which has `len` bytes, out of the socket.
    fn keep(&mut self, len: usize) -> Result<(), ReceiveError> {
        let (bytes, _) = self.socket.take_message(len)?;
        self.next = Next::Kept { bytes, sent: 0 };
        Ok(())
    }

    /// How many bytes of the next message the guest has not got.
    fn left(&self) -> usize {
        match &self.next {
            Next::Unknown => 0,
            Next::Measured(len) => *len,
            Next::Kept { bytes, sent } => bytes.len() - sent,
        }
    }

    /// How many bytes the next buffers of a guest with `credit` left are to hold.
    pub(super) fn receive_size(&self, credit: usize) -> usize {
        self.left().min(RECEIVE_SIZE).min(credit)
    }

    /// The length of a next message that a guest with a buffer of `window` bytes can't receive.
    pub(super) fn too_long(&self, window: usize) -> Option<usize> {
        match self.next {
            Next::Measured(len) if len > window => Some(len),
            _ => None,
        }
    }

    /// Whether the next message is a large one.
    pub(super) fn receives_much(&self) -> bool {
        self.left() > LARGE
    }

    /// Puts the next message into the guest's buffers, or as much of it as they hold. The guest has a buffer of `window` bytes, and
    /// credit for what these hold.
    pub(super) fn receive(
        &mut self,
        batch: &RxBatch<'_>,
        window: usize,
    ) -> Result<Filled, ReceiveError> {
        if self.too_long(window).is_some() {
            return Ok(Filled::TooLong);
        }
        if let Next::Measured(len) = self.next {
            self.next = Next::Unknown;
            if len == 0 {
                self.socket.take(&mut [])?;
                return Ok(Filled::Nothing);
            }
            if batch.receives_at_once(len) {
                let bytes = self.socket.receive(batch)?.bytes;
                return Ok(Filled::Bytes { bytes, ends: true });
            }
            self.keep(len)?;
        }
        let Next::Kept { bytes, sent } = &mut self.next else {
            return Ok(Filled::Nothing);
        };
        let rest = &bytes[*sent..];
        let part = rest.len().min(batch.capacity());
        batch.write(&rest[..part]);
        *sent += part;
        let ends = *sent == bytes.len();
        if ends {
            self.next = Next::Unknown;
        }
        Ok(Filled::Bytes { bytes: part, ends })
    }

    /// Whether the guest has not got all messages of the host program.
    pub(super) fn has_unread(&self) -> bool {
        self.has_next() || matches!(self.socket.next_message(), Ok(Some(_)))
    }

    /// Whether a message, or a part of one, waits for the guest here.
    fn has_next(&self) -> bool {
        !matches!(self.next, Next::Unknown)
    }
}

impl AsFd for SeqpacketMover {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
