// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which descriptors a daemon has already.

use vmsg_mem::Doorbell;

use super::is_same;

#[test]
fn copies_of_an_eventfd_are_the_same_and_others_are_not() {
    let one = Doorbell::new().expect("an eventfd");
    let copy = one.try_clone().expect("a copy");
    let other = Doorbell::new().expect("an eventfd");
    assert!(is_same(Some(&one), Some(&copy)));
    assert!(!is_same(Some(&one), Some(&other)));
    assert!(!is_same(Some(&one), None));
    assert!(!is_same(None, Some(&one)));
    assert!(is_same(None, None));
}
