// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One console as the terminal has it: a connection that is made again, and what has come over it.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::keys::Questions;

/// Output that is kept, to be shown when the console is switched to.
const KEPT: usize = 64 * 1024;
/// Typed text that waits for the guest.
const MAX_TYPED: usize = 64 * 1024;
/// What comes first and so soon after connecting is what was before.
const REPLAY: Duration = Duration::from_millis(300);
const CHUNK: usize = 16 * 1024;

/// A console.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) socket: PathBuf,
    stream: Option<UnixStream>,
    since: Instant,
    /// What was before may still come.
    replaying: bool,
    questions: Questions,
    typed: VecDeque<u8>,
    kept: VecDeque<u8>,
    /// There is output that was not shown.
    pub(super) fresh: bool,
}

impl Line {
    pub(super) fn new(name: String, socket: PathBuf) -> Self {
        Self {
            name,
            socket,
            stream: None,
            since: Instant::now(),
            replaying: false,
            questions: Questions::default(),
            typed: VecDeque::new(),
            kept: VecDeque::new(),
            fresh: false,
        }
    }

    /// Connects; true if it was not connected.
    pub(super) fn connect(&mut self) -> io::Result<bool> {
        if self.stream.is_some() {
            return Ok(false);
        }
        let stream = UnixStream::connect(&self.socket)?;
        stream.set_nonblocking(true)?;
        self.stream = Some(stream);
        self.since = Instant::now();
        self.replaying = true;
        self.typed.clear();
        Ok(true)
    }

    /// Everything is taken as it is, from now on.
    pub(super) fn expect_no_replay(&mut self) {
        self.replaying = false;
    }

    /// Nothing more will be typed.
    pub(super) fn end_typing(&self) {
        if let Some(stream) = &self.stream {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
    }

    pub(super) fn stream(&self) -> Option<&UnixStream> {
        self.stream.as_ref()
    }

    /// Whether text waits for the guest to take it.
    pub(super) fn is_waiting(&self) -> bool {
        !self.typed.is_empty()
    }

    /// Sends `text`, now or later; false if there is too much of it.
    pub(super) fn write(&mut self, text: &[u8]) -> bool {
        if self.stream.is_none() || self.typed.len() + text.len() > MAX_TYPED {
            return false;
        }
        self.typed.extend(text);
        self.flush();
        true
    }

    pub(super) fn flush(&mut self) {
        while let (Some(stream), false) = (&mut self.stream, self.typed.is_empty()) {
            match stream.write(self.typed.as_slices().0) {
                Ok(count) => drop(self.typed.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Reading sees that it has ended.
                Err(_) => self.typed.clear(),
            }
        }
    }

    /// What has come; `None` when the connection has just ended. `shown`: it will be looked at now.
    pub(super) fn read(&mut self, shown: bool) -> Option<Vec<u8>> {
        let mut chunk = [0; CHUNK];
        let stream = self.stream.as_mut()?;
        let count = match stream.read(&mut chunk) {
            Ok(0) => 0,
            Ok(count) => count,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                return Some(Vec::new());
            }
            Err(_) => 0,
        };
        if count == 0 {
            self.stream = None;
            return None;
        }
        let old = self.replaying && self.since.elapsed() < REPLAY;
        // It is sent in one piece.
        self.replaying = old && count == CHUNK;
        let bytes = if old {
            self.questions.strip(&chunk[..count])
        } else {
            let mut bytes = self.questions.rest();
            bytes.extend(&chunk[..count]);
            bytes
        };
        self.kept.extend(&bytes);
        let excess = self.kept.len().saturating_sub(KEPT);
        self.kept.drain(..excess);
        self.fresh |= !shown && !old;
        Some(bytes)
    }

    /// What was written last, as it can be shown again.
    pub(super) fn replay(&mut self) -> Vec<u8> {
        self.fresh = false;
        let (first, second) = self.kept.as_slices();
        let mut questions = Questions::default();
        let mut bytes = questions.strip(first);
        bytes.extend(questions.strip(second));
        bytes
    }
}
