// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Keeps others from filling the disk with what is logged about them.

use virtio_msg::Instant;

/// Lines that may come one after another.
const BURST: u64 = 20;
/// One more line may come after so many nanoseconds.
const REFILL: u64 = 2_000_000_000;

/// Lets some lines through, and says how many it has held back.
#[derive(Debug)]
pub struct LogLimit {
    /// Time up to which lines are spent: each costs [`REFILL`]; at most [`BURST`] of them ahead of now.
    spent: u64,
    held_back: u64,
}

impl Default for LogLimit {
    fn default() -> Self {
        Self::new()
    }
}

impl LogLimit {
    /// Nothing was logged yet.
    pub const fn new() -> Self {
        Self {
            spent: 0,
            held_back: 0,
        }
    }

    /// Whether a line may be logged now.
    pub fn admit(&mut self, now: Instant) -> bool {
        let spent = self.spent.max(now.0) + REFILL;
        if spent > now.0.saturating_add(BURST * REFILL) {
            self.held_back += 1;
            return false;
        }
        self.spent = spent;
        if self.held_back > 0 {
            tracing::warn!(
                lines = self.held_back,
                "log lines of this kind were left out"
            );
            self.held_back = 0;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_logged_and_then_one_line_in_two_seconds() {
        let mut limit = LogLimit::new();
        let mut lines = |millis: u64| {
            let now = Instant(millis * 1_000_000);
            (0..1000).filter(|_| limit.admit(now)).count()
        };
        assert_eq!(lines(0), 20);
        assert_eq!(lines(1999), 0);
        assert_eq!(lines(2000), 1);
        assert_eq!(lines(10_000), 4);
        assert_eq!(lines(1_000_000), 20);
    }
}
