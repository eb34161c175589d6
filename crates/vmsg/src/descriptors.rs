// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How many descriptors this process may have.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Asks for as many descriptors as the user may have. The usual 1024 are meant for programs that
/// use `select`; two guests with many connections need more.
pub(crate) fn raise_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return;
    }
    let wished = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, wished) {
        tracing::warn!(%error, ?current, "cannot raise the limit of open files");
    }
}
