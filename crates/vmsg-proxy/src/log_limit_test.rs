// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

#[test]
fn a_flood_is_cut_and_counted_and_what_is_rare_is_told() {
    let limit = LogLimit::default();
    let begin = Instant::now();
    let told = (0..1000)
        .filter(|_| limit.admit_at(begin).is_some())
        .count();
    assert_eq!(told, BURST as usize);
    assert_eq!(
        limit.admit_at(begin + PACE),
        Some(Some(1000 - u64::from(BURST)))
    );
    assert_eq!(limit.admit_at(begin + PACE), None);
    let mut now = begin + PACE * 10;
    for _ in 0..100 {
        now += PACE;
        assert!(limit.admit_at(now).is_some());
    }
}

#[test]
fn a_day_of_flooding_is_a_file_of_moderate_size() {
    let limit = LogLimit::default();
    let begin = Instant::now();
    let told = (0..24 * 3600 * 5)
        .filter(|i| {
            limit
                .admit_at(begin + Duration::from_millis(i * 200))
                .is_some()
        })
        .count();
    assert!(told <= 24 * 360 + BURST as usize, "{told}");
    assert!(told >= 24 * 300, "{told}");
}
