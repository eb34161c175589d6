// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn file(len: u64) -> OwnedFd {
    let (_, fd) = Mapping::memfd("test", len, true).expect("memory");
    fd
}

fn mappings(mappings: usize) -> Shares {
    Shares { mappings, views: 0 }
}

fn window(id: u32, len: u64) -> Description {
    Description {
        id,
        writable: true,
        base: u64::from(id) << 41,
        len,
        file_offset: 0,
    }
}

#[test]
fn whoever_has_many_windows_takes_half_of_what_is_left() {
    let file = file(4096);
    let mut windows = Windows::new();
    for others in [ALL_WINDOWS - 200, ALL_WINDOWS, ALL_WINDOWS * 2] {
        while windows.count() < 300 {
            let id = u32::try_from(windows.count()).expect("few");
            let all = Shares {
                mappings: others + windows.count(),
                views: 0,
            };
            let mut small = window(id, 4096);
            small.base = u64::from(id) << 12;
            match windows.add(small, &file, true, all) {
                Ok(changed) => assert!(!changed),
                Err(refusal) => {
                    assert!(matches!(refusal, Refusal::TooMany));
                    assert_eq!(windows.count(), 0, "what was staged with it is gone");
                    break;
                }
            }
            let fair = (ALL_WINDOWS.saturating_sub(others) / 2).max(FAIR_WINDOWS);
            assert!(windows.count() <= fair);
        }
        assert_eq!(windows.count(), 0, "300 windows are too many");
    }
}

#[test]
fn the_bytes_lent_are_limited_however_they_come_and_go() {
    let file = file(MAX_BYTES);
    let mut windows = Windows::new();
    assert!(matches!(
        windows.add(window(1, MAX_BYTES), &file, false, mappings(0)),
        Ok(true)
    ));
    assert!(matches!(
        windows.add(window(2, 1), &file, false, mappings(1)),
        Err(Refusal::TooMuch)
    ));
    assert!(matches!(windows.remove(1, false, mappings(1)), Ok(true)));
    let half = MAX_BYTES / 2;
    assert!(matches!(
        windows.add(window(1, half), &file, true, mappings(0)),
        Ok(false)
    ));
    assert!(matches!(
        windows.add(window(2, half), &file, true, mappings(1)),
        Ok(false)
    ));
    assert!(matches!(
        windows.add(window(3, 1), &file, true, mappings(2)),
        Err(Refusal::TooMuch)
    ));
    // All three are given up.
    assert_eq!(windows.count(), 0);
    assert!(matches!(
        windows.add(window(1, MAX_BYTES), &file, false, mappings(0)),
        Ok(true)
    ));
    assert_eq!(windows.table().mappings().len(), 1);
}

#[test]
fn devices_are_no_memory() {
    let zero = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/zero")
        .expect("/dev/zero");
    let mut windows = Windows::new();
    let added = windows.add(window(1, 4096), &zero.into(), false, mappings(0));
    assert!(matches!(added, Err(Refusal::Descriptor(_))), "{added:?}");
}
