// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device side against memory that may hold anything and change at any time.

use core::sync::atomic::AtomicU64;

use proptest::prelude::*;
use vmsg_mem::{Access, AddressSpace, BusAddr, Pieces, RamSlice, Window};
use vmsg_queue::{ChainHead, ChainStorage, DeviceQueue, QueueConfig, QueueFeatures};

const BASE: u64 = 0x1000;
const SIZE: u16 = 8;
const CONFIG: QueueConfig = QueueConfig {
    size: SIZE,
    desc: BusAddr(BASE),
    driver: BusAddr(BASE + 0x80),
    device: BusAddr(BASE + 0xa0),
};
/// Length of the window that holds the queue.
const QUEUE_LEN: usize = 0x1000;
/// Pieces that the device has room for.
const CAPACITY: usize = 24;

#[derive(Clone, Debug)]
enum Step {
    /// Descriptor `index`, of the table or of the memory after the rings, which
    /// serves as indirect tables.
    Describe {
        index: u16,
        addr: u64,
        len: u32,
        flags: u16,
        next: u16,
    },
    /// Any bytes anywhere in the window of the queue.
    Scribble {
        offset: usize,
        bytes: Vec<u8>,
    },
    Avail {
        slot: usize,
        head: u16,
    },
    /// Moves the available index.
    Offer(u16),
    Event(u16),
    Pop(usize),
    Complete(u32),
    Publish,
    Rewind(usize),
    Notifications(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let addr = prop_oneof![
        // Around the windows, see `check`.
        20 => BASE + 0x300..BASE + 0x1700,
        4 => BASE..BASE + 0x5000,
        6 => (0u64..4).prop_map(|n| BASE + 0x200 + 0x40 * n),
        1 => any::<u64>(),
        1 => (0u64..64).prop_map(|n| u64::MAX - n),
    ];
    let len = prop_oneof![
        20 => (1u32..9).prop_map(|n| n * 16),
        4 => 0u32..0x800,
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        8 => prop::sample::select(&[0u16, 0, 2, 2, 1, 1, 3, 4][..]),
        1 => 0u16..8,
        1 => any::<u16>(),
    ];
    let next = prop_oneof![30 => 0..SIZE, 1 => any::<u16>()];
    let describe = (0..SIZE * 3, addr, len, flags, next);
    prop_oneof![
        10 => describe.prop_map(|(index, addr, len, flags, next)| Step::Describe {
            index, addr, len, flags, next
        }),
        1 => (0..0x400usize, prop::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(offset, bytes)| Step::Scribble { offset, bytes }),
        4 => (0..usize::from(SIZE), prop_oneof![30 => 0..SIZE, 1 => any::<u16>()])
            .prop_map(|(slot, head)| Step::Avail { slot, head }),
        5 => prop_oneof![40 => 0u16..3, 1 => any::<u16>()].prop_map(Step::Offer),
        1 => any::<u16>().prop_map(Step::Event),
        5 => (0usize..12).prop_map(Step::Pop),
        8 => any::<u32>().prop_map(Step::Complete),
        3 => Just(Step::Publish),
        1 => (0usize..3).prop_map(Step::Rewind),
        1 => any::<bool>().prop_map(Step::Notifications),
    ]
}

/// All pieces are in `space`, and in writable windows if they are to be written.
fn inside(space: AddressSpace<'_>, pieces: Pieces<'_>, write: bool) -> bool {
    pieces.iter().all(|piece| {
        let start = piece.as_ptr().addr();
        space.windows().iter().any(|window| {
            let from = window.ram().as_ptr().addr();
            let allowed = !write || window.access() == Access::ReadWrite;
            let within = start >= from && start + piece.len() <= from + window.ram().len();
            within && allowed
        })
    })
}

fn check(
    features: QueueFeatures,
    start: u16,
    steps: &[Step],
) -> Result<(usize, bool), TestCaseError> {
    let words: Vec<AtomicU64> = (0..0x5000 / 8).map(|_| AtomicU64::new(0)).collect();
    let ram = RamSlice::from_atomics(&words);
    let window = |at: usize, len: usize, access| {
        let part = ram.get(at, len).unwrap();
        Window::new(BusAddr(BASE + at as u64), part, access).unwrap()
    };
    // Two that touch, a read-only one behind them, a hole, and a last one.
    let windows = [
        window(0, QUEUE_LEN, Access::ReadWrite),
        window(0x1000, 0x800, Access::ReadWrite),
        window(0x1800, 0x800, Access::Read),
        window(0x4000, 0x800, Access::ReadWrite),
    ];
    let space = AddressSpace::new(&windows).unwrap();
    let mut queue = DeviceQueue::resume(CONFIG, features, space, start, start).unwrap();
    let mut storage = ChainStorage::with_capacity(CAPACITY);
    let mut avail = start;
    ram.write(0x82, &avail.to_le_bytes());
    for index in 0..SIZE {
        // The driver starts out well.
        let good = [BASE + 0x400, 0x100 | u64::from(index % 2) << 33];
        let at = usize::from(index) * 16;
        ram.write(at, good.map(u64::to_le_bytes).as_flattened());
        ram.write(0x84 + 2 * usize::from(index), &index.to_le_bytes());
    }
    let mut taken: Vec<ChainHead> = Vec::new();
    let mut rewindable = 0;
    let mut chains = 0;
    for step in steps {
        let was_broken = queue.is_broken();
        let mut fault = None;
        match step {
            Step::Describe {
                index,
                addr,
                len,
                flags,
                next,
            } => {
                let at = match usize::from(*index) {
                    direct if direct < usize::from(SIZE) => direct * 16,
                    other => 0x200 + (other - usize::from(SIZE)) * 16,
                };
                ram.write(at, &addr.to_le_bytes());
                ram.write(at + 8, &len.to_le_bytes());
                ram.write(at + 12, &flags.to_le_bytes());
                ram.write(at + 14, &next.to_le_bytes());
            }
            Step::Scribble { offset, bytes } => {
                ram.write(*offset, bytes);
            }
            Step::Avail { slot, head } => {
                ram.write(0x84 + 2 * slot, &head.to_le_bytes());
            }
            Step::Offer(n) => {
                avail = avail.wrapping_add(*n);
                ram.write(0x82, &avail.to_le_bytes());
            }
            Step::Event(index) => {
                ram.write(0x84 + 2 * usize::from(SIZE), &index.to_le_bytes());
            }
            Step::Pop(max) => match queue.pop(space, &mut storage, *max) {
                Ok(batch) => {
                    prop_assert!(batch.len() <= *max);
                    rewindable = batch.len();
                    chains += batch.len();
                    let mut pieces = 0;
                    for chain in batch.iter() {
                        prop_assert!(chain.head().id() < SIZE);
                        prop_assert!(inside(space, chain.readable(), false));
                        prop_assert!(inside(space, chain.writable(), true));
                        let both = [chain.readable(), chain.writable()];
                        pieces += both.iter().map(|part| part.iter().count()).sum::<usize>();
                        prop_assert!(both[0].len() + both[1].len() > 0);
                        taken.push(chain.head());
                    }
                    prop_assert!(pieces <= CAPACITY);
                }
                Err(error) => fault = Some(error),
            },
            Step::Complete(written) => {
                if let Some(head) = taken.pop() {
                    fault = queue.complete(space, head, *written).err();
                    rewindable = 0;
                }
            }
            Step::Publish => fault = queue.publish(space).err(),
            Step::Rewind(n) => {
                let n = (*n).min(rewindable);
                queue.rewind(n);
                rewindable -= n;
                taken.truncate(taken.len() - n);
            }
            Step::Notifications(true) => fault = queue.enable_notifications(space).err(),
            Step::Notifications(false) => fault = queue.disable_notifications(space).err(),
        }
        prop_assert!(queue.in_flight() <= SIZE);
        if let Some(error) = fault {
            prop_assert!(queue.is_broken());
            prop_assert_eq!(error.is_peer_fault(), !was_broken, "{}", error);
        }
    }
    Ok((chains, queue.is_broken()))
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
    fn whatever_the_rings_hold_chains_stay_inside_the_windows(
        features in features(),
        start in prop_oneof![Just(0), Just(0xfffc), any::<u16>()],
        steps in prop::collection::vec(step(), 1..120),
    ) {
        check(features, start, &steps)?;
    }
}

/// The property above would hold for a queue that refuses everything, too.
#[test]
fn random_rings_yield_chains_as_well_as_faults() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut chains, mut broken) = (0, 0);
    for _ in 0..300 {
        let strategy = (features(), prop::collection::vec(step(), 60..120));
        let (features, steps) = strategy.new_tree(&mut runner).unwrap().current();
        let (taken, failed) = check(features, 0, &steps).unwrap();
        chains += taken;
        broken += usize::from(failed);
    }
    assert!(chains > 1000, "{chains} chains");
    assert!((100..300).contains(&broken), "{broken} broken");
}
