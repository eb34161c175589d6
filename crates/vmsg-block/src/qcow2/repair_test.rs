// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::{get, set};

#[test]
fn refcounts_of_every_width_are_where_they_belong() {
    for order in 0..=6u32 {
        let mut block = [0u8; 64];
        let count = (64 * 8) >> order;
        let value = |at: usize| (at as u64 * 7 + 1) & (u64::MAX >> (64 - (1u32 << order)));
        for at in 0..count {
            set(&mut block, order, at, value(at));
        }
        for at in 0..count {
            assert_eq!(get(&block, order, at), value(at), "order {order}, {at}");
        }
        // None touches another.
        set(&mut block, order, 1, 0);
        for at in (0..count).filter(|&at| at != 1) {
            assert_eq!(get(&block, order, at), value(at), "order {order}, {at}");
        }
    }
    // Large numbers are big-endian; small ones begin at the low bits.
    let mut block = [0u8; 8];
    set(&mut block, 4, 1, 0x0102);
    assert_eq!(block, [0, 0, 1, 2, 0, 0, 0, 0]);
    set(&mut block, 0, 0, 1);
    assert_eq!(block[0], 1);
}
