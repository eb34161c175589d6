// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use crate::session::{FileId, ResumeAt};
use std::sync::Arc;

const RAM: FileId = FileId {
    device: 1,
    inode: 5,
};
const ROM: FileId = FileId {
    device: 1,
    inode: 6,
};

fn common(base: u64, len: u64, file_offset: u64) -> CommonMemory {
    CommonMemory {
        base,
        len,
        file_offset,
        file: RAM,
        path: "/dev/shm/ram".into(),
    }
}

fn window(base: u64, len: u64, file_offset: u64, file: FileId) -> Window {
    let (fd, _) = std::io::pipe().unwrap();
    Window {
        base,
        len,
        file_offset,
        writable: true,
        fd: Arc::new(fd.into()),
        file,
    }
}

/// 3 GiB below the hole, 1 GiB above 4 GiB.
fn pc() -> [CommonMemory; 2] {
    [common(0, 3 << 30, 0), common(4 << 30, 1 << 30, 3 << 30)]
}

#[test]
fn the_same_file_at_the_same_addresses_is_common() {
    let windows = [
        window(0, 0xa0000, 0, RAM),
        window(0xc0000, (3 << 30) - 0xc0000, 0xc0000, RAM),
        window(4 << 30, 1 << 30, 3 << 30, RAM),
    ];
    assert!(left_out(&windows, &pc(), false).unwrap().is_empty());
}

#[test]
fn roms_are_left_out() {
    let windows = [
        window(0, 3 << 30, 0, RAM),
        window(0xc0000, 0x20000, 0, ROM),
        window(0xfffc_0000, 0x4_0000, 0, ROM),
    ];
    let out = left_out(&windows, &pc(), false).unwrap();
    assert_eq!(
        out.iter().map(|w| w.base).collect::<Vec<_>>(),
        [0xc0000, 0xfffc_0000]
    );
}

#[test]
fn another_file_for_memory_is_refused() {
    let other = |windows: &[Window]| match left_out(windows, &pc(), false) {
        Err(OtherMemory::OtherFile { path, size, base }) => (path, size, base),
        other => panic!("{other:?}"),
    };
    // All of it, part of it, and a guest that has nothing else.
    let all = [window(0, 1 << 30, 0, ROM)];
    assert_eq!(other(&all), ("/dev/shm/ram".into(), 4 << 30, 0));
    let part = [window(0, 1 << 30, 0, RAM), window(4 << 30, 1 << 30, 0, ROM)];
    assert_eq!(other(&part).2, 4 << 30);
    let elsewhere = [window(0xfffc_0000, 0x4_0000, 0, ROM)];
    assert_eq!(other(&elsewhere).2, 0xfffc_0000);
}

#[test]
fn the_right_file_at_other_addresses_is_refused() {
    for (base, len, offset) in [
        (0x1000, 0x1000, 0),
        (0, 0x1000, 0x1000),
        (4 << 30, 0x1000, 0),
        ((3 << 30) - 0x1000, 0x2000, (3 << 30) - 0x1000),
        (u64::MAX - 0xfff, 0xfff, 0),
    ] {
        let result = left_out(&[window(base, len, offset, RAM)], &pc(), false).map(|_| ());
        assert!(
            matches!(result, Err(OtherMemory::Misplaced { .. })),
            "{base:#x} {result:?}"
        );
    }
}

#[test]
fn a_queue_must_lie_in_common_memory_with_all_its_parts() {
    let setup = |descriptor, driver, device| QueueSetup {
        size: 256,
        descriptor,
        driver,
        device,
        resume: ResumeAt::Start,
    };
    let end = 3 << 30;
    assert!(holds(&setup(0, 0x1000, 0x2000), &pc()));
    assert!(holds(&setup(end - 4096, 0x1000, (5 << 30) - 2054), &pc()));
    assert!(!holds(&setup(end - 4095, 0x1000, 0x2000), &pc()));
    assert!(!holds(&setup(0, end - 517, 0x2000), &pc()));
    assert!(!holds(&setup(0, 0x1000, (5 << 30) - 2053), &pc()));
    assert!(!holds(&setup(0, 0x1000, u64::MAX), &pc()));
}
