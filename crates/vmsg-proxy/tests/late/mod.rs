// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device that inverts what it reads, at once and in order, or late and in another one.
#![allow(unreachable_pub, reason = "a part of a test program")]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use virtio_msg::FeatureSet;
use vmsg_device::device::{
    Device, DeviceError, Identity, Io, Progress, VENDOR_ID, transport_features,
};
use vmsg_queue::ChainHead;

/// How long a request lies at most.
const LATE: Duration = Duration::from_millis(1);

/// What was done.
#[derive(Clone, Debug, Default)]
pub struct Platter(Arc<Mutex<Account>>);

#[derive(Debug, Default)]
struct Account {
    /// Whether the driver could see it.
    requests: HashMap<u64, bool>,
    again: Option<u64>,
}

impl Platter {
    pub fn check(&self) {
        let again = self.0.lock().unwrap().again;
        assert_eq!(again, None, "done once more after the driver was told");
    }

    fn write(&self, sequence: u64) {
        let mut all = self.0.lock().unwrap();
        if *all.requests.entry(sequence).or_default() {
            all.again = Some(sequence);
        }
    }

    fn show(&self, sequence: u64) {
        self.0.lock().unwrap().requests.insert(sequence, true);
    }
}

struct Pending {
    head: ChainHead,
    sequence: u64,
    len: u32,
}

pub struct Late {
    in_order: bool,
    platter: Platter,
    waiting: Vec<Pending>,
    due: Option<Instant>,
    turn: usize,
}

impl Late {
    pub fn new(in_order: bool, platter: Platter) -> Late {
        Late {
            in_order,
            platter,
            waiting: Vec::new(),
            due: None,
            turn: 0,
        }
    }

    /// Finishes `count` of those that wait.
    fn finish(&mut self, count: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::Queue { queue: 0, source };
        let mut done = Vec::new();
        for _ in 0..count.min(self.waiting.len()) {
            let Some(Some(active)) = io.queues.get_mut(0) else {
                return Ok(());
            };
            self.turn = self.turn.wrapping_mul(5).wrapping_add(3);
            let at = if self.in_order {
                0
            } else {
                self.turn % self.waiting.len()
            };
            let Pending {
                head,
                sequence,
                len,
            } = self.waiting.remove(at);
            self.platter.write(sequence);
            active.complete(io.space, head, len).map_err(failed)?;
            done.push(sequence);
        }
        io.publish(0)?;
        for sequence in done {
            self.platter.show(sequence);
        }
        self.due = (!self.waiting.is_empty()).then(|| io.now + LATE);
        Ok(())
    }
}

impl Device for Late {
    fn identity(&self) -> Identity {
        Identity {
            device_id: 4,
            vendor_id: VENDOR_ID,
        }
    }

    fn features(&self) -> FeatureSet {
        transport_features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64]
    }

    fn in_order(&self, _queue: usize) -> bool {
        self.in_order
    }

    fn activate(&mut self, _features: &FeatureSet) {}

    fn reset(&mut self) {
        self.waiting.clear();
        self.due = None;
    }

    fn queues_changed(&mut self, io: &mut Io<'_>, _resumed: bool) {
        if io.queues.first().is_none_or(Option::is_none) {
            self.reset();
        }
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.due
    }

    fn poll(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.finish(1, io)
    }

    fn process(
        &mut self,
        queue: usize,
        budget: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        let failed = |source| DeviceError::Queue { queue, source };
        let Some(Some(active)) = io.queues.get_mut(queue) else {
            return Ok(Progress::Idle);
        };
        let batch = active.pop(io.space, io.storage, budget).map_err(failed)?;
        for chain in batch.iter() {
            let mut bytes = vec![0; chain.readable().len()];
            chain.readable().read(&mut bytes);
            let sequence = bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
            bytes.iter_mut().for_each(|byte| *byte = !*byte);
            let len = u32::try_from(chain.writable().write(&bytes)).unwrap();
            self.waiting.push(Pending {
                head: chain.head(),
                sequence,
                len,
            });
        }
        let taken = batch.len();
        self.finish(self.waiting.len().saturating_sub(3), io)?;
        Ok(if taken == 0 {
            Progress::Idle
        } else {
            Progress::More
        })
    }
}
