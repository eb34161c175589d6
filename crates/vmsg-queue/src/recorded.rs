// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device's queue whose requests overtake each other, and survive the device's process.

use alloc::vec::Vec;

use vmsg_mem::{AddressSpace, RamSlice};

use crate::chain::{Batch, ChainHead, Storage};
use crate::inflight::Inflight;
use crate::{DeviceQueue, QueueConfig, QueueError, QueueFeatures};

/// A [`DeviceQueue`] together with the [`Inflight`] record of what is taken and not used.
///
/// As with the queue, memory is given with each call: `record` is that of the record, at least
/// [`Inflight::bytes_for`] its size.
#[derive(Debug)]
pub struct RecordedQueue {
    queue: DeviceQueue,
    inflight: Inflight,
    /// Requests of the process before, the next one last.
    again: Vec<u16>,
    /// Heads of the last batch, as far as they can be given back.
    taken: Vec<u16>,
    /// The last batch was of the process before.
    old: bool,
    /// Completed, and not yet shown to the driver.
    completed: Vec<u16>,
}

impl RecordedQueue {
    /// A queue that starts from the beginning, with an empty record.
    ///
    /// # Errors
    /// As [`DeviceQueue::new`] and [`Inflight::begin`].
    pub fn new(
        config: QueueConfig,
        features: QueueFeatures,
        space: AddressSpace<'_>,
        record: RamSlice<'_>,
    ) -> Result<Self, QueueError> {
        let inflight = Inflight::begin(record, config.size)?;
        let queue = DeviceQueue::new(config, features, space)?;
        Ok(Self::with(queue, inflight, Vec::new()))
    }

    /// A queue that another process has served: [`pop`](Self::pop) begins with the requests that it had taken and not
    /// finished, in the order in which it took them.
    ///
    /// # Errors
    /// As [`DeviceQueue::resume`] and [`Inflight::resume`]; [`QueueError::BadRecord`] if the queue is in the middle, its
    /// record was never used, and there are requests in it that may be done.
    pub fn resume(
        config: QueueConfig,
        features: QueueFeatures,
        space: AddressSpace<'_>,
        record: RamSlice<'_>,
    ) -> Result<Self, QueueError> {
        let used = DeviceQueue::read_used_index(config, space)?;
        if used != 0 && Inflight::is_new(record, config.size)? {
            let mut queue = DeviceQueue::resume(config, features, space, used, used)?;
            if queue.available(space)? > 0 {
                return Err(QueueError::BadRecord(
                    "that was never used, and requests may be in flight",
                ));
            }
        }
        let (inflight, recovered) = Inflight::resume(record, config.size, used)?;
        let mut again = alloc::vec![0; usize::from(recovered.in_flight)];
        let count = inflight.heads(record, &mut again)?;
        again.truncate(count);
        again.reverse();
        // Not more than `size`, as there are that many descriptors.
        let avail = used.wrapping_add(u16::try_from(count).expect("one for each descriptor"));
        let queue = DeviceQueue::resume(config, features, space, avail, used)?;
        Ok(Self::with(queue, inflight, again))
    }

    fn with(queue: DeviceQueue, inflight: Inflight, again: Vec<u16>) -> Self {
        Self {
            queue,
            inflight,
            again,
            taken: Vec::new(),
            old: false,
            completed: Vec::new(),
        }
    }

    /// The queue, for what does not take, give back or complete: its indices, notifications, configuration.
    pub fn queue(&mut self) -> &mut DeviceQueue {
        &mut self.queue
    }

    /// Requests of the process before that [`pop`](Self::pop) has still to return.
    pub fn recovered(&self) -> usize {
        self.again.len()
    }

    /// Takes up to `max` chains: first those of the process before, then new ones.
    ///
    /// # Errors
    /// As [`DeviceQueue::pop`]; [`QueueError::BadRecord`].
    pub fn pop<'b>(
        &mut self,
        space: AddressSpace<'b>,
        record: RamSlice<'_>,
        storage: &'b mut impl Storage,
        max: usize,
    ) -> Result<Batch<'b>, QueueError> {
        self.taken.clear();
        self.old = !self.again.is_empty();
        if self.old {
            let batch = self.queue.pop_again(space, storage, &self.again, max)?;
            self.again.truncate(self.again.len() - batch.len());
            self.taken
                .extend(batch.iter().map(|chain| chain.head().id()));
            return Ok(batch);
        }
        let batch = self.queue.pop(space, storage, max)?;
        for chain in batch.iter() {
            let head = chain.head().id();
            self.inflight.take(record, head)?;
            self.taken.push(head);
        }
        Ok(batch)
    }

    /// Gives back the last `n` chains of the last [`pop`](Self::pop), none of which was completed since.
    ///
    /// # Errors
    /// [`QueueError::BadRecord`].
    ///
    /// # Panics
    /// If the last `pop` returned fewer chains.
    pub fn rewind(&mut self, record: RamSlice<'_>, n: usize) -> Result<(), QueueError> {
        if !self.old {
            self.queue.rewind(n);
        }
        for _ in 0..n {
            let head = self.taken.pop().expect("no more than were taken");
            if self.old {
                self.again.push(head);
            } else {
                self.inflight.give_back(record, head)?;
            }
        }
        Ok(())
    }

    /// As [`DeviceQueue::complete`].
    ///
    /// # Errors
    /// As there; [`QueueError::BadRecord`].
    pub fn complete(
        &mut self,
        space: AddressSpace<'_>,
        record: RamSlice<'_>,
        head: ChainHead,
        written: u32,
    ) -> Result<(), QueueError> {
        self.inflight.complete(record, head.id())?;
        self.queue.complete(space, head, written)?;
        self.completed.push(head.id());
        Ok(())
    }

    /// As [`DeviceQueue::publish`]; then the record forgets what was published.
    ///
    /// # Errors
    /// As there; [`QueueError::BadRecord`].
    pub fn publish(
        &mut self,
        space: AddressSpace<'_>,
        record: RamSlice<'_>,
    ) -> Result<bool, QueueError> {
        let notify = self.queue.publish(space)?;
        self.inflight
            .published(record, &self.completed, self.queue.used_index())?;
        self.completed.clear();
        Ok(notify)
    }
}

#[cfg(test)]
#[path = "recorded_test.rs"]
mod tests;
