// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::fs::{File, OpenOptions};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::{Access, Mapping};

/// A file that is removed at the end.
struct Named(PathBuf);

impl Named {
    fn new(test: &str) -> Self {
        let name = format!("vmsg-mem-lease-{test}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        File::create(&path).unwrap().set_len(4096).unwrap();
        Self(path)
    }

    fn open(&self) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.0)
            .unwrap()
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn a_file_that_nobody_else_has_open_is_leased_again_and_again() {
    let named = Named::new("alone");
    let file = named.open();
    for _ in 0..3 {
        drop(WriteLease::take(&file).unwrap());
    }
}

#[test]
fn who_has_the_file_open_or_only_mapped_is_noticed() {
    let named = Named::new("others");
    let file = named.open();
    let other = named.open();
    assert!(matches!(WriteLease::take(&file), Err(LeaseError::InUse)));
    let mapping = Mapping::of_fd(other.as_fd(), 0, 4096, Access::ReadWrite).unwrap();
    drop(other);
    assert!(matches!(WriteLease::take(&file), Err(LeaseError::InUse)));
    drop(mapping);
    WriteLease::take(&file).unwrap();
}

#[test]
fn who_opens_a_leased_file_waits_and_the_holder_lives_on() {
    let named = Named::new("waits");
    let file = named.open();
    let lease = WriteLease::take(&file).unwrap();
    let (opened, when) = mpsc::channel();
    let other = std::thread::spawn({
        let path = named.0.clone();
        move || {
            opened.send(()).unwrap();
            File::open(path).unwrap();
            opened.send(()).unwrap();
        }
    });
    when.recv().unwrap();
    assert!(when.recv_timeout(Duration::from_millis(50)).is_err());
    drop(lease);
    when.recv_timeout(Duration::from_secs(60)).unwrap();
    other.join().unwrap();
}

#[test]
fn what_cannot_be_leased_is_unknown() {
    let (reader, _writer) = std::io::pipe().unwrap();
    assert!(matches!(
        WriteLease::take(&reader),
        Err(LeaseError::Unknown(_))
    ));
}
