// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The gate: what every change must pass, `cargo xtask test`.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::num::NonZero;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::report::{Report, SECOND_RUNS};
use crate::{dirs, e2e, kit, no_std};

/// How many lines of a failed step's output are shown.
const SHOWN: usize = 120;

/// Options of `test`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Add the long runs: release tests with many cases, guests with more processors, more kills
    #[arg(long)]
    full: bool,
    /// Only boot guests
    #[arg(long, conflicts_with = "no_e2e")]
    e2e_only: bool,
    /// Boot no guests
    #[arg(long)]
    no_e2e: bool,
    #[command(flatten)]
    kit: kit::Options,
}

/// Runs the gate; all steps run even if one fails.
pub(crate) fn run(options: &Options, report: &mut Report) -> Result<()> {
    if !options.no_e2e {
        // What a guest is made of is asked for and fetched at the start, not in the middle.
        e2e::Options::of_gate(options.full, options.kit.clone()).gather()?;
    }
    if !options.e2e_only {
        let steps = Steps {
            logs: dirs::run_folder("test", None)?,
            metadata: metadata()?,
        };
        println!("      logs in {}", steps.logs.display());
        steps.lints(report)?;
        steps.tests(report, options.full)?;
        steps.features(report)?;
        steps.without_std(report)?;
        steps.models(report)?;
    }
    if !options.no_e2e {
        e2e::run(
            &e2e::Options::of_gate(options.full, options.kit.clone()),
            report,
        )?;
    }
    Ok(())
}

struct Steps {
    logs: PathBuf,
    metadata: Value,
}

impl Steps {
    fn lints(&self, report: &mut Report) -> Result<()> {
        self.step(report, "format", cargo(&["fmt", "--all", "--check"]))?;
        let clippy = [
            "clippy",
            "--workspace",
            "--all-targets",
            "--all-features",
            "--",
            "-D",
            "warnings",
        ];
        self.step(report, "clippy", cargo(&clippy))?;
        let mut doc = cargo(&["doc", "--workspace", "--no-deps", "--all-features"]);
        doc.env("RUSTDOCFLAGS", "-D warnings");
        self.step(report, "documentation", doc)?;
        if has_subcommand("deny") {
            self.step(
                report,
                "licences and sources",
                cargo(&["deny", "check", "bans", "licenses", "sources"]),
            )?;
        } else {
            println!("skip  licences and sources: needs `cargo install --locked cargo-deny`");
        }
        Ok(())
    }

    fn tests(&self, report: &mut Report, full: bool) -> Result<()> {
        if has_subcommand("nextest") {
            let mut tests = cargo(&["nextest", "run", "--workspace", "--no-fail-fast"]);
            // Most of them wait for something most of the time.
            let processors = thread::available_parallelism().map_or(1, NonZero::get);
            tests.args(["--profile", "gate", "--test-threads"]);
            tests.arg((2 * processors).to_string());
            self.step(report, "tests", tests)?;
            self.step(
                report,
                "documentation tests",
                cargo(&["test", "--workspace", "--doc"]),
            )?;
        } else {
            self.step(
                report,
                "tests",
                cargo(&["test", "--workspace", "--no-fail-fast"]),
            )?;
        }
        if full {
            let mut long = cargo(&["test", "--workspace", "--release", "--no-fail-fast"]);
            long.env("PROPTEST_CASES", "10000")
                .env("VMSG_SIM_CASES", "20000");
            self.step(report, "tests with many cases", long)?;
        }
        Ok(())
    }

    /// Each package with no feature, and with each of its features alone.
    fn features(&self, report: &mut Report) -> Result<()> {
        for package in array(&self.metadata, "packages") {
            let name = text(package, "name");
            let features = package
                .get("features")
                .and_then(Value::as_object)
                .context("a package without features")?;
            let features: Vec<&String> = features.keys().filter(|f| *f != "default").collect();
            if features.is_empty() {
                continue;
            }
            let check = ["check", "--package", name, "--no-default-features"];
            self.step(report, &format!("{name} without features"), cargo(&check))?;
            for feature in features {
                let mut command = cargo(&check);
                command.args(["--features", feature]);
                self.step(report, &format!("{name} with {feature} alone"), command)?;
            }
        }
        Ok(())
    }

    /// The packages for bare machines do without the standard library.
    fn without_std(&self, report: &mut Report) -> Result<()> {
        for no_std::Check {
            target,
            manifest,
            links,
        } in no_std::checks()?
        {
            let what = if links { "build" } else { "check" };
            let mut command = cargo(&[what, "--offline", "--manifest-path"]);
            command
                .arg(&manifest)
                .env("CARGO_TARGET_DIR", dirs::target().join("no-std"));
            if let Some(target) = target {
                command.args(["--target", target]);
            }
            self.step(
                report,
                &format!(
                    "no_std {}on {}",
                    if links { "program " } else { "" },
                    target.unwrap_or("this machine")
                ),
                command,
            )?;
        }
        Ok(())
    }

