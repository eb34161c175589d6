// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `RemoteQueue` against `DeviceQueue`: two drivers do the same things, good and bad, each is served by one of the two, and
//! nobody may see a difference.

use core::sync::atomic::AtomicU64;

use proptest::prelude::*;
use vmsg_mem::{Access, AddressSpace, BusAddr, RamSlice, Window};
use vmsg_queue::remote::{Memory, RemoteError, RemoteQueue, RemoteStorage};
use vmsg_queue::{ChainHead, ChainStorage, DeviceQueue, QueueConfig, QueueError, QueueFeatures};

const BASE: u64 = 0x1000;
const LEN: usize = 0x2000;
const SIZE: u16 = 8;
const CONFIG: QueueConfig = QueueConfig {
    size: SIZE,
    desc: BusAddr(BASE),
    driver: BusAddr(BASE + 0x80),
    device: BusAddr(BASE + 0xa0),
};
/// Buffers that the devices have room for: less or more than the longest chain of the table.
const CAPACITIES: [usize; 2] = [6, 24];

/// Memory behind copies, which reads as much ahead as it is told.
struct Far<'m>(AddressSpace<'m>, usize);

impl Memory for Far<'_> {
    type Error = vmsg_mem::Error;
    fn read(&self, addr: BusAddr, into: &mut [u8]) -> Result<(), Self::Error> {
        self.0.read(addr, into)
    }
    fn write(&self, addr: BusAddr, from: &[u8]) -> Result<(), Self::Error> {
        self.0.write(addr, from)
    }
    fn load_u16(&self, addr: BusAddr) -> Result<u16, Self::Error> {
        self.0.load_u16(addr)
    }
    fn store_u16(&self, addr: BusAddr, value: u16) -> Result<(), Self::Error> {
        self.0.store_u16(addr, value)
    }
    fn read_ahead(&self) -> usize {
        self.1
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Any bytes anywhere around the queue.
    Write {
        offset: usize,
        bytes: Vec<u8>,
    },
    /// Moves the available index.
    Offer(u16),
    Pop(usize),
    Complete(usize, u32),
    Publish,
    Rewind(usize),
    Notifications(bool),
}

fn describe() -> impl Strategy<Value = Step> {
    let addr = prop_oneof![
        30 => BASE + 0x300..BASE + 0x1700,
        6 => (0u64..4).prop_map(|n| BASE + 0x200 + 0x41 * n),
        1 => any::<u64>(),
        1 => (0u64..64).prop_map(|n| u64::MAX - n),
    ];
    let len = prop_oneof![
        30 => (1u32..9).prop_map(|n| n * 16),
        4 => 0u32..0x800,
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        8 => prop::sample::select(&[0u16, 0, 2, 2, 1, 1, 3, 4][..]),
        1 => any::<u16>(),
    ];
    let next = prop_oneof![30 => 0..SIZE, 1 => any::<u16>()];
    (0..SIZE * 3, addr, len, flags, next).prop_map(|(index, addr, len, flags, next)| {
        let offset = match usize::from(index) {
            direct if direct < usize::from(SIZE) => direct * 16,
            // After the rings: serves as indirect tables.
            other => 0x200 + (other - usize::from(SIZE)) * 16,
        };
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        Step::Write { offset, bytes }
    })
}

fn step() -> impl Strategy<Value = Step> {
    let word = |offset, value: u16| Step::Write {
        offset,
        bytes: value.to_le_bytes().to_vec(),
    };
    prop_oneof![
        10 => describe(),
        1 => (0..0x400usize, prop::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(offset, bytes)| Step::Write { offset, bytes }),
        4 => (0..usize::from(SIZE), prop_oneof![30 => 0..SIZE, 1 => any::<u16>()])
            .prop_map(move |(slot, head)| word(0x84 + 2 * slot, head)),
        // Flags, and the event at the end of the ring.
        1 => (0u16..2).prop_map(move |flags| word(0x80, flags)),
        2 => any::<u16>().prop_map(move |event| word(0x84 + 2 * usize::from(SIZE), event)),
        5 => prop_oneof![40 => 0u16..3, 1 => any::<u16>()].prop_map(Step::Offer),
        6 => (0usize..12).prop_map(Step::Pop),
        8 => (any::<usize>(), any::<u32>()).prop_map(|(at, n)| Step::Complete(at, n)),
        4 => Just(Step::Publish),
        1 => (0usize..3).prop_map(Step::Rewind),
        2 => any::<bool>().prop_map(Step::Notifications),
    ]
}

