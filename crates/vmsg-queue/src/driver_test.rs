// SPDX-License-Identifier: Apache-2.0 OR MIT

use core::sync::atomic::AtomicU64;

use proptest::prelude::*;

use super::*;
use crate::ring::Table;

const BASE: BusAddr = BusAddr(0x4_0000);
const PLAIN: QueueFeatures = QueueFeatures {
    event_idx: false,
    indirect: false,
};
const ALL: QueueFeatures = QueueFeatures {
    event_idx: true,
    indirect: true,
};

/// Memory full of what somebody else has left there.
fn memory() -> Vec<AtomicU64> {
    (0..0x800).map(|_| AtomicU64::new(!0)).collect()
}

fn aligned(words: &[AtomicU64]) -> RamSlice<'_> {
    let ram = RamSlice::from_atomics(words);
    let skip = ram.as_ptr().align_offset(Layout::ALIGN);
    ram.split_at(skip).1
}

fn queue(
    words: &[AtomicU64],
    size: u16,
    indirect: u16,
    features: QueueFeatures,
) -> DriverQueue<'_, Vec<DriverSlot>> {
    let layout = Layout::new(size, indirect).unwrap();
    let slots = vec![DriverSlot::default(); usize::from(size)];
    DriverQueue::new(layout, features, aligned(words), BASE, slots).unwrap()
}

/// Uses a chain as a device would, good or bad.
fn use_chain(queue: &DriverQueue<'_, Vec<DriverSlot>>, index: u16, id: u16, len: u32) {
    queue.used.set_element(index, id, len);
    queue.used.release_index(index.wrapping_add(1));
}

const fn buffer(n: u64, len: u32) -> Buffer {
    (BusAddr(0x10_0000 + n * 0x1000), len)
}

#[test]
fn a_direct_chain_takes_a_descriptor_for_each_buffer_and_gives_them_back() {
    let words = memory();
    let mut queue = queue(&words, 4, 0, PLAIN);
    let next = queue.next_token();
    let token = queue
        .add(&[buffer(0, 16)], &[buffer(1, 512), buffer(2, 1)])
        .unwrap();
    assert_eq!(next, Some(token));
    assert_eq!(queue.free_descriptors(), 1);
    assert!(matches!(
        queue.add(&[buffer(0, 16)], &[buffer(1, 512)]),
        Err(QueueError::Full)
    ));
    assert!(queue.publish().unwrap());
    assert!(!queue.publish().unwrap(), "nothing new");
    assert_eq!(queue.outstanding(), 1);
    assert_eq!(queue.pop_used().unwrap(), None);
    use_chain(&queue, 0, 0, 513);
    let written = 513;
    assert_eq!(queue.pop_used().unwrap(), Some(Used { token, written }));
    assert_eq!(queue.pop_used().unwrap(), None);
    assert_eq!(queue.free_descriptors(), 4);
}

#[test]
fn a_parked_queue_goes_on_where_it_was() {
    let words = memory();
    let mut queue = queue(&words, 4, 0, ALL);
    let token = queue.add(&[], &[buffer(0, 16)]).unwrap();
    queue.add(&[], &[buffer(1, 16)]).unwrap();
    queue.publish().unwrap();
    use_chain(&queue, 0, 0, 3);
    let parked = queue.park();
    let mut queue = parked.resume(aligned(&words)).unwrap();
    assert_eq!(queue.free_descriptors(), 2);
    assert_eq!(queue.outstanding(), 2);
    let written = 3;
    assert_eq!(queue.pop_used().unwrap(), Some(Used { token, written }));
    assert_eq!(queue.pop_used().unwrap(), None);
    let error = queue.park().resume(aligned(&words[..8])).unwrap_err();
    assert!(matches!(error, QueueError::BadMemory { size: 4 }));
}

