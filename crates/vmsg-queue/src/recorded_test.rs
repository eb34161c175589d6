// SPDX-License-Identifier: Apache-2.0 OR MIT
use core::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use vmsg_mem::{Access, BusAddr, Window};

use super::*;
use crate::{Buffer, ChainStorage, DriverQueue, DriverSlot, Layout};

const BASE: BusAddr = BusAddr(0x1000);
const SIZE: u16 = 8;
const FEATURES: QueueFeatures = QueueFeatures {
    event_idx: false,
    indirect: false,
};

/// What a killed process leaves behind: the driver's memory and the record.
struct Memory {
    ram: Vec<AtomicU64>,
    record: Vec<AtomicU64>,
}

impl Memory {
    fn new() -> Self {
        let words = |n| (0..n).map(|_| AtomicU64::new(0)).collect();
        Self {
            ram: words(0x400),
            record: words(Inflight::bytes_for(SIZE) / 8),
        }
    }

    fn ram(&self) -> RamSlice<'_> {
        RamSlice::from_atomics(&self.ram)
    }

    fn record(&self) -> RamSlice<'_> {
        RamSlice::from_atomics(&self.record)
    }

    fn window(&self) -> Window<'_> {
        Window::new(BASE, self.ram(), Access::ReadWrite).unwrap()
    }

    /// A copy, to let one process go on and another begin.
    fn copy(&self) -> Self {
        let copy = |words: &[AtomicU64]| {
            words
                .iter()
                .map(|word| AtomicU64::new(word.load(Ordering::Relaxed)))
                .collect()
        };
        Self {
            ram: copy(&self.ram),
            record: copy(&self.record),
        }
    }
}

fn config() -> QueueConfig {
    let layout = Layout::new(SIZE, 0).unwrap();
    QueueConfig {
        size: SIZE,
        desc: BASE,
        driver: BusAddr(BASE.0 + layout.driver_offset() as u64),
        device: BusAddr(BASE.0 + layout.device_offset() as u64),
    }
}

/// The requests that a process that starts with `memory` is given first.
fn recovered(memory: &Memory) -> Vec<u16> {
    let window = [memory.window()];
    let space = AddressSpace::new(&window).unwrap();
    let mut queue = RecordedQueue::resume(config(), FEATURES, space, memory.record()).unwrap();
    let mut storage = ChainStorage::with_capacity(16);
    let mut heads = Vec::new();
    while queue.recovered() > 0 {
        let batch = queue.pop(space, memory.record(), &mut storage, 2).unwrap();
        assert!(!batch.is_empty());
        heads.extend(batch.iter().map(|chain| chain.head().id()));
    }
    heads
}

#[derive(Clone, Debug)]
enum Step {
    /// The driver adds requests.
    Add(u8),
    /// The device takes some and gives the last of them back.
    Pop(u8, u8),
    /// The device completes the one at this place among those it has.
    Complete(u8),
    /// The device shows what it has completed.
    Publish,
    /// The used index goes out, and the process is killed before the record is brought up to date.
    PublishHalf,
    /// The process is killed; the next one takes everything up again.
    Kill,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1..5u8).prop_map(Step::Add),
        4 => (1..5u8, 0..3u8).prop_map(|(take, back)| Step::Pop(take, back)),
        6 => any::<u8>().prop_map(Step::Complete),
        3 => Just(Step::Publish),
        1 => Just(Step::PublishHalf),
        2 => Just(Step::Kill),
    ];
    proptest::collection::vec(step, 1..60)
}

