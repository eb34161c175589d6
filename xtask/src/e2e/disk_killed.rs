// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest writes on its disks while the other side is killed: everything of which it was told that it is on the disk is
//! there afterwards, and the file systems are whole.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::drives::{Drive, Drives, Via, make_root, raw_of, sum_of};
use super::{STEP, Stage};
use crate::disk::{self, Root};
use crate::guest::{self, Guest};
use crate::report::Report;
use crate::scene::{Line, Stream};
use crate::secret;

const SCRIPT: &str = include_str!("../guest/disk-killed.sh");
/// MiB of the disks that are written on.
const SIZE: u64 = 256;
/// Longest time from a kill until something is on the disk again.
const BACK: Duration = Duration::from_secs(60);
/// The kernel tells what it has to say of disks on the console too.
const LOUD: &str = "loglevel=4";

/// The device host, over vhost-user.
pub(super) fn vhost_user(stage: &mut Stage, report: &mut Report) -> Result<()> {
    device_host(stage, report, Via::VhostUser)
}

/// The device host, over vfio-user.
pub(super) fn vfio_user(stage: &mut Stage, report: &mut Report) -> Result<()> {
    device_host(stage, report, Via::VfioUser)
}

/// The guest itself.
pub(super) fn guest_killed(stage: &mut Stage, report: &mut Report) -> Result<()> {
    pulled(stage, report, Via::VhostUser)
}

/// The guest itself, over vfio-user.
pub(super) fn guest_killed_vfio_user(stage: &mut Stage, report: &mut Report) -> Result<()> {
    pulled(stage, report, Via::VfioUser)
}

/// A guest that writes.
fn start(stage: &mut Stage, via: Via) -> Result<(Drives, Guest)> {
    let dir = stage.scene.dir().to_owned();
    make_root(stage, Root::Small)?;
    disk::write_sparse(&dir.join("raw.img"), SIZE << 20)?;
    let size = format!("{SIZE}M");
    disk::qemu_img(&dir, ["create", "-q", "-f", "qcow2", "qcow.qcow2", &size])?;
    let drives = vec![
        Drive::root(),
        Drive {
            queues: 2,
            ..Drive::raw("raw", "raw.img")
        },
        Drive {
            format: "qcow2",
            ..Drive::raw("qcow", "qcow.qcow2")
        },
    ];
    let drives = Drives::start(stage, via, drives, &[], &[])?;
    let mut board = drives.board(stage);
    board.words.push(LOUD);
    let guest = drives.guest(stage, "writer", &board, SCRIPT, Vec::new())?;
    guest.mark(&mut stage.scene, "under-way", STEP)?;
    Ok((drives, guest))
}

/// Waits until some more files are on their disks, and then for a moment of any length.
fn at_random(stage: &mut Stage, guest: &Guest) -> Result<()> {
    let random = secret::random()?;
    let ready = stage.scene.now();
    for _ in 0..=random[0] % 4 {
        guest.expect(&mut stage.scene, "a file on its disk", BACK, |line| {
            (synced(line).is_some() && line.at > ready).then_some(())
        })?;
    }
    // Whatever happens at this moment is what is wanted: there is nothing to wait for.
    thread::sleep(Duration::from_micros(
        u64::from(u16::from_le_bytes([random[1], random[2]])) * 4,
    ));
    Ok(())
}

fn device_host(stage: &mut Stage, report: &mut Report, via: Via) -> Result<()> {
    let kills = if stage.full { 50 } else { 5 };
    let (mut drives, guest) = start(stage, via)?;
    let mut longest = Duration::ZERO;
    for n in 1..=kills {
        at_random(stage, &guest).with_context(|| format!("before kill {n}"))?;
        let begun = stage.scene.now();
        if let Some(serve) = drives.serve.take() {
            stage.scene.kill(serve, Signal::KILL)?;
            drives.serve_again(stage)?;
        }
        let back = guest
            .expect(&mut stage.scene, "a file on its disk", BACK, |line| {
                (synced(line).is_some() && line.at > begun).then_some(line.at)
            })
            .with_context(|| format!("after kill {n}"))?;
        longest = longest.max(back - begun);
    }
    guest.tell(&mut stage.scene, "that is all")?;
    let console = guest.id;
    stage.finish(guest, report)?;
    let lines = stage.scene.lines(console, Stream::Out).to_vec();
    let written = lines.iter().filter(|line| synced(line).is_some()).count();
    println!(
        "      {kills} kills: {written} files written, at most {longest:.2?} from a kill to the next file on a disk"
    );
    if let Some(serve) = drives.serve {
        stage.scene.kill(serve, Signal::TERM)?;
    }
    look(stage, report, &expected(&lines), Power::Kept)
}

