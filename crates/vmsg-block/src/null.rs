// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk that keeps nothing, to see what all the rest costs.

use std::sync::Arc;

use vmsg_mem::WindowTable;

use crate::{Completion, Disk, Facts, Request, Submitted};

/// Does nothing with any request and says that it is done: what is read is what was in the memory before.
#[derive(Clone, Debug)]
pub struct NullDisk {
    /// Size in bytes; what is no multiple of 512 is left off.
    pub size: u64,
}

impl Disk for NullDisk {
    fn facts(&self) -> Facts {
        Facts {
            size: self.size & !511,
            block_size: 512,
            physical_block_size: 512,
            alignment_offset: 0,
            optimal_io_size: 0,
            read_only: false,
            discard: true,
            discard_granularity: 512,
            write_zeroes: true,
        }
    }

    fn submit(&mut self, _: u32, _: Request<'_>, _: &Arc<WindowTable>) -> Submitted {
        Submitted::Done(Ok(()))
    }

    fn completed(&mut self, _: &mut Vec<Completion>) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn set_write_back(&mut self, _: bool) {}
}
