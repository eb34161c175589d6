// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copies of a guest's queues in memory of their own, for device hosts that are to see nothing else.

mod types;

pub use types::{Broken, Counters, Event, Interrupt, NewError, Options, StartError, Started};