fn contents(ram: RamSlice<'_>) -> Vec<u8> {
    let mut bytes = vec![0; ram.len()];
    ram.read(0, &mut bytes);
    bytes
}

fn remote_fault<T>(result: Result<T, RemoteError<vmsg_mem::Error>>) -> Result<T, QueueError> {
    result.map_err(|error| match error {
        RemoteError::Queue(error) => error,
        RemoteError::Memory(error) => QueueError::Mem(error),
    })
}

/// Chains seen by both, and the fault that ended it.
fn check(
    features: QueueFeatures,
    start: u16,
    [ahead, capacity]: [usize; 2],
    steps: &[Step],
) -> Result<(usize, Option<QueueError>), TestCaseError> {
    let words: [Vec<AtomicU64>; 2] =
        [(); 2].map(|()| (0..LEN / 8).map(|_| AtomicU64::new(0)).collect());
    let rams = [&words[0], &words[1]].map(|words| RamSlice::from_atomics(words));
    let windows = rams.map(|ram| [Window::new(BusAddr(BASE), ram, Access::ReadWrite).unwrap()]);
    let space = AddressSpace::new(&windows[0]).unwrap();
    let far = Far(AddressSpace::new(&windows[1]).unwrap(), ahead);
    let mut near = DeviceQueue::resume(CONFIG, features, space, start, start).unwrap();
    let mut remote = RemoteQueue::resume(CONFIG, features, start, start).unwrap();
    let mut near_storage = ChainStorage::with_capacity(capacity);
    let mut storage = RemoteStorage::with_capacity(capacity, capacity);
    let mut avail = start;
    let write = |offset: usize, bytes: &[u8]| {
        for ram in rams {
            ram.write(offset, bytes);
        }
    };
    write(0x82, &avail.to_le_bytes());
    for index in 0..SIZE {
        let good = [BASE + 0x400, 0x100 | u64::from(index % 2) << 33];
        let at = usize::from(index) * 16;
        write(at, good.map(u64::to_le_bytes).as_flattened());
        write(0x84 + 2 * usize::from(index), &index.to_le_bytes());
    }
    let mut taken: Vec<(ChainHead, ChainHead)> = Vec::new();
    let mut last = 0;
    let mut chains = 0;
    // The one writes a used element when a chain is completed, the other when it is published. A driver that writes to
    // the used ring may do so in between.
    let mut scribbled = false;
    for step in steps {
        let (one, two) = match step {
            Step::Write { offset, bytes } => {
                write(*offset, bytes);
                scribbled |= *offset < 0xa0 + 0x48 && offset + bytes.len() > 0xa0;
                continue;
            }
            Step::Offer(n) => {
                avail = avail.wrapping_add(*n);
                write(0x82, &avail.to_le_bytes());
                continue;
            }
            Step::Pop(max) => {
                let one = near.pop(space, &mut near_storage, *max);
                let two = remote_fault(remote.pop(&far, &mut storage, *max));
                // Only the mapped one sees whether buffers are memory: there the comparison ends.
                let ours = match &one {
                    Err(QueueError::Mem(_)) => return Ok((chains, one.err())),
                    Ok(batch) => Some(batch.len()),
                    Err(_) => None,
                };
                if let (Some(ours), Ok(batch)) = (ours, &two) {
                    if ours < batch.len() && ours < *max {
                        let next = near.pop(space, &mut near_storage, 1);
                        prop_assert!(matches!(next, Err(QueueError::Mem(_))), "{:?}", next);
                        return Ok((chains, next.err()));
                    }
                }
                last = 0;
                match (one, two) {
                    (Ok(one), Ok(two)) => {
                        prop_assert_eq!(one.len(), two.len());
                        for (one, two) in one.iter().zip(two.iter()) {
                            prop_assert_eq!(one.head().id(), two.head().id());
                            for (slices, buffers) in [
                                (one.readable_slices(), two.readable()),
                                (one.writable_slices(), two.writable()),
                            ] {
                                let base = rams[0].as_ptr().addr();
                                let slices: Vec<_> = slices
                                    .iter()
                                    .map(|s| ((s.as_ptr().addr() - base) as u64 + BASE, s.len()))
                                    .collect();
                                let buffers: Vec<_> =
                                    buffers.iter().map(|b| (b.0.0, b.1 as usize)).collect();
                                prop_assert_eq!(slices, buffers);
                            }
                            taken.push((one.head(), two.head()));
                            last += 1;
                        }
                        chains += last;
                        (Ok(()), Ok(()))
                    }
                    (one, two) => (one.map(drop), two.map(drop)),
                }
            }
            Step::Complete(at, written) => {
                if taken.is_empty() || near.is_broken() {
                    continue;
                }
                let (one, two) = taken.swap_remove(at % taken.len());
                last = 0;
                near.complete(space, one, *written).unwrap();
                remote.complete(two, *written);
                continue;
            }
            Step::Publish => {
                let one = near.publish(space);
                let two = remote_fault(remote.publish(&far));
                if let (Ok(one), Ok(two)) = (&one, &two) {
                    prop_assert_eq!(one, two, "whether to notify");
                    let same = scribbled || contents(rams[0]) == contents(rams[1]);
                    prop_assert!(same, "memory differs");
                }
                (one.map(drop), two.map(drop))
            }
            Step::Rewind(n) => {
                let n = (*n).min(last);
                near.rewind(n);
                remote.rewind(n);
                last -= n;
                taken.truncate(taken.len() - n);
                continue;
            }
            Step::Notifications(true) => {
                let one = near.enable_notifications(space);
                let two = remote_fault(remote.enable_notifications(&far));
                if let (Ok(one), Ok(two)) = (&one, &two) {
                    prop_assert_eq!(one, two, "whether there is more");
                }
                (one.map(drop), two.map(drop))
            }
            Step::Notifications(false) => (
                near.disable_notifications(space),
                remote_fault(remote.disable_notifications(&far)),
            ),
        };
        prop_assert_eq!(near.is_broken(), remote.is_broken());
        prop_assert_eq!(near.avail_index(), remote.avail_index());
        prop_assert_eq!(near.used_index(), remote.used_index());
        if one.is_err() || two.is_err() {
            let (one, two) = (one.err(), two.err());
            prop_assert_eq!(format!("{one:?}"), format!("{two:?}"));
            return Ok((chains, one));
        }
    }
    Ok((chains, None))
}