#[test]
fn an_indirect_chain_takes_one_descriptor() {
    let words = memory();
    let mut queue = queue(&words, 2, 3, ALL);
    let three = [buffer(0, 1), buffer(1, 2), buffer(2, 3)];
    queue.add(&three, &[]).unwrap();
    assert_eq!(queue.free_descriptors(), 1);
    let outer = queue.table.get(0).unwrap();
    assert_eq!((outer.flags, outer.len), (INDIRECT, 48));
    let offset = Layout::new(2, 3).unwrap().indirect_offset() as u64;
    assert_eq!(outer.addr, BusAddr(BASE.0 + offset));
    // A single buffer needs no table, four do not fit into one.
    queue.add(&[], &three[..1]).unwrap();
    assert_eq!(queue.table.get(1).unwrap().flags, WRITE);
    let four = [buffer(0, 1); 4];
    assert!(matches!(
        queue.add_indirect(&four, &[]),
        Err(QueueError::BadChain { buffers: 4, .. })
    ));
}

#[test]
fn chains_that_no_queue_can_hold_are_refused() {
    let words = memory();
    let mut queue = queue(&words, 4, 0, ALL);
    let huge = [buffer(0, u32::MAX); 2];
    for (readable, writable) in [
        (&[][..], &[][..]),
        (&[buffer(0, 1); 5], &[]),
        (&[buffer(0, 1)], &[buffer(0, 0)]),
        (&huge[..1], &huge[..1]),
    ] {
        let error = queue.add(readable, writable).unwrap_err();
        assert!(matches!(error, QueueError::BadChain { .. }), "{error}");
        assert!(!error.is_peer_fault());
    }
    assert_eq!(queue.free_descriptors(), 4);
}

#[test]
fn memory_must_be_long_enough_and_aligned() {
    let words = memory();
    let layout = Layout::new(8, 2).unwrap();
    let ram = aligned(&words);
    let (short, _) = ram.split_at(layout.total_len() - 1);
    let (_, skewed) = ram.split_at(8);
    let slots = || vec![DriverSlot::default(); 8];
    let make = |ram, base, slots| DriverQueue::new(layout, ALL, ram, base, slots).map(drop);
    assert!(make(ram, BASE, slots()).is_ok());
    for refused in [
        make(short, BASE, slots()),
        make(skewed, BASE, slots()),
        make(ram, BusAddr(BASE.0 + 8), slots()),
        make(ram, BusAddr(!0xf), slots()),
        make(ram, BASE, slots().split_off(1)),
    ] {
        assert!(matches!(refused, Err(QueueError::BadMemory { size: 8 })));
    }
}

#[test]
fn the_device_cannot_use_what_it_does_not_have() {
    // What the device claims: id, length and used index.
    for (id, len, index) in [
        (1, 0, 1),  // never added
        (2, 0, 1),  // added, but not published
        (9, 0, 1),  // outside the table
        (0, 65, 1), // more than there is room for
        (0, 0, 2),  // more chains than it has
        (0, 0, 0xffff),
    ] {
        let words = memory();
        let mut queue = queue(&words, 4, 0, PLAIN);
        queue.add(&[buffer(0, 8)], &[buffer(1, 64)]).unwrap();
        queue.publish().unwrap();
        queue.add(&[buffer(0, 8)], &[buffer(1, 64)]).unwrap();
        queue.used.set_element(0, id, len);
        queue.used.release_index(index);
        let error = queue.pop_used().unwrap_err();
        assert!(error.is_peer_fault(), "{error}");
        assert!(queue.is_broken());
        assert!(matches!(queue.pop_used(), Err(QueueError::Broken)));
        assert!(matches!(queue.add(&[], &[]), Err(QueueError::Broken)));
        assert!(matches!(queue.publish(), Err(QueueError::Broken)));
    }
}

