// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks, as their specifications say.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::anyhow;
use vmsg_block::{
    Disk, Engine, FileConfig, FileDisk, Holder, Identity, LockError, NbdConfig, NbdDisk,
    NbdOpenError, OpenError, Qcow2Config, Qcow2Disk, Qcow2OpenError,
};
use vmsg_device::blk::{Blk, End};

use crate::Usage;
use crate::spec::{BlkSpec, DiskEngine, Store};

/// How long the end of a disk that was taken away is waited for.
const CLOSING: Duration = Duration::from_secs(20);

/// A disk that there is.
#[derive(Debug)]
struct Served {
    end: End,
    /// Its image, if it has one.
    image: Option<Identity>,
}

/// The disks that there are, by bus and id.
#[derive(Debug, Default)]
pub(super) struct Disks(Mutex<HashMap<(String, String), Served>>);

impl Disks {
    fn note(&self, spec: &BlkSpec, id: &str, end: End) {
        let key = (spec.bus.clone().unwrap_or_default(), id.to_owned());
        let image = identity(spec);
        let mut disks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        disks.insert(key, Served { end, image });
    }

    /// The id of the disk that has the image of `spec`.
    fn holder(&self, spec: &BlkSpec) -> Option<String> {
        let image = identity(spec)?;
        let disks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = disks
            .iter()
            .filter(|(_, served)| served.image == Some(image));
        found.next().map(|((_, id), _)| id.clone())
    }

    /// Waits for the end of a disk whose device was removed, if it is one. False: that takes long.
    pub(super) fn wait(&self, bus: &str, id: &str) -> bool {
        let key = (bus.to_owned(), id.to_owned());
        let mut disks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let end = disks.remove(&key);
        drop(disks);
        end.is_none_or(|served| served.end.wait(CLOSING))
    }
}

fn identity(spec: &BlkSpec) -> Option<Identity> {
    let (Store::File { path, .. } | Store::Qcow2 { path }) = spec.store().ok()? else {
        return None;
    };
    Identity::of_path(path).ok()
}

/// Whether a disk of this process has the image.
fn is_ours(error: &anyhow::Error) -> bool {
    let source = match (error.downcast_ref(), error.downcast_ref()) {
        (Some(OpenError::InUse { source, .. }), _) => source,
        (_, Some(Qcow2OpenError::InUse { source, .. })) => source,
        _ => return false,
    };
    matches!(source, LockError::Held(Holder::Ourselves))
}

/// Makes the disk called `id`. Waits for a file that somebody else has locked, and for a server, for some seconds.
pub(super) fn make(spec: &BlkSpec, id: &str, disks: &Disks) -> anyhow::Result<Blk> {
    spec.check()?;
    let disk = open(spec).map_err(|error| match disks.holder(spec) {
        Some(holder) if is_ours(&error) => anyhow!("{error}, for `{holder}`"),
        _ => error,
    })?;
    let details = disk.details().into_iter();
    let details: Vec<_> = details
        .map(|(name, value)| format!("{name}: {value}"))
        .collect();
    tracing::info!(device = id, "disk: {}", details.join("; "));
    if is_guessed(spec) {
        tracing::info!(
            device = id,
            "no format=: taken as raw, and writes that would make it look like a qcow2 image fail (format=raw allows them)"
        );
    }
    let mut blk = Blk::new(&spec.settings(id), disk);
    disks.note(spec, id, blk.end());
    Ok(blk)
}

/// That it is a raw disk was not said.
fn is_guessed(spec: &BlkSpec) -> bool {
    spec.format.is_none() && !spec.ro && matches!(spec.store(), Ok(Store::File { .. }))
}

fn open(spec: &BlkSpec) -> anyhow::Result<Box<dyn Disk>> {
    match spec.store()? {
        Store::File { path, engine } => {
            spec.check_format(path)?;
            let config = FileConfig {
                read_only: spec.ro,
                direct: spec.is_direct(),
                block_size: spec.block_size,
                engine: match engine {
                    DiskEngine::Auto => Engine::Auto,
                    DiskEngine::Uring => Engine::Uring,
                    DiskEngine::Inline => Engine::Inline,
                    DiskEngine::Threads => Engine::Threads,
                },
                discard: spec.discard.unwrap_or(true),
                guessed: is_guessed(spec),
                ..FileConfig::new(path)
            };
            let disk = FileDisk::open(&config).map_err(|error| match error {
                OpenError::NotADisk(_) => Usage(error.to_string()).into(),
                OpenError::NotDirect(_) => Usage(format!("cache=none: {error}")).into(),
                OpenError::BlockSize { .. } => Usage(format!("block-size: {error}")).into(),
                error => anyhow::Error::new(error),
            })?;
            Ok(Box::new(disk))
        }
        Store::Qcow2 { path } => {
            let config = Qcow2Config {
                read_only: spec.ro,
                backing: spec.backing,
                direct: spec.is_direct(),
                ..Qcow2Config::new(path)
            };
            let disk = Qcow2Disk::open(&config).map_err(|error| match error {
                Qcow2OpenError::NotQcow2(_) => Usage(format!("format=qcow2: {error}")).into(),
                Qcow2OpenError::BackingNotAllowed { .. } => Usage(error.to_string()).into(),
                error => anyhow::Error::new(error),
            })?;
            Ok(Box::new(disk))
        }
        Store::Nbd(uri) => {
            let config = NbdConfig {
                read_only: spec.ro,
                ..NbdConfig::new(uri)
            };
            let disk = NbdDisk::open(&config).map_err(|error| match error {
                NbdOpenError::ReadOnly(_) => Usage(error.to_string()).into(),
                error => anyhow::Error::new(error),
            })?;
            Ok(Box::new(disk))
        }
    }
}

#[cfg(test)]
#[path = "disk_test.rs"]
mod tests;
