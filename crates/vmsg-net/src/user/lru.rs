// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who has rested longest.

/// The order in which the entries of a table were used, by their slots. All operations take the
/// same time, however many there are.
#[derive(Debug, Default)]
pub(super) struct Lru {
    /// Neighbours of each slot in the ring; slot 0 here is the ring's own, entry `n` is `n + 1`.
    links: Vec<Link>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Link {
    older: u32,
    newer: u32,
}

impl Lru {
    /// Entry `slot` was used just now; it may be new.
    pub(super) fn touch(&mut self, slot: u32) {
        let at = slot as usize + 1;
        if self.links.len() <= at {
            let old = self.links.len();
            // Whoever is in no ring is its own neighbour.
            self.links.extend((old..=at).map(|index| {
                let index = u32::try_from(index).unwrap_or(0);
                Link {
                    older: index,
                    newer: index,
                }
            }));
        }
        self.remove(slot);
        let newest = self.links[0].older;
        self.links[at] = Link {
            older: newest,
            newer: 0,
        };
        self.links[newest as usize].newer = slot + 1;
        self.links[0].older = slot + 1;
    }

    /// Entry `slot` is gone.
    pub(super) fn remove(&mut self, slot: u32) {
        let at = slot as usize + 1;
        let Some(Link { older, newer }) = self.links.get(at).copied() else {
            return;
        };
        self.links[older as usize].newer = newer;
        self.links[newer as usize].older = older;
        self.links[at] = Link {
            older: slot + 1,
            newer: slot + 1,
        };
    }

    /// The entry that was not used for the longest time.
    pub(super) fn oldest(&self) -> Option<u32> {
        self.links.first()?.newer.checked_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_use_is_kept() {
        let mut lru = Lru::default();
        assert_eq!(lru.oldest(), None);
        for slot in [3, 0, 1, 3, 2] {
            lru.touch(slot);
        }
        let mut order = Vec::new();
        while let Some(slot) = lru.oldest() {
            order.push(slot);
            lru.remove(slot);
            lru.remove(slot);
        }
        assert_eq!(order, [0, 1, 3, 2]);
        lru.touch(1);
        assert_eq!(lru.oldest(), Some(1));
    }
}
