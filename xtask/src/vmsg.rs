// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program under test: building it, and starting its two sides.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::dirs;
use crate::machine::Machine;
use crate::scene::{Id, Scene, Stream};

/// Longest time from the start of a process to its `ready` lines.
const READY: Duration = Duration::from_secs(30);

/// The bus all guests here use; the name is relative to the run's folder.
pub(crate) const BUS: &str = "unix,path=b0.sock";
/// The network device as the device host offers it.
pub(crate) const NET: &str = "net,id=net0,backend=user,pcap=net.pcap";
/// Sockets of the proxy, relative to the run's folder.
pub(crate) const NET_SOCKET: &str = "net.sock";
pub(crate) const RNG_SOCKET: &str = "rng.sock";
/// The options of the proxy: a front for each device.
pub(crate) const PROXY: [(&str, &str); 3] = [
    ("--bus", BUS),
    ("--front", "vhost-user,socket=net.sock,dev=net0"),
    ("--front", "vhost-user,socket=rng.sock,dev=1"),
];

/// The built program.
#[derive(Clone, Debug)]
pub(crate) struct Vmsg {
    program: PathBuf,
}

impl Vmsg {
    /// Builds it, optimised. Cargo's own messages go to standard error.
    pub(crate) fn build() -> Result<Self> {
        let program = build(&["--bin", "vmsg"], "vmsg")?;
        Ok(Self { program })
    }

    /// One that is built already.
    pub(crate) fn built(program: &Path) -> Result<Self> {
        let program = program
            .canonicalize()
            .with_context(|| format!("no program at {}", program.display()))?;
        Ok(Self { program })
    }

    /// An example of its package, built as it is.
    pub(crate) fn example(&self, name: &str) -> Result<PathBuf> {
        build(&["--example", name], &format!("examples/{name}"))
    }

