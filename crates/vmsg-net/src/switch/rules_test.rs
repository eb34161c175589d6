// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rules: what patterns fit, what text is a rule, which of two holds.

use super::*;

#[test]
fn stars_stand_for_any_letters() {
    for (pattern, name, wanted) in [
        ("*", "net0", true),
        ("*", "", true),
        ("net0", "net0", true),
        ("net0", "net01", false),
        ("web*", "web", true),
        ("web*", "webserver", true),
        ("web*", "we", false),
        ("*0", "net0", true),
        ("*0", "net01", false),
        ("a*b*c", "aXbYc", true),
        ("a*b*c", "abbbcbc", true),
        ("a*b*c", "acb", false),
        ("**", "x", true),
    ] {
        let pattern: Pattern = pattern.parse().unwrap();
        assert_eq!(pattern.matches(name), wanted, "{pattern} {name}");
    }
}

#[test]
fn a_pattern_of_many_stars_does_not_take_forever() {
    let pattern: Pattern = "*a".repeat(32).parse().unwrap();
    assert!(!pattern.matches(&format!("{}b", "a".repeat(63))));
}

#[test]
fn both_directions_are_two_rules() {
    let one = Rule::parse(true, "a>b").unwrap();
    assert_eq!(one.len(), 1);
    assert_eq!(one[0].to_string(), "allow a > b");
    let two = Rule::parse(false, "web* <> *").unwrap();
    assert_eq!(two[1].to_string(), "deny * > web*");
    assert_eq!(Rule::parse(true, "* <> *").unwrap().len(), 1);
    for bad in [
        "",
        "a",
        "a b",
        "a >",
        "> b",
        "a > b > c",
        "a < b",
        "a <> b!",
        "a >> b",
    ] {
        Rule::parse(true, bad).unwrap_err();
    }
}

#[test]
fn a_rule_for_the_same_patterns_replaces_the_older_and_comes_last() {
    let mut rules = Rule::parse(true, "a <> b").unwrap();
    put(&mut rules, Rule::parse(false, "a > b").unwrap().remove(0));
    let texts: Vec<String> = rules.iter().map(Rule::to_string).collect();
    assert_eq!(texts, ["allow b > a", "deny a > b"]);
}
