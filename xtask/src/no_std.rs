// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shows that the packages for bare machines need no standard library, also on a machine that has only its own target.
//!
//! A crate with `#![no_std]` and a panic handler of its own that uses all of them compiles only if none of them, and
//! nothing they depend on, brings `std`: that has a panic handler too, and the compiler refuses a second one.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::dirs;

/// The packages; features are off.
const PACKAGES: [&str; 4] = ["virtio-msg", "vmsg-mem", "vmsg-queue", "vmsg-driver"];

/// Bare targets that are checked as well where the toolchain has them (`rustup target add …`), and with which packages:
/// shared memory needs 64-bit atomics, protocol and client do not.
pub(crate) const TARGETS: [(&str, &[&str]); 2] = [
    ("aarch64-unknown-none", &PACKAGES),
    ("thumbv7em-none-eabi", &["virtio-msg", "vmsg-driver"]),
];

/// The target of the example that is a whole program for a bare machine.
pub(crate) const BARE_METAL: &str = TARGETS[0].0;

/// Builds that program: with its own panic handler and first instructions, linked to where its machine has memory. `None` if the
/// toolchain cannot build for it.
pub(crate) fn bare_metal() -> Result<Option<PathBuf>> {
    if !is_installed(BARE_METAL) {
        return Ok(None);
    }
    let target = dirs::target().join("no-std");
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--offline", "--quiet", "--target", BARE_METAL])
        .arg("--manifest-path")
        .arg(bare_metal_manifest()?)
        .env("CARGO_TARGET_DIR", &target)
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "the program for a bare machine: {status}");
    Ok(Some(target.join(BARE_METAL).join("debug/bare-metal")))
}

/// The manifest of that program, with the same versions of its dependencies as here.
fn bare_metal_manifest() -> Result<PathBuf> {
    let dir = dirs::workspace().join("crates/vmsg-driver/examples/bare-metal");
    fs::copy(dirs::workspace().join("Cargo.lock"), dir.join("Cargo.lock"))?;
    Ok(dir.join("Cargo.toml"))
}

/// A check: the target, if not this machine, and the manifest of the crate to compile for it.
#[derive(Debug)]
pub(crate) struct Check {
    /// The target's name.
    pub(crate) target: Option<&'static str>,
    /// The path of the crate's `Cargo.toml`.
    pub(crate) manifest: PathBuf,
    /// It is a program and is linked.
    pub(crate) links: bool,
}

/// The checks that this machine's toolchain can do. Their crates are written under `target`.
pub(crate) fn checks() -> Result<Vec<Check>> {
    let mut checks = vec![Check {
        target: None,
        manifest: generate("here", &PACKAGES)?,
        links: false,
    }];
    for (target, packages) in TARGETS {
        if is_installed(target) {
            checks.push(Check {
                target: Some(target),
                manifest: generate(target, packages)?,
                links: false,
            });
        }
    }
    if is_installed(BARE_METAL) {
        checks.push(Check {
            target: Some(BARE_METAL),
            manifest: bare_metal_manifest()?,
            links: true,
        });
    }
    Ok(checks)
}

fn generate(name: &str, packages: &[&str]) -> Result<PathBuf> {
    let dir = dirs::target().join("no-std-check").join(name);
    let mut manifest = "[package]\nname = \"no-std-check\"\nedition = \"2024\"\npublish = false\n\n[workspace]\n\n\
                        [lib]\npath = \"lib.rs\"\n\n[dependencies]\n"
        .to_owned();
    let mut source =
        "//! Fails to compile if a dependency uses the standard library.\n#![no_std]\n\n"
            .to_owned();
    for package in packages {
        let path = dirs::workspace().join("crates").join(package);
        manifest.push_str(&format!(
            "{package} = {{ path = {path:?}, default-features = false }}\n"
        ));
        source.push_str(&format!(
            "extern crate {} as _;\n",
            package.replace('-', "_")
        ));
    }
    source.push_str(
        "\n#[panic_handler]\nfn panic(_: &core::panic::PanicInfo<'_>) -> ! {\n    loop {}\n}\n",
    );
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    fs::write(dir.join("Cargo.toml"), manifest)?;
    fs::write(dir.join("lib.rs"), source)?;
    // The same versions of the dependencies, all of them fetched already.
    fs::copy(dirs::workspace().join("Cargo.lock"), dir.join("Cargo.lock"))?;
    Ok(dir.join("Cargo.toml"))
}

/// Whether the toolchain can build for `target`.
fn is_installed(target: &str) -> bool {
    let mut rustc = Command::new("rustc");
    rustc
        .args(["--print", "target-libdir", "--target", target])
        .stderr(Stdio::null());
    let Ok(output) = rustc.output() else {
        return false;
    };
    output.status.success()
        && PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()).is_dir()
}
