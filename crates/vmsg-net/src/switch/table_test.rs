// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn key(n: u32) -> Key {
    let [a, b, c, d] = n.to_be_bytes();
    Key::new(1, [2, 0, a, b, c, d])
}

#[test]
fn keys_are_taken_apart_as_they_were_put_together() {
    let key = Key::new(4094, [1, 2, 3, 4, 5, 6]);
    assert_eq!((key.vlan(), key.mac()), (4094, Mac([1, 2, 3, 4, 5, 6])));
}

#[test]
fn nobody_is_never_found() {
    let mut table = Table::new(8, 1000);
    for vlan in [0, 1, 4094] {
        let nobody = Key::new(vlan, [0; 6]);
        assert!(table.find(nobody, 0).is_none() && table.see(nobody, 0, 0).is_none());
    }
}

#[test]
fn a_full_table_keeps_what_it_has() {
    let mut table = Table::new(100, 1000);
    for n in 0..100 {
        table.learn(key(n), 1, 0).unwrap();
    }
    assert_eq!(table.learn(key(100), 2, 0).unwrap_err(), Full);
    assert!((0..100).all(|n| table.find(key(n), 0).unwrap().port == 1));
    // A fixed one finds room all the same.
    let mut gone = Vec::new();
    table.fix(key(100), 2, |entry| gone.push(entry.key));
    assert_eq!((table.len(), gone.len()), (100, 1));
    assert_eq!(table.find(key(100), 0).unwrap().port, 2);
}

#[test]
fn old_entries_are_not_found_and_swept_away() {
    let mut table = Table::new(100, 1000);
    let start = u32::MAX - 500;
    for n in 0..50 {
        table.learn(key(n), 1, start).unwrap();
    }
    let later = start.wrapping_add(1000);
    for n in 0..25 {
        assert!(table.see(key(n), 1, later).is_some());
    }
    assert!(table.see(key(30), 2, later).is_some(), "seen elsewhere");
    let end = start.wrapping_add(1001);
    let found = (0..50)
        .filter(|n| table.find(key(*n), end).is_some())
        .count();
    assert_eq!(found, 25);
    let mut gone = 0;
    table.sweep(2 * table.places(), end, |_| gone += 1);
    assert_eq!((gone, table.len()), (25, 25));
    assert!((0..25).all(|n| table.find(key(n), end).is_some()));
}

#[test]
fn an_address_fixed_in_all_vlans_takes_the_place_of_learned_ones() {
    let mut table = Table::new(100, 1000);
    let mac = [2, 0, 0, 0, 0, 1];
    for vlan in 1..10 {
        table.learn(Key::new(vlan, mac), 1, 0).unwrap();
    }
    let mut gone = 0;
    table.fix(Key::new(ALL_VLANS, mac), 2, |_| gone += 1);
    assert_eq!((gone, table.len()), (9, 1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn it_is_a_map(steps in prop::collection::vec((0u8..5, 0u32..40, 0u16..4), 1..400)) {
        // Few places, so that runs of them meet and go around the end.
        let mut table = Table::new(20, u32::MAX / 2);
        let mut model: HashMap<u32, (u16, bool)> = HashMap::new();
        for (what, n, port) in steps {
            match what {
                0..3 => {
                    if model.get(&n).is_some_and(|(_, fixed)| *fixed) {
                        continue;
                    }
                    let learned = table.learn(key(n), port, 0);
                    if model.len() < 20 || model.contains_key(&n) {
                        let old = learned.unwrap().map(|entry| entry.port);
                        prop_assert_eq!(old, model.insert(n, (port, false)).map(|(port, _)| port));
                    } else {
                        prop_assert_eq!(learned.unwrap_err(), Full);
                    }
                }
                3 => {
                    let fixed = model.values().filter(|(_, fixed)| *fixed).count();
                    if fixed < 20 {
                        let mut gone = Vec::new();
                        table.fix(key(n), port, |entry| gone.push(entry.key));
                        model.retain(|n, _| !gone.contains(&key(*n)));
                        model.insert(n, (port, true));
                    }
                }
                _ => {
                    let mut gone = 0;
                    table.retain(|entry| entry.port != port, |_| gone += 1);
                    let before = model.len();
                    model.retain(|_, (at, _)| *at != port);
                    prop_assert_eq!(gone, before - model.len());
                }
            }
            prop_assert_eq!(table.len(), model.len());
            for n in 0..40 {
                let found = table.find(key(n), 0).map(|entry| (entry.port, entry.fixed));
                prop_assert_eq!(found, model.get(&n).copied());
            }
        }
    }
}
