// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg` for guests: one static program for each architecture, whatever this machine is.
//!
//! No C compiler is asked for, as nothing in `vmsg` is written in C: the linker is the one that comes with Rust, and the C
//! library for static programs is unpacked from Debian's archive into the cache. Rust's own library for the other
//! architecture is rustup's where the toolchain has it or can get it; elsewhere it is built once from its sources, those
//! of the toolchain or those that Debian has of the same version.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::debian::{Debian, PrivateApt, Release};
use crate::dirs;
use crate::kit::in_path;
use crate::machine::Machine;
use crate::tree;

/// The profile in the workspace's manifest.
const PROFILE: &str = "guest";
/// Set to 1, rustup's library is left aside, as on a machine that has none: to test that way.
const BUILD_STD: &str = "VMSG_BUILD_STD";

/// What Rust calls Linux on this machine.
pub(crate) fn target(machine: Machine) -> &'static str {
    match machine {
        Machine::X86 => "x86_64-unknown-linux-gnu",
        Machine::Arm64 => "aarch64-unknown-linux-gnu",
    }
}

/// The static `vmsg` for guests of `machine`, built if need be.
///
/// # Errors
/// It does not build; the C library or Rust's library for the architecture is not there and cannot be got.
pub(crate) fn vmsg(machine: Machine) -> Result<PathBuf> {
    build(machine, &["--package", "vmsg", "--bin", "vmsg"], "vmsg")
}

/// An example of a package as a static program for guests of `machine`, built if need be.
///
/// # Errors
/// As for [`vmsg`].
pub(crate) fn example(machine: Machine, package: &str, name: &str) -> Result<PathBuf> {
    let what = ["--package", package, "--example", name];
    build(machine, &what, &format!("examples/{name}"))
}

/// The targets of `machines` for which Rust's library is neither in the toolchain nor in the cache.
///
/// # Errors
/// There is no rustc.
pub(crate) fn missing_libraries(machines: &[Machine]) -> Result<Vec<&'static str>> {
    let rust = Rust::here()?;
    let cache = dirs::cache()?;
    let mut targets: Vec<_> = machines.iter().map(|&m| target(m)).collect();
    targets.retain(|target| {
        !Rust::has_library(&rust.sysroot, target)
            && !Rust::has_library(&built_library(&rust, target, &cache), target)
    });
    Ok(targets)
}

/// What has been built by this run, by target and program: cargo need not look again.
static BUILT: Mutex<BTreeMap<(&str, String), PathBuf>> = Mutex::new(BTreeMap::new());

fn build(machine: Machine, what: &[&str], program: &str) -> Result<PathBuf> {
    let key = (target(machine), program.to_owned());
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(path) = built.get(&key) {
        return Ok(path.clone());
    }
    let path = build_now(machine, what, program)?;
    built.insert(key, path.clone());
    Ok(path)
}

/// Builds `what`, as cargo calls it, and gives the program that comes of it.
fn build_now(machine: Machine, what: &[&str], program: &str) -> Result<PathBuf> {
    let target = target(machine);
    let rust = Rust::here()?;
    let mut flags = link_flags(machine, &rust)?;
    if let Some(sysroot) = library(&rust, target)? {
        flags.push("--sysroot".into());
        flags.push(sysroot.into());
    }
    let begun = Instant::now();
    eprintln!("      building {program} for {target}, static; from nothing that takes minutes");
    let mut command = cargo();
    command
        .args(["build", "--profile", PROFILE])
        .args(what)
        .args(["--target", target])
        .current_dir(dirs::workspace())
        // These count for what is built for the target, and nothing that stands in RUSTFLAGS does.
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}".as_ref()))
        .env("CARGO_TERM_COLOR", "never");
    let status = run_told(&mut command, begun)?;
    ensure!(
        status.success(),
        "{program} does not build for {target} ({status})"
    );
    eprintln!(
        "      {program} is built [{:.1} s]",
        begun.elapsed().as_secs_f64()
    );
    let program = dirs::target().join(target).join(PROFILE).join(program);
    ensure!(
        program.is_file(),
        "cargo has built no {}",
        program.display()
    );
    Ok(program)
}

