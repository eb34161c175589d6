// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a segment is divided: the rings of each queue, buffers that only one queue may use, buffers for all.

use std::ops::Range;
use vmsg_queue::Layout;

/// Everything begins at a multiple of this, bytes.
pub(super) const PAGE: usize = 4096;

/// Entries of the indirect tables of a queue, the longest that there is room for.
const TABLES: [u16; 4] = [32, 16, 8, 4];

/// What belongs to one queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The most entries it may have, a power of two.
    pub(super) size: u16,
    /// Where its rings and indirect tables are, bytes of the segment.
    pub(super) rings: Range<usize>,
    /// Where its own buffers are.
    pub(super) buffers: Range<usize>,
}

/// A divided segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Division {
    /// By queue; `None` for queues that the device does not have.
    pub(super) places: Vec<Option<Place>>,
    /// Where the buffers for all queues are.
    pub(super) shared: Range<usize>,
    /// Entries of each indirect table; 0: there are none.
    pub(super) table: u16,
}

impl Division {
    /// Divides `len` bytes, a multiple of [`PAGE`], among queues of these largest sizes (0: there is no such queue). At least half of what
    /// the rings leave is for all.
    ///
    /// # Errors
    /// How many bytes there must be at least.
    pub(super) fn new(sizes: &[u16], len: usize, indirect: bool) -> Result<Division, usize> {
        // The largest legal size of a split queue that is not more than what the device takes.
        let sizes: Vec<Option<u16>> = sizes
            .iter()
            .map(|size| size.checked_ilog2().map(|log| 1 << log))
            .collect();
        let queues = sizes.iter().flatten().count();
        let rings = |table| -> usize {
            sizes
                .iter()
                .flatten()
                .map(|&size| rings_len(size, table))
                .sum()
        };
        // A page for each queue, and as much for all.
        let buffers = 2 * PAGE * queues;
        let table = TABLES
            .into_iter()
            .filter(|_| indirect)
            .find(|&table| rings(table) <= len / 4 && rings(table) + buffers <= len)
            .unwrap_or(0);
        let all_rings = rings(table);
        let need = (2 * rings(0)).max(rings(0) + buffers);
        if len < need {
            return Err(need.next_multiple_of(PAGE));
        }
        let own = (len - all_rings) / 2 / queues.max(1) / PAGE * PAGE;
        let mut at = 0;
        let mut take = |len: usize| {
            let range = at..at + len;
            at = range.end;
            range
        };
        let rings: Vec<Option<Range<usize>>> = sizes
            .iter()
            .map(|size| size.map(|size| take(rings_len(size, table))))
            .collect();
        let places = sizes
            .iter()
            .zip(rings)
            .map(|(size, rings)| {
                Some(Place {
                    size: (*size)?,
                    rings: rings?,
                    buffers: take(own),
                })
            })
            .collect();
        Ok(Division {
            places,
            shared: at..len,
            table,
        })
    }
}

fn rings_len(size: u16, table: u16) -> usize {
    let layout = Layout::new(size, table).expect("a power of two");
    layout.total_len().next_multiple_of(PAGE)
}

#[cfg(test)]
#[path = "division_test.rs"]
mod tests;
