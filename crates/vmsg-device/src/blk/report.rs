// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why requests failed, for the log: each reason once, not each request.

use std::time::{Duration, Instant};

/// After so long the same reason is logged again.
const AGAIN: Duration = Duration::from_secs(60);

/// Reasons that are remembered.
const REASONS: usize = 8;

/// What was logged.
#[derive(Debug)]
pub(super) struct Report {
    /// The device's name.
    name: String,
    /// The latest last: reason, when it was logged, how often it came since.
    reasons: Vec<(String, Instant, u64)>,
    limit: crate::host::LogLimit,
    begun: Option<Instant>,
}

impl Report {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            reasons: Vec::new(),
            limit: crate::host::LogLimit::new(),
            begun: None,
        }
    }

    /// The disk could not do what was wanted of it.
    pub(super) fn failed(&mut self, what: &'static str, why: &dyn std::fmt::Display, now: Instant) {
        if let Some(more) = self.is_news(format!("{what}: {why}"), now) {
            tracing::error!(
                device = self.name,
                request = what,
                more,
                "the disk failed: {why}"
            );
        }
    }

    /// The driver wants what cannot be.
    pub(super) fn refused(&mut self, why: &str, now: Instant) {
        if let Some(more) = self.is_news(why.to_owned(), now) {
            tracing::warn!(device = self.name, more, "refused {why}");
        }
    }

    /// The disk has another size. A server's disk may have one as often as it likes.
    pub(super) fn resized(&mut self, before: u64, size: u64, now: Instant) {
        if self.admits(now) {
            tracing::info!(device = self.name, before, now = size, "resized");
        }
    }

    /// Whether there is room for another line.
    fn admits(&mut self, now: Instant) -> bool {
        let begun = *self.begun.get_or_insert(now);
        let time = now.saturating_duration_since(begun).as_nanos();
        let time = virtio_msg::Instant(u64::try_from(time).unwrap_or(u64::MAX));
        self.limit.admit(time)
    }

    /// Whether this is to be logged; then, how often it was not.
    fn is_news(&mut self, reason: String, now: Instant) -> Option<u64> {
        let mut more = 0;
        if let Some(at) = self.reasons.iter().position(|(known, ..)| *known == reason) {
            let (_, logged, count) = &mut self.reasons[at];
            if now.saturating_duration_since(*logged) < AGAIN {
                *count += 1;
                return None;
            }
            more = *count;
            self.reasons.remove(at);
        }
        if !self.admits(now) {
            return None;
        }
        if self.reasons.len() == REASONS {
            self.reasons.remove(0);
        }
        self.reasons.push((reason, now, 0));
        Some(more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_logged_once_a_minute_and_a_flood_of_them_not_at_all() {
        let mut report = Report::new("disk0");
        let start = Instant::now();
        assert_eq!(report.is_news("a".to_owned(), start), Some(0));
        for _ in 0..5 {
            assert_eq!(report.is_news("a".to_owned(), start), None);
        }
        assert_eq!(report.is_news("b".to_owned(), start), Some(0));
        assert_eq!(report.is_news("a".to_owned(), start + AGAIN), Some(5));
        let lines = (0..1000).filter(|n| report.is_news(n.to_string(), start + AGAIN).is_some());
        assert!(lines.count() <= 20);
        assert!(report.reasons.len() <= REASONS);
        let sizes = (0..1000).filter(|_| report.admits(start + 2 * AGAIN));
        assert!(sizes.count() <= 20);
    }
}