proptest! {
    /// Whatever happens, and wherever the process is killed: the next one is given exactly the requests that were
    /// taken and are not used, in the order in which they were first taken, and the driver gets each back once.
    #[test]
    fn nothing_is_lost_or_done_twice(steps in steps()) {
        let memory = Memory::new();
        let window = [memory.window()];
        let space = AddressSpace::new(&window).unwrap();
        let layout = Layout::new(SIZE, 0).unwrap();
        let mut driver = DriverQueue::new(
            layout, FEATURES, memory.ram(), BASE, vec![DriverSlot::default(); SIZE.into()],
        ).unwrap();
        let buffer: Buffer = (BusAddr(BASE.0 + 0x1000), 16);
        let mut queue = RecordedQueue::new(config(), FEATURES, space, memory.record()).unwrap();
        let mut storage = ChainStorage::with_capacity(16);
        // What the device has, in the order in which it was taken, and what of it is completed but not shown.
        let mut has: Vec<u16> = Vec::new();
        let mut done: Vec<u16> = Vec::new();
        let (mut added, mut used) = (0, 0);
        for step in steps {
            match step {
                Step::Add(n) => {
                    for _ in 0..n {
                        if driver.add(&[], &[buffer]).is_ok() {
                            added += 1;
                        }
                    }
                    driver.publish().unwrap();
                }
                Step::Pop(take, back) => {
                    let batch = queue.pop(space, memory.record(), &mut storage, take.into()).unwrap();
                    let heads: Vec<u16> = batch.iter().map(|chain| chain.head().id()).collect();
                    let back = usize::from(back).min(heads.len());
                    queue.rewind(memory.record(), back).unwrap();
                    has.extend(&heads[..heads.len() - back]);
                }
                Step::Complete(at) => {
                    let open: Vec<u16> = has.iter().copied().filter(|head| !done.contains(head)).collect();
                    if let Some(&head) = open.get(usize::from(at) % open.len().max(1)) {
                        queue.complete(space, memory.record(), ChainHead { id: head }, 0).unwrap();
                        done.push(head);
                    }
                }
                Step::Publish => {
                    queue.publish(space, memory.record()).unwrap();
                    has.retain(|head| !done.contains(head));
                    done.clear();
                }
                Step::PublishHalf => {
                    queue.queue().publish(space).unwrap();
                    has.retain(|head| !done.contains(head));
                    done.clear();
                    let left = has.len() + queue.recovered();
                    queue = RecordedQueue::resume(config(), FEATURES, space, memory.record()).unwrap();
                    prop_assert_eq!(queue.recovered(), left);
                    has.clear();
                }
                Step::Kill => {
                    let left = has.len() + queue.recovered();
                    queue = RecordedQueue::resume(config(), FEATURES, space, memory.record()).unwrap();
                    prop_assert_eq!(queue.recovered(), left);
                    has.clear();
                    done.clear();
                }
            }
            while driver.pop_used().unwrap().is_some() {
                used += 1;
            }
            // Requests that were recovered and not taken again yet stand before or behind those taken again.
            let mut expected = has.clone();
            expected.extend(queue.again.iter().rev());
            let mut found = recovered(&memory.copy());
            if queue.again.is_empty() {
                prop_assert_eq!(&found, &expected);
            }
            found.sort_unstable();
            expected.sort_unstable();
            prop_assert_eq!(found, expected);
        }
        // A last process does all that is left.
        let mut queue = RecordedQueue::resume(config(), FEATURES, space, memory.record()).unwrap();
        loop {
            let batch = queue.pop(space, memory.record(), &mut storage, 4).unwrap();
            if batch.is_empty() {
                break;
            }
            for chain in batch.iter() {
                queue.complete(space, memory.record(), chain.head(), 0).unwrap();
            }
            queue.publish(space, memory.record()).unwrap();
        }
        while driver.pop_used().unwrap().is_some() {
            used += 1;
        }
        prop_assert_eq!(added, used);
        prop_assert_eq!(driver.outstanding(), 0);
    }
}

#[test]
fn a_chain_of_the_process_before_that_the_driver_has_broken_is_told() {
    let memory = Memory::new();
    let window = [memory.window()];
    let space = AddressSpace::new(&window).unwrap();
    let mut inflight = Inflight::begin(memory.record(), SIZE).unwrap();
    // Its descriptor is all zeros: a buffer of no bytes.
    inflight.take(memory.record(), 3).unwrap();
    let mut queue = RecordedQueue::resume(config(), FEATURES, space, memory.record()).unwrap();
    let mut storage = ChainStorage::with_capacity(16);
    let error = queue
        .pop(space, memory.record(), &mut storage, 4)
        .unwrap_err();
    assert!(error.is_peer_fault(), "{error}");
}

#[test]
fn a_queue_in_the_middle_with_a_record_that_was_never_used_is_refused_unless_it_is_at_rest() {
    let memory = Memory::new();
    let window = [memory.window()];
    let space = AddressSpace::new(&window).unwrap();
    let layout = Layout::new(SIZE, 0).unwrap();
    let ram = memory.ram().get(0, layout.total_len()).unwrap();
    let slots = vec![DriverSlot::default(); SIZE.into()];
    let mut driver = DriverQueue::new(layout, FEATURES, ram, BASE, slots).unwrap();
    let mut plain = DeviceQueue::new(config(), FEATURES, space).unwrap();
    let mut storage = ChainStorage::with_capacity(16);
    driver.add(&[(BASE, 1)], &[]).unwrap();
    driver.publish().unwrap();
    let head = plain
        .pop(space, &mut storage, 1)
        .unwrap()
        .get(0)
        .unwrap()
        .head();
    plain.complete(space, head, 0).unwrap();
    plain.publish(space).unwrap();
    assert!(RecordedQueue::resume(config(), FEATURES, space, memory.record()).is_ok());

    for word in &memory.record {
        word.store(0, Ordering::Relaxed);
    }
    driver.pop_used().unwrap().unwrap();
    driver.add(&[(BASE, 1)], &[]).unwrap();
    driver.publish().unwrap();
    let refused = RecordedQueue::resume(config(), FEATURES, space, memory.record());
    assert!(matches!(refused, Err(QueueError::BadRecord(_))));
}
