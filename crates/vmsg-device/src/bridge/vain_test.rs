// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::*;

#[test]
fn only_ends_with_something_to_do_and_nothing_done_count() {
    let mut ends = Ends::default();
    let mut end = |given, used, more| {
        ends.given(given);
        let done = ends.ended(used, more);
        (done, ends.in_vain)
    };
    assert_eq!(end(Some(7), Some(7), true), (false, 1));
    assert_eq!(end(Some(7), Some(7), true), (false, 2));
    // Something is done, and something is left.
    assert_eq!(end(Some(7), Some(8), true), (true, 0));
    assert_eq!(end(Some(8), Some(8), true), (false, 1));
    // Nothing is to be done.
    assert_eq!(end(Some(8), Some(8), false), (false, 0));
    // Around the end of the numbers.
    assert_eq!(end(Some(65_535), Some(2), true), (true, 0));
    // The memory is not there: nothing is known of what was done.
    assert_eq!(end(Some(2), None, false), (false, 0));
    assert_eq!(end(None, Some(2), true), (false, 1));
}