#[test]
fn a_chain_cannot_be_used_twice() {
    let words = memory();
    let mut queue = queue(&words, 4, 0, PLAIN);
    queue.add(&[buffer(0, 8)], &[]).unwrap();
    queue.add(&[buffer(0, 8)], &[]).unwrap();
    queue.publish().unwrap();
    use_chain(&queue, 0, 1, 0);
    use_chain(&queue, 1, 1, 0);
    assert!(queue.pop_used().unwrap().is_some());
    assert!(matches!(
        queue.pop_used(),
        Err(QueueError::BadUsedId { id: 1 })
    ));
}

#[test]
fn the_device_is_kicked_only_if_it_wants_to_be() {
    let words = memory();
    let mut plain = queue(&words, 4, 0, PLAIN);
    plain.used.set_flags(NO_NOTIFICATION);
    plain.add(&[buffer(0, 8)], &[]).unwrap();
    assert!(!plain.publish().unwrap());

    let words = memory();
    let mut event = queue(&words, 4, 0, ALL);
    event.used.set_avail_event(1);
    let mut kicks = Vec::new();
    for _ in 0..3 {
        event.add(&[buffer(0, 8)], &[]).unwrap();
        kicks.push(event.publish().unwrap());
    }
    assert_eq!(kicks, [false, true, false]);
}

#[test]
fn enabling_notifications_tells_of_used_chains() {
    for features in [PLAIN, ALL] {
        let words = memory();
        let mut queue = queue(&words, 4, 0, features);
        queue.add(&[buffer(0, 8)], &[]).unwrap();
        queue.publish().unwrap();
        queue.disable_notifications().unwrap();
        if features.event_idx {
            assert!(!passed_event(queue.avail.used_event().unwrap(), 4, 0));
        } else {
            assert_eq!(queue.avail.flags(), NO_NOTIFICATION);
        }
        assert!(!queue.enable_notifications().unwrap());
        assert_eq!(queue.avail.flags(), 0);
        use_chain(&queue, 0, 0, 0);
        assert!(queue.enable_notifications().unwrap());
        assert!(queue.pop_used().unwrap().is_some());
        assert!(!queue.enable_notifications().unwrap());
        if features.event_idx {
            assert_eq!(queue.avail.used_event(), Some(1));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever a device writes into its ring, and into the tables that it was
    /// only to read: every chain comes back at most once, descriptors never
    /// get lost, and there is no panic.
    #[test]
    fn a_hostile_device_gets_nothing_but_an_error(
        steps in prop::collection::vec((0u8..6, 0u16..6, 0u32..40, 0u16..4), 1..200),
        event_idx: bool,
        indirect: bool,
    ) {
        let words = memory();
        let features = QueueFeatures { event_idx, indirect };
        let mut queue = queue(&words, 4, 2, features);
        let mut out = std::collections::HashSet::new();
        for (step, id, len, index) in steps {
            match step {
                0 | 1 => {
                    let writable = [buffer(1, 16), buffer(2, 16)];
                    match queue.add(&[], &writable[..1 + usize::from(step)]) {
                        Ok(token) => prop_assert!(out.insert(token)),
                        Err(QueueError::Full | QueueError::Broken) => {}
                        Err(error) => return Err(TestCaseError::fail(error.to_string())),
                    }
                }
                2 => drop(queue.publish()),
                3 => {
                    // Mostly what a device may do, sometimes not.
                    let next = queue.used.index().wrapping_add(index / 3);
                    use_chain(&queue, next, id, len);
                }
                4 => {
                    let ram = aligned(&words);
                    ram.write(usize::from(id) * 16, &[0xa5; 16]);
                    queue.used.set_avail_event(index);
                }
                _ => match queue.pop_used() {
                    Ok(Some(used)) => {
                        prop_assert!(out.remove(&used.token));
                        prop_assert!(used.written <= 32);
                    }
                    Ok(None) => prop_assert!(!queue.is_broken()),
                    Err(error) => prop_assert!(error.is_peer_fault() || queue.is_broken()),
                },
            }
            let taken: u16 = out.iter().map(|token| queue.slot(token.0).count).sum();
            prop_assert_eq!(queue.free_descriptors() + taken, 4);
        }
    }
}
