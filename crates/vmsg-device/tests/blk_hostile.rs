// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Drivers of a disk that want it no good.

mod blk_driver;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_driver_does_it_can_begin_again_and_nothing_else_is_touched(
        bytes in proptest::collection::vec(any::<u8>(), 0..1500),
    ) {
        // The usual beginning first: most stories come to something then.
        blk_driver::one(&[&[2, 0, 0, 31][..], &bytes].concat());
    }
}
