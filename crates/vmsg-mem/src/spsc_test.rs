// SPDX-License-Identifier: Apache-2.0 OR MIT

use core::sync::atomic::{AtomicU64, Ordering};
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::RamSlice;

const ARMED: Layout = Layout::armed(SLOT_SIZE);

fn memory(bytes: usize) -> Vec<AtomicU64> {
    (0..bytes / 8).map(|_| AtomicU64::new(0)).collect()
}

fn word(ram: RamSlice<'_>, offset: usize) -> &core::sync::atomic::AtomicU32 {
    ram.atomic_u32(offset).expect("an aligned word inside")
}

fn pop(consumer: &mut Consumer<RamSlice<'_>>) -> Option<[u8; 4]> {
    let mut message = [0; 4];
    consumer
        .try_pop(&mut message)
        .expect("the queue is sound")
        .then_some(message)
}

#[test]
fn capacity_is_that_of_the_field() {
    assert_eq!(Layout::PLAIN.capacity(4096).unwrap(), 62);
    assert_eq!(Layout::PLAIN.capacity(262_272).unwrap(), 4096);
    assert_eq!(Layout::PLAIN.bytes_for(4096), Some(262_272));
    for (bytes, slot_size) in [
        (0, 64),
        (128, 64),
        (255, 64),
        (4096, 0),
        (4096, 60),
        (4096, 4096),
    ] {
        assert!(
            Layout::armed(slot_size).capacity(bytes).is_err(),
            "{bytes} {slot_size}"
        );
    }
    assert!(Layout::armed(8).capacity(usize::MAX).is_err());
}

#[test]
fn misaligned_memory_is_refused() {
    let words = memory(4096);
    let ram = RamSlice::from_atomics(&words).get(2, 4000).unwrap();
    assert!(matches!(
        Producer::new(ram, Layout::PLAIN),
        Err(Error::BadQueue { .. })
    ));
}

#[test]
fn bytes_lie_where_the_layout_says() {
    let words = memory(4096);
    let ram = RamSlice::from_atomics(&words);
    let mut producer = Producer::new(ram, Layout::PLAIN).unwrap();
    producer.try_push(b"one!").unwrap();
    producer.try_push(b"two!").unwrap();
    assert_eq!(word(ram, 0).load(Ordering::Relaxed), 0, "not published yet");
    assert!(producer.publish());
    let mut bytes = [0; 260];
    ram.read(0, &mut bytes);
    assert_eq!(bytes[0..4], [2, 0, 0, 0]);
    assert_eq!(bytes[0x80..0x84], *b"one!");
    assert_eq!(bytes[0xc0..0xc4], *b"two!");

    let mut consumer = Consumer::new(ram, Layout::PLAIN).unwrap();
    assert_eq!(pop(&mut consumer), Some(*b"one!"));
    assert!(!consumer.release());
    ram.read(0, &mut bytes);
    assert_eq!(bytes[0x40..0x44], [1, 0, 0, 0]);
    assert_eq!(bytes[4..0x40], [0; 0x3c]);
    assert_eq!(bytes[0x44..0x80], [0; 0x3c]);
}

#[test]
fn one_slot_stays_free_and_order_holds_around_the_end() {
    for layout in [Layout::PLAIN, ARMED] {
        let words = memory(128 + 5 * 64);
        let ram = RamSlice::from_atomics(&words);
        let mut producer = Producer::new(ram, layout).unwrap();
        let mut consumer = Consumer::new(ram, layout).unwrap();
        let mut sent = 0u32;
        let mut received = 0u32;
        for _ in 0..20 {
            let mut count = 0;
            while producer.try_push(&sent.to_le_bytes()).is_ok() {
                sent += 1;
                count += 1;
            }
            assert_eq!(count, 4);
            let _ = producer.publish();
            while let Some(message) = pop(&mut consumer) {
                assert_eq!(message, received.to_le_bytes());
                received += 1;
            }
            let _ = consumer.release();
            assert_eq!(sent, received);
        }
    }
}

#[test]
fn a_message_may_fill_its_slot_and_not_more() {
    let words = memory(128 + 3 * 96);
    let ram = RamSlice::from_atomics(&words);
    let mut producer = Producer::new(ram, Layout::armed(96)).unwrap();
    let mut consumer = Consumer::new(ram, Layout::armed(96)).unwrap();
    assert_eq!(producer.try_push(&[1; 97]), Err(PushError::TooLong));
    producer.try_push(&[7; 96]).unwrap();
    producer.try_push(&[8; 96]).unwrap();
    assert!(!producer.publish());
    let mut big = [0; 200];
    assert_eq!(consumer.try_pop(&mut big), Ok(true));
    assert_eq!(big[..96], [7; 96]);
    assert_eq!(big[96..], [0; 104], "nothing of the next slot");
    let mut small = [0; 5];
    assert_eq!(consumer.try_pop(&mut small), Ok(true));
    assert_eq!(small, [8; 5]);
}

