// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the parts say: a file for each, and all together on stderr.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Bytes of a log, before it becomes the old one and a new one begins.
const MAX_FILE: u64 = 16 << 20;

/// Bytes of a line that has no end yet.
const MAX_LINE: usize = 8 << 10;

/// Bytes that a pipe takes at once.
const PIPE_BUF: usize = 4096;

/// A part's log.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    file: Option<File>,
    size: u64,
}

impl Log {
    /// The log of `part` in `folder`. That of an earlier run becomes `PART.log.1`.
    pub(super) fn open(folder: &Path, part: &str) -> Self {
        let mut log = Self {
            path: folder.join(format!("{part}.log")),
            file: None,
            size: 0,
        };
        log.begin();
        log
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn begin(&mut self) {
        let mut old = self.path.clone().into_os_string();
        old.push(".1");
        // There may be none.
        let _ = fs::rename(&self.path, old);
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&self.path);
        self.size = 0;
        self.file = match file {
            Ok(file) => Some(file),
            Err(error) => {
                tracing::warn!(%error, file = %self.path.display(), "no log");
                None
            }
        };
    }

    pub(super) fn write(&mut self, bytes: &[u8]) {
        if self.size > MAX_FILE {
            self.begin();
        }
        if let Some(file) = &mut self.file {
            // A full disk must not stop anything.
            let _ = file.write_all(bytes);
            self.size = self
                .size
                .saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        }
    }
}

/// Takes bytes as they come and gives lines.
#[derive(Debug, Default)]
pub(super) struct Lines(Vec<u8>);

impl Lines {
    /// Gives each line that ends in `bytes`, or has become too long, to `take`.
    pub(super) fn feed(&mut self, bytes: &[u8], mut take: impl FnMut(&[u8])) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.0.extend_from_slice(piece);
            if piece.ends_with(b"\n") || self.0.len() >= MAX_LINE {
                self.end(&mut take);
            }
        }
    }

    /// What is left.
    pub(super) fn end(&mut self, mut take: impl FnMut(&[u8])) {
        if !self.0.is_empty() {
            let line = std::mem::take(&mut self.0);
            let end = line.iter().rposition(|byte| !matches!(byte, b'\n' | b'\r'));
            take(&line[..end.map_or(0, |end| end + 1)]);
        }
    }
}

/// Shows a line of `part` on stderr.
pub(super) fn show(part: &str, line: &[u8]) {
    let text = String::from_utf8_lossy(line);
    // Escape sequences are for the part's own terminal.
    let text: String = text
        .chars()
        .filter(|c| !c.is_control() || *c == '\t')
        .collect();
    say(&format!("{part} | {text}\n"));
}

/// Standard error for one who must not wait: each `write` is a line, which is left out if nobody reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unhurried;

impl Write for Unhurried {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        say(&String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lines that nobody was there to read.
static MISSED: AtomicU64 = AtomicU64::new(0);

/// Puts a line, with its end, on stderr, unless whoever reads that does not: everything else must not wait for them. The logs have it all.
fn say(line: &str) {
    let stderr = io::stderr();
    let missed = MISSED.load(Ordering::Relaxed);
    let mut text = String::new();
    if missed > 0 {
        let _ = writeln!(text, "[vmsg: {missed} lines were not shown]");
    }
    text.push_str(line);
    // A pipe that is ready takes so many bytes without making anybody wait (pipe(7)).
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        if !is_ready(&stderr) {
            MISSED.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let (now, later) = rest.split_at(rest.len().min(PIPE_BUF));
        if (&stderr).write_all(now).is_err() {
            // Nobody is there.
            return;
        }
        rest = later;
    }
    MISSED.fetch_sub(missed, Ordering::Relaxed);
}

/// Whether something can be written without waiting.
fn is_ready(stderr: &io::Stderr) -> bool {
    let mut fds = [PollFd::new(stderr, PollFlags::OUT)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|count| count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_and_do_not_grow_without_end() {
        let mut lines = Lines::default();
        let mut got: Vec<Vec<u8>> = Vec::new();
        for bytes in [&b"on"[..], b"e\r\ntwo\n\nth", b"ree"] {
            lines.feed(bytes, |line| got.push(line.to_vec()));
        }
        lines.end(|line| got.push(line.to_vec()));
        assert_eq!(got, [&b"one"[..], b"two", b"", b"three"]);
        for _ in 0..100 {
            lines.feed(&[b'x'; 1000], |line| assert!(line.len() < MAX_LINE + 1000));
        }
        assert!(lines.0.len() < MAX_LINE);
    }

    #[test]
    fn a_log_is_kept_once_and_begins_anew_when_it_is_large() {
        let dir = tempfile::TempDir::new().expect("a folder");
        Log::open(dir.path(), "a").write(b"first\n");
        let mut log = Log::open(dir.path(), "a");
        let read = |name: &str| fs::read(dir.path().join(name)).expect("a file");
        assert_eq!(read("a.log.1"), b"first\n");
        let mebibyte = vec![b'x'; 1 << 20];
        for _ in 0..40 {
            log.write(&mebibyte);
        }
        assert!(read("a.log").len() + read("a.log.1").len() < 36 << 20);
        assert_eq!(log.path(), dir.path().join("a.log"));
    }
}
