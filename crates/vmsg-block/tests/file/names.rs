// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One image by several names, and one that is behind a block device.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use vmsg_block::{FileConfig, FileDisk, Holder, LockError, OpenError};

use super::ground::{Loop, directory, sparse};

const MIB: u64 = 1 << 20;

fn open_in(path: &Path, read_only: bool, patience: Duration) -> Result<FileDisk, LockError> {
    let config = FileConfig {
        read_only,
        patience,
        ..FileConfig::new(path)
    };
    match FileDisk::open(&config) {
        Ok(disk) => Ok(disk),
        Err(OpenError::InUse { source, .. }) => Err(source),
        Err(error) => panic!("{error}"),
    }
}

fn open(path: &Path, read_only: bool) -> Result<FileDisk, LockError> {
    open_in(path, read_only, Duration::ZERO)
}

/// One that can be had. A program that another test starts has all that this process has open, for a moment.
fn free(path: &Path, read_only: bool) -> FileDisk {
    open_in(path, read_only, Duration::from_secs(60)).expect("it can be had")
}

#[test]
fn an_image_is_one_by_all_its_names_and_who_has_it_here_is_named_at_once() {
    let dir = directory();
    let path = sparse(dir.path(), MIB);
    let (hard, soft) = (dir.path().join("hard"), dir.path().join("soft"));
    std::fs::hard_link(&path, &hard).expect("a link");
    std::os::unix::fs::symlink(&path, &soft).expect("a link");
    let dotted = dir.path().join(".").join("disk");
    let mut names = vec![path.clone(), hard, soft, dotted];
    // The same folder somewhere else.
    let mounted = directory();
    let mount = |args: &[&str]| {
        let done = Command::new("mount").args(args).output();
        done.is_ok_and(|output| output.status.success())
    };
    let at = mounted.path().to_str().expect("UTF-8");
    let bound = mount(&["--bind", dir.path().to_str().expect("UTF-8"), at]);
    if bound {
        names.push(mounted.path().join("disk"));
    } else {
        println!("left out: mounts");
    }
    for first in &names {
        let disk = free(first, false);
        for second in &names {
            for read_only in [false, true] {
                let begun = Instant::now();
                let refused = open_in(second, read_only, Duration::from_secs(60));
                assert!(
                    matches!(refused, Err(LockError::Held(Holder::Ourselves))),
                    "{second:?} beside {first:?}: {refused:?}"
                );
                assert!(begun.elapsed() < Duration::from_secs(20), "at once");
            }
        }
        drop(disk);
        // Readers stand each other, and no writer.
        let readers = [(); 2].map(|()| free(first, true));
        for second in &names {
            drop(free(second, true));
            assert!(open(second, false).is_err());
        }
        drop(readers);
    }
    if bound {
        let _ = Command::new("umount").arg(at).status();
    }
}

#[test]
fn a_file_with_a_loop_device_on_it_is_no_disk_beside_that() {
    let dir = directory();
    let path = sparse(dir.path(), MIB);
    let Some(device) = Loop::new(&path, 512) else {
        return;
    };
    for read_only in [false, true] {
        match open(&path, read_only) {
            Err(LockError::Loop(found)) => assert_eq!(found, device.0),
            other => panic!("{other:?}"),
        }
    }
    // By another name, too.
    let link = dir.path().join("link");
    std::fs::hard_link(&path, &link).expect("a link");
    assert!(matches!(open(&link, false), Err(LockError::Loop(_))));
    // Who waits gets it when the loop device goes.
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| open_in(&path, false, Duration::from_secs(60)));
        drop(device);
        assert!(waiting.join().expect("no panic").is_ok());
    });
}

#[test]
fn a_loop_device_that_only_reads_stands_readers() {
    let dir = directory();
    let path = sparse(dir.path(), MIB);
    let Some(_device) = Loop::read_only(&path) else {
        return;
    };
    drop(free(&path, true));
    assert!(matches!(open(&path, false), Err(LockError::Loop(_))));
}

#[test]
fn a_loop_device_over_an_image_in_use_is_no_disk() {
    let dir = directory();
    let path = sparse(dir.path(), MIB);
    let image = free(&path, false);
    let Some(device) = Loop::new(&path, 512) else {
        return;
    };
    for read_only in [false, true] {
        let begun = Instant::now();
        match open_in(&device.0, read_only, Duration::from_secs(60)) {
            Err(LockError::Below {
                file,
                holder: Holder::Ourselves,
            }) => assert_eq!(file, path),
            other => panic!("{other:?}"),
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "at once");
    }
    drop(image);
    let disk = free(&device.0, false);
    // And the other way round.
    assert!(open(&path, false).is_err());
    drop(disk);
}