#[test]
fn an_early_publish_is_followed_by_a_look_at_the_sleeper() {
    let words = memory(0x80 + 4 * SLOT_SIZE);
    let ram = RamSlice::from_atomics(&words);
    let layout = Layout::armed(SLOT_SIZE);
    let mut producer = Producer::new(ram, layout).unwrap();
    let mut consumer = Consumer::new(ram, layout).unwrap();
    assert!(!producer.publish_early(), "nothing to publish");
    producer.try_push(&[1; 4]).unwrap();
    assert!(!producer.publish_early(), "nobody sleeps");
    assert_eq!(pop(&mut consumer), Some([1; 4]));
    assert!(consumer.arm());
    assert!(!producer.arm_for_room(), "the burst is not over");
    assert!(producer.publish(), "asleep since");
    assert!(!producer.publish());
    producer.try_push(&[2; 4]).unwrap();
    assert_eq!(pop(&mut consumer), None, "not published");
    assert!(consumer.arm());
    assert!(producer.publish_early(), "asleep before");
}

#[test]
fn a_sized_pop_copies_no_more_than_the_message() {
    let slot_size = 192;
    let words = memory(0x80 + 4 * slot_size);
    let ram = RamSlice::from_atomics(&words);
    let layout = Layout::armed(slot_size);
    let mut producer = Producer::new(ram, layout).unwrap();
    let mut consumer = Consumer::new(ram, layout).unwrap();
    let message: Vec<u8> = (0..192).collect();
    for (len, room, copied) in [
        (8, 192, 8),
        (64, 192, 64),
        (65, 192, 65),
        (192, 192, 192),
        (1000, 192, 192),
        (100, 70, 70),
        (100, 10, 10),
        (0, 4, 4),
    ] {
        producer.try_push(&message).unwrap();
        let _ = producer.publish();
        let mut into = vec![0xee; room];
        let popped = consumer.try_pop_sized(&mut into, |header| {
            assert_eq!(header[..], message[..8]);
            len
        });
        assert_eq!(popped, Ok(Some(copied)));
        assert_eq!(into[..copied], message[..copied]);
        // The first cache line is copied as a whole.
        let untouched = copied.max(64).min(room);
        assert!(into[untouched..].iter().all(|&byte| byte == 0xee));
        let _ = consumer.release();
    }
    assert_eq!(consumer.try_pop_sized(&mut [0; 8], |_| 8), Ok(None));
}

#[test]
fn a_sleeping_consumer_is_rung_once() {
    let words = memory(4096);
    let ram = RamSlice::from_atomics(&words);
    let mut producer = Producer::new(ram, ARMED).unwrap();
    let mut consumer = Consumer::new(ram, ARMED).unwrap();
    producer.try_push(b"wake").unwrap();
    assert!(!producer.publish(), "nobody sleeps");
    assert!(!consumer.arm(), "there is a message");
    assert_eq!(pop(&mut consumer), Some(*b"wake"));
    assert!(consumer.arm());
    assert!(!producer.publish(), "nothing is new");
    producer.try_push(b"wake").unwrap();
    assert!(producer.publish());
    producer.try_push(b"wake").unwrap();
    assert!(!producer.publish(), "already rung");
}

#[test]
fn popping_ends_the_sleep_without_a_ring() {
    let words = memory(4096);
    let ram = RamSlice::from_atomics(&words);
    let mut producer = Producer::new(ram, ARMED).unwrap();
    let mut consumer = Consumer::new(ram, ARMED).unwrap();
    assert!(consumer.arm());
    consumer.disarm();
    producer.try_push(b"aaaa").unwrap();
    assert!(!producer.publish());
    assert!(!consumer.arm());
    assert!(pop(&mut consumer).is_some());
    assert_eq!(word(ram, SLEEPING).load(Ordering::Relaxed), 0);
}

