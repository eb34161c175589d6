// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An outer machine: a whole one, emulated, with an IOMMU, ivshmem devices and memory that others may see, in which
//! `vmsg` runs, and an inner guest if it is to have one.
//!
//! It obeys, as [`Shell`] has it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cpio::Cpio;
use crate::initrd::{self, Content};
use crate::inner::Inside;
use crate::kit::Kit;
use crate::machine::Machine;
use crate::qemu;
use crate::scene::Scene;
use crate::shell::{SCRIPT, Shell};

/// The slots of its ivshmem devices on the PCI bus: messages, and the window to another machine's memory.
pub(crate) const MESSAGES: &str = "0000:00:10.0";
pub(crate) const WINDOW: &str = "0000:00:11.0";

/// The memory of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// That of QEMU.
    Own,
    /// A file in the run's folder.
    File(&'static str),
    /// Its own, and behind it a NUMA node of so many MiB that is a file.
    Node(&'static str, u32),
}

/// How a machine is made.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// MiB of memory, without what is in a file as a node.
    pub(crate) ram_mib: u32,
    /// Where they lie.
    pub(crate) memory: Memory,
    /// Processors.
    pub(crate) cpus: u32,
    /// The socket of the ivshmem server for the device [`MESSAGES`].
    pub(crate) server: Option<String>,
    /// A file that is the memory of the device [`WINDOW`], and its size in MiB.
    pub(crate) window: Option<(&'static str, u32)>,
    /// There is a network card, on QEMU's user network.
    pub(crate) net: bool,
    /// What it needs for a guest of its own.
    pub(crate) inside: Option<Inside>,
    /// Static programs beside `vmsg`, by the names they get in /bin.
    pub(crate) programs: Vec<(&'static str, PathBuf)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ram_mib: 512,
            memory: Memory::Own,
            cpus: 1,
            server: None,
            window: None,
            net: false,
            inside: None,
            programs: Vec::new(),
        }
    }
}

/// Modules of a machine's kernel beside the usual ones.
fn modules(machine: Machine, options: &Options) -> Vec<&'static str> {
    let mut names = Vec::new();
    if options.server.is_some() {
        names.extend(["vfio_iommu_type1", "vfio_pci"]);
    }
    if options.inside.is_some() {
        // The emulated processor has AMD's extensions.
        names.extend((machine == Machine::X86).then_some("kvm_amd"));
        names.push("tun");
    }
    names.push("virtio_pci");
    names
}

/// Starts a machine named `name` with the static program `vmsg`.
pub(crate) fn start(
    scene: &mut Scene,
    name: &str,
    kit: &Kit,
    vmsg: &Path,
    options: &Options,
) -> Result<Shell> {
    let file = format!("{name}.initrd");
    fs::write(
        scene.dir().join(&file),
        initrd(kit, vmsg, options, (SCRIPT, &[]), &mut |_| {})?,
    )
    .with_context(|| format!("cannot write {file}"))?;
    let mut command = kit.qemu.command()?;
    qemu::version(&kit.qemu)?;
    command.args(arguments(kit.machine, options));
    command.arg("-kernel").arg(&kit.kernel);
    command.args(["-initrd", &file, "-append", &append(kit.machine)]);
    let id = scene.start(name, &command)?;
    Ok(Shell::new(id, name))
}

/// The file system of a machine that runs `script` with these settings and has the static program `vmsg`; `more` adds
/// to it.
pub(crate) fn initrd(
    kit: &Kit,
    vmsg: &Path,
    options: &Options,
    (script, settings): (&str, &[(&str, String)]),
    more: &mut dyn FnMut(&mut Cpio),
) -> Result<Vec<u8>> {
    let mut kit = kit.clone();
    kit.more_modules.extend(modules(kit.machine, options));
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let program = read(vmsg)?;
    let mut add = |cpio: &mut Cpio| -> Result<()> {
        cpio.file("bin/vmsg", 0o755, &program);
        for (name, path) in &options.programs {
            cpio.file(&format!("bin/{name}"), 0o755, &read(path)?);
        }
        if let Some(inside) = &options.inside {
            inside.add_to(cpio)?;
        }
        more(cpio);
        Ok(())
    };
    let content = Content {
        script,
        settings,
        more: Some(&mut add),
    };
    initrd::make(&kit, content)
}

/// The arguments of QEMU but for kernel and initrd.
fn arguments(machine: Machine, options: &Options) -> Vec<String> {
    let mut list: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| list.extend(words.iter().map(|w| (*w).to_owned()));
    add(&["-nodefaults", "-no-user-config", "-display", "none"]);
    add(&["-no-reboot", "-accel", "tcg,thread=multi"]);
    add(&["-chardev", "stdio,id=console,signal=off"]);
    add(&["-serial", "chardev:console"]);
    let (mut board, cpu) = match machine {
        // The IOMMU is there for VFIO, which is how a program in the machine gets doorbells.
        Machine::X86 => ("q35,smm=off".to_owned(), "max"),
        Machine::Arm64 => (
            "virt,virtualization=on,gic-version=3,iommu=smmuv3".to_owned(),
            "max,pauth-impdef=on",
        ),
    };
    let mut ram = options.ram_mib;
    let own = format!("{ram}M");
    match options.memory {
        Memory::Own => {}
        Memory::File(file) => {
            board.push_str(",memory-backend=m0");
            let object = format!("memory-backend-file,id=m0,mem-path={file},size={own},share=on");
            add(&["-object", &object]);
        }
        Memory::Node(file, size) => {
            ram += size;
            let first = format!("memory-backend-ram,id=m0,size={own}");
            let second = format!("memory-backend-file,id=m1,mem-path={file},size={size}M,share=on");
            let last = options.cpus - 1;
            add(&["-object", &first, "-object", &second]);
            add(&["-numa", &format!("node,nodeid=0,memdev=m0,cpus=0-{last}")]);
            add(&["-numa", "node,nodeid=1,memdev=m1"]);
        }
    }
    add(&["-machine", &board, "-cpu", cpu, "-m", &format!("{ram}M")]);
    add(&["-smp", &options.cpus.to_string()]);
    if machine == Machine::X86 {
        add(&["-device", "intel-iommu,intremap=on"]);
    }
    if let Some(socket) = &options.server {
        add(&["-chardev", &format!("socket,id=ivshmem,path={socket}")]);
        add(&[
            "-device",
            "ivshmem-doorbell,chardev=ivshmem,vectors=2,addr=0x10",
        ]);
    }
    if let Some((file, size)) = options.window {
        let object = format!("memory-backend-file,id=window,mem-path={file},size={size}M,share=on");
        add(&["-object", &object]);
        add(&["-device", "ivshmem-plain,memdev=window,addr=0x11"]);
    }
    if options.net {
        add(&["-netdev", "user,id=net"]);
        add(&[
            "-device",
            &format!("virtio-net-pci,netdev=net,mac={},romfile=", qemu::OWN_MAC),
        ]);
    }
    list
}

/// The kernel's command line.
fn append(machine: Machine) -> String {
    let mut words = format!(
        "console={} panic=-1 loglevel=1 rdinit=/init",
        machine.console()
    );
    if machine == Machine::X86 {
        words.push_str(" intel_iommu=on no_timer_check nowatchdog clocksource=hpet tsc=unstable");
    }
    words
}
