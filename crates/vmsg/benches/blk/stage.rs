// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What disks are on, and who is measured there.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::host::{self, Ours};
use crate::vhost_user::{self, Theirs};
use crate::{DISK, Ended, run_on, wait_for};

/// What the disk is on.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Medium {
    Null,
    /// A file in memory.
    Memory,
    /// A file on a disk, in the page cache.
    Cached,
    /// The same past the page cache.
    Direct,
    /// A qcow2 image in memory, of which all clusters are there.
    Qcow2,
    /// What an NBD server has in its memory.
    Nbd,
}

impl Medium {
    pub(crate) const ALL: [Self; 6] = [
        Self::Null,
        Self::Memory,
        Self::Cached,
        Self::Direct,
        Self::Qcow2,
        Self::Nbd,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Memory => "tmpfs",
            Self::Cached => "file, cached",
            Self::Direct => "file, cache=none",
            Self::Qcow2 => "qcow2 on tmpfs",
            Self::Nbd => "NBD",
        }
    }

    /// Of ours, to be measured.
    pub(crate) fn engines(self) -> &'static [&'static str] {
        match self {
            Self::Memory | Self::Cached => &["auto", "inline", "uring"],
            Self::Null | Self::Direct | Self::Qcow2 | Self::Nbd => &[""],
        }
    }
}

/// The subjects of one medium. Files are removed with it.
pub(crate) struct Stage {
    medium: Medium,
    dir: tempfile::TempDir,
    file: PathBuf,
    cpus: (usize, usize),
    _server: Option<Ended>,
}

impl Stage {
    /// `None` if a program is missing.
    pub(crate) fn new(medium: Medium, cpus: (usize, usize)) -> Option<Self> {
        let dir = match medium {
            Medium::Memory | Medium::Qcow2 => tempfile::tempdir_in("/dev/shm"),
            _ => tempfile::tempdir(),
        };
        let dir = dir.expect("a folder");
        let file = dir.path().join("disk.img");
        let mut stage = Self {
            medium,
            file,
            dir,
            cpus,
            _server: None,
        };
        match medium {
            Medium::Null => {}
            Medium::Memory | Medium::Cached | Medium::Direct => fill(&stage.file),
            Medium::Qcow2 => stage.make_qcow2()?,
            Medium::Nbd => stage._server = Some(stage.serve_nbd()?),
        }
        Some(stage)
    }

    fn make_qcow2(&mut self) -> Option<()> {
        let raw = self.dir.path().join("raw.img");
        fill(&raw);
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-q", "-f", "raw", "-O", "qcow2"]);
        match command.arg(&raw).arg(&self.file).status() {
            Ok(status) => assert!(status.success(), "qemu-img: {status}"),
            Err(error) => {
                eprintln!("qemu-img: {error}");
                return None;
            }
        }
        std::fs::remove_file(raw).expect("removed");
        Some(())
    }

    fn serve_nbd(&self) -> Option<Ended> {
        run_on(self.cpus.1);
        let socket = self.nbd_socket();
        let child = Command::new("nbdkit")
            .args(["--foreground", "--unix"])
            .arg(&socket)
            .args(["memory", &format!("size={DISK}")])
            .stdin(Stdio::null())
            .spawn();
        run_on(self.cpus.0);
        match child {
            Ok(child) => {
                wait_for(&socket);
                Some(Ended(child))
            }
            Err(error) => {
                eprintln!("nbdkit: {error}");
                None
            }
        }
    }

    fn nbd_socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    /// Our disk on it, by `program`, a `vmsg`; another one than ours has a copy of the file, which only one may have open.
    pub(crate) fn ours(&self, engine: &str, program: Option<&str>) -> Ours {
        let copy = self.dir.path().join("copy.img");
        let (file, of) = match program {
            None => (&self.file, "ours"),
            Some(_) => (&copy, "other"),
        };
        if self.file.exists() && !file.exists() {
            std::fs::copy(&self.file, file).expect("room for a copy");
        }
        let program = program.unwrap_or(env!("CARGO_BIN_EXE_vmsg"));
        run_on(self.cpus.1);
        let socket = self.dir.path().join(format!("{engine}-{of}.sock"));
        let file = file.display();
        let disk = match self.medium {
            Medium::Null => None,
            Medium::Memory | Medium::Cached => Some(format!("path={file},engine={engine}")),
            Medium::Direct => Some(format!("path={file},cache=none")),
            Medium::Qcow2 => Some(format!("path={file},format=qcow2")),
            Medium::Nbd => Some(format!(
                "path=nbd+unix:///?socket={}",
                self.nbd_socket().display()
            )),
        };
        let process = match disk {
            None => host::start_null(&socket),
            Some(disk) => host::start_serve(&socket, &disk, program),
        };
        wait_for(&socket);
        run_on(self.cpus.0);
        Ours::new(&socket, process)
    }

    /// The daemon's disk on it.
    pub(crate) fn theirs(&self, aio: &str) -> Option<Theirs> {
        run_on(self.cpus.1);
        let socket = self.dir.path().join(format!("{aio}.vu"));
        let file = self.file.display();
        let cached = format!("filename={file},aio={aio},locking=off");
        let node = match self.medium {
            Medium::Null => format!("driver=null-co,size={DISK},read-zeroes=off"),
            Medium::Memory | Medium::Cached => format!("driver=file,{cached}"),
            Medium::Direct => format!("driver=file,{cached},cache.direct=on"),
            Medium::Qcow2 => {
                format!(
                    "driver=qcow2,file.driver=file,file.filename={file},file.aio={aio},file.locking=off"
                )
            }
            Medium::Nbd => format!(
                "driver=nbd,server.type=unix,server.path={}",
                self.nbd_socket().display()
            ),
        };
        let process = vhost_user::start(&socket, &format!("{node},node-name=disk"));
        run_on(self.cpus.0);
        let process = process?;
        wait_for(&socket);
        Some(Theirs::new(&socket, process))
    }

    /// Whether the daemon can use threads instead of io_uring.
    pub(crate) fn has_threads(&self) -> bool {
        !matches!(self.medium, Medium::Null | Medium::Nbd)
    }

    /// The file, if there is nothing in it but the disk; whether past the page cache.
    pub(crate) fn bare(&self) -> Option<(&Path, bool)> {
        match self.medium {
            Medium::Memory | Medium::Cached => Some((&self.file, false)),
            Medium::Direct => Some((&self.file, true)),
            Medium::Null | Medium::Qcow2 | Medium::Nbd => None,
        }
    }
}

/// Makes a file without holes.
fn fill(file: &Path) {
    let block = vec![0x11; 1 << 20];
    let mut out = std::fs::File::create(file).expect("a file");
    for _ in 0..DISK >> 20 {
        out.write_all(&block).expect("room for the disk");
    }
    out.sync_all().expect("written");
}
