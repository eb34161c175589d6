// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What becomes of frames on their way through a switch, for frames and receivers of all kinds.

mod copying;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn what_arrives_is_what_was_sent_in_a_form_that_the_receiver_takes(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        copying::one(&bytes);
    }
}
