// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The folder of a running description: sockets and logs, for this user alone, and one `up` at a time.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};

/// Where folders of running descriptions are.
pub(super) fn runtimes() -> PathBuf {
    let uid = rustix::process::geteuid();
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if Path::new(&dir).is_absolute() => Path::new(&dir).join("vmsg"),
        _ if uid.is_root() => PathBuf::from("/run/vmsg"),
        _ => PathBuf::from(format!("/tmp/vmsg-{}", uid.as_raw())),
    }
}

/// A folder that this process has to itself.
#[derive(Debug)]
pub(super) struct Runtime {
    /// Locked while this lives.
    _lock: File,
}

impl Runtime {
    /// Makes the folder at `path` for the description called `name`.
    ///
    /// # Errors
    /// Somebody else's folder; another `up` that has it.
    pub(super) fn take(path: &Path, name: &str) -> anyhow::Result<Self> {
        let context = || format!("cannot have the runtime folder {}", path.display());
        if let Some(parent) = path.parent() {
            // That of a name alone is where this process is.
            let here = parent.as_os_str().is_empty();
            own_folder(if here { Path::new(".") } else { parent }, false).with_context(context)?;
        }
        own_folder(path, true).with_context(context)?;
        own_folder(&path.join("logs"), true).with_context(context)?;
        let mut lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(path.join("lock"))
            .with_context(context)?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut pid = String::new();
            // One that has not said yet who it is.
            let _ = Read::by_ref(&mut lock).take(20).read_to_string(&mut pid);
            let pid = pid.trim();
            let who = if pid.is_empty() {
                "another process".to_owned()
            } else {
                format!("process {pid}")
            };
            bail!("`{name}` is up already: {who} has {}", path.display());
        }
        lock.set_len(0)?;
        lock.rewind()?;
        writeln!(lock, "{}", std::process::id())?;
        Ok(Self { _lock: lock })
    }
}

/// Makes a folder that only this user can write to; with `private` it is this user's alone.
fn own_folder(path: &Path, private: bool) -> anyhow::Result<()> {
    let made = DirBuilder::new()
        .recursive(!private)
        .mode(0o700)
        .create(path);
    match made {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error.into()),
    }
    let uid = rustix::process::geteuid().as_raw();
    if !private {
        // Whoever can change names in it can put another folder in the place of ours. A link counts as what it leads to, and
        // must be ours as well, or root's.
        let (link, found) = (fs::symlink_metadata(path)?, fs::metadata(path)?);
        let owners = [link.uid(), found.uid()];
        let is_shared = found.mode() & 0o002 != 0 && found.mode() & 0o1000 == 0;
        if !found.is_dir() || owners.iter().any(|owner| ![uid, 0].contains(owner)) || is_shared {
            bail!(
                "{} is not a folder in which nobody else can rename what is this user's",
                path.display()
            );
        }
        return Ok(());
    }
    let found = fs::symlink_metadata(path)?;
    if !found.is_dir() || found.uid() != uid {
        bail!("{} is not a folder of this user's", path.display());
    }
    if found.mode() & 0o077 != 0 {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "runtime_test.rs"]
mod tests;
