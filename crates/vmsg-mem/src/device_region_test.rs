// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::spsc::{Consumer, Layout, Producer};

fn memory(bytes: usize) -> Vec<AtomicU64> {
    (0..bytes / 8).map(|_| AtomicU64::new(0)).collect()
}

#[test]
fn registers_are_little_endian_and_aligned() {
    let words = memory(16);
    let region = DeviceRegion::from_atomics(&words);
    assert!(region.write_u32(4, 0x0403_0201));
    assert_eq!(region.read_u8(4), Some(1));
    assert_eq!(region.read_u16(6), Some(0x0403));
    assert_eq!(region.read_u64(0), Some(0x0403_0201_0000_0000));
    assert_eq!(region.read_u32(2), None, "misaligned");
    assert_eq!(region.read_u32(16), None, "outside");
    assert_eq!(region.read_u64(usize::MAX), None);
    assert!(!region.write_u16(15, 0));
    assert!(!region.write_u8(16, 0));
    let part = region.get(4, 4).unwrap();
    assert_eq!(part.read_u32(0), Some(0x0403_0201));
    assert_eq!(part.read_u32(4), None);
    assert!(region.get(8, 9).is_none());
}

#[test]
fn each_access_is_the_widest_that_is_aligned() {
    let words = memory(64);
    let region = DeviceRegion::from_atomics(&words);
    let widths = |mut offset: usize, len: usize| {
        let end = offset + len;
        let mut widths = Vec::new();
        while offset < end {
            let width = region.width(offset, end - offset);
            widths.push(width);
            offset += width;
        }
        widths
    };
    if cfg!(target_pointer_width = "64") {
        assert_eq!(widths(1, 23), [1, 2, 4, 8, 8]);
        assert_eq!(widths(8, 15), [8, 4, 2, 1]);
    }
    assert_eq!(widths(2, 3), [2, 1]);
}

#[test]
fn a_message_queue_may_lie_in_it() {
    let words = memory(4096);
    let region = DeviceRegion::from_atomics(&words);
    let mut producer = Producer::new(region, Layout::PLAIN).unwrap();
    let mut consumer = Consumer::new(region, Layout::PLAIN).unwrap();
    let mut message = [0; 50];
    for round in 0u8..200 {
        producer.try_push(&[round; 50]).unwrap();
        assert!(producer.publish());
        assert_eq!(consumer.try_pop(&mut message), Ok(true));
        assert_eq!(message, [round; 50]);
        assert!(!consumer.release());
    }
}

proptest! {
    #[test]
    fn copies_move_the_bytes_and_no_others(offset in 0usize..80, bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        let words = memory(64);
        let region = DeviceRegion::from_atomics(&words);
        let mut expected = [0u8; 64];
        let n = bytes.len().min(64usize.saturating_sub(offset));
        expected[offset.min(64)..][..n].copy_from_slice(&bytes[..n]);
        prop_assert_eq!(region.write(offset, &bytes), n);
        let mut all = [0xff; 64];
        prop_assert_eq!(region.read(0, &mut all), 64);
        prop_assert_eq!(all, expected);
        let mut back = vec![0; bytes.len()];
        prop_assert_eq!(region.read(offset, &mut back), n);
        prop_assert_eq!(&back[..n], &bytes[..n]);
    }
}
