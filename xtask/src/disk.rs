// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks that guests boot from: an ext4 file system with a small Debian in it, or with a whole one.
//!
//! The files are those of Debian packages that were unpacked, in the layout that Debian has when it is installed
//! (`/bin` is `/usr/bin`); nothing is mounted and nobody has to be root for it. What the guest does is not on the disk:
//! the initial file system brings it along in `/run`, so one image serves all tests.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::kit::{Kit, system_program};
use crate::tree;

/// What the kernel starts in the initial file system: makes the disk the root and hands over.
const ROOT: &str = include_str!("guest/root.sh");
/// The first process on the disk of a small root.
const INIT: &str = include_str!("guest/root-init.sh");
/// What systemd runs on the disk of a whole one.
const SERVICE: &str = include_str!("guest/root.service");
/// What that runs.
const PLAY: &str = include_str!("guest/root-play.sh");

/// The serial number of the disk that is the root.
pub(crate) const ROOT_SERIAL: &str = "root";

/// What is on a root disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Root {
    /// Tools for disks, busybox, and a script as first process.
    Small,
    /// Debian with systemd, udev and all.
    Whole,
}

impl Root {
    /// MiB of its file system.
    pub(crate) fn mebibytes(self) -> u64 {
        match self {
            Self::Small => 192,
            Self::Whole => 768,
        }
    }
}

/// The script of an initial file system that hands over to a root disk, where `script` is run.
pub(crate) fn script(script: &str) -> String {
    ROOT.replace("@SCRIPT@", script)
}

/// Writes an image of a root disk of guests of `kit` to `image`: an ext4 file system without a partition table.
pub(crate) fn write_root(kit: &Kit, root: Root, image: &Path) -> Result<()> {
    let spec = match root {
        Root::Small => tree::disk_root(kit.machine),
        Root::Whole => tree::whole_root(kit.machine),
    };
    let packages = spec.fetch()?;
    let dir = tempfile::tempdir_in(image.parent().context("an image lies in a folder")?)?;
    let to = dir.path();
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    lay_out(packages.root(), to)?;
    fs::copy(&kit.busybox, to.join("usr/bin/busybox"))
        .with_context(|| format!("cannot copy {}", kit.busybox.display()))?;
    match root {
        Root::Small => {
            // Busybox itself, as a shell, prefers its own programs to those on the disk.
            set_link("dash", &to.join("usr/bin/sh"))?;
            write(to, "usr/sbin/init", 0o755, INIT)?;
            // What the initial file system brings along for guests that obey.
            symlink("run/obey", to.join("obey"))?;
        }
        Root::Whole => furnish(to)?,
    }
    make_ext4(to, root.mebibytes(), image)
}

/// Copies unpacked packages as an installed system has them.
fn lay_out(from: &Path, to: &Path) -> Result<()> {
    for dir in [
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "usr/lib64",
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "root",
        "mnt",
        "etc",
        "var",
    ] {
        fs::create_dir_all(to.join(dir))?;
    }
    fs::set_permissions(to.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    for name in ["bin", "sbin", "lib", "lib64"] {
        symlink(format!("usr/{name}"), to.join(name))?;
    }
    for (source, target) in [
        ("usr", "usr"),
        ("etc", "etc"),
        ("var", "var"),
        ("bin", "usr/bin"),
        ("sbin", "usr/sbin"),
        ("lib", "usr/lib"),
        ("lib64", "usr/lib64"),
    ] {
        let source = from.join(source);
        if source.is_dir() && !source.is_symlink() {
            let mut copy = Command::new("cp");
            copy.args(["-a", "--reflink=auto"])
                .arg(source.join("."))
                .arg(to.join(target));
            finish(copy)?;
        }
    }
    for dir in [
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
        "usr/share/info",
    ] {
        let dir = to.join(dir);
        if dir.is_dir() {
            fs::remove_dir_all(dir)?;
        }
    }
    Ok(())
}

/// What installing the packages would have written, as far as systemd asks for it.
fn furnish(to: &Path) -> Result<()> {
    let master = |name: &str| fs::read_to_string(to.join("usr/share/base-passwd").join(name));
    write(
        to,
        "etc/passwd",
        0o644,
        &master("passwd.master").context("no base-passwd")?,
    )?;
    write(
        to,
        "etc/group",
        0o644,
        &master("group.master").context("no base-passwd")?,
    )?;
    write(to, "etc/hostname", 0o644, "disk\n")?;
    write(
        to,
        "etc/machine-id",
        0o444,
        "76d6d7367000400080000000000000d1\n",
    )?;
    write(
        to,
        "etc/fstab",
        0o644,
        "/dev/vda / ext4 defaults,errors=remount-ro 0 1\n",
    )?;
    write(
        to,
        "etc/systemd/network/test.network",
        0o644,
        "[Match]\nMACAddress=52:54:00:76:6d:01\n[Network]\nDHCP=ipv4\n",
    )?;
    set_link("bash", &to.join("usr/bin/sh"))?;
    // A login on the console would take it from who is there already.
    set_link(
        "/dev/null",
        &to.join("etc/systemd/system/serial-getty@.service"),
    )?;
    write(to, "usr/local/bin/play", 0o755, PLAY)?;
    write(to, "etc/systemd/system/play.service", 0o644, SERVICE)?;
    let wanted = to.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wanted)?;
    symlink("../play.service", wanted.join("play.service"))?;
    symlink(
        "/usr/lib/systemd/system/systemd-networkd.service",
        wanted.join("systemd-networkd.service"),
    )?;
    let default = to.join("etc/systemd/system/default.target");
    if !default.exists() {
        symlink("/usr/lib/systemd/system/multi-user.target", default)?;
    }
    Ok(())
}

