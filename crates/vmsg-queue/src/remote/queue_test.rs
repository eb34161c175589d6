// SPDX-License-Identifier: Apache-2.0 OR MIT

use core::cell::Cell;
use core::sync::atomic::AtomicU64;

use vmsg_mem::{Access, AddressSpace, RamSlice, Window};

use super::*;
use crate::{DriverQueue, DriverSlot, Layout};

const BASE: BusAddr = BusAddr(0x10_0000);
const LEN: usize = 0x4000;

/// Memory of which every access may fail.
struct Moody<'m> {
    space: AddressSpace<'m>,
    /// Accesses that succeed before one fails.
    left: Cell<usize>,
}

#[derive(Debug, PartialEq)]
struct Away;

impl Moody<'_> {
    fn access(&self) -> Result<(), Away> {
        let left = self.left.get();
        self.left.set(left.wrapping_sub(1));
        if left == 0 { Err(Away) } else { Ok(()) }
    }
}

impl Memory for Moody<'_> {
    type Error = Away;
    fn read(&self, addr: BusAddr, into: &mut [u8]) -> Result<(), Away> {
        self.access()?;
        self.space.read(addr, into).map_err(|_| Away)
    }
    fn write(&self, addr: BusAddr, from: &[u8]) -> Result<(), Away> {
        self.access()?;
        self.space.write(addr, from).map_err(|_| Away)
    }
    fn load_u16(&self, addr: BusAddr) -> Result<u16, Away> {
        self.access()?;
        self.space.load_u16(addr).map_err(|_| Away)
    }
    fn store_u16(&self, addr: BusAddr, value: u16) -> Result<(), Away> {
        self.access()?;
        self.space.store_u16(addr, value).map_err(|_| Away)
    }
}

fn again<T>(mut attempt: impl FnMut() -> Result<T, RemoteError<Away>>) -> T {
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(RemoteError::Memory(Away)) => {}
            Err(RemoteError::Queue(error)) => panic!("{error}"),
        }
    }
}

#[test]
fn an_access_that_fails_is_done_again_and_nothing_is_lost() {
    for event_idx in [false, true] {
        let words: Vec<AtomicU64> = (0..LEN / 8).map(|_| AtomicU64::new(0)).collect();
        let ram = RamSlice::from_atomics(&words);
        let windows = [Window::new(BASE, ram, Access::ReadWrite).unwrap()];
        let space = AddressSpace::new(&windows).unwrap();
        let features = QueueFeatures {
            event_idx,
            indirect: true,
        };
        let layout = Layout::new(8, 4).unwrap();
        let slots = vec![DriverSlot::default(); 8];
        let mut driver = DriverQueue::new(layout, features, ram, BASE, slots).unwrap();
        let mut queue = RemoteQueue::new(driver.config(), features).unwrap();
        let mut storage = RemoteStorage::with_capacity(8, 32);
        for round in 0..1000u32 {
            // Some fail at once, some in the middle, some not at all.
            let memory = Moody {
                space,
                left: Cell::new(round as usize % 9),
            };
            let count = 1 + round % 4;
            let tokens: Vec<_> = (0..count)
                .map(|n| {
                    let readable = [(BusAddr(BASE.0 + 0x2000 + u64::from(n)), 7)];
                    let writable = [(BusAddr(BASE.0 + 0x3000), 9 + n)];
                    driver.add(&readable, &writable).unwrap()
                })
                .collect();
            driver.publish().unwrap();
            let mut heads = Vec::new();
            while heads.len() < count as usize {
                let batch = again(|| {
                    let batch = queue.pop(&memory, &mut storage, 8)?;
                    Ok(batch
                        .iter()
                        .map(|chain| {
                            assert_eq!(chain.readable()[0].1, 7);
                            (chain.head(), chain.writable()[0].1)
                        })
                        .collect::<Vec<_>>())
                });
                heads.extend(batch);
            }
            for &(head, len) in &heads {
                queue.complete(head, len);
            }
            memory.left.set(round as usize % 5);
            again(|| queue.publish(&memory));
            for n in 0..count {
                let used = driver.pop_used().unwrap().unwrap();
                assert_eq!(used.token, tokens[n as usize]);
                assert_eq!(used.written, 9 + n);
            }
            assert_eq!(driver.pop_used().unwrap(), None);
            assert!(!again(|| queue.enable_notifications(&memory)));
        }
    }
}

#[test]
fn queues_that_cannot_be_are_refused() {
    let good = QueueConfig {
        size: 8,
        desc: BusAddr(0x1000),
        driver: BusAddr(0x2000),
        device: BusAddr(0x3000),
    };
    let features = QueueFeatures::default();
    assert!(RemoteQueue::new(good, features).is_ok());
    for bad in [
        QueueConfig { size: 0, ..good },
        QueueConfig { size: 7, ..good },
        QueueConfig {
            desc: BusAddr(0x1008),
            ..good
        },
        QueueConfig {
            driver: BusAddr(0x2001),
            ..good
        },
        QueueConfig {
            device: BusAddr(0x3002),
            ..good
        },
        QueueConfig {
            desc: BusAddr(u64::MAX - 15),
            ..good
        },
        QueueConfig {
            device: BusAddr(u64::MAX - 3),
            ..good
        },
    ] {
        let refused = RemoteQueue::new(bad, features);
        assert!(refused.is_err_and(|error| error.is_peer_fault()), "{bad:?}");
    }
    assert!(RemoteQueue::resume(good, features, 9, 0).is_err());
    assert!(RemoteQueue::resume(good, features, 2, 0xfffe).is_ok());
}

