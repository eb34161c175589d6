// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Driver and device on two threads that sleep whenever they may.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::sync::{Condvar, Mutex};
use std::thread;

use vmsg_mem::{Access, AddressSpace, BusAddr, RamSlice, Window};
use vmsg_queue::{
    ChainStorage, DeviceQueue, DriverQueue, DriverSlot, Layout, QueueConfig, QueueFeatures,
};

/// A doorbell that remembers one ring.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    sound: Condvar,
    count: AtomicU64,
}

impl Bell {
    fn ring(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
        *self.rung.lock().unwrap() = true;
        self.sound.notify_one();
    }

    /// Sleeps until the bell rings. A lost notification shows here.
    fn wait(&self) {
        let rung = self.rung.lock().unwrap();
        let patience = Duration::from_secs(60);
        let (mut rung, timeout) = self
            .sound
            .wait_timeout_while(rung, patience, |rung| !*rung)
            .unwrap();
        assert!(!timeout.timed_out(), "a notification was lost");
        *rung = false;
    }
}

const BASE: BusAddr = BusAddr(0x10_0000);
const CHAINS: u64 = 60_000;
const SIZE: u16 = 8;

fn serve(
    config: QueueConfig,
    features: QueueFeatures,
    space: AddressSpace<'_>,
    [kick, call]: [&Bell; 2],
) {
    let mut queue = DeviceQueue::new(config, features, space).unwrap();
    let mut storage = ChainStorage::with_capacity(16);
    let mut served = 0;
    while served < CHAINS {
        queue.disable_notifications(space).unwrap();
        loop {
            let batch = queue.pop(space, &mut storage, 4).unwrap();
            if batch.is_empty() {
                break;
            }
            for chain in batch.iter() {
                let number = chain.readable().read_array::<8>().unwrap();
                assert_eq!(u64::from_le_bytes(number), served);
                let answer = (!served).to_le_bytes();
                assert_eq!(chain.writable().write(&answer), 8);
                queue.complete(space, chain.head(), 8).unwrap();
                served += 1;
            }
            if queue.publish(space).unwrap() {
                call.ring();
            }
        }
        if served < CHAINS && !queue.enable_notifications(space).unwrap() {
            kick.wait();
        }
    }
}

fn run(features: QueueFeatures) {
    let words: Vec<AtomicU64> = (0..0x1000).map(|_| AtomicU64::new(0)).collect();
    let ram = RamSlice::from_atomics(&words);
    let ram = ram.split_at(ram.as_ptr().align_offset(16)).1;
    let layout = Layout::new(SIZE, 2).unwrap();
    let slots = [DriverSlot::default(); SIZE as usize];
    let mut driver = DriverQueue::new(layout, features, ram, BASE, slots).unwrap();
    let config = driver.config();
    let windows = [Window::new(BASE, ram, Access::ReadWrite).unwrap()];
    let space = AddressSpace::new(&windows).unwrap();
    // A request and an answer of 8 bytes for each token.
    let buffers = layout.total_len().next_multiple_of(64);
    let (kick, call) = (Bell::default(), Bell::default());
    thread::scope(|scope| {
        scope.spawn(|| serve(config, features, space, [&kick, &call]));
        let (mut sent, mut received) = (0, 0);
        let mut places = [0; SIZE as usize];
        let mut free: Vec<usize> = (0..SIZE as usize).collect();
        while received < CHAINS {
            while sent < CHAINS {
                let Some(place) = free.pop() else { break };
                let offset = buffers + place * 16;
                ram.write(offset, &u64::to_le_bytes(sent));
                let at = |n| (BusAddr(BASE.0 + (offset + n) as u64), 8);
                let Ok(token) = driver.add(&[at(0)], &[at(8)]) else {
                    free.push(place);
                    break;
                };
                places[token.index()] = place;
                sent += 1;
            }
            if driver.publish().unwrap() {
                kick.ring();
            }
            driver.disable_notifications().unwrap();
            while let Some(used) = driver.pop_used().unwrap() {
                assert_eq!(used.written, 8);
                let place = places[used.token.index()];
                let mut answer = [0; 8];
                ram.read(buffers + place * 16 + 8, &mut answer);
                assert_eq!(u64::from_le_bytes(answer), !received);
                free.push(place);
                received += 1;
            }
            if received < sent && !driver.enable_notifications().unwrap() {
                call.wait();
            }
        }
    });
    let rings = kick.count.load(Ordering::Relaxed) + call.count.load(Ordering::Relaxed);
    assert!(rings < 2 * CHAINS, "{rings} notifications");
}

#[test]
fn no_notification_is_lost_with_flags() {
    run(QueueFeatures::default());
}

#[test]
fn no_notification_is_lost_with_event_idx() {
    run(QueueFeatures {
        event_idx: true,
        indirect: true,
    });
}
