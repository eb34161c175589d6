// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

const ALL: [u32; 10] = [
    feature_bit::SIZE_MAX,
    feature_bit::SEG_MAX,
    feature_bit::RO,
    feature_bit::BLK_SIZE,
    feature_bit::FLUSH,
    feature_bit::TOPOLOGY,
    feature_bit::CONFIG_WCE,
    feature_bit::MQ,
    feature_bit::DISCARD,
    feature_bit::WRITE_ZEROES,
];

fn bytes() -> [u8; CONFIG_LEN] {
    let mut bytes = [0; CONFIG_LEN];
    bytes[..8].copy_from_slice(&2048_u64.to_le_bytes());
    bytes[8..12].copy_from_slice(&0x1_0000_u32.to_le_bytes());
    bytes[12..16].copy_from_slice(&126_u32.to_le_bytes());
    bytes[20..24].copy_from_slice(&4096_u32.to_le_bytes());
    bytes[24] = 3;
    bytes[25] = 1;
    bytes[26..28].copy_from_slice(&8_u16.to_le_bytes());
    bytes[28..32].copy_from_slice(&16_u32.to_le_bytes());
    bytes[32] = 1;
    bytes[34..36].copy_from_slice(&4_u16.to_le_bytes());
    bytes[36..40].copy_from_slice(&1000_u32.to_le_bytes());
    bytes[40..44].copy_from_slice(&1_u32.to_le_bytes());
    bytes[44..48].copy_from_slice(&8_u32.to_le_bytes());
    bytes[48..52].copy_from_slice(&2000_u32.to_le_bytes());
    bytes[52..56].copy_from_slice(&1_u32.to_le_bytes());
    bytes[56] = 1;
    bytes
}

#[test]
fn every_field_is_where_the_specification_has_it() {
    let config = Config::parse(&bytes(), &FeatureSet::from_bits(&ALL)).unwrap();
    let expected = Config {
        capacity: 2048,
        size_max: 0x1_0000,
        seg_max: 126,
        block_size: 4096,
        physical_block_exp: 3,
        alignment_offset: 1,
        min_io_blocks: 8,
        opt_io_blocks: 16,
        write_back: true,
        queues: 4,
        max_discard_sectors: 1000,
        discard_alignment: 8,
        max_write_zeroes_sectors: 2000,
        write_zeroes_may_unmap: true,
        read_only: true,
        flush: true,
    };
    assert_eq!(config, expected);
    assert_eq!(config.bytes(), 1 << 20);
}

#[test]
fn without_features_only_the_capacity_counts() {
    let config = Config::parse(&bytes()[..8], &FeatureSet::new()).unwrap();
    assert_eq!((config.capacity, config.block_size), (2048, 512));
    assert_eq!((config.seg_max, config.size_max), (1, u32::MAX));
    assert_eq!((config.queues, config.max_discard_sectors), (1, 0));
    assert!(!config.read_only && !config.flush && !config.write_back);
}

#[test]
fn a_configuration_that_ends_too_early_is_refused() {
    let features = FeatureSet::from_bits(&ALL);
    for len in 0..57 {
        assert_eq!(Config::parse(&bytes()[..len], &features), None, "{len}");
    }
    assert!(Config::parse(&bytes()[..57], &features).is_some());
}

#[test]
fn impossible_values_are_refused() {
    let features = FeatureSet::from_bits(&ALL);
    let with = |at: usize, value: &[u8]| {
        let mut bytes = bytes();
        bytes[at..at + value.len()].copy_from_slice(value);
        Config::parse(&bytes, &features)
    };
    assert_eq!(with(0, &[0xff; 8]), None, "bytes beyond 64 bits");
    assert_eq!(with(8, &[0; 4]), None, "segments of nothing");
    assert_eq!(with(20, &[0; 4]), None, "blocks of nothing");
    assert_eq!(with(20, &[0, 6, 0, 0]), None, "no power of two");
    assert_eq!(with(20, &[0, 1, 0, 0]), None, "less than a sector");
    assert_eq!(with(24, &[32]), None, "a block of 2^32 blocks");
    assert_eq!(with(34, &[0, 0]), None, "no queue");
    assert_eq!(with(12, &[0; 4]).unwrap().seg_max, 1);
}
