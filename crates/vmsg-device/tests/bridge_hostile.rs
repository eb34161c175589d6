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

#[test]
fn a_daemon_that_asks_before_it_has_answered_the_first_questions_keeps_nobody_busy() {
    // A reset, after which the configuration is read; the connection is closed instead, and opened again 2 s later.
    let again = [0, 10, 0, 0, 12, 0, 5, 20];
    // Good answers to GET_FEATURES, GET_PROTOCOL_FEATURES and so on up to SET_BACKEND_REQ_FD.
    let asks = [0, 0, 0, 0, 0, 0, 0, 0, 13];
    vhost_user_daemon::one(&[&[0][..], &again, &asks].concat());
}
