//! An ordered set of slots.

use crate::memory;

/// A set of slot numbers in the order in which they were added. Adding and removing take the same time whatever the length,
/// and allocate only when a slot number is higher than all before.
#[derive(Debug, Default)]
pub(super) struct SlotList {
    /// By slot number.
    links: Vec<Option<Link>>,
    ends: Option<Ends>,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
struct Ends {
    first: u32,
    last: u32,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    previous: Option<u32>,
    next: Option<u32>,
}

impl SlotList {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn first(&self) -> Option<u32> {
        self.ends.map(|ends| ends.first)
    }

    pub(super) fn contains(&self, slot: u32) -> bool {
        self.link(slot).is_some()
    }

    /// The slots, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> {
        std::iter::successors(self.first(), |slot| self.link(*slot)?.next)
    }

    /// Allocates what adding this slot takes.
    pub(super) fn make_room(&mut self, slot: u32) {
        if self.links.len() <= slot as usize {
            self.links.resize(slot as usize + 1, None);
        }
    }

    /// Gives back what a flood of slots has taken, if the set is empty. Whoever must not allocate later makes room again.
    pub(super) fn give_back(&mut self) {
        if self.len == 0 {
            memory::give_back(&mut self.links);
        }
    }

    /// Adds a slot at the end, unless it is in the set.
    pub(super) fn push(&mut self, slot: u32) {
        if self.contains(slot) {
            return;
        }
        self.make_room(slot);
        let previous = self.ends.map(|ends| ends.last);
        self.links[slot as usize] = Some(Link {
            previous,
            next: None,
        });
        if let Some(link) = previous.and_then(|previous| self.link_mut(previous)) {
            link.next = Some(slot);
        }
        self.ends = Some(Ends {
            first: self.first().unwrap_or(slot),
            last: slot,
        });
        self.len += 1;
    }

    /// Removes a slot if it is in the set.
    pub(super) fn remove(&mut self, slot: u32) {
        let Some(link) = self.link(slot) else { return };
        self.links[slot as usize] = None;
        if let Some(previous) = link.previous.and_then(|slot| self.link_mut(slot)) {
            previous.next = link.next;
        }
        if let Some(next) = link.next.and_then(|slot| self.link_mut(slot)) {
            next.previous = link.previous;
        }
        self.ends = self.ends.and_then(|ends| {
            Some(Ends {
                first: if ends.first == slot {
                    link.next?
                } else {
                    ends.first
                },
                last: if ends.last == slot {
                    link.previous?
                } else {
                    ends.last
                },
            })
        });
        self.len -= 1;
    }

    /// Removes the first slot.
    pub(super) fn pop(&mut self) -> Option<u32> {
        let first = self.first()?;
        self.remove(first);
        Some(first)
    }

    fn link(&self, slot: u32) -> Option<Link> {
        self.links.get(slot as usize).copied().flatten()
    }

    fn link_mut(&mut self, slot: u32) -> Option<&mut Link> {
        self.links.get_mut(slot as usize)?.as_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_a_queue_without_duplicates(steps in prop::collection::vec((0u32..20, 0u8..3), 0..200)) {
            let mut list = SlotList::default();
            let mut model: Vec<u32> = Vec::new();
            for (slot, step) in steps {
                match step {
                    0 if !model.contains(&slot) => {
                        list.push(slot);
                        model.push(slot);
                    }
                    0 => list.push(slot),
                    1 => {
                        list.remove(slot);
                        model.retain(|other| *other != slot);
                    }
                    _ => {
                        let first = (!model.is_empty()).then(|| model.remove(0));
                        prop_assert_eq!(list.pop(), first);
                    }
                }
                prop_assert_eq!(list.iter().collect::<Vec<_>>(), &model[..]);
                prop_assert_eq!(list.len(), model.len());
                prop_assert_eq!(list.contains(slot), model.contains(&slot));
            }
        }
    }
}
