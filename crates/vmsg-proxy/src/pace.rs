// SPDX-License-Identifier: Apache-2.0 OR MIT
//! When to connect again after a connection has ended.

use std::time::{Duration, Instant};

/// Pause before a connection that had to be given up is tried again. Twice as long each time.
const FAULT_PAUSE: Duration = Duration::from_millis(500);
/// The longest of these pauses.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// A connection that held so long was good, whatever its end.
const GOOD: Duration = Duration::from_secs(30);
/// Connections ended by the device host after which the next is made at once, and how long each counts.
const QUICK: u32 = 8;
const QUICK_PACE: Duration = Duration::from_secs(1);

/// What became of the connections so far.
#[derive(Debug)]
pub(crate) struct Pace {
    connected: Instant,
    /// Connections in a row that had to be given up.
    faults: u32,
    /// Connections that the host ended of late, and from when on they count.
    ended: u32,
    since: Instant,
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Pace {
        Pace {
            connected: now,
            faults: 0,
            ended: 0,
            since: now,
        }
    }

    pub(crate) fn connected(&mut self, now: Instant) {
        self.connected = now;
    }

    /// The pause after a connection that was given up.
    pub(crate) fn after_fault(&mut self, now: Instant) -> Duration {
        if now.saturating_duration_since(self.connected) >= GOOD {
            self.faults = 0;
        }
        let pause = FAULT_PAUSE.saturating_mul(1 << self.faults.min(8));
        self.faults = self.faults.saturating_add(1);
        pause.min(LONGEST_PAUSE)
    }

    /// The pause after a connection that the device host has ended. Hosts are restarted and killed, and are wanted back at once; but one
    /// that lets everybody in and throws them out must not keep us busy.
    pub(crate) fn after_end(&mut self, now: Instant) -> Duration {
        let forgiven = now.saturating_duration_since(self.since).as_secs() / QUICK_PACE.as_secs();
        if forgiven > 0 {
            let forgiven = u32::try_from(forgiven).unwrap_or(u32::MAX);
            self.ended = self.ended.saturating_sub(forgiven);
            self.since = now;
        }
        self.ended = self.ended.saturating_add(1);
        if self.ended > QUICK {
            QUICK_PACE
        } else {
            Duration::ZERO
        }
    }
}

#[cfg(test)]
#[path = "pace_test.rs"]
mod tests;
