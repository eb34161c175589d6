// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The benchmarks of all packages, as one document.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::available_parallelism;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{dirs, guest_bench};

/// A benchmark: it prints Markdown tables.
struct Bench {
    package: &'static str,
    name: &'static str,
    title: &'static str,
}

/// All benchmarks, from the bottom up.
const BENCHES: [Bench; 11] = [
    Bench {
        package: "vmsg-mem",
        name: "spsc",
        title: "The message queue",
    },
    Bench {
        package: "vmsg-queue",
        name: "device_side",
        title: "The device side of virtqueues",
    },
    Bench {
        package: "vmsg-net",
        name: "tcp",
        title: "TCP through the user-mode stack alone",
    },
    Bench {
        package: "vmsg-net",
        name: "switch",
        title: "The switch without devices",
    },
    Bench {
        package: "vmsg-device",
        name: "switch",
        title: "From driver to driver through the switch",
    },
    Bench {
        package: "vmsg",
        name: "stack",
        title: "The whole stack",
    },
    Bench {
        package: "vmsg",
        name: "blk",
        title: "Disks",
    },
    Bench {
        package: "vmsg",
        name: "tap",
        title: "A network device on a tap interface",
    },
    Bench {
        package: "vmsg-proxy",
        name: "vfio_user",
        title: "The vfio-user front",
    },
    Bench {
        package: "vmsg-proxy",
        name: "ivshmem",
        title: "Two processes over ivshmem",
    },
    Bench {
        package: "vmsg-proxy",
        name: "bounce",
        title: "A guest's memory shared or copied",
    },
];

/// The document, and the line of it below which everything is made here.
const DOCUMENT: &str = "docs/benchmarks.md";
const MARK: &str = "<!-- Made by `cargo xtask bench --save`; what is above stays. -->";

/// Priority that keeps most of other programs' doings out of the figures.
const NICE: i32 = -15;

/// Options of `bench`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Only this one, or those of this name; `guest` boots guests and takes minutes
    #[arg(value_parser = names())]
    name: Option<String>,
    /// How often `guest` measures each
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Write the figures to docs/benchmarks.md, below its introduction
    #[arg(long, conflicts_with = "name")]
    save: bool,
}

/// What can be asked for; benchmarks of one name come together.
fn names() -> Vec<&'static str> {
    let mut names: Vec<&str> = BENCHES.iter().map(|bench| bench.name).collect();
    names.dedup();
    names.push("guest");
    names
}

/// Runs benchmarks one after another and prints their figures as one Markdown document.
pub(crate) fn run(options: &Options) -> Result<()> {
    if options.name.as_deref() == Some("guest") {
        let text = guest_bench::run(options.rounds, None)?;
        println!("{}\n{text}", heading(false)?);
        return Ok(());
    }
    let wanted = |bench: &&Bench| match &options.name {
        Some(name) => bench.name == name,
        None => true,
    };
    // Compilers beside a benchmark would spoil it, so everything is built before.
    let built: Vec<(&Bench, PathBuf)> = BENCHES
        .iter()
        .filter(wanted)
        .map(|bench| Ok((bench, build(bench)?)))
        .collect::<Result<_>>()?;
    // Children inherit it; who may not have it measures with more noise.
    let nice = rustix::process::setpriority_process(None, NICE).is_ok();
    let mut document = heading(nice)?;
    print!("{document}");
    for (bench, program) in built {
        let head = format!(
            "\n### {}\n\n`cargo xtask bench {}`, load before it {}.\n\n",
            bench.title,
            bench.name,
            load()
        );
        print!("{head}");
        document += &head;
        document += &measure(&program)?;
    }
    if options.save {
        let path = dirs::workspace().join(DOCUMENT);
        save(&path, &document)?;
        eprintln!("saved to {}", path.display());
    }
    Ok(())
}

/// Builds a benchmark as `cargo bench` does and gives its program.
fn build(bench: &Bench) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(dirs::workspace())
        .args(["bench", "--no-run", "--package", bench.package])
        .args(["--bench", bench.name])
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(
        output.status.success(),
        "the benchmark {} does not build",
        bench.name
    );
    let messages = String::from_utf8_lossy(&output.stdout);
    program(&messages, bench.name)
        .with_context(|| format!("cargo does not say where the benchmark {} is", bench.name))
}

/// The program of the benchmark `name` in cargo's messages, one JSON object a line.
fn program(messages: &str, name: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == name && message["executable"].is_string())
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

/// Runs a benchmark, shows its lines as they come and gives them.
fn measure(program: &Path) -> Result<String> {
    let mut child = Command::new(program)
        .arg("--bench")
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let mut lines = String::new();
    let output = child.stdout.take().context("a pipe was asked for")?;
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        lines += &line;
        lines += "\n";
    }
    let status = child.wait()?;
    ensure!(status.success(), "{}: {status}", program.display());
    Ok(lines)
}

/// When, of what and where.
fn heading(nice: bool) -> Result<String> {
    let cpus = available_parallelism().map_or(1, usize::from);
    let mut text = format!("## Figures of {}\n\n", said_by("date", &["-u", "+%F"])?);
    let commit = said_by("git", &["describe", "--always", "--dirty"]);
    writeln!(text, "* commit {}", commit.as_deref().unwrap_or("unknown"))?;
    let cpuinfo = read("/proc/cpuinfo");
    writeln!(text, "* {}, {cpus} CPUs", cpu_model(&cpuinfo))?;
    let release = read("/proc/sys/kernel/osrelease");
    writeln!(text, "* Linux {}", release.trim())?;
    writeln!(text, "* niceness {}", if nice { NICE } else { 0 })?;
    Ok(text)
}

fn cpu_model(cpuinfo: &str) -> &str {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == "model name")
        .map_or("unknown CPU", |(_, model)| model.trim())
}

/// Threads that ran or wanted to run in the last minute, on average.
fn load() -> String {
    let all = read("/proc/loadavg");
    all.split(' ').next().unwrap_or("unknown").to_owned()
}

/// A file of /proc; empty if there is none.
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn said_by(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(dirs::workspace())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    ensure!(output.status.success(), "{program}: {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn save(path: &Path, figures: &str) -> Result<()> {
    let old = fs::read_to_string(path).with_context(|| format!("no {}", path.display()))?;
    let new = with_figures(&old, figures)?;
    fs::write(path, new).with_context(|| format!("cannot write {}", path.display()))
}

/// The document with other figures.
fn with_figures(document: &str, figures: &str) -> Result<String> {
    let Some((introduction, _)) = document.split_once(MARK) else {
        bail!("{DOCUMENT} has no line `{MARK}`");
    };
    Ok(format!("{introduction}{MARK}\n\n{figures}"))
}

#[cfg(test)]
#[path = "bench_test.rs"]
mod tests;