#[test]
fn a_producer_that_waits_for_room_is_rung_when_the_queue_is_drained() {
    let words = memory(128 + 64 * 64);
    let ram = RamSlice::from_atomics(&words);
    let mut producer = Producer::new(ram, ARMED).unwrap();
    let mut consumer = Consumer::new(ram, ARMED).unwrap();
    while producer.try_push(b"fill").is_ok() {}
    assert!(!producer.arm_for_room(), "the messages are not out yet");
    assert!(!producer.publish());
    assert!(producer.arm_for_room());
    for _ in 0..7 {
        assert!(pop(&mut consumer).is_some());
        assert!(!consumer.release());
    }
    assert!(pop(&mut consumer).is_some());
    assert!(consumer.release(), "an eighth is free");
    assert!(!producer.arm_for_room(), "there is room");
    while producer.try_push(b"fill").is_ok() {}
    let _ = producer.publish();
    assert!(producer.arm_for_room());
    while pop(&mut consumer).is_some() {}
    assert!(!consumer.arm(), "somebody has to be rung first");
    assert!(consumer.release());
    assert!(consumer.arm());
    assert_eq!(producer.try_push(b"room"), Ok(()));
    assert!(producer.publish());
}

#[test]
fn both_sides_resume_from_memory() {
    let words = memory(128 + 6 * 64);
    let ram = RamSlice::from_atomics(&words);
    let mut producer = Producer::new(ram, Layout::PLAIN).unwrap();
    let mut consumer = Consumer::new(ram, Layout::PLAIN).unwrap();
    for round in 0u32..40 {
        producer.try_push(&round.to_le_bytes()).unwrap();
        producer.try_push(&(round + 1000).to_le_bytes()).unwrap();
        assert!(producer.publish());
        producer = Producer::resume(ram, Layout::PLAIN).unwrap();
        assert_eq!(pop(&mut consumer), Some(round.to_le_bytes()));
        assert!(!consumer.release());
        consumer = Consumer::resume(ram, Layout::PLAIN).unwrap();
        assert_eq!(pop(&mut consumer), Some((round + 1000).to_le_bytes()));
        assert!(!consumer.release());
    }
    word(ram, TAIL).store(6, Ordering::Relaxed);
    assert!(matches!(
        Producer::resume(ram, Layout::PLAIN),
        Err(Error::CorruptQueue {
            index: 6,
            capacity: 6
        })
    ));
    clear(&ram);
    assert!(Producer::resume(ram, Layout::PLAIN).is_ok());
}

#[test]
fn a_bad_index_breaks_the_queue_for_good() {
    let words = memory(128 + 8 * 64);
    let ram = RamSlice::from_atomics(&words);
    let mut producer = Producer::new(ram, ARMED).unwrap();
    let mut consumer = Consumer::new(ram, ARMED).unwrap();
    word(ram, HEAD).store(8, Ordering::Relaxed);
    let corrupt = Corrupt {
        index: 8,
        capacity: 8,
    };
    assert_eq!(consumer.try_pop(&mut [0; 64]), Err(corrupt));
    word(ram, HEAD).store(0, Ordering::Relaxed);
    assert_eq!(consumer.try_pop(&mut [0; 64]), Err(corrupt));
    assert!(!consumer.arm(), "who sleeps would never notice");

    for _ in 0..7 {
        producer.try_push(b"fill").unwrap();
    }
    word(ram, TAIL).store(3, Ordering::Relaxed);
    let corrupt = Corrupt {
        index: 3,
        capacity: 8,
    };
    assert_eq!(
        producer.try_push(b"fill"),
        Err(PushError::Corrupt(corrupt)),
        "nothing was published, so nothing can have been taken"
    );
    word(ram, TAIL).store(0, Ordering::Relaxed);
    let _ = producer.publish();
    assert!(!producer.arm_for_room());
    assert_eq!(producer.try_push(b"fill"), Err(PushError::Corrupt(corrupt)));
}

#[derive(Clone, Debug)]
enum Step {
    Push(u8),
    Publish,
    ArmForRoom,
    Pop,
    Release,
    Arm,
    /// The peer writes what it likes.
    Poke(usize, u32),
}

fn steps(hostile: bool) -> impl Strategy<Value = Vec<Step>> {
    let word = prop_oneof![Just(HEAD), Just(ROOM_WANTED), Just(TAIL), Just(SLEEPING)];
    let value = prop_oneof![0u32..12, any::<u32>()];
    let step = prop_oneof![
        4 => (0u8..=64).prop_map(Step::Push),
        2 => Just(Step::Publish),
        1 => Just(Step::ArmForRoom),
        4 => Just(Step::Pop),
        2 => Just(Step::Release),
        1 => Just(Step::Arm),
        if hostile { 2 } else { 0 } => (word, value).prop_map(|(word, value)| Step::Poke(word, value)),
    ];
    prop::collection::vec(step, 0..200)
}

