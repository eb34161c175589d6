// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Paths at which there is no disk.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use vmsg_block::{
    FileConfig, FileDisk, LockError, OpenError, Purpose, Qcow2Config, Qcow2Disk, open_image,
};

#[test]
fn what_is_no_disk_is_named_at_once_and_not_opened() {
    let dir = tempfile::tempdir().expect("a directory");
    let (pipe, socket, link) = (
        dir.path().join("pipe"),
        dir.path().join("socket"),
        dir.path().join("link"),
    );
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a pipe");
    let _listener = UnixListener::bind(&socket).expect("a socket");
    std::os::unix::fs::symlink("/dev/tty", &link).expect("a link");
    let begin = Instant::now();
    for path in [
        dir.path(),
        &pipe,
        &socket,
        &link,
        "/dev/null".as_ref(),
        "/proc/self/fd".as_ref(),
    ] {
        for purpose in [Purpose::Read, Purpose::Write] {
            let error = open_image(path, purpose, Duration::from_secs(60)).expect_err("no disk");
            assert!(matches!(error, LockError::NotADisk), "{path:?}: {error}");
        }
        let error = FileDisk::open(&FileConfig::new(path)).expect_err("no disk");
        assert!(matches!(error, OpenError::NotADisk(_)), "{path:?}: {error}");
        assert!(Qcow2Disk::open(&Qcow2Config::new(path)).is_err());
    }
    assert!(begin.elapsed() < Duration::from_secs(30));
}
