// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's file system: busybox, the kernel modules it needs, and the script it runs.

use std::fs;

use anyhow::{Context, Result};

use crate::cpio::Cpio;
use crate::kit::Kit;
use crate::modules;
use crate::tree::Files;

/// First script of every guest; runs `/script` and powers the guest off.
const INIT: &str = include_str!("guest/init.sh");
/// Functions for scripts.
const LIBRARY: &str = include_str!("guest/library.sh");
/// What udhcpc runs when it has a lease.
const LEASE: &str = include_str!("guest/lease.sh");

/// Adds files to a guest's file system.
pub(crate) type More<'a> = &'a mut dyn FnMut(&mut Cpio) -> Result<()>;

/// What a guest has of its own.
pub(crate) struct Content<'a> {
    /// What it runs.
    pub(crate) script: &'a str,
    /// Shell variables of the script.
    pub(crate) settings: &'a [(&'a str, String)],
    /// Adds more files.
    pub(crate) more: Option<More<'a>>,
}

/// The initial file system of a guest of `kit` that runs `script`. `settings` are shell variables of the script.
pub(crate) fn build(kit: &Kit, script: &str, settings: &[(&str, String)]) -> Result<Vec<u8>> {
    make(
        kit,
        Content {
            script,
            settings,
            more: None,
        },
    )
}

/// The initial file system of a guest of `kit` with this content.
pub(crate) fn make(kit: &Kit, content: Content<'_>) -> Result<Vec<u8>> {
    let Content {
        script,
        settings,
        more,
    } = content;
    let mut cpio = Cpio::default();
    for dir in ["bin", "dev", "proc", "sys", "etc", "tmp", "modules"] {
        cpio.directory(dir);
    }
    // The kernel opens it before anything is mounted.
    cpio.char_device("dev/console", 0o600, 5, 1);
    let busybox = fs::read(&kit.busybox)
        .with_context(|| format!("cannot read busybox {}", kit.busybox.display()))?;
    cpio.file("bin/busybox", 0o755, &busybox);
    cpio.symlink("bin/sh", "busybox");
    let mut load = String::new();
    if let Some(dir) = &kit.modules {
        let mut wanted = kit.more_modules.clone();
        wanted.extend([kit.machine.transport_module(), "virtio_net", "virtio_rng"]);
        for module in modules::resolve(dir, &wanted)? {
            let path = format!("modules/{}.ko", module.name);
            cpio.file(&path, 0o644, &module.object);
            load.push_str(&format!("/{path}\n"));
        }
    }
    let mut files = Files::default();
    for (tree, programs) in &kit.programs {
        for program in *programs {
            tree.add_to(&mut files, program)?;
        }
    }
    files.write(&mut cpio, &["bin", "modules"]);
    cpio.file("modules/order", 0o644, load.as_bytes());
    let mut variables = String::new();
    for (name, value) in settings {
        variables.push_str(&format!("{name}='{value}'\n"));
    }
    cpio.file("settings", 0o644, variables.as_bytes());
    cpio.file("library", 0o644, LIBRARY.as_bytes());
    cpio.file("lease", 0o755, LEASE.as_bytes());
    cpio.file("script", 0o644, script.as_bytes());
    cpio.file("init", 0o755, INIT.as_bytes());
    if let Some(add) = more {
        add(&mut cpio)?;
    }
    Ok(cpio.finish())
}
