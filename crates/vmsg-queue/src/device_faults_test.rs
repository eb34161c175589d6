// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Chains and rings that cannot be.

use super::*;

#[test]
fn a_full_storage_ends_the_batch_and_an_endless_chain_is_an_error() {
    let mut guest = Guest::new();
    guest.describe(0, BASE + 0x1000, 64, 0, 0);
    guest.describe(1, BASE + 0x1000, 64, NEXT, 2);
    guest.describe(2, BASE + 0x1000, 64, NEXT, 3);
    guest.describe(3, BASE + 0x1000, 64, 0, 0);
    guest.offer(0);
    guest.offer(1);
    let windows = guest.windows();
    let space = AddressSpace::new(&windows).unwrap();
    let mut queue = DeviceQueue::new(guest.config(), PLAIN, space).unwrap();
    let mut storage = ChainStorage::with_capacity(3);
    assert_eq!(queue.pop(space, &mut storage, 8).unwrap().len(), 1);
    assert_eq!(queue.pop(space, &mut storage, 8).unwrap().len(), 1);

    let mut queue = DeviceQueue::resume(guest.config(), PLAIN, space, 1, 1).unwrap();
    let mut storage = ChainStorage::with_capacity(2);
    assert!(matches!(
        queue.pop(space, &mut storage, 8),
        Err(QueueError::ChainTooLong {
            head: 1,
            capacity: 2
        })
    ));
}

#[test]
fn a_fault_behind_good_chains_is_told_by_the_next_pop() {
    let mut guest = Guest::new();
    guest.describe(0, BASE + 0x1000, 64, 0, 0);
    guest.offer(0);
    guest.offer(SIZE);
    let windows = guest.windows();
    let space = AddressSpace::new(&windows).unwrap();
    let mut queue = DeviceQueue::new(guest.config(), PLAIN, space).unwrap();
    let mut storage = ChainStorage::with_capacity(8);
    let batch = queue.pop(space, &mut storage, 8).unwrap();
    queue
        .complete(space, batch.get(0).unwrap().head(), 0)
        .unwrap();
    assert!(queue.publish(space).unwrap());
    let error = queue.pop(space, &mut storage, 8).unwrap_err();
    assert!(matches!(error, QueueError::BadHead { head: SIZE, .. }));
    assert!(error.is_peer_fault());
}

#[test]
fn each_fault_of_a_chain_has_its_name() {
    use QueueError::*;
    type Make = fn(&Guest);
    type Expect = fn(&QueueError) -> bool;
    let cases: [(&str, Make, Expect); 14] = [
        (
            "next outside",
            |g| g.describe(0, BASE, 1, NEXT, SIZE),
            |e| matches!(e, BadNext { next: SIZE, len: 8 }),
        ),
        (
            "circle",
            |g| g.describe(0, BASE, 1, NEXT, 0),
            |e| matches!(e, Loop { head: 0 }),
        ),
        (
            "zero length",
            |g| g.describe(0, BASE, 0, 0, 0),
            |e| matches!(e, ZeroLength { .. }),
        ),
        (
            "readable after writable",
            |g| {
                g.describe(0, BASE, 1, NEXT | WRITE, 1);
                g.describe(1, BASE, 1, 0, 0);
            },
            |e| matches!(e, ReadableAfterWritable { head: 0 }),
        ),
        (
            "outside",
            |g| g.describe(0, BASE + 0xfff0, 17, 0, 0),
            |e| matches!(e, Mem(Error::Unmapped { .. })),
        ),
        (
            "wraps",
            |g| g.describe(0, u64::MAX, 2, 0, 0),
            |e| matches!(e, Mem(Error::Unmapped { .. })),
        ),
        (
            "huge",
            |g| g.describe(0, BASE, u32::MAX, 0, 0),
            |e| matches!(e, Mem(Error::Unmapped { .. })),
        ),
        (
            "indirect with next",
            |g| g.describe(0, BASE, 16, INDIRECT | NEXT, 1),
            |e| matches!(e, MisplacedIndirect { head: 0 }),
        ),
        (
            "indirect in indirect",
            |g| {
                g.describe(0, BASE + 0x1000, 16, INDIRECT, 0);
                g.describe_at(0x1000, 0, descriptor(BASE, 16, INDIRECT, 0));
            },
            |e| matches!(e, MisplacedIndirect { head: 0 }),
        ),
        (
            "table of no descriptors",
            |g| g.describe(0, BASE, 0, INDIRECT, 0),
            |e| matches!(e, BadIndirectTable { len: 0, .. }),
        ),
        (
            "table of one and a half descriptors",
            |g| g.describe(0, BASE, 24, INDIRECT, 0),
            |e| matches!(e, BadIndirectTable { len: 24, .. }),
        ),
        (
            "table nowhere",
            |g| g.describe(0, 0, 32, INDIRECT, 0),
            |e| matches!(e, Mem(Error::Unmapped { .. })),
        ),
        (
            "next outside the table",
            |g| {
                g.describe(0, BASE + 0x1000, 32, INDIRECT, 0);
                g.describe_at(0x1000, 0, descriptor(BASE, 16, NEXT, 2));
            },
            |e| matches!(e, BadNext { next: 2, len: 2 }),
        ),
        (
            "circle in the table",
            |g| {
                g.describe(0, BASE + 0x1000, 32, INDIRECT, 0);
                g.describe_at(0x1000, 0, descriptor(BASE, 16, NEXT, 1));
                g.describe_at(0x1000, 1, descriptor(BASE, 16, NEXT, 0));
            },
            |e| matches!(e, Loop { head: 0 }),
        ),
    ];
    for (name, make, expect) in cases {
        let mut guest = Guest::new();
        make(&guest);
        guest.offer(0);
        let error = first_pop(&guest, ALL).unwrap_err();
        assert!(expect(&error), "{name}: {error}");
        assert!(error.is_peer_fault(), "{name}");
    }
}

