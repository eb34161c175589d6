// SPDX-License-Identifier: Apache-2.0 OR MIT
//! When who wants to be woken.

use std::collections::BTreeSet;
use std::time::Instant;

use super::net::Source;

/// At most one entry for each source, so that nothing a guest does makes this grow. Who wants to
/// be woken later than noted is woken too early once and notes the later time then: moving an
/// entry back with each frame would cost more.
#[derive(Debug, Default)]
pub(super) struct Timers {
    entries: BTreeSet<(Instant, Source)>,
}

impl Timers {
    /// Wakes `source` at `at` at the latest. `noted` is what the source remembers of its entry.
    pub(super) fn set(&mut self, source: Source, noted: &mut Option<Instant>, at: Instant) {
        if noted.is_some_and(|noted| noted <= at) {
            return;
        }
        self.clear(source, noted);
        self.entries.insert((at, source));
        *noted = Some(at);
    }

    pub(super) fn clear(&mut self, source: Source, noted: &mut Option<Instant>) {
        if let Some(noted) = noted.take() {
            self.entries.remove(&(noted, source));
        }
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.entries.first().map(|(at, _)| *at)
    }

    /// Takes out one whose time has come; its note is void.
    pub(super) fn pop(&mut self, now: Instant) -> Option<Source> {
        if self.next()? > now {
            return None;
        }
        self.entries.pop_first().map(|(_, source)| source)
    }
}
