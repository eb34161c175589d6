// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Daemons behind the bridge that say anything at any time.

mod vhost_user_daemon;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_daemon_says_the_device_does_what_its_driver_wants_in_time(
        kind: u8,
        bytes in proptest::collection::vec(any::<u8>(), 0..800),
    ) {
        // The driver is ready first: most stories come to something then.
        vhost_user_daemon::one(&[&[kind, 0, 15, 0, 0, 0][..], &bytes].concat());
    }
}