#[test]
fn indirect_descriptors_must_be_negotiated() {
    let mut guest = Guest::new();
    guest.describe(0, BASE + 0x1000, 16, INDIRECT, 0);
    guest.describe_at(0x1000, 0, descriptor(BASE, 16, 0, 0));
    guest.offer(0);
    assert_eq!(first_pop(&guest, ALL).unwrap(), 1);
    assert!(matches!(
        first_pop(&guest, PLAIN),
        Err(QueueError::MisplacedIndirect { head: 0 })
    ));
}

#[test]
fn read_only_windows_lend_no_writable_buffers() {
    let mut guest = Guest::new();
    guest.describe(0, BASE + 0x9000, 16, 0, 0);
    guest.describe(1, BASE + 0x9000, 16, WRITE, 0);
    guest.offer(0);
    guest.offer(1);
    let mut windows = guest.windows();
    let second = windows[1];
    windows[1] = Window::new(second.base(), second.ram(), Access::Read).unwrap();
    let space = AddressSpace::new(&windows).unwrap();
    let mut queue = DeviceQueue::new(guest.config(), PLAIN, space).unwrap();
    let mut storage = ChainStorage::with_capacity(8);
    assert_eq!(queue.pop(space, &mut storage, 8).unwrap().len(), 1);
    assert!(matches!(
        queue.pop(space, &mut storage, 8),
        Err(QueueError::Mem(Error::ReadOnly { .. }))
    ));
}

