// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An outer machine: a whole one, emulated, with an IOMMU, ivshmem devices and memory that others may see, in which
//! `vmsg` runs, and an inner guest if it is to have one.
//!
//! It obeys: the host writes commands to its console, one after another, and reads there what each process says.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cpio::Cpio;
use crate::guest;
use crate::initrd::{self, Content};
use crate::inner::Inside;
use crate::kit::Kit;
use crate::machine::Machine;
use crate::proof::Console;
use crate::qemu;
use crate::scene::{Id, Line, Scene, Stream};

/// What it runs.
const SCRIPT: &str = include_str!("guest/outer.sh");
/// Longest time from QEMU's start to the first command: 6 to 12 seconds, a multiple when the host is busy.
const BOOT: Duration = Duration::from_secs(150);
/// Longest time for a command.
const COMMAND: Duration = Duration::from_secs(60);
/// Longest time from the command to the machine's end.
const POWER_OFF: Duration = Duration::from_secs(30);

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

/// A running machine.
#[derive(Debug)]
pub(crate) struct Outer {
    /// Its QEMU.
    pub(crate) id: Id,
    name: String,
    commands: u32,
    cursor: usize,
}

/// A process in a machine.
#[derive(Debug)]
pub(crate) struct Process {
    machine: Id,
    name: String,
    cursor: usize,
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

impl Outer {
    /// Starts a machine named `name` with the static program `vmsg`.
    pub(crate) fn start(
        scene: &mut Scene,
        name: &str,
        kit: &Kit,
        vmsg: &std::path::Path,
        options: &Options,
    ) -> Result<Self> {
        let mut kit = kit.clone();
        kit.more_modules.extend(modules(kit.machine, options));
        let program = fs::read(vmsg).with_context(|| format!("cannot read {}", vmsg.display()))?;
        let mut add = |cpio: &mut Cpio| -> Result<()> {
            cpio.file("bin/vmsg", 0o755, &program);
            for (name, path) in &options.programs {
                let program =
                    fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
                cpio.file(&format!("bin/{name}"), 0o755, &program);
            }
            match &options.inside {
                Some(inside) => inside.add_to(cpio),
                None => Ok(()),
            }
        };
        let content = Content {
            script: SCRIPT,
            settings: &[],
            more: Some(&mut add),
        };
        let file = format!("{name}.initrd");
        fs::write(scene.dir().join(&file), initrd::make(&kit, content)?)
            .with_context(|| format!("cannot write {file}"))?;
        let mut command = kit.qemu.command()?;
        qemu::version(&kit.qemu)?;
        command.args(arguments(kit.machine, options));
        command.arg("-kernel").arg(&kit.kernel);
        command.args(["-initrd", &file, "-append", &append(kit.machine)]);
        let id = scene.start(name, &command)?;
        Ok(Self {
            id,
            name: name.to_owned(),
            commands: 0,
            cursor: 0,
        })
    }

    /// Waits until it obeys, and gives its kernel's version.
    pub(crate) fn booted(&mut self, scene: &mut Scene) -> Result<String> {
        let kernel = self.mark(scene, "booted", BOOT)?;
        self.mark(scene, "obeys", BOOT)?;
        Ok(kernel)
    }

    /// Waits for the machine's own mark `name`, and gives what stands behind it.
    fn mark(&mut self, scene: &mut Scene, name: &str, within: Duration) -> Result<String> {
        scene.expect_from(
            (self.id, Stream::Out),
            &mut self.cursor,
            &format!("the mark '{name}' of machine {}", self.name),
            within,
            |line| {
                // What a process in it says has the process's name in front.
                let (mark, detail) = guest::mark(&line.text)?;
                (mark == name && !line.text.contains("| ")).then(|| detail.to_owned())
            },
        )
    }

    /// Runs a command to its end; all must be well. The commands of a machine are noted in `NAME.sh`.
    pub(crate) fn run(&mut self, scene: &mut Scene, command: &str) -> Result<Vec<String>> {
        // A line that is longer never reaches the shell whole.
        ensure!(command.len() < 4000, "too long for a console: {command}");
        let from = self.cursor;
        let mut commands = File::options()
            .create(true)
            .append(true)
            .open(scene.dir().join(format!("{}.sh", self.name)))?;
        writeln!(commands, "{command}")?;
        scene.tell(self.id, command)?;
        self.commands += 1;
        let number = self.commands.to_string();
        let said = loop {
            let said = self.mark(scene, "did", COMMAND)?;
            if let Some(code) = said.strip_prefix(&format!("{number} ")) {
                break code.trim().to_owned();
            }
        };
        let output: Vec<String> = scene.lines(self.id, Stream::Out)[from..self.cursor]
            .iter()
            .filter_map(|l| l.text.strip_prefix("told| "))
            .map(str::to_owned)
            .collect();
        ensure!(
            said == "0",
            "machine {}: `{command}` gave {said}: {}",
            self.name,
            output.join("\n")
        );
        Ok(output)
    }

