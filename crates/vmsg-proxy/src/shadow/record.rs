// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's requests in flight, noted in memory that outlives this process.

use vmsg_mem::Mapping;
use vmsg_queue::remote::RemoteQueue;
use vmsg_queue::{Inflight, QueueConfig, QueueError, QueueFeatures};

/// An [`Inflight`] record, and what is to be noted in it. The memory is the VMM's, which can write anything there at any time: that is found when it
/// is read, by the next process.
pub(super) struct Recorder {
    memory: Mapping,
    inflight: Inflight,
    /// Requests that a process before had, the next one last.
    pub(super) again: Vec<u16>,
    /// Given back, and not yet shown to the driver.
    completed: Vec<u16>,
}

impl Recorder {
    /// Goes on with a record, and with the queue where the device area says that `used` requests are done.
    pub(super) fn resume(
        memory: Mapping,
        config: QueueConfig,
        features: QueueFeatures,
        used: u16,
    ) -> Result<(RemoteQueue, Recorder), QueueError> {
        let ram = memory.ram();
        let (inflight, recovered) = Inflight::resume(ram, config.size, used)?;
        let mut again = vec![0; recovered.in_flight.into()];
        let count = inflight.heads(ram, &mut again)?;
        again.truncate(count);
        again.reverse();
        let avail = used.wrapping_add(u16::try_from(count).unwrap_or(u16::MAX));
        let queue = RemoteQueue::resume(config, features, avail, used)?;
        let recorder = Recorder {
            memory,
            inflight,
            again,
            completed: Vec::new(),
        };
        Ok((queue, recorder))
    }

    /// The device has it.
    pub(super) fn taken(&mut self, head: u16) -> Result<(), QueueError> {
        self.inflight.take(self.memory.ram(), head)
    }

    /// It will be shown to the driver with the next used index.
    pub(super) fn completed(&mut self, head: u16) -> Result<(), QueueError> {
        self.completed.push(head);
        self.inflight.complete(self.memory.ram(), head)
    }

    /// The driver was shown all that was completed.
    pub(super) fn published(&mut self, used: u16) -> Result<(), QueueError> {
        if self.completed.is_empty() {
            return Ok(());
        }
        let noted = self
            .inflight
            .published(self.memory.ram(), &self.completed, used);
        self.completed.clear();
        noted
    }
}
