// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Keeps peers that come and go without end from filling the disk with log lines.

use std::time::{Duration, Instant};

/// Lines that may come one after another.
const BURST: u32 = 20;
/// One more line may come after each of these.
const REFILL: Duration = Duration::from_secs(2);

/// Lets some lines through, and says how many it has held back.
#[derive(Debug, Default)]
pub(crate) struct Chatter {
    /// Time up to which lines are spent: each costs [`REFILL`]; at most [`BURST`] of them ahead of now.
    spent: Option<Instant>,
    held_back: u64,
}

impl Chatter {
    /// Whether a line may be logged now.
    pub(crate) fn admit(&mut self, now: Instant) -> bool {
        let spent = self.spent.map_or(now, |spent| spent.max(now)) + REFILL;
        if spent > now + BURST * REFILL {
            self.held_back += 1;
            return false;
        }
        self.spent = Some(spent);
        if self.held_back > 0 {
            let lines = self.held_back;
            tracing::info!(lines, "log lines of this kind were left out");
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
        let begin = Instant::now();
        let mut chatter = Chatter::default();
        let mut lines = |millis| {
            let now = begin + Duration::from_millis(millis);
            (0..1000).filter(|_| chatter.admit(now)).count()
        };
        assert_eq!(lines(0), 20);
        assert_eq!(lines(1999), 0);
        assert_eq!(lines(2000), 1);
        assert_eq!(lines(10_000), 4);
        assert_eq!(lines(1_000_000), 20);
    }
}
