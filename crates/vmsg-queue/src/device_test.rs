// SPDX-License-Identifier: Apache-2.0 OR MIT

use core::sync::atomic::AtomicU64;

use vmsg_mem::{Error, Window};

use super::*;
use crate::ring::{Descriptor, INDIRECT, NEXT, WRITE};
use crate::{ChainArray, ChainStorage, Layout};

const BASE: u64 = 0x10_0000;
const SIZE: u16 = 8;

#[path = "device_faults_test.rs"]
mod faults;

/// A driver that writes what a test wants it to write, right or wrong.
struct Guest {
    words: Vec<AtomicU64>,
    layout: Layout,
    avail: u16,
}

impl Guest {
    fn new() -> Self {
        Self {
            words: (0..0x2000).map(|_| AtomicU64::new(0)).collect(),
            layout: Layout::new(SIZE, 0).unwrap(),
            avail: 0,
        }
    }

    fn ram(&self) -> RamSlice<'_> {
        RamSlice::from_atomics(&self.words)
    }

    /// One window at `BASE` for the rings and buffers below `BASE + 0x8000`, a second one after it.
    fn windows(&self) -> [Window<'_>; 2] {
        let (one, two) = self.ram().split_at(0x8000);
        [
            Window::new(BusAddr(BASE), one, Access::ReadWrite).unwrap(),
            Window::new(BusAddr(BASE + 0x8000), two, Access::ReadWrite).unwrap(),
        ]
    }

    fn config(&self) -> QueueConfig {
        QueueConfig {
            size: SIZE,
            desc: BusAddr(BASE),
            driver: BusAddr(BASE + self.layout.driver_offset() as u64),
            device: BusAddr(BASE + self.layout.device_offset() as u64),
        }
    }

    fn avail_ring(&self, event_idx: bool) -> AvailRing<'_> {
        let (_, ram) = self.ram().split_at(self.layout.driver_offset());
        AvailRing::new(ram, SIZE, event_idx).unwrap()
    }

    fn used_ring(&self, event_idx: bool) -> UsedRing<'_> {
        let (_, ram) = self.ram().split_at(self.layout.device_offset());
        UsedRing::new(ram, SIZE, event_idx).unwrap()
    }

    fn describe(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let table = DescriptorTable::new(self.ram(), SIZE.into()).unwrap();
        assert!(table.set(index, descriptor(addr, len, flags, next)));
    }

    fn describe_at(&self, offset: usize, index: u16, desc: Descriptor) {
        let (_, ram) = self.ram().split_at(offset);
        assert!(DescriptorTable::new(ram, 16).unwrap().set(index, desc));
    }

    fn offer(&mut self, head: u16) {
        let ring = self.avail_ring(false);
        ring.set_head(self.avail, head);
        ring.release_index(self.avail.wrapping_add(1));
        self.avail = self.avail.wrapping_add(1);
    }
}

fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        addr: BusAddr(addr),
        len,
        flags,
        next,
    }
}

const PLAIN: QueueFeatures = QueueFeatures {
    event_idx: false,
    indirect: false,
};
const ALL: QueueFeatures = QueueFeatures {
    event_idx: true,
    indirect: true,
};

/// Serves the guest's rings with a fresh queue and returns what the first pop says.
fn first_pop(guest: &Guest, features: QueueFeatures) -> Result<usize, QueueError> {
    let windows = guest.windows();
    let space = AddressSpace::new(&windows).unwrap();
    let mut queue = DeviceQueue::new(guest.config(), features, space).unwrap();
    let mut storage = ChainStorage::with_capacity(32);
    let popped = queue.pop(space, &mut storage, 32).map(|batch| batch.len());
    if popped.is_err() {
        assert!(queue.is_broken());
        assert!(matches!(queue.publish(space), Err(QueueError::Broken)));
        let again = queue.pop(space, &mut storage, 32);
        assert!(matches!(again, Err(QueueError::Broken)));
    }
    popped
}

