// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks that fail: the guest is told of an error for each request that cannot be done, and the log has the reason.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;

use super::disk_daemon::storage_daemon;
use super::drives::{Drive, Drives, Via, make_root};
use super::{ALL_CHECKS, EXERCISES, STEP, Stage};
use crate::disk::{self, Root};
use crate::kit::has_tool;
use crate::report::Report;
use crate::scene::{Id, Scene, Stream};

const SCRIPT: &str = include_str!("../guest/disk-errors.sh");
/// MiB of the disks.
const SIZE: u64 = 64;
/// MiB that there are for the one that gets full, in a file system of its own.
const SPACE: u64 = 16;
/// The server's socket, and the file at whose sight it fails to read.
const SOCKET: &str = "server.sock";
const BROKEN: &str = "broken";

/// Over vhost-user.
pub(super) fn vhost_user(stage: &mut Stage, report: &mut Report) -> Result<()> {
    play(stage, report, Via::VhostUser)
}

/// Over vfio-user.
pub(super) fn vfio_user(stage: &mut Stage, report: &mut Report) -> Result<()> {
    play(stage, report, Via::VfioUser)
}

fn play(stage: &mut Stage, report: &mut Report, via: Via) -> Result<()> {
    let machine = stage.kit.machine.name();
    if !has_tool("nbdkit")? {
        println!("skip  {machine}/disk-errors: needs nbdkit");
        return Ok(());
    }
    let dir = stage.scene.dir().to_owned();
    make_root(stage, Root::Small)?;
    disk::write_sparse(&dir.join("nbd.img"), SIZE << 20)?;
    fs::create_dir(dir.join("small"))?;
    let server = serve_nbd(&mut stage.scene, "nbd", &dir)?;
    let drives = vec![
        Drive::root(),
        Drive::raw("full", "small/full.img"),
        Drive::raw("nbd", &format!("nbd+unix:///?socket={SOCKET}")),
    ];
    let prepared = format!(
        "mount -t tmpfs -o size={SPACE}m tmpfs small\ntruncate -s {SIZE}M small/full.img\n"
    );
    let drives = Drives::start_after(stage, via, drives, &prepared)?;
    let serve = drives.serve;
    let mut board = drives.board(stage);
    board.may_reboot = true;
    let script = format!("{EXERCISES}\n{SCRIPT}");
    let guest = drives.guest(stage, "errors", &board, &script, Vec::new())?;
    guest.mark(&mut stage.scene, "break", ALL_CHECKS)?;
    fs::write(dir.join(BROKEN), "")?;
    guest.tell(&mut stage.scene, "broken")?;
    guest.mark(&mut stage.scene, "mend", STEP)?;
    fs::remove_file(dir.join(BROKEN))?;
    guest.tell(&mut stage.scene, "mended")?;
    guest.mark(&mut stage.scene, "stop", STEP)?;
    stage.scene.kill(server, Signal::KILL)?;
    guest.tell(&mut stage.scene, "stopped")?;
    let (took, _) = guest.mark(&mut stage.scene, "gone", ALL_CHECKS)?;
    println!("      a read of a disk whose server is gone fails after {took}");
    guest.mark(&mut stage.scene, "start", ALL_CHECKS)?;
    let server = serve_again(&mut stage.scene, &dir)?;
    guest.tell(&mut stage.scene, "started")?;

    guest.mark(&mut stage.scene, "hang", ALL_CHECKS)?;
    stage.scene.signal(server, Signal::STOP)?;
    guest.tell(&mut stage.scene, "hangs")?;
    let (took, _) = guest.mark(&mut stage.scene, "hung", ALL_CHECKS)?;
    println!("      a read of a disk whose server stands still fails after {took}");
    guest.mark(&mut stage.scene, "wake", ALL_CHECKS)?;
    stage.scene.signal(server, Signal::CONT)?;
    guest.tell(&mut stage.scene, "goes on")?;
    guest.mark(&mut stage.scene, "hang-again", ALL_CHECKS)?;
    stage.scene.signal(server, Signal::STOP)?;
    guest.tell(&mut stage.scene, "hangs")?;
    let (_, left) = guest.mark(&mut stage.scene, "rebooting", STEP)?;
    guest.booted(&mut stage.scene)?;
    let back = stage.scene.now();
    println!(
        "      a reboot while a request waits: {:.1?} to the kernel",
        back - left
    );
    stage.scene.signal(server, Signal::CONT)?;
    stage.finish(guest, report)?;
    let Some(serve) = serve else {
        return Ok(());
    };
    for (name, words) in [
        ("full", &["full", "No space left on device"][..]),
        ("broken", &["nbd", "Input/output error"]),
        ("gone", &["nbd", SOCKET]),
        ("hung", &["nbd", "no answer in"]),
    ] {
        let lines = stage.scene.lines(serve, Stream::Err);
        let said = lines
            .iter()
            .any(|line| words.iter().all(|word| line.text.contains(word)));
        report.check(&format!("{machine}/disk-errors/log-{name}"), said, || {
            format!("no line of the device host has {}", words.join(" and "))
        });
    }
    let lines = stage.scene.lines(serve, Stream::Err).len();
    report.check(
        &format!("{machine}/disk-errors/log-short"),
        lines < 40,
        || format!("the device host has written {lines} lines"),
    );
    Ok(())
}

/// Starts an NBD server with a disk that fails to read while there is a file [`BROKEN`].
fn serve_nbd(scene: &mut Scene, name: &str, dir: &Path) -> Result<Id> {
    for file in [SOCKET, "nbd.pid"] {
        let _ = fs::remove_file(dir.join(file));
    }
    let mut command = Command::new("nbdkit");
    command.args([
        "--foreground",
        "--exit-with-parent",
        "--unix",
        SOCKET,
        "--pidfile",
        "nbd.pid",
        "--filter=error",
        "file",
        "file=nbd.img",
        "error=EIO",
        "error-pread-rate=100%",
        &format!("error-file={}", dir.join(BROKEN).display()),
    ]);
    let id = scene.start(name, &command)?;
    // It says nothing when it listens, but for this file.
    let deadline = Instant::now() + STEP;
    while !dir.join("nbd.pid").exists() {
        ensure!(Instant::now() < deadline, "nbdkit does not listen");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(id)
}

/// Starts another server of the same disk: QEMU's, as nbdkit 1.32 now and then fails an assertion when it goes on after
/// a standstill and its client has left.
fn serve_again(scene: &mut Scene, dir: &Path) -> Result<Id> {
    fs::remove_file(dir.join(SOCKET))?;
    let mut command = Command::new(storage_daemon()?);
    command.args([
        "--blockdev",
        "driver=file,node-name=nbd,filename=nbd.img",
        "--nbd-server",
        &format!("addr.type=unix,addr.path={SOCKET},max-connections=0"),
        "--export",
        "type=nbd,id=nbd,node-name=nbd,name=,writable=on",
    ]);
    let id = scene.start("nbd-again", &command)?;
    let deadline = Instant::now() + STEP;
    while !dir.join(SOCKET).exists() {
        ensure!(
            Instant::now() < deadline,
            "qemu-storage-daemon does not listen"
        );
        thread::sleep(Duration::from_millis(10));
    }
    Ok(id)
}
