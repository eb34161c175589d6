// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use virtio_msg::FeatureSet;
use vmsg_mem::WindowTable;

use super::super::Reply;
use super::*;
use crate::device::{Device, DeviceError, Identity, Io, Progress, Upcoming};

/// Has something under way as long as `busy` is set, and looks at that when its bell was rung.
struct Disk {
    busy: Arc<AtomicBool>,
    bell: Arc<Doorbell>,
}

impl Device for Disk {
    fn identity(&self) -> Identity {
        Identity {
            device_id: 2,
            vendor_id: 0,
        }
    }
    fn features(&self) -> FeatureSet {
        FeatureSet::EMPTY
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![8]
    }
    fn activate(&mut self, _: &FeatureSet) {}
    fn reset(&mut self) {
        assert!(!self.is_touching_memory(), "not yet");
    }
    fn process(&mut self, _: usize, _: usize, _: &mut Io<'_>) -> Result<Progress, DeviceError> {
        Ok(Progress::Idle)
    }
    fn is_touching_memory(&self) -> bool {
        self.busy.load(Ordering::SeqCst)
    }
    fn prepare(&mut self, _: Upcoming<'_>, _: &mut Io<'_>) -> bool {
        !self.is_touching_memory()
    }
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.bell.as_fd())
    }
    fn poll(&mut self, _: &mut Io<'_>) -> Result<(), DeviceError> {
        self.bell.drain().expect("an eventfd");
        Ok(())
    }
}

struct Bench {
    worker: Worker,
    replies: Arc<Outbox>,
    bell: Arc<Doorbell>,
    busy: Arc<AtomicBool>,
    disk: Arc<Doorbell>,
}

const DISK: Slot = Slot(0);
const OTHER: Slot = Slot(1);

impl Bench {
    fn new() -> Self {
        let replies = Arc::new(Outbox::default());
        let bell = Arc::new(Doorbell::new().expect("eventfd"));
        let bench = Self {
            worker: Worker::start("test", 0, Arc::clone(&replies), Arc::clone(&bell))
                .expect("a thread"),
            replies,
            bell,
            busy: Arc::new(AtomicBool::new(true)),
            disk: Arc::new(Doorbell::new().expect("eventfd")),
        };
        bench.add(DISK, &bench.busy, &bench.disk);
        let idle = Arc::new(AtomicBool::new(false));
        bench.add(OTHER, &idle, &Arc::new(Doorbell::new().expect("eventfd")));
        bench
    }

    fn add(&self, slot: Slot, busy: &Arc<AtomicBool>, bell: &Arc<Doorbell>) {
        let (busy, bell) = (Arc::clone(busy), Arc::clone(bell));
        let device = Command::Add(Box::new(Disk { busy, bell }));
        assert!(!self.worker.send(slot, 0, device));
    }

    /// The tickets of the next answers, at least so many; fewer if they do not come for a minute.
    fn answers(&self, count: usize) -> Vec<u64> {
        let patience = Timespec::try_from(Duration::from_secs(60)).expect("small");
        let mut tickets = Vec::new();
        // The bell may be rung for what was taken before, and once for each of several.
        while tickets.len() < count {
            let mut bell = [PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN)];
            if poll(&mut bell, Some(&patience)).expect("poll") == 0 {
                break;
            }
            let _ = self.bell.drain();
            let mut replies = Vec::new();
            self.replies.take(&mut replies);
            tickets.extend(replies.into_iter().filter_map(|(_, reply)| match reply {
                Reply::Done { ticket, result } => {
                    result.expect("carried out");
                    Some(ticket)
                }
                Reply::Notice(..) => None,
            }));
        }
        tickets
    }
}

#[test]
fn a_device_that_is_not_ready_is_asked_again_when_its_descriptor_says_so() {
    let bench = Bench::new();
    assert!(!bench.worker.send(DISK, 1, Command::Reset));
    assert!(!bench.worker.send(OTHER, 2, Command::Reset));
    assert_eq!(bench.answers(1), [2]);

    // Memory that grows from nothing: but it is behind the reset.
    let table = Arc::new(WindowTable::empty());
    let memory = || Command::SetMemory(Arc::clone(&table));
    assert!(!bench.worker.send(DISK, 3, memory()));
    assert!(!bench.worker.send(OTHER, 4, Command::Reset));
    assert_eq!(bench.answers(1), [4]);

    // A ring for nothing.
    bench.disk.ring().expect("rung");
    assert!(!bench.worker.send(OTHER, 5, Command::Reset));
    assert_eq!(bench.answers(1), [5]);

    bench.busy.store(false, Ordering::SeqCst);
    bench.disk.ring().expect("rung");
    assert_eq!(bench.answers(2), [1, 3]);
    // Where the worker sleeps and nothing is under way control does it itself; while it falls asleep, either.
    for ticket in 6.. {
        if bench.worker.send(DISK, ticket, memory()) {
            break;
        }
        assert_eq!(bench.answers(1), [ticket]);
    }
}

#[test]
fn a_worker_ends_though_a_device_is_not_ready() {
    let bench = Bench::new();
    assert!(!bench.worker.send(DISK, 1, Command::Reset));
    assert!(!bench.worker.send(OTHER, 2, Command::Reset));
    assert_eq!(bench.answers(1), [2]);
    let Bench { worker, disk, .. } = bench;
    drop(worker);
    assert_eq!(Arc::strong_count(&disk), 1, "its devices are gone");
}
