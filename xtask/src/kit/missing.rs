// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is not here yet: asked for, or named.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;

use anyhow::{Result, bail};

use super::fetch::{Fetch, Part};
use crate::debian::Release;
use crate::tree::Spec;

/// What has to be installed or fetched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Missing<'a> {
    pub(super) packages: &'a [&'a str],
    pub(super) fetches: &'a [Fetch],
    pub(super) trees: &'a [Spec],
    /// Targets for which there is no library of Rust.
    pub(super) libraries: &'a [&'static str],
}

impl Missing<'_> {
    /// Shows what is about to be done and, on a terminal, asks; nothing if nothing is missing.
    pub(super) fn ask(&self, cache: &Path, yes: bool) -> Result<()> {
        let Self {
            packages,
            fetches,
            trees,
            libraries,
        } = *self;
        if packages.is_empty() && fetches.is_empty() && trees.is_empty() && libraries.is_empty() {
            return Ok(());
        }
        println!("Before the first run, this will");
        if !packages.is_empty() {
            println!("  install with apt-get: {}", packages.join(" "));
        }
        for tree in trees {
            println!(
                "  fetch into {}: {}, only unpacked there (some {} MB)",
                cache.display(),
                tree.what(),
                tree.megabytes()
            );
        }
        for Fetch {
            machine,
            part,
            release,
        } in fetches
        {
            let (what, size) = match (part, release) {
                (Part::Kernel, Release::Own) => ("a stock Debian kernel", "25 to 70 MB"),
                (Part::Kernel, _) => ("the newest kernel for Debian 13", "25 to 120 MB"),
                (Part::Busybox, _) => ("a static busybox", "1 MB"),
            };
            println!(
                "  fetch into {}: {what} for {} ({size})",
                cache.display(),
                machine.debian_arch()
            );
        }
        for target in libraries {
            println!(
                "  get Rust's library for {target} with `rustup target add` (30 MB), or else build it from its sources \
                 into {}",
                cache.display()
            );
        }
        if yes || !io::stdin().is_terminal() {
            return Ok(());
        }
        print!("Go ahead? [Y/n] ");
        io::stdout().flush()?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        match answer.trim() {
            "" | "y" | "Y" | "yes" => Ok(()),
            _ => bail!("nothing was installed or fetched"),
        }
    }
}

/// On a machine that is not Debian nothing is installed: says what is missing and how to name it.
pub(super) fn refuse_elsewhere(packages: &[&str], fetches: &[Fetch], trees: &[Spec]) -> Result<()> {
    if packages.is_empty() && fetches.is_empty() && trees.is_empty() {
        return Ok(());
    }
    let mut missing = String::new();
    for tree in trees {
        missing.push_str(&format!(
            "\n  {}: only Debian's are used; run this in a Debian system (a container will do)",
            tree.what()
        ));
    }
    for package in packages {
        missing.push_str(&format!(
            "\n  QEMU 7.2 or later (Debian calls the package {package}): install it, or name it with --qemu FILE"
        ));
    }
    for Fetch { machine, part, .. } in fetches {
        missing.push_str(&match part {
            Part::Kernel => format!(
                "\n  a kernel for {0} with virtio_net and {1} (built in, or as modules): name it with --kernel FILE, and \
                 its modules with --modules DIR",
                machine.name(),
                machine.transport_module()
            ),
            Part::Busybox => format!(
                "\n  a statically linked busybox for {}: install it, or name it with --busybox FILE",
                machine.name()
            ),
        });
    }
    bail!(
        "not on Debian, where this is fetched by itself: name what is missing with --qemu, --kernel and --busybox:{missing}"
    )
}
