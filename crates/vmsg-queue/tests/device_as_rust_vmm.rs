// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device side against rust-vmm's `virtio-queue`: two guests do the same
//! things, each is served by one of the two, and nobody may see a difference.

use core::ptr::NonNull;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmsg_mem::{Access, AddressSpace, BusAddr, Pieces, RamSlice, Window};
use vmsg_queue::{
    Buffer, ChainHead, ChainStorage, DeviceQueue, DriverQueue, DriverSlot, Layout, QueueConfig,
    QueueFeatures, Token,
};

const BASE: u64 = 0x1000_0000;
const LEN: usize = 0x10_0000;
/// Buffers are from here on; the queue is below.
const BUFFERS: u64 = BASE + 0x1_0000;
/// Where one window of our address space ends and another begins, amid the buffers.
const SEAM: usize = 0x4_0000;
const SIZE: u16 = 16;
const INDIRECT: u16 = 8;

#[derive(Clone, Debug)]
enum Step {
    Add {
        readable: Vec<(u16, u16)>,
        writable: Vec<(u16, u16)>,
        direct: bool,
    },
    DriverPublish,
    DriverPop,
    DriverNotifications(bool),
    Pop(usize),
    Rewind(usize),
    Complete(Vec<(u16, u16)>),
    DeviceNotifications(bool),
}

fn step(event_idx: bool) -> impl Strategy<Value = Step> {
    let list = || prop::collection::vec((any::<u16>(), 1u16..=u16::MAX), 0..5);
    let adding =
        (list(), list(), any::<bool>()).prop_map(|(readable, writable, direct)| Step::Add {
            readable,
            writable,
            direct,
        });
    // rust-vmm does not look at the flag by which a driver without EVENT_IDX asks for peace.
    let driver_wish = any::<bool>().prop_map(move |on| Step::DriverNotifications(on || !event_idx));
    prop_oneof![
        4 => adding,
        3 => Just(Step::DriverPublish),
        3 => Just(Step::DriverPop),
        1 => driver_wish,
        3 => (0usize..20).prop_map(Step::Pop),
        1 => (0usize..4).prop_map(Step::Rewind),
        3 => prop::collection::vec((any::<u16>(), any::<u16>()), 0..6)
            .prop_map(Step::Complete),
        1 => any::<bool>().prop_map(Step::DeviceNotifications),
    ]
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(BASE), LEN)]).unwrap()
}

fn ram(memory: &GuestMemoryMmap) -> RamSlice<'_> {
    let ptr = memory.get_host_address(GuestAddress(BASE)).unwrap();
    // SAFETY: the region is LEN bytes, mapped while `memory` is borrowed, and nothing makes
    // references into it.
    unsafe { RamSlice::from_raw_parts(NonNull::new(ptr).unwrap(), LEN) }
}

fn driver(memory: &GuestMemoryMmap, features: QueueFeatures) -> DriverQueue<'_, Vec<DriverSlot>> {
    let layout = Layout::new(SIZE, INDIRECT).unwrap();
    let slots = vec![DriverSlot::default(); usize::from(SIZE)];
    DriverQueue::new(layout, features, ram(memory), BusAddr(BASE), slots).unwrap()
}

fn reference(config: QueueConfig, features: QueueFeatures) -> Queue {
    let mut queue = Queue::new(SIZE).unwrap();
    queue
        .try_set_desc_table_address(GuestAddress(config.desc.0))
        .unwrap();
    queue
        .try_set_avail_ring_address(GuestAddress(config.driver.0))
        .unwrap();
    queue
        .try_set_used_ring_address(GuestAddress(config.device.0))
        .unwrap();
    queue.set_event_idx(features.event_idx);
    queue.set_ready(true);
    queue
}

/// A part of a chain: address, length, and whether the device may write it.
type Part = (u64, usize, bool);

