// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device like a disk whose medium hangs: it takes requests, and lets go of none of them before it is told to.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test program uses another part"
)]

use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use virtio_msg::FeatureSet;
use vmsg_device::device::{
    Device, DeviceError, Identity, Io, Progress, Upcoming, VENDOR_ID, transport_features,
};
use vmsg_queue::ChainHead;

/// What its requests are at.
#[derive(Clone, Debug)]
pub struct Medium(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    hangs: AtomicBool,
    taken: AtomicUsize,
    bell: OwnedFd,
}

impl Medium {
    pub fn new() -> Medium {
        Medium(Arc::new(Shared {
            hangs: AtomicBool::new(true),
            taken: AtomicUsize::new(0),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap(),
        }))
    }

    /// It works from now on.
    pub fn release(&self) {
        self.0.hangs.store(false, Ordering::SeqCst);
        rustix::io::write(&self.0.bell, &1_u64.to_ne_bytes()).unwrap();
    }

    /// It hangs from now on.
    pub fn hang(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.0.bell, &mut count);
        self.0.hangs.store(true, Ordering::SeqCst);
    }

    /// Requests that it has had.
    pub fn taken(&self) -> usize {
        self.0.taken.load(Ordering::SeqCst)
    }

    fn hangs(&self) -> bool {
        self.0.hangs.load(Ordering::SeqCst)
    }
}

pub struct Stuck {
    medium: Medium,
    waiting: Vec<(usize, ChainHead)>,
    queues: usize,
}

impl Stuck {
    pub fn new(medium: &Medium, queues: usize) -> Stuck {
        Stuck {
            medium: medium.clone(),
            waiting: Vec::new(),
            queues,
        }
    }

    fn finish(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if self.medium.hangs() {
            return Ok(());
        }
        for (queue, head) in std::mem::take(&mut self.waiting) {
            let failed = |source| DeviceError::Queue { queue, source };
            let Some(Some(active)) = io.queues.get_mut(queue) else {
                continue;
            };
            active.complete(io.space, head, 0).map_err(failed)?;
            io.publish(queue)?;
        }
        Ok(())
    }
}

impl Device for Stuck {
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
        vec![64; self.queues]
    }

    fn in_order(&self, _queue: usize) -> bool {
        false
    }

    fn activate(&mut self, _features: &FeatureSet) {}

    fn reset(&mut self) {
        assert!(
            self.waiting.is_empty() || !self.medium.hangs(),
            "a reset while requests are under way"
        );
        self.waiting.clear();
    }

    fn prepare(&mut self, upcoming: Upcoming<'_>, _io: &mut Io<'_>) -> bool {
        match upcoming {
            Upcoming::QueueReset(queue) => self.waiting.iter().all(|(of, _)| *of != queue),
            Upcoming::Reset | Upcoming::Memory(_) => self.waiting.is_empty(),
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.medium.0.bell.as_fd())
    }

    fn poll(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.finish(io)
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
        let heads: Vec<ChainHead> = batch.iter().map(|chain| chain.head()).collect();
        self.medium.0.taken.fetch_add(heads.len(), Ordering::SeqCst);
        let idle = heads.is_empty();
        self.waiting
            .extend(heads.into_iter().map(|head| (queue, head)));
        self.finish(io)?;
        Ok(if idle { Progress::Idle } else { Progress::More })
    }
}
