// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Results on stdout, whose reader may leave before the end, as `head` does.

use std::io::{self, StdoutLock, Write};

/// Nobody reads stdout any more.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads the output any more")]
struct Closed;

/// Stdout. That its reader has left is told from all other errors by [`is_closed`].
#[derive(Debug)]
pub(crate) struct Out(StdoutLock<'static>);

impl Out {
    pub(crate) fn lock() -> Self {
        Self(io::stdout().lock())
    }
}

fn tell<T>(result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => io::Error::new(io::ErrorKind::BrokenPipe, Closed),
        _ => error,
    })
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        tell(self.0.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        tell(self.0.flush())
    }
}

/// True if a command ended since nobody reads its output any more, which is no failure.
pub(crate) fn is_closed(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref)
            .is_some_and(|inner| inner.is::<Closed>())
    })
}

/// An error and its causes in one line; a cause that the text before it ends with is not repeated.
pub(crate) fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_cause_that_was_told_is_not_told_again() {
        let cause = || io::Error::other("no space");
        let error = Err::<(), _>(cause()).context("cannot write: no space");
        assert_eq!(chain(&error.unwrap_err()), "cannot write: no space");
        let error = Err::<(), _>(cause()).context("cannot write");
        assert_eq!(chain(&error.unwrap_err()), "cannot write: no space");
    }

    #[test]
    fn a_closed_stdout_is_told_from_other_broken_pipes() {
        let broken = || io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(!is_closed(&broken().into()));
        let error = tell::<()>(Err(broken())).context("cannot print");
        assert!(is_closed(&error.unwrap_err()));
    }
}