/// Puts a part at the end of a list, joined with the last one if it follows it in memory.
fn append(list: &mut Vec<Part>, part: Part) {
    match list.last_mut() {
        Some((addr, len, write)) if *addr + *len as u64 == part.0 && *write == part.2 => {
            *len += part.1;
        }
        _ => list.push(part),
    }
}

/// What our device was given, and what rust-vmm's was given.
struct Taken {
    head: ChainHead,
    parts: Vec<Part>,
}

struct Pair<'m> {
    drivers: [DriverQueue<'m, Vec<DriverSlot>>; 2],
    memories: [&'m GuestMemoryMmap; 2],
    space: AddressSpace<'m>,
    ours: DeviceQueue,
    theirs: Queue,
    storage: ChainStorage,
    /// Chains that both devices have and did not complete.
    taken: Vec<Taken>,
    /// How many of the last of them came with the last pop.
    last: usize,
}

impl Pair<'_> {
    fn run(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Add {
                readable,
                writable,
                direct,
            } => {
                let [readable, writable] = [readable, writable].map(|list| buffers(&list));
                let [one, two] = &mut self.drivers;
                let add = |driver: &mut DriverQueue<'_, Vec<DriverSlot>>| -> Option<Token> {
                    if direct {
                        driver.add_direct(&readable, &writable).ok()
                    } else {
                        driver.add(&readable, &writable).ok()
                    }
                };
                prop_assert_eq!(add(one), add(two));
            }
            Step::DriverPublish => {
                let [one, two] = &mut self.drivers;
                prop_assert_eq!(one.publish().unwrap(), two.publish().unwrap());
            }
            Step::DriverPop => {
                let [one, two] = &mut self.drivers;
                prop_assert_eq!(one.pop_used().unwrap(), two.pop_used().unwrap());
            }
            Step::DriverNotifications(on) => {
                let [one, two] = &mut self.drivers;
                if on {
                    let more = one.enable_notifications().unwrap();
                    prop_assert_eq!(more, two.enable_notifications().unwrap());
                } else {
                    one.disable_notifications().unwrap();
                    two.disable_notifications().unwrap();
                }
            }
            Step::Pop(max) => self.pop(max)?,
            Step::Rewind(n) => {
                let n = n.min(self.last);
                self.ours.rewind(n);
                for _ in 0..n {
                    self.theirs.go_to_previous_position();
                }
                self.taken.truncate(self.taken.len() - n);
                self.last -= n;
            }
            Step::Complete(picks) => self.complete(&picks)?,
            Step::DeviceNotifications(true) => {
                let ours = self.ours.enable_notifications(self.space).unwrap();
                let theirs = self.theirs.enable_notification(self.memories[1]).unwrap();
                prop_assert_eq!(ours, theirs);
            }
            Step::DeviceNotifications(false) => {
                self.ours.disable_notifications(self.space).unwrap();
                self.theirs.disable_notification(self.memories[1]).unwrap();
            }
        }
        self.same_memory()
    }

    fn pop(&mut self, max: usize) -> Result<(), TestCaseError> {
        let base = ram(self.memories[0]).as_ptr().addr();
        let batch = self.ours.pop(self.space, &mut self.storage, max).unwrap();
        let mut iter = self.theirs.iter(self.memories[1]).unwrap();
        self.last = 0;
        for chain in batch.iter() {
            let other = iter.next().expect("rust-vmm sees as many chains");
            prop_assert_eq!(chain.head().id(), other.head_index());
            let mut theirs = Vec::new();
            for part in other {
                let write = part.is_write_only();
                append(&mut theirs, (part.addr().0, part.len() as usize, write));
            }
            let mut parts = Vec::new();
            let mut ours = |pieces: Pieces<'_>, write| {
                for piece in pieces.iter() {
                    let offset = piece.as_ptr().addr() - base;
                    append(&mut parts, (BASE + offset as u64, piece.len(), write));
                }
            };
            ours(chain.readable(), false);
            ours(chain.writable(), true);
            prop_assert_eq!(&parts, &theirs);
            let head = chain.head();
            self.taken.push(Taken { head, parts });
            self.last += 1;
        }
        if self.last < max {
            prop_assert!(iter.next().is_none(), "rust-vmm sees more chains");
        }
        Ok(())
    }

    fn complete(&mut self, picks: &[(u16, u16)]) -> Result<(), TestCaseError> {
        let mut completed = 0;
        for (index, len) in picks {
            if self.taken.is_empty() {
                break;
            }
            let Taken { head, parts } = self
                .taken
                .swap_remove(usize::from(*index) % self.taken.len());
            let room: usize = parts.iter().filter(|part| part.2).map(|part| part.1).sum();
            let written = u32::from(*len).min(u32::try_from(room).unwrap());
            self.ours.complete(self.space, head, written).unwrap();
            self.theirs
                .add_used(self.memories[1], head.id(), written)
                .unwrap();
            completed += 1;
            self.last = 0;
        }
        let ours = self.ours.publish(self.space).unwrap();
        let theirs = self.theirs.needs_notification(self.memories[1]).unwrap();
        // rust-vmm also notifies of nothing.
        prop_assert_eq!(ours, theirs && completed > 0);
        prop_assert_eq!(self.ours.used_index(), self.theirs.next_used());
        prop_assert_eq!(self.ours.avail_index(), self.theirs.next_avail());
        Ok(())
    }

    /// Both queues consist of the same bytes.
    fn same_memory(&self) -> Result<(), TestCaseError> {
        let len = Layout::new(SIZE, INDIRECT).unwrap().total_len();
        let [one, two] = self.memories.map(|memory| {
            let mut bytes = vec![0; len];
            ram(memory).read(0, &mut bytes);
            bytes
        });
        prop_assert!(one == two, "the rings differ");
        Ok(())
    }
}

