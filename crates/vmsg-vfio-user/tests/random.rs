// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Random stories, and random bytes as they are.

mod exercise;
mod support;

use proptest::prelude::*;
use support::{GET_INFO, Pair};

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_story_gets_the_answers_it_is_entitled_to(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        exercise::server(&bytes);
    }

    #[test]
    fn any_payload_of_any_command_is_answered_once(
        commands in prop::collection::vec((0u16..20, prop::collection::vec(any::<u8>(), 0..80)), 1..20)
    ) {
        let mut pair = Pair::new();
        for (command, payload) in commands {
            pair.ask(command, &payload);
            pair.ask(GET_INFO, &support::u32s(&[16, 0, 0, 0])).ok();
        }
        prop_assert_eq!(pair.connection.counters().panics, 0);
    }
}