#[test]
fn chains_are_split_into_readable_and_writable_pieces() {
    let mut guest = Guest::new();
    guest.describe(3, BASE + 0x1000, 16, NEXT, 5);
    guest.describe(5, BASE + 0x2000, 32, NEXT | WRITE, 1);
    guest.describe(1, BASE + 0x3000, 8, WRITE, 0);
    guest.offer(3);
    guest.ram().write(0x1000, b"sixteen  letters");
    let windows = guest.windows();
    let space = AddressSpace::new(&windows).unwrap();
    let mut queue = DeviceQueue::new(guest.config(), PLAIN, space).unwrap();
    let mut storage = ChainArray::<4, 8>::new();
    let batch = queue.pop(space, &mut storage, 32).unwrap();
    assert_eq!(batch.len(), 1);
    let chain = batch.get(0).unwrap();
    assert_eq!(chain.head().id(), 3);
    assert_eq!(chain.readable().read_array(), Some(*b"sixteen  letters"));
    assert_eq!(chain.writable().len(), 40);
    assert_eq!(chain.writable().write(&[7; 40]), 40);
    assert_eq!(queue.in_flight(), 1);
    queue.complete(space, chain.head(), 40).unwrap();
    assert_eq!(guest.used_ring(false).index(), 0);
    assert!(queue.publish(space).unwrap());
    assert_eq!(guest.used_ring(false).index(), 1);
    assert_eq!(guest.used_ring(false).element(0), (3, 40));
    assert_eq!(queue.in_flight(), 0);
    assert!(!queue.publish(space).unwrap(), "nothing new to show");
    let mut tail = [0; 9];
    guest.ram().read(0x3000, &mut tail);
    assert_eq!(tail, [7, 7, 7, 7, 7, 7, 7, 7, 0]);
}

#[test]
fn a_buffer_across_two_windows_becomes_two_pieces() {
    let mut guest = Guest::new();
    guest.describe(0, BASE + 0x7ff0, 32, WRITE, 0);
    guest.offer(0);
    let windows = guest.windows();
    let space = AddressSpace::new(&windows).unwrap();
    let mut queue = DeviceQueue::new(guest.config(), PLAIN, space).unwrap();
    let mut storage = ChainStorage::with_capacity(2);
    let batch = queue.pop(space, &mut storage, 1).unwrap();
    let writable = batch.get(0).unwrap().writable();
    assert_eq!(writable.iter().count(), 2);
    assert_eq!(writable.len(), 32);
}

#[test]
fn an_indirect_table_ends_a_chain_of_direct_descriptors() {
    let mut guest = Guest::new();
    guest.describe(0, BASE + 0x1000, 4, NEXT, 1);
    guest.describe(1, BASE + 0x2008, 32, INDIRECT | WRITE, 0);
    // The table is only aligned to 8 bytes: that is allowed.
    guest.describe_at(0x2008, 0, descriptor(BASE + 0x3000, 5, NEXT, 1));
    guest.describe_at(0x2008, 1, descriptor(BASE + 0x9000, 6, WRITE, 0));
    guest.offer(0);
    let windows = guest.windows();
    let space = AddressSpace::new(&windows).unwrap();
    let mut queue = DeviceQueue::new(guest.config(), ALL, space).unwrap();
    let mut storage = ChainStorage::with_capacity(8);
    let batch = queue.pop(space, &mut storage, 1).unwrap();
    let chain = batch.get(0).unwrap();
    assert_eq!((chain.readable().len(), chain.writable().len()), (9, 6));
}

#[test]
fn used_chains_may_come_in_any_order() {
    let mut guest = Guest::new();
    for head in [4, 2, 0] {
        guest.describe(head, BASE + 0x1000, 64, WRITE, 0);
        guest.offer(head);
    }
    let windows = guest.windows();
    let space = AddressSpace::new(&windows).unwrap();
    let mut queue = DeviceQueue::new(guest.config(), PLAIN, space).unwrap();
    let mut storage = ChainStorage::with_capacity(8);
    let batch = queue.pop(space, &mut storage, 8).unwrap();
    let heads: Vec<_> = batch.iter().map(|chain| chain.head()).collect();
    let mut completer = queue.completer(space).unwrap();
    completer.complete(heads[2], 1);
    completer.complete(heads[0], 2);
    assert!(queue.publish(space).unwrap());
    queue.complete(space, heads[1], 3).unwrap();
    guest.avail_ring(false).set_flags(NO_NOTIFICATION);
    assert!(!queue.publish(space).unwrap(), "the driver asked for peace");
    let used = guest.used_ring(false);
    assert_eq!(used.index(), 3);
    assert_eq!(
        [used.element(0), used.element(1), used.element(2)],
        [(0, 1), (4, 2), (2, 3)]
    );
}

