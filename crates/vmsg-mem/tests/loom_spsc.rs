// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The message queue under all interleavings and all reorderings that the
//! memory model allows:
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p vmsg-mem --release --test loom_spsc`
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering, fence};
use loom::thread;
use vmsg_mem::QueueMemory;
use vmsg_mem::spsc::{Consumer, Layout, Producer};

const SLOTS: usize = 0x80;
const SLOT_SIZE: usize = 8;
const WORDS: [usize; 4] = [0x00, 0x04, 0x40, 0x44];

/// Loom sees each index word and each slot; a slot read while it is written fails the test.
struct Memory {
    words: [AtomicU32; 4],
    slots: Vec<UnsafeCell<u8>>,
}

#[derive(Clone)]
struct Shared(Arc<Memory>);

impl Shared {
    fn new(slots: usize) -> Self {
        Self(Arc::new(Memory {
            words: [0; 4].map(AtomicU32::new),
            slots: (0..slots).map(|_| UnsafeCell::new(0)).collect(),
        }))
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        let index = WORDS.iter().position(|word| *word == offset);
        &self.0.words[index.expect("an index word")]
    }

    fn slot(&self, offset: usize) -> &UnsafeCell<u8> {
        assert_eq!(offset % SLOT_SIZE, 0);
        &self.0.slots[(offset - SLOTS) / SLOT_SIZE]
    }
}

impl QueueMemory for Shared {
    fn len(&self) -> usize {
        SLOTS + self.0.slots.len() * SLOT_SIZE
    }
    fn is_aligned(&self) -> bool {
        true
    }
    fn load_relaxed(&self, offset: usize) -> u32 {
        self.word(offset).load(Ordering::Relaxed)
    }
    fn load_acquire(&self, offset: usize) -> u32 {
        self.word(offset).load(Ordering::Acquire)
    }
    fn store_relaxed(&self, offset: usize, value: u32) {
        self.word(offset).store(value, Ordering::Relaxed);
    }
    fn store_release(&self, offset: usize, value: u32) {
        self.word(offset).store(value, Ordering::Release);
    }
    fn take(&self, offset: usize) -> bool {
        let word = self.word(offset);
        let value = word.load(Ordering::Relaxed);
        value != 0
            && word
                .compare_exchange(value, 0, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        // SAFETY: loom checks that nobody writes the slot meanwhile.
        into[0] = self.slot(offset).with(|slot| unsafe { *slot });
    }
    fn write(&self, offset: usize, from: &[u8]) {
        // SAFETY: loom checks that nobody else accesses the slot meanwhile.
        self.slot(offset)
            .with_mut(|slot| unsafe { *slot = from[0] });
    }
}

/// An eventfd: rings are kept until somebody waits. Who waits without ever being
/// rung is a deadlock, which loom reports.
#[derive(Clone)]
struct Bell(Arc<(loom::sync::Mutex<bool>, loom::sync::Condvar)>);

impl Bell {
    fn new() -> Self {
        Self(Arc::new((
            loom::sync::Mutex::new(false),
            loom::sync::Condvar::new(),
        )))
    }

    fn ring(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_one();
    }

    fn wait(&self) {
        let mut rung = self.0.0.lock().unwrap();
        while !*rung {
            rung = self.0.1.wait(rung).unwrap();
        }
        *rung = false;
    }
}

fn run(slots: usize, messages: u8, batch: u8, early: bool) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let memory = Shared::new(slots);
        let layout = Layout::armed(SLOT_SIZE);
        let mut producer = Producer::new(memory.clone(), layout).unwrap();
        let mut consumer = Consumer::new(memory, layout).unwrap();
        let (for_consumer, for_producer) = (Bell::new(), Bell::new());
        let (bell, own) = (for_consumer.clone(), for_producer.clone());
        let sender = thread::spawn(move || {
            let mut next = 0;
            while next < messages {
                let mut count = 0;
                while next < messages && count < batch && producer.try_push(&[next]).is_ok() {
                    next += 1;
                    count += 1;
                    if early && producer.publish_early() {
                        bell.ring();
                    }
                }
                if producer.publish() {
                    bell.ring();
                }
                if count == 0 && producer.arm_for_room() {
                    own.wait();
                }
            }
        });
        let mut expected = 0;
        while expected < messages {
            let mut message = [0];
            while consumer.try_pop(&mut message).unwrap() {
                assert_eq!(message[0], expected);
                expected += 1;
            }
            if consumer.release() {
                for_producer.ring();
            }
            if expected < messages && consumer.arm() {
                for_consumer.wait();
            }
        }
        sender.join().unwrap();
    });
}

#[test]
fn a_message_wakes_a_sleeper() {
    run(4, 2, 1, false);
}

#[test]
fn a_full_queue_waits_for_room_and_goes_on() {
    run(2, 3, 1, false);
}

#[test]
fn batches_around_the_end() {
    run(3, 4, 2, false);
}

#[test]
fn a_sleeper_overlooked_during_a_burst_is_woken_at_its_end() {
    run(4, 2, 2, true);
}

#[test]
fn bursts_published_early_around_the_end() {
    run(3, 3, 3, true);
}

#[test]
fn a_producer_overlooked_when_slots_are_given_back_is_woken() {
    // Slots go back, an eighth of the queue together, long before it is empty.
    run(8, 10, 7, false);
}
