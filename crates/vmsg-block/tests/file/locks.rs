// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU's tools and disks of ours keep away from each other's images.

use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use vmsg_block::{FileConfig, FileDisk, Holder, LockError, OpenError, Qcow2Config, Qcow2Disk};

use super::ground::{directory, sparse};
use super::held::has_tool;

const MIB: u64 = 1 << 20;

fn config(path: &Path, read_only: bool) -> FileConfig {
    FileConfig {
        read_only,
        patience: Duration::ZERO,
        ..FileConfig::new(path)
    }
}

/// A program that another test starts has all that this process has open, for a moment.
fn patient(path: &Path) -> FileConfig {
    FileConfig {
        patience: Duration::from_secs(60),
        ..config(path, false)
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn tool(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().expect("it runs")
}

fn is_refused_for_a_lock(output: &Output) -> bool {
    let why = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() || why.contains("lock"), "{why}");
    !output.status.success()
}

/// qemu-storage-daemon with an image, as a virtual machine's QEMU has it.
struct Daemon(Child);

impl Daemon {
    /// Starts one; what it says if it ends at once.
    fn new(image: &Path, writes: bool) -> Result<Self, String> {
        let socket = image.with_extension("nbd");
        let _ = std::fs::remove_file(&socket);
        let node = format!(
            "driver=file,node-name=n,filename={},locking=on,read-only={}",
            text(image),
            if writes { "off" } else { "on" }
        );
        let server = format!("addr.type=unix,addr.path={}", text(&socket));
        let writable = if writes { "on" } else { "off" };
        let export = format!("type=nbd,id=e,node-name=n,name=e,writable={writable}");
        let mut child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &node, "--nbd-server", &server])
            .args(["--export", &export])
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            if child.try_wait().expect("a child").is_some() {
                let mut why = String::new();
                let mut stderr = child.stderr.take().expect("piped");
                stderr.read_to_string(&mut why).expect("text");
                return Err(why);
            }
            // Its export is there as soon as its socket listens, or a moment later; it has the locks before.
            if std::os::unix::net::UnixStream::connect(&socket).is_ok() && has_export(&socket) {
                return Ok(Self(child));
            }
            assert!(Instant::now() < end, "it neither listens nor ends");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn has_export(socket: &Path) -> bool {
    let uri = format!("nbd+unix:///e?socket={}", text(socket));
    tool("qemu-img", &["info", "-f", "raw", &uri])
        .status
        .success()
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn has_tools() -> bool {
    has_tool("qemu-img") && has_tool("qemu-io") && has_tool("qemu-storage-daemon")
}

#[test]
fn what_is_written_here_is_not_written_by_qemu() {
    if !has_tools() {
        return;
    }
    let dir = directory();
    let path = sparse(dir.path(), MIB);
    let name = text(&path);
    let disk = FileDisk::open(&config(&path, false)).expect("a disk");
    for (program, args) in [
        ("qemu-img", &["resize", "-f", "raw", name, "2M"][..]),
        ("qemu-io", &["-f", "raw", "-c", "write 0 512", name]),
    ] {
        assert!(is_refused_for_a_lock(&tool(program, args)), "{args:?}");
    }
    for writes in [false, true] {
        let why = Daemon::new(&path, writes).err().expect("it ends");
        assert!(why.contains("lock"), "{why}");
    }
    drop(disk);
    let args = ["-f", "raw", "-c", "write 0 512", name];
    assert!(!is_refused_for_a_lock(&tool("qemu-io", &args)));
}

/// QEMU reads what is in a raw image beside one who writes, and not what is in others, whose tables would change under it.
#[test]
fn an_image_with_tables_that_is_written_here_is_not_even_read_by_qemu() {
    if !has_tools() {
        return;
    }
    let dir = directory();
    let path = dir.path().join("disk.qcow2");
    let create = ["create", "-q", "-f", "qcow2", text(&path), "1M"];
    assert!(tool("qemu-img", &create).status.success());
    let info = ["info", "-f", "qcow2", text(&path)];
    let disk = Qcow2Disk::open(&Qcow2Config::new(&path)).expect("a disk");
    assert!(is_refused_for_a_lock(&tool("qemu-img", &info)));
    drop(disk);
    assert!(!is_refused_for_a_lock(&tool("qemu-img", &info)));
}

#[test]
fn what_is_read_here_is_read_by_qemu_and_not_written() {
    if !has_tools() {
        return;
    }
    let dir = directory();
    let path = sparse(dir.path(), MIB);
    let name = text(&path);
    let readers = [(); 2].map(|()| FileDisk::open(&config(&path, true)).expect("a disk"));
    let daemon = Daemon::new(&path, false).expect("another reader");
    let info = tool("qemu-img", &["info", "-f", "raw", name]);
    assert!(info.status.success(), "{info:?}");
    drop(daemon);
    let write = ["-f", "raw", "-c", "write 0 512", name];
    assert!(is_refused_for_a_lock(&tool("qemu-io", &write)));
    assert!(Daemon::new(&path, true).is_err());
    drop(readers);
    assert!(Daemon::new(&path, true).is_ok());
}

#[test]
fn what_qemu_has_is_not_had_here_and_its_process_is_named() {
    if !has_tools() {
        return;
    }
    let dir = directory();
    let path = sparse(dir.path(), MIB);
    for writes in [false, true] {
        let daemon = Daemon::new(&path, writes).expect("it runs");
        for read_only in [false, true] {
            let opened = FileDisk::open(&config(&path, read_only));
            if read_only && !writes {
                assert!(opened.is_ok(), "readers stand each other: {opened:?}");
                continue;
            }
            let Err(OpenError::InUse { source, .. }) = opened else {
                panic!("{opened:?}");
            };
            let LockError::Held(Holder::Process { pid, name }) = source else {
                panic!("{source}");
            };
            assert_eq!(pid, daemon.0.id());
            assert!(name.starts_with("qemu-storage"), "{name}");
        }
        drop(daemon);
        assert!(FileDisk::open(&patient(&path)).is_ok(), "free again");
    }
}

#[test]
fn images_behind_others_are_locked_too() {
    if !has_tools() {
        return;
    }
    let dir = directory();
    let below = sparse(dir.path(), MIB);
    let above = dir.path().join("above.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    let create = [&create[..], &[text(&below), text(&above)]].concat();
    assert!(tool("qemu-img", &create).status.success());
    let config_of = |path: &Path| Qcow2Config {
        backing: true,
        patience: Duration::from_secs(60),
        ..Qcow2Config::new(path)
    };
    let disk = Qcow2Disk::open(&config_of(&above)).expect("a disk");
    let write = ["-f", "raw", "-c", "write 0 512", text(&below)];
    assert!(is_refused_for_a_lock(&tool("qemu-io", &write)));
    let begun = Instant::now();
    for path in [&above, &below] {
        let opened = FileDisk::open(&patient(path));
        let named = matches!(
            opened,
            Err(OpenError::InUse {
                source: LockError::Held(Holder::Ourselves),
                ..
            })
        );
        assert!(named, "{opened:?}");
    }
    assert!(begun.elapsed() < Duration::from_secs(30), "at once");
    drop(disk);
    assert!(FileDisk::open(&patient(&below)).is_ok());
}

/// A disk that is ending is waited for by one of the same process.
#[test]
fn an_image_of_this_process_that_is_just_ending_is_waited_for() {
    let dir = directory();
    let path = sparse(dir.path(), MIB);
    let disk = FileDisk::open(&config(&path, false)).expect("a disk");
    // The same open file once more: as when something of a disk that has ended is still under way.
    let fds = std::fs::read_dir("/proc/self/fd").expect("there").flatten();
    let number = fds
        .filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|link| link == path))
        .find_map(|fd| fd.file_name().to_str()?.parse().ok());
    let rest = duplicate(number.expect("it is open"));
    drop(disk);
    assert!(FileDisk::open(&config(&path, false)).is_err(), "not yet");
    std::thread::scope(|scope| {
        let next = scope.spawn(|| FileDisk::open(&patient(&path)));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!next.is_finished());
        drop(rest);
        assert!(next.join().expect("no panic").is_ok());
    });
}

/// A duplicate of a descriptor of this process, without unsafe code.
fn duplicate(number: i32) -> std::os::fd::OwnedFd {
    use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
    let this = pidfd_open(getpid(), PidfdFlags::empty()).expect("this process");
    pidfd_getfd(&this, number, PidfdGetfdFlags::empty()).expect("a duplicate")
}
