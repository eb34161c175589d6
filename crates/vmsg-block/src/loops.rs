// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Loop devices: the kernel reads and writes the file behind one, and takes no lock for that. What is known of them stands in /sys
//! (Documentation/ABI/testing/sysfs-block, drivers/block/loop.c).

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Stat};

use crate::in_use::Identity;

/// As many devices may be on each other.
const DEEP: usize = 8;

/// The loop device over a file, if one is known: one that writes, if there are several.
pub(crate) fn over(image: Identity) -> Option<Loop> {
    let mut found = None;
    for entry in fs::read_dir("/sys/block").ok()?.flatten() {
        let about = entry.path();
        let Some(file) = behind(&about) else {
            continue;
        };
        let same =
            fs::metadata(file).is_ok_and(|file| Identity::File(file.dev(), file.ino()) == image);
        if !same {
            continue;
        }
        let text = fs::read_to_string(about.join("ro"));
        let this = Loop {
            device: Path::new("/dev").join(entry.file_name()),
            writes: text.is_ok_and(|text| text.trim() == "0"),
        };
        if this.writes {
            return Some(this);
        }
        found = Some(this);
    }
    found
}

/// A loop device.
#[derive(Debug)]
pub(crate) struct Loop {
    pub(crate) device: PathBuf,
    pub(crate) writes: bool,
}

/// The files that the contents of a block device are in, as far as known: it may be a loop device, a part of one, or another device
/// on one.
pub(crate) fn below(stat: &Stat) -> Vec<PathBuf> {
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice {
        return Vec::new();
    }
    let (major, minor) = (
        rustix::fs::major(stat.st_rdev),
        rustix::fs::minor(stat.st_rdev),
    );
    let mut files = Vec::new();
    look_below(
        Path::new(&format!("/sys/dev/block/{major}:{minor}")),
        DEEP,
        &mut files,
    );
    files
}

fn look_below(about: &Path, deep: usize, files: &mut Vec<PathBuf>) {
    // A partition has nothing of its own.
    let whole = if about.join("partition").exists() {
        about.join("..")
    } else {
        about.to_owned()
    };
    files.extend(behind(&whole));
    if deep == 0 {
        return;
    }
    let slaves = fs::read_dir(whole.join("slaves")).into_iter().flatten();
    for slave in slaves.flatten() {
        look_below(&slave.path(), deep - 1, files);
    }
}

/// The file behind the device that a directory of /sys is about.
fn behind(about: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(about.join("loop/backing_file")).ok()?;
    Some(PathBuf::from(text.strip_suffix('\n').unwrap_or(&text)))
}
