// SPDX-License-Identifier: Apache-2.0 OR MIT

use core::sync::atomic::AtomicU64;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;

const BYTES: usize = 256;

/// Windows at small addresses, so that they often touch: base, length, access.
fn layout() -> impl Strategy<Value = Vec<(u64, usize, bool)>> {
    let window = (0u64..4, 1usize..24, any::<bool>());
    // Gaps of 0 to 3 bytes, mostly none.
    prop::collection::vec(window, 0..9).prop_map(|windows| {
        let mut base = 0;
        windows
            .into_iter()
            .map(|(gap, len, writable)| {
                base += gap.saturating_sub(2);
                let window = (base, len, writable);
                base += len as u64;
                window
            })
            .collect()
    })
}

fn access(writable: bool) -> Access {
    if writable {
        Access::ReadWrite
    } else {
        Access::Read
    }
}

proptest! {
    #[test]
    fn translation_agrees_with_a_table_of_bytes(
        layout in layout(),
        addr in 0u64..220,
        len in 0usize..60,
        write: bool,
    ) {
        let words: Vec<_> = (0..BYTES / 8).map(|_| AtomicU64::new(0)).collect();
        let memory = RamSlice::from_atomics(&words);
        // The memory lies in the order of the windows, but with holes, so that nothing is
        // contiguous across windows.
        let mut table = [None; 512];
        let mut windows = Vec::new();
        let mut place = 0;
        for (index, (base, len, writable)) in layout.iter().enumerate() {
            for i in 0..*len {
                table[usize::try_from(*base).unwrap() + i] = Some((place + i, *writable, index));
            }
            let ram = memory.get(place, *len).unwrap();
            windows.push(Window::new(BusAddr(*base), ram, access(*writable)).unwrap());
            place += len + 1;
        }
        let space = AddressSpace::new(&windows).unwrap();
        let at = usize::try_from(addr).unwrap();
        let bytes = &table[at..at + len];
        let mapped = bytes.iter().all(Option::is_some);
        let allowed = !write || bytes.iter().flatten().all(|(_, writable, _)| *writable);
        let contiguous = bytes.iter().flatten().all(|(_, _, window)| Some(*window) == bytes[0].map(|byte| byte.2));

        let mut places = Vec::new();
        let result = space.pieces(BusAddr(addr), len, access(write), |piece| {
            let start = piece.as_ptr().addr() - memory.as_ptr().addr();
            places.extend(start..start + piece.len());
            true
        });
        if mapped && allowed {
            prop_assert!(result.is_ok());
            let expected: Vec<_> = bytes.iter().flatten().map(|byte| byte.0).collect();
            prop_assert_eq!(places, expected);
        } else {
            prop_assert!(result.unwrap_err().is_peer_fault());
        }

        if len > 0 {
            match space.slice(BusAddr(addr), len, access(write)) {
                Ok(slice) => {
                    prop_assert!(mapped && allowed && contiguous);
                    prop_assert_eq!(slice.len(), len);
                    let start = slice.as_ptr().addr() - memory.as_ptr().addr();
                    prop_assert_eq!(Some(start), bytes[0].map(|byte| byte.0));
                }
                Err(Error::Scattered { .. }) => prop_assert!(mapped && allowed && !contiguous),
                Err(Error::ReadOnly { .. }) => prop_assert!(!allowed),
                Err(Error::Unmapped { .. }) => prop_assert!(!mapped),
                Err(error) => prop_assert!(false, "{error}"),
            }
        }
    }

    #[test]
    fn any_address_and_length_is_answered(layout in layout(), addr: u64, len: usize, write: bool) {
        let words: Vec<_> = (0..BYTES / 8).map(|_| AtomicU64::new(0)).collect();
        let memory = RamSlice::from_atomics(&words);
        let windows: Vec<_> = layout
            .iter()
            .map(|(base, len, writable)| {
                Window::new(BusAddr(*base), memory.get(0, *len).unwrap(), access(*writable)).unwrap()
            })
            .collect();
        let space = AddressSpace::new(&windows).unwrap();
        let result = space.slice(BusAddr(addr), len, access(write));
        prop_assert!(result.map_or(true, |slice| slice.len() == len && len <= BYTES));
    }
}

#[test]
fn the_last_address_can_be_used() {
    let words: Vec<_> = (0..2).map(|_| AtomicU64::new(0)).collect();
    let ram = RamSlice::from_atomics(&words);
    let windows = [Window::new(BusAddr(u64::MAX - 15), ram, Access::ReadWrite).unwrap()];
    let space = AddressSpace::new(&windows).unwrap();
    let last = BusAddr(u64::MAX);
    assert_eq!(space.slice(last, 1, Access::Read).unwrap().len(), 1);
    assert!(matches!(
        space.slice(last, 2, Access::Read),
        Err(Error::Unmapped { .. })
    ));
    assert!(Window::new(BusAddr(u64::MAX - 14), ram, Access::Read).is_err());
    assert!(Window::new(BusAddr(0), RamSlice::EMPTY, Access::Read).is_err());
}

#[test]
fn windows_out_of_order_or_over_each_other_are_refused() {
    let words: Vec<_> = (0..2).map(|_| AtomicU64::new(0)).collect();
    let ram = RamSlice::from_atomics(&words);
    let window = |base| Window::new(BusAddr(base), ram, Access::Read).unwrap();
    assert!(AddressSpace::new(&[window(16), window(0)]).is_err());
    assert!(AddressSpace::new(&[window(0), window(15)]).is_err());
    assert!(AddressSpace::new(&[window(7), window(7)]).is_err());
    assert!(AddressSpace::new(&[window(0), window(16)]).is_ok());
}

#[test]
fn the_callback_can_stop_early() {
    let words: Vec<_> = (0..2).map(|_| AtomicU64::new(0)).collect();
    let ram = RamSlice::from_atomics(&words);
    let windows = [
        Window::new(BusAddr(0), ram, Access::Read).unwrap(),
        Window::new(BusAddr(16), ram, Access::Read).unwrap(),
    ];
    let space = AddressSpace::new(&windows).unwrap();
    let mut count = 0;
    let result = space.pieces(BusAddr(0), 100, Access::Read, |_| {
        count += 1;
        false
    });
    assert!(result.is_ok());
    assert_eq!(count, 1);
}
