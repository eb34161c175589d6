// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two outer machines joined by an ivshmem server: A with a guest of its own and the proxy, B with the device host.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use crate::cross;
use crate::inner::{self, Hardware, Inside};
use crate::kit::Kit;
use crate::machine::Machine;
use crate::outer::{self, MESSAGES, Memory, WINDOW};
use crate::proof::Console;
use crate::scene::{Id, Scene};
use crate::shell::{Process, Shell};
use crate::vmsg::Vmsg;

/// The ivshmem server's socket, relative to the run's folder.
const SERVER_SOCKET: &str = "ivshmem.sock";
/// Files in the run's folder: what the server hands out, and what of A's memory B sees.
pub(crate) const SHARED: &str = "shared.mem";
pub(crate) const SEEN: &str = "seen.mem";
/// MiB of the memory of messages; with room for what is copied, too.
const MESSAGES_MIB: u32 = 1;
const COPIES_MIB: u32 = 32;
/// MiB of A's memory but for a window.
const A_MIB: u32 = 640;
/// MiB of all of A's memory, where B sees all.
const WHOLE_MIB: u32 = 1024;
/// MiB of the window that the inner guest lives in.
const SEGMENT_MIB: u32 = 256;
/// MiB of B's memory.
pub(crate) const B_MIB: u32 = 320;
/// Huge pages that the inner guest lives in.
const HUGE_PAGES: u32 = inner::RAM_MIB / 2;
/// Sockets of the proxy in A.
pub(crate) const NET_SOCKET: &str = "/run/net.sock";
pub(crate) const RNG_SOCKET: &str = "/run/rng.sock";
/// Longest time from the start of a process to its `ready` lines.
const READY: Duration = Duration::from_secs(60);
/// The inner guest's network, B's own one being QEMU's 10.0.2.0/24.
pub(crate) const NETWORK: &str = "192.168.127.0/24";
pub(crate) const GATEWAY: &str = "192.168.127.2";

/// What the two machines have in common, but for the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Mode {
    /// All of A's memory: simple, and anything in B can write to all of A
    Whole,
    /// A window that the inner guest lives in: nothing of A's own, all of the guest's
    Segment,
    /// Nothing of the guest: the proxy copies what the guest sends and receives
    Bounce,
}

impl Mode {
    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Segment => "segment",
            Self::Bounce => "bounce",
        }
    }
}

/// What is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// What the machines have in common.
    pub(crate) mode: Mode,
    /// With [`Mode::Segment`]: the inner guest lives in the memory of a PCI device, not in a NUMA node.
    pub(crate) bar: bool,
    /// Queue layout of the bus.
    pub(crate) layout: &'static str,
}

impl Plan {
    /// The bus as machine B sees it, and as A does.
    pub(crate) fn buses(self) -> (String, String) {
        let Self { mode, bar, layout } = self;
        let both = format!(
            "ivshmem,pci={MESSAGES},layout={layout},memory={}",
            mode.name()
        );
        match mode {
            Mode::Bounce => (format!("{both},ram=bar"), format!("{both},ram=bar")),
            Mode::Segment if bar => {
                let window = format!("{both},ram=pci:{WINDOW}");
                (window.clone(), window)
            }
            Mode::Segment => (format!("{both},ram=pci:{WINDOW}"), format!("{both},node=1")),
            Mode::Whole => (format!("{both},ram=pci:{WINDOW}"), both),
        }
    }

    /// Looks for what contradicts; costs nothing, so it comes before anything is fetched or built.
    pub(crate) fn check(&self, machine: Machine) -> Result<()> {
        ensure!(
            !self.bar || self.mode == Mode::Segment,
            "--bar is a way of --memory segment, and this is --memory {}",
            self.mode.name()
        );
        ensure!(
            !self.bar || machine == Machine::X86,
            "--bar is for --machine x86: on arm64 KVM runs nothing that lies in a device's memory"
        );
        Ok(())
    }
}

/// The programs.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    /// For this machine: the ivshmem server.
    pub(crate) host: PathBuf,
    /// For the machines A and B.
    pub(crate) guest: PathBuf,
}

impl Programs {
    /// Builds what is not there: one program where this machine has the processor of the others.
    pub(crate) fn build(
        machine: Machine,
        guest: Option<&Path>,
        host: Option<&Vmsg>,
    ) -> Result<Self> {
        let guest = match guest {
            Some(program) => program
                .canonicalize()
                .with_context(|| format!("no program at {}", program.display()))?,
            None => cross::vmsg(machine)?,
        };
        if let Some(vmsg) = host {
            return Ok(Self {
                host: vmsg.program().to_owned(),
                guest,
            });
        }
        let native = match machine {
            Machine::X86 => cfg!(target_arch = "x86_64"),
            Machine::Arm64 => cfg!(target_arch = "aarch64"),
        };
        let host = match native {
            true => guest.clone(),
            false => Vmsg::build()?.program().to_owned(),
        };
        Ok(Self { host, guest })
    }
}

