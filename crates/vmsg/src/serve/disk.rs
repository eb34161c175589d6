// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks, as their specifications say.

use vmsg_block::{
    Disk, Engine, FileConfig, FileDisk, NbdConfig, NbdDisk, NbdOpenError, OpenError, Qcow2Config,
    Qcow2Disk, Qcow2OpenError,
};
use vmsg_device::blk::Blk;

use crate::Usage;
use crate::spec::{BlkSpec, DiskEngine, Store};

/// Makes the disk called `id`. Waits for a file that somebody else has locked, and for a server, for some seconds.
pub(super) fn make(spec: &BlkSpec, id: &str) -> anyhow::Result<Blk> {
    spec.check()?;
    let disk = open(spec)?;
    Ok(Blk::new(&spec.settings(id), disk))
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