#[test]
fn chains_given_back_are_taken_again_in_order() {
    let mut guest = Guest::new();
    for head in 0..5 {
        guest.describe(head, BASE + 0x1000, 64, 0, 0);
        guest.offer(head);
    }
    let windows = guest.windows();
    let space = AddressSpace::new(&windows).unwrap();
    let mut queue = DeviceQueue::new(guest.config(), PLAIN, space).unwrap();
    let mut storage = ChainStorage::with_capacity(8);
    assert_eq!(queue.pop(space, &mut storage, 4).unwrap().len(), 4);
    queue.rewind(3);
    assert_eq!(queue.avail_index(), 1);
    let batch = queue.pop(space, &mut storage, 8).unwrap();
    let heads: Vec<_> = batch.iter().map(|chain| chain.head().id()).collect();
    assert_eq!(heads, [1, 2, 3, 4]);
}

/// A guest with a writable buffer of each of these lengths, all available.
fn guest_with_buffers(lengths: &[u32]) -> Guest {
    let mut guest = Guest::new();
    for (head, len) in (0..).zip(lengths) {
        guest.describe(head, BASE + 0x1000, *len, WRITE, 0);
        guest.offer(head);
    }
    guest
}

fn popped_for(guest: &Guest, need: Need) -> usize {
    let windows = guest.windows();
    let space = AddressSpace::new(&windows).unwrap();
    let mut queue = DeviceQueue::new(guest.config(), PLAIN, space).unwrap();
    let mut storage = ChainStorage::with_capacity(8);
    let batch = queue.pop_for(space, &mut storage, 8, need).unwrap();
    batch.len()
}

#[test]
fn no_more_chains_are_taken_than_are_needed_where_that_is_plain() {
    let guest = guest_with_buffers(&[64; 8]);
    for (count, bytes, longest, wanted) in [
        (1, 64, 64, 1),
        (3, 100, 64, 3),
        (0, 0, 0, 1),
        (100, 6400, 64, 8),
        // Each takes two; all there are were looked at.
        (2, 130, 65, 8),
    ] {
        let need = Need {
            count,
            bytes,
            longest,
        };
        assert_eq!(popped_for(&guest, need), wanted, "{need:?}");
    }
}

#[test]
fn what_a_chain_has_to_read_is_no_room() {
    let mut guest = Guest::new();
    for head in [0, 2, 4] {
        guest.describe(head, BASE + 0x1000, 64, NEXT, head + 1);
        guest.describe(head + 1, BASE + 0x1000, 8, WRITE, 0);
        guest.offer(head);
    }
    let need = Need {
        count: 1,
        bytes: 20,
        longest: 20,
    };
    assert_eq!(popped_for(&guest, need), 3);
}

#[test]
fn what_fits_into_all_chains_fits_into_those_that_are_taken_for_it() {
    let mut random = 1u32;
    let mut next = |below: u32| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 8) % below
    };
    let mut fewer = 0;
    for _ in 0..2000 {
        let spread = [1, 16, 200][next(3) as usize];
        let buffers: [u32; 8] = core::array::from_fn(|_| 40 + next(spread));
        let frames: Vec<u32> = (0..1 + next(5)).map(|_| 1 + next(120)).collect();
        let need = Need {
            count: frames.len(),
            bytes: frames.iter().sum::<u32>() as usize,
            longest: frames.iter().copied().max().unwrap() as usize,
        };
        // Each into as many whole chains as it takes.
        let placed = |chains: &[u32]| {
            let mut rest = chains.iter();
            frames
                .iter()
                .take_while(|frame| {
                    let mut room = 0;
                    while room < **frame {
                        match rest.next() {
                            Some(chain) => room += chain,
                            None => return false,
                        }
                    }
                    true
                })
                .count()
        };
        let taken = popped_for(&guest_with_buffers(&buffers), need);
        assert_eq!(placed(&buffers[..taken]), placed(&buffers), "{need:?}");
        fewer += usize::from(taken < 8);
    }
    assert!(fewer > 200, "{fewer}");
}

