// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::{count_tests, second_runs};

#[test]
fn summaries_of_both_harnesses_are_counted() {
    let libtest = "running 3 tests\ntest result: FAILED. 21 passed; 1 failed; 2 ignored; 0 measured; finished in 0.17s\n\
                   test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured\n";
    assert_eq!(count_tests(libtest), (25, 1));
    let nextest =
        "     Summary [   0.180s] 23 tests run: 22 passed (1 slow), 1 failed, 0 skipped\n";
    assert_eq!(count_tests(nextest), (22, 1));
    assert_eq!(count_tests("10 passed, nothing else"), (0, 0));
}

#[test]
fn a_failed_test_that_nextest_shows_counts_once() {
    let nextest = "        FAIL [   0.004s] vmsg tests::one\n\
                   \x20 stdout ───\n    running 1 test\n\
                   \x20   test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 22 filtered out\n\
                   \x20    Summary [   0.180s] 23 tests run: 22 passed, 1 failed, 0 skipped\n\
                   \x20       FAIL [   0.004s] vmsg tests::one\n";
    assert_eq!(count_tests(nextest), (22, 1));
}

#[test]
fn what_passed_when_run_again_is_named() {
    let nextest = "  TRY 1 FAIL [   0.394s] (\u{2500}\u{2500}\u{2500}) flk f\n\
                   \x20    Summary [   1.531s] 3 tests run: 2 passed (1 flaky), 1 failed, 0 skipped\n\
                   \x20  FLAKY 2/2 [   0.007s] (1/3) vmsg::bridge hostile::f\n\
                   \x20 TRY 2 FAIL [   0.183s] (3/3) flk g\n";
    assert_eq!(second_runs(nextest), ["vmsg::bridge hostile::f"]);
    assert_eq!(count_tests(nextest), (2, 1));
    assert!(
        second_runs("     Summary [   0.180s] 23 tests run: 23 passed, 0 skipped\n").is_empty()
    );
}
