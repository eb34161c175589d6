// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Queues end, whatever they were in the middle of.

use crate::device::{Echo, Hand, map};
use crate::guest::{GUEST, Queue, Ram, features, of_queue, read, shadow};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use virtio_msg::QueueIndex;
use vmsg_mem::BusAddr;
use vmsg_proxy::session::{QueueSetup, ResumeAt};
use vmsg_proxy::shadow::StartError;

const BUFFERS: u64 = GUEST + 0x10_0000;
const RAM: u64 = 0x40_0000;

/// Where a queue is in the middle of what.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Middle {
    TakingRequests,
    GivingBack,
    Arming,
}

#[test]
fn a_queue_whose_memory_does_not_answer_is_stopped_and_the_others_go_on() {
    for middle in [Middle::TakingRequests, Middle::GivingBack, Middle::Arming] {
        let ram = Ram::new(RAM, true);
        let set = features(true, true);
        let shadow = shadow(&ram, set, &[64, 64], 4 << 20);
        shadow.set_features(set);
        let mut stuck = Queue::start(&shadow, &ram, 0, 64, 0, of_queue(&set));
        let mut other = Queue::start(&shadow, &ram, 1, 64, 0x8_0000, of_queue(&set));
        let window = shadow.window();
        let mut hand = Hand::new(&window, &stuck.started, &set);
        let _echo = Echo::start(&window, &other.started, &set);
        shadow.run();
        let at = BusAddr(BUFFERS);
        let request = [(at, 5000)];
        stuck.driver.add(&request, &request).unwrap();
        stuck.publish(&shadow);
        let mut held = hand.wait();
        match middle {
            Middle::TakingRequests => {
                ram.close();
                stuck.driver.add(&request, &request).unwrap();
                stuck.driver.publish().unwrap();
                shadow.kick(stuck.index);
            }
            Middle::GivingBack => {
                ram.close();
                hand.give(held.remove(0).head, 5000);
                hand.publish();
                hand.ring();
            }
            Middle::Arming => {
                ram.close();
                shadow.kick(stuck.index);
            }
        }
        ram.until_stuck();
        let begin = Instant::now();
        shadow.stop_queue(stuck.index);
        let time = begin.elapsed();
        assert!(time < Duration::from_secs(20), "{middle:?}: {time:?}");
        assert!(ram.cancelled() > 0);
        // The rings and buffers of the queue are wiped.
        let mapping = map(&window);
        let bytes = read(mapping.ram(), 0, window.len as usize);
        let rings = (stuck.started.setup.descriptor - window.base) as usize;
        let end = (other.started.setup.descriptor - window.base) as usize;
        assert!(bytes[rings..end].iter().all(|&b| b == 0), "{middle:?}");
        ram.open();
        for _ in 0..50 {
            other.driver.add(&request, &request).unwrap();
            other.publish(&shadow);
            assert_eq!(other.next().written, 5000);
        }
        // It starts anew.
        let mut again = Queue::start(&shadow, &ram, 0, 64, 0, of_queue(&set));
        let mut hand = Hand::new(&window, &again.started, &set);
        again.driver.add(&request, &[]).unwrap();
        again.publish(&shadow);
        assert_eq!(hand.wait().len(), 1);
    }
}

#[test]
fn after_a_reset_in_the_middle_of_traffic_nothing_is_touched_and_the_segment_is_zero() {
    let ram = Ram::new(RAM, false);
    let set = features(true, true);
    let shadow = shadow(&ram, set, &[64, 64], 4 << 20);
    let window = shadow.window();
    let mapping = map(&window);
    for round in 0..40 {
        shadow.set_features(set);
        let mut queue = Queue::start(&shadow, &ram, 0, 64, 0, of_queue(&set));
        let mut hand = Hand::new(&window, &queue.started, &set);
        shadow.run();
        let at = BusAddr(BUFFERS);
        for _ in 0..32 {
            let request = [(at, 3000 + round)];
            queue.driver.add(&request, &request).unwrap();
        }
        queue.publish(&shadow);
        for request in hand.wait() {
            hand.give(request.head, 3000);
        }
        // A device host that writes where it has nothing to write.
        let far = mapping.ram().get(3 << 20, 4096).unwrap();
        far.fill(0xee);
        hand.publish();
        shadow.reset();
        let accesses = ram.accesses.load(Ordering::SeqCst);
        let bytes = read(mapping.ram(), 0, window.len as usize);
        assert!(bytes.iter().all(|&b| b == 0), "round {round}");
        hand.ring();
        shadow.kick(queue.index);
        shadow.run();
        shadow.reset();
        assert_eq!(ram.accesses.load(Ordering::SeqCst), accesses);
    }
}

#[test]
fn shadow_queues_end_with_memory_that_does_not_answer() {
    let ram = Ram::new(RAM, true);
    let set = features(false, true);
    let shadow = shadow(&ram, set, &[64], 4 << 20);
    shadow.set_features(set);
    let mut queue = Queue::start(&shadow, &ram, 0, 64, 0, of_queue(&set));
    ram.close();
    shadow.run();
    queue.driver.add(&[(BusAddr(BUFFERS), 1)], &[]).unwrap();
    queue.publish(&shadow);
    ram.until_stuck();
    let begin = Instant::now();
    drop(shadow);
    assert!(begin.elapsed() < Duration::from_secs(20));
}

#[test]
fn queues_that_cannot_be_are_not_started() {
    let ram = Ram::new(RAM, false);
    let set = features(true, true);
    let shadow = shadow(&ram, set, &[64, 0], 4 << 20);
    shadow.set_features(set);
    let good = QueueSetup {
        size: 64,
        descriptor: GUEST,
        driver: GUEST + 0x1000,
        device: GUEST + 0x2000,
        resume: ResumeAt::Start,
    };
    let start = |queue, setup| shadow.start_queue(QueueIndex(queue), setup);
    for queue in [1, 2, u32::MAX] {
        assert_eq!(start(queue, good).unwrap_err(), StartError::NoQueue(queue));
    }
    for size in [0, 3, 128] {
        let refused = start(0, QueueSetup { size, ..good }).unwrap_err();
        assert_eq!(refused, StartError::BadSize { queue: 0, size });
    }
    for bad in [
        QueueSetup {
            device: GUEST + 2,
            ..good
        },
        QueueSetup {
            descriptor: u64::MAX - 15,
            ..good
        },
        QueueSetup {
            resume: ResumeAt::UsedIndex,
            ..good
        },
    ] {
        let refused = start(0, bad).unwrap_err();
        assert!(matches!(refused, StartError::BadQueue { queue: 0, .. }));
    }
    start(0, good).unwrap();
    assert_eq!(start(0, good).unwrap_err(), StartError::InUse(0));
    shadow.stop_queue(QueueIndex(0));
    start(0, good).unwrap();
}
