//! What is pending for the guest.

use super::resets::Resets;
use super::slot_list::SlotList;
use crate::rxops::RxOps;
use crate::vsock_conn::VsockConnection;

/// Who wants the guest's buffers. Each kind gets its share of the worker's time; within a kind it is first come, first served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RxSource {
    /// Packets that belong to no connection.
    Resets,
    /// Connections with a packet without payload, or with few bytes: a share of their own keeps a program that waits for an
    /// answer from waiting for streams, and streams from waiting for a thousand such programs.
    Packets,
    /// Connections with many bytes.
    Streams,
}

impl RxSource {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Resets, Self::Packets, Self::Streams];
}

/// The packets that are pending.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub(super) resets: Resets,
    packets: SlotList,
    streams: SlotList,
}

impl Pending {
    pub(super) fn is_empty(&self, source: RxSource) -> bool {
        match source {
            RxSource::Resets => self.resets.is_empty(),
            RxSource::Packets => self.packets.len() == 0,
            RxSource::Streams => self.streams.len() == 0,
        }
    }

    /// Allocates what a connection in this slot takes, whatever it will have pending.
    pub(super) fn make_room(&mut self, slot: u32) {
        self.packets.make_room(slot);
        self.streams.make_room(slot);
    }

    /// Gives back what connections have taken, when there are none.
    pub(super) fn give_back(&mut self) {
        self.packets.give_back();
        self.streams.give_back();
    }

    /// Puts a connection where its next packets belong.
    pub(super) fn replace(&mut self, slot: u32, conn: &VsockConnection) {
        let (list, other) = match conn.pending() {
            None => return self.remove(slot),
            Some(RxOps::Rw) if conn.is_stream() => (&mut self.streams, &mut self.packets),
            Some(_) => (&mut self.packets, &mut self.streams),
        };
        other.remove(slot);
        list.push(slot);
    }

    pub(super) fn remove(&mut self, slot: u32) {
        self.packets.remove(slot);
        self.streams.remove(slot);
    }

    /// The connection that is served next.
    pub(super) fn first(&self, source: RxSource) -> Option<u32> {
        match source {
            RxSource::Resets => None,
            RxSource::Packets => self.packets.first(),
            RxSource::Streams => self.streams.first(),
        }
    }

    /// Takes the connection that is served next.
    pub(super) fn pop(&mut self, source: RxSource) -> Option<u32> {
        let slot = self.first(source)?;
        self.remove(slot);
        Some(slot)
    }
}
