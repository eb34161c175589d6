// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Keeps clients that come and go without end from filling the log.

use std::time::{Duration, Instant};

/// Lines in a row.
const BURST: u32 = 64;
/// One more comes after so long.
const PACE: Duration = Duration::from_secs(1);

/// A bound on lines about clients.
#[derive(Debug)]
pub(super) struct LogLimit {
    left: u32,
    since: Instant,
    withheld: u64,
}

impl LogLimit {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            since: now,
            withheld: 0,
        }
    }

    /// Whether a line may be written; before one after others that may not, their number is.
    pub(super) fn admit(&mut self, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.since).as_secs() / PACE.as_secs();
        if earned > 0 {
            let earned = u32::try_from(earned).unwrap_or(u32::MAX);
            self.left = self.left.saturating_add(earned).min(BURST);
            self.since = now;
        }
        let Some(left) = self.left.checked_sub(1) else {
            self.withheld += 1;
            return false;
        };
        self.left = left;
        if self.withheld > 0 {
            let lines = std::mem::take(&mut self.withheld);
            tracing::warn!(lines, "so many lines about clients were left out");
        }
        true
    }
}

#[cfg(test)]
#[path = "log_limit_test.rs"]
mod tests;
