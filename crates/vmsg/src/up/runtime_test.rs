// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The runtime folder: whose it is, and who may have it.

use super::*;

#[test]
fn a_folder_is_private_and_taken_once() {
    let dir = tempfile::TempDir::new().expect("a folder");
    let path = dir.path().join("a/b");
    let runtime = Runtime::take(&path, "x").expect("it is free");
    assert_eq!(
        fs::metadata(&path).expect("it is there").mode() & 0o777,
        0o700
    );
    assert!(path.join("logs").is_dir());
    let error = Runtime::take(&path, "x")
        .expect_err("it is taken")
        .to_string();
    let pid = std::process::id();
    assert!(
        error.contains(&format!("`x` is up already: process {pid}")),
        "{error}"
    );
    drop(runtime);
    Runtime::take(&path, "x").expect("it is free again");
}

#[test]
fn what_is_not_a_folder_is_left_alone() {
    let dir = tempfile::TempDir::new().expect("a folder");
    let target = dir.path().join("target");
    fs::create_dir(&target).expect("a folder");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&target, &link).expect("a link");
    assert!(Runtime::take(&link, "x").is_err());
    assert_eq!(fs::read_dir(&target).expect("a folder").count(), 0);
}

#[test]
fn a_folder_that_others_can_rename_is_not_begun_with() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::TempDir::new().expect("a folder");
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).expect("a folder");
    let allow = |mode| {
        fs::set_permissions(&shared, fs::Permissions::from_mode(mode)).expect("it is ours");
    };
    allow(0o777);
    let error = Runtime::take(&shared.join("x"), "x").expect_err("anybody's");
    assert!(format!("{error:#}").contains("rename"), "{error:#}");
    assert!(!shared.join("x").exists());
    // As /tmp is.
    allow(0o1777);
    Runtime::take(&shared.join("x"), "x").expect("nobody else can rename it");
    if rustix::process::geteuid().is_root() {
        allow(0o755);
        std::os::unix::fs::chown(&shared, Some(12345), None).expect("root may");
        Runtime::take(&shared.join("y"), "y").expect_err("somebody else's");
    }
}
