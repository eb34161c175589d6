// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus `ivshmem`: message queues in memory that two machines share, with doorbells or without. docs/bus-ivshmem.md.

mod common;
mod spec;

pub use spec::{IvshmemSpec, MemoryMode, PhysicalWindow, Place, QueueLayout, Ram, SpecError};
