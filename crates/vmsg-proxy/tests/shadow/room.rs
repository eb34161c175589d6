// SPDX-License-Identifier: Apache-2.0 OR MIT
//! More requests than the segment holds.

use crate::device::{Echo, Hand};
use crate::guest::{GUEST, Queue, Ram, TABLE, broken, features, of_queue, shadow};
use std::sync::atomic::Ordering;
use std::time::Duration;
use virtio_msg::QueueIndex;
use vmsg_mem::BusAddr;
use vmsg_proxy::shadow::{Broken, NewError, Options, Segment, Shadow};

const RX: usize = 0;
const TX: usize = 0x10_0000;
const BUFFERS: u64 = GUEST + 0x20_0000;
const EACH: u64 = 65536;

#[test]
fn a_queue_full_of_large_buffers_does_not_keep_the_other_one_from_working_and_is_served_in_order() {
    for far in [false, true] {
        let ram = Ram::new(0x200_0000, far);
        let set = features(true, true);
        let shadow = shadow(&ram, set, &[256, 256], 4 << 20);
        shadow.set_features(set);
        let mut rx = Queue::start(&shadow, &ram, 0, 256, RX, of_queue(&set));
        let mut tx = Queue::start(&shadow, &ram, 1, 256, TX, of_queue(&set));
        let window = shadow.window();
        let mut receive = Hand::new(&window, &rx.started, &set);
        let _echo = Echo::start(&window, &tx.started, &set);
        shadow.run();
        // 16 MiB of buffers, four times as much as there is.
        let mut order = Vec::new();
        for n in 0..256 {
            let buffer = (BusAddr(BUFFERS + n * EACH), 65536);
            order.push(rx.driver.add(&[], &[buffer]).unwrap());
        }
        rx.publish(&shadow);
        let mut held = receive.wait();
        for n in 0..1000u64 {
            let (from, to) = (BusAddr(BUFFERS), BusAddr(BUFFERS + 0x10_0000));
            let len = 1 + (n * 7919 % 65536) as u32;
            tx.driver.add(&[(from, len)], &[(to, len)]).unwrap();
            tx.publish(&shadow);
            assert_eq!(tx.next().written, len);
        }
        held.extend(receive.take(usize::MAX));
        assert!((16..64).contains(&held.len()), "{} at a time", held.len());
        assert!(shadow.counters().waits > 0);
        // One after another they come, in the order in which they were posted.
        for (n, token) in order.into_iter().enumerate() {
            if held.is_empty() {
                held = receive.wait();
            }
            let request = held.remove(0);
            assert_eq!(request.writable, 65536);
            receive.give(request.head, 1 + n as u32);
            receive.publish();
            let used = rx.next();
            assert_eq!((used.token, used.written), (token, 1 + n as u32));
        }
        assert_eq!(shadow.poll_event(), None);
    }
}

#[test]
fn a_ring_without_indirect_tables_waits_for_its_own_requests() {
    let ram = Ram::new(0x100_0000, false);
    let (guest, device) = (features(true, true), features(false, false));
    let shadow = shadow(&ram, device, &[8], 1 << 20);
    shadow.set_features(guest);
    let mut queue = Queue::start(&shadow, &ram, 0, 8, 0, of_queue(&guest));
    let mut hand = Hand::new(&shadow.window(), &queue.started, &device);
    shadow.run();
    // Eight requests of two buffers, in indirect tables of the guest's; the copy has room for four.
    let buffer = |n: u64| (BusAddr(BUFFERS + n * 64), 64);
    for n in 0..8 {
        let (read, write) = (buffer(2 * n), buffer(2 * n + 1));
        queue.driver.add_indirect(&[read], &[write]).unwrap();
    }
    queue.publish(&shadow);
    let mut seen = 0;
    while seen < 8 {
        let requests = hand.wait();
        assert!(requests.len() <= 4);
        seen += requests.len();
        for request in requests {
            hand.give(request.head, 64);
        }
        hand.publish();
    }
    for _ in 0..8 {
        assert_eq!(queue.next().written, 64);
    }
}

