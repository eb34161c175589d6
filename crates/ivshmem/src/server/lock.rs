// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Locks whose holder says in the file who it is.

use std::path::Path;

use vmsg_mem::ending;
pub(super) use vmsg_mem::lock::{FileLock, LockError};

/// Takes the lock on the file, which is made if it is not there. Who holds it and is ending is waited for: the first word
/// in the file is the holder's process id. With `remove` the file goes with the lock.
pub(super) fn take(path: &Path, remove: bool) -> Result<FileLock, LockError> {
    ending::attempt_past(
        || FileLock::take(path, remove),
        |error| match error {
            LockError::Held(text) => holder(text),
            LockError::Os { .. } => None,
        },
    )
}

/// The holder that a file names.
pub(super) fn holder(text: &str) -> Option<u32> {
    text.split_ascii_whitespace().next()?.parse().ok()
}
