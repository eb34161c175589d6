// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

const BASE: u64 = 1 << 20;
const LEN: usize = 1 << 20;

fn with_pool(test: impl FnOnce(&mut Pool<'_>, RamSlice<'_>)) {
    let words: Vec<AtomicU64> = (0..LEN / 8).map(|_| AtomicU64::new(0)).collect();
    let ram = RamSlice::from_atomics(&words);
    let division = Division::new(&[16, 16], LEN, true).unwrap();
    test(&mut Pool::new(ram, BASE, &division), ram);
}

/// A stream of numbers that is the same each time.
fn numbers() -> impl FnMut() -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

#[test]
fn buffers_never_overlap_and_all_come_back() {
    with_pool(|pool, ram| {
        let mut number = numbers();
        let mut held: Vec<(usize, Vec<Buffer>)> = Vec::new();
        let mut failures = 0;
        for round in 0..20_000 {
            if number() % 5 < 3 {
                let queue = usize::try_from(number() % 2).unwrap();
                let len = 1 + number() % (1 << (1 + number() % 16));
                let mut buffers = Vec::new();
                if pool.take(queue, len, &mut buffers, 64) {
                    assert_eq!(buffers.iter().map(|b| u64::from(b.1)).sum::<u64>(), len);
                    for &(addr, len) in &buffers {
                        pool.memory(addr, len).fill(0xee);
                    }
                    held.push((queue, buffers));
                } else {
                    assert!(buffers.is_empty());
                    failures += 1;
                }
            } else if !held.is_empty() {
                let at = usize::try_from(number()).unwrap() % held.len();
                let (queue, mut buffers) = held.swap_remove(at);
                pool.wipe_all(queue, &mut buffers);
            }
            if round % 32 != 0 {
                continue;
            }
            let mut taken = BTreeMap::new();
            for &(addr, len) in held.iter().flat_map(|(_, buffers)| buffers) {
                taken.insert(addr.0, addr.0 + u64::from(len));
            }
            let mut end = 0;
            for (from, to) in taken {
                assert!(from >= end, "two buffers overlap");
                end = to;
            }
        }
        assert!(failures > 100, "the pool was full at times: {failures}");
        for (queue, mut buffers) in held {
            pool.wipe_all(queue, &mut buffers);
        }
        assert!(pool.is_unused_for(0) && pool.is_unused_for(1));
        let mut bytes = vec![0; LEN];
        ram.read(0, &mut bytes);
        assert!(bytes.iter().all(|&byte| byte == 0), "all was wiped");
    });
}

#[test]
fn a_queue_that_takes_all_it_can_leaves_the_other_one_its_part() {
    with_pool(|pool, _| {
        let mut all = Vec::new();
        while pool.take(0, 1000, &mut all, usize::MAX) {}
        let mut other = Vec::new();
        let own = pool.own[1].as_ref().unwrap().len * GRANULE;
        assert!(pool.take(1, own as u64, &mut other, 1));
        assert!(!pool.take(1, 1, &mut other, 2));
    });
}

#[test]
fn room_in_pieces_is_room_as_long_as_the_pieces_may_be_so_many() {
    with_pool(|pool, _| {
        let mut all = Vec::new();
        while pool.take(0, 4096, &mut all, usize::MAX) {}
        pool.wipe_all(0, &mut all.into_iter().step_by(2).collect());
        let mut out = Vec::new();
        assert!(!pool.take(0, 16384, &mut out, 3));
        assert!(out.is_empty());
        assert!(pool.take(0, 16384, &mut out, 4));
        assert_eq!(out.len(), 4);
    });
}

#[test]
fn who_waits_longest_gets_what_is_shared() {
    with_pool(|pool, _| {
        let own = pool.own[0].as_ref().unwrap().len * GRANULE;
        let (mut zero, mut one) = (Vec::new(), Vec::new());
        assert!(pool.take(0, own as u64, &mut zero, 1));
        assert!(pool.take(1, own as u64, &mut one, 1));
        pool.wait(0);
        pool.wait(1);
        assert!(!pool.take(1, 1, &mut one, 2));
        assert!(pool.take(0, 1, &mut zero, 2));
        pool.served(0);
        assert!(pool.take(1, 1, &mut one, 2));
    });
}

#[test]
fn room_that_is_kept_for_another_one_is_room_to_wait_for() {
    with_pool(|pool, _| {
        let mut shared = Vec::new();
        while pool.take(0, 64 << 10, &mut shared, usize::MAX) {}
        let large = pool.most(1);
        assert!(!pool.take(1, large, &mut Vec::new(), usize::MAX));
        pool.wait(1);
        pool.release_all(0, &mut shared);
        // Nothing is in use, and it is the other one's turn.
        assert!(!pool.take(0, large, &mut shared, usize::MAX));
        assert!(!pool.is_unused_for(0));
        assert!(pool.is_unused_for(1));
        assert!(pool.take(1, large, &mut shared, usize::MAX));
        pool.served(1);
        pool.release_all(1, &mut shared);
        assert!(pool.is_unused_for(0));
        assert!(pool.take(0, large, &mut shared, usize::MAX));
    });
}

#[test]
fn what_can_never_be_had_is_known() {
    with_pool(|pool, _| {
        let most = pool.most(0);
        assert!(pool.can_ever_hold(0, most, 0));
        assert!(pool.can_ever_hold(0, most - 256, 1));
        assert!(!pool.can_ever_hold(0, most, 1));
        assert!(!pool.can_ever_hold(0, 1 << 32, 0));
        let mut out = Vec::new();
        assert!(pool.take(0, most, &mut out, 64), "from both parts");
    });
}
