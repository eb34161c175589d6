// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::{check, mark};

#[test]
fn marks_and_results_are_found_in_a_line() {
    assert_eq!(mark("MARK booted 6.1.0"), Some(("booted", "6.1.0")));
    assert_eq!(mark("[ 1.0] noise MARK done"), Some(("done", "")));
    assert_eq!(mark("CHECK x ok"), None);
    assert_eq!(check("CHECK rng ok").unwrap().failure, None);
    let failed = check("CHECK rng FAIL dd gave 1: no such device").unwrap();
    assert_eq!(
        (failed.name.as_str(), failed.failure.as_deref()),
        ("rng", Some("dd gave 1: no such device"))
    );
}

#[test]
fn a_result_that_is_cut_off_is_a_failure() {
    assert!(check("CHECK rng").unwrap().failure.is_some());
    assert!(check("CHECK rng FAIL").unwrap().failure.is_some());
}
