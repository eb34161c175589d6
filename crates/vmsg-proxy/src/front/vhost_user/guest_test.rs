// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn at(avail: u16, used: u16) -> ResumeAt {
    ResumeAt::Explicit { avail, used }
}

#[test]
fn a_ring_goes_on_where_both_sides_agree() {
    assert_eq!(where_to_begin(0, Some(0), 64), ResumeAt::Start);
    assert_eq!(where_to_begin(7, Some(7), 64), ResumeAt::UsedIndex);
    assert_eq!(where_to_begin(7, None, 64), at(7, 7));
    assert_eq!(
        where_to_begin(10, Some(8), 64),
        at(10, 8),
        "two are with somebody else"
    );
}

#[test]
fn what_was_given_back_after_the_front_end_looked_is_not_done_again() {
    assert_eq!(where_to_begin(40, Some(41), 64), ResumeAt::UsedIndex);
    assert_eq!(where_to_begin(0xffff, Some(3), 64), ResumeAt::UsedIndex);
    assert_eq!(where_to_begin(0, Some(64), 64), ResumeAt::UsedIndex);
    assert_eq!(
        where_to_begin(0, Some(65), 64),
        at(0, 65),
        "nonsense is for the device to refuse"
    );
}
