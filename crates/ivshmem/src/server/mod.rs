// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server: it hands out memory and doorbells.

mod options;

pub use options::{MIN_SIZE, Options, OptionsError, Port, Source};

/// The longest path of a socket, in bytes: `sun_path` has 107 and a NUL, and
/// the socket is made under a name that is longer by four.
pub const MAX_PATH: usize = 103;
