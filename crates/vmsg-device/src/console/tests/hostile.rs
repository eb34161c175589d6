// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Drivers that do what no driver should.

use proptest::prelude::*;

use super::bench::Bench;
use crate::console::bits;

fn running() -> Bench {
    let mut bench = Bench::new(&["agent"]);
    let queues: Vec<usize> = (0..6).collect();
    bench.bring_up(&[bits::SIZE, bits::MULTIPORT], &queues);
    bench
}

#[test]
fn messages_that_make_no_sense_are_counted_and_change_nothing() {
    let mut bench = running();
    bench.give(2, 32, 128);
    // Before DEVICE_READY, of ports that do not exist, of events that do not, and that the driver has failed.
    for (id, event, value) in [
        (0, 3, 1),
        (0, 6, 1),
        (u32::MAX, 0, 0),
        (0, 99, 1),
        (7, 3, 1),
        (u32::MAX, 3, 1),
    ] {
        bench.say(id, event, value);
    }
    bench.send(3, b"short");
    bench.add(3, &[], 64);
    bench.kick(3);
    assert_eq!(bench.pop(3), Some(Vec::new()));
    assert_eq!(bench.counter("control_refused"), 8);
    assert_eq!(bench.told(), []);
    bench.say(0, 0, 1);
    for (id, event, value) in [(2, 3, 1), (0, 3, 0), (1, 1, 1), (1, 4, 1), (1, 5, 0)] {
        bench.say(id, event, value);
    }
    assert_eq!(bench.counter("control_refused"), 13);
    assert_eq!(bench.told().len(), 2, "nothing but that there are ports");
    assert!(!bench.is_broken());
}

#[test]
fn a_driver_that_asks_and_takes_no_answer_costs_nothing() {
    let mut bench = running();
    for _ in 0..10_000 {
        bench.say(0, 0, 1);
        bench.say(0, 3, 1);
        bench.say(1, 3, 1);
    }
    bench.give(2, 32, 128);
    // Both ports are there, one is the console and one has a name, and both are open.
    let told = bench.told();
    assert_eq!(told.len(), 6, "{told:?}");
}

#[test]
fn buffers_that_are_too_small_are_given_back_empty() {
    let mut bench = running();
    bench.say(0, 0, 1);
    bench.give(2, 1, 4);
    assert_eq!(bench.pop(2), Some(Vec::new()));
    bench.add(2, b"not for writing", 0);
    bench.kick(2);
    assert_eq!(bench.pop(2), Some(Vec::new()));
    assert_eq!(bench.counter("control_too_small"), 2);
    bench.give(0, 4, 1);
    bench.add(0, b"not for writing", 0);
    bench.kick(0);
    let mut client = bench.client(0);
    bench.say(0, 0, 1);
    bench.say(0, 6, 1);
    bench.type_on(&mut client, b"abcdef");
    assert_eq!(bench.received(0), b"abcd");
    bench.give(0, 2, 1);
    assert_eq!(bench.received(0), b"ef");
    assert!(!bench.is_broken());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is said, the device answers, tells no more than there is to tell, and output goes on.
    #[test]
    fn any_messages_leave_a_device_that_works(
        messages in proptest::collection::vec(
            (prop_oneof![0u32..3, Just(u32::MAX), any::<u32>()], 0u16..9, 0u16..3, 0usize..3),
            0..200,
        ),
    ) {
        let mut bench = running();
        for (id, event, value, buffers) in &messages {
            bench.say(*id, *event, *value);
            let told = bench.told().len();
            prop_assert!(told <= 10);
            if bench.room(2) >= *buffers {
                bench.give(2, *buffers, 64);
            }
        }
        let before = bench.counter("output_bytes");
        bench.send(1, b"still here");
        bench.send(5, b"so is this");
        prop_assert_eq!(bench.counter("output_bytes"), before + 20);
        prop_assert!(!bench.is_broken());
    }
}
