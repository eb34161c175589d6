// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest whose root disk is that of a vhost-user daemon, behind the bridge; the daemon and the device host are killed
//! while the guest does nothing, and it goes on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::drives::{Drive, Drives, Via, make_root};
use super::{ALL_CHECKS, EXERCISES, STEP, Stage};
use crate::disk::{self, Root};
use crate::kit::in_path;
use crate::report::Report;
use crate::scene::{Id, Line, Scene, Stream};

const SCRIPT: &str = include_str!("../guest/disk-daemon.sh");
/// What the daemon listens on.
const SOCKET: &str = "qsd.sock";
/// The serial number that the daemon gives its disk.
const SERIAL: &str = "vhost_user_blk";
const QUEUES: u32 = 2;
/// What the proxy says when a device goes on with another device host.
const READY: &str = "the device is ready";

/// Over vhost-user.
pub(super) fn vhost_user(stage: &mut Stage, report: &mut Report) -> Result<()> {
    play(stage, report, Via::VhostUser)
}

/// Over vfio-user.
pub(super) fn vfio_user(stage: &mut Stage, report: &mut Report) -> Result<()> {
    play(stage, report, Via::VfioUser)
}

fn play(stage: &mut Stage, report: &mut Report, via: Via) -> Result<()> {
    let dir = stage.scene.dir().to_owned();
    make_root(stage, Root::Small)?;
    let mut daemon = start_daemon(&mut stage.scene, "daemon", &dir)?;
    let root = Drive {
        queues: QUEUES,
        daemon: Some(SOCKET),
        ..Drive::root()
    };
    let mut drives = Drives::start(stage, via, vec![root], &[], &[])?;
    let board = drives.board(stage);
    let script = format!("{EXERCISES}\n{SCRIPT}");
    let settings = vec![("ROOT", SERIAL.to_owned())];
    let guest = drives.guest(stage, "daemon-disk", &board, &script, settings)?;

    for who in ["daemon", "host", "both"] {
        guest.mark(&mut stage.scene, &format!("kill-{who}"), ALL_CHECKS)?;
        let begun = stage.scene.now();
        let again = format!("daemon-{who}");
        match who {
            "daemon" => {
                stage.scene.kill(daemon, Signal::KILL)?;
                let serve = drives.serve.context("this test needs vmsg")?;
                let gone = "the daemon is gone";
                let noticed =
                    |line: &Line| (line.at > begun && line.text.contains(gone)).then_some(());
                stage
                    .scene
                    .expect((serve, Stream::Err), gone, STEP, noticed)?;
                // What the guest wants meanwhile waits.
                guest.tell(&mut stage.scene, "killed")?;
                daemon = start_daemon(&mut stage.scene, &again, &dir)?;
                continue;
            }
            "host" => {}
            _ => stage.scene.kill(daemon, Signal::KILL)?,
        }
        if let Some(serve) = drives.serve.take() {
            stage.scene.kill(serve, Signal::KILL)?;
        }
        // The device host comes first, and waits for the daemon.
        drives.serve_again(stage)?;
        if who == "both" {
            daemon = start_daemon(&mut stage.scene, &again, &dir)?;
        }
        // A daemon without a record of what is in flight goes on only if the guest wants nothing before.
        drives.proxy_says(stage, disk::ROOT_SERIAL, READY, begun)?;
        guest.tell(&mut stage.scene, "killed")?;
    }
    stage.finish(guest, report)?;
    if let Some(serve) = drives.serve {
        stage.scene.kill(serve, Signal::TERM)?;
    }
    stage.scene.kill(daemon, Signal::TERM)?;
    let clean = disk::check_ext4(&dir.join("root.img"));
    let name = format!("{}/daemon-disk/root-clean", stage.kit.machine.name());
    report.result(&name, clean);
    Ok(())
}

/// Starts a daemon with the root disk and waits until it listens.
fn start_daemon(scene: &mut Scene, name: &str, dir: &Path) -> Result<Id> {
    let _ = fs::remove_file(dir.join(SOCKET));
    let mut command = Command::new(storage_daemon()?);
    command.args([
        "--blockdev",
        "driver=file,node-name=root,filename=root.img",
        "--export",
        &format!(
            "type=vhost-user-blk,id=root,node-name=root,writable=on,num-queues={QUEUES},\
             addr.type=unix,addr.path={SOCKET}"
        ),
    ]);
    let id = scene.start(name, &command)?;
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

/// QEMU's daemon for disks.
pub(super) fn storage_daemon() -> Result<PathBuf> {
    in_path("qemu-storage-daemon")
        .context("qemu-storage-daemon is missing: apt install qemu-system-common")
}
