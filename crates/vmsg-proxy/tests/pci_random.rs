// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any accesses to a function: nothing panics, and what is read changes nothing else.
#![allow(missing_docs)]

#[path = "accesses/mod.rs"]
mod accesses;
mod scripted;

use accesses::{Act, Bench, Place, act};
use proptest::prelude::*;

fn places() -> impl Strategy<Value = Place> {
    (any::<u8>(), any::<u16>(), 0..16usize).prop_map(|(region, offset, len)| Place {
        region,
        offset,
        len,
    })
}

fn acts() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => places().prop_map(Act::Read),
        6 => (places(), any::<u64>()).prop_map(|(place, value)| Act::Write(place, value)),
        // What drivers do, so that the deeper states are reached.
        4 => any::<u8>().prop_map(Act::Step),
        1 => any::<u8>().prop_map(Act::Event),
        1 => any::<u8>().prop_map(Act::Device),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_was_accessed_a_driver_can_start_over(acts in proptest::collection::vec(acts(), 1..200)) {
        let mut bench = Bench::new();
        for each in acts {
            act(&mut bench, &each);
        }
        bench.comes_up();
    }

    #[test]
    fn any_bytes_tell_a_story_that_ends(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        accesses::story(&bytes);
    }

    #[test]
    fn reading_changes_nothing_that_is_not_said_to_change(
        acts in proptest::collection::vec(acts(), 1..100),
        reads in proptest::collection::vec(places(), 1..20),
    ) {
        let mut bench = Bench::new();
        for each in acts {
            act(&mut bench, &each);
        }
        // What is due, such as a reset that waits for its next try, is done by the first look.
        bench.image();
        let before = bench.image();
        for place in reads {
            bench.read(place);
        }
        prop_assert_eq!(bench.image(), before);
    }
}
