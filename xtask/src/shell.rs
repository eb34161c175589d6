// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A machine that obeys: the host writes commands to its console, one after another, and reads there what each process
//! in it says (`guest/outer.sh`).

use std::fs::{self, File};
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::guest;
use crate::proof::Console;
use crate::scene::{Id, Line, Scene, Stream};

/// What it runs.
pub(crate) const SCRIPT: &str = include_str!("guest/outer.sh");
/// Longest time from QEMU's start to the first command: 6 to 12 seconds, a multiple when the host is busy.
const BOOT: Duration = Duration::from_secs(150);
/// Longest time for a command.
const COMMAND: Duration = Duration::from_secs(60);
/// Longest time from the command to the machine's end.
const POWER_OFF: Duration = Duration::from_secs(30);

/// A running machine.
#[derive(Debug)]
pub(crate) struct Shell {
    /// The process at whose standard input and output its console is: its QEMU, for the most part.
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

impl Shell {
    /// The machine whose console is at the standard input and output of `id`.
    pub(crate) fn new(id: Id, name: &str) -> Self {
        Self {
            id,
            name: name.to_owned(),
            commands: 0,
            cursor: 0,
        }
    }

    /// Its name in the run.
    pub(crate) fn name(&self) -> &str {
        &self.name
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

    /// The same; it reads what [`Shell::tell`] is given.
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
