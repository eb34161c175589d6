// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use std::fs::File;

#[test]
fn a_lock_belongs_to_the_open_file_and_all_its_descriptors() {
    let path = format!("/proc/self/fd/{}", {
        let fd = rustix::fs::memfd_create("locked", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        std::os::fd::IntoRawFd::into_raw_fd(fd)
    });
    let open = || File::open(&path).unwrap();
    let (one, two) = (open(), open());
    assert!(try_share(&one, 101).unwrap());
    assert!(!is_locked_elsewhere(&one, 101).unwrap());
    assert!(is_locked_elsewhere(&two, 101).unwrap());
    assert!(!is_locked_elsewhere(&two, 100).unwrap());
    assert!(!is_locked_elsewhere(&two, 102).unwrap());
    assert!(try_share(&two, 101).unwrap(), "shared");
    unlock(&two, 101).unwrap();

    let copy = one.try_clone().unwrap();
    drop(one);
    assert!(is_locked_elsewhere(&two, 101).unwrap());
    drop(copy);
    assert!(!is_locked_elsewhere(&two, 101).unwrap());
}
