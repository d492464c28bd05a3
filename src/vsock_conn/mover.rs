//! What moves a connection's payload: [`StreamMover`] for bytes, [`SeqpacketMover`] for messages.

use std::io;

use serde::{Deserialize, Serialize};

use super::seqpacket_mover::{MessagesState, SeqpacketMover};
use super::stream_mover::{StreamMover, StreamState};
use crate::host::socket::{HostSocket, ReceiveError};
use crate::packet::header::PacketType;
use crate::packet::{RxBatch, TxBatch, VsockPacket};
use crate::saved::{LoadError, Loader, Saver};

/// What came of payload from the guest.
#[derive(Debug)]
pub(super) enum Delivered {
    /// The socket took so many bytes, of these or of those that were buffered before; the others are buffered.
    Sent(usize),
    /// The host program receives no more: all of these, and all that is buffered, are to be dropped.
    Closed,
    /// The guest can't send the rest of its message.
    TooLong,
    /// The system failed.
    Failed,
}

/// What came of a flush.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Flushed {
    /// Everything is sent.
    All,
    /// Bytes are left.
    Part,
    /// The host program receives no more.
    Closed,
    /// The system failed.
    Failed,
}

/// What the payload that is next for the guest needs.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wants {
    /// There is none.
    Nothing,
    /// Buffers of the guest.
    Buffers,
    /// More credit than the guest gives.
    Credit,
    /// There will be none: the host program sends no more.
    End,
    /// There will be none: the host program has closed before it had read everything.
    Reset,
    /// There will be none: the system failed.
    Failed,
}

/// What was put into the guest's buffers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// So many bytes, with the end of a message or without.
    Bytes { bytes: usize, ends: bool },
    /// Nothing: the host program sends no more.
    End,
    /// Nothing this time.
    Nothing,
    /// Nothing: the guest's buffer will never hold the message.
    TooLong,
}

/// The socket of a connection, and the payload that waits on either side of it.
#[derive(Debug)]
pub(super) enum Mover {
    Stream(StreamMover),
    Seqpacket(Box<SeqpacketMover>),
}

/// The payload of a [`Mover`] in a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum PayloadState {
    Stream(StreamState),
    Messages(MessagesState),
}

impl Mover {
    /// Saves the payload. The socket is the caller's to save.
    pub(super) fn save(&self, saver: &mut Saver<'_>) -> io::Result<PayloadState> {
        Ok(match self {
            Self::Stream(mover) => PayloadState::Stream(mover.save(saver)?),
            Self::Seqpacket(mover) => PayloadState::Messages(mover.save(saver)?),
        })
    }

    /// For `socket`, with the payload that was saved.
    pub(super) fn load(
        state: PayloadState,
        socket: HostSocket,
        buf_alloc: u32,
        loader: &Loader,
    ) -> Result<Self, LoadError> {
        match (socket.packet_type(), state) {
            (PacketType::Stream, PayloadState::Stream(state)) => {
                let mover = StreamMover::load(&state, socket, buf_alloc, loader)?;
                Ok(Self::Stream(mover))
            }
            (PacketType::Seqpacket, PayloadState::Messages(state)) => {
                let mover = SeqpacketMover::load(state, socket, buf_alloc, loader)?;
                Ok(Self::Seqpacket(Box::new(mover)))
            }
            _ => Err(LoadError::Invalid("payload of another type")),
        }
    }

    /// For a connection of this type, through a buffer of `buf_alloc` bytes.
    pub(super) fn new(packet_type: PacketType, socket: HostSocket, buf_alloc: u32) -> Self {
        match packet_type {
            PacketType::Seqpacket => {
                Self::Seqpacket(Box::new(SeqpacketMover::new(socket, buf_alloc)))
            }
            PacketType::Stream | PacketType::Unknown(_) => {
                Self::Stream(StreamMover::new(socket, buf_alloc))
            }
        }
    }

    pub(super) fn socket(&self) -> &HostSocket {
        match self {
            Self::Stream(mover) => mover.socket(),
            Self::Seqpacket(mover) => mover.socket(),
        }
    }

    pub(super) fn into_socket(self) -> HostSocket {
        match self {
            Self::Stream(mover) => mover.into_socket(),
            Self::Seqpacket(mover) => mover.into_socket(),
        }
    }

    /// How many bytes from the guest wait for the socket.
    pub(super) fn buffered(&self) -> usize {
        match self {
            Self::Stream(mover) => mover.buffered(),
            Self::Seqpacket(mover) => mover.buffered(),
        }
    }

    /// How many whole messages wait for the socket.
    pub(super) fn messages(&self) -> usize {
        match self {
            Self::Stream(_) => 0,
            Self::Seqpacket(mover) => mover.messages(),
        }
    }

