// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the descriptions in `demos/` boot: a kernel, file systems, and the variables that name them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cross;
use crate::disk::{self, Root};
use crate::inner::{self, Hardware, Inside};
use crate::kit::{self, Kit, Qemu};
use crate::lan;
use crate::machine::Machine;
use crate::outer::{self, MESSAGES};
use crate::pair::{Mode, NET_SOCKET, NETWORK, Plan, RNG_SOCKET};
use crate::tree;

/// Options of `guest-files`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Folder for the files; it is made
    dir: PathBuf,
    /// Machine type of the guests
    #[arg(long, value_enum, default_value_t = Machine::X86)]
    machine: Machine,
    /// Also the machines A and B of demos/2b, for which vmsg is built: that takes minutes
    #[arg(long = "2b")]
    machines: bool,
    /// Also a disk with a small Debian, for demos/disk
    #[arg(long)]
    disk: bool,
    #[command(flatten)]
    kit: kit::Options,
}

/// The guests' file system in that folder.
pub(crate) const INITRD: &str = "guest.initrd";

/// Variables of a description.
pub(crate) type Variables = Vec<(&'static str, String)>;

/// Writes the files, and tells what to do with them.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut wanted = options.kit.clone();
    if options.machines {
        wanted.more.trees.push(tree::inner_qemu);
        wanted.more.cross = true;
    }
    if options.disk {
        wanted.more.tools.extend(disk::TOOLS);
        wanted.more.trees.push(tree::disk_root);
    }
    let mut kits = kit::gather(&[options.machine], &wanted)?;
    let kit = kits.pop().expect("one kit for one machine");
    fs::create_dir_all(&options.dir)
        .with_context(|| format!("cannot create {}", options.dir.display()))?;
    let dir = options.dir.canonicalize()?;
    let mut variables = guests(&kit, &dir, false)?;
    if options.machines {
        let program = cross::vmsg(kit.machine)?;
        variables.extend(machines(&kit, &dir, &program, false)?);
    }
    if options.disk {
        variables.extend(disk(&kit, &dir, false)?);
    }
    let mut text =
        String::from("# Of `cargo xtask guest-files`, for the descriptions in demos/.\n");
    for (name, value) in &variables {
        text.push_str(&format!("export {name}={}\n", quoted(value)));
    }
    let file = dir.join("vars");
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    let demo = if options.disk {
        "demos/disk/disk.toml"
    } else {
        "demos/vswitch/vswitch.toml"
    };
    println!(". {}       # then, for one: vmsg up {demo}", file.display());
    Ok(())
}

/// Writes what all descriptions boot. `obeys`: the guests do what they are told; otherwise they have a shell.
pub(crate) fn guests(kit: &Kit, dir: &Path, obeys: bool) -> Result<Variables> {
    let kernel = dir.join("kernel");
    fs::copy(&kit.kernel, &kernel)
        .with_context(|| format!("cannot copy {}", kit.kernel.display()))?;
    let initrd = write(dir, INITRD, &lan::initrd(kit, obeys)?)?;
    Ok(vec![
        ("MACHINE", kit.machine.name().to_owned()),
        ("QEMU", qemu(&kit.qemu, dir)?),
        ("ACCEL", "tcg".to_owned()),
        ("KERNEL", kernel.display().to_string()),
        ("INITRD", initrd),
        ("APPEND", crate::qemu::words(kit.machine)),
        ("FILES", dir.display().to_string()),
    ])
}

/// Writes a disk with a small Debian, and what starts from it.
pub(crate) fn disk(kit: &Kit, dir: &Path, obeys: bool) -> Result<Variables> {
    let image = dir.join("root.img");
    disk::write_root(kit, Root::Small, &image)?;
    let initrd = write(dir, "disk.initrd", &lan::disk_initrd(kit, obeys)?)?;
    Ok(vec![
        ("DISK", image.display().to_string()),
        ("DISK_INITRD", initrd),
    ])
}

/// Writes the file systems of the machines of demos/2b, with the static `vmsg` in them.
pub(crate) fn machines(kit: &Kit, dir: &Path, vmsg: &Path, obeys: bool) -> Result<Variables> {
    let plan = Plan {
        mode: Mode::Bounce,
        bar: false,
        layout: "amp",
    };
    let (b_bus, a_bus) = plan.buses();
    let inner = inner::command(
        kit.machine,
        &Hardware {
            own: false,
            memory: "memfd,share=on".to_owned(),
            net: Some(NET_SOCKET),
            rng: Some(RNG_SOCKET),
            words: "NAME=inner ADDRESS=dhcp",
        },
    );
    let a = outer::Options {
        server: Some(String::new()),
        inside: Some(Inside::with(kit, lan::initrd(kit, obeys)?)?),
        ..outer::Options::default()
    };
    let settings = [
        ("MESSAGES", MESSAGES.to_owned()),
        ("BUS", a_bus),
        ("NET_SOCKET", NET_SOCKET.to_owned()),
        ("RNG_SOCKET", RNG_SOCKET.to_owned()),
    ];
    let script = include_str!("guest/machine-a.sh");
    let a = outer::initrd(kit, vmsg, &a, (script, &settings), &mut |cpio| {
        cpio.file("inner/run", 0o644, format!("{inner}\n").as_bytes());
    })?;
    let b = outer::Options {
        server: Some(String::new()),
        ..outer::Options::default()
    };
    let settings = [
        ("MESSAGES", MESSAGES.to_owned()),
        ("BUS", b_bus),
        ("NETWORK", NETWORK.to_owned()),
    ];
    let script = include_str!("guest/machine-b.sh");
    let b = outer::initrd(kit, vmsg, &b, (script, &settings), &mut |_| {})?;
    Ok(vec![
        ("INITRD_A", write(dir, "a.initrd", &a)?),
        ("INITRD_B", write(dir, "b.initrd", &b)?),
    ])
}

/// A program that runs the QEMU, whatever it takes: one that was only unpacked needs its own loader and libraries.
fn qemu(qemu: &Qemu, dir: &Path) -> Result<String> {
    if let Qemu::Program(path) = qemu {
        return Ok(path.display().to_string());
    }
    let command = qemu.command()?;
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<String> = words.map(|word| quoted(&word.to_string_lossy())).collect();
    let script = format!("#!/bin/sh\nexec {} \"$@\"\n", words.join(" "));
    let path = write(dir, "qemu", script.as_bytes())?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {path} a program"))?;
    Ok(path)
}

/// A word as the shell has it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// Writes a file and gives its path.
fn write(dir: &Path, name: &str, content: &[u8]) -> Result<String> {
    let path = dir.join(name);
    fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path.display().to_string())
}
