// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Keeps those who can cause lines of log from causing them without end.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines in a row.
const BURST: u32 = 20;
/// After those, one line in so long.
const PACE: Duration = Duration::from_secs(10);

/// A bound on the lines about one subject.
#[derive(Debug, Default)]
pub(crate) struct LogLimit(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Lines admitted and not yet paid for with time.
    spent: u32,
    since: Option<Instant>,
    withheld: u64,
}

impl LogLimit {
    /// Whether a line may be written now; then how many were not since the last one, if any.
    pub(crate) fn admit(&self) -> Option<Option<u64>> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Option<Option<u64>> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = *state.since.get_or_insert(now);
        let earned = now.saturating_duration_since(since).as_secs() / PACE.as_secs();
        if earned > 0 {
            state.spent = state
                .spent
                .saturating_sub(u32::try_from(earned).unwrap_or(u32::MAX));
            state.since = Some(now);
        }
        if state.spent < BURST {
            state.spent += 1;
            let withheld = std::mem::take(&mut state.withheld);
            Some((withheld > 0).then_some(withheld))
        } else {
            state.withheld += 1;
            None
        }
    }
}

#[cfg(test)]
#[path = "log_limit_test.rs"]
mod tests;