proptest! {
    #[test]
    fn messages_arrive_once_and_in_order(steps in steps(false), armed: bool, slots in 2usize..9) {
        let layout = if armed { ARMED } else { Layout::PLAIN };
        let words = memory(128 + slots * 64);
        let ram = RamSlice::from_atomics(&words);
        let mut producer = Producer::new(ram, layout).unwrap();
        let mut consumer = Consumer::new(ram, layout).unwrap();
        let (mut pushed, mut published, mut popped) = (0u32, 0u32, 0u32);
        let slots = producer.capacity();
        // Slots that are back for certain.
        let mut freed = 0u32;
        let kept = if armed { (slots / 4).saturating_sub(1) } else { 0 };
        let (mut consumer_sleeps, mut producer_waits) = (false, false);
        for step in steps {
            match step {
                Step::Push(_) if producer_waits => {}
                Step::Push(_) => {
                    match producer.try_push(&pushed.to_le_bytes()) {
                        Ok(()) => pushed += 1,
                        Err(error) => {
                            prop_assert_eq!(error, PushError::Full);
                            prop_assert!(pushed - freed >= slots - 1);
                        }
                    }
                }
                Step::Publish => {
                    let news = published != pushed;
                    published = pushed;
                    let ring = producer.publish();
                    let expected = if armed { news && consumer_sleeps } else { news };
                    prop_assert_eq!(ring, expected);
                    if news { consumer_sleeps = false; }
                }
                Step::ArmForRoom if armed => producer_waits = producer_waits || producer.arm_for_room(),
                Step::Pop if !consumer_sleeps => {
                    let got = pop(&mut consumer);
                    prop_assert_eq!(got, (popped < published).then(|| popped.to_le_bytes()));
                    popped += u32::from(got.is_some());
                }
                Step::Release if !consumer_sleeps => {
                    let ring = consumer.release();
                    freed = freed.max(popped.saturating_sub(kept));
                    if ring {
                        prop_assert!(producer_waits);
                        producer_waits = false;
                    }
                }
                Step::Arm if armed && !consumer_sleeps => {
                    consumer_sleeps = consumer.arm();
                    prop_assert!(!consumer_sleeps || (popped == published && !producer_waits));
                }
                _ => {}
            }
            prop_assert!(!(consumer_sleeps && producer_waits), "both would sleep for ever");
        }
    }

    #[test]
    fn no_index_leads_out_of_the_slots(steps in steps(true), armed: bool, slots in 2usize..9) {
        let layout = if armed { ARMED } else { Layout::PLAIN };
        // Guard bytes around the queue.
        let words = memory(64 + 128 + slots * 64 + 64);
        let all = RamSlice::from_atomics(&words);
        all.fill(0xee);
        let ram = all.get(64, 128 + slots * 64).unwrap();
        ram.fill(0);
        let mut producer = Producer::new(ram, layout).unwrap();
        let mut consumer = Consumer::new(ram, layout).unwrap();
        let (mut push_broken, mut pop_broken) = (None, None);
        for step in steps {
            match step {
                Step::Push(len) => match producer.try_push(&vec![0x11; usize::from(len)]) {
                    Err(PushError::Corrupt(corrupt)) => {
                        prop_assert!(push_broken.is_none_or(|before| before == corrupt));
                        push_broken = Some(corrupt);
                    }
                    Err(error) => prop_assert_eq!(error, PushError::Full),
                    Ok(()) => {}
                },
                Step::Publish => { let _ = producer.publish(); }
                Step::ArmForRoom => { let _ = producer.arm_for_room(); }
                Step::Pop => {
                    let mut message = [0; 80];
                    match consumer.try_pop(&mut message) {
                        Ok(_) => prop_assert!(pop_broken.is_none()),
                        Err(corrupt) => {
                            prop_assert!(pop_broken.is_none_or(|before| before == corrupt));
                            pop_broken = Some(corrupt);
                        }
                    }
                    prop_assert!(message.iter().all(|byte| *byte == 0 || *byte == 0x11));
                }
                Step::Release => { let _ = consumer.release(); }
                Step::Arm => { let _ = consumer.arm(); }
                Step::Poke(offset, value) => word(ram, offset).store(value, Ordering::Relaxed),
            }
        }
        let mut guard = [0; 64];
        all.read(0, &mut guard);
        prop_assert_eq!(guard, [0xee; 64]);
        all.read(64 + 128 + slots * 64, &mut guard);
        prop_assert_eq!(guard, [0xee; 64]);
    }
}