#[test]
fn a_chain_may_be_4_gib_long_but_no_longer() {
    // 4,096 times the same mebibyte: nobody needs to have 4 GiB.
    let words: Vec<AtomicU64> = (0..0x4_0000).map(|_| AtomicU64::new(0)).collect();
    let big = RamSlice::from_atomics(&words);
    let window = [Window::new(BusAddr(0), big, Access::ReadWrite).unwrap()];
    let space = AddressSpace::new(&window).unwrap();
    let entries: u16 = 0x1000;
    let len = 0x10_0000;
    let table = DescriptorTable::new(big.get(0x1000, 0x1_0000).unwrap(), entries.into()).unwrap();
    let config = QueueConfig {
        size: 2,
        desc: BusAddr(0),
        driver: BusAddr(0x100),
        device: BusAddr(0x200),
    };
    let queue_table = DescriptorTable::new(big, 2).unwrap();
    assert!(queue_table.set(0, descriptor(0x1000, 0x1_0000, INDIRECT, 0)));
    for index in 0..entries {
        let flags = if index + 1 < entries { NEXT } else { 0 };
        assert!(table.set(index, descriptor(0, len, flags, index + 1)));
    }
    let avail = AvailRing::new(big.get(0x100, 0x100).unwrap(), 2, true).unwrap();
    avail.release_index(1);
    let mut storage = ChainStorage::with_capacity(usize::from(entries));
    let mut queue = DeviceQueue::new(config, ALL, space).unwrap();
    let batch = queue.pop(space, &mut storage, 1).unwrap();
    assert_eq!(batch.get(0).unwrap().readable().len(), 1 << 32);
    // One byte more before the table.
    assert!(queue_table.set(0, descriptor(0, 1, NEXT, 1)));
    assert!(queue_table.set(1, descriptor(0x1000, 0x1_0000, INDIRECT, 0)));
    let mut queue = DeviceQueue::new(config, ALL, space).unwrap();
    let mut storage = ChainStorage::with_capacity(usize::from(entries) + 1);
    assert!(matches!(
        queue.pop(space, &mut storage, 1),
        Err(QueueError::ChainTooLarge { head: 0 })
    ));
}

#[test]
fn an_index_ahead_of_the_ring_or_behind_the_device_is_refused() {
    for (avail, used, index) in [(0, 0, SIZE + 1), (5, 5, 4), (7, 4, 13), (0xfffe, 0xfffe, 7)] {
        let guest = Guest::new();
        guest.describe(0, BASE, 1, 0, 0);
        guest.avail_ring(false).release_index(index);
        let windows = guest.windows();
        let space = AddressSpace::new(&windows).unwrap();
        let mut queue = DeviceQueue::resume(guest.config(), PLAIN, space, avail, used).unwrap();
        let mut storage = ChainStorage::with_capacity(32);
        let error = queue.pop(space, &mut storage, 32).unwrap_err();
        assert!(matches!(error, QueueError::BadAvailIndex { .. }), "{error}");
    }
}

#[test]
fn rings_must_be_mapped_aligned_writable_and_of_a_legal_size() {
    let guest = Guest::new();
    let windows = guest.windows();
    let space = AddressSpace::new(&windows).unwrap();
    let good = guest.config();
    type Change = fn(&mut QueueConfig);
    let with = |change: Change| {
        let mut config = good;
        change(&mut config);
        DeviceQueue::new(config, ALL, space).unwrap_err()
    };
    let sizes: [Change; 2] = [|c| c.size = 0, |c| c.size = 3];
    for size in sizes {
        assert!(matches!(with(size), QueueError::BadSize { .. }));
    }
    let misaligned: [Change; 3] = [|c| c.desc.0 += 8, |c| c.driver.0 += 1, |c| c.device.0 += 2];
    for change in misaligned {
        let error = with(change);
        assert!(matches!(error, QueueError::Mem(Error::Misaligned { .. })));
    }
    let unmapped: [Change; 3] = [
        |c| c.desc.0 = BASE + 0xfff0,
        |c| c.driver.0 = 0,
        |c| c.device.0 = u64::MAX - 3,
    ];
    for change in unmapped {
        let error = with(change);
        assert!(matches!(error, QueueError::Mem(Error::Unmapped { .. })));
    }
    let error = with(|c| c.desc.0 = BASE + 0x7ff0);
    assert!(matches!(error, QueueError::Mem(Error::Scattered { .. })));
    let read_only = windows.map(|w| Window::new(w.base(), w.ram(), Access::Read).unwrap());
    let error = DeviceQueue::new(good, ALL, AddressSpace::new(&read_only).unwrap()).unwrap_err();
    assert!(matches!(error, QueueError::Mem(Error::ReadOnly { .. })));
}

#[test]
fn a_window_that_went_away_breaks_the_queue() {
    let guest = Guest::new();
    let windows = guest.windows();
    let space = AddressSpace::new(&windows).unwrap();
    let mut queue = DeviceQueue::new(guest.config(), PLAIN, space).unwrap();
    let error = queue.enable_notifications(AddressSpace::EMPTY).unwrap_err();
    assert!(matches!(error, QueueError::Mem(Error::Unmapped { .. })));
    assert!(matches!(queue.available(space), Err(QueueError::Broken)));
}
