// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests that boot from a disk: root file system, network and entropy from the device host, and more disks of each
//! kind.

use anyhow::{Context, Result};

use super::drives::{Drive, Drives, Via, allocated, make_root, raw_of, sum_of, write_random};
use super::{ALL_CHECKS, EXERCISES, Stage};
use crate::disk::{self, Root};
use crate::guest;
use crate::report::Report;
use crate::scene::Stream;

const DISK: &str = include_str!("../guest/disk.sh");
const WHOLE: &str = include_str!("../guest/disk-whole.sh");

/// MiB of the images.
const READ_ONLY: usize = 8;
const QCOW: usize = 16;
const DATA: u64 = 64;
/// MiB to which the disk grows.
const GROWN: u64 = 96;
/// What is left of an image that was discarded, at most: its file system, or nothing.
const LITTLE: u64 = 8 << 20;

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
    let ro_sum = write_random(&dir.join("ro.img"), READ_ONLY)?;
    let qcow_sum = write_random(&dir.join("plain.img"), QCOW)?;
    disk::qemu_img(
        &dir,
        [
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "plain.img",
            "qcow.qcow2",
        ],
    )?;
    let data = dir.join("data.img");
    disk::write_sparse(&data, DATA << 20)?;
    let drives = vec![
        Drive {
            queues: 2,
            ..Drive::root()
        },
        Drive {
            read_only: true,
            ..Drive::raw("ro", "ro.img")
        },
        Drive {
            format: "qcow2",
            ..Drive::raw("qcow", "qcow.qcow2")
        },
        Drive {
            queues: 2,
            block_size: Some(4096),
            ..Drive::raw("data", "data.img")
        },
    ];
    let drives = Drives::start(stage, via, drives, &[], &[])?;
    let board = drives.board(stage);
    let yes = |is| if is { "yes" } else { "no" }.to_owned();
    let settings = vec![
        ("ROOT_SIZE", (Root::Small.mebibytes() << 20).to_string()),
        ("RO_SIZE", (READ_ONLY << 20).to_string()),
        ("RO_SUM", ro_sum.clone()),
        ("QCOW_SIZE", (QCOW << 20).to_string()),
        ("QCOW_SUM", qcow_sum),
        ("DATA_SIZE", (DATA << 20).to_string()),
        ("GROWN_SIZE", (GROWN << 20).to_string()),
        // QEMU's own disk grows only by a command of its monitor.
        ("RESIZE", yes(stage.vmsg.is_some())),
        ("CACHE", yes(stage.vmsg.is_some())),
    ];
    let script = format!("{EXERCISES}\n{DISK}");
    let guest = drives.guest(stage, "disk", &board, &script, settings)?;
    let machine = stage.kit.machine.name();
    let mut blocks = |stage: &mut Stage, mark: &str, holds: &dyn Fn(u64) -> bool| -> Result<()> {
        guest.mark(&mut stage.scene, mark, ALL_CHECKS)?;
        let bytes = allocated(&data)?;
        report.check(&format!("{machine}/disk/{mark}"), holds(bytes), || {
            format!("the image takes up {bytes} bytes")
        });
        guest.tell(&mut stage.scene, "go on")
    };
    blocks(stage, "written", &|bytes| bytes >= 8 << 20)?;
    blocks(stage, "discarded", &|bytes| bytes < 1 << 20)?;
    blocks(stage, "filled", &|bytes| bytes >= 24 << 20)?;
    blocks(stage, "trimmed", &|bytes| bytes < LITTLE)?;
    if stage.vmsg.is_some() {
        guest.mark(&mut stage.scene, "resize", ALL_CHECKS)?;
        let file = std::fs::File::options().write(true).open(&data)?;
        file.set_len(GROWN << 20)?;
    }
    let console = guest.id;
    stage.finish(guest, report)?;
    let written = stage
        .scene
        .lines(console, Stream::Out)
        .iter()
        .find_map(|line| {
            let (mark, detail) = guest::mark(&line.text)?;
            (mark == "qcow").then(|| detail.to_owned())
        })
        .context("the guest has told no sum of the qcow2 image")?;
    // Who holds the images has ended before they are looked at.
    if let Some(serve) = drives.serve {
        stage.scene.kill(serve, rustix::process::Signal::TERM)?;
    }
    let name = |check: &str| format!("{machine}/disk/{check}");
    report.result(&name("root-clean"), disk::check_ext4(&dir.join("root.img")));
    report.result(&name("data-clean"), disk::check_ext4(&data));
    let sum = sum_of(&dir.join("ro.img"))?;
    report.check(&name("read-only-kept"), sum == ro_sum, || sum);
    let raw = raw_of(&dir, "qcow.qcow2");
    let sum = raw.and_then(|raw| sum_of(&dir.join(raw)));
    report.check(
        &name("qcow-contents"),
        sum.as_ref().is_ok_and(|sum| *sum == written),
        || match &sum {
            Ok(sum) => format!("{sum} instead of {written}"),
            Err(error) => format!("{error:#}"),
        },
    );
    Ok(())
}

/// A whole Debian with systemd.
pub(super) fn whole_vhost_user(stage: &mut Stage, report: &mut Report) -> Result<()> {
    whole(stage, report, Via::VhostUser)
}

/// The same over vfio-user.
pub(super) fn whole_vfio_user(stage: &mut Stage, report: &mut Report) -> Result<()> {
    whole(stage, report, Via::VfioUser)
}

fn whole(stage: &mut Stage, report: &mut Report, via: Via) -> Result<()> {
    let dir = stage.scene.dir().to_owned();
    make_root(stage, Root::Whole)?;
    // The image that people have.
    disk::qemu_img(
        &dir,
        [
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "root.img",
            "root.qcow2",
        ],
    )?;
    std::fs::remove_file(dir.join("root.img"))?;
    let root = Drive {
        format: "qcow2",
        source: "root.qcow2".to_owned(),
        queues: 2,
        ..Drive::root()
    };
    let drives = Drives::start(stage, via, vec![root], &[], &[])?;
    let mut board = drives.board(stage);
    board.ram_mib = 768;
    board
        .words
        .push("net.ifnames=0 systemd.show_status=0 systemd.journald.forward_to_console=0");
    let guest = drives.guest(stage, "whole", &board, WHOLE, Vec::new())?;
    guest.mark(&mut stage.scene, "done", ALL_CHECKS)?;
    stage
        .scene
        .wait_end(guest.id, super::STEP)
        .context("the guest does not shut down")?;
    let checks = guest.checks(&stage.scene);
    anyhow::ensure!(!checks.is_empty(), "the guest has checked nothing");
    for check in checks {
        report.add(check);
    }
    if let Some(serve) = drives.serve {
        stage.scene.kill(serve, rustix::process::Signal::TERM)?;
    }
    let name = format!("{}/disk-whole/root-clean", stage.kit.machine.name());
    let clean = raw_of(&dir, "root.qcow2").and_then(|raw| disk::check_ext4(&dir.join(raw)));
    report.result(&name, clean);
    Ok(())
}
