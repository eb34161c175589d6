// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver's memory that can only be copied from and to.

use core::sync::atomic::Ordering;

use vmsg_mem::{Access, AddressSpace, BusAddr, RamSlice};

/// Bytes that go through the stack at a time where memory cannot be copied directly.
const CHUNK: usize = 1024;

/// Memory of a driver, reached by its bus addresses and by copies alone: mapped, behind messages, or partly this, partly that.
///
/// An access may touch a range in any order, and may have done a part of it when it fails. Doing it again does no harm.
pub trait Memory {
    /// Why an access failed.
    type Error;

    /// Copies `into.len()` bytes from `addr` on.
    ///
    /// # Errors
    ///
    /// If not all of the range can be read.
    fn read(&self, addr: BusAddr, into: &mut [u8]) -> Result<(), Self::Error>;

    /// Copies all of `from` to `addr`.
    ///
    /// # Errors
    ///
    /// If not all of the range can be written.
    fn write(&self, addr: BusAddr, from: &[u8]) -> Result<(), Self::Error>;

    /// The little-endian word at `addr`, which is a multiple of 2, read in one piece. What the driver wrote before it wrote
    /// the word is seen by every access that follows.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    fn load_u16(&self, addr: BusAddr) -> Result<u16, Self::Error>;

    /// Writes the little-endian word at `addr`, which is a multiple of 2, in one piece. A driver that sees it sees all that
    /// was written before.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    fn store_u16(&self, addr: BusAddr, value: u16) -> Result<(), Self::Error>;

    /// Copies from `addr` on until `to` is full.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read).
    fn read_into(&self, addr: BusAddr, to: RamSlice<'_>) -> Result<(), Self::Error> {
        let mut buf = [0; CHUNK];
        let mut done = 0;
        while done < to.len() {
            let n = CHUNK.min(to.len() - done);
            // Past the end of the address space is nothing, which is for `read` to say.
            let at = BusAddr(addr.0.wrapping_add(done as u64));
            self.read(at, &mut buf[..n])?;
            to.write(done, &buf[..n]);
            done += n;
        }
        Ok(())
    }

    /// Copies all of `from` to `addr`. Each byte of `from` is read once.
    ///
    /// # Errors
    ///
    /// As for [`write`](Self::write).
    fn write_from(&self, addr: BusAddr, from: RamSlice<'_>) -> Result<(), Self::Error> {
        let mut buf = [0; CHUNK];
        let mut done = 0;
        while done < from.len() {
            let n = from.read(done, &mut buf);
            let at = BusAddr(addr.0.wrapping_add(done as u64));
            self.write(at, &buf[..n])?;
            done += n;
        }
        Ok(())
    }

    /// How many bytes a read should ask for when those behind the ones needed are likely to be needed, too. Memory behind
    /// messages, where each read takes a round trip, says more.
    fn read_ahead(&self) -> usize {
        256
    }
}

impl<M: Memory + ?Sized> Memory for &M {
    type Error = M::Error;

    fn read(&self, addr: BusAddr, into: &mut [u8]) -> Result<(), Self::Error> {
        (**self).read(addr, into)
    }
    fn write(&self, addr: BusAddr, from: &[u8]) -> Result<(), Self::Error> {
        (**self).write(addr, from)
    }
    fn load_u16(&self, addr: BusAddr) -> Result<u16, Self::Error> {
        (**self).load_u16(addr)
    }
    fn store_u16(&self, addr: BusAddr, value: u16) -> Result<(), Self::Error> {
        (**self).store_u16(addr, value)
    }
    fn read_into(&self, addr: BusAddr, to: RamSlice<'_>) -> Result<(), Self::Error> {
        (**self).read_into(addr, to)
    }
    fn write_from(&self, addr: BusAddr, from: RamSlice<'_>) -> Result<(), Self::Error> {
        (**self).write_from(addr, from)
    }
    fn read_ahead(&self) -> usize {
        (**self).read_ahead()
    }
}

/// Memory that is mapped. Ranges may cross from one window into the next; words may not.
impl Memory for AddressSpace<'_> {
    type Error = vmsg_mem::Error;

    #[inline]
    fn read(&self, addr: BusAddr, into: &mut [u8]) -> Result<(), Self::Error> {
        let mut done = 0;
        self.pieces(addr, into.len(), Access::Read, |piece| {
            done += piece.read(0, &mut into[done..]);
            true
        })
    }

    #[inline]
    fn write(&self, addr: BusAddr, from: &[u8]) -> Result<(), Self::Error> {
        let mut done = 0;
        self.pieces(addr, from.len(), Access::ReadWrite, |piece| {
            done += piece.write(0, &from[done..]);
            true
        })
    }

    #[inline]
    fn load_u16(&self, addr: BusAddr) -> Result<u16, Self::Error> {
        let word = self.slice(addr, 2, Access::Read)?.atomic_u16(0);
        let word = word.ok_or(vmsg_mem::Error::Misaligned { addr, align: 2 })?;
        // SYNC POINT: pairs with the driver's release of an index.
        Ok(u16::from_le(word.load(Ordering::Acquire)))
    }

    #[inline]
    fn store_u16(&self, addr: BusAddr, value: u16) -> Result<(), Self::Error> {
        let word = self.slice(addr, 2, Access::ReadWrite)?.atomic_u16(0);
        let word = word.ok_or(vmsg_mem::Error::Misaligned { addr, align: 2 })?;
        // SYNC POINT: pairs with the driver's acquire of an index.
        word.store(value.to_le(), Ordering::Release);
        Ok(())
    }

    #[inline]
    fn read_into(&self, addr: BusAddr, to: RamSlice<'_>) -> Result<(), Self::Error> {
        let mut rest = to;
        self.pieces(addr, to.len(), Access::Read, |piece| {
            let done = piece.copy_to(rest);
            rest = rest.split_at(done).1;
            true
        })
    }

    #[inline]
    fn write_from(&self, addr: BusAddr, from: RamSlice<'_>) -> Result<(), Self::Error> {
        let mut rest = from;
        self.pieces(addr, from.len(), Access::ReadWrite, |piece| {
            let done = rest.copy_to(piece);
            rest = rest.split_at(done).1;
            true
        })
    }
}
