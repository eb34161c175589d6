// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device host that writes anything anywhere into the segment, at any time.

use crate::device::{Hand, map};
use crate::guest::{
    GUEST, Numbers, PATIENCE, Queue, Ram, broken, features, of_queue, read, shadow,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmsg_mem::{BusAddr, RamSlice};
use vmsg_proxy::shadow::{Broken, Event};

const SIZE: u16 = 64;
const RAM: u64 = 0x40_0000;
const BUFFERS: usize = 0x10_0000;

fn used(ring: RamSlice<'_>, slot: usize, id: u32, len: u32) {
    ring.write(4 + 8 * slot, &id.to_le_bytes());
    ring.write(8 + 8 * slot, &len.to_le_bytes());
}

fn index(ring: RamSlice<'_>, index: u16) {
    ring.write(2, &index.to_le_bytes());
}

type Lie = fn(RamSlice<'_>, u16);

#[test]
fn each_lie_about_used_buffers_stops_the_device_by_name() {
    let lies: [(&str, Lie); 7] = [
        ("an identity that is none", |ring, _| {
            used(ring, 0, 1 << 16, 4);
            index(ring, 1);
        }),
        ("a request that it does not have", |ring, head| {
            used(ring, 0, u32::from(head + 7) % 64, 4);
            index(ring, 1);
        }),
        ("one request twice", |ring, head| {
            used(ring, 0, head.into(), 4);
            used(ring, 1, head.into(), 4);
            index(ring, 2);
        }),
        ("more bytes than there is room for", |ring, head| {
            used(ring, 0, head.into(), 4097);
            index(ring, 1);
        }),
        ("all the bytes there are", |ring, head| {
            used(ring, 0, head.into(), u32::MAX);
            index(ring, 1);
        }),
        ("more requests than it was given", |ring, _| index(ring, 3)),
        ("an index that goes back", |ring, _| index(ring, 0xffff)),
    ];
    let ram = Ram::new(RAM, false);
    let set = features(false, true);
    let shadow = shadow(&ram, set, &[SIZE], 1 << 20);
    let window = shadow.window();
    let mapping = map(&window);
    for (name, lie) in lies {
        shadow.set_features(set);
        let mut queue = Queue::start(&shadow, &ram, 0, SIZE, 0, of_queue(&set));
        let mut hand = Hand::new(&window, &queue.started, &set);
        shadow.run();
        let at = BusAddr(GUEST + BUFFERS as u64);
        for _ in 0..2 {
            queue.driver.add(&[(at, 16)], &[(at, 4096)]).unwrap();
        }
        queue.publish(&shadow);
        let mut requests = hand.wait();
        while requests.len() < 2 {
            requests.extend(hand.wait());
        }
        ram.ram().get(BUFFERS, 0x4000).unwrap().fill(0x11);
        let ring = (queue.started.setup.device - window.base) as usize;
        let ring = mapping.ram().get(ring, 4 + 8 * 64).unwrap();
        lie(ring, requests[0].head.id());
        hand.ring();
        let why = broken(&shadow);
        let is_device = matches!(why, Broken::Device { queue: 0, .. });
        assert!(is_device, "{name}: {why:?}");
        let beyond = read(ram.ram(), BUFFERS + 4096, 0x1000);
        assert!(beyond.iter().all(|&b| b == 0x11), "{name}");
        shadow.reset();
    }
}

#[test]
fn descriptors_that_the_device_changes_mean_nothing() {
    let ram = Ram::new(RAM, false);
    let set = features(false, true);
    let shadow = shadow(&ram, set, &[SIZE], 1 << 20);
    shadow.set_features(set);
    let window = shadow.window();
    let mapping = map(&window);
    let mut queue = Queue::start(&shadow, &ram, 0, SIZE, 0, of_queue(&set));
    let mut hand = Hand::new(&window, &queue.started, &set);
    shadow.run();
    let from = BusAddr(GUEST + BUFFERS as u64);
    let to = BusAddr(from.0 + 0x1000);
    for n in 0..1000 {
        ram.ram().get(BUFFERS + 0x1000, 0x1000).unwrap().fill(0x22);
        queue.driver.add(&[(from, 16)], &[(to, 64)]).unwrap();
        queue.publish(&shadow);
        let requests = hand.wait();
        // Everything in front of the used ring: descriptors and what is available.
        let rings = (queue.started.setup.descriptor - window.base) as usize;
        let ring = (queue.started.setup.device - window.base) as usize;
        let descriptors = read(mapping.ram(), rings, ring - rings);
        mapping.ram().get(rings, ring - rings).unwrap().fill(0xff);
        hand.give(requests[0].head, 64);
        hand.publish();
        // Whether that is wanted stood in what was just overwritten.
        hand.ring();
        assert_eq!(queue.next().written, 64, "round {n}");
        let bytes = read(ram.ram(), BUFFERS + 0x1000, 0x1000);
        assert!(bytes[..64].iter().all(|&b| b == 0));
        assert!(bytes[64..].iter().all(|&b| b == 0x22));
        // The device itself goes by the available index.
        mapping.ram().write(rings, &descriptors);
    }
    assert_eq!(shadow.poll_event(), None);
}

#[test]
fn random_writes_all_over_the_segment_reach_nothing_but_what_the_guest_lends() {
    let ram = Ram::new(RAM, false);
    let set = features(true, true);
    let shadow = shadow(&ram, set, &[SIZE], 1 << 20);
    let window = shadow.window();
    let mapping = map(&window);
    let mut stopped = 0;
    let (begin, mut round) = (Instant::now(), 0u64);
    // More where the thread of the queues seldom comes to look at them.
    while round < 60 || (stopped <= 5 && begin.elapsed() < PATIENCE) {
        round += 1;
        shadow.set_features(set);
        let mut queue = Queue::start(&shadow, &ram, 0, SIZE, 0, of_queue(&set));
        let rings = (queue.started.setup.descriptor - window.base) as usize;
        let ring = (queue.started.setup.device - window.base) as usize;
        let call = vmsg_mem::Doorbell::from_fd(queue.started.call.try_clone().unwrap()).unwrap();
        shadow.run();
        ram.ram().get(BUFFERS, 0x20_0000).unwrap().fill(0x33);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut numbers = Numbers(round);
                let mut next = 0u16;
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..20 {
                        let at = match numbers.below(3) {
                            0 => rings + numbers.below(0x1000),
                            1 => ring + numbers.below(0x200),
                            _ => numbers.below(window.len as usize - 8),
                        };
                        let len = 1 + numbers.below(8);
                        let bytes = numbers.bytes(len);
                        mapping.ram().write(at, &bytes);
                    }
                    // Some truth among the lies, so that requests come back at all.
                    let ring = mapping.ram().get(ring, 4 + 8 * 64).unwrap();
                    let (id, len) = (numbers.below(64) as u32, numbers.below(600) as u32);
                    used(ring, usize::from(next % 64), id, len);
                    if numbers.below(4) == 0 {
                        next = next.wrapping_add(1);
                    }
                    index(ring, next);
                    call.ring().unwrap();
                }
            });
            let end = Instant::now() + Duration::from_millis(50);
            let mut n = 0usize;
            while Instant::now() < end {
                let at = BUFFERS as u64 + GUEST + (n % 256) as u64 * 0x2000;
                let (from, to) = (BusAddr(at), BusAddr(at + 0x1000));
                if queue.driver.add(&[(from, 512)], &[(to, 512)]).is_ok() {
                    n += 1;
                }
                queue.publish(&shadow);
                while queue.driver.pop_used().unwrap().is_some() {}
            }
            stop.store(true, Ordering::Relaxed);
        });
        stopped += u32::from(matches!(
            shadow.poll_event(),
            Some(Event::NeedsReset(Broken::Device { .. }))
        ));
        shadow.reset();
        for n in 0..256 {
            let bytes = read(ram.ram(), BUFFERS + n * 0x2000, 0x2000);
            assert!(bytes[..0x1000].iter().all(|&b| b == 0x33), "what is read");
            assert!(
                bytes[0x1200..].iter().all(|&b| b == 0x33),
                "what is not lent"
            );
        }
    }
    assert!(stopped > 5, "{stopped} lies were found out");
}

