// SPDX-License-Identifier: Apache-2.0 OR MIT
//! As much JSON as the version data of vfio-user takes: objects of numbers, booleans and objects, and skipping of whatever else is well-formed. No allocation, no recursion without a bound.

use thiserror::Error;

/// How deep objects and arrays may be nested.
const MAX_DEPTH: u32 = 16;

/// What is wrong with a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum JsonError {
    #[error("not JSON at byte {0}")]
    Syntax(usize),
    #[error("nested too deep")]
    Depth,
    #[error("a value of another kind than expected at byte {0}")]
    Kind(usize),
}

/// Reads values off a text.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    text: &'a str,
    at: usize,
    depth: u32,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(text: &'a str) -> Reader<'a> {
        Reader {
            text,
            at: 0,
            depth: 0,
        }
    }

    /// An object. `entry` gets each key, its escapes as they stand there, and takes the value.
    pub(crate) fn object(
        &mut self,
        mut entry: impl FnMut(&mut Reader<'a>, &'a str) -> Result<(), JsonError>,
    ) -> Result<(), JsonError> {
        if self.peek() != Some(b'{') {
            return Err(JsonError::Kind(self.at));
        }
        self.deeper()?;
        self.at += 1;
        if self.peek() == Some(b'}') {
            self.at += 1;
        } else {
            loop {
                self.space();
                let key = self.string()?;
                self.expect(b':')?;
                entry(self, key)?;
                if !self.has_next(b'}')? {
                    break;
                }
            }
        }
        self.depth -= 1;
        Ok(())
    }

    /// A number that is an unsigned integer.
    pub(crate) fn unsigned(&mut self) -> Result<u64, JsonError> {
        self.space();
        let start = self.at;
        self.number().map_err(|_| JsonError::Kind(start))?;
        self.text
            .get(start..self.at)
            .and_then(|number| number.parse().ok())
            .ok_or(JsonError::Kind(start))
    }

    /// `true` or `false`.
    pub(crate) fn boolean(&mut self) -> Result<bool, JsonError> {
        match self.peek() {
            Some(b't') => self.word("true").map(|()| true),
            Some(b'f') => self.word("false").map(|()| false),
            _ => Err(JsonError::Kind(self.at)),
        }
    }

    /// Any value.
    pub(crate) fn skip(&mut self) -> Result<(), JsonError> {
        match self.peek() {
            Some(b'{') => self.object(|reader, _| reader.skip()),
            Some(b'[') => self.array(),
            Some(b'"') => self.string().map(drop),
            Some(b't') => self.word("true"),
            Some(b'f') => self.word("false"),
            Some(b'n') => self.word("null"),
            _ => self.number(),
        }
    }

    /// Nothing but space is left.
    pub(crate) fn end(&mut self) -> Result<(), JsonError> {
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(JsonError::Syntax(self.at)),
        }
    }

    fn array(&mut self) -> Result<(), JsonError> {
        self.deeper()?;
        self.at += 1;
        if self.peek() == Some(b']') {
            self.at += 1;
        } else {
            loop {
                self.skip()?;
                if !self.has_next(b']')? {
                    break;
                }
            }
        }
        self.depth -= 1;
        Ok(())
    }

    fn deeper(&mut self) -> Result<(), JsonError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(JsonError::Depth);
        }
        Ok(())
    }

    /// After a value: a comma, or the end of what it is in.
    fn has_next(&mut self, end: u8) -> Result<bool, JsonError> {
        let byte = self.peek();
        if byte != Some(b',') && byte != Some(end) {
            return Err(JsonError::Syntax(self.at));
        }
        self.at += 1;
        Ok(byte == Some(b','))
    }

    /// A string without its quotes.
    fn string(&mut self) -> Result<&'a str, JsonError> {
        let bytes = self.text.as_bytes();
        if bytes.get(self.at) != Some(&b'"') {
            return Err(JsonError::Syntax(self.at));
        }
        let start = self.at + 1;
        let mut at = start;
        loop {
            match bytes.get(at) {
                Some(b'"') => break,
                // What is escaped does not matter here, only that it does not end the string.
                Some(b'\\') => at += 2,
                Some(0x20..) => at += 1,
                _ => return Err(JsonError::Syntax(at)),
            }
        }
        self.at = at + 1;
        self.text.get(start..at).ok_or(JsonError::Syntax(start))
    }

    fn number(&mut self) -> Result<(), JsonError> {
        self.space();
        if self.byte() == Some(b'-') {
            self.at += 1;
        }
        self.digits()?;
        if self.byte() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.byte(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.byte(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), JsonError> {
        let start = self.at;
        while self.byte().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        if self.at == start {
            return Err(JsonError::Syntax(start));
        }
        Ok(())
    }

    fn word(&mut self, word: &str) -> Result<(), JsonError> {
        if !self.text.as_bytes()[self.at..].starts_with(word.as_bytes()) {
            return Err(JsonError::Syntax(self.at));
        }
        self.at += word.len();
        Ok(())
    }

    fn expect(&mut self, byte: u8) -> Result<(), JsonError> {
        if self.peek() != Some(byte) {
            return Err(JsonError::Syntax(self.at));
        }
        self.at += 1;
        Ok(())
    }

    fn byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.byte(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    /// The next byte that is no space.
    fn peek(&mut self) -> Option<u8> {
        self.space();
        self.byte()
    }
}

#[cfg(test)]
#[path = "json_test.rs"]
mod tests;