fn pulled(stage: &mut Stage, report: &mut Report, via: Via) -> Result<()> {
    let (drives, guest) = start(stage, via)?;
    for _ in 0..3 {
        at_random(stage, &guest)?;
    }
    stage.scene.kill(guest.id, Signal::KILL)?;
    stage.scene.wait_end(guest.id, STEP)?;
    let lines = stage.scene.lines(guest.id, Stream::Out).to_vec();
    // The images can be looked at when nobody else holds them.
    if let Some(serve) = drives.serve {
        stage.scene.kill(serve, Signal::TERM)?;
    }
    look(stage, report, &expected(&lines), Power::Failed)
}

/// What the guest's machine went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Power {
    /// It was shut down.
    Kept,
    /// It stopped in the middle.
    Failed,
}

/// Looks at the images: their own format, the file systems, and all files.
fn look(
    stage: &Stage,
    report: &mut Report,
    expected: &BTreeMap<String, String>,
    power: Power,
) -> Result<()> {
    let dir = stage.scene.dir();
    let machine = stage.kit.machine.name();
    for (disk, image) in [
        ("raw", Ok("raw.img".to_owned())),
        ("qcow", raw_of(dir, "qcow.qcow2")),
    ] {
        let name = |check: &str| format!("{machine}/disk-killed/{disk}-{check}");
        let image = match image {
            Ok(image) => dir.join(image),
            Err(error) => {
                report.result(&name("image"), Err(error));
                continue;
            }
        };
        if power == Power::Failed {
            report.result(&name("journal"), disk::replay_journal(&image));
        }
        report.result(&name("clean"), disk::check_ext4(&image));
        report.result(&name("files"), files(dir, disk, &image, expected));
    }
    if power == Power::Failed {
        let root = dir.join("root.img");
        let clean = disk::replay_journal(&root).and_then(|()| disk::check_ext4(&root));
        report.result(&format!("{machine}/disk-killed/root-clean"), clean);
    } else {
        let clean = disk::check_ext4(&dir.join("root.img"));
        report.result(&format!("{machine}/disk-killed/root-clean"), clean);
    }
    Ok(())
}

/// All files that must be on `disk` are there with their contents.
fn files(dir: &Path, disk: &str, image: &Path, expected: &BTreeMap<String, String>) -> Result<()> {
    let dump = dir.join(format!("{disk}.files"));
    disk::dump_ext4(image, &dump)?;
    let front = format!("{disk}/");
    let mut count = 0;
    for (file, sum) in expected {
        if let Some(name) = file.strip_prefix(&front) {
            let found = sum_of(&dump.join(name)).with_context(|| format!("{file} is lost"))?;
            ensure!(found == *sum, "{file} has the sum {found} instead of {sum}");
            count += 1;
        }
    }
    ensure!(count > 0, "no file of {disk} was told of");
    Ok(std::fs::remove_dir_all(dump)?)
}

/// A file that is on its disk, and its SHA-256.
fn synced(line: &Line) -> Option<(&str, &str)> {
    let (mark, detail) = guest::mark(&line.text)?;
    let (file, sum) = detail.split_once(' ')?;
    (mark == "synced" && sum.len() == 64).then_some((file, sum))
}

/// The files that must be there after these lines of the guest: those that are on their disks, without those whose end
/// was announced.
fn expected(lines: &[Line]) -> BTreeMap<String, String> {
    let mut expected = BTreeMap::new();
    for line in lines {
        if let Some((file, sum)) = synced(line) {
            expected.insert(file.to_owned(), sum.to_owned());
        } else if let Some(("removed", file)) = guest::mark(&line.text) {
            expected.remove(file);
        }
    }
    expected
}

#[cfg(test)]
#[path = "disk_killed_test.rs"]
mod tests;