fn buffers(list: &[(u16, u16)]) -> Vec<Buffer> {
    list.iter()
        .map(|&(at, len)| (BusAddr(BUFFERS + u64::from(at) * 8), u32::from(len)))
        .collect()
}

fn check(features: QueueFeatures, skip: usize, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let memories = [memory(), memory()];
    let drivers = [0, 1].map(|n| driver(&memories[n], features));
    let (low, high) = ram(&memories[0]).split_at(SEAM);
    let windows = [
        Window::new(BusAddr(BASE), low, Access::ReadWrite).unwrap(),
        Window::new(BusAddr(BASE + SEAM as u64), high, Access::ReadWrite).unwrap(),
    ];
    let space = AddressSpace::new(&windows).unwrap();
    let config = drivers[0].config();
    let mut pair = Pair {
        drivers,
        memories: [&memories[0], &memories[1]],
        space,
        ours: DeviceQueue::new(config, features, space).unwrap(),
        theirs: reference(config, features),
        storage: ChainStorage::with_capacity(64 * usize::from(SIZE)),
        taken: Vec::new(),
        last: 0,
    };
    for _ in 0..skip {
        for driver in &mut pair.drivers {
            driver.add(&[(BusAddr(BUFFERS), 1)], &[]).unwrap();
            driver.publish().unwrap();
        }
        pair.pop(1)?;
        pair.complete(&[(0, 0)])?;
        for driver in &mut pair.drivers {
            prop_assert!(driver.pop_used().unwrap().is_some());
        }
    }
    steps.into_iter().try_for_each(|step| pair.run(step))
}

fn case() -> impl Strategy<Value = (QueueFeatures, Vec<Step>)> {
    (any::<bool>(), any::<bool>()).prop_flat_map(|(event_idx, indirect)| {
        let features = QueueFeatures {
            event_idx,
            indirect,
        };
        let steps = prop::collection::vec(step(event_idx), 1..150);
        (Just(features), steps)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn the_driver_sees_no_difference((features, steps) in case()) {
        check(features, 0, steps)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]
    #[test]
    fn the_driver_sees_no_difference_where_indices_wrap_around((features, steps) in case()) {
        check(features, 0xfff8, steps)?;
    }
}
