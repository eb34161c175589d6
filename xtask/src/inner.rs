// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest inside of an outer machine: a stock QEMU with KVM, a stock kernel, and a script.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::cpio::Cpio;
use crate::initrd;
use crate::kit::Kit;
use crate::machine::Machine;
use crate::qemu::{OWN_MAC, TEST_MAC};
use crate::tree::{self, Files, Tree};

/// MiB of memory that the guest has.
pub(crate) const RAM_MIB: u32 = 192;

/// What an outer machine needs for it.
#[derive(Clone, Debug)]
pub(crate) struct Inside {
    machine: Machine,
    qemu: Tree,
    kernel: PathBuf,
    initrd: Vec<u8>,
}

impl Inside {
    /// Gathers it: QEMU of the release that this machine has, for the guest's architecture, and the kernel of `kit`.
    pub(crate) fn new(kit: &Kit, script: &str, settings: &[(&str, String)]) -> Result<Self> {
        Self::with(kit, initrd::build(kit, script, settings)?)
    }

    /// The same for a guest with this file system.
    pub(crate) fn with(kit: &Kit, initrd: Vec<u8>) -> Result<Self> {
        Ok(Self {
            machine: kit.machine,
            qemu: tree::inner_qemu(kit.machine).fetch()?,
            kernel: kit.kernel.clone(),
            initrd,
        })
    }

    /// Puts it into the outer machine's file system.
    pub(crate) fn add_to(&self, cpio: &mut Cpio) -> Result<()> {
        let mut files = Files::default();
        self.qemu.add_to(&mut files, self.machine.qemu_program())?;
        files.write(cpio, &["bin", "modules"]);
        cpio.directory("inner");
        let mut add = |path: PathBuf, name: &str| -> Result<()> {
            let bytes =
                fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            cpio.file(&format!("inner/{name}"), 0o644, &bytes);
            Ok(())
        };
        add(self.kernel.clone(), "kernel")?;
        if self.machine == Machine::X86 {
            let firmware = ["seabios/bios-256k.bin", "qemu/kvmvapic.bin"];
            for file in firmware {
                let path = self.qemu.data("share").join(file);
                let name = file.rsplit('/').next().unwrap_or(file);
                add(path, name)?;
            }
            for name in ["linuxboot_dma.bin", "linuxboot.bin"] {
                add(self.qemu.data("share/qemu").join(name), name)?;
            }
        }
        cpio.file("inner/initrd", 0o644, &self.initrd);
        Ok(())
    }
}

/// The inner guest's hardware.
#[derive(Clone, Debug)]
pub(crate) struct Hardware {
    /// It has a network device of QEMU's own, too.
    pub(crate) own: bool,
    /// Where its memory lies: the arguments after `memory-backend-`.
    pub(crate) memory: String,
    /// The socket of the proxy for the network device; none: QEMU's own.
    pub(crate) net: Option<&'static str>,
    /// The socket of the proxy for the entropy device; none: QEMU's own.
    pub(crate) rng: Option<&'static str>,
    /// More words for the kernel.
    pub(crate) words: &'static str,
}

/// The command that boots it, as a shell in the outer machine takes it.
pub(crate) fn command(machine: Machine, hardware: &Hardware) -> String {
    let ram = format!("{RAM_MIB}M");
    let (board, cpu, suffix) = match machine {
        Machine::X86 => ("pc", "host", "pci"),
        Machine::Arm64 => ("virt,gic-version=host", "host", "device"),
    };
    let mut words = format!(
        "{} -L /inner -nodefaults -no-user-config -display none -no-reboot -accel kvm -cpu {cpu} -smp 1 \
         -chardev stdio,id=console,signal=off -serial chardev:console -m {ram} \
         -object memory-backend-{},id=mem,size={ram} -machine {board},memory-backend=mem",
        machine.qemu_program(),
        hardware.memory,
    );
    let rom = match machine {
        Machine::X86 => ",romfile=",
        Machine::Arm64 => {
            words.push_str(" -global virtio-mmio.force-legacy=false");
            ""
        }
    };
    let net = format!("virtio-net-{suffix}");
    if hardware.own {
        words.push_str(&format!(
            " -netdev user,id=own,restrict=on -device {net},netdev=own,mac={OWN_MAC}{rom}"
        ));
    }
    match hardware.net {
        Some(socket) => words.push_str(&format!(
            " -chardev socket,id=netsock,path={socket},reconnect=1 -netdev vhost-user,id=net,chardev=netsock"
        )),
        None => words.push_str(" -netdev user,id=net"),
    }
    words.push_str(&format!(" -device {net},netdev=net,mac={TEST_MAC}{rom}"));
    match hardware.rng {
        Some(socket) => words.push_str(&format!(
            " -chardev socket,id=rngsock,path={socket} -device {},chardev=rngsock",
            match machine {
                Machine::X86 => "vhost-user-rng-pci",
                Machine::Arm64 => "vhost-user-rng",
            }
        )),
        None => words.push_str(&format!(" -device virtio-rng-{suffix}")),
    }
    words.push_str(&format!(
        " -kernel /inner/kernel -initrd /inner/initrd -append 'console={} panic=-1 loglevel=1 rdinit=/init{} {}'",
        machine.console(),
        match machine {
            Machine::X86 => " no_timer_check nowatchdog",
            Machine::Arm64 => "",
        },
        hardware.words,
    ));
    words
}