#[test]
#[should_panic(expected = "only chains of the last pop")]
fn more_than_the_last_batch_cannot_be_given_back() {
    let mut guest = Guest::new();
    guest.describe(0, BASE + 0x1000, 64, 0, 0);
    guest.offer(0);
    let windows = guest.windows();
    let space = AddressSpace::new(&windows).unwrap();
    let mut queue = DeviceQueue::new(guest.config(), PLAIN, space).unwrap();
    let mut storage = ChainStorage::with_capacity(8);
    assert_eq!(queue.pop(space, &mut storage, 4).unwrap().len(), 1);
    queue.rewind(2);
}

#[test]
fn event_idx_decides_by_the_index_that_was_passed() {
    let mut guest = Guest::new();
    for head in 0..4 {
        guest.describe(head, BASE + 0x1000, 64, 0, 0);
        guest.offer(head);
    }
    let windows = guest.windows();
    let space = AddressSpace::new(&windows).unwrap();
    let mut queue = DeviceQueue::new(guest.config(), ALL, space).unwrap();
    let mut storage = ChainStorage::with_capacity(8);
    guest.avail_ring(true).set_used_event(1);
    let mut notified = Vec::new();
    for _ in 0..4 {
        let batch = queue.pop(space, &mut storage, 1).unwrap();
        queue
            .complete(space, batch.get(0).unwrap().head(), 0)
            .unwrap();
        notified.push(queue.publish(space).unwrap());
    }
    assert_eq!(notified, [false, true, false, false]);
}

#[test]
fn enabling_notifications_tells_of_chains_that_came_meanwhile() {
    for features in [PLAIN, ALL] {
        let event_idx = features.event_idx;
        let mut guest = Guest::new();
        guest.describe(0, BASE + 0x1000, 64, 0, 0);
        let config = guest.config();
        let mut storage = ChainStorage::with_capacity(8);
        let mut queue = {
            let windows = guest.windows();
            let space = AddressSpace::new(&windows).unwrap();
            let mut queue = DeviceQueue::new(config, features, space).unwrap();
            queue.disable_notifications(space).unwrap();
            let muted = guest.used_ring(event_idx).flags() == NO_NOTIFICATION;
            assert_eq!(muted, !event_idx);
            assert!(!queue.enable_notifications(space).unwrap());
            queue.disable_notifications(space).unwrap();
            queue
        };
        guest.offer(0);
        let windows = guest.windows();
        let space = AddressSpace::new(&windows).unwrap();
        assert!(queue.enable_notifications(space).unwrap());
        assert_eq!(queue.available(space).unwrap(), 1);
        assert_eq!(queue.pop(space, &mut storage, 8).unwrap().len(), 1);
        assert!(!queue.enable_notifications(space).unwrap());
        let used = guest.used_ring(event_idx);
        assert_eq!(used.flags(), 0);
        assert_eq!(used.avail_event(), event_idx.then_some(1));
    }
}

#[test]
fn a_queue_resumes_at_the_used_index_of_the_ring() {
    let mut guest = Guest::new();
    for head in 0..3 {
        guest.describe(head, BASE + 0x1000, 64, 0, 0);
        guest.offer(head);
    }
    guest.used_ring(false).release_index(2);
    let windows = guest.windows();
    let space = AddressSpace::new(&windows).unwrap();
    let used = DeviceQueue::read_used_index(guest.config(), space).unwrap();
    assert_eq!(used, 2);
    let mut queue = DeviceQueue::resume(guest.config(), PLAIN, space, used, used).unwrap();
    let mut storage = ChainStorage::with_capacity(8);
    let batch = queue.pop(space, &mut storage, 8).unwrap();
    assert_eq!(batch.len(), 1);
    assert_eq!(batch.get(0).unwrap().head().id(), 2);
    let refused = DeviceQueue::resume(guest.config(), PLAIN, space, 0, 1);
    assert!(matches!(refused, Err(QueueError::BadResume { .. })));
}
