// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The AMP layout with words of any value.

mod exercise;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn no_words_lead_outside_or_to_sleep(bytes in prop::collection::vec(any::<u8>(), 0..800)) {
        exercise::amp(&bytes);
    }
}
