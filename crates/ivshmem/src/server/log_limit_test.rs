// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

#[test]
fn a_burst_is_logged_and_then_one_line_in_a_second() {
    let begin = Instant::now();
    let mut limit = LogLimit::new(begin);
    let mut lines = |seconds| {
        let now = begin + Duration::from_secs(seconds);
        (0..10_000).filter(|_| limit.admit(now)).count()
    };
    assert_eq!(lines(0), 64);
    assert_eq!(lines(0), 0);
    assert_eq!(lines(1), 1);
    assert_eq!(lines(4), 3);
    assert_eq!(lines(1_000_000), 64);
}