/// The two machines and what runs in them, as far as they have been started.
#[derive(Debug)]
pub(crate) struct Pair {
    machine: Machine,
    plan: Plan,
    programs: Programs,
    kit: Kit,
    servers: u32,
    proxies: u32,
    hosts: u32,
    /// More words for the inner guest's kernel.
    pub(crate) inner_words: &'static str,
    /// The ivshmem server.
    pub(crate) server: Option<Id>,
    pub(crate) a: Option<Shell>,
    pub(crate) b: Option<Shell>,
}

impl Pair {
    /// Checks whether there can be such machines.
    pub(crate) fn new(kit: &Kit, plan: Plan, programs: Programs) -> Result<Self> {
        plan.check(kit.machine)?;
        Ok(Self {
            machine: kit.machine,
            plan,
            programs,
            kit: kit.clone(),
            inner_words: "",
            servers: 0,
            proxies: 0,
            hosts: 0,
            server: None,
            a: None,
            b: None,
        })
    }

    /// Starts the ivshmem server: another one on the same memory, if there was one before.
    pub(crate) fn start_server(&mut self, scene: &mut Scene) -> Result<Id> {
        let size = format!("{}M", self.shared_mib());
        self.servers += 1;
        let name = match self.servers {
            1 => "ivshmem".to_owned(),
            n => format!("ivshmem-{n}"),
        };
        let vmsg = Vmsg::built(&self.programs.host)?;
        let options = [
            ("--socket", SERVER_SOCKET),
            ("--size", &size),
            ("--vectors", "2"),
            ("--file", SHARED),
        ];
        let id = vmsg.run_words(scene, &name, &["ivshmem", "server"], &options, 1)?;
        self.server = Some(id);
        Ok(id)
    }

    fn shared_mib(&self) -> u32 {
        match self.plan.mode {
            Mode::Bounce => COPIES_MIB,
            Mode::Whole | Mode::Segment => MESSAGES_MIB,
        }
    }

    /// Starts machine A.
    pub(crate) fn start_a(&mut self, scene: &mut Scene, name: &str, inside: Inside) -> Result<()> {
        let (ram_mib, memory, window) = match (self.plan.mode, self.plan.bar) {
            (Mode::Whole, _) => (WHOLE_MIB, Memory::File(SEEN), None),
            (Mode::Segment, false) => (A_MIB, Memory::Node(SEEN, SEGMENT_MIB), None),
            (Mode::Segment, true) => (A_MIB, Memory::Own, Some((SEEN, SEGMENT_MIB))),
            // The guest's memory is A's own.
            (Mode::Bounce, _) => (A_MIB + SEGMENT_MIB, Memory::Own, None),
        };
        let options = outer::Options {
            ram_mib,
            memory,
            server: Some(SERVER_SOCKET.to_owned()),
            window,
            inside: Some(inside),
            ..outer::Options::default()
        };
        self.a = Some(self.start(scene, name, &options)?);
        Ok(())
    }

    fn start(&self, scene: &mut Scene, name: &str, options: &outer::Options) -> Result<Shell> {
        outer::start(scene, name, &self.kit, &self.programs.guest, options)
    }

    /// Starts machine B.
    pub(crate) fn start_b(&mut self, scene: &mut Scene, name: &str) -> Result<()> {
        let window = match self.plan.mode {
            Mode::Whole => Some((SEEN, WHOLE_MIB)),
            Mode::Segment => Some((SEEN, SEGMENT_MIB)),
            Mode::Bounce => None,
        };
        let options = outer::Options {
            ram_mib: B_MIB,
            server: Some(SERVER_SOCKET.to_owned()),
            window,
            net: true,
            ..outer::Options::default()
        };
        self.b = Some(self.start(scene, name, &options)?);
        Ok(())
    }

    pub(crate) fn a(&mut self) -> Result<&mut Shell> {
        self.a.as_mut().context("machine A is not there")
    }

    pub(crate) fn b(&mut self) -> Result<&mut Shell> {
        self.b.as_mut().context("machine B is not there")
    }

    /// Waits for A and makes it ready; gives its kernel's version.
    pub(crate) fn ready_a(&mut self, scene: &mut Scene) -> Result<String> {
        let plan = self.plan;
        let a = self.a()?;
        let kernel = a.booted(scene)?;
        a.run(scene, &format!("vmsg ivshmem bind {MESSAGES}"))?;
        let node = match (plan.mode, plan.bar) {
            (Mode::Segment, false) => Some("/sys/devices/system/node/node1"),
            (Mode::Whole, _) => Some("/sys/kernel/mm"),
            (Mode::Segment, true) | (Mode::Bounce, _) => None,
        };
        if let Some(node) = node {
            let pages = format!("{node}/hugepages/hugepages-2048kB/nr_hugepages");
            a.run(scene, &format!("echo {HUGE_PAGES} > {pages}"))?;
            let got = a.run(scene, &format!("cat {pages}"))?.concat();
            ensure!(
                got.trim() == HUGE_PAGES.to_string(),
                "machine A has only {got} huge pages of {HUGE_PAGES}"
            );
            a.run(
                scene,
                "mkdir -p /huge && mount -t hugetlbfs -o pagesize=2M none /huge",
            )?;
        }
        if plan.bar {
            enable(a, scene)?;
        }
        Ok(kernel)
    }