#[test]
fn a_device_that_rings_without_end_gains_nothing() {
    let ram = Ram::new(RAM, false);
    let set = features(true, true);
    let shadow = shadow(&ram, set, &[SIZE, SIZE], 1 << 20);
    shadow.set_features(set);
    let window = shadow.window();
    let loud = Queue::start(&shadow, &ram, 0, SIZE, 0, of_queue(&set));
    let mut quiet = Queue::start(&shadow, &ram, 1, SIZE, 0x4_0000, of_queue(&set));
    let _echo = crate::device::Echo::start(&window, &quiet.started, &set);
    shadow.run();
    // Full, and read by nobody.
    let full = (u64::MAX - 1).to_ne_bytes();
    let _ = rustix::io::write(&*loud.started.call, &full);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let mut count = [0; 8];
                let _ = rustix::io::read(&*loud.started.call, &mut count);
                let _ = rustix::io::write(&*loud.started.call, &full);
            }
        });
        let at = BusAddr(GUEST + BUFFERS as u64);
        for _ in 0..300 {
            quiet.driver.add(&[(at, 16)], &[(at, 16)]).unwrap();
            quiet.publish(&shadow);
            assert_eq!(quiet.next().written, 16);
        }
        shadow.stop_queue(loud.index);
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(shadow.poll_event(), None);
}
