// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmsg_block::{FileConfig, NbdAddress, NbdConfig, NbdUri, Qcow2Config};
use vmsg_device::blk::{MAX_QUEUES, SERIAL_BYTES, Settings};

use super::is_default;
use crate::Usage;

/// `blk,…`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct BlkSpec {
    /// Name of the device; `blk0`, `blk1`, … by default.
    #[serde(skip_serializing_if = "is_default")]
    pub id: Option<String>,
    /// Its number on the bus; the lowest free one by default.
    #[serde(skip_serializing_if = "is_default")]
    pub num: Option<u16>,
    /// The bus it is on; the first by default.
    #[serde(skip_serializing_if = "is_default")]
    pub bus: Option<String>,
    /// Which worker serves it, counted from 0.
    #[serde(skip_serializing_if = "is_default")]
    pub worker: Option<usize>,
    /// A file, a block device, or the URI of an NBD export.
    #[serde(skip_serializing_if = "is_default")]
    pub path: Option<String>,
    /// What is in the file; `raw` by default, unless it looks like something else.
    #[serde(skip_serializing_if = "is_default")]
    pub format: Option<DiskFormat>,
    /// Nothing is written.
    #[serde(skip_serializing_if = "is_default")]
    pub ro: bool,
    /// Serial number, of 20 bytes at most; the id by default.
    #[serde(skip_serializing_if = "is_default")]
    pub serial: Option<String>,
    /// What happens to what is written; `writeback` by default.
    #[serde(skip_serializing_if = "is_default")]
    pub cache: Option<DiskCache>,
    /// Queues; one by default.
    #[serde(skip_serializing_if = "is_default")]
    pub queues: Option<u16>,
    /// Bytes of a block; what the disk has by default.
    #[serde(skip_serializing_if = "is_default")]
    pub block_size: Option<u32>,
    /// Whether space that the guest does not need any more is given back; on by default.
    #[serde(skip_serializing_if = "is_default")]
    pub discard: Option<bool>,
    /// `qcow2`: the image may name a backing file, which is then opened for reading.
    #[serde(skip_serializing_if = "is_default")]
    pub backing: bool,
    /// `raw`: who reads and writes; `auto` by default.
    #[serde(skip_serializing_if = "is_default")]
    pub engine: Option<DiskEngine>,
}

/// What is in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// The blocks, one after another.
    Raw,
    /// An image as QEMU makes them.
    Qcow2,
}

/// What happens to what is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskCache {
    /// It is in this host's page cache until the guest flushes.
    Writeback,
    /// It is on the medium before the guest is told that it is written.
    Writethrough,
    /// It goes past this host's page cache; the medium may have one of its own until the guest flushes.
    None,
}

/// Who reads and writes a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskEngine {
    /// `inline` for files in memory, else `uring`, or `threads` where that is not to be had.
    Auto,
    /// The kernel, through io_uring.
    Uring,
    /// The worker itself, at once.
    Inline,
    /// Threads.
    Threads,
}