fn features() -> impl Strategy<Value = QueueFeatures> {
    any::<(bool, bool)>().prop_map(|(event_idx, indirect)| QueueFeatures {
        event_idx,
        indirect,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn whatever_a_driver_does_both_queues_do_the_same(
        features in features(),
        start in prop_oneof![Just(0), Just(0xfffc), any::<u16>()],
        ahead in prop::sample::select(&[0usize, 32, 256, 65536][..]),
        capacity in prop::sample::select(&CAPACITIES[..]),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        check(features, start, [ahead, capacity], &steps)?;
    }
}

/// The property above would hold if nothing ever happened, too.
#[test]
fn the_comparison_sees_many_chains_and_every_kind_of_fault() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut chains = 0;
    let mut faults = std::collections::BTreeSet::new();
    for round in 0..3000 {
        let strategy = (features(), prop::collection::vec(step(), 60..120));
        let (features, steps) = strategy.new_tree(&mut runner).unwrap().current();
        let (taken, fault) = check(features, 0, [256, CAPACITIES[round % 2]], &steps).unwrap();
        chains += taken;
        if let Some(fault) = fault {
            let name = format!("{fault:?}");
            let end = name.find(|c: char| !c.is_alphanumeric());
            faults.insert(name[..end.unwrap_or(name.len())].to_owned());
        }
    }
    assert!(chains > 5000, "{chains} chains");
    let expected = [
        "BadAvailIndex",
        "BadHead",
        "BadIndirectTable",
        "BadNext",
        "ChainTooLong",
        "Loop",
        "Mem",
        "MisplacedIndirect",
        "ReadableAfterWritable",
        "ZeroLength",
    ];
    for name in expected {
        assert!(faults.contains(name), "{name} is not among {faults:?}");
    }
}
