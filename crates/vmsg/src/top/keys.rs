// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is typed.

/// What a key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// End.
    Quit,
    /// The other way round.
    Reverse,
    /// With or without a line for each queue.
    Queues,
    /// Sort by the column to the left, or to the right.
    Sort(isize),
    /// Lines up or down.
    Scroll(isize),
    /// Pages up or down.
    Page(isize),
    /// To the first line.
    Home,
}

/// Finds keys in what a terminal sends, in which one key may be several bytes that come apart.
#[derive(Debug, Default)]
pub(super) struct Keys {
    begun: Vec<u8>,
}

/// No key is as long.
const LONGEST: usize = 8;

impl Keys {
    pub(super) fn take(&mut self, bytes: &[u8]) -> Vec<Key> {
        let mut keys = Vec::new();
        for byte in bytes {
            if self.begun.is_empty() {
                match byte {
                    0x1b => self.begun.push(*byte),
                    byte => keys.extend(plain(*byte)),
                }
                continue;
            }
            self.begun.push(*byte);
            match self.begun.as_slice() {
                // A sequence: it ends with a letter or `~`.
                [_, b'[' | b'O'] => {}
                [_, b'[' | b'O', rest @ ..] => {
                    let ends = matches!(byte, 0x40..=0x7e);
                    if ends {
                        keys.extend(sequence(rest));
                    }
                    if ends || self.begun.len() >= LONGEST {
                        self.begun.clear();
                    }
                }
                // Escape alone, and something else behind it.
                _ => {
                    self.begun.clear();
                    if *byte == 0x1b {
                        self.begun.push(*byte);
                    } else {
                        keys.extend(plain(*byte));
                    }
                }
            }
        }
        keys
    }
}

fn plain(byte: u8) -> Option<Key> {
    match byte {
        // ^C, ^D.
        b'q' | b'Q' | 0x03 | 0x04 => Some(Key::Quit),
        b'r' | b'R' => Some(Key::Reverse),
        b't' | b'T' => Some(Key::Queues),
        b'<' | b'h' => Some(Key::Sort(-1)),
        b'>' | b'l' | b's' => Some(Key::Sort(1)),
        b'k' => Some(Key::Scroll(-1)),
        b'j' => Some(Key::Scroll(1)),
        b' ' => Some(Key::Page(1)),
        b'g' => Some(Key::Home),
        _ => None,
    }
}

/// What is behind `ESC [` or `ESC O`.
fn sequence(rest: &[u8]) -> Option<Key> {
    match rest {
        b"A" => Some(Key::Scroll(-1)),
        b"B" => Some(Key::Scroll(1)),
        b"C" => Some(Key::Sort(1)),
        b"D" => Some(Key::Sort(-1)),
        b"5~" => Some(Key::Page(-1)),
        b"6~" => Some(Key::Page(1)),
        b"H" | b"1~" => Some(Key::Home),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_several_bytes_may_come_apart() {
        let bytes = b"\x1b[A\x1b[B\x1bOC\x1b[D\x1b[5~\x1b[6~rjx\x1bq";
        let expected = [
            Key::Scroll(-1),
            Key::Scroll(1),
            Key::Sort(1),
            Key::Sort(-1),
            Key::Page(-1),
            Key::Page(1),
            Key::Reverse,
            Key::Scroll(1),
            Key::Quit,
        ];
        assert_eq!(Keys::default().take(bytes), expected);
        let mut keys = Keys::default();
        let one_by_one: Vec<Key> = bytes.iter().flat_map(|byte| keys.take(&[*byte])).collect();
        assert_eq!(one_by_one, expected);
    }

    #[test]
    fn what_is_no_key_is_not_kept() {
        let mut keys = Keys::default();
        assert_eq!(keys.take(&b"\x1b[".repeat(1000)), []);
        assert_eq!(
            keys.take(&[0x1b, b'[', b'1', b';', b'1', b'1', b'1', b'1', b'1', b'1']),
            []
        );
        assert!(keys.begun.len() <= LONGEST);
        assert!(keys.take(b"mmq").contains(&Key::Quit));
    }
}
