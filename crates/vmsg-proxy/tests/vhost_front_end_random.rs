// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMMs at a vhost-user front that say anything at any time.

mod common;
mod vhost_front_end;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_front_end_says_the_next_one_is_served_and_nothing_stays_lent(
        kind: u8,
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
    ) {
        // As QEMU begins: most stories come to something then.
        vhost_front_end::one(&[&[kind, 0, 0][..], &bytes].concat());
    }
}
