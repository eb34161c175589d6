// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver without operating system and without allocator.
//!
//! A program for a small system brings three things: a [`Channel`], which moves messages to the device side and
//! back (a queue in shared memory, a mailbox, an FF-A call), a clock, and memory that the device side can reach.
//! Everything else is here. The functions are generic, so nothing in this file is tied to a target; copy it into a crate for yours:
//!
//! ```toml
//! [dependencies]
//! vmsg-driver = { version = "0.1", default-features = false, features = ["queue"] }
//! ```
//!
//! Without the feature `queue` the crate also builds where there are no atomics of 64 bits, for Cortex-M for one; the queues are
//! then the program's own ([`Device::set_queue`](vmsg_driver::Device::set_queue)).
#![no_std]

use core::fmt::Write;
use core::time::Duration;

use virtio_msg::{Channel, Instant};
use vmsg_driver::{Client, Error, Spin};

/// The largest message that this program can deal with, in bytes. 48 is what every bus has.
const MESSAGE: usize = 264;

/// Writes a line for each device on the bus behind `channel`. `clock` gives the time; where its zero lies does not matter.
///
/// # Errors
/// [`Error`] if the bus does not work; devices that do not answer are left out.
pub fn probe<C: Channel>(
    channel: C,
    clock: impl FnMut() -> Instant,
    out: &mut impl Write,
) -> Result<(), Error> {
    // All the memory that the client needs: two messages, on the stack or in a static.
    let mut client = Client::new(channel, Spin::new(clock), [0; 2 * MESSAGE])?;
    client.set_timeout(Duration::from_millis(100));
    let mut found = [None; 32];
    let mut count = 0;
    client.for_each_device(|device| {
        if let Some(slot) = found.get_mut(count) {
            *slot = Some(device);
            count += 1;
        }
    })?;
    for device in found.into_iter().flatten() {
        let Ok(info) = client.device_info(device) else {
            continue;
        };
        let features = client.device_features(device, &info)?;
        // Where the text goes is the caller's; that it may be full is not our error.
        let _ = writeln!(
            out,
            "{device}: type {}, {} queues, features {features}",
            info.device_id, info.max_queues
        );
    }
    Ok(())
}

#[cfg(feature = "queue")]
pub use entropy::entropy;

#[cfg(feature = "queue")]
mod entropy {
    use virtio_msg::{Channel, DevNum, Instant, QueueIndex};
    use vmsg_driver::{Client, Device, Error, Event, Spin, Wanted};
    use vmsg_mem::{BusAddr, RamSlice};
    use vmsg_queue::{DriverSlot, Layout, QueueError};

    use super::MESSAGE;

    /// Entries of the queue.
    const SIZE: u16 = 4;

    /// Fills `into` with random bytes from entropy device `device`. `ram` is memory that the device side finds at `base`: 1 KiB for
    /// the queue, then the buffer.
    ///
    /// # Errors
    /// [`Error`] if bus or device do not work.
    pub fn entropy<C: Channel>(
        channel: C,
        clock: impl FnMut() -> Instant,
        device: DevNum,
        (ram, base): (RamSlice<'_>, BusAddr),
        into: &mut [u8],
    ) -> Result<(), Error> {
        let queue = QueueIndex(0);
        let failed = |source: QueueError| Error::Queue { queue, source };
        let (ring_ram, buffer) = ram.split_at(1024);
        let address = BusAddr(base.0 + ring_ram.len() as u64);

        let mut client = Client::new(channel, Spin::new(clock), [0; 2 * MESSAGE])?;
        let mut opened = Device::open(&mut client, device, &Wanted::default())?;
        let layout = Layout::new(SIZE, 0).map_err(failed)?;
        let slots = [DriverSlot::default(); SIZE as usize];
        let mut ring = opened.create_queue(&mut client, queue, layout, (ring_ram, base), slots)?;
        opened.start(&mut client)?;

        for part in into.chunks_mut(buffer.len().max(1)) {
            let mut done = 0;
            while done < part.len() {
                let want =
                    u32::try_from(part.len() - done).map_err(|_| Error::NoMemory(part.len()))?;
                ring.add(&[], &[(address, want)]).map_err(failed)?;
                if ring.publish().map_err(failed)? {
                    client.notify_available(device, queue, 0)?;
                }
                let used = loop {
                    if let Some(used) = ring.pop_used().map_err(failed)? {
                        break used;
                    }
                    // The event says "look"; a program with other work would do that now.
                    if let Some(Event::Config { .. }) =
                        client.wait_event(core::time::Duration::from_millis(10))?
                    {
                        return Err(Error::NeedsReset);
                    }
                };
                let got = buffer
                    .split_at(used.written as usize)
                    .0
                    .read(0, &mut part[done..]);
                done += got;
            }
        }
        // The device lets go of the memory.
        opened.reset(&mut client)
    }
}
