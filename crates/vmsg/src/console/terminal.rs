// SPDX-License-Identifier: Apache-2.0 OR MIT
//! This terminal, while it belongs to a guest.

use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use anyhow::Context;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};

/// Hands every key on, until it is dropped.
#[derive(Debug)]
pub(crate) struct Raw {
    before: Termios,
}

impl Raw {
    /// Whether stdin and stdout are a terminal.
    pub(crate) fn is_possible() -> bool {
        io::stdin().is_terminal() && io::stdout().is_terminal()
    }

    pub(crate) fn new() -> anyhow::Result<Self> {
        let before = tcgetattr(io::stdin()).context("cannot ask the terminal how it is")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)
            .context("cannot have the terminal hand on all keys")?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    /// Also when this program panics.
    fn drop(&mut self) {
        // The guest may have left it in any state: attributes, the other screen, mouse, pasting, hidden cursor.
        let mut out = io::stdout().lock();
        let _ = out.write_all(
            b"\x1b[0m\x1b[?1049l\x1b[?1000l\x1b[?1002l\x1b[?1006l\x1b[?2004l\x1b[?25h\r\n",
        );
        let _ = out.flush();
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// Columns and rows of the terminal, if it knows them.
pub(crate) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdout()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Signals as something to wait for.
#[derive(Debug)]
pub(crate) struct Signals {
    end: UnixStream,
    window: UnixStream,
}

impl Signals {
    pub(crate) fn new() -> io::Result<Self> {
        let (end, write) = UnixStream::pair()?;
        for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
            signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
        }
        let (window, write) = UnixStream::pair()?;
        window.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(SIGWINCH, write)?;
        Ok(Self { end, window })
    }

    /// Readable when this program is to end.
    pub(crate) fn end(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// Readable when the window has another size.
    pub(crate) fn window(&self) -> &UnixStream {
        &self.window
    }
}
