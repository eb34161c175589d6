// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::fs::File;

use super::*;

fn image() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    File::create(&path).unwrap().set_len(4096).unwrap();
    (dir, path)
}

fn take(path: &Path, purpose: Purpose) -> Result<Image, LockError> {
    open_image(path, purpose, Duration::ZERO)
}

/// As somebody else's program has it: not known to be one of this process.
fn foreign(path: &Path, bytes: &[u64]) -> File {
    let file = File::options().read(true).write(true).open(path).unwrap();
    for byte in bytes {
        assert!(byte_lock::try_share(&file, *byte).unwrap());
    }
    file
}

#[test]
fn readers_stand_each_other_and_a_writer_nobody() {
    use Purpose::{Read, Write};
    let (_dir, path) = image();
    for (first, second, both) in [
        (Read, Read, true),
        (Read, Write, false),
        (Write, Read, false),
        (Write, Write, false),
    ] {
        let held = take(&path, first).unwrap();
        let other = take(&path, second);
        assert_eq!(other.is_ok(), both, "{first:?} and {second:?}");
        drop((held, other));
    }
    // What was refused has left nothing behind.
    assert!(take(&path, Write).is_ok());
}

/// QEMU's numbers (block/file-posix.c, include/block/block-common.h): 100 and 200, and the bit of the permission.
#[test]
fn each_byte_that_others_lock_means_what_qemu_means_by_it() {
    let (_dir, path) = image();
    for (byte, reader, writer) in [
        // In use by others: they read, write, write what is there already, resize.
        (100, true, true),
        (101, false, false),
        (102, true, true),
        (103, false, false),
        // Not shared by others.
        (200, false, false),
        (201, true, false),
        (202, true, true),
        (203, true, false),
        // Nothing.
        (99, true, true),
        (110, true, true),
    ] {
        let other = foreign(&path, &[byte]);
        assert_eq!(take(&path, Purpose::Read).is_ok(), reader, "{byte}");
        assert_eq!(take(&path, Purpose::Write).is_ok(), writer, "{byte}");
        drop(other);
    }
}

#[test]
fn who_takes_an_image_locks_the_bytes_that_qemu_looks_at() {
    let (_dir, path) = image();
    for (purpose, bytes) in [
        (Purpose::Read, &[100, 201, 203][..]),
        (Purpose::Write, &[100, 101, 103, 201, 203]),
    ] {
        let image = take(&path, purpose).unwrap();
        let other = foreign(&path, &[]);
        let locked: Vec<u64> = (0..400)
            .filter(|byte| byte_lock::is_locked_elsewhere(&other, *byte).unwrap())
            .collect();
        assert_eq!(locked, bytes, "{purpose:?}");
        drop(image);
    }
}

#[test]
fn what_others_hold_is_waited_for_and_what_this_process_holds_is_not() {
    let (_dir, path) = image();
    let other = foreign(&path, &[101]);
    std::thread::scope(|scope| {
        let waiting =
            scope.spawn(|| open_image(&path, Purpose::Write, Duration::from_secs(60)).is_ok());
        thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        drop(other);
        assert!(waiting.join().unwrap());
    });
    let _ours = take(&path, Purpose::Read).unwrap();
    let begun = Instant::now();
    let second = open_image(&path, Purpose::Write, Duration::from_secs(60));
    assert!(matches!(second, Err(LockError::Held(Holder::Ourselves))));
    assert!(begun.elapsed() < Duration::from_secs(30));
}

#[test]
fn an_image_is_known_as_ours_as_long_as_one_of_its_disks_is_there() {
    let (_dir, path) = image();
    let identity = Identity::of(&rustix::fs::stat(&path).unwrap());
    assert!(!identity.is_ours());
    let (first, second) = (
        take(&path, Purpose::Read).unwrap(),
        take(&path, Purpose::Read).unwrap(),
    );
    drop(first);
    assert!(identity.is_ours());
    // The file may be open a little longer.
    let Image { file, in_use } = second;
    drop(in_use);
    assert!(!identity.is_ours());
    drop(file);
}

#[test]
fn a_lock_is_found_in_what_the_kernel_says_of_an_open_file() {
    let info = "pos:\t0\nflags:\t02100002\nmnt_id:\t25\nino:\t77\n\
        lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:77 100 100\n\
        lock:\t2: OFDLCK  ADVISORY  READ -1 fe:00:77 201 201\n";
    assert!(has_lock(info, 77));
    assert!(!has_lock(info, 78));
    assert!(has_lock(
        "lock:\t1: OFDLCK ADVISORY READ -1 fe:00:5 203 203\n",
        5
    ));
    for other in [
        "",
        "lock:",
        "lock:\t1: POSIX ADVISORY READ -1 fe:00:5\n",
        "lock:\t1: FLOCK ADVISORY WRITE 12 fe:00:5 0 EOF\n",
        "lock:\t1: POSIX ADVISORY WRITE 12 fe:00:5 50 60\n",
        "block:\t1: OFDLCK ADVISORY READ -1 fe:00:5 100 100\n",
    ] {
        assert!(!has_lock(other, 5), "{other:?}");
    }
}

#[test]
fn the_process_that_holds_an_image_is_found() {
    let (_dir, path) = image();
    assert_eq!(find_holder(&path), Holder::Unseen);
    let held = take(&path, Purpose::Write).unwrap();
    assert_eq!(find_holder(&path), Holder::Ourselves);
    drop(held);
    assert_eq!(find_holder(&path.join("none")), Holder::Unseen);
}
