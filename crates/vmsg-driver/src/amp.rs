// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A bus in a region of memory that describes itself (`vmsg_mem::amp`), with a doorbell: for systems without operating system.
//!
//! It is one end of the layout that Linux's AMP bus of 2026 has, and of our `ivshmem` bus with `layout=amp` (docs/bus-ivshmem.md §6). It waits by
//! looking; whoever has an interrupt for the other side's rings calls [`Channel::try_recv`] then.

use core::time::Duration;

use virtio_msg::{Channel, ChannelError, Instant};
use vmsg_mem::QueueMemory;
use vmsg_mem::amp::{Event, Head, Layout, Life, Queue, Side, Start, Store};
use vmsg_mem::spsc::PushError;

use crate::error::Error;

/// Messages are padded with zeros to a multiple of this.
const UNIT: usize = 64;

/// The longest message, in bytes, that this end sends, whatever the elements have.
pub const MAX_MESSAGE: usize = 512;

/// The driver's end of such a bus. `M` is the memory, which begins with the layout; `R` rings the other side's doorbell.
///
/// Dropped, it says that the driver has shut down; the device side resets its devices then.
#[derive(Debug)]
pub struct Amp<M: QueueMemory, R: FnMut()> {
    queue: Queue<M>,
    layout: Layout,
    life: Life,
    ring: R,
}

impl<M: QueueMemory + Clone, R: FnMut()> Amp<M, R> {
    /// Waits, looking again and again, until the device side is there and both have begun. `now` is the time, whose zero may lie
    /// anywhere. A device side that still has another driver takes up to 2 s to notice.
    ///
    /// # Errors
    /// [`Error::Timeout`] if nobody comes within `timeout`; [`Error::Channel`] with [`ChannelError::Corrupt`] if the memory holds a layout that
    /// cannot be; [`Error::Mem`] if the memory is misaligned.
    pub fn connect(
        memory: M,
        mut ring: R,
        mut now: impl FnMut() -> Instant,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let end = now() + timeout;
        let bad = ChannelError::Corrupt("the layout of the memory");
        // The description first, then the two ends' life.
        let mut joining: Option<(Layout, Life)> = None;
        loop {
            let time = now();
            let millis = time.0 / 1_000_000;
            let here = Layout::load(&memory).map_err(|_| bad)?;
            match (&mut joining, here) {
                (Some((layout, life)), Some(same)) if *layout == same => {
                    let theirs = Head::load(&memory, layout.head(Side::Device));
                    let (stores, event) = life.step(millis, theirs, false);
                    for word in stores {
                        store(&memory, layout, word);
                    }
                    if let Some(Event::Up(start)) = event {
                        let (layout, life) = (*layout, *life);
                        return Self::up(memory, ring, layout, life, start);
                    }
                }
                (_, Some(layout)) => {
                    let own = Head::load(&memory, layout.head(Side::Driver));
                    let theirs = Head::load(&memory, layout.head(Side::Device));
                    let elements = layout.elements();
                    let (life, word) = Life::begin(Side::Driver, elements, millis, own, theirs);
                    store(&memory, &layout, word);
                    joining = Some((layout, life));
                    ring();
                }
                (_, None) => joining = None,
            }
            if time >= end {
                return Err(Error::Timeout {
                    request: "a device side",
                });
            }
            core::hint::spin_loop();
        }
    }

    fn up(memory: M, mut ring: R, layout: Layout, life: Life, start: Start) -> Result<Self, Error> {
        let queue = Queue::new(memory, &layout, Side::Driver, start)?;
        ring();
        Ok(Self {
            queue,
            layout,
            life,
            ring,
        })
    }
}

fn store<M: QueueMemory>(memory: &M, layout: &Layout, word: Store) {
    let (at, word) = word.word();
    memory.store_release(layout.head(Side::Driver) + at, word);
}

impl<M: QueueMemory, R: FnMut()> Amp<M, R> {
    /// Whether the other side has parted.
    fn look(&mut self) -> Result<(), ChannelError> {
        let theirs = Head::load(self.queue.memory(), self.layout.head(Side::Device));
        let (_, event) = self.life.step(0, theirs, false);
        match event {
            None if self.life.is_up() => Ok(()),
            _ => Err(ChannelError::Closed),
        }
    }
}

impl<M: QueueMemory, R: FnMut()> Channel for Amp<M, R> {
    fn max_message_size(&self) -> usize {
        self.queue.element_size().min(MAX_MESSAGE)
    }

    fn try_send(&mut self, message: &[u8]) -> Result<(), ChannelError> {
        let most = self.max_message_size();
        if message.len() > most {
            return Err(ChannelError::TooLong);
        }
        let mut padded = [0; MAX_MESSAGE];
        padded[..message.len()].copy_from_slice(message);
        let len = message.len().next_multiple_of(UNIT).min(most);
        match self.queue.try_push(&padded[..len]) {
            Ok(()) => Ok(()),
            Err(PushError::Full) => {
                self.look()?;
                Err(ChannelError::Full)
            }
            Err(PushError::TooLong) => Err(ChannelError::TooLong),
            Err(_) => Err(ChannelError::Corrupt("indices that cannot be")),
        }
    }

    fn try_recv(&mut self, buf: &mut [u8]) -> Result<Option<usize>, ChannelError> {
        if buf.len() < self.max_message_size() {
            return Err(ChannelError::TooLong);
        }
        let popped = self.queue.try_pop_sized(buf, |_| usize::MAX);
        self.queue.release();
        match popped {
            Ok(Some(len)) => Ok(Some(len)),
            Ok(None) => self.look().map(|()| None),
            Err(_) => Err(ChannelError::Corrupt("indices that cannot be")),
        }
    }

    fn flush(&mut self) -> Result<(), ChannelError> {
        if self.queue.publish() {
            (self.ring)();
        }
        Ok(())
    }
}

impl<M: QueueMemory, R: FnMut()> Drop for Amp<M, R> {
    fn drop(&mut self) {
        store(self.queue.memory(), &self.layout, Life::shutdown());
        (self.ring)();
    }
}

#[cfg(test)]
#[path = "amp_test.rs"]
mod tests;