    /// Starts a process named `name`, beside all else.
    pub(crate) fn spawn(
        &mut self,
        scene: &mut Scene,
        name: &str,
        command: &str,
    ) -> Result<Process> {
        let cursor = scene.lines(self.id, Stream::Out).len();
        self.run(scene, &format!("start {name} {command}"))?;
        Ok(Process {
            machine: self.id,
            name: name.to_owned(),
            cursor,
        })
    }

    /// The same; it reads what [`Outer::tell`] is given.
    pub(crate) fn spawn_listening(
        &mut self,
        scene: &mut Scene,
        name: &str,
        command: &str,
    ) -> Result<Process> {
        self.run(scene, &format!("mkfifo /run/{name}.in"))?;
        self.spawn(scene, name, command)
    }

    /// Sends a line to a process that listens.
    pub(crate) fn tell(&mut self, scene: &mut Scene, process: &Process, line: &str) -> Result<()> {
        self.run(scene, &format!("echo '{line}' > /run/{}.in", process.name))
            .map(drop)
    }

    /// Ends a process with a signal (`TERM`, `KILL`).
    pub(crate) fn stop(
        &mut self,
        scene: &mut Scene,
        process: &Process,
        signal: &str,
    ) -> Result<()> {
        self.run(scene, &format!("stop {} {signal}", process.name))
            .map(drop)
    }

    /// Powers it off and waits for its end.
    pub(crate) fn power_off(self, scene: &mut Scene) -> Result<()> {
        scene.may_end(self.id);
        scene.tell(self.id, "poweroff -f")?;
        scene
            .wait_end(self.id, POWER_OFF)
            .with_context(|| format!("machine {} does not power off", self.name))?;
        // Only a run that failed needs it again.
        let _ = fs::remove_file(scene.dir().join(format!("{}.initrd", self.name)));
        Ok(())
    }
}

impl Process {
    /// What it has said so far is passed over.
    pub(crate) fn look(&mut self, scene: &Scene) {
        self.cursor = scene.lines(self.machine, Stream::Out).len();
    }

    /// Whether it has ended.
    pub(crate) fn ended(&self, scene: &Scene) -> bool {
        let end = format!("{}| ended with ", self.name);
        scene
            .lines(self.machine, Stream::Out)
            .iter()
            .any(|l| l.text.starts_with(&end))
    }

    /// The results of a guest whose console it is.
    pub(crate) fn failures(&self, scene: &Scene) -> Vec<String> {
        let front = format!("{}| ", self.name);
        scene
            .lines(self.machine, Stream::Out)
            .iter()
            .filter_map(|l| guest::check(l.text.strip_prefix(&front)?))
            .filter_map(|c| Some(format!("{}: {}", c.name, c.failure?)))
            .collect()
    }
}

impl Console for Process {
    fn expect<T>(
        &mut self,
        scene: &mut Scene,
        what: &str,
        within: Duration,
        mut pick: impl FnMut(&Line) -> Option<T>,
    ) -> Result<T> {
        let front = format!("{}| ", self.name);
        let found = scene.expect_from(
            (self.machine, Stream::Out),
            &mut self.cursor,
            &format!("{what} of {}", self.name),
            within,
            |line| {
                let text = line.text.strip_prefix(&front)?;
                if text.starts_with("ended with ") {
                    return Some(Err(text.to_owned()));
                }
                pick(&Line {
                    text: text.to_owned(),
                    at: line.at,
                })
                .map(Ok)
            },
        )?;
        found.map_err(|ended| {
            let said: Vec<String> = scene
                .lines(self.machine, Stream::Out)
                .iter()
                .filter_map(|l| l.text.strip_prefix(&front))
                .map(str::to_owned)
                .collect();
            let tail = &said[said.len().saturating_sub(15)..];
            anyhow::anyhow!(
                "{} {ended} while waiting for {what}:\n  {}",
                self.name,
                tail.join("\n  ")
            )
        })
    }
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
