// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Drivers and clients of a console that want it no good.

mod console_driver;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_driver_writes_anywhere_it_can_begin_again(
        bytes in proptest::collection::vec(any::<u8>(), 0..800),
    ) {
        console_driver::one(&bytes);
    }
}
