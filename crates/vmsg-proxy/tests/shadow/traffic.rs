// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests of all shapes go through, and come back with the right bytes.

use crate::device::{Echo, Hand, answer};
use crate::guest::{GUEST, Numbers, Queue, Ram, features, of_queue, read, shadow};
use std::collections::HashMap;
use virtio_msg::{QueueIndex, feature};
use vmsg_mem::BusAddr;
use vmsg_proxy::shadow::{self, Event, Interrupt};
use vmsg_queue::Buffer;

const SIZE: u16 = 64;
/// Where the buffers are in the guest's memory, and how much there is for each request.
const BUFFERS: usize = 0x10_0000;
const EACH: usize = 0x4_0000;
const RAM: u64 = 0x200_0000;

/// What a request is, and what it must become.
struct Sent {
    slot: usize,
    writable: Vec<Buffer>,
    answer: Vec<u8>,
}

/// Cuts `len` bytes from `at` on into buffers, with holes between them.
fn cut(numbers: &mut Numbers, at: usize, len: usize, parts: usize) -> Vec<Buffer> {
    let mut buffers = Vec::new();
    let (mut at, mut left) = (at, len);
    while left > 0 {
        let n = if buffers.len() + 1 == parts {
            left
        } else {
            1 + numbers.below(left)
        };
        buffers.push((BusAddr(GUEST + at as u64), n as u32));
        at += n + numbers.below(64);
        left -= n;
    }
    buffers
}

fn length(numbers: &mut Numbers) -> usize {
    match numbers.below(4) {
        0 => numbers.below(20),
        1 => numbers.below(2000),
        2 => numbers.below(65537),
        _ => [0, 1, 255, 256, 257, 4096, 65535, 65536][numbers.below(8)],
    }
}

fn run(guest_has: [bool; 2], device_has: [bool; 2], far: bool, segment: u64, rounds: usize) {
    let ram = Ram::new(RAM, far);
    let offered = features(device_has[0], device_has[1]);
    let shadow = shadow(&ram, offered, &[SIZE], segment);
    let negotiated = features(guest_has[0], guest_has[1]);
    let towards = shadow.set_features(negotiated);
    assert_eq!(towards, offered);
    let mut queue = Queue::start(&shadow, &ram, 0, SIZE, 0, of_queue(&negotiated));
    let _echo = Echo::start(&shadow.window(), &queue.started, &towards);
    shadow.run();
    let mut numbers = Numbers(7 + segment);
    let mut sent: HashMap<usize, Sent> = HashMap::new();
    let mut slots: Vec<usize> = (0..48).collect();
    let mut done = 0;
    while done < rounds {
        // A burst of requests, as many as there is room for.
        for _ in 0..numbers.below(40) {
            let Some(&slot) = slots.last() else { break };
            let at = BUFFERS + slot * EACH;
            ram.ram().get(at, EACH).unwrap().fill(0xcc);
            let [mut r, w] = [length(&mut numbers), length(&mut numbers)];
            if r + w == 0 {
                r = 1;
            }
            let (parts, first) = (1 + numbers.below(6), numbers.bytes(r));
            let readable = cut(&mut numbers, at, r, parts);
            let writable = cut(&mut numbers, at + EACH / 2, w, 1 + parts / 2);
            let direct = numbers.below(2) == 0;
            let added = if direct {
                queue.driver.add_direct(&readable, &writable)
            } else {
                queue.driver.add(&readable, &writable)
            };
            let Ok(token) = added else { break };
            let mut from = 0;
            for &(addr, len) in &readable {
                let len = len as usize;
                ram.ram()
                    .write((addr.0 - GUEST) as usize, &first[from..from + len]);
                from += len;
            }
            let mut bytes = first;
            bytes.truncate(w);
            answer(&mut bytes);
            let request = Sent {
                slot,
                writable,
                answer: bytes,
            };
            assert!(sent.insert(token.index(), request).is_none());
            slots.pop();
        }
        queue.publish(&shadow);
        for _ in 0..sent.len().min(1 + numbers.below(40)) {
            let used = queue.next();
            let request = sent.remove(&used.token.index()).expect("was sent");
            assert_eq!(used.written as usize, request.answer.len());
            let mut left = &request.answer[..];
            for &(addr, len) in &request.writable {
                let bytes = read(ram.ram(), (addr.0 - GUEST) as usize, len as usize);
                let (here, rest) = left.split_at(left.len().min(bytes.len()));
                assert_eq!(&bytes[..here.len()], here);
                assert!(
                    bytes[here.len()..].iter().all(|&b| b == 0xcc),
                    "what the device did not write is as it was"
                );
                left = rest;
            }
            slots.push(request.slot);
            done += 1;
        }
    }
    while !sent.is_empty() {
        let used = queue.next();
        sent.remove(&used.token.index()).expect("was sent");
    }
    assert!(shadow.poll_event().is_none());
    // Counted after the guest was told: behind a command it is.
    shadow.stop_queue(QueueIndex(9));
    let counters = shadow.counters();
    assert_eq!(counters.requests, counters.completed);
}

#[test]
fn all_shapes_of_requests_with_all_features_of_either_side() {
    for guest in 0..4 {
        for device in 0..4 {
            let has = |n: i32| [n & 1 != 0, n & 2 != 0];
            run(has(guest), has(device), false, 16 << 20, 400);
        }
    }
}

