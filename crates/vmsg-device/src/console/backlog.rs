// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The last output of a console, for who comes late.

use std::collections::VecDeque;

/// The latest bytes, up to a limit.
#[derive(Debug)]
pub(super) struct Backlog {
    bytes: VecDeque<u8>,
    limit: usize,
    /// Older bytes were dropped.
    cut: bool,
}

impl Backlog {
    /// An empty one that keeps at most `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            limit,
            cut: false,
        }
    }

    /// Adds `bytes`; the oldest give way.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let kept = &bytes[bytes.len().saturating_sub(self.limit)..];
        let excess = (self.bytes.len() + kept.len()).saturating_sub(self.limit);
        self.cut |= excess > 0 || kept.len() < bytes.len();
        self.bytes.drain(..excess);
        self.bytes.extend(kept);
    }

    /// All of it; where the beginning is missing, from the first whole line on, if there is one.
    pub(super) fn replay(&self) -> impl Iterator<Item = u8> {
        let begin = if self.cut {
            let end = self.bytes.iter().position(|byte| *byte == b'\n');
            end.map_or(0, |end| end + 1)
        } else {
            0
        };
        self.bytes.iter().copied().skip(begin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replayed(backlog: &Backlog) -> Vec<u8> {
        backlog.replay().collect()
    }

    #[test]
    fn all_is_kept_while_it_fits() {
        let mut backlog = Backlog::new(8);
        backlog.push(b"abc");
        backlog.push(b"\ndefg");
        assert_eq!(replayed(&backlog), b"abc\ndefg");
    }

    #[test]
    fn what_is_cut_begins_with_a_whole_line() {
        let mut backlog = Backlog::new(8);
        backlog.push(b"abc\ndefgh");
        assert_eq!(replayed(&backlog), b"defgh");
        backlog.push(b"0123456789");
        assert_eq!(replayed(&backlog), b"23456789");
        backlog.push(b"");
        assert_eq!(replayed(&backlog), b"23456789");
    }
}
