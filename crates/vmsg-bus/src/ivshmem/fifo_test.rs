// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use std::sync::Arc;
use vmsg_mem::{DeviceSlice, Mapping};

/// A BAR0 with these words and 64 bytes.
fn bar(words: &[(usize, u32)]) -> DeviceSlice {
    let (memory, _file) = Mapping::memfd("bar", 4096, false).unwrap();
    let bar = DeviceSlice::of_ram(Arc::new(memory), 0, 64).unwrap();
    for &(offset, word) in words {
        assert!(bar.store(offset, word));
    }
    bar
}

#[test]
fn each_fifo_is_rung_by_its_own_register() {
    let bar = bar(&[(0, 1), (4, 0x8000_0001)]);
    let first = Fifo::new(bar.clone(), 0).unwrap();
    let last = Fifo::new(bar.clone(), 7).unwrap();
    assert_eq!(first.features(), 0x8000_0001);
    let rung = || [0x20, 0x3c].map(|offset| bar.load(offset));
    assert_eq!(rung(), [Some(0), Some(0)]);
    assert!(last.notify());
    assert_eq!(rung(), [Some(0), Some(1)]);
    assert!(first.notify());
    assert_eq!(rung(), [Some(1), Some(1)]);
}

#[test]
fn what_is_not_such_a_function_is_named() {
    let error = |bar, number| Fifo::new(bar, number).err();
    assert_eq!(error(bar(&[]), 0), Some(FifoError::Version(0)));
    assert_eq!(
        error(bar(&[(0, u32::MAX)]), 0),
        Some(FifoError::Version(u32::MAX))
    );
    // Eight fit into the 64 bytes.
    assert_eq!(error(bar(&[(0, 1)]), 8), Some(FifoError::NoRegister(0x40)));
    assert_eq!(
        error(bar(&[(0, 1)]), u16::MAX),
        Some(FifoError::NoRegister(0x20 + 4 * 65535))
    );
    let tiny = bar(&[]).get(0, 0).unwrap();
    assert_eq!(error(tiny, 0), Some(FifoError::NoRegister(0)));
}
