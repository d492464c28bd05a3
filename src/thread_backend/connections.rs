//! The connections, by token and by the ports that name them.

use std::collections::BTreeMap;
use std::time::Instant;

use super::clients::Waiting;
use super::event_source::Token;
use super::journal::{Journal, Listed};
use super::slot_list::SlotList;
use super::slots::Slots;
use crate::metrics::counters::Side;
use crate::vsock_conn::{ConnKey, VsockConnection};

const SIDES: usize = Side::ALL.len();

/// A connection, and what the table remembers of it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) conn: VsockConnection,
    /// Who has opened it.
    pub(super) opened_by: Side,
    /// Whether it was counted as opened. An attempt that may fail without being a connection is not, at first.
    pub(super) is_counted: bool,
    /// The deadline that is in the table of deadlines.
    pub(super) deadline: Option<Instant>,
    /// What its client waits for, until the guest has accepted it.
    pub(super) waiting: Option<Waiting>,
    /// Its ports in the journal. Where an RST ends it, they stay there until the guest has that.
    pub(super) listed: Listed,
    /// When it was requested.
    pub(super) since: Instant,
    /// How many events have told of room in its socket while nothing waited for that.
    pub(super) in_vain: u8,
}

/// How many connections there may be.
///
/// Each side, the guest, the host programs and the siblings, may have `per_side` connections of its own. A third of that is kept
/// for each, however many the others want.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    per_side: usize,
}

impl Places {
    pub(super) fn new(per_side: usize) -> Self {
        Self { per_side }
    }

    /// How many are kept for a side.
    fn kept(self) -> usize {
        self.per_side / 3
    }

    /// How many there are. What one side may have leaves those that are kept for the others.
    pub(super) fn total(self) -> usize {
        self.per_side + (SIDES - 1) * self.kept()
    }

    /// Whether `side` may take one more.
    fn has_one(self, side: Side, taken: &[usize; SIDES]) -> bool {
        let others = taken
            .iter()
            .enumerate()
            .filter(|(index, _)| *index != side as usize);
        let others: usize = others.map(|(_, taken)| (*taken).max(self.kept())).sum();
        let own = taken[side as usize];
        own < self.per_side && own + others < self.total()
    }
}

/// All connections. Two kinds take no place, and give way where there are too many:
///
/// - A *lingering* one has given its ports back: the guest knows no more of it, and only bytes for its host program are left.
/// - The client of a *deserted* one has left before the guest has answered.
#[derive(Debug)]
pub(super) struct Connections {
    slots: Slots<Entry>,
    by_key: BTreeMap<ConnKey, Token>,
    journal: Journal,
    places: Places,
    /// How many places each side has taken.
    taken: [usize; SIDES],
    /// Oldest first.
    lingering: SlotList,
    /// Oldest first.
    deserted: SlotList,
}

impl Connections {
    pub(super) fn new(places: Places) -> Self {
        Self {
            slots: Slots::default(),
            by_key: BTreeMap::new(),
            journal: Journal::default(),
            places,
            taken: [0; SIDES],
            lingering: SlotList::default(),
            deserted: SlotList::default(),
        }
    }

    /// Lists the connections in `journal` from now on, and those that there are.
    pub(super) fn set_journal(&mut self, journal: Journal) {
        self.journal = journal;
        for token in self.by_key.values() {
            if let Some(entry) = self.slots.get_mut(*token) {
                entry.listed = self.journal.list(entry.conn.key());
            }
        }
    }

    /// Lists the ports of a connection that there is no more.
    pub(super) fn list(&self, key: ConnKey) -> Listed {
        self.journal.list(key)
    }

