// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the device host can find in the segment: what was sent, while it is sent; nothing else, ever.

use crate::device::{Hand, map};
use crate::guest::{GUEST, Numbers, Queue, Ram, features, of_queue, read, shadow};
use std::sync::atomic::{AtomicBool, Ordering};
use vmsg_mem::{BusAddr, Mapping};
use vmsg_proxy::session::Window;

const SIZE: u16 = 64;
const RAM: u64 = 0x80_0000;
const BUFFERS: usize = 0x10_0000;
const PAGE: usize = 4096;
/// All of the guest's memory is full of this.
const SECRET: [u8; 8] = *b"\x93secret\x94";
/// What the guest sends, in place of the secret.
const SENT: [u8; 8] = *b"\x95tosend\x96";

fn fill(ram: &Mapping, at: usize, len: usize, pattern: [u8; 8]) {
    for offset in (at..at + len).step_by(8) {
        ram.ram().write(offset, &pattern);
    }
}

/// How often the segment has any four bytes of a pattern, wherever they begin.
fn count(segment: &Mapping, pattern: [u8; 8]) -> usize {
    let bytes = read(segment.ram(), 0, segment.len());
    let parts: Vec<&[u8]> = pattern.windows(4).collect();
    let mut found = 0;
    for at in (0..bytes.len()).step_by(PAGE) {
        if bytes[at..at + PAGE] == [0; PAGE] {
            continue;
        }
        // With a little of the next page.
        let end = (at + PAGE + 3).min(bytes.len());
        let fours = bytes[at..end].windows(4);
        found += fours.filter(|four| parts.contains(four)).count();
    }
    found
}

struct Scene {
    segment: std::sync::Arc<Mapping>,
    window: Window,
}

impl Scene {
    #[track_caller]
    fn no_secret(&self) {
        assert_eq!(count(&self.segment, SECRET), 0, "the secret is there");
    }
}

#[test]
fn a_secret_is_never_in_the_segment_and_what_was_sent_is_gone_when_it_is_done() {
    for far in [false, true] {
        let ram = Ram::new(RAM, far);
        fill(&ram.mapping, 0, RAM as usize, SECRET);
        let set = features(true, true);
        let shadow = shadow(&ram, set, &[SIZE, SIZE], 2 << 20);
        shadow.set_features(set);
        let window = shadow.window();
        let scene = Scene {
            segment: map(&window),
            window,
        };
        let mut queue = Queue::start(&shadow, &ram, 0, SIZE, 0, of_queue(&set));
        let mut other = Queue::start(&shadow, &ram, 1, SIZE, 0x8_0000, of_queue(&set));
        // What the rings leave of their pages is as secret as the rest.
        let mut hand = Hand::new(&scene.window, &queue.started, &set);
        let mut second = Hand::new(&scene.window, &other.started, &set);
        scene.no_secret();
        shadow.run();
        // Room to write full of secrets, and requests at the edges of secrets.
        for n in 0..16 {
            let at = GUEST + (BUFFERS + 0x20_0000 + n * 0x4000) as u64;
            other
                .driver
                .add(&[], &[(BusAddr(at + 3), 9000 + n as u32)])
                .unwrap();
        }
        other.publish(&shadow);
        let mut rx = second.wait();
        let mut numbers = Numbers(5);
        for round in 0..60 {
            let mut sent = 0;
            for n in 0..8 {
                let at = BUFFERS + n * 0x1_0000;
                let len = 8 * (1 + numbers.below(600));
                fill(&ram.mapping, at + 0x1000, len, SENT);
                let from = BusAddr(GUEST + at as u64 + 0x1000);
                let to = BusAddr(GUEST + at as u64 + 0x8000);
                let room = 1 + numbers.below(20_000) as u32;
                queue
                    .driver
                    .add(&[(from, len as u32)], &[(to, room)])
                    .unwrap();
                sent += 1;
            }
            queue.publish(&shadow);
            let mut held = Vec::new();
            while held.len() < sent {
                held.extend(hand.wait());
            }
            for request in &held {
                for chunk in request.readable.chunks(8) {
                    assert_eq!(chunk, SENT);
                }
            }
            scene.no_secret();
            assert!(count(&scene.segment, SENT) > 0, "what is sent is seen");
            // One says that it wrote nothing, one that it wrote some, one that it wrote all.
            for (n, request) in held.into_iter().enumerate() {
                let written = [0, request.writable / 2, request.writable][n % 3];
                hand.give(request.head, written as u32);
            }
            if !rx.is_empty() {
                let request = rx.remove(0);
                second.give(request.head, (request.writable / 2) as u32);
                second.publish();
                other.next();
            }
            hand.publish();
            for _ in 0..sent {
                queue.next();
            }
            // Wiped before the guest hears of it.
            assert_eq!(count(&scene.segment, SENT), 0, "round {round}");
            scene.no_secret();
            for n in 0..8 {
                fill(&ram.mapping, BUFFERS + n * 0x1_0000, 0x1_0000, SECRET);
            }
        }
        shadow.reset();
        scene.no_secret();
    }
}

#[test]
fn a_segment_that_is_watched_all_the_time_never_shows_a_secret() {
    let ram = Ram::new(RAM, false);
    fill(&ram.mapping, 0, RAM as usize, SECRET);
    let set = features(true, true);
    let shadow = shadow(&ram, set, &[SIZE], 1 << 20);
    shadow.set_features(set);
    let window = shadow.window();
    let segment = map(&window);
    let mut queue = Queue::start(&shadow, &ram, 0, SIZE, 0, of_queue(&set));
    let _echo = crate::device::Echo::start(&window, &queue.started, &set);
    shadow.run();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let (mut looks, mut found) = (0, 0);
            while !stop.load(Ordering::Relaxed) || looks < 3 {
                found += count(&segment, SECRET);
                looks += 1;
            }
            found
        });
        fill(&ram.mapping, BUFFERS + 0x1000, 0x1000, SENT);
        for _ in 0..5000 {
            // Surrounded by secrets; what is answered goes over secrets.
            let from = BusAddr(GUEST + BUFFERS as u64 + 0x1000);
            let to = BusAddr(GUEST + BUFFERS as u64 + 0x8000);
            queue
                .driver
                .add(&[(from, 0x1000)], &[(to, 0x3000)])
                .unwrap();
            queue.publish(&shadow);
            assert_eq!(queue.next().written, 0x1000);
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(watch.join().unwrap(), 0);
    });
}