/// Where the blocks are.
#[derive(Clone, Debug)]
pub(crate) enum Store<'a> {
    /// In a file, one after another.
    File { path: &'a Path, engine: DiskEngine },
    /// In an image.
    Qcow2 { path: &'a Path },
    /// On a server.
    Nbd(NbdUri),
}

/// How a qcow2 image begins.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

impl BlkSpec {
    /// Looks for what cannot be, whatever is on the machine.
    pub(crate) fn check(&self) -> Result<(), Usage> {
        self.store()?;
        if let Some(queues) = self.queues.filter(|n| !(1..=MAX_QUEUES).contains(n)) {
            return Err(Usage(format!(
                "queues={queues}: 1 to {MAX_QUEUES} are possible"
            )));
        }
        if let Some(serial) = &self.serial
            && (serial.len() > SERIAL_BYTES || serial.contains('\0'))
        {
            return Err(Usage(format!(
                "serial={serial}: at most {SERIAL_BYTES} bytes are possible, without NUL"
            )));
        }
        if let Some(size) = self
            .block_size
            .filter(|size| !size.is_power_of_two() || !(512..=1 << 20).contains(size))
        {
            return Err(Usage(format!(
                "block-size={size}: a power of two from 512 to 1048576 is possible"
            )));
        }
        Ok(())
    }

    /// Where the blocks are to be.
    pub(crate) fn store(&self) -> Result<Store<'_>, Usage> {
        let path = match self.path.as_deref() {
            None | Some("") => {
                return Err(Usage(
                    "`path=…` is missing: a file, a block device or nbd://HOST/EXPORT".to_owned(),
                ));
            }
            Some(path) => path,
        };
        let only = |given: bool, key: &str, what: &str| {
            if given {
                return Err(Usage(format!("{key} is for {what} only")));
            }
            Ok(())
        };
        let nbd = NbdUri::is_meant(path);
        if nbd || self.format == Some(DiskFormat::Qcow2) {
            only(self.engine.is_some(), "engine=", "files with format=raw")?;
            only(
                self.block_size.is_some(),
                "block-size=",
                "files with format=raw",
            )?;
        }
        if self.format != Some(DiskFormat::Qcow2) {
            only(self.backing, "backing=on", "format=qcow2")?;
        }
        if nbd {
            only(self.format.is_some(), "format=", "files")?;
            only(self.is_direct(), "cache=none", "files")?;
            let uri = path.parse();
            return Ok(Store::Nbd(
                uri.map_err(|error| Usage(format!("path={path}: {error}")))?,
            ));
        }
        if let Some(uri) = uri_of_old(path) {
            return Err(Usage(format!(
                "path={path}: this is written {uri} here (a file of this name is ./{path})"
            )));
        }
        let path = Path::new(path);
        Ok(match self.format {
            Some(DiskFormat::Qcow2) => Store::Qcow2 { path },
            Some(DiskFormat::Raw) | None => Store::File {
                path,
                engine: self.engine.unwrap_or(DiskEngine::Auto),
            },
        })
    }

    /// For whom it waits when it is opened, and how long.
    pub(crate) fn waits_for(&self) -> Option<(String, Duration)> {
        match self.store().ok()? {
            Store::Nbd(uri) => Some((format!("the NBD server at {uri}"), NbdConfig::TIMEOUT)),
            Store::File { path, .. } => {
                let patience = FileConfig::new(path).patience;
                Some((format!("whoever uses {}", path.display()), patience))
            }
            Store::Qcow2 { path } => {
                let patience = Qcow2Config::new(path).patience;
                Some((format!("whoever uses {}", path.display()), patience))
            }
        }
    }

    /// Whether files are used past the page cache.
    pub(crate) fn is_direct(&self) -> bool {
        self.cache == Some(DiskCache::None)
    }

    /// Refuses a file without `format=` that looks like an image: served as it is, its guest would see the image's tables, and write
    /// over them. It is no more than a help: whoever writes the first bytes of a file chooses what it looks like, and so must not
    /// choose how it is read.
    pub(crate) fn check_format(&self, path: &Path) -> Result<(), Usage> {
        if self.format.is_some() || !begins_with_magic(path).unwrap_or(false) {
            return Ok(());
        }
        let path = path.display();
        Err(Usage(format!(
            "`format=…` is missing: {path} begins as qcow2 images do; format=qcow2 is for what is in the image, format=raw for the file as it is"
        )))
    }

    /// Queues that the device has.
    pub(crate) fn queues(&self) -> usize {
        usize::from(self.queues.unwrap_or(1).clamp(1, MAX_QUEUES))
    }

    /// The device's settings.
    pub(crate) fn settings(&self, id: &str) -> Settings {
        Settings {
            name: id.to_owned(),
            serial: self.serial.clone().unwrap_or_else(|| id.to_owned()),
            queues: self.queues.unwrap_or(1),
            write_back: self.cache != Some(DiskCache::Writethrough),
            discard: self.discard.unwrap_or(true),
        }
    }
}

/// The URI for what QEMU's old syntax says: `nbd:HOST:PORT[:exportname=NAME]`, `nbd:unix:PATH[:exportname=NAME]`.
fn uri_of_old(text: &str) -> Option<NbdUri> {
    let rest = text.strip_prefix("nbd:")?;
    let (place, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    let address = match place.strip_prefix("unix:") {
        Some("") => return None,
        Some(socket) => NbdAddress::Unix(socket.into()),
        None => {
            let (host, port) = place.rsplit_once(':')?;
            let host = host.trim_start_matches('[').trim_end_matches(']');
            NbdAddress::Tcp {
                host: Some(host).filter(|host| !host.is_empty())?.to_owned(),
                port: port.parse().ok()?,
            }
        }
    };
    Some(NbdUri {
        address,
        export: export.to_owned(),
    })
}

fn begins_with_magic(path: &Path) -> io::Result<bool> {
    // Opening a pipe, or reading from a terminal, would wait for somebody at the other end.
    let kind = std::fs::metadata(path)?.file_type();
    if !kind.is_file() && !std::os::unix::fs::FileTypeExt::is_block_device(&kind) {
        return Ok(false);
    }
    let mut first = [0; 4];
    File::open(path)?.read_exact(&mut first)?;
    Ok(first == QCOW2_MAGIC)
}

#[cfg(test)]
#[path = "blk_test.rs"]
mod tests;
