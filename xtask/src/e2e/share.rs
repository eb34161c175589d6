// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Folders of the host in a guest: virtiofsd behind the bridge to vhost-user daemons. The guest's root is a disk of the
//! device host, which its network and its entropy come from too.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use sha2::{Digest, Sha256};

use super::drives::{Drive, Drives, Via, make_root, sum_of, write_random};
use super::{ALL_CHECKS, EXERCISES, STEP, Stage};
use crate::disk::{self, Root};
use crate::machine::Machine;
use crate::qemu;
use crate::report::Report;
use crate::scene::{Id, Scene};
use crate::secret;
use crate::tree;

const SCRIPT: &str = include_str!("../guest/share.sh");
/// What the daemon listens on, and what QEMU connects to.
const DAEMON: &str = "fsd.sock";
const SOCKET: &str = "fs.sock";
/// MiB of the large file.
const LARGE: usize = 8;
/// Small files.
const MANY: usize = 500;

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
    let machine = stage.kit.machine;
    let shared = dir.join("shared");
    fs::create_dir_all(shared.join("many"))?;
    let large_sum = write_random(&shared.join("large"), LARGE)?;
    fs::set_permissions(shared.join("large"), fs::Permissions::from_mode(0o640))?;
    let mut many = Sha256::new();
    for n in 0..MANY {
        let text = format!("file {n}\n");
        fs::write(shared.join(format!("many/{n:03}")), &text)?;
        many.update(&text);
    }
    let many_sum: String = many.finalize().iter().map(|b| format!("{b:02x}")).collect();
    make_root(stage, Root::Small)?;
    let daemon = start_daemon(&mut stage.scene, "virtiofsd", &dir)?;
    let (device, front) = match via {
        Via::VhostUser => (
            vhost_user_device(machine),
            format!("vhost-user,socket={SOCKET},dev=fs0"),
        ),
        Via::VfioUser => (
            vec!["-device".to_owned(), qemu::vfio_user(SOCKET)],
            format!("vfio-user,socket={SOCKET},dev=fs0"),
        ),
    };
    let bridge = format!("vhost-user,id=fs0,socket={DAEMON},type=fs,tag=shared");
    let mut drives = Drives::start(stage, via, vec![Drive::root()], &[bridge], &[front])?;
    drives.modules.push("virtiofs");
    let mut board = drives.board(stage);
    board.more.extend(device);
    let settings = vec![
        ("LARGE_SUM", large_sum),
        ("MANY_SUM", many_sum),
        ("KILLS", "daemon host".to_owned()),
    ];
    let script = format!(
        "{EXERCISES}
{SCRIPT}"
    );
    let guest = drives.guest(stage, "share", &board, &script, settings)?;
    let (sum, _) = guest.mark(&mut stage.scene, "wrote", ALL_CHECKS)?;
    for (name, file, sum) in [
        ("written", "renamed", sum.as_str()),
        ("fetched", "fetched", stage.server.sha256()),
    ] {
        let found = sum_of(&shared.join(file))?;
        report.check(
            &format!("{}/share/{name}", machine.name()),
            found == sum,
            || format!("{found} instead of {sum}"),
        );
    }
    let token = secret::hex(&secret::random()?[..16]);
    fs::write(shared.join("from-host"), &token)?;
    guest.tell(&mut stage.scene, &token)?;

    guest.mark(&mut stage.scene, "kill-daemon", ALL_CHECKS)?;
    stage.scene.kill(daemon, Signal::KILL)?;
    let daemon = start_daemon(&mut stage.scene, "virtiofsd-again", &dir)?;
    guest.tell(&mut stage.scene, "killed")?;
    guest.mark(&mut stage.scene, "kill-host", ALL_CHECKS)?;
    // It ends with its connection.
    stage.scene.may_end(daemon);
    if let Some(serve) = drives.serve.take() {
        stage.scene.kill(serve, Signal::KILL)?;
        stage
            .scene
            .wait_end(daemon, STEP)
            .context("virtiofsd outlives its connection")?;
        start_daemon(&mut stage.scene, "virtiofsd-last", &dir)?;
        drives.serve_again(stage)?;
    }
    guest.tell(&mut stage.scene, "killed")?;
    stage.finish(guest, report)?;
    if let Some(serve) = drives.serve {
        stage.scene.kill(serve, Signal::TERM)?;
    }
    let clean = disk::check_ext4(&dir.join("root.img"));
    report.result(&format!("{}/share/root-clean", machine.name()), clean);
    Ok(())
}

/// QEMU's device for the folder.
fn vhost_user_device(machine: Machine) -> Vec<String> {
    let device = match machine {
        Machine::X86 => "vhost-user-fs-pci",
        Machine::Arm64 => "vhost-user-fs-device",
    };
    [
        "-chardev",
        &format!("socket,id=fs0,path={SOCKET}"),
        "-device",
        &format!("{device},chardev=fs0,tag=shared"),
    ]
    .map(str::to_owned)
    .into()
}

/// Starts virtiofsd and waits until it listens.
fn start_daemon(scene: &mut Scene, name: &str, dir: &Path) -> Result<Id> {
    let _ = fs::remove_file(dir.join(DAEMON));
    let mut command: Command = tree::virtiofsd().fetch()?.command("virtiofsd")?;
    command.args([
        "--socket-path",
        DAEMON,
        "--shared-dir",
        "shared",
        "--sandbox",
        "none",
        "--cache",
        "auto",
    ]);
    let id = scene
        .start(name, &command)
        .context("cannot start virtiofsd")?;
    let deadline = Instant::now() + STEP;
    while !dir.join(DAEMON).exists() {
        ensure!(Instant::now() < deadline, "virtiofsd does not listen");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(id)
}
