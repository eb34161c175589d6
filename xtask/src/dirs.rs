// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where things are kept: the workspace, the download cache, and a fresh folder for every run.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

/// The root of the workspace that cargo runs this program for. Two clones that share a target folder also share
/// this program: cargo's word at run time counts, not where it was built.
pub(crate) fn workspace() -> &'static Path {
    static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
        let xtask = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        xtask
            .parent()
            .expect("xtask lies one folder below the workspace")
            .to_owned()
    });
    &ROOT
}

/// Cargo's target folder.
pub(crate) fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => workspace().join(dir),
        None => workspace().join("target"),
    }
}

/// The folder for downloads: `VMSG_CACHE`, or `$XDG_CACHE_HOME/vmsg`, or `~/.cache/vmsg`. It is created.
pub(crate) fn cache() -> Result<PathBuf> {
    let absolute = |name: &str| {
        env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let dir = if let Some(dir) = absolute("VMSG_CACHE") {
        dir
    } else if let Some(dir) = absolute("XDG_CACHE_HOME") {
        dir.join("vmsg")
    } else if let Some(home) = absolute("HOME") {
        home.join(".cache/vmsg")
    } else {
        bail!("no folder for downloads: set VMSG_CACHE (neither XDG_CACHE_HOME nor HOME is set)");
    };
    fs::create_dir_all(&dir).with_context(|| {
        format!(
            "cannot create the cache folder {}; set VMSG_CACHE to one that can be written",
            dir.display()
        )
    })?;
    dir.canonicalize()
        .with_context(|| format!("cannot resolve {}", dir.display()))
}

/// Runs older than this are removed when there are more than [`KEEP_RUNS`].
const KEEP_FOR: Duration = Duration::from_secs(3600);
/// How many run folders stay whatever their age.
const KEEP_RUNS: usize = 12;

/// A folder for one run: `keep` if given (created, must be empty), else a new one under `target/xtask`.
pub(crate) fn run_folder(name: &str, keep: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = keep {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let mut entries =
            fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
        if entries.next().is_some() {
            bail!(
                "{} is not empty: name a new or an empty folder for this run",
                dir.display()
            );
        }
        return Ok(dir.canonicalize()?);
    }
    let parent = target().join("xtask");
    fs::create_dir_all(&parent).with_context(|| format!("cannot create {}", parent.display()))?;
    forget_old_runs(&parent);
    let dir = tempfile::Builder::new()
        .prefix(&format!("{name}."))
        .tempdir_in(&parent)
        .with_context(|| format!("cannot create a folder in {}", parent.display()))?;
    Ok(dir.keep())
}

/// Removes old run folders. What cannot be removed stays: it only costs disk space.
fn forget_old_runs(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    let mut runs: Vec<(SystemTime, PathBuf)> = entries
        .flatten()
        .filter_map(|e| {
            Some((
                e.metadata()
                    .ok()
                    .filter(fs::Metadata::is_dir)?
                    .modified()
                    .ok()?,
                e.path(),
            ))
        })
        .collect();
    runs.sort();
    runs.reverse();
    for (modified, path) in runs.into_iter().skip(KEEP_RUNS) {
        if modified.elapsed().is_ok_and(|age| age > KEEP_FOR) {
            let _ = fs::remove_dir_all(path);
        }
    }
}
