// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which memory requests are about: where a guest takes memory away page by page (a vIOMMU), only those that have it stand in the way.

use std::ops::Range;

use vmsg_mem::{Access, RamSlice, Window, WindowTable};

/// Addresses of this process.
pub(super) type Places = Vec<Range<usize>>;

/// Adds where `pieces` are.
pub(super) fn note(places: &mut Places, pieces: &[RamSlice<'_>]) {
    for piece in pieces {
        let start = piece.as_ptr().addr();
        let end = start + piece.len();
        match places.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => places.push(start..end),
        }
    }
}

pub(super) fn meet(places: &Places, gone: &Places) -> bool {
    places.iter().any(|one| {
        gone.iter()
            .any(|other| one.start < other.end && other.start < one.end)
    })
}

/// What of the old memory is not in the new one, at the same bus addresses and with as many rights.
pub(super) fn gone(old: &WindowTable, new: &WindowTable) -> Places {
    let mut gone = Places::new();
    let mut rest = new.space().windows();
    for window in old.space().windows() {
        let (start, end) = bounds(window);
        let place = window.ram().as_ptr().addr();
        let mut at = start;
        while at < end {
            while let [first, behind @ ..] = rest
                && bounds(first).1 <= at
            {
                rest = behind;
            }
            let (until, is_kept) = match rest.first() {
                Some(next) if bounds(next).0 <= at => {
                    let (base, last) = bounds(next);
                    let enough =
                        next.access() == window.access() || next.access() == Access::ReadWrite;
                    let there = next.ram().as_ptr().addr() + distance(base, at);
                    let here = place + distance(start, at);
                    (last, enough && there == here)
                }
                Some(next) => (bounds(next).0, false),
                None => (end, false),
            };
            let until = until.min(end);
            if !is_kept {
                gone.push(place + distance(start, at)..place + distance(start, until));
            }
            at = until;
        }
    }
    gone
}

/// First address, and the one behind the last.
fn bounds(window: &Window<'_>) -> (u128, u128) {
    let start = u128::from(window.base().0);
    (start, start + window.ram().len() as u128)
}

/// Bytes between addresses of one window, which is mapped here.
fn distance(from: u128, to: u128) -> usize {
    usize::try_from(to - from).expect("a window fits into memory")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use vmsg_mem::{BusAddr, Mapping, TableEntry};

    use super::*;

    fn table(mapping: &Arc<Mapping>, pages: &[(u64, usize, bool)]) -> WindowTable {
        let entries = pages.iter().map(|(base, offset, write)| TableEntry {
            base: BusAddr(*base * 4096),
            mapping: Arc::clone(mapping),
            offset: offset * 4096,
            len: 4096,
            access: if *write {
                Access::ReadWrite
            } else {
                Access::Read
            },
        });
        WindowTable::new(entries.collect()).expect("windows")
    }

    fn pages() -> impl Strategy<Value = Vec<(u64, usize, bool)>> {
        let page = (
            0..10usize,
            prop::bool::weighted(0.8),
            prop::bool::weighted(0.8),
        );
        prop::collection::vec(page, 12).prop_map(|pages| {
            let all = (0u64..).zip(pages).map(|(base, (offset, same, write))| {
                let offset = if same {
                    usize::try_from(base).expect("small")
                } else {
                    offset
                };
                (base, offset, write)
            });
            all.filter(|(base, offset, _)| *offset != 9 || *base == 9)
                .collect()
        })
    }

    proptest! {
        #[test]
        fn what_is_gone_is_what_no_address_leads_to_any_more(old in pages(), new in pages()) {
            let (mapping, _fd) = Mapping::memfd("pages", 16 * 4096, true).expect("memfd");
            let mapping = Arc::new(mapping);
            let gone = gone(&table(&mapping, &old), &table(&mapping, &new));
            let start = mapping.ram().as_ptr().addr();
            for offset in 0..12 {
                let at = start + offset * 4096;
                let is_lost = |(base, place, write): &(u64, usize, bool)| {
                    let kept = new.iter().any(|(b, p, w)| b == base && p == place && w >= write);
                    *place == offset && !kept
                };
                let expected = old.iter().any(is_lost);
                let places = std::iter::once(at + 5..at + 6).collect::<Places>();
                prop_assert_eq!(meet(&places, &gone), expected, "page {}", offset);
            }
        }
    }
}
