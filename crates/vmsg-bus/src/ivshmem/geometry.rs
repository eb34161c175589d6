// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where everything lies in the memory: docs/bus-ivshmem.md §2.

use super::block::Place;
use super::fifo;
use super::spec::QueueLayout;
use vmsg_mem::QueueMemory;
use vmsg_mem::amp::{self, Side};

/// Bytes of each queue of the layouts with pages.
pub(super) const PAGE: usize = 4096;

/// Indices in the header of a page.
const HEAD: usize = 0x00;
const TAIL: usize = 0x40;

/// Where a block lies in the header of its owner's page, and its bytes.
const SPARE: usize = 0x08;
const SPARE_BYTES: usize = 0x38;

/// Bytes of a block before the AMP layout.
const BLOCK: usize = 64;

/// The most elements of an AMP layout of ours each way: with 64 bytes each, all of it takes less than two pages.
const ELEMENTS: u16 = 60;

/// What lies where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) layout: QueueLayout,
    /// Where the layout begins.
    pub(super) base: usize,
    /// Where the memory ends that it may use.
    pub(super) end: usize,
}

pub(super) fn other(side: Side) -> Side {
    match side {
        Side::Device => Side::Driver,
        Side::Driver => Side::Device,
    }
}

impl Geometry {
    /// `None` if there is not enough memory.
    pub(super) fn new(layout: QueueLayout, base: u64, end: usize) -> Option<Self> {
        let base = usize::try_from(base).ok()?;
        let geometry = Self { layout, base, end };
        let need = match layout {
            QueueLayout::Amp => amp::Layout::packed(4, 64)?.len(),
            QueueLayout::Spsc => 2 * PAGE,
            QueueLayout::AmpPci => fifo::BYTES,
        };
        (base.checked_add(need)? <= end).then_some(geometry)
    }

    pub(super) fn is_amp(&self) -> bool {
        self.layout == QueueLayout::Amp
    }

    /// The page that `side` fills.
    pub(super) fn page(&self, side: Side) -> usize {
        let begin = match self.layout {
            QueueLayout::AmpPci => fifo::QUEUES,
            _ => 0,
        };
        match side {
            Side::Driver => self.base + begin,
            Side::Device => self.base + begin + PAGE,
        }
    }

    /// The block of `side`; `None` where there is no room for blocks.
    pub(super) fn block(&self, side: Side) -> Option<Place> {
        if !self.is_amp() {
            return Some(Place {
                offset: self.page(side) + SPARE,
                bytes: SPARE_BYTES,
                side,
            });
        }
        let before = match side {
            Side::Device => 2 * BLOCK,
            Side::Driver => BLOCK,
        };
        Some(Place {
            offset: self.base.checked_sub(2 * BLOCK)? + 2 * BLOCK - before,
            bytes: BLOCK,
            side,
        })
    }

    /// The layout that a device of ours makes, for messages of up to `message` bytes.
    pub(super) fn own_layout(&self, message: usize) -> Option<amp::Layout> {
        let size = u16::try_from(message.next_multiple_of(64)).ok()?;
        amp::Layout::fitting(self.end - self.base, size, ELEMENTS)
    }

    /// Indices of the page that `side` fills, as they stand: the producer's, the consumer's.
    pub(super) fn indices<M: QueueMemory>(&self, memory: &M, side: Side) -> [u32; 2] {
        let page = self.page(side);
        [
            memory.load_acquire(page + HEAD),
            memory.load_acquire(page + TAIL),
        ]
    }

    /// Zeroes what `side` writes of the indices of both pages.
    pub(super) fn zero<M: QueueMemory>(&self, memory: &M, side: Side) {
        memory.store_release(self.page(side) + HEAD, 0);
        memory.store_release(self.page(other(side)) + TAIL, 0);
    }
}
