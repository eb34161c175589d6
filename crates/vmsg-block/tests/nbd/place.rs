// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server that is badly behaved in the way that a test wants.

use std::collections::HashMap;
use std::io::Write as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use vmsg_block::{Disk, NbdDisk, NbdOpenError};

use super::server::{self};

pub(super) const SIZE: u64 = 1 << 20;
pub(super) const SHORT: Duration = Duration::from_secs(5);
pub(super) const LONG: Duration = Duration::from_secs(60);

/// A server that does with each connection what the test says.
pub(super) struct Place {
    _dir: tempfile::TempDir,
    pub(super) socket: PathBuf,
}

pub(super) fn place(mut each: impl FnMut(usize, UnixStream) + Send + 'static) -> Place {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    thread::spawn(move || {
        for (number, socket) in listener.incoming().enumerate() {
            each(number, socket.unwrap());
        }
    });
    Place { _dir: dir, socket }
}

impl Place {
    pub(super) fn open(&self, timeout: Duration) -> Result<NbdDisk, NbdOpenError> {
        NbdDisk::open(&server::config(&self.socket, timeout))
    }
}

pub(super) fn counters(disk: &NbdDisk) -> HashMap<&'static str, u64> {
    disk.counters().into_iter().collect()
}

/// A socket whose other side was told `bytes`, and which stays open until the other side closes it.
pub(super) fn say(mut socket: UnixStream, bytes: &[u8]) {
    let _ = socket.write_all(bytes);
    let _ = std::io::copy(&mut socket, &mut std::io::sink());
}