/// Runs cargo to its end and tells how far it is: a line for each crate of this workspace, and how many others came
/// before it. What else it says, as of errors, passes as it is.
fn run_told(command: &mut Command, begun: Instant) -> Result<ExitStatus> {
    let mut child = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let mut others = 0;
    let said = child.stderr.take().expect("standard error is piped");
    for line in BufReader::new(said).lines() {
        let line = line.context("cannot read what cargo says")?;
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("Compiling"), Some(name)) if line.ends_with(')') => {
                let seconds = begun.elapsed().as_secs_f64();
                let before = match std::mem::take(&mut others) {
                    0 => String::new(),
                    n => format!(" ({n} libraries before it)"),
                };
                eprintln!("      compiling {name}{before} [{seconds:.1} s]");
            }
            (Some("Compiling"), Some(_)) => others += 1,
            (Some("Finished" | "Downloading" | "Downloaded" | "Updating"), _) => {}
            _ => eprintln!("{line}"),
        }
    }
    child.wait().context("cannot wait for cargo")
}

/// The flags that make rustc link a static program with its own linker and the C library of the tree.
fn link_flags(machine: Machine, rust: &Rust) -> Result<Vec<OsString>> {
    let root = tree::c_library(machine).fetch()?.root().to_owned();
    let triple = match machine {
        Machine::X86 => "x86_64-linux-gnu",
        Machine::Arm64 => "aarch64-linux-gnu",
    };
    let libc = root.join("usr/lib").join(triple);
    let libgcc = root.join("usr/lib/gcc").join(triple).join(tree::LIBGCC);
    for dir in [&libc, &libgcc] {
        ensure!(dir.is_dir(), "no {}: remove {0}", dir.display());
    }
    let mut flags: Vec<OsString> = Vec::new();
    let mut option = |name: &str, value: &Path| {
        flags.push("-C".into());
        let mut text = OsString::from(name);
        text.push(value);
        flags.push(text);
    };
    option("linker=", &rust.linker()?);
    option("linker-flavor=", Path::new("ld.lld"));
    option("target-feature=", Path::new("+crt-static"));
    // Linker scripts in it name other files by their place in the system.
    option("link-arg=--sysroot=", &root);
    option("link-arg=-L", &libc);
    option("link-arg=-L", &libgcc);
    // A program that can lie anywhere, without a loader. rustc knows that of x86 only.
    for word in ["-pie", "--no-dynamic-linker", "-z", "text"] {
        option("link-arg=", Path::new(word));
    }
    // What gcc adds to a program by itself: its start, the libraries, its end.
    option("link-arg=", &libc.join("rcrt1.o"));
    option("link-arg=", &libc.join("crti.o"));
    option("link-arg=", &libgcc.join("crtbeginS.o"));
    for word in ["--start-group", "-lgcc", "-lgcc_eh", "-lc", "--end-group"] {
        option("link-arg=", Path::new(word));
    }
    option("link-arg=", &libgcc.join("crtendS.o"));
    option("link-arg=", &libc.join("crtn.o"));
    Ok(flags)
}

/// A cargo of the same toolchain.
fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// The compiler.
#[derive(Debug)]
struct Rust {
    sysroot: PathBuf,
    host: String,
    release: String,
}

impl Rust {
    fn here() -> Result<Self> {
        let sysroot = PathBuf::from(rustc(&["--print", "sysroot"])?.trim());
        let version = rustc(&["-vV"])?;
        let field = |name: &str| {
            version
                .lines()
                .find_map(|l| l.strip_prefix(name)?.strip_prefix(": "))
                .map(str::to_owned)
                .with_context(|| format!("rustc -vV does not tell its {name}"))
        };
        Ok(Self {
            sysroot,
            host: field("host")?,
            release: field("release")?,
        })
    }

    /// The linker that came with it, or the one of LLVM in PATH.
    fn linker(&self) -> Result<PathBuf> {
        let own = self
            .sysroot
            .join("lib/rustlib")
            .join(&self.host)
            .join("bin/rust-lld");
        if own.is_file() {
            return Ok(own);
        }
        in_path("ld.lld").with_context(|| {
            format!(
                "no linker for guests' programs: {} is not there (rustup's toolchains have it), and no ld.lld is in PATH \
                 (apt install lld)",
                own.display()
            )
        })
    }

    /// Whether `sysroot` has Rust's library for `target`.
    fn has_library(sysroot: &Path, target: &str) -> bool {
        let dir = sysroot.join("lib/rustlib").join(target).join("lib");
        fs::read_dir(dir).is_ok_and(|entries| {
            entries
                .flatten()
                .any(|e| e.file_name().to_string_lossy().starts_with("libstd-"))
        })
    }
}

