// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

#[test]
fn memory_without_a_name_keeps_its_size() {
    let fd = anonymous(8192).unwrap();
    assert_eq!(rustix::fs::fstat(&fd).unwrap().st_size, 8192);
    assert_eq!(rustix::fs::ftruncate(&fd, 4096), Err(Errno::PERM));
    assert_eq!(rustix::fs::ftruncate(&fd, 16384), Err(Errno::PERM));
}

#[test]
fn a_file_is_made_for_this_user_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory");
    drop(named(&path, 4096).unwrap());
    let found = fs::metadata(&path).unwrap();
    assert_eq!(found.len(), 4096);
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    fs::write(&path, [7; 4096]).unwrap();
    drop(named(&path, 4096).unwrap());
    assert_eq!(fs::read(&path).unwrap(), [7; 4096]);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory");
    drop(named(&path, 4096).unwrap());
    assert!(matches!(
        named(&path, 8192),
        Err(MemoryError::OtherSize {
            have: 4096,
            want: 8192,
            ..
        })
    ));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    assert!(matches!(
        named(&path, 4096),
        Err(MemoryError::Permissions { .. })
    ));
    assert!(matches!(
        named(dir.path(), 4096),
        Err(MemoryError::NotAFile { .. })
    ));
    assert!(matches!(
        named(Path::new("/dev/null"), 4096),
        Err(MemoryError::NotAFile { .. })
    ));
    let nowhere = dir.path().join("no/such");
    assert!(matches!(
        named(&nowhere, 4096),
        Err(MemoryError::Os { what: "open", .. })
    ));
}
