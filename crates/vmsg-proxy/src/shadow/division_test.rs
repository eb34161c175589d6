// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn check(sizes: &[u16], len: usize, indirect: bool) -> Division {
    let division = Division::new(sizes, len, indirect).unwrap();
    let mut ranges = vec![division.shared.clone()];
    for (size, place) in sizes.iter().zip(&division.places) {
        assert_eq!(*size == 0, place.is_none());
        let Some(place) = place else { continue };
        assert!(place.size.is_power_of_two() && place.size <= *size);
        let layout = Layout::new(place.size, division.table).unwrap();
        assert!(place.rings.len() >= layout.total_len());
        assert!(!place.buffers.is_empty());
        ranges.extend([place.rings.clone(), place.buffers.clone()]);
    }
    ranges.sort_by_key(|range| range.start);
    assert_eq!(ranges.first().unwrap().start, 0);
    assert_eq!(ranges.last().unwrap().end, len);
    for pair in ranges.windows(2) {
        assert_eq!(pair[0].end, pair[1].start, "no hole and no overlap");
    }
    assert!(ranges.iter().all(|range| range.start % PAGE == 0));
    division
}

#[test]
fn nothing_overlaps_and_nothing_is_left_over() {
    let network = check(&[1024, 1024, 64], 64 << 20, true);
    assert_eq!(network.table, 32);
    assert!(network.shared.len() >= 24 << 20);
    assert_eq!(check(&[256; 513], 64 << 20, true).table, 4);
    assert_eq!(check(&[256], 1 << 20, false).table, 0);
    check(&[100, 0, 1, 32768], 64 << 20, true);
    check(&[], PAGE, true);
}

#[test]
fn what_is_said_to_be_enough_is_enough_and_nothing_less_is() {
    for sizes in [&[64][..], &[256; 513], &[32768; 3], &[1, 0, 1024]] {
        let need = Division::new(sizes, PAGE, true).unwrap_err();
        check(sizes, need, true);
        assert_eq!(Division::new(sizes, need - PAGE, true), Err(need));
    }
}
