// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device that is gone in the middle of requests, and another one in its place, which begins all queues at their beginning.

use crate::device::{Echo, Hand, map};
use crate::guest::{GUEST, Queue, Ram, broken, features, of_queue, shadow};
use std::time::{Duration, Instant};
use vmsg_mem::{BusAddr, RamSlice};
use vmsg_proxy::shadow::Broken;

const BUFFERS: u64 = GUEST + 0x10_0000;
const RAM: u64 = 0x40_0000;
const LEN: u32 = 600;

type Piece = [(BusAddr, u32); 1];

/// Where the bytes of a request are, and the room for its answer.
fn buffers(n: u64) -> (Piece, Piece) {
    let at = BUFFERS + n * 0x1000;
    ([(BusAddr(at), LEN)], [(BusAddr(at + 0x800), LEN)])
}

fn write(ram: RamSlice<'_>, n: u64) {
    let at = (BUFFERS - GUEST + n * 0x1000) as usize;
    ram.write(at, &[n as u8; LEN as usize]);
    ram.write(at + 0x800, &[0xee; LEN as usize]);
}

fn answer(ram: RamSlice<'_>, n: u64) -> Vec<u8> {
    let mut bytes = vec![0; LEN as usize];
    ram.read((BUFFERS - GUEST + n * 0x1000 + 0x800) as usize, &mut bytes);
    bytes
}

#[test]
fn the_next_device_gets_what_the_one_before_had_and_nothing_that_it_has_done() {
    for (event_idx, indirect) in [(false, false), (true, true)] {
        let ram = Ram::new(RAM, false);
        let set = features(event_idx, indirect);
        let shadow = shadow(&ram, set, &[64], 4 << 20);
        shadow.set_features(set);
        let mut queue = Queue::start(&shadow, &ram, 0, 64, 0, of_queue(&set));
        let window = shadow.window();
        shadow.run();
        let renewal = shadow.renewal();
        let mut asked = 0;
        // Tokens, with the number of the request.
        let mut mine = Vec::new();
        let mut seen = Vec::new();
        for round in 0..40 {
            let mut hand = Hand::new(&window, &queue.started, &set);
            for _ in 0..3 + round % 7 {
                // So that what has come back has left its place.
                let n = asked % 512;
                write(ram.ram(), n);
                let (readable, writable) = buffers(n);
                mine.push((queue.driver.add(&readable, &writable).unwrap(), n));
                asked += 1;
            }
            queue.publish(&shadow);
            let expected: Vec<u64> = mine.iter().map(|(_, n)| *n).collect();
            let mut requests = Vec::new();
            while requests.len() < expected.len() {
                requests.extend(hand.wait());
            }
            let numbers: Vec<u64> = requests.iter().map(|r| r.readable[0].into()).collect();
            let wanted: Vec<u64> = expected.iter().map(|n| u64::from(*n as u8)).collect();
            assert_eq!(numbers, wanted, "round {round}: each once, in order");
            // Some are done, in another order; the driver's side may or may not have seen that when the device is gone.
            let done = requests.len() / 2;
            for request in requests.drain(..).rev().take(done) {
                hand.give(request.head, LEN);
            }
            if round % 3 == 0 {
                hand.publish();
            } else {
                hand.queue.publish(hand.table.space()).unwrap();
            }
            drop(hand);
            assert!(renewal.renew());
            for _ in 0..done {
                let used = queue.next();
                let at = mine.iter().position(|(token, _)| *token == used.token);
                let (_, n) = mine.remove(at.expect("asked for, and not back before"));
                assert_eq!(used.written, LEN);
                assert_eq!(answer(ram.ram(), n), [0; LEN as usize]);
                seen.push(n);
            }
        }
        // The rest, by a device that lives.
        let _echo = Echo::start(&window, &queue.started, &set);
        for _ in 0..mine.len() {
            let used = queue.next();
            let at = mine.iter().position(|(token, _)| *token == used.token);
            let (_, n) = mine.remove(at.expect("asked for, and not back before"));
            assert_eq!(answer(ram.ram(), n), [n as u8 ^ 0x5a; LEN as usize]);
        }
        assert_eq!(queue.next_within(Duration::from_millis(20)), None);
        assert_eq!(shadow.counters().renewals, 40);
        assert_eq!(shadow.counters().requests, asked);
        assert_eq!(shadow.counters().completed, asked);
    }
}

#[test]
fn what_a_device_has_left_in_its_rings_is_checked_before_it_is_renewed() {
    let ram = Ram::new(RAM, false);
    let set = features(false, false);
    let shadow = shadow(&ram, set, &[64], 4 << 20);
    shadow.set_features(set);
    let mut queue = Queue::start(&shadow, &ram, 0, 64, 0, of_queue(&set));
    let window = shadow.window();
    shadow.run();
    write(ram.ram(), 1);
    let (readable, writable) = buffers(1);
    queue.driver.add(&readable, &writable).unwrap();
    queue.publish(&shadow);
    let mut hand = Hand::new(&window, &queue.started, &set);
    assert_eq!(hand.wait().len(), 1);
    // More used than there ever was.
    let used = (queue.started.setup.device - window.base) as usize + 2;
    map(&window).ram().write(used, &9u16.to_le_bytes());
    assert!(!shadow.renewal().renew());
    assert!(matches!(broken(&shadow), Broken::Device { .. }));
    assert!(!shadow.renewal().renew(), "until the reset");
    assert_eq!(answer(ram.ram(), 1), [0xee; LEN as usize]);
    shadow.reset();
    assert!(shadow.renewal().renew(), "nothing is there to be renewed");
    let mapping = map(&window);
    let mut bytes = vec![0; window.len as usize];
    mapping.ram().read(0, &mut bytes);
    assert!(bytes.iter().all(|&b| b == 0), "wiped");
}

/// The link's thread asks for it, and others wait for that one.
#[test]
fn a_guest_whose_memory_does_not_answer_holds_nobody_up() {
    let ram = Ram::new(RAM, true);
    let set = features(true, true);
    let shadow = shadow(&ram, set, &[64], 4 << 20);
    shadow.set_features(set);
    let mut queue = Queue::start(&shadow, &ram, 0, 64, 0, of_queue(&set));
    let window = shadow.window();
    shadow.run();
    write(ram.ram(), 1);
    let (readable, writable) = buffers(1);
    queue.driver.add(&readable, &writable).unwrap();
    queue.publish(&shadow);
    let mut hand = Hand::new(&window, &queue.started, &set);
    let request = hand.wait().remove(0);
    ram.close();
    hand.give(request.head, LEN);
    hand.publish();
    hand.ring();
    ram.until_stuck();
    let begin = Instant::now();
    assert!(shadow.renewal().renew());
    assert!(begin.elapsed() < Duration::from_secs(20));
    ram.open();
    assert_eq!(queue.next().written, LEN);
}

#[test]
fn nothing_is_renewed_once_the_queues_have_ended() {
    let ram = Ram::new(RAM, false);
    let set = features(true, true);
    let shadow = shadow(&ram, set, &[64], 4 << 20);
    let renewal = shadow.renewal();
    assert!(renewal.renew());
    drop(shadow);
    assert!(!renewal.renew());
}