#[test]
fn memory_behind_messages() {
    run([true, true], [true, true], true, 16 << 20, 600);
    run([false, false], [false, true], true, 16 << 20, 600);
}

#[test]
fn a_segment_that_holds_two_requests_at_a_time() {
    run([true, true], [true, true], false, 320 << 10, 600);
    run([false, true], [true, false], false, 320 << 10, 600);
}

#[test]
fn many_small_requests_one_by_one_lose_no_wake_up() {
    let ram = Ram::new(RAM, false);
    for event_idx in [false, true] {
        let set = features(event_idx, true);
        let shadow = shadow(&ram, set, &[SIZE], 4 << 20);
        shadow.set_features(set);
        let mut queue = Queue::start(&shadow, &ram, 0, SIZE, 0, of_queue(&set));
        let _echo = Echo::start(&shadow.window(), &queue.started, &set);
        shadow.run();
        let at = BusAddr(GUEST + BUFFERS as u64);
        for n in 0..10_000u32 {
            ram.ram().write(BUFFERS, &n.to_le_bytes());
            let to = BusAddr(at.0 + 0x1000);
            queue.driver.add(&[(at, 4)], &[(to, 4)]).unwrap();
            queue.publish(&shadow);
            assert_eq!(queue.next().written, 4);
            let mut expected = n.to_le_bytes();
            answer(&mut expected);
            assert_eq!(read(ram.ram(), BUFFERS + 0x1000, 4), expected);
        }
    }
}

#[test]
fn nothing_is_touched_before_the_driver_is_ready() {
    let ram = Ram::new(RAM, false);
    let set = features(true, true);
    let shadow = shadow(&ram, set, &[SIZE], 4 << 20);
    shadow.set_features(set);
    let mut queue = Queue::start(&shadow, &ram, 0, SIZE, 0, of_queue(&set));
    let mut hand = Hand::new(&shadow.window(), &queue.started, &set);
    let at = BusAddr(GUEST + BUFFERS as u64);
    queue.driver.add(&[(at, 4)], &[]).unwrap();
    queue.publish(&shadow);
    shadow.kick(QueueIndex(0));
    // Answered by the same thread, after the kick.
    shadow.stop_queue(QueueIndex(9));
    assert_eq!(
        ram.accesses.load(std::sync::atomic::Ordering::SeqCst),
        0,
        "the guest's memory"
    );
    assert!(hand.take(1).is_empty());
    shadow.run();
    assert_eq!(hand.wait().len(), 1);
}

#[test]
fn the_front_is_told_where_there_is_no_eventfd_and_once_after_silence() {
    let ram = Ram::new(RAM, false);
    let set = features(false, true);
    let shadow = shadow(&ram, set, &[SIZE], 4 << 20);
    shadow.set_features(set);
    let mut queue = Queue::start(&shadow, &ram, 0, SIZE, 0, of_queue(&set));
    let _echo = Echo::start(&shadow.window(), &queue.started, &set);
    shadow.run();
    let at = BusAddr(GUEST + BUFFERS as u64);
    let mut request = |until_told: bool| {
        queue.driver.add(&[(at, 4)], &[]).unwrap();
        queue.publish(&shadow);
        let end = std::time::Instant::now() + crate::guest::PATIENCE;
        while queue.driver.pop_used().unwrap().is_none() {
            if until_told {
                assert!(crate::guest::wait(&shadow.event_fd(), end));
            }
            assert!(std::time::Instant::now() < end);
        }
    };
    shadow.set_interrupt(QueueIndex(0), Interrupt::Front);
    request(true);
    assert_eq!(shadow.poll_event(), Some(Event::QueueUsed(QueueIndex(0))));
    assert_eq!(shadow.poll_event(), None);
    shadow.set_interrupt(QueueIndex(0), Interrupt::Nobody);
    request(false);
    // Behind the command.
    shadow.stop_queue(QueueIndex(9));
    assert_eq!(shadow.poll_event(), None);
    shadow.set_interrupt(QueueIndex(0), Interrupt::Front);
    shadow.stop_queue(QueueIndex(9));
    assert_eq!(shadow.poll_event(), Some(Event::QueueUsed(QueueIndex(0))));
}

#[test]
fn features_of_rings_are_each_sides_own() {
    let never = [
        feature::RING_PACKED,
        feature::IN_ORDER,
        feature::NOTIFICATION_DATA,
    ];
    let mut device = features(false, false);
    never.into_iter().for_each(|bit| device.insert(bit));
    device.insert(feature::RING_RESET);
    device.insert(5);
    let offered = shadow::offered(&device);
    for bit in never {
        assert!(!offered.contains(bit));
    }
    assert!(offered.contains(feature::RING_EVENT_IDX));
    assert!(offered.contains(feature::RING_INDIRECT_DESC));
    assert!(offered.contains(5) && offered.contains(feature::RING_RESET));
    let ram = Ram::new(4096, false);
    let shadow = shadow(&ram, device, &[SIZE], 4 << 20);
    let mut guest = offered.without(5);
    guest.insert(feature::NOTIFICATION_DATA);
    // A front's own.
    guest.insert(feature::ACCESS_PLATFORM);
    let towards = shadow.set_features(guest);
    assert!(towards.is_subset(&device), "{towards}");
    assert!(!towards.contains(5) && !towards.contains(feature::NOTIFICATION_DATA));
    assert!(towards.contains(feature::VERSION_1) && towards.contains(feature::RING_RESET));
}