    /// Every `tests/loom*.rs` of a package, with all interleavings of its threads.
    fn models(&self, report: &mut Report) -> Result<()> {
        for package in array(&self.metadata, "packages") {
            let targets = array(package, "targets");
            let tests = targets
                .iter()
                .filter(|t| array(t, "kind").iter().any(|k| k == "test"));
            let names: BTreeSet<&str> = tests
                .map(|t| text(t, "name"))
                .filter(|n| n.starts_with("loom"))
                .collect();
            for name in names {
                let mut command = cargo(&[
                    "test",
                    "--release",
                    "--package",
                    text(package, "name"),
                    "--test",
                    name,
                ]);
                command
                    .env("RUSTFLAGS", "--cfg loom")
                    .env("CARGO_TARGET_DIR", dirs::target().join("loom"));
                self.step(
                    report,
                    &format!("{} {name}", text(package, "name")),
                    command,
                )?;
            }
        }
        Ok(())
    }

    /// Runs one command; its output goes to a log of its own, and is shown if it fails. Tests in it are counted.
    fn step(&self, report: &mut Report, name: &str, mut command: Command) -> Result<()> {
        let begun = Instant::now();
        let path = self
            .logs
            .join(format!("{}.log", name.replace([' ', '/'], "-")));
        let log =
            File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        command
            .current_dir(dirs::workspace())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let status = command.status().context("cannot run cargo")?;
        let output = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
        let (passed, failed) = count_tests(&output);
        report.passed(passed);
        let again = second_runs(&output);
        for test in &again {
            let why = format!("its first run is in {}", path.display());
            report.passed_again(test, &why);
        }
        if again.len() > SECOND_RUNS {
            report.check(&format!("{name}, run once"), false, || {
                format!("{} tests passed only when run again", again.len())
            });
        }
        let seconds = begun.elapsed().as_secs_f64();
        let shown = if passed > 0 {
            format!("{name} ({passed} tests)")
        } else {
            name.to_owned()
        };
        report.check(
            &format!("{shown} [{seconds:.1} s]"),
            status.success(),
            || {
                let lines: Vec<&str> = output.lines().collect();
                let tail = lines[lines.len().saturating_sub(SHOWN)..].join("\n");
                let failed = if failed > 0 {
                    format!("{failed} tests failed, ")
                } else {
                    String::new()
                };
                format!("{failed}{status}, log in {}\n{tail}", path.display())
            },
        );
        Ok(())
    }
}

/// A cargo of the same toolchain.
fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).env("CARGO_TERM_COLOR", "never");
    command
}

fn has_subcommand(name: &str) -> bool {
    let output = cargo(&[name, "--version"]).stdin(Stdio::null()).output();
    output.is_ok_and(|o| o.status.success())
}

fn metadata() -> Result<Value> {
    let output = cargo(&["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(dirs::workspace())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!(
            "cargo metadata failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    serde_json::from_slice(&output.stdout).context("cargo metadata gives no JSON")
}

fn array<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value
        .get(key)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// How many tests passed and failed by the summaries of the test harness or of nextest. Nextest shows what a failed
/// test said, the harness's summary with it: where there is one of nextest, it alone counts.
fn count_tests(output: &str) -> (usize, usize) {
    let lines = |start: &'static str| {
        output
            .lines()
            .map(str::trim_start)
            .filter(move |line| line.starts_with(start))
    };
    let nextest = lines("Summary [").next_back();
    let harness = lines("test result: ").filter(|_| nextest.is_none());
    let mut counts = (0, 0);
    for line in nextest.into_iter().chain(harness) {
        let words: Vec<&str> = line
            .split([' ', ';', ','])
            .filter(|w| !w.is_empty())
            .collect();
        for pair in words.windows(2) {
            if let Ok(number) = pair[0].parse::<usize>() {
                match pair[1] {
                    "passed" => counts.0 += number,
                    "failed" => counts.1 += number,
                    _ => {}
                }
            }
        }
    }
    counts
}

/// The tests that failed and then passed, by nextest's summary.
fn second_runs(output: &str) -> Vec<&str> {
    let summary = output.rfind("Summary [").map_or("", |at| &output[at..]);
    summary
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("FLAKY "))
        .filter_map(|line| line.split_once("] "))
        // The test's place among all, in brackets, is before its name.
        .map(|(_, name)| name.split_once(") ").map_or(name, |(_, name)| name))
        .collect()
}

#[cfg(test)]
#[path = "gate_test.rs"]
mod tests;
