// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Limits on how much passes in a time.

use super::Rate;

const SECOND: u64 = 1_000_000_000;
/// Parts of a nanosecond in which is counted here: a short frame at a high rate takes less than one. Nine years fit.
const PARTS: u64 = 64;
/// What passes at once, at least: the largest frame there is.
const LEAST_BURST: u64 = 65536 * 8;

/// A leaky bucket, kept as the moment at which it will be empty. Times are in nanoseconds since any moment; those kept here in
/// [`PARTS`] of them.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    /// When all that passed would have passed at the rate allowed.
    empty: u64,
    /// How far that may lie ahead when another thing passes.
    depth: u64,
    cost: Cost,
}

#[derive(Clone, Debug)]
enum Cost {
    /// Time for each frame; `None`: none passes.
    Frame(Option<u64>),
    /// Bits each second.
    Bits(u64),
}

impl Bucket {
    /// So many frames each second, as many at once.
    pub(super) fn frames(each_second: u32) -> Self {
        let each_second = u64::from(each_second);
        let cost = (each_second > 0).then(|| (SECOND * PARTS).div_ceil(each_second));
        Self {
            empty: 0,
            depth: cost.unwrap_or(0) * each_second.saturating_sub(1),
            cost: Cost::Frame(cost),
        }
    }

    /// Bytes at `rate`; at once 64 KiB or a hundredth of a second's, whichever is more, and the frame that goes beyond.
    pub(super) fn bytes(rate: Rate) -> Self {
        let bits = rate.bits();
        Self {
            empty: 0,
            depth: time(LEAST_BURST, bits).max(SECOND * PARTS / 100),
            cost: Cost::Bits(bits),
        }
    }

    /// True if something may pass at `now`.
    #[inline]
    pub(super) const fn is_open(&self, now: u64) -> bool {
        self.empty <= now.saturating_mul(PARTS).saturating_add(self.depth)
            && !matches!(self.cost, Cost::Frame(None))
    }

    /// A frame of `len` bytes passes at `now`; false if it may not.
    #[inline]
    pub(super) fn take(&mut self, now: u64, len: usize) -> bool {
        let open = self.is_open(now);
        if open {
            self.charge(now, len);
        }
        open
    }

    /// A frame of `len` bytes has passed.
    #[inline]
    pub(super) fn charge(&mut self, now: u64, len: usize) {
        let cost = match self.cost {
            Cost::Frame(cost) => cost.unwrap_or(0),
            Cost::Bits(bits) => time(len as u64 * 8, bits),
        };
        let now = now.saturating_mul(PARTS);
        self.empty = self.empty.max(now).saturating_add(cost);
    }

    /// When something may pass again, and a little later, so that it is worth while to wake up.
    pub(super) fn opens_at(&self) -> u64 {
        let slack = (self.depth / 4).min(SECOND * PARTS / 1000);
        let opens = self.empty.saturating_sub(self.depth).saturating_add(slack);
        opens.div_ceil(PARTS)
    }
}

/// How long `bits` take at a rate, rounded up, in [`PARTS`] of nanoseconds. The largest frame is far from the end of a u64.
#[inline]
const fn time(bits: u64, each_second: u64) -> u64 {
    bits.saturating_mul(SECOND * PARTS).div_ceil(each_second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_frames_passes_at_once_and_then_at_its_rate() {
        let mut bucket = Bucket::frames(10);
        let now = 5 * SECOND;
        assert_eq!((0..100).filter(|_| bucket.take(now, 64)).count(), 10);
        assert_eq!(
            (0..100)
                .filter(|_| bucket.take(now + SECOND / 2, 64))
                .count(),
            5
        );
        let late = now + 100 * SECOND;
        assert_eq!((0..100).filter(|_| bucket.take(late, 64)).count(), 10);
        let mut closed = Bucket::frames(0);
        assert!(!closed.take(late, 64));
    }

    #[test]
    fn bytes_pass_at_their_rate() {
        for (text, len) in [("64K", 1500), ("10M", 64), ("1G", 9000), ("1000G", 65536)] {
            let rate: Rate = text.parse().unwrap();
            let mut bucket = Bucket::bytes(rate);
            let mut passed = 0;
            for step in 0..2_000u64 {
                let now = 3 * SECOND + step * SECOND / 100;
                while bucket.take(now, len) {
                    passed += len as u64 * 8;
                }
            }
            let wanted = rate.bits() * 20;
            let burst = LEAST_BURST.max(rate.bits() / 100) + 2 * len as u64 * 8;
            assert!(passed <= wanted + burst, "{text}: {passed}");
            assert!(passed * 100 >= wanted * 99, "{text}: {passed}");
        }
    }

    #[test]
    fn it_is_open_when_it_said_it_would_be() {
        let mut bucket = Bucket::bytes("1M".parse().unwrap());
        while bucket.take(SECOND, 1500) {}
        let at = bucket.opens_at();
        assert!(at > SECOND && !bucket.is_open(SECOND) && bucket.is_open(at));
    }

    #[test]
    fn the_slowest_rate_and_the_largest_frame_do_not_overflow() {
        let mut bucket = Bucket::bytes(Rate::LEAST);
        assert!(bucket.take(0, 65536));
        assert!(bucket.take(0, 65536) && !bucket.take(0, 1));
        assert!(bucket.opens_at() > SECOND);
    }
}