    /// Whether payload waits for the socket: more than a message that the guest has not finished.
    pub(super) fn waits_for_host(&self) -> bool {
        match self {
            Self::Stream(mover) => mover.buffered() > 0,
            Self::Seqpacket(mover) => mover.messages() > 0,
        }
    }

    /// Whether payload waits although the socket may have room: there will be no event.
    pub(super) fn can_flush(&self) -> bool {
        match self {
            Self::Stream(mover) => mover.can_flush(),
            Self::Seqpacket(mover) => mover.can_flush(),
        }
    }

    pub(super) fn set_readable(&mut self) {
        match self {
            Self::Stream(mover) => mover.set_readable(),
            Self::Seqpacket(mover) => mover.set_readable(),
        }
    }

    /// A short receive does not mean that the socket is drained. Messages are never received short.
    pub(super) fn set_until_empty(&mut self) {
        if let Self::Stream(mover) = self {
            mover.set_until_empty();
        }
    }

    pub(super) fn set_writable(&mut self) {
        match self {
            Self::Stream(mover) => mover.set_writable(),
            Self::Seqpacket(mover) => mover.set_writable(),
        }
    }

    /// Drops the payload that waits for the socket, and returns how many bytes it had.
    pub(super) fn drop_buffered(&mut self) -> usize {
        match self {
            Self::Stream(mover) => mover.drop_buffered(),
            Self::Seqpacket(mover) => mover.drop_buffered(),
        }
    }

    /// The guest sends no more: drops a message that it has not finished, and returns how many bytes that had.
    pub(super) fn drop_unfinished(&mut self) -> usize {
        match self {
            Self::Stream(_) => 0,
            Self::Seqpacket(mover) => mover.drop_unfinished(),
        }
    }

    /// Sends the payload of consecutive RW packets of `batch`, and buffers what the socket does not take.
    pub(super) fn deliver(&mut self, batch: &TxBatch<'_>, packets: &[VsockPacket]) -> Delivered {
        match self {
            Self::Stream(mover) => mover.deliver(&batch.payload(packets)),
            Self::Seqpacket(mover) => mover.deliver(batch, packets),
        }
    }

    /// Sends what is buffered, as far as the socket takes it now and a turn allows. `count` gets the numbers of bytes.
    pub(super) fn flush(&mut self, count: impl FnMut(usize)) -> Flushed {
        match self {
            Self::Stream(mover) => mover.flush(count),
            Self::Seqpacket(mover) => mover.flush(count),
        }
    }

    /// What the next payload needs of a guest with a buffer of `window` bytes and `credit` left.
    pub(super) fn wants(&mut self, window: usize, credit: usize) -> Wants {
        match self {
            Self::Stream(mover) => mover.wants(credit),
            Self::Seqpacket(mover) => mover.wants(window, credit),
        }
    }

    /// How many bytes to receive next for such a guest.
    pub(super) fn receive_size(&self, window: usize, credit: usize) -> usize {
        match self {
            Self::Stream(mover) => mover.receive_size(window, credit),
            Self::Seqpacket(mover) => mover.receive_size(credit),
        }
    }

    /// Whether the next payload is a part of much more, or large.
    pub(super) fn receives_much(&self) -> bool {
        match self {
            Self::Stream(mover) => mover.receives_much(),
            Self::Seqpacket(mover) => mover.receives_much(),
        }
    }

    /// Puts the next payload into the guest's buffers.
    pub(super) fn receive(
        &mut self,
        batch: &RxBatch<'_>,
        window: usize,
    ) -> Result<Filled, ReceiveError> {
        match self {
            Self::Stream(mover) => {
                if batch.capacity() == 0 {
                    return Ok(Filled::Nothing);
                }
                Ok(match mover.receive(batch)? {
                    0 => Filled::End,
                    bytes => Filled::Bytes { bytes, ends: false },
                })
            }
            Self::Seqpacket(mover) => mover.receive(batch, window),
        }
    }

    /// Whether the host program has written something that the guest has not got.
    pub(super) fn has_unread(&self) -> bool {
        match self {
            Self::Stream(mover) => matches!(mover.socket().peek(&mut [0]), Ok(1)),
            Self::Seqpacket(mover) => mover.has_unread(),
        }
    }

    /// Whether the host program was seen to receive no more, although nothing was sent. A look at a stream tells; a look at
    /// a socket of messages would be one, so what waits there is to be flushed again.
    pub(super) fn peer_stopped_receiving(&mut self) -> bool {
        match self {
            Self::Stream(mover) => mover.socket().peer_stopped_receiving(),
            Self::Seqpacket(mover) => {
                mover.set_writable();
                mover.socket().peer_stopped_receiving()
            }
        }
    }
}
