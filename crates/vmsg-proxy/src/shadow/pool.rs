// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which parts of the segment are in use as buffers. All that is not is zero, unless the device wrote there more than it said, or where it had nothing.

use super::division::Division;
use std::ops::Range;
use vmsg_mem::{BusAddr, RamSlice};
use vmsg_queue::Buffer;

/// Buffers begin at multiples of this, and take whole ones, bytes.
const GRANULE: usize = 256;

/// Granules that `len` bytes take.
fn granules(len: u64) -> u64 {
    len.div_ceil(GRANULE as u64)
}

/// A run of granules, a bit for each: 1 is in use.
#[derive(Debug)]
struct Arena {
    /// Where it begins in the segment, bytes.
    start: usize,
    words: Vec<u64>,
    /// Granules in all.
    len: usize,
    /// Granules not in use.
    free: usize,
    /// No granule before this one is free.
    first: usize,
    /// No granule from this one on was ever taken.
    touched: usize,
}

impl Arena {
    fn new(range: &Range<usize>) -> Arena {
        let len = range.len() / GRANULE;
        Arena {
            start: range.start,
            words: vec![0; len.div_ceil(64)],
            len,
            free: len,
            first: 0,
            touched: 0,
        }
    }

    /// The first granule from `from` on that is in use (or not, with `free`); `end` if there is none before it.
    fn find(&self, from: usize, end: usize, free: bool) -> usize {
        let flip = if free { !0 } else { 0 };
        let mut at = from;
        while at < end {
            let word = (self.words[at / 64] ^ flip) >> (at % 64);
            if word != 0 {
                return (at + word.trailing_zeros() as usize).min(end);
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }

    fn mark(&mut self, at: usize, n: usize, used: bool) {
        let (mut at, end) = (at, at + n);
        while at < end {
            let until = ((at / 64 + 1) * 64).min(end);
            let mask = (!0 >> (64 - (until - at))) << (at % 64);
            let word = &mut self.words[at / 64];
            if used {
                *word |= mask;
            } else {
                *word &= !mask;
            }
            at = until;
        }
    }

    /// Takes `n` granules in a row; where they begin in the segment, bytes.
    fn take(&mut self, n: usize) -> Option<usize> {
        if n > self.free {
            return None;
        }
        let mut at = self.find(self.first, self.len, true);
        self.first = at;
        while at + n <= self.len {
            let end = self.find(at, at + n, false);
            if end - at == n {
                self.mark(at, n, true);
                self.free -= n;
                if at == self.first {
                    self.first = end;
                }
                self.touched = self.touched.max(end);
                return Some(self.start + at * GRANULE);
            }
            at = self.find(end, self.len, true);
        }
        None
    }

    /// Gives back what [`take`](Self::take) gave, or a part of it.
    fn give(&mut self, offset: usize, n: usize) {
        let at = (offset - self.start) / GRANULE;
        self.mark(at, n, false);
        self.free += n;
        self.first = self.first.min(at);
    }

    fn is_unused(&self) -> bool {
        self.free == self.len
    }

    /// Where buffers were, in the segment.
    fn take_touched(&mut self) -> Range<usize> {
        let touched = std::mem::take(&mut self.touched);
        self.start..self.start + touched * GRANULE
    }
}

/// The buffers of a segment.
#[derive(Debug)]
pub(super) struct Pool<'m> {
    ram: RamSlice<'m>,
    /// Bus address of the segment.
    base: u64,
    /// By queue: what only it may use.
    own: Vec<Option<Arena>>,
    shared: Arena,
    /// The queue that gets what is shared first: it has waited longest.
    first_in_line: Option<usize>,
}

impl<'m> Pool<'m> {
    pub(super) fn new(ram: RamSlice<'m>, base: u64, division: &Division) -> Pool<'m> {
        let own = division
            .places
            .iter()
            .map(|place| place.as_ref().map(|place| Arena::new(&place.buffers)))
            .collect();
        Pool {
            ram,
            base,
            own,
            shared: Arena::new(&division.shared),
            first_in_line: None,
        }
    }

    /// Bytes that a queue can have at most.
    pub(super) fn most(&self, queue: usize) -> u64 {
        let own = self.own[queue].as_ref().map_or(0, |arena| arena.len);
        ((own + self.shared.len) * GRANULE) as u64
    }

    /// Whether buffers of these lengths can ever be had at the same time.
    pub(super) fn can_ever_hold(&self, queue: usize, readable: u64, writable: u64) -> bool {
        let need = granules(readable) + granules(writable);
        need <= self.most(queue) / GRANULE as u64
    }

    /// True if neither the queue nor anybody else holds anything that the queue could have, nor has to have it before: what it does not get
    /// now it never gets.
    pub(super) fn is_unused_for(&self, queue: usize) -> bool {
        self.own[queue].as_ref().is_none_or(Arena::is_unused)
            && self.shared.is_unused()
            && self.may_share(queue)
    }

    /// Whether nobody waits longer for what is shared.
    fn may_share(&self, queue: usize) -> bool {
        self.first_in_line.is_none_or(|first| first == queue)
    }

    /// Adds buffers of `len` bytes in all to `out`, which may have `most` in all afterwards. False, and nothing added, if there is no
    /// room now.
    pub(super) fn take(
        &mut self,
        queue: usize,
        len: u64,
        out: &mut Vec<Buffer>,
        most: usize,
    ) -> bool {
        let begin = out.len();
        let may_share = self.may_share(queue);
        let mut left = len;
        let mut n = usize::MAX;
        while left > 0 {
            // Less than 4 GiB at a time: more is never in one descriptor.
            let wanted = granules(left).min(1 << 20);
            n = n.min(usize::try_from(wanted).unwrap_or(usize::MAX));
            let own = self.own[queue].as_mut().and_then(|arena| arena.take(n));
            let found = match own {
                None if may_share => self.shared.take(n),
                own => own,
            };
            match found {
                Some(offset) if out.len() < most => {
                    let bytes = left.min((n * GRANULE) as u64);
                    let bytes = u32::try_from(bytes).expect("at most 2^28");
                    out.push((BusAddr(self.base + offset as u64), bytes));
                    left -= u64::from(bytes);
                }
                Some(offset) => {
                    self.give(queue, offset, n);
                    break;
                }
                None if n > 1 => n = n.div_ceil(2),
                None => break,
            }
        }
        if left > 0 {
            for (addr, len) in out.drain(begin..) {
                self.release(queue, addr, len);
            }
        }
        left == 0
    }

    /// Puts a queue that found no room in the line for what is shared, if there is none.
    pub(super) fn wait(&mut self, queue: usize) {
        self.first_in_line.get_or_insert(queue);
    }

    /// The queue does not wait any more.
    pub(super) fn served(&mut self, queue: usize) {
        if self.first_in_line == Some(queue) {
            self.first_in_line = None;
        }
    }

    /// Where there were buffers since this was asked last, in the segment.
    pub(super) fn take_touched(&mut self) -> impl Iterator<Item = Range<usize>> {
        let own = self.own.iter_mut().flatten();
        own.chain([&mut self.shared]).map(Arena::take_touched)
    }

    /// The memory of a buffer that was taken.
    pub(super) fn memory(&self, addr: BusAddr, len: u32) -> RamSlice<'m> {
        let offset = self.offset(addr);
        self.ram
            .get(offset, len as usize)
            .expect("what is taken is in the segment")
    }

