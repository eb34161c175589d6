// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Somebody on the device side who rewrites the memory in common all the time, while a real device host works in it.

use crate::place::{COMMON, MARGIN, Place};
use crate::traffic;
use crate::vhost_guest::{Guest, PATIENCE, RAM, RINGS, Ram};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vmsg_mem::RamSlice;

/// All of the guest's memory behind its rings, but for what the device may write.
const CANARY: u8 = 0x33;
/// The rings of the first front's only queue are here, and where its used ring is with 64 entries: descriptors and available ring come first.
const RINGS_AT: usize = MARGIN as usize;

/// xorshift64.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

/// Rewrites what there is, until it is stopped. Returns how often.
fn rewrite(ram: RamSlice<'_>, seed: u64, stop: &AtomicBool, writes: &AtomicU64) {
    let mut numbers = Numbers(seed);
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..32 {
            let at = match numbers.below(4) {
                // Descriptors, indices, used elements.
                0..=2 => RINGS_AT + numbers.below(0x1000),
                _ => numbers.below(ram.len() - 16),
            };
            let old = {
                let mut bytes = [0; 2];
                ram.read(at, &mut bytes);
                u16::from_le_bytes(bytes)
            };
            // A little more, a little less, a bit changed, something else, what stands elsewhere.
            let new = match numbers.below(5) {
                0 => old.wrapping_add(1),
                1 => old.wrapping_sub(1),
                2 => old ^ (1 << numbers.below(16)),
                3 => numbers.below(1 << 16) as u16,
                _ => {
                    let mut bytes = [0; 2];
                    ram.read(RINGS_AT + numbers.below(0x1000), &mut bytes);
                    u16::from_le_bytes(bytes)
                }
            };
            ram.write(at & !1, &new.to_le_bytes());
        }
        writes.fetch_add(32, Ordering::Relaxed);
        std::thread::yield_now();
    }
}

/// A driver that asks and takes what comes, and starts anew when its device needs a reset, for so long. How often it did.
fn use_it(guest: &mut Guest, time: Duration, writes: &AtomicU64) -> (usize, usize) {
    let begun = Instant::now();
    let (mut answers, mut resets) = (0, 0);
    let mut n = 0usize;
    // Longer where either side has little time.
    while begun.elapsed() < time
        || (resets < 2 || writes.load(Ordering::Relaxed) < 1000) && begun.elapsed() < PATIENCE
    {
        while guest.outstanding(0) < 16 {
            n += 1;
            guest.ask(0, &[CANARY; 700][..1 + n % 700], 1 + n * 13 % 4096);
        }
        // Identities and lengths of what comes back are checked there: it is the proxy that says them.
        if guest.answer_within(0, Duration::from_millis(20)).is_some() {
            answers += 1;
            continue;
        }
        // It waits for ever, or was told.
        resets += 1;
        guest.stop();
        guest.set_up(1);
    }
    (answers, resets)
}

#[track_caller]
fn canaries_live(ram: Ram) {
    let bytes = ram.read(0, RAM as usize);
    let (buffers, room) = (0x10_0000, 0x2000);
    assert!(bytes[RINGS..buffers].iter().all(|b| *b == CANARY), "before");
    for (n, buffer) in bytes[buffers..].chunks(2 * room).enumerate() {
        let (read, written) = buffer.split_at(room);
        assert!(read.iter().all(|b| *b == CANARY), "what is read: {n}");
        let beyond = &written[4096..];
        assert!(beyond.iter().all(|b| *b == CANARY), "what is not lent: {n}");
    }
}

#[test]
fn memory_in_common_that_is_rewritten_all_the_time_harms_nobody() {
    let place = Place::new(&["late", "wide"], true);
    let common = place.common.clone().unwrap();
    assert_eq!(common.len() as u64, COMMON);
    let ram = Ram::new();
    let mut guest = Guest::connect(&place.fronts[0].socket, ram);
    guest.stale = vec![CANARY];
    let (mut answers, mut resets) = (0, 0);
    let mut writes = 0;
    for round in 0..12 {
        ram.mapping.ram().fill(CANARY);
        guest.set_up(1);
        let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| rewrite(common.ram(), 77 + round, &stop, &written));
            let used = scope.spawn(|| use_it(&mut guest, Duration::from_millis(150), &written));
            let used = used.join();
            stop.store(true, Ordering::Relaxed);
            let used = used.expect("a driver that lives");
            answers += used.0;
            resets += used.1;
        });
        writes += written.into_inner();
        guest.stop();
        canaries_live(ram);
        // Nobody lies any more: it works as ever.
        guest.set_up(1);
        traffic(&mut guest, 30);
        guest.stop();
    }
    println!("{writes} writes, {answers} answers, {resets} resets");
    assert!(writes > 10_000 && resets > 12, "{writes} {resets}");
}
