// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

#[test]
fn a_host_that_is_restarted_is_connected_to_at_once() {
    let mut now = Instant::now();
    let mut pace = Pace::new(now);
    for _ in 0..100 {
        now += Duration::from_secs(1);
        pace.connected(now);
        now += Duration::from_millis(100);
        assert_eq!(pace.after_end(now), Duration::ZERO);
    }
}

#[test]
fn one_that_ends_every_connection_does_not_keep_us_busy() {
    let begin = Instant::now();
    let mut now = begin;
    let mut pace = Pace::new(now);
    for _ in 0..100 {
        pace.connected(now);
        now += Duration::from_micros(50) + pace.after_end(now);
    }
    let took = now - begin;
    assert!(took > Duration::from_secs(80), "{took:?}");
}

#[test]
fn one_that_is_of_no_use_is_tried_less_and_less_often() {
    let mut now = Instant::now();
    let mut pace = Pace::new(now);
    let mut last = Duration::ZERO;
    for _ in 0..40 {
        pace.connected(now);
        now += Duration::from_secs(2);
        let pause = pace.after_fault(now);
        assert!(pause >= last && pause <= LONGEST_PAUSE);
        last = pause;
        now += pause;
    }
    assert_eq!(last, LONGEST_PAUSE);
    pace.connected(now);
    now += Duration::from_secs(3600);
    assert_eq!(
        pace.after_fault(now),
        FAULT_PAUSE,
        "it was good for an hour"
    );
}
