//! The connections, by token and by the ports that name them.

use std::collections::HashMap;
use std::time::Instant;

use super::event_source::Token;
use super::slot_list::SlotList;
use super::slots::Slots;
use crate::vsock_conn::{ConnKey, VsockConnection};

/// A connection, and what the table remembers of it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) conn: Box<VsockConnection>,
    /// The deadline that is in the table of deadlines.
    pub(super) deadline: Option<Instant>,
}

/// All connections. One that is *lingering* has given its ports back: the guest knows no more of it, and only bytes for its
/// host program are left.
#[derive(Debug, Default)]
pub(super) struct Connections {
    slots: Slots<Entry>,
    by_key: HashMap<ConnKey, Token>,
    /// Oldest first.
    lingering: SlotList,
}

impl Connections {
    /// How many have their ports.
    pub(super) fn open(&self) -> usize {
        self.by_key.len()
    }

    /// How many there are, lingering ones included.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Adds the connection that `make` returns for its token.
    pub(super) fn try_insert<E>(
        &mut self,
        make: impl FnOnce(Token) -> Result<VsockConnection, E>,
    ) -> Result<Token, E> {
        let mut key = None;
        let token = self.slots.try_insert(|token| {
            let conn = Box::new(make(token)?);
            key = Some(conn.key());
            Ok(Entry {
                conn,
                deadline: None,
            })
        })?;
        self.by_key.extend(key.map(|key| (key, token)));
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

    pub(super) fn is_lingering(&self, token: Token) -> bool {
        self.lingering.contains(token.slot)
    }

    /// Gives the ports of a connection back.
    pub(super) fn linger(&mut self, token: Token) {
        if let Some(entry) = self.slots.get(token) {
            self.by_key.remove(&entry.conn.key());
            self.lingering.push(token.slot);
        }
    }

    pub(super) fn oldest_lingering(&self) -> Option<Token> {
        self.token(self.lingering.first()?)
    }

    pub(super) fn remove(&mut self, token: Token) -> Option<Entry> {
        let entry = self.slots.remove(token)?;
        // The ports of a lingering connection may be another's by now.
        if !self.is_lingering(token) {
            self.by_key.remove(&entry.conn.key());
        }
        self.lingering.remove(token.slot);
        Some(entry)
    }

    /// Those that have their ports.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Token, &VsockConnection)> {
        let open = self
            .slots
            .iter()
            .filter(|(token, _)| !self.is_lingering(*token));
        open.map(|(token, entry)| (token, &*entry.conn))
    }
}
