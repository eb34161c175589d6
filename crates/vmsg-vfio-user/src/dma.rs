// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory of the client, read and written by messages to it.

use crate::shared::{DmaError, Shared};
use crate::wire::{Fields, Header, Malformed, begin_command, finish, id};
use rustix::io::Errno;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The most bytes of data per message: it goes into the socket in one piece then, next to another one.
const MAX_DATA: usize = 64 * 1024;
/// Bytes before the data: address and byte count.
const WIDE_HEAD: usize = 16;
/// The same with a byte count of 32 bits.
const NARROW_HEAD: usize = 12;
/// The bytes of the first transfer, which shows how a client lays messages out.
const PROBE: usize = 4;

/// How a client lays out the messages about its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// The specification's: a byte count of 64 bits, then data.
    Wide,
    /// QEMU's: a byte count of 32 bits, then data, then the 4 bytes that were saved. (QEMU's `VFIOUserDMARW` is 32 bytes long, and its data begins at 28.)
    Narrow,
}

/// What is asked of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Transfer {
    /// DMA_READ or DMA_WRITE.
    pub(crate) command: u16,
    pub(crate) address: u64,
    pub(crate) count: usize,
    pub(crate) layout: Layout,
    /// Asks for 4 GiB more than it means. Who counts in 32 bits does not see that, who counts in 64 refuses.
    pub(crate) probe: bool,
}

impl Transfer {
    pub(crate) fn message(&self, id: u16, data: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(32 + data.len());
        begin_command(&mut out, id, self.command);
        out.extend_from_slice(&self.address.to_ne_bytes());
        let count = u32::try_from(self.count).expect("64 KiB at most");
        let rest = u32::from(self.probe).to_ne_bytes();
        out.extend_from_slice(&count.to_ne_bytes());
        match self.layout {
            Layout::Wide => {
                out.extend_from_slice(&rest);
                out.extend_from_slice(data);
            }
            Layout::Narrow => {
                out.extend_from_slice(data);
                out.extend_from_slice(&rest);
            }
        }
        finish(&mut out);
        out
    }

    /// What was read, or nothing for a write.
    pub(crate) fn answer(&self, header: &Header, payload: &[u8]) -> Result<Vec<u8>, DmaError> {
        match header.error() {
            // No error has a number above 4095.
            Some(errno @ 1..4096) => {
                let errno = i32::try_from(errno).expect("below 4096");
                return Err(DmaError::Refused(Errno::from_raw_os_error(errno)));
            }
            Some(_) => return Err(DmaError::Refused(Errno::IO)),
            None if self.command == id::DMA_WRITE => return Ok(Vec::new()),
            None => {}
        }
        self.data(payload)
            .map_err(|_| DmaError::Refused(Errno::PROTO))
    }

    fn data(&self, payload: &[u8]) -> Result<Vec<u8>, Malformed> {
        let mut fields = Fields(payload);
        let address = fields.u64()?;
        let count = fields.u32()?;
        if address != self.address
            || usize::try_from(count) != Ok(self.count)
            || payload.len() != WIDE_HEAD + self.count
        {
            return Err(Malformed::Count);
        }
        let start = match self.layout {
            Layout::Wide => WIDE_HEAD,
            Layout::Narrow => NARROW_HEAD,
        };
        Fields(&payload[start..])
            .bytes(self.count)
            .map(<[u8]>::to_vec)
    }
}

/// Reads and writes memory of a client that came without a descriptor, by asking the client.
///
/// To be used by another thread than the one in [`crate::Connection::turn`], which is the one that takes the answers; several may at the same time. A call ends after [`crate::Options::dma_timeout`]
/// at the latest. An access that ends with an error may have happened in part.
#[derive(Clone, Debug)]
pub struct Dma {
    shared: Arc<Shared>,
    timeout: Duration,
}

impl Dma {
    pub(crate) fn new(shared: Arc<Shared>, timeout: Duration) -> Dma {
        Dma { shared, timeout }
    }

    /// Fills `data` with what is at `address`.
    ///
    /// # Errors
    ///
    /// See [`DmaError`].
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let call = self.call(address, data.len())?;
        let mut at = address;
        for part in data.chunks_mut(call.most) {
            let transfer = call.transfer(id::DMA_READ, at, part.len());
            let answer = call.make(transfer, &[])?;
            part.copy_from_slice(&answer);
            at = at.wrapping_add(length(part.len()));
        }
        Ok(())
    }

    /// Writes `data` to `address`.
    ///
    /// # Errors
    ///
    /// See [`DmaError`]. The first access of all reads some of the bytes before it writes them, to see how the client lays messages out: to memory that cannot be read it is refused.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        let call = self.call(address, data.len())?;
        let mut at = address;
        for part in data.chunks(call.most) {
            call.make(call.transfer(id::DMA_WRITE, at, part.len()), part)?;
            at = at.wrapping_add(length(part.len()));
        }
        Ok(())
    }

    /// Ends all calls that are under way, with [`DmaError::Cancelled`]. Later ones work.
    pub fn cancel(&self) {
        self.shared.cancel();
    }

    fn call(&self, address: u64, len: usize) -> Result<Call<'_>, DmaError> {
        let negotiated = self
            .shared
            .negotiated()
            .ok_or(DmaError::Refused(Errno::NOTCONN))?;
        let most = usize::try_from(negotiated.max_data_xfer_size).unwrap_or(MAX_DATA);
        let mut call = Call {
            shared: &self.shared,
            cancels: self.shared.cancels(),
            deadline: Instant::now() + self.timeout,
            most: most.clamp(1, MAX_DATA),
            layout: Layout::Wide,
        };
        if length(len) > 0 && address.checked_add(length(len) - 1).is_none() {
            return Err(DmaError::Refused(Errno::FAULT));
        }
        call.layout = match self.shared.layout() {
            Some(layout) => layout,
            None if len == 0 => Layout::Wide,
            None => call.find_layout(address, len.min(PROBE).min(call.most))?,
        };
        Ok(call)
    }
}

fn length(len: usize) -> u64 {
    u64::try_from(len).expect("a usize fits")
}

/// A call under way.
#[derive(Debug)]
struct Call<'a> {
    shared: &'a Shared,
    cancels: u64,
    deadline: Instant,
    /// The most bytes with one message.
    most: usize,
    layout: Layout,
}

impl Call<'_> {
    fn transfer(&self, command: u16, address: u64, count: usize) -> Transfer {
        Transfer {
            command,
            address,
            count,
            layout: self.layout,
            probe: false,
        }
    }

    fn make(&self, transfer: Transfer, data: &[u8]) -> Result<Vec<u8>, DmaError> {
        self.shared
            .transfer(transfer, data, self.cancels, self.deadline)
    }

    /// Reads a few bytes to see how the client lays messages out.
    fn find_layout(&self, address: u64, count: usize) -> Result<Layout, DmaError> {
        let plain = self.transfer(id::DMA_READ, address, count);
        let probe = Transfer {
            probe: true,
            ..plain
        };
        let layout = match self.make(probe, &[]) {
            Ok(_) => Layout::Narrow,
            Err(DmaError::Refused(Errno::TOOBIG)) => Layout::Wide,
            // Refused because of the byte count, or because of the address? If it can be read, it was the count.
            Err(DmaError::Refused(_)) => match self.make(plain, &[]) {
                Ok(_) => Layout::Wide,
                Err(error) => return Err(error),
            },
            Err(error) => return Err(error),
        };
        self.shared.set_layout(layout);
        Ok(layout)
    }
}
