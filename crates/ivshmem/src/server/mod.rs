// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server: it hands out memory and doorbells.
//!
//! It speaks as QEMU's `ivshmem-server` does, byte for byte and in its order, to QEMU's `ivshmem-doorbell` and to
//! [`Client`](crate::Client). What it does better, where the protocol allows:
//!
//! * A [`Port`] can have an id: its client always has this one, and its doorbells go on when it comes back.
//! * A client that does not read is dropped; nobody waits for it.
//! * Memory that has a name outlives its server. The next server gives no id that a client of the one before may have.
//! * No client is ever told that an id joins which it has seen leave: QEMU's device uses freed memory then.

mod connection;
mod core;
mod ids;
mod ledger;
mod listen;
mod lock;
mod log_limit;
mod memory;
mod options;
mod serve;
mod stats;

pub use ledger::LedgerError;
pub use listen::ListenError;
pub use memory::MemoryError;
pub use options::{MIN_SIZE, Options, OptionsError, Port, Source};
pub use serve::{Server, ServerError, Turn};
pub use stats::{PortStats, Stats};

/// The longest path of a socket, in bytes: `sun_path` has 107 and a NUL, and
/// the socket is made under a name that is longer by four.
pub const MAX_PATH: usize = 103;
