// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn rules(texts: &[&str]) -> Vec<Rule> {
    texts
        .iter()
        .flat_map(|text| match text.strip_prefix('!') {
            Some(text) => Rule::parse(false, text).unwrap(),
            None => Rule::parse(true, text).unwrap(),
        })
        .collect()
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|port| format!("p{port}")).collect()
}

fn compiled(names: &[String], texts: &[&str]) -> Tables {
    let mut tables = Tables::new();
    let names: Vec<Option<&str>> = names.iter().map(|name| Some(name.as_str())).collect();
    tables.compile(&names, &rules(texts), &Unknown::Flood);
    tables
}

#[test]
fn nobody_reaches_anybody_without_a_rule() {
    let tables = compiled(&names(3), &[]);
    for (from, to) in [(0, 1), (1, 0), (2, 2), (0, 1000)] {
        assert!(!tables.reaches(from, to));
    }
    assert!(!tables.is_connected(0));
}

#[test]
fn the_last_rule_for_a_pair_counts_and_nobody_reaches_itself() {
    let tables = compiled(&names(200), &["* > *", "!p1* <> p2", "p13 > p2"]);
    for from in 0..200u16 {
        for to in 0..200u16 {
            let one = |port: u16| format!("{port}").starts_with('1');
            let cut = (one(from) && to == 2 && from != 13) || (one(to) && from == 2);
            assert_eq!(
                tables.reaches(from, to),
                from != to && !cut,
                "{from} > {to}"
            );
        }
    }
}

#[test]
fn frames_for_everybody_go_to_those_in_the_vlan_that_are_reached() {
    let mut tables = compiled(&names(200), &["p0 > *", "!p0 > p70", "p1 > p1"]);
    for port in 0..200 {
        let vlan = if port % 10 == 0 { 7 } else { 8 };
        tables.set_vlans(port, Some(&Vlans::Access(vlan)));
    }
    let mut seen = Vec::new();
    assert_eq!(tables.spread(0, 7, |port| seen.push(port)), Spread::Some);
    let wanted: Vec<u16> = (10..200).step_by(10).filter(|port| *port != 70).collect();
    assert_eq!(seen, wanted);
    assert_eq!(tables.spread(1, 8, |_| panic!()), Spread::Barred);
    assert_eq!(tables.spread(1, 9, |_| panic!()), Spread::Alone);
    tables.set_vlans(3, Some(&Vlans::Access(4094)));
    assert!(tables.is_in(3, 4094) && !tables.is_in(3, 8));
    assert_eq!(tables.spread(3, 4094, |_| panic!()), Spread::Alone);
    tables.set_vlans(3, None);
    assert!(!tables.is_in(3, 4094));
}

#[test]
fn sets_keep_what_is_in_them_when_they_grow() {
    let mut tables = Tables::new();
    tables.set_vlans(5, Some(&Vlans::Access(4094)));
    tables.set_vlans(63, Some(&Vlans::Plain));
    tables.set_vlans(700, Some(&Vlans::Access(1)));
    assert!(tables.is_in(5, 4094) && tables.is_in(63, 0) && tables.is_in(700, 1));
    assert!(!tables.is_in(5, 1) && !tables.is_in(700, 0));
}

#[test]
fn strangers_go_to_the_uplink_while_it_is_there() {
    let mut tables = Tables::new();
    let up = Unknown::Uplink("up".to_owned());
    tables.compile(&[Some("a"), Some("up")], &[], &up);
    assert_eq!(tables.strangers, Strangers::To(1));
    tables.compile(&[Some("a"), None], &[], &up);
    assert_eq!(tables.strangers, Strangers::Nowhere);
}