#[test]
fn a_request_that_can_never_fit_stops_the_device_and_says_why() {
    let ram = Ram::new(0x100_0000, false);
    let set = features(true, true);
    let shadow = shadow(&ram, set, &[64, 64], 1 << 20);
    shadow.set_features(set);
    for round in 0..3 {
        let mut queue = Queue::start(&shadow, &ram, 0, 64, 0, of_queue(&set));
        let echo = Echo::start(&shadow.window(), &queue.started, &set);
        shadow.run();
        let at = BusAddr(BUFFERS);
        queue.driver.add(&[(at, 100)], &[(at, 100)]).unwrap();
        queue.publish(&shadow);
        assert_eq!(queue.next().written, 100, "round {round}");
        let too_large = 1 << 20;
        queue.driver.add(&[(at, 16)], &[(at, too_large)]).unwrap();
        queue.publish(&shadow);
        let why = broken(&shadow);
        let Broken::TooLarge {
            queue: 0,
            bytes,
            most,
        } = why
        else {
            panic!("{why}");
        };
        assert_eq!(bytes, 16 + u64::from(too_large));
        assert!(most < 1 << 20);
        // Nothing moves until the reset.
        let accesses = ram.accesses.load(Ordering::SeqCst);
        shadow.kick(QueueIndex(0));
        shadow.stop_queue(QueueIndex(1));
        assert_eq!(ram.accesses.load(Ordering::SeqCst), accesses);
        assert!(queue.next_within(Duration::from_millis(20)).is_none());
        drop(echo);
        shadow.reset();
        assert_eq!(shadow.poll_event(), None);
    }
}

#[test]
fn a_request_of_many_buffers_and_one_as_large_as_the_segment_go_through() {
    let ram = Ram::new(0x100_0000, false);
    let set = features(true, true);
    let shadow = shadow(&ram, set, &[1024], 4 << 20);
    shadow.set_features(set);
    let mut queue = Queue::start(&shadow, &ram, 0, 1024, 0, of_queue(&set));
    let _echo = Echo::start(&shadow.window(), &queue.started, &set);
    shadow.run();
    let most = 1024u64;
    let buffers: Vec<_> = (0..most)
        .map(|n| (BusAddr(BUFFERS + n * 100), 64u32))
        .collect();
    assert!(buffers.len() > usize::from(TABLE));
    let (readable, writable) = buffers.split_at(512);
    queue.driver.add_direct(readable, writable).unwrap();
    queue.publish(&shadow);
    assert_eq!(queue.next().written, 512 * 64);
    let large = 3 << 19;
    let (from, to) = (BusAddr(BUFFERS), BusAddr(BUFFERS + large));
    let len = large as u32;
    queue.driver.add(&[(from, len)], &[(to, len)]).unwrap();
    queue.publish(&shadow);
    assert_eq!(queue.next().written, len);
}

#[test]
fn a_segment_that_cannot_hold_the_queues_is_refused_with_the_size_that_can() {
    let ram = Ram::new(4096, false);
    let facts = crate::guest::facts(features(true, true), &[1024; 3]);
    let options = |segment| Options {
        segment: Segment::sealed(segment),
        ..Options::default()
    };
    let refused = Shadow::new(ram.clone(), &facts, options(4096)).unwrap_err();
    let NewError::TooSmall {
        need, queues: 3, ..
    } = refused
    else {
        panic!("{refused}");
    };
    Shadow::new(ram.clone(), &facts, options(need)).unwrap();
    let wraps = Options {
        segment: Segment::Sealed {
            size: 64 << 20,
            base: u64::MAX - 4095,
        },
        ..Options::default()
    };
    let refused = Shadow::new(ram, &facts, wraps).unwrap_err();
    assert!(matches!(refused, NewError::BadBase { .. }), "{refused}");
}
