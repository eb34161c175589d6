// SPDX-License-Identifier: Apache-2.0 OR MIT
extern crate std;
use super::FeatureSet;
use std::string::ToString;
use std::vec::Vec;

#[test]
fn bits_lie_in_blocks_of_32() {
    let set = FeatureSet::from_bits(&[0, 31, 32, 255]);
    assert_eq!(set.block(0), 0x8000_0001);
    assert_eq!(set.block(1), 1);
    assert_eq!(set.block(7), 0x8000_0000);
    assert_eq!(set.block(8), 0);
    assert_eq!(set.block(u32::MAX), 0);
    assert_eq!(set.low_u64(), 0x1_8000_0001);
    assert_eq!(set.iter().collect::<Vec<_>>(), [0, 31, 32, 255]);
    assert_eq!(set.used_blocks(), 8);
}

#[test]
fn bits_past_the_last_are_never_set() {
    let set = FeatureSet::new().with(256).with(u32::MAX);
    assert!(set.is_empty());
    assert!(!set.bit(256));
    assert!(!FeatureSet::new().set_block(8, 1));
    assert_eq!(set.used_blocks(), 0);
}

#[test]
fn subset_and_difference_look_at_every_block() {
    let a = FeatureSet::from_bits(&[1, 200]);
    let b = FeatureSet::from_bits(&[1, 2]);
    assert!(!a.is_subset(&b));
    assert!(a.intersection(&b).is_subset(&b));
    assert_eq!(a.difference(&b), FeatureSet::new().with(200));
    assert_eq!(a.union(&b), FeatureSet::from_bits(&[1, 2, 200]));
}

#[test]
fn display_joins_runs() {
    assert_eq!(
        FeatureSet::from_bits(&[0, 5, 28, 29, 30, 32, 255]).to_string(),
        "0,5,28-30,32,255"
    );
    assert_eq!(FeatureSet::new().to_string(), "none");
}
