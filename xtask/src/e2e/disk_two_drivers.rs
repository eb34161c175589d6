// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same disks driven in turn by the drivers of the `virtio-drivers` crate, without any machine, and by Linux in a
//! guest: each finds what the other has written, and the images are whole each time.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::drives::{Drive, Drives, Via, make_root, raw_of, sum_of};
use super::{STEP, Stage};
use crate::disk::{self, Root};
use crate::guest;
use crate::report::Report;
use crate::scene::Stream;

const SCRIPT: &str = include_str!("../guest/disk-two-drivers.sh");
/// MiB of the disks: as many as the example reads and writes.
const SIZE: u64 = 16;
/// The bus of the device host that the example drives. The guest's proxy has another one.
const BUS: &str = "unix,path=drivers.sock";
/// The disks, and the variable in which the guest finds the sum of what is on them.
const DISKS: [(&str, &str); 2] = [("raw", "RAW_SUM"), ("qcow", "QCOW_SUM")];

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
    let machine = stage.kit.machine.name();
    make_root(stage, Root::Small)?;
    disk::write_sparse(&dir.join("raw.img"), SIZE << 20)?;
    let size = format!("{SIZE}M");
    disk::qemu_img(&dir, ["create", "-q", "-f", "qcow2", "qcow.qcow2", &size])?;
    let disks = [
        Drive::raw(DISKS[0].0, "raw.img"),
        Drive {
            format: "qcow2",
            ..Drive::raw(DISKS[1].0, "qcow.qcow2")
        },
    ];
    let mut all = vec![Drive::root()];
    all.extend(disks.clone());
    let example = stage.vmsg()?.example("virtio_drivers")?;
    let mut drives: Option<Drives> = None;
    let rounds = if stage.short { 1 } else { 2 };
    for round in 1..=rounds {
        let name = |check: &str| format!("{machine}/two-drivers/{round}-{check}");
        // The crate's driver writes, and reads back.
        let written = drive(stage, &disks, &example, round, true)?;
        report.result(&name("check-1"), images(&dir, &written));

        // Linux reads that, and writes.
        match &mut drives {
            Some(drives) => drives.serve_again(stage)?,
            None => drives = Some(Drives::start(stage, via, all.clone(), &[], &[])?),
        }
        let drives = drives.as_mut().expect("started just now");
        let board = drives.board(stage);
        let sums = DISKS.iter().zip(&written);
        let settings = sums.map(|((_, name), sum)| (*name, sum.clone())).collect();
        let guest = drives.guest(stage, &format!("linux-{round}"), &board, SCRIPT, settings)?;
        let console = guest.id;
        stage.finish(guest, report)?;
        let lines = stage.scene.lines(console, Stream::Out);
        let told = |disk: &str| {
            let mut marks = lines.iter().filter_map(|line| guest::mark(&line.text));
            let sum = marks.find_map(|(mark, sum)| (mark == disk).then(|| sum.to_owned()));
            sum.with_context(|| format!("the guest has told no sum of {disk}"))
        };
        let changed = DISKS.iter().map(|(disk, _)| told(disk));
        let changed = changed.collect::<Result<Vec<_>>>()?;
        if let Some(serve) = drives.serve.take() {
            stage.scene.kill(serve, Signal::TERM)?;
        }
        report.check(&name("linux-writes"), changed != written, || {
            "the disks are as they were".to_owned()
        });
        report.result(&name("check-2"), images(&dir, &changed));

        // The crate's driver reads that.
        let found = drive(stage, &disks, &example, round, false)?;
        report.check(&name("drivers-read"), found == changed, || {
            format!("{found:?} instead of {changed:?}")
        });
        report.result(&name("check-3"), images(&dir, &changed));
    }
    let clean = disk::check_ext4(&dir.join("root.img"));
    report.result(&format!("{machine}/two-drivers/root-clean"), clean);
    Ok(())
}

/// Lets the example drive the disks, which it may fill with the pattern of this round, and gives the SHA-256 of each.
fn drive(
    stage: &mut Stage,
    disks: &[Drive],
    example: &Path,
    round: u64,
    fill: bool,
) -> Result<Vec<String>> {
    let devices: Vec<String> = disks.iter().map(Drive::device).collect();
    let mut options = vec![("--bus", BUS)];
    options.extend(devices.iter().map(|device| ("--device", device.as_str())));
    let name = format!("{}-{round}", if fill { "fill" } else { "read" });
    let vmsg = stage.vmsg()?;
    let scene = &mut stage.scene;
    let serve = vmsg.run(scene, &format!("{name}-serve"), "serve", &options, 1)?;
    let mut command = Command::new(example);
    command.args(["--bus", BUS]);
    if fill {
        command.args(["--fill", &round.to_string()]);
    }
    let id = scene.start(&name, &command)?;
    let status = scene.wait_end(id, STEP)?;
    let lines = scene.lines(id, Stream::Out).iter();
    let sums: Vec<String> = lines
        .filter_map(|line| line.text.trim().strip_prefix("their SHA-256 is "))
        .map(str::to_owned)
        .collect();
    ensure!(status.success(), "{name}: {status}");
    ensure!(sums.len() == disks.len(), "{name} tells the sums {sums:?}");
    scene.kill(serve, Signal::TERM)?;
    Ok(sums)
}

/// That the images are whole, and have this in them.
fn images(dir: &Path, sums: &[String]) -> Result<()> {
    let files = ["raw.img".to_owned(), raw_of(dir, "qcow.qcow2")?];
    for (file, sum) in files.iter().zip(sums) {
        let found = sum_of(&dir.join(file))?;
        ensure!(found == *sum, "{file} has {found} instead of {sum}");
    }
    Ok(())
}
