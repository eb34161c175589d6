// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks, as their specifications say.

use vmsg_block::Disk;
use vmsg_device::blk::Blk;

use crate::spec::{BlkSpec, Store};

/// Makes the disk called `id`. Waits for a file that somebody else has locked, and for a server, for some seconds.
pub(super) fn make(spec: &BlkSpec, id: &str) -> anyhow::Result<Blk> {
    spec.check()?;
    let disk = open(spec)?;
    Ok(Blk::new(&spec.settings(id), disk))
}

fn open(spec: &BlkSpec) -> anyhow::Result<Box<dyn Disk>> {
    match spec.store()? {
        Store::File { path, .. } | Store::Qcow2 { path } => {
            spec.check_format(path)?;
            anyhow::bail!("no engine for files yet")
        }
        Store::Nbd(_) => anyhow::bail!("no engine for NBD yet"),
    }
}
