// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory of a guest whose VMM has lent all of it as files.

use super::{GuestMemory, MemoryError};
use std::sync::{Arc, PoisonError, RwLock};
use vmsg_mem::{BusAddr, RamSlice, WindowTable};
use vmsg_queue::remote::Memory;

/// A table of memory that is mapped here, which can be replaced at any time.
#[derive(Debug, Default)]
pub(crate) struct TableMemory(RwLock<Arc<WindowTable>>);

impl TableMemory {
    /// Puts another table in place of this one. When it returns, nobody touches any more what was only in the old one, and nothing of it is mapped
    /// by this. Waits for accesses that are under way, which are copies of at most a buffer.
    pub(crate) fn replace(&self, table: WindowTable) {
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *current = Arc::new(table);
    }

    fn with<T>(
        &self,
        addr: BusAddr,
        len: usize,
        access: impl FnOnce(vmsg_mem::AddressSpace<'_>) -> Result<T, vmsg_mem::Error>,
    ) -> Result<T, MemoryError> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let result = access(table.space())?;
        // The VMM has cut a file off: what was read are zeroes of ours.
        if table.is_lost() {
            return Err(MemoryError::Unmapped { addr, len });
        }
        Ok(result)
    }
}

impl Memory for TableMemory {
    type Error = MemoryError;

    fn read(&self, addr: BusAddr, into: &mut [u8]) -> Result<(), MemoryError> {
        self.with(addr, into.len(), |space| space.read(addr, into))
    }

    fn write(&self, addr: BusAddr, from: &[u8]) -> Result<(), MemoryError> {
        self.with(addr, from.len(), |space| space.write(addr, from))
    }

    fn load_u16(&self, addr: BusAddr) -> Result<u16, MemoryError> {
        self.with(addr, 2, |space| space.load_u16(addr))
    }

    fn store_u16(&self, addr: BusAddr, value: u16) -> Result<(), MemoryError> {
        self.with(addr, 2, |space| space.store_u16(addr, value))
    }

    fn read_into(&self, addr: BusAddr, to: RamSlice<'_>) -> Result<(), MemoryError> {
        self.with(addr, to.len(), |space| space.read_into(addr, to))
    }

    fn write_from(&self, addr: BusAddr, from: RamSlice<'_>) -> Result<(), MemoryError> {
        self.with(addr, from.len(), |space| space.write_from(addr, from))
    }
}

impl GuestMemory for TableMemory {
    fn cancel(&self) {}
}

#[cfg(test)]
#[path = "table_test.rs"]
mod tests;
