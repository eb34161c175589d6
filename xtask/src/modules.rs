// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds the kernel modules a guest needs, in the order in which they must be inserted.
//!
//! A kernel package carries no `modules.dep` (installing it creates one), so dependencies are read from the modules
//! themselves: the `depends=` string that `modpost` puts into the section `.modinfo`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};

/// A module ready to be inserted: uncompressed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Module {
    /// The name, with underscores.
    pub(crate) name: String,
    /// The object file.
    pub(crate) object: Vec<u8>,
}

/// The modules in `dir` (as `/lib/modules/VERSION`) that `wanted` names and all they depend on, each after those it
/// depends on. What is built into the kernel is left out.
///
/// # Errors
/// A wanted module that is neither there nor built in.
pub(crate) fn resolve(dir: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    collect(&dir.join("kernel"), &mut files)?;
    let builtin = fs::read_to_string(dir.join("modules.builtin")).unwrap_or_default();
    let builtin: BTreeSet<String> = builtin
        .lines()
        .filter_map(|l| module_name(Path::new(l)))
        .collect();
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for name in wanted {
        visit(name, dir, &files, &builtin, &mut seen, &mut order)?;
    }
    Ok(order)
}

fn visit(
    name: &str,
    dir: &Path,
    files: &BTreeMap<String, PathBuf>,
    builtin: &BTreeSet<String>,
    seen: &mut BTreeSet<String>,
    order: &mut Vec<Module>,
) -> Result<()> {
    if builtin.contains(name) || !seen.insert(name.to_owned()) {
        return Ok(());
    }
    let file = files.get(name).with_context(|| {
        format!(
            "the kernel whose modules are in {} has no {name}: name another one with --kernel",
            dir.display()
        )
    })?;
    let object = read_object(file)?;
    for dependency in dependencies(&object) {
        visit(&dependency, dir, files, builtin, seen, order)?;
    }
    order.push(Module {
        name: name.to_owned(),
        object,
    });
    Ok(())
}

fn collect(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in
        fs::read_dir(dir).with_context(|| format!("no kernel modules in {}", dir.display()))?
    {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else if let Some(name) = module_name(&entry.path()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// `…/virtio-rng.ko.xz` is the module `virtio_rng`.
fn module_name(path: &Path) -> Option<String> {
    let (name, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

/// The object in `file`, uncompressed.
fn read_object(file: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    match file.extension().and_then(|e| e.to_str()) {
        Some("ko") => Ok(bytes),
        Some("xz") => {
            let mut object = Vec::new();
            lzma_rs::xz_decompress(&mut bytes.as_slice(), &mut object).map_err(|error| {
                anyhow::anyhow!("cannot decompress {}: {error:?}", file.display())
            })?;
            Ok(object)
        }
        Some("zst") => filter("zstd", bytes),
        Some("gz") => filter("gzip", bytes),
        _ => bail!(
            "unknown compression of the kernel module {}",
            file.display()
        ),
    }
}

/// Decompresses through a program, as `zstd -dc`.
fn filter(program: &str, input: Vec<u8>) -> Result<Vec<u8>> {
    let mut child = Command::new(program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("this kernel's modules are compressed: install {program}"))?;
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let writer = thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output()?;
    let written = writer.join().expect("the writer does not panic");
    if !output.status.success() || written.is_err() {
        bail!(
            "{program} cannot decompress a kernel module ({})",
            output.status
        );
    }
    Ok(output.stdout)
}

/// The names in the module's `depends=` string.
fn dependencies(object: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = object.windows(KEY.len()).position(|w| w == KEY) else {
        return Vec::new();
    };
    let value = object[at + KEY.len()..]
        .split(|b| *b == 0)
        .next()
        .unwrap_or_default();
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|n| !n.is_empty())
        .map(|n| n.replace('-', "_"))
        .collect()
}

#[cfg(test)]
#[path = "modules_test.rs"]
mod tests;
