//! A table whose entries are named by tokens.

use super::event_source::Token;
use crate::memory::give_back;

/// Entries by token. Without entries, it takes little memory.
#[derive(Debug)]
pub(super) struct Slots<T> {
    slots: Vec<Slot<T>>,
    /// The first of the vacant slots.
    vacant: Option<u32>,
    len: usize,
    next_serial: u32,
}

#[derive(Debug)]
enum Slot<T> {
    Occupied { serial: u32, entry: T },
    Vacant { next: Option<u32> },
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            vacant: None,
            len: 0,
            next_serial: 0,
        }
    }
}

impl<T> Slots<T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Adds the entry that `make` returns for its token. Where that fails, there is none.
    pub(super) fn try_insert<E>(
        &mut self,
        make: impl FnOnce(Token) -> Result<T, E>,
    ) -> Result<Token, E> {
        let token = Token {
            slot: self.vacant.unwrap_or(self.slots.len() as u32),
            serial: self.next_serial,
        };
        let slot = Slot::Occupied {
            serial: token.serial,
            entry: make(token)?,
        };
        match self.slots.get_mut(token.slot as usize) {
            Some(place) => {
                if let Slot::Vacant { next } = std::mem::replace(place, slot) {
                    self.vacant = next;
                }
            }
            None => self.slots.push(slot),
        }
        self.len += 1;
        self.next_serial = Token::next_serial(self.next_serial);
        Ok(token)
    }

    /// The token of the entry in a slot.
    pub(super) fn token(&self, slot: u32) -> Option<Token> {
        match self.slots.get(slot as usize)? {
            Slot::Occupied { serial, .. } => Some(Token {
                slot,
                serial: *serial,
            }),
            Slot::Vacant { .. } => None,
        }
    }

    pub(super) fn get(&self, token: Token) -> Option<&T> {
        match self.slots.get(token.slot as usize)? {
            Slot::Occupied { serial, entry } if *serial == token.serial => Some(entry),
            _ => None,
        }
    }

    pub(super) fn get_mut(&mut self, token: Token) -> Option<&mut T> {
        match self.slots.get_mut(token.slot as usize)? {
            Slot::Occupied { serial, entry } if *serial == token.serial => Some(entry),
            _ => None,
        }
    }

    pub(super) fn remove(&mut self, token: Token) -> Option<T> {
        self.get(token)?;
        let next = self.vacant.replace(token.slot);
        let place = self.slots.get_mut(token.slot as usize)?;
        let removed = std::mem::replace(place, Slot::Vacant { next });
        self.len -= 1;
        if self.len == 0 {
            give_back(&mut self.slots);
            self.vacant = None;
        }
        match removed {
            Slot::Occupied { entry, .. } => Some(entry),
            Slot::Vacant { .. } => None,
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Token, &T)> {
        (0..)
            .zip(&self.slots)
            .filter_map(|(slot, place)| match place {
                Slot::Occupied { serial, entry } => {
                    let serial = *serial;
                    Some((Token { slot, serial }, entry))
                }
                Slot::Vacant { .. } => None,
            })
    }
}
