// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two threads, a queue and two doorbells: nobody oversleeps, and doorbells are
//! rung only for sleepers.
#![cfg(all(feature = "std", not(loom)))]

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmsg_mem::spsc::{Consumer, Layout, Producer};
use vmsg_mem::{Doorbell, MappedSlice, Mapping};

/// Sleeps until the doorbell rings. Being woken by nothing but this long a time is a failure.
fn sleep(doorbell: &Doorbell) {
    let limit = Timespec {
        tv_sec: 60,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::from_borrowed_fd(doorbell.as_fd(), PollFlags::IN)];
    let woken = poll(&mut fds, Some(&limit)).expect("poll");
    assert_eq!(woken, 1, "nobody rang");
    assert_ne!(doorbell.drain().expect("an eventfd"), 0);
}

fn run(slots: u32, messages: u32, burst: impl Fn(u32) -> u32 + Send + 'static) -> (u32, u32) {
    let layout = Layout::armed(64);
    let bytes = layout.bytes_for(slots).expect("fits");
    let (mapping, fd) = Mapping::memfd("test", bytes as u64, true).expect("a memfd");
    let other = Mapping::of_fd(fd.as_fd(), 0, bytes as u64, mapping.access()).expect("a mapping");
    let part = |mapping| MappedSlice::new(Arc::new(mapping), 0, bytes).expect("inside");
    let mut producer = Producer::new(part(mapping), layout).expect("a queue");
    let mut consumer = Consumer::new(part(other), layout).expect("a queue");
    let to_consumer = Doorbell::new().expect("an eventfd");
    let to_producer = Doorbell::new().expect("an eventfd");
    let (bell, own) = (
        to_consumer.try_clone().expect("a handle"),
        to_producer.try_clone().expect("a handle"),
    );
    let sender = thread::spawn(move || {
        let (mut next, mut rings) = (0u32, 0);
        while next < messages {
            let end = messages.min(next + burst(next));
            while next < end && producer.try_push(&next.to_le_bytes()).is_ok() {
                next += 1;
                if next % 16 == 0 && producer.publish_early() {
                    rings += 1;
                    bell.ring().expect("our own doorbell");
                }
            }
            if producer.publish() {
                rings += 1;
                bell.ring().expect("our own doorbell");
            }
            if next < end && producer.arm_for_room() {
                sleep(&own);
            }
        }
        rings
    });
    let (mut expected, mut rings) = (0u32, 0);
    while expected < messages {
        let mut message = [0; 4];
        while consumer.try_pop(&mut message).expect("a sound queue") {
            assert_eq!(u32::from_le_bytes(message), expected);
            expected += 1;
        }
        if consumer.release() {
            rings += 1;
            to_producer.ring().expect("our own doorbell");
        }
        if expected < messages && consumer.arm() {
            sleep(&to_consumer);
        }
    }
    (sender.join().expect("the sender"), rings)
}

#[test]
fn single_messages_through_a_tiny_queue() {
    run(2, 20_000, |_| 1);
}

#[test]
fn bursts_of_all_sizes() {
    run(62, 200_000, |next| {
        1 + (next.wrapping_mul(2_654_435_761) >> 24)
    });
}

#[test]
fn a_steady_stream_rings_rarely() {
    let messages = 200_000;
    let (there, back) = run(4096, messages, |_| 64);
    assert!(there + back < messages / 8, "{there} {back}");
}