    /// Waits for B and makes it ready; gives its kernel's version.
    pub(crate) fn ready_b(&mut self, scene: &mut Scene) -> Result<String> {
        let window = self.plan.mode != Mode::Bounce;
        let b = self.b()?;
        let kernel = b.booted(scene)?;
        b.run(scene, &format!("vmsg ivshmem bind {MESSAGES}"))?;
        if window {
            enable(b, scene)?;
        }
        b.run(scene, "lease eth0")?;
        Ok(kernel)
    }

    /// The bus as B sees it, and as A does.
    pub(crate) fn buses(&self) -> (String, String) {
        self.plan.buses()
    }

    /// Starts a device host in B.
    pub(crate) fn serve(&mut self, scene: &mut Scene) -> Result<Process> {
        let (bus, _) = self.buses();
        self.hosts += 1;
        let name = format!("serve{}", self.hosts);
        let command = format!(
            "vmsg serve --bus {bus} --device net,id=net0,backend=user,net={NETWORK} --device rng"
        );
        let mut process = self.b()?.spawn(scene, &name, &command)?;
        ready(&mut process, scene)?;
        Ok(process)
    }

    /// Starts a proxy in A.
    pub(crate) fn proxy(&mut self, scene: &mut Scene) -> Result<Process> {
        let (_, bus) = self.buses();
        self.proxies += 1;
        let name = format!("proxy{}", self.proxies);
        let command = format!(
            "vmsg proxy --bus {bus} --front vhost-user,socket={NET_SOCKET},dev=net0 \
             --front vhost-user,socket={RNG_SOCKET},dev=1"
        );
        let mut process = self.a()?.spawn(scene, &name, &command)?;
        for _ in 0..2 {
            ready(&mut process, scene)?;
        }
        Ok(process)
    }

    /// Starts the inner guest in A; `rng`: its entropy device is B's, too.
    pub(crate) fn inner(&mut self, scene: &mut Scene, rng: bool) -> Result<Process> {
        let words = self.inner_words;
        let hardware = Hardware {
            own: true,
            memory: match (self.plan.mode, self.plan.bar) {
                (Mode::Segment, false) => {
                    "file,mem-path=/huge,host-nodes=1,policy=bind,prealloc=on,share=on".to_owned()
                }
                (Mode::Segment, true) => {
                    format!("file,mem-path=/sys/bus/pci/devices/{WINDOW}/resource2_wc,share=on")
                }
                (Mode::Whole, _) => "file,mem-path=/huge,prealloc=on,share=on".to_owned(),
                (Mode::Bounce, _) => "memfd,share=on".to_owned(),
            },
            net: Some(NET_SOCKET),
            rng: rng.then_some(RNG_SOCKET),
            words,
        };
        let command = inner::command(self.machine, &hardware);
        self.a()?.spawn_listening(scene, "inner", &command)
    }

    /// Ends all in order: the proxy, the device host, the machines, the server.
    pub(crate) fn end(mut self, scene: &mut Scene, serve: &Process, proxy: &Process) -> Result<()> {
        self.a()?
            .stop(scene, proxy, "TERM")
            .context("the proxy does not end on SIGTERM")?;
        self.b()?
            .stop(scene, serve, "TERM")
            .context("the device host does not end on SIGTERM")?;
        for machine in [self.a.take(), self.b.take()].into_iter().flatten() {
            machine.power_off(scene)?;
        }
        if let Some(server) = self.server {
            scene
                .kill(server, Signal::TERM)
                .context("the ivshmem server does not end on SIGTERM")?;
        }
        for file in [SHARED, SEEN] {
            // As large as machines' memories, and of no interest after a run that went well.
            let _ = std::fs::remove_file(scene.dir().join(file));
        }
        Ok(())
    }
}

/// On arm64 the memory of a device that no driver has is switched off.
fn enable(machine: &mut Shell, scene: &mut Scene) -> Result<()> {
    machine
        .run(
            scene,
            &format!("echo 1 > /sys/bus/pci/devices/{WINDOW}/enable"),
        )
        .map(drop)
}

fn ready(process: &mut Process, scene: &mut Scene) -> Result<()> {
    process.expect(scene, "its line 'ready …'", READY, |line| {
        line.text.starts_with("ready ").then_some(())
    })
}

/// What cannot be run here, before anything is built or booted.
pub(crate) fn check_memory() -> Result<()> {
    const NEEDED_KIB: u64 = 3 << 20;
    let text = std::fs::read_to_string(Path::new("/proc/meminfo"))?;
    let available = text
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:")?.split_whitespace().next())
        .and_then(|n| n.parse::<u64>().ok())
        .context("/proc/meminfo does not tell MemAvailable")?;
    if available < NEEDED_KIB {
        bail!(
            "two machines need {} MiB of memory, and {} are available",
            NEEDED_KIB >> 10,
            available >> 10
        );
    }
    Ok(())
}