    /// How many have their ports.
    pub(super) fn open(&self) -> usize {
        self.by_key.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots.len() == 0
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether one more that `side` opens has a place.
    pub(super) fn has_place(&self, side: Side) -> bool {
        self.places.has_one(side, &self.taken)
    }

    /// The connection that is to give way to a new one, where there are too many.
    pub(super) fn surplus(&self) -> Option<Token> {
        // Places that siblings have not taken are not for what takes none.
        let siblings = self.taken[Side::Sibling as usize];
        let unused = self.places.kept().saturating_sub(siblings);
        if self.slots.len() < self.places.total() - unused {
            return None;
        }
        let oldest = self.lingering.first().or_else(|| self.deserted.first());
        self.token(oldest?)
    }

    /// Adds the connection that `make` returns for its token.
    pub(super) fn try_insert<E>(
        &mut self,
        opened_by: Side,
        make: impl FnOnce(Token) -> Result<VsockConnection, E>,
    ) -> Result<Token, E> {
        let mut key = None;
        let token = self.slots.try_insert(|token| {
            let conn = make(token)?;
            key = Some(conn.key());
            Ok(Entry {
                listed: self.journal.list(conn.key()),
                conn,
                opened_by,
                is_counted: false,
                deadline: None,
                waiting: None,
                since: Instant::now(),
                in_vain: 0,
            })
        })?;
        self.by_key.extend(key.map(|key| (key, token)));
        self.taken[opened_by as usize] += 1;
        Ok(token)
    }

    pub(super) fn contains(&self, key: &ConnKey) -> bool {
        self.by_key.contains_key(key)
    }

    pub(super) fn find(&self, key: &ConnKey) -> Option<Token> {
        self.by_key.get(key).copied()
    }

    pub(super) fn token(&self, slot: u32) -> Option<Token> {
        self.slots.token(slot)
    }

    pub(super) fn get(&self, token: Token) -> Option<&Entry> {
        self.slots.get(token)
    }

    pub(super) fn get_mut(&mut self, token: Token) -> Option<&mut Entry> {
        self.slots.get_mut(token)
    }

    /// How long ago a connection was requested, in seconds.
    pub(super) fn age(&self, token: Token, now: Instant) -> Option<u64> {
        let entry = self.get(token)?;
        Some(now.saturating_duration_since(entry.since).as_secs())
    }

    pub(super) fn is_lingering(&self, token: Token) -> bool {
        self.lingering.contains(token.slot)
    }

    /// Whether a connection takes a place.
    fn has_taken(&self, token: Token) -> bool {
        !self.is_lingering(token) && !self.deserted.contains(token.slot)
    }

    /// Gives the ports and the place of a connection back.
    pub(super) fn linger(&mut self, token: Token) {
        self.give_place_back(token);
        self.deserted.remove(token.slot);
        if let Some(entry) = self.slots.get_mut(token) {
            entry.listed = Listed::default();
            self.by_key.remove(&entry.conn.key());
            self.lingering.push(token.slot);
        }
    }

    /// The client of a connection has left: gives its place back.
    pub(super) fn desert(&mut self, token: Token) {
        self.give_place_back(token);
        self.deserted.push(token.slot);
    }

    /// The guest has answered, and what the client has left for it is on the way: the connection takes a place again.
    pub(super) fn resume(&mut self, token: Token) {
        if let Some(entry) = self.slots.get(token)
            && self.deserted.contains(token.slot)
        {
            self.taken[entry.opened_by as usize] += 1;
            self.deserted.remove(token.slot);
        }
    }

    fn give_place_back(&mut self, token: Token) {
        if let Some(entry) = self.slots.get(token)
            && self.has_taken(token)
        {
            self.taken[entry.opened_by as usize] -= 1;
        }
    }

    pub(super) fn remove(&mut self, token: Token) -> Option<Entry> {
        self.give_place_back(token);
        let entry = self.slots.remove(token)?;
        // The ports of a lingering connection may be another's by now.
        if !self.is_lingering(token) {
            self.by_key.remove(&entry.conn.key());
        }
        self.lingering.remove(token.slot);
        self.deserted.remove(token.slot);
        if self.is_empty() {
            self.lingering.give_back();
            self.deserted.give_back();
        }
        Some(entry)
    }

    /// Those that take a place.
    pub(super) fn placed(&self) -> impl Iterator<Item = &Entry> {
        let all = self.slots.iter();
        all.filter_map(|(token, entry)| self.has_taken(token).then_some(entry))
    }

    /// Those whose client has left, oldest first.
    pub(super) fn deserted(&self) -> impl Iterator<Item = &Entry> {
        self.deserted.iter().filter_map(|slot| self.entry(slot))
    }

    /// Those that linger, oldest first.
    pub(super) fn lingering(&self) -> impl Iterator<Item = &Entry> {
        self.lingering.iter().filter_map(|slot| self.entry(slot))
    }

    fn entry(&self, slot: u32) -> Option<&Entry> {
        self.slots.get(self.slots.token(slot)?)
    }

    pub(super) fn clear(&mut self) {
        *self = Self {
            journal: std::mem::take(&mut self.journal),
            ..Self::new(self.places)
        };
    }

    /// Those that have their ports.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Token, &VsockConnection)> {
        let open = self
            .slots
            .iter()
            .filter(|(token, _)| !self.is_lingering(*token));
        open.map(|(token, entry)| (token, &entry.conn))
    }
}
