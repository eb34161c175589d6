// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Queues whose requests overtake each other, and workers that end in the middle of it.

use std::sync::Arc;

use virtio_msg::FeatureSet;
use vmsg_mem::{BusAddr, Mapping, WindowTable};
use vmsg_queue::{ChainHead, Inflight, QueueConfig};

use super::*;
use crate::device::{Device, DeviceError, Identity, Io, Progress};
use crate::stand::{BASE, Ring, Stand, ring, start, table};

const SIZE: u16 = 8;
/// Where the byte of a request may be, from the beginning of the memory.
const AT: usize = 0x8000;

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

/// A worker with such a device, its queue set up over the memory and `record`.
fn worker(
    device: EvenFirst,
    table: &Arc<WindowTable>,
    config: QueueConfig,
    record: Option<Record>,
) -> Result<Stand, String> {
    let mut stand = Stand::new(Box::new(device));
    stand.tell(Command::SetMemory(Arc::clone(table)))?;
    stand.tell(Command::StartQueue(QueueStart {
        resume: Some(Resume::FromUsedRing),
        record,
        ..start(0, config)
    }))?;
    stand.tell(Command::DriverOk(FeatureSet::EMPTY))?;
    stand.run();
    Ok(stand)
}

fn guest() -> Arc<Mapping> {
    let (memory, _fd) = Mapping::memfd("guest", 1 << 20, true).expect("memfd");
    Arc::new(memory)
}

/// Adds a request with that byte, at a place of its own.
fn ask(driver: &mut Ring<'_>, memory: &Mapping, byte: u8) {
    let at = AT + usize::from(byte);
    memory.ram().write(at, &[byte]);
    let buffer = [(BusAddr(BASE + at as u64), 1)];
    driver.add(&buffer, &[]).expect("room");
    driver.publish().expect("published");
}

#[test]
fn the_next_worker_goes_on_with_what_was_in_flight() {
    let memory = guest();
    let table = table(&memory);
    let len = u64::try_from(Inflight::bytes_for(SIZE)).expect("small");
    let (lent, _fd) = Mapping::memfd("record", len, true).expect("memfd");
    let lent = Arc::new(lent);
    let record = |resume| {
        Some(Record {
            memory: Arc::clone(&lent),
            resume,
        })
    };

    let mut driver = ring(&memory, 0, SIZE);
    for byte in 1..=6 {
        ask(&mut driver, &memory, byte);
    }

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
    let why = lost.err().expect("three are in flight");
    assert!(why.contains("record"), "{why}");

    let seen = Arc::default();
    let device = EvenFirst {
        seen: Arc::clone(&seen),
        all: true,
        ..EvenFirst::default()
    };
    let mut next = worker(device, &table, driver.config(), record(true)).expect("started");
    assert_eq!(*seen.lock().expect("no panic"), [1, 3, 5]);
    while driver.pop_used().expect("a sane device").is_some() {
        used += 1;
    }
    assert_eq!((used, driver.outstanding()), (6, 0));

    // And with what is new.
    ask(&mut driver, &memory, 1);
    next.kick(0);
    assert!(driver.pop_used().expect("a sane device").is_some());
}

#[test]
fn a_record_whose_file_shrinks_breaks_the_device_and_one_that_is_garbage_is_refused() {
    vmsg_mem::fault::install().expect("a handler");
    let memory = guest();
    let table = table(&memory);
    let mut driver = ring(&memory, 0, SIZE);
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
            Ok(worker) => drop(worker),
            Err(why) => assert!(why.contains("record"), "{why}"),
        }
    }

    let (lent, fd) = lend(&[]);
    let record = Record {
        memory: lent,
        resume: false,
    };
    let device = EvenFirst::default();
    let mut worker = worker(device, &table, driver.config(), Some(record)).expect("started");
    rustix::fs::ftruncate(&fd, 0).expect("not sealed");
    ask(&mut driver, &memory, 2);
    worker.kick(0);
    let why = worker
        .broken()
        .expect("nobody knows any more what is in flight");
    assert!(why.contains("record"), "{why}");
}
