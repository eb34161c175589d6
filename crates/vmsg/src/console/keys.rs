// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is typed on the terminal: text for the guest, and commands behind the escape key.

use std::fmt;
use std::str::FromStr;

/// The key that begins a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Escape(Option<u8>);

impl Default for Escape {
    fn default() -> Self {
        Self(Some(0x1d))
    }
}

/// The text is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key is written as ^X, as one character, or as `none`")]
pub struct BadEscape;

impl FromStr for Escape {
    type Err = BadEscape;

    fn from_str(text: &str) -> Result<Self, BadEscape> {
        match text.as_bytes() {
            b"none" => Ok(Self(None)),
            [b'^', key] if (b'@'..=b'_').contains(&key.to_ascii_uppercase()) => {
                Ok(Self(Some(key.to_ascii_uppercase() & 0x1f)))
            }
            [key] if key.is_ascii_graphic() => Ok(Self(Some(*key))),
            _ => Err(BadEscape),
        }
    }
}

impl fmt::Display for Escape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("none"),
            Some(key) if key < 0x20 => write!(f, "^{}", char::from(key | 0x40)),
            Some(key) => write!(f, "{}", char::from(key)),
        }
    }
}

/// What was typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Typed {
    Text(Vec<u8>),
    Next,
    Previous,
    Choose(usize),
    List,
    Detach,
    Help,
}

/// Tells commands from text.
#[derive(Debug, Default)]
pub(super) struct Keys {
    escape: Escape,
    /// The escape key was the last.
    escaped: bool,
}

impl Keys {
    pub(super) fn new(escape: Escape) -> Self {
        Self {
            escape,
            escaped: false,
        }
    }

    /// What `bytes` say, in order.
    pub(super) fn read(&mut self, bytes: &[u8]) -> Vec<Typed> {
        let Escape(Some(escape)) = self.escape else {
            return vec![Typed::Text(bytes.to_vec())];
        };
        let mut typed = Vec::new();
        let mut text = Vec::new();
        for &byte in bytes {
            if !std::mem::replace(&mut self.escaped, false) {
                if byte == escape {
                    self.escaped = true;
                } else {
                    text.push(byte);
                }
                continue;
            }
            let command = match byte {
                byte if byte == escape => {
                    text.push(byte);
                    continue;
                }
                b'n' => Typed::Next,
                b'p' => Typed::Previous,
                b'0'..=b'9' => Typed::Choose(usize::from(byte - b'0')),
                b'l' => Typed::List,
                b'd' | b'q' => Typed::Detach,
                // Who does not know what there is wants to.
                _ => Typed::Help,
            };
            if !text.is_empty() {
                typed.push(Typed::Text(std::mem::take(&mut text)));
            }
            typed.push(command);
        }
        if !text.is_empty() {
            typed.push(Typed::Text(text));
        }
        typed
    }
}

/// Takes out of old output what a terminal would answer: the answer would go to the guest as if it were typed.
#[derive(Debug, Default)]
pub(super) struct Questions {
    /// A sequence that has begun.
    held: Vec<u8>,
}

/// Bytes of the longest sequence that is looked at.
const LONGEST: usize = 32;

impl Questions {
    /// `bytes` without questions; what may be one is held back until it is known.
    pub(super) fn strip(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut plain = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            match self.held.as_slice() {
                [] if byte == 0x1b => self.held.push(byte),
                [] => plain.push(byte),
                [_] if byte == b'[' => self.held.push(byte),
                // The old question for who it is.
                [_] if byte == b'Z' => self.held.clear(),
                [_, _, ..] if matches!(byte, 0x20..=0x3f) && self.held.len() < LONGEST => {
                    self.held.push(byte);
                }
                // Device status, device attributes, and how the window is.
                [_, _, ..] if matches!(byte, b'n' | b'c' | b't') => self.held.clear(),
                _ => {
                    plain.append(&mut self.held);
                    if byte == 0x1b {
                        self.held.push(byte);
                    } else {
                        plain.push(byte);
                    }
                }
            }
        }
        plain
    }

    /// What was held back.
    pub(super) fn rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
#[path = "keys_test.rs"]
mod tests;
