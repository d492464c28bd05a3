//! A table whose entries are named by tokens.

use slab::Slab;

use super::event_source::Token;

/// Entries by token.
#[derive(Debug)]
pub(super) struct Slots<T> {
    entries: Slab<(u32, T)>,
    next_serial: u32,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self {
            entries: Slab::new(),
            next_serial: 0,
        }
    }
}

impl<T> Slots<T> {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Adds the entry that `make` returns for its token. Where that fails, there is none.
    pub(super) fn try_insert<E>(
        &mut self,
        make: impl FnOnce(Token) -> Result<T, E>,
    ) -> Result<Token, E> {
        let vacant = self.entries.vacant_entry();
        let token = Token {
            slot: vacant.key() as u32,
            serial: self.next_serial,
        };
        vacant.insert((token.serial, make(token)?));
        self.next_serial = Token::next_serial(self.next_serial);
        Ok(token)
    }

    /// The token of the entry in a slot.
    pub(super) fn token(&self, slot: u32) -> Option<Token> {
        let (serial, _) = self.entries.get(slot as usize)?;
        Some(Token {
            slot,
            serial: *serial,
        })
    }

    pub(super) fn get(&self, token: Token) -> Option<&T> {
        let (serial, entry) = self.entries.get(token.slot as usize)?;
        (*serial == token.serial).then_some(entry)
    }

    pub(super) fn get_mut(&mut self, token: Token) -> Option<&mut T> {
        let (serial, entry) = self.entries.get_mut(token.slot as usize)?;
        (*serial == token.serial).then_some(entry)
    }

    pub(super) fn remove(&mut self, token: Token) -> Option<T> {
        self.get(token)?;
        let (_, entry) = self.entries.try_remove(token.slot as usize)?;
        Some(entry)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Token, &T)> {
        self.entries.iter().map(|(slot, (serial, entry))| {
            let token = Token {
                slot: slot as u32,
                serial: *serial,
            };
            (token, entry)
        })
    }
}
