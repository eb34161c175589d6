// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use std::fs::File;

fn file(dir: &tempfile::TempDir, len: u64) -> PathBuf {
    let path = dir.path().join("ram");
    File::create(&path).unwrap().set_len(len).unwrap();
    path
}

#[test]
fn without_a_hole_the_file_is_one_window_at_the_offset() {
    let dir = tempfile::tempdir().unwrap();
    let ram = StaticRam::new(file(&dir, 1 << 20), 0x4000_0000, 0, 0);
    let windows = ram.windows().unwrap();
    assert_eq!(windows.len(), 1);
    let window = &windows[0];
    assert_eq!(
        (window.base, window.len, window.file_offset),
        (0x4000_0000, 1 << 20, 0)
    );
}

#[test]
fn a_part_of_a_file_is_as_good_as_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let ram = StaticRam::new(file(&dir, 1 << 20), 0, 0, 0);
    let at = |ram: &StaticRam| {
        let windows = ram.windows().unwrap();
        windows
            .iter()
            .map(|window| (window.base, window.len, window.file_offset))
            .collect::<Vec<_>>()
    };
    let to_the_end = ram.clone().within(0x1000, None);
    assert_eq!(at(&to_the_end), [(0, (1 << 20) - 0x1000, 0x1000)]);
    let some = ram.clone().within(0x1000, Some(0x2000));
    assert_eq!(at(&some), [(0, 0x2000, 0x1000)]);
    let nothing = ram.within(1 << 20, None).windows();
    assert!(matches!(nothing, Err(StaticRamError::TooShort { .. })));
}

#[test]
fn a_hole_makes_two_windows_of_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let ram = StaticRam::new(file(&dir, 5 << 20), 0, 3 << 20, 1 << 30);
    let windows: Vec<_> = ram
        .windows()
        .unwrap()
        .iter()
        .map(|w| (w.base, w.len, w.file_offset))
        .collect();
    assert_eq!(
        windows,
        [(0, 3 << 20, 0), ((1 << 30) + (3 << 20), 2 << 20, 3 << 20)]
    );
}

#[test]
fn what_is_wrong_with_the_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = StaticRam::new(dir.path().join("none"), 0, 0, 0);
    assert!(matches!(
        missing.windows(),
        Err(StaticRamError::Missing { .. })
    ));
    let folder = StaticRam::new(dir.path(), 0, 0, 0);
    assert!(matches!(
        folder.windows(),
        Err(StaticRamError::NotAFile { .. })
    ));
    let path = file(&dir, 4096);
    assert!(matches!(
        StaticRam::new(&path, 0, 4096, 1 << 30).windows(),
        Err(StaticRamError::TooShort {
            have: 4096,
            floor: 4096,
            ..
        })
    ));
    for (offset, low, hole) in [
        (u64::MAX - 4, 0, 0),
        (u64::MAX - 4, 5, 1),
        (0, 5, u64::MAX - 100),
    ] {
        assert!(matches!(
            StaticRam::new(&path, offset, low, hole).windows(),
            Err(StaticRamError::OutOfRange { .. })
        ));
    }
    File::create(&path).unwrap();
    assert!(matches!(
        StaticRam::new(&path, 0, 0, 0).windows(),
        Err(StaticRamError::TooShort { have: 0, .. })
    ));
}