    /// Wipes buffers and takes them back.
    pub(super) fn wipe_all(&mut self, queue: usize, buffers: &mut Vec<Buffer>) {
        for &(addr, len) in &*buffers {
            self.memory(addr, len).fill(0);
        }
        self.release_all(queue, buffers);
    }

    /// The same for the buffers of a request that is done: the first `readable` of them have bytes of the guest's from end to end, the others what the
    /// device wrote, which are `written` bytes. What it wrote beyond these without saying so stays, and is nothing that it does not know.
    pub(super) fn wipe_done(
        &mut self,
        queue: usize,
        buffers: &mut Vec<Buffer>,
        readable: usize,
        written: u32,
    ) {
        let mut left = written;
        for (n, &(addr, len)) in buffers.iter().enumerate() {
            let used = if n < readable { len } else { len.min(left) };
            if n >= readable {
                left -= used;
            }
            if used > 0 {
                self.memory(addr, used).fill(0);
            }
        }
        self.release_all(queue, buffers);
    }

    /// Takes buffers back that nothing was written to.
    pub(super) fn release_all(&mut self, queue: usize, buffers: &mut Vec<Buffer>) {
        for (addr, len) in buffers.drain(..) {
            self.release(queue, addr, len);
        }
    }

    fn release(&mut self, queue: usize, addr: BusAddr, len: u32) {
        let n = usize::try_from(granules(len.into())).expect("was taken");
        self.give(queue, self.offset(addr), n);
    }

    fn give(&mut self, queue: usize, offset: usize, n: usize) {
        if offset >= self.shared.start {
            self.shared.give(offset, n);
        } else if let Some(arena) = &mut self.own[queue] {
            arena.give(offset, n);
        }
    }

    fn offset(&self, addr: BusAddr) -> usize {
        usize::try_from(addr.0 - self.base).expect("what is taken is in the segment")
    }
}

#[cfg(test)]
#[path = "pool_test.rs"]
mod tests;