fn rustc(arguments: &[&str]) -> Result<String> {
    let output = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .args(arguments)
        .output()
        .context("cannot run rustc")?;
    ensure!(
        output.status.success(),
        "rustc {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// Rust's library for `target`: none if the toolchain has it, else the system root that does.
fn library(rust: &Rust, target: &str) -> Result<Option<PathBuf>> {
    let build = env::var_os(BUILD_STD).is_some_and(|value| value == "1");
    if !build || target == rust.host {
        if Rust::has_library(&rust.sysroot, target) {
            return Ok(None);
        }
        if add_target(target) && Rust::has_library(&rust.sysroot, target) {
            return Ok(None);
        }
    }
    let cache = dirs::cache()?;
    let root = built_library(rust, target, &cache);
    if !Rust::has_library(&root, target) {
        println!(
            "      building Rust's library for {target} into {}",
            root.display()
        );
        build_library(rust, target, &root, &cache)?;
    }
    Ok(Some(root))
}

/// Where a library that was built here is kept: a system root.
fn built_library(rust: &Rust, target: &str, cache: &Path) -> PathBuf {
    cache.join(format!("rust-{}-{target}", rust.release))
}

/// Asks rustup for its library; what it says matters only if there is no other way.
fn add_target(target: &str) -> bool {
    let Some(rustup) = in_path("rustup") else {
        return false;
    };
    Command::new(rustup)
        .args(["-q", "target", "add", target])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Builds Rust's library for `target` into the system root `root`, which appears whole or not at all.
fn build_library(rust: &Rust, target: &str, root: &Path, cache: &Path) -> Result<()> {
    let work = tempfile::tempdir_in(cache)?;
    let sources = sources(rust, target, work.path())?;
    // Something has to be built for which the library is needed.
    let project = work.path().join("none");
    fs::create_dir_all(project.join("src"))?;
    fs::write(project.join("src/lib.rs"), "#![no_std]\n")?;
    fs::write(
        project.join("Cargo.toml"),
        "[package]\nname = \"none\"\nversion = \"0.0.0\"\nedition = \"2024\"\n[workspace]\n[profile.release]\ndebug = false\n",
    )?;
    let built = work.path().join("target");
    let mut command = cargo();
    command
        .args([
            "build",
            "--quiet",
            "--release",
            "--target",
            target,
            "--target-dir",
        ])
        .arg(&built)
        .arg("-Zbuild-std=std,panic_unwind")
        .current_dir(&project)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS")
        .env("RUSTC_BOOTSTRAP", "1")
        // Where cargo looks for the sources instead of in the toolchain.
        .env("__CARGO_TESTS_ONLY_SRC_ROOT", &sources);
    let output = command.output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!(
            "Rust's library does not build for {target} from {}: {}\n`rustup target add {target}` where rustup can reach its \
             server makes that unnecessary",
            sources.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let ready = tempfile::tempdir_in(cache)?;
    let lib = ready.path().join("lib/rustlib").join(target).join("lib");
    fs::create_dir_all(&lib)?;
    for entry in fs::read_dir(built.join(target).join("release/deps"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".rlib") && !name.starts_with("libnone-") {
            fs::rename(&path, lib.join(&*name))?;
        }
    }
    if let Err(error) = fs::rename(ready.path(), root)
        && !Rust::has_library(root, target)
    {
        return Err(error).with_context(|| format!("cannot create {}", root.display()));
    }
    Ok(())
}

/// The sources of Rust's library, of the very version of the compiler: the folder `library`.
fn sources(rust: &Rust, target: &str, work: &Path) -> Result<PathBuf> {
    let library = "lib/rustlib/src/rust/library";
    let own = rust.sysroot.join(library);
    if own.join("Cargo.lock").is_file() {
        return Ok(own);
    }
    let by_hand = format!(
        "with rustup, `rustup target add {target}` gets it, or `rustup component add rust-src` what it is built from; \
         without, use a compiler that Debian 13 or its backports have (apt install rustc rust-src)"
    );
    let debian = Debian::here().with_context(|| {
        format!("Rust's library for {target} is missing, and this is not Debian: {by_hand}")
    })?;
    let dir = work.join("apt");
    fs::create_dir(&dir)?;
    let apt = PrivateApt::new(&dir, &debian, Release::TrixieBackports, "amd64")?;
    let into = work.join("sources");
    fs::create_dir(&into)?;
    apt.unpack_alone(&[&format!("rust-src={}*", rust.release)], &into)
        .with_context(|| {
            format!(
                "Rust's library for {target} is missing, and Debian has no sources of Rust {} to build it from: {by_hand}",
                rust.release
            )
        })?;
    // A link in the package leads to /usr/src by a relative path.
    let found = into.join("usr").join(library);
    ensure!(
        found.join("Cargo.lock").is_file(),
        "no {} in Debian's rust-src",
        found.display()
    );
    Ok(found)
}

#[cfg(test)]
#[path = "cross_test.rs"]
mod tests;
