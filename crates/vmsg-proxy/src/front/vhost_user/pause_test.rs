// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

#[test]
fn a_device_that_stays_held_is_asked_for_less_and_less_often() {
    let held = || GuestError::Op {
        what: "claiming",
        error: OpError::Held("another (pid 7)".into()),
    };
    let mut patience = Patience::default();
    let pauses: Vec<u64> = (0..7)
        .map(|_| patience.after(&held()).unwrap().as_secs())
        .collect();
    assert_eq!(pauses, [2, 4, 8, 16, 32, 32, 32]);
    assert_eq!(patience.after(&GuestError::Invalid("something else")), None);
    assert_eq!(patience.after(&held()), Some(FIRST));
}
