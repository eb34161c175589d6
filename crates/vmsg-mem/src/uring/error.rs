// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why there is no io_uring.

use std::fs;
use std::io;

/// Why there is no [`Ring`](super::Ring).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The kernel has none, or hides it.
    #[error("this kernel has no io_uring, or a filter of system calls (seccomp) hides it")]
    Missing,
    /// It is not for this process.
    #[error("io_uring is not allowed here: {why}")]
    Denied {
        /// By what.
        why: String,
    },
    /// The kernel is older than what is needed.
    #[error("this kernel's io_uring has no {what}")]
    TooOld {
        /// What is missing.
        what: &'static str,
    },
    /// Anything else.
    #[error("io_uring: cannot {what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// What was said.
        source: io::Error,
    },
}

impl RingError {
    pub(super) fn new(what: &'static str, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOSYS) => Self::Missing,
            Some(libc::EPERM | libc::EACCES) => Self::Denied { why: reason() },
            _ => Self::Os { what, source },
        }
    }
}

/// Who may be asked about it (Documentation/admin-guide/sysctl/kernel.rst, io_uring_disabled).
fn reason() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let by = match text.trim() {
        "2" => "the sysctl kernel.io_uring_disabled is 2",
        "1" => {
            "the sysctl kernel.io_uring_disabled is 1, and this process is not in the group kernel.io_uring_group"
        }
        _ => "a filter of system calls (seccomp) or a security module forbids it",
    };
    by.to_owned()
}