#[test]
fn a_table_as_long_as_a_descriptor_can_say_costs_no_more_than_what_is_read_of_it() {
    let words: Vec<AtomicU64> = (0..LEN / 8).map(|_| AtomicU64::new(0)).collect();
    let ram = RamSlice::from_atomics(&words);
    let windows = [Window::new(BASE, ram, Access::ReadWrite).unwrap()];
    let space = AddressSpace::new(&windows).unwrap();
    let config = QueueConfig {
        size: 8,
        desc: BASE,
        driver: BusAddr(BASE.0 + 0x100),
        device: BusAddr(BASE.0 + 0x200),
    };
    let features = QueueFeatures {
        event_idx: false,
        indirect: true,
    };
    // A table of 65,536 entries, of which one is followed and only a part is memory.
    ram.write(0, &(BASE.0 + 0x1000).to_le_bytes());
    ram.write(8, &(16u32 << 16).to_le_bytes());
    ram.write(12, &INDIRECT.to_le_bytes());
    ram.write(0x1000, &(BASE.0 + 0x3000).to_le_bytes());
    ram.write(0x1008, &5u32.to_le_bytes());
    ram.write(0x102, &1u16.to_le_bytes());
    let mut queue = RemoteQueue::new(config, features).unwrap();
    let mut storage = RemoteStorage::with_capacity(8, 32);
    let batch = queue.pop(&space, &mut storage, 8).unwrap();
    let chain = batch.iter().next().unwrap();
    assert_eq!(chain.readable(), [(BusAddr(BASE.0 + 0x3000), 5)]);
}

#[test]
fn chains_that_somebody_had_taken_before_are_looked_up_by_their_heads_and_then_come_new_ones() {
    let words: Vec<AtomicU64> = (0..LEN / 8).map(|_| AtomicU64::new(0)).collect();
    let ram = RamSlice::from_atomics(&words);
    let windows = [Window::new(BASE, ram, Access::ReadWrite).unwrap()];
    let space = AddressSpace::new(&windows).unwrap();
    let features = QueueFeatures {
        event_idx: false,
        indirect: true,
    };
    let layout = Layout::new(8, 4).unwrap();
    let slots = vec![DriverSlot::default(); 8];
    let mut driver = DriverQueue::new(layout, features, ram, BASE, slots).unwrap();
    let at = |n: u32| BusAddr(BASE.0 + 0x2000 + u64::from(n));
    let mut tokens = Vec::new();
    for n in 1..=4 {
        // Direct ones and indirect ones, of one and of two buffers.
        let readable = [(at(n), n), (at(0), 1)];
        let readable = &readable[..1 + n as usize % 2];
        tokens.push(driver.add(readable, &[]).unwrap());
    }
    driver.publish().unwrap();
    // Of three that were taken the second is done.
    let mut queue = RemoteQueue::new(driver.config(), features).unwrap();
    let mut storage = RemoteStorage::with_capacity(8, 32);
    let batch = queue.pop(&space, &mut storage, 3).unwrap();
    let heads: Vec<u16> = batch.iter().map(|chain| chain.head().id()).collect();
    let second = batch.iter().nth(1).unwrap().head();
    queue.complete(second, 0);
    queue.publish(&space).unwrap();
    assert_eq!(driver.pop_used().unwrap().unwrap().token, tokens[1]);

    let mut queue = RemoteQueue::resume(driver.config(), features, 3, 1).unwrap();
    let mut left = vec![heads[2], heads[0]];
    let lens = |batch: &RemoteBatch<'_>| -> Vec<u32> {
        batch.iter().map(|chain| chain.readable()[0].1).collect()
    };
    let batch = queue.pop_again(&space, &mut storage, &left, 1).unwrap();
    assert_eq!(lens(&batch), [1]);
    let first = batch.iter().next().unwrap().head();
    left.pop();
    let batch = queue.pop_again(&space, &mut storage, &left, 8).unwrap();
    assert_eq!(lens(&batch), [3]);
    let third = batch.iter().next().unwrap().head();
    let batch = queue.pop(&space, &mut storage, 8).unwrap();
    assert_eq!(lens(&batch), [4]);
    let fourth = batch.iter().next().unwrap().head();
    for head in [fourth, first, third] {
        queue.complete(head, 0);
    }
    queue.publish(&space).unwrap();
    for n in [3, 0, 2] {
        assert_eq!(driver.pop_used().unwrap().unwrap().token, tokens[n]);
    }
    // A head that is none breaks the queue.
    let refused = queue.pop_again(&space, &mut storage, &[8], 8);
    assert!(matches!(
        refused,
        Err(RemoteError::Queue(QueueError::BadHead { head: 8, .. }))
    ));
    assert!(queue.is_broken());
}
