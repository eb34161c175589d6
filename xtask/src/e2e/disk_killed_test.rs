// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn lines(texts: &[&str]) -> Vec<Line> {
    let line = |text: &&str| Line {
        text: (*text).to_owned(),
        at: Duration::ZERO,
    };
    texts.iter().map(line).collect()
}

#[test]
fn files_count_from_when_they_are_synced_until_they_are_removed() {
    let sum = "a".repeat(64);
    let one = format!("MARK synced raw/small.1 {sum}");
    let two = format!("MARK synced qcow/large.1 {sum}");
    let found = expected(&lines(&[
        &one,
        "MARK under-way",
        &two,
        "MARK removed raw/small.1",
    ]));
    assert_eq!(found, BTreeMap::from([("qcow/large.1".to_owned(), sum)]));
}

#[test]
fn a_line_that_was_cut_off_by_the_end_tells_of_no_file() {
    let cut = format!("MARK synced raw/small.1 {}", "a".repeat(63));
    assert!(expected(&lines(&[&cut])).is_empty());
}
