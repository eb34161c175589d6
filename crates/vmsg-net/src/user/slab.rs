// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A bounded table whose keys are never mistaken for those of earlier entries.

/// Names an entry; stale once the entry is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    pub(super) slot: u32,
    /// 28 bits, so that a key and two more bits fit into an event's 64.
    pub(super) generation: u32,
}

const GENERATIONS: u32 = 1 << 28;

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

/// Up to `limit` entries.
#[derive(Debug)]
pub(super) struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    limit: usize,
}

impl<T> Slab<T> {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            limit: limit.min(1 << 24),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// Puts in what `make` makes of its key; `None` if the table is full.
    pub(super) fn insert_with(&mut self, make: impl FnOnce(Key) -> T) -> Option<Key> {
        if self.is_full() {
            return None;
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(Slot {
                    generation: 0,
                    value: None,
                });
                u32::try_from(self.slots.len() - 1).ok()?
            }
        };
        let entry = self.slots.get_mut(slot as usize)?;
        let key = Key {
            slot,
            generation: entry.generation,
        };
        entry.value = Some(make(key));
        Some(key)
    }

    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let slot = self.slots.get_mut(key.slot as usize)?;
        if slot.generation != key.generation {
            return None;
        }
        slot.value.as_mut()
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<T> {
        let slot = self.slots.get_mut(key.slot as usize)?;
        if slot.generation != key.generation {
            return None;
        }
        let value = slot.value.take()?;
        slot.generation = (slot.generation + 1) % GENERATIONS;
        self.free.push(key.slot);
        Some(value)
    }

    /// The key of whoever is in `slot`.
    pub(super) fn key_at(&self, slot: u32) -> Option<Key> {
        let entry = self.slots.get(slot as usize)?;
        entry.value.is_some().then_some(Key {
            slot,
            generation: entry.generation,
        })
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        self.slots.iter().zip(0u32..).filter_map(|(slot, index)| {
            let key = Key {
                slot: index,
                generation: slot.generation,
            };
            slot.value.as_ref().map(|value| (key, value))
        })
    }

    pub(super) fn keys(&self) -> Vec<Key> {
        self.iter().map(|(key, _)| key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_key_does_not_open_a_new_entry() {
        let mut slab = Slab::new(2);
        let a = slab.insert_with(|_| 'a').unwrap();
        let b = slab.insert_with(|_| 'b').unwrap();
        assert!(slab.insert_with(|_| 'c').is_none(), "full");
        assert_eq!(slab.remove(a), Some('a'));
        let c = slab.insert_with(|_| 'c').unwrap();
        assert_eq!((a.slot, slab.len()), (c.slot, 2));
        assert_eq!(slab.get_mut(a), None);
        assert_eq!(slab.remove(a), None);
        assert_eq!(slab.get_mut(b), Some(&mut 'b'));
        assert_eq!(slab.keys(), [c, b]);
    }
}
