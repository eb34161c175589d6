// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn table() -> Table {
    let mut table = Table::new(&["BUS", "NAME", "WHY"]);
    table.row(["b0".to_owned(), "one".to_owned(), "a reason".to_owned()]);
    table
}

#[test]
fn columns_are_left_out_only_as_far_as_they_must() {
    let lines = |columns| {
        let mut table = table();
        table.fit(columns, &["BUS", "WHY"]);
        table.lines()
    };
    assert_eq!(lines(19), ["BUS  NAME  WHY", "b0   one   a reason"]);
    assert_eq!(lines(18), ["NAME  WHY", "one   a reason"]);
    assert_eq!(lines(13), ["NAME", "one"]);
    // Something must be left.
    assert_eq!(lines(0), ["NAME", "one"]);
}

#[test]
fn the_last_cell_may_be_longer() {
    let mut table = Table::new(&["A", "B"]);
    table.row(["x".repeat(500), "y".repeat(500)]);
    assert_eq!(table.lines()[1].len(), LONGEST + GAP + LONGEST_LAST);
}

#[test]
fn a_long_text_at_the_end_is_no_reason_to_leave_columns_out() {
    let mut table = Table::new(&["BUS", "NAME", "STATE"]);
    table.row(["b0".to_owned(), "one".to_owned(), "waiting".repeat(20)]);
    let all = table.lines();
    table.fit(5 + 6 + LEAST_LAST, &["BUS", "STATE"]);
    assert_eq!(table.lines(), all);
    table.fit(5 + 6 + LEAST_LAST - 1, &["BUS", "STATE"]);
    assert!(table.lines()[0].starts_with("NAME  STATE"));
}
