// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Queues whose requests overtake each other, and workers that end in the middle of it.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use virtio_msg::FeatureSet;
use vmsg_mem::{Access, BusAddr, Mapping, TableEntry, WindowTable};
use vmsg_queue::{ChainHead, DriverQueue, DriverSlot, Inflight, Layout, QueueFeatures};

use super::*;
use crate::device::{Device, DeviceError, Identity, Io, Progress};

const BASE: u64 = 0x4000_0000;
const SLOT: Slot = Slot(0);
const SIZE: u16 = 8;

struct NoFds;

impl Fds for NoFds {
    fn add_kick(&mut self, _slot: Slot, _queue: usize, _fd: BorrowedFd<'_>) {}
    fn add_device(&mut self, _slot: Slot, _fd: BorrowedFd<'_>) {}
    fn remove(&mut self, _fd: BorrowedFd<'_>) {}
}

/// Takes all requests, notes the byte in each, and finishes those with an even one; the others wait.
#[derive(Default)]
struct EvenFirst {
    waiting: Vec<ChainHead>,
    seen: Arc<std::sync::Mutex<Vec<u8>>>,
    all: bool,
}

impl Device for EvenFirst {
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
        vec![SIZE]
    }
    fn in_order(&self, _queue: usize) -> bool {
        false
    }
    fn activate(&mut self, _features: &FeatureSet) {}
    fn reset(&mut self) {
        self.waiting.clear();
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
        // Two at a time, so that what was recovered takes more than one turn.
        let batch = active.pop(io.space, io.storage, 2).map_err(failed)?;
        let taken = batch.len();
        for chain in batch.iter() {
            let [byte] = chain.readable().read_array().expect("a byte");
            self.seen.lock().expect("no panic").push(byte);
            if byte % 2 == 0 || self.all {
                active.complete(io.space, chain.head(), 0).map_err(failed)?;
            } else {
                self.waiting.push(chain.head());
            }
        }
        io.publish(queue)?;
        Ok(if taken == 0 {
            Progress::Idle
        } else {
            Progress::More
        })
    }
}

fn tell(core: &mut Core, command: Command) -> Result<(), String> {
    core.command(SLOT, 1, command, &mut NoFds);
    let answer = core.take_replies().find_map(|reply| match reply {
        Reply::Done { result, .. } => Some(result),
        Reply::Notice(..) => None,
    });
    answer.expect("every command is answered")
}

/// A worker with such a device, its queue set up over `memory` and `record`.
fn worker(
    device: EvenFirst,
    table: &Arc<WindowTable>,
    config: vmsg_queue::QueueConfig,
    record: Option<Record>,
) -> Result<Core, String> {
    let mut core = Core::new();
    core.command(SLOT, 0, Command::Add(Box::new(device)), &mut NoFds);
    tell(&mut core, Command::SetMemory(Arc::clone(table)))?;
    tell(
        &mut core,
        Command::StartQueue(QueueStart {
            queue: 0,
            config,
            features: FeatureSet::EMPTY,
            resume: Some(Resume::FromUsedRing),
            record,
        }),
    )?;
    tell(&mut core, Command::DriverOk(FeatureSet::EMPTY))?;
    while core.step(Instant::now()) {}
    Ok(core)
}

#[test]
fn the_next_worker_goes_on_with_what_was_in_flight() {
    let (memory, _fd) = Mapping::memfd("guest", 1 << 20, true).expect("memfd");
    let memory = Arc::new(memory);
    let entry = TableEntry {
        base: BusAddr(BASE),
        mapping: Arc::clone(&memory),
        offset: 0,
        len: 1 << 20,
        access: Access::ReadWrite,
    };
    let table = Arc::new(WindowTable::new(vec![entry]).expect("one window"));
    let len = u64::try_from(Inflight::bytes_for(SIZE)).expect("small");
    let (lent, _fd) = Mapping::memfd("record", len, true).expect("memfd");
    let lent = Arc::new(lent);
    let record = |resume| {
        Some(Record {
            memory: Arc::clone(&lent),
            resume,
        })
    };

    let layout = Layout::new(SIZE, 0).expect("a size");
    let ram = memory.ram().get(0, layout.total_len()).expect("inside");
    let mut driver = DriverQueue::new(
        layout,
        QueueFeatures::default(),
        ram,
        BusAddr(BASE),
        vec![DriverSlot::default(); SIZE.into()],
    )
    .expect("a queue");
    for byte in 1..=6u8 {
        let at = 0x8000 + u64::from(byte);
        memory
            .ram()
            .write(usize::try_from(at).expect("small"), &[byte]);
        driver.add(&[(BusAddr(BASE + at), 1)], &[]).expect("room");
    }
    driver.publish().expect("published");

    let seen = Arc::default();
    let first = EvenFirst {
        seen: Arc::clone(&seen),
        ..EvenFirst::default()
    };
    drop(worker(first, &table, driver.config(), record(false)).expect("started"));
    assert_eq!(*seen.lock().expect("no panic"), [1, 2, 3, 4, 5, 6]);
    let mut used = 0;
    while driver.pop_used().expect("a sane device").is_some() {
        used += 1;
    }
    assert_eq!(used, 3, "the even ones");

    // Without the record nobody could know which are done.
    let lost = worker(EvenFirst::default(), &table, driver.config(), None);
    let why = lost.expect_err("three are in flight");
    assert!(why.contains("record"), "{why}");

    let seen = Arc::default();
    let next = EvenFirst {
        seen: Arc::clone(&seen),
        all: true,
        ..EvenFirst::default()
    };
    let mut core = worker(next, &table, driver.config(), record(true)).expect("started");
    assert_eq!(*seen.lock().expect("no panic"), [1, 3, 5]);
    while driver.pop_used().expect("a sane device").is_some() {
        used += 1;
    }
    assert_eq!((used, driver.outstanding()), (6, 0));

    // And with what is new.
    driver
        .add(&[(BusAddr(BASE + 0x8001), 1)], &[])
        .expect("room");
    driver.publish().expect("published");
    core.kick(SLOT, 0);
    while core.step(Instant::now()) {}
    assert!(driver.pop_used().expect("a sane device").is_some());
}

#[test]
fn a_record_whose_file_shrinks_breaks_the_device_and_one_that_is_garbage_is_refused() {
    vmsg_mem::fault::install().expect("a handler");
    let (memory, _fd) = Mapping::memfd("guest", 1 << 20, true).expect("memfd");
    let memory = Arc::new(memory);
    let entry = TableEntry {
        base: BusAddr(BASE),
        mapping: Arc::clone(&memory),
        offset: 0,
        len: 1 << 20,
        access: Access::ReadWrite,
    };
    let table = Arc::new(WindowTable::new(vec![entry]).expect("one window"));
    let layout = Layout::new(SIZE, 0).expect("a size");
    let ram = memory.ram().get(0, layout.total_len()).expect("inside");
    let mut driver = DriverQueue::new(
        layout,
        QueueFeatures::default(),
        ram,
        BusAddr(BASE),
        vec![DriverSlot::default(); SIZE.into()],
    )
    .expect("a queue");
    let len = u64::try_from(Inflight::bytes_for(SIZE)).expect("small");
    let lend = |bytes: &[u8]| {
        let (lent, fd) = Mapping::memfd("record", 4096, false).expect("memfd");
        lent.ram().write(0, bytes);
        (Arc::new(lent), fd)
    };

    // Whatever stands in it.
    let mut random = 1u64;
    for round in 0..500u16 {
        let mut bytes: Vec<u8> = (0..len)
            .map(|_| {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                random.to_le_bytes()[7]
            })
            .collect();
        if round % 4 > 0 {
            // The form, so that the rest is looked at: version, entries, the request completed last, the used index.
            bytes[8..12].copy_from_slice(&[1, 0, 8, 0]);
            let (last, used) = (bytes[12] % 9, 0u8.wrapping_sub(bytes[14] % 9));
            bytes[12..16].copy_from_slice(&[last, 0, used, 0xff]);
        }
        let (lent, _fd) = lend(&bytes);
        let record = Record {
            memory: lent,
            resume: true,
        };
        match worker(EvenFirst::default(), &table, driver.config(), Some(record)) {
            Ok(core) => drop(core),
            Err(why) => assert!(why.contains("record"), "{why}"),
        }
    }

    let (lent, fd) = lend(&[]);
    let record = Record {
        memory: lent,
        resume: false,
    };
    let device = EvenFirst::default();
    let mut core = worker(device, &table, driver.config(), Some(record)).expect("started");
    rustix::fs::ftruncate(&fd, 0).expect("not sealed");
    memory.ram().write(0x8001, &[2]);
    driver
        .add(&[(BusAddr(BASE + 0x8001), 1)], &[])
        .expect("room");
    driver.publish().expect("published");
    core.kick(SLOT, 0);
    while core.step(Instant::now()) {}
    let broken = core.take_replies().find_map(|reply| match reply {
        Reply::Notice(_, Notice::Broken { why, .. }) => Some(why),
        _ => None,
    });
    let why = broken.expect("nobody knows any more what is in flight");
    assert!(why.contains("record"), "{why}");
}