    /// Where it is.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    fn command(&self, subcommand: &str, options: &[(&str, &str)]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(subcommand);
        for (name, value) in options {
            command.args([name, value]);
        }
        command
    }

    /// `vmsg` with these words.
    pub(crate) fn words<'w>(&self, words: impl IntoIterator<Item = &'w str>) -> Command {
        let mut command = Command::new(&self.program);
        command.args(words);
        command
    }

    /// Starts a device host with a network and an entropy device, and waits until it listens.
    pub(crate) fn serve(&self, scene: &mut Scene, name: &str) -> Result<Id> {
        let options = [("--bus", BUS), ("--device", NET), ("--device", "rng")];
        self.start(scene, name, self.command("serve", &options), &["bus="])
    }

    /// Starts a proxy with a socket for each of the two devices, and waits until it listens on both.
    pub(crate) fn proxy(&self, scene: &mut Scene, name: &str) -> Result<Id> {
        self.start(
            scene,
            name,
            self.command("proxy", &PROXY),
            &["front=", "front="],
        )
    }

    /// The arguments of QEMU that `vmsg proxy --print-qemu` prints for a proxy with these `options`, a word each. A
    /// device host has to be there.
    pub(crate) fn printed_arguments(
        &self,
        dir: &Path,
        machine: Machine,
        options: &[(&str, &str)],
    ) -> Result<Vec<String>> {
        let mut command = self.command("proxy", options);
        command
            .args(["--print-qemu", "--machine", machine.name()])
            .current_dir(dir);
        let output = command
            .output()
            .with_context(|| format!("cannot run {}", self.program.display()))?;
        if !output.status.success() {
            bail!(
                "proxy --print-qemu: {}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        // As the shell splits what `$(…)` gives.
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.split_whitespace().map(str::to_owned).collect())
    }

    /// Starts `vmsg subcommand` with `options` and waits for as many `ready` lines as it is to print.
    pub(crate) fn run(
        &self,
        scene: &mut Scene,
        name: &str,
        subcommand: &str,
        options: &[(&str, &str)],
        ready: usize,
    ) -> Result<Id> {
        self.start(
            scene,
            name,
            self.command(subcommand, options),
            &vec![""; ready],
        )
    }

    /// The same in a mount namespace of its own, where a shell does `before` first, as root; waits for one line.
    pub(crate) fn run_after(
        &self,
        scene: &mut Scene,
        name: &str,
        subcommand: &str,
        options: &[(&str, &str)],
        before: &str,
    ) -> Result<Id> {
        let inside = self.command(subcommand, options);
        let mut command = Command::new("unshare");
        command.arg("--mount");
        if !rustix::process::geteuid().is_root() {
            command.arg("--map-root-user");
        }
        command
            .args(["sh", "-ec", &format!("{before}\nexec \"$@\""), "sh"])
            .arg(inside.get_program())
            .args(inside.get_args());
        self.start(scene, name, command, &[""])
    }

    /// The same for a command of several words.
    pub(crate) fn run_words(
        &self,
        scene: &mut Scene,
        name: &str,
        words: &[&str],
        options: &[(&str, &str)],
        ready: usize,
    ) -> Result<Id> {
        let mut command = Command::new(&self.program);
        command.args(words);
        for (name, value) in options {
            command.args([name, value]);
        }
        self.start(scene, name, command, &vec![""; ready])
    }

    /// Starts a device host with `devices` on `bus`, and gives it.
    pub(crate) fn serve_on(
        &self,
        scene: &mut Scene,
        name: &str,
        bus: &str,
        devices: &[&str],
    ) -> Result<Id> {
        let mut options = vec![("--bus", bus)];
        options.extend(devices.iter().map(|device| ("--device", *device)));
        self.run(scene, name, "serve", &options, 1)
    }

    /// Starts a proxy with `fronts` on `bus`, and gives it.
    pub(crate) fn proxy_on(&self, scene: &mut Scene, bus: &str, fronts: &[&str]) -> Result<Id> {
        let mut options = vec![("--bus", bus)];
        options.extend(fronts.iter().map(|front| ("--front", *front)));
        self.run(scene, "proxy", "proxy", &options, fronts.len())
    }

    /// Runs `vmsg trace FILE` to its end.
    pub(crate) fn trace(&self, dir: &Path, file: &str) -> Result<Output> {
        Command::new(&self.program)
            .args(["trace", file])
            .current_dir(dir)
            .output()
            .with_context(|| format!("cannot run {}", self.program.display()))
    }

    /// Runs `vmsg ctl` on the control socket `path` to its end.
    pub(crate) fn control(&self, dir: &Path, path: &str, words: &[&str]) -> Result<Output> {
        Command::new(&self.program)
            .args(["ctl", path])
            .args(words)
            .current_dir(dir)
            .output()
            .with_context(|| format!("cannot run {}", self.program.display()))
    }

    /// Starts a process and waits for one `ready` line for each entry of `ready`, in any order.
    fn start(&self, scene: &mut Scene, name: &str, command: Command, ready: &[&str]) -> Result<Id> {
        let id = scene.start(name, &command)?;
        for what in ready {
            scene.expect(
                (id, Stream::Out),
                &format!("its line 'ready {what}…'"),
                READY,
                |line| {
                    line.text
                        .strip_prefix("ready ")
                        .is_some_and(|r| r.starts_with(what))
                        .then_some(())
                },
            )?;
        }
        Ok(id)
    }

    /// Runs a command that looks at the bus (`ls`, `ping`) to its end.
    pub(crate) fn look(&self, dir: &Path, subcommand: &str, arguments: &[&str]) -> Result<Output> {
        let mut command = self.command(subcommand, &[("--bus", BUS)]);
        command.args(arguments).current_dir(dir);
        command
            .output()
            .with_context(|| format!("cannot run {}", self.program.display()))
    }
}

/// Builds something of the package `vmsg`, which cargo calls `what`, and gives the program that comes of it.
fn build(what: &[&str], program: &str) -> Result<PathBuf> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--release", "--package", "vmsg"]);
    let status = command
        .args(what)
        .current_dir(dirs::workspace())
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("{program} does not build ({status})");
    }
    let program = dirs::target().join("release").join(program);
    if !program.is_file() {
        bail!("cargo has built no {}", program.display());
    }
    Ok(program)
}
