// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The queues of the AMP layout under all interleavings and all reorderings that the memory model allows:
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p vmsg-mem --release --test loom_amp`
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering, fence};
use loom::thread;
use vmsg_mem::QueueMemory;
use vmsg_mem::amp::{Layout, Queue, Side, Start};

const SIZE: usize = 8;

/// Loom sees the index words of both heads and each element; an element read while it is written fails the test.
struct Memory {
    layout: Layout,
    indices: [AtomicU32; 2],
    elements: [Vec<UnsafeCell<u8>>; 2],
}

#[derive(Clone)]
struct Shared(Arc<Memory>);

impl Shared {
    fn new(layout: Layout) -> Self {
        let elements = || {
            let count = 0..layout.elements();
            count.map(|_| UnsafeCell::new(0)).collect()
        };
        Self(Arc::new(Memory {
            layout,
            indices: [0; 2].map(AtomicU32::new),
            elements: [elements(), elements()],
        }))
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        let sides = [Side::Device, Side::Driver];
        let at = sides.map(|side| self.0.layout.head(side) + 4);
        let index = at.iter().position(|at| *at == offset);
        &self.0.indices[index.expect("an index word")]
    }

    fn element(&self, offset: usize) -> &UnsafeCell<u8> {
        let (device, driver) = (
            self.0.layout.queue(Side::Device),
            self.0.layout.queue(Side::Driver),
        );
        let (queue, begin) = if offset >= driver {
            (1, driver)
        } else {
            (0, device)
        };
        &self.0.elements[queue][(offset - begin) / SIZE]
    }
}

impl QueueMemory for Shared {
    fn len(&self) -> usize {
        self.0.layout.len()
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
    fn take(&self, _: usize) -> bool {
        unreachable!("there are no flags")
    }
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        // SAFETY: loom checks that nobody writes the element meanwhile.
        into[0] = self.element(offset).with(|element| unsafe { *element });
    }
    fn write(&self, offset: usize, from: &[u8]) {
        // SAFETY: loom checks that nobody else accesses the element meanwhile.
        self.element(offset)
            .with_mut(|element| unsafe { *element = from[0] });
    }
}

/// An eventfd.
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

fn pop(queue: &mut Queue<Shared>) -> Option<u8> {
    let mut message = [0; SIZE];
    let popped = queue.try_pop_sized(&mut message, |_| 1).unwrap();
    popped.map(|_| message[0])
}

#[test]
fn a_message_is_seen_whole_and_wakes_a_sleeper() {
    loom::model(|| {
        let layout = Layout::packed(4, SIZE as u16).unwrap();
        let memory = Shared::new(layout);
        let end = |side| Queue::new(memory.clone(), &layout, side, Start::default()).unwrap();
        let (mut driver, mut device) = (end(Side::Driver), end(Side::Device));
        let bell = Bell::new();
        let ringer = bell.clone();
        let sender = thread::spawn(move || {
            for n in 1..=2 {
                driver.try_push(&[n]).unwrap();
                if driver.publish() {
                    ringer.ring();
                }
            }
        });
        let mut expected = 1;
        while expected <= 2 {
            while let Some(message) = pop(&mut device) {
                assert_eq!(message, expected);
                expected += 1;
            }
            device.release();
            if expected <= 2 && device.is_empty() {
                bell.wait();
            }
        }
        sender.join().unwrap();
    });
}

#[test]
fn an_element_that_was_given_back_is_written_again() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let layout = Layout::packed(2, SIZE as u16).unwrap();
        let memory = Shared::new(layout);
        let end = |side| Queue::new(memory.clone(), &layout, side, Start::default()).unwrap();
        let (mut driver, mut device) = (end(Side::Driver), end(Side::Device));
        // Requests go one way and answers the other, each through one element.
        let answerer = thread::spawn(move || {
            let mut answered = 0;
            while answered < 2 {
                match pop(&mut device) {
                    Some(message) => {
                        device.release();
                        device.try_push(&[!message]).unwrap();
                        let _ = device.publish();
                        answered += 1;
                    }
                    None => thread::yield_now(),
                }
            }
        });
        for n in 1..=2 {
            driver.try_push(&[n]).unwrap();
            let _ = driver.publish();
            loop {
                match pop(&mut driver) {
                    Some(message) => {
                        assert_eq!(message, !n);
                        driver.release();
                        break;
                    }
                    None => thread::yield_now(),
                }
            }
        }
        answerer.join().unwrap();
    });
}
