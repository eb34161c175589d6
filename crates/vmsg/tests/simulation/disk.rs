// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device that finishes requests when and in the order it likes, as a disk does, and an account of what it has done that outlives it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use virtio_msg::FeatureSet;
use vmsg_device::device::{
    Device, DeviceError, Identity, Io, Progress, Upcoming, VENDOR_ID, transport_features,
};
use vmsg_queue::ChainHead;

use crate::echo::{DEVICE_ID, QUEUE_SIZE, QUEUES};
use crate::random::Random;

/// What was done, by the number of the request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Platter(Arc<Mutex<Account>>);

#[derive(Debug, Default)]
struct Account {
    /// Whether the driver could see that it was done.
    requests: HashMap<u64, bool>,
    /// One that was done after that.
    again: Option<u64>,
    /// The device was reset with something in flight.
    early: bool,
}

impl Platter {
    fn get(&self) -> MutexGuard<'_, Account> {
        self.0.lock().expect("nobody panics in between")
    }

    fn write(&self, sequence: u64) {
        let mut account = self.get();
        if *account.requests.entry(sequence).or_default() {
            account.again = Some(sequence);
        }
    }

    fn show(&self, sequence: u64) {
        self.get().requests.insert(sequence, true);
    }

    /// # Panics
    /// If a request was done after the driver had been told that it is done, or the device was reset with one in flight. (A panic of the device itself would be caught.)
    pub(crate) fn check(&self) {
        assert!(
            !self.get().early,
            "a reset has not waited for what was in flight"
        );
        if let Some(sequence) = self.get().again {
            panic!("request {sequence} was done once more after the driver was told of it");
        }
    }
}

#[derive(Debug)]
struct Pending {
    head: ChainHead,
    sequence: u64,
    len: u32,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Vec<Pending>,
    /// Done, and not shown to the driver yet.
    done: Vec<u64>,
}

/// The device; its configuration space is as long as the other's.
#[derive(Debug)]
pub(crate) struct Disk {
    platter: Platter,
    random: Random,
    queues: [Queue; QUEUES],
    /// The time, which stands still.
    now: Instant,
    /// Somebody waits until nothing is in flight.
    ending: bool,
    /// Its medium is slow.
    hangs: bool,
}

impl Disk {
    pub(crate) fn new(platter: Platter, random: Random, now: Instant, hangs: bool) -> Self {
        Self {
            platter,
            random,
            queues: Default::default(),
            now,
            ending: false,
            hangs,
        }
    }

    /// Finishes some of the requests of a queue, and perhaps tells the driver.
    fn finish(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::Queue { queue, source };
        let Some(Some(active)) = io.queues.get_mut(queue) else {
            return Ok(());
        };
        let own = &mut self.queues[queue];
        if self.hangs && !self.random.chance(1, 40) {
            return Ok(());
        }
        for _ in 0..self.random.below(3) {
            if own.waiting.is_empty() {
                break;
            }
            let at = self.random.below(own.waiting.len());
            let Pending {
                head,
                sequence,
                len,
            } = own.waiting.swap_remove(at);
            self.platter.write(sequence);
            active.complete(io.space, head, len).map_err(failed)?;
            own.done.push(sequence);
        }
        if !own.done.is_empty() && (self.random.chance(1, 2) || own.waiting.is_empty()) {
            io.publish(queue)?;
            for sequence in own.done.drain(..) {
                self.platter.show(sequence);
            }
        }
        Ok(())
    }
}

impl Device for Disk {
    fn identity(&self) -> Identity {
        Identity {
            device_id: DEVICE_ID,
            vendor_id: VENDOR_ID,
        }
    }

    fn features(&self) -> FeatureSet {
        transport_features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn in_order(&self, _queue: usize) -> bool {
        false
    }

    fn config(&self) -> Vec<u8> {
        b"vmsg-sim".to_vec()
    }

    fn activate(&mut self, _features: &FeatureSet) {}

    fn reset(&mut self) {
        self.platter.get().early |= self.is_touching_memory();
        self.queues = Default::default();
        self.ending = false;
    }

    fn is_touching_memory(&self) -> bool {
        let busy = |queue: &Queue| !queue.waiting.is_empty() || !queue.done.is_empty();
        self.queues.iter().any(busy)
    }

    fn prepare(&mut self, _upcoming: Upcoming<'_>, _io: &mut Io<'_>) -> bool {
        self.ending = self.is_touching_memory();
        !self.ending
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.ending.then_some(self.now)
    }

    fn poll(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        for queue in 0..QUEUES {
            let result = self.finish(queue, io);
            if result.is_err() {
                // Nothing of it can be finished any more.
                self.queues[queue] = Queue::default();
            }
            result?;
        }
        Ok(())
    }

    fn queues_changed(&mut self, io: &mut Io<'_>, _resumed: bool) {
        // What was taken from a queue that was stopped is not this queue's any more.
        for (queue, own) in self.queues.iter_mut().enumerate() {
            if io.queues.get(queue).is_none_or(Option::is_none) {
                *own = Queue::default();
            }
        }
    }

    fn process(
        &mut self,
        queue: usize,
        _budget: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        let failed = |source| DeviceError::Queue { queue, source };
        let Some(Some(active)) = io.queues.get_mut(queue) else {
            return Ok(Progress::Idle);
        };
        let own = &mut self.queues[queue];
        let take = self.random.below(3);
        let batch = active.pop(io.space, io.storage, take).map_err(failed)?;
        let given_back = usize::from(batch.len() > 1 && self.random.chance(1, 8));
        let kept = batch.len() - given_back;
        let mut none_left = batch.is_empty() && take > 0;
        for chain in batch.iter().take(kept) {
            let mut bytes = vec![0; chain.readable().len()];
            chain.readable().read(&mut bytes);
            let sequence = bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
            bytes.iter_mut().for_each(|byte| *byte = !*byte);
            let len = chain.writable().write(&bytes);
            own.waiting.push(Pending {
                head: chain.head(),
                sequence,
                len: u32::try_from(len).expect("short buffers"),
            });
        }
        if given_back > 0 {
            active.rewind(given_back).map_err(failed)?;
            none_left = false;
        }
        self.finish(queue, io)?;
        let own = &self.queues[queue];
        let rests = none_left && own.waiting.is_empty() && own.done.is_empty();
        Ok(if rests {
            Progress::Idle
        } else {
            Progress::More
        })
    }
}
