// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::net::Ipv4Addr;

use super::super::packets::ipv4;
use super::*;

fn flow(number: u16) -> Flow {
    let [a, b] = number.to_be_bytes();
    let one = (Ipv4Addr::new(10, 0, a, b), 1000);
    let two = (Ipv4Addr::new(192, 0, 2, 1), 80);
    Flow::of(&ipv4(6, one, two)).expect("an IP packet")
}

#[test]
fn a_flow_comes_back_where_it_was_last_sent() {
    let mut table = FlowTable::default();
    for pair in [3, 0, 2, 1] {
        table.note(&flow(1), pair);
        assert_eq!(table.choose(Some(&flow(1)), 4), pair);
    }
    assert_eq!(table.choose(None, 4), 0);
}

#[test]
fn flows_that_are_not_known_are_spread_and_stay_where_they_are() {
    let table = FlowTable::default();
    let mut count = [0; 4];
    for number in 0..4000 {
        let pair = table.choose(Some(&flow(number)), 4);
        assert_eq!(table.choose(Some(&flow(number)), 4), pair);
        count[usize::from(pair)] += 1;
    }
    assert!(
        count.iter().all(|count| (800..1200).contains(count)),
        "{count:?}"
    );
}

#[test]
fn many_flows_take_no_more_memory_and_fewer_pairs_are_kept_to() {
    let mut table = FlowTable::default();
    for number in 0..20_000 {
        table.note(&flow(number), number % 4);
    }
    assert_eq!(table.places.len(), FlowTable::PLACES);
    let known = (0..20_000)
        .filter(|number| table.choose(Some(&flow(*number)), 4) == number % 4)
        .count();
    // The last of those that share a place, and a quarter of the others by chance.
    assert!(known > FlowTable::PLACES, "{known}");
    for number in 0..20_000 {
        assert!(table.choose(Some(&flow(number)), 2) < 2);
    }
}

#[test]
fn the_drivers_table_is_looked_up_with_the_low_bits_of_the_hash() {
    let indirection = Indirection {
        table: [2, 0, 1, 3].into(),
        unclassified: 1,
    };
    for value in 0..16 {
        let hash = Some(Hash { value, report: 1 });
        assert_eq!(indirection.choose(hash), [2, 0, 1, 3][value as usize % 4]);
    }
    assert_eq!(indirection.choose(None), 1);
    assert_eq!(indirection.highest(), 3);
}