/// Makes a symbolic link, unless there is something already.
fn set_link(target: &str, path: &Path) -> Result<()> {
    if path.symlink_metadata().is_err() {
        symlink(target, path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    Ok(())
}

/// Makes a file and the folders it lies in.
fn write(root: &Path, name: &str, mode: u32, text: &str) -> Result<()> {
    let path = root.join(name);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

/// Makes an ext4 file system with the files of `tree`, all of them root's.
fn make_ext4(tree: &Path, mebibytes: u64, image: &Path) -> Result<()> {
    let mut command = system_tool("mke2fs")?;
    command
        .args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-E",
            "root_owner=0:0,lazy_itable_init=0",
            "-d",
        ])
        .arg(tree)
        .arg(image)
        .arg(format!("{mebibytes}M"));
    finish(command)
}

/// Makes a file of this size without blocks.
pub(crate) fn write_sparse(image: &Path, bytes: u64) -> Result<()> {
    let file =
        fs::File::create(image).with_context(|| format!("cannot create {}", image.display()))?;
    Ok(file.set_len(bytes)?)
}

/// `qemu-img` with these words in `dir`, to its end.
pub(crate) fn qemu_img<S: AsRef<OsStr>>(
    dir: &Path,
    words: impl IntoIterator<Item = S>,
) -> Result<()> {
    let mut command = system_tool("qemu-img")?;
    command.args(words).current_dir(dir);
    finish(command)
}

/// That the ext4 file system in `image` is clean and whole.
pub(crate) fn check_ext4(image: &Path) -> Result<()> {
    let mut command = system_tool("e2fsck")?;
    command.args(["-f", "-n"]).arg(image);
    finish(command)
}

/// Does what a machine does that starts after its power failed, and no more: the journal is replayed.
pub(crate) fn replay_journal(image: &Path) -> Result<()> {
    let mut command = system_tool("e2fsck")?;
    command.args(["-E", "journal_only", "-y"]).arg(image);
    finish(command)
}

/// Copies everything in the ext4 file system of `image` into the folder `to`.
pub(crate) fn dump_ext4(image: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let mut command = system_tool("debugfs")?;
    command
        .arg("-R")
        .arg(format!("rdump / {}", to.display()))
        .arg(image);
    finish(command)
}

/// The programs that images are made and looked at with, each with its package.
pub(crate) const TOOLS: [(&str, &str); 4] = [
    ("mke2fs", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("qemu-img", "qemu-utils"),
];

fn system_tool(name: &str) -> Result<Command> {
    let path = system_program(name).with_context(|| {
        let package = TOOLS.iter().find(|(tool, _)| *tool == name);
        let package = package.map_or(name, |(_, package)| package);
        format!("{name} is missing: apt install {package}")
    })?;
    Ok(Command::new(path))
}

/// Runs a command to its end; a failure carries what it said.
fn finish(mut command: Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!(
            "{program} failed ({}): {}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
