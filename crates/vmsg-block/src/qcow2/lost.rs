// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Data that the medium did not take.

use std::io;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::io::Errno;

/// Why an attempt to bring data to the medium has failed first. Linux tells such a failure once and forgets it, and the data
/// with it: nothing that was written before is known to be there, and no later attempt says so.
#[derive(Debug, Default)]
pub(super) struct Lost(AtomicI32);

impl Lost {
    /// Takes note of how an attempt went, and says what is to be said of it.
    ///
    /// # Errors
    /// That of this attempt, or of the first that failed.
    pub(super) fn note(&self, result: io::Result<()>) -> io::Result<()> {
        if let Err(error) = &result {
            let errno = error.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
            let (order, rest) = (Ordering::AcqRel, Ordering::Acquire);
            if self.0.compare_exchange(0, errno, order, rest).is_ok() {
                tracing::error!(%error, "written data may be lost: each flush fails from now on");
            }
        }
        result?;
        match self.0.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_flush_that_has_failed_each_later_one_fails() {
        let lost = Lost::default();
        assert!(lost.note(Ok(())).is_ok());
        for error in [Errno::IO, Errno::NOSPC] {
            let told = lost.note(Err(error.into())).unwrap_err();
            assert_eq!(told.raw_os_error(), Some(error.raw_os_error()));
        }
        for _ in 0..2 {
            let told = lost.note(Ok(())).unwrap_err();
            assert_eq!(told.raw_os_error(), Some(Errno::IO.raw_os_error()));
        }
    }
}
