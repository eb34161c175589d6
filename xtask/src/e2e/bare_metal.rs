// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A machine without any operating system that reads a disk of a device host over shared memory: the example of `vmsg-driver`.

use std::fs;

use anyhow::{Context, Result, bail, ensure};

use super::{STEP, Stage};
use crate::machine::Machine;
use crate::no_std;
use crate::report::Report;
use crate::scene::Stream;

/// The machine's memory, which the device host finds by this file.
const RAM: &str = "ram";
const RAM_BYTES: u64 = 64 << 20;
const SOCKET: &str = "ivshmem.sock";
const DISK: &str = "disk.img";
/// Bytes of the disk, and how many of them the program reads.
const DISK_BYTES: usize = 3 << 20;
const READ: usize = 1 << 20;

/// Boots it and looks at what it has read.
pub(super) fn reads_a_disk(stage: &mut Stage, report: &mut Report) -> Result<()> {
    if stage.kit.machine != Machine::Arm64 {
        bail!("the program is for arm64 only");
    }
    let Some(program) = no_std::bare_metal()? else {
        println!(
            "skip  arm64/bare-metal: needs `rustup target add {}`",
            no_std::BARE_METAL
        );
        return Ok(());
    };
    let dir = stage.scene.dir().to_owned();
    fs::File::create(dir.join(RAM))?.set_len(RAM_BYTES)?;
    let disk: Vec<u8> = (0..=250).cycle().step_by(7).take(DISK_BYTES).collect();
    fs::write(dir.join(DISK), &disk)?;

    let vmsg = stage.vmsg()?;
    let bus =
        format!("ivshmem,listen={SOCKET},layout=amp,memory=known,ram={RAM},mem-offset=0x40000000");
    let devices = ["rng", &format!("blk,path={DISK}")];
    vmsg.serve_on(&mut stage.scene, "serve", &bus, &devices)?;

    let mut qemu = stage.kit.qemu.command()?;
    let memory = format!("memory-backend-file,id=ram,mem-path={RAM},size={RAM_BYTES},share=on");
    qemu.args(["-M", "virt,highmem=off,memory-backend=ram"])
        .args(["-cpu", "cortex-a72", "-m", "64M", "-object", &memory])
        .args(["-chardev", &format!("socket,path={SOCKET},id=bus")])
        .args(["-device", "ivshmem-doorbell,chardev=bus,vectors=1"])
        .arg("-kernel")
        .arg(&program)
        .args(["-nodefaults", "-display", "none", "-serial", "stdio"]);
    let machine = stage.scene.start("machine", &qemu)?;
    let status = stage.scene.wait_end(machine, STEP)?;
    let lines = stage.scene.lines(machine, Stream::Out).iter();
    let text: Vec<&str> = lines.map(|line| line.text.trim_end()).collect();
    let text = text.join("\n");
    ensure!(status.success(), "{status}: {text}");

    let sum: u64 = disk[..READ].iter().map(|&byte| u64::from(byte)).sum();
    let begin = format!("{:02x?}", disk.get(..16).context("long enough")?);
    for (name, wanted) in [
        (
            "first-sector",
            format!("{DISK_BYTES} bytes, which begin with {begin}"),
        ),
        ("several-at-once", format!("their sum is {sum}")),
        ("done", "done".to_owned()),
    ] {
        report.check(
            &format!("arm64/bare-metal/{name}"),
            text.contains(&wanted),
            || format!("no {wanted:?} in {text}"),
        );
    }
    Ok(())
}
