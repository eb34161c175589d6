// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files, file systems and block devices to put disks on.

#![allow(dead_code, reason = "not every test needs all of it")]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmsg_block::{Engine, FileConfig, FileDisk, OpenError};
use vmsg_mem::uring::RingError;

/// All of them.
pub(crate) const ENGINES: [Engine; 3] = [Engine::Uring, Engine::Threads, Engine::Inline];

/// A directory on the disk that this is built on: no file system in memory.
pub(crate) fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

/// A file of `size` bytes, all of them zero and none of them on the medium.
pub(crate) fn sparse(directory: &Path, size: u64) -> PathBuf {
    let path = directory.join("disk");
    let file = File::create(&path).expect("a file");
    file.set_len(size).expect("a size");
    path
}

/// Opens a disk, or says why that cannot be here: no io_uring, or no I/O past the page cache.
pub(crate) fn open(config: &FileConfig) -> Option<FileDisk> {
    match FileDisk::open(config) {
        Ok(disk) => Some(disk),
        Err(
            error @ (OpenError::NotDirect(_)
            | OpenError::NoUring {
                source: RingError::Denied { .. } | RingError::Missing,
                ..
            }),
        ) => {
            println!("left out: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Runs a program of the system; what it says, or why it cannot be.
fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(args).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        let why = String::from_utf8_lossy(&output.stderr);
        Err(format!("{program}: {}", why.trim()))
    }
}

/// What only root has, and not everywhere.
fn privileged(program: &str, args: &[&str]) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        println!("left out: only root may {program}");
        return None;
    }
    run(program, args)
        .map_err(|why| println!("left out: {why}"))
        .ok()
}

/// A block device whose contents are in a file.
pub(crate) struct Loop(pub(crate) PathBuf);

impl Loop {
    /// With blocks of `sector` bytes. `None` if that cannot be here.
    pub(crate) fn new(file: &Path, sector: u32) -> Option<Self> {
        let sector = sector.to_string();
        let file = file.to_str().expect("UTF-8");
        let args = ["--find", "--show", "--sector-size", &sector, file];
        privileged("losetup", &args).map(|device| Self(device.into()))
    }

    /// One that writes nothing.
    pub(crate) fn read_only(file: &Path) -> Option<Self> {
        let file = file.to_str().expect("UTF-8");
        let args = ["--find", "--show", "--read-only", file];
        privileged("losetup", &args).map(|device| Self(device.into()))
    }

    /// Takes the size of the file anew.
    pub(crate) fn resize(&self) {
        let device = self.0.to_str().expect("UTF-8");
        run("losetup", &["--set-capacity", device]).expect("resized");
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let device = self.0.to_str().expect("UTF-8");
        if let Err(why) = run("losetup", &["--detach", device]) {
            println!("{why}");
        }
    }
}

/// A file system on a directory of its own.
pub(crate) struct Mounted {
    dir: tempfile::TempDir,
    _device: Option<Loop>,
    /// What the device is on.
    _below: Option<tempfile::TempDir>,
}

impl Mounted {
    /// In memory, of `size` bytes.
    pub(crate) fn tmpfs(size: u64) -> Option<Self> {
        let dir = directory();
        let at = dir.path().to_str().expect("UTF-8");
        let size = format!("size={size}");
        privileged("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", at])?;
        Some(Self {
            dir,
            _device: None,
            _below: None,
        })
    }

    /// ext4 of `size` bytes.
    pub(crate) fn ext4(size: u64) -> Option<Self> {
        Self::on_a_device("ext4", size)
    }

    /// ext2 of `size` bytes, which has no way to make zeroes but to write them.
    pub(crate) fn ext2(size: u64) -> Option<Self> {
        Self::on_a_device("ext2", size)
    }

    fn on_a_device(kind: &str, size: u64) -> Option<Self> {
        let below = directory();
        let file = sparse(below.path(), size);
        let name = file.to_str().expect("UTF-8");
        let made = privileged("mke2fs", &["-q", "-F", "-t", kind, "-m", "0", name]);
        made?;
        let device = Loop::new(&file, 512)?;
        let dir = directory();
        let at = dir.path().to_str().expect("UTF-8");
        let from = device.0.to_str().expect("UTF-8");
        privileged("mount", &["-t", kind, from, at])?;
        Some(Self {
            dir,
            _device: Some(device),
            _below: Some(below),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Nothing is written there until [`Self::thaw`], and who writes waits.
    pub(crate) fn freeze(&self) {
        let at = self.path().to_str().expect("UTF-8");
        run("fsfreeze", &["--freeze", at]).expect("frozen");
    }

    pub(crate) fn thaw(&self) {
        let at = self.path().to_str().expect("UTF-8");
        run("fsfreeze", &["--unfreeze", at]).expect("thawed");
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let at = self.path().to_str().expect("UTF-8");
        // Of a test that has failed; otherwise it is not frozen.
        let _ = run("fsfreeze", &["--unfreeze", at]);
        // What is still under way in it ends by itself.
        if let Err(why) = run("umount", &["--lazy", at]) {
            println!("{why}");
        }
    }
}
