// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From a path to an image that the library has opened, with the files behind it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, StorageOpenOptions};
use rustix::fs::OFlags;

use super::config::{Qcow2Config, Qcow2OpenError};
use super::header::{self, Fault, Header};
use super::repair;
use crate::in_use::InUse;
use crate::lock::{LockError, Purpose, open_image};

/// Files behind each other that are opened.
const MOST_BACKINGS: usize = 16;

/// An image of the library's.
pub(super) type Image = FormatAccess<Storage>;

/// An open image.
pub(super) struct Opened {
    pub(super) image: Image,
    pub(super) header: Header,
    /// The image once more, for the mark in its header; not for what the library does.
    pub(super) file: File,
    /// It, and what is behind it.
    pub(super) in_use: Vec<InUse>,
}

pub(super) fn open(config: &Qcow2Config) -> Result<Opened, Qcow2OpenError> {
    let mut in_use = Vec::new();
    let (locked, file) = open_file(&config.path, !config.read_only, config, &mut in_use)?;
    let mut header = read_header(&file, &config.path)?;
    if header.size < 512 {
        let reason = "it has less than a sector".to_owned();
        return Err(fault(&config.path, Fault::Damaged(reason)));
    }
    if config.read_only {
        if header.is_dirty() {
            return Err(Qcow2OpenError::NotClosed(config.path.clone()));
        }
    } else {
        put_in_order(&file, &mut header, &config.path)?;
    }
    let write = !config.read_only;
    let mut chain = Chain {
        config,
        depth: 0,
        in_use: &mut in_use,
    };
    let image = chain.open_layer(locked, &header, &config.path, write)?;
    Ok(Opened {
        image,
        header,
        file,
        in_use,
    })
}

/// A file with its locks, for the library, and once more for us.
fn open_file(
    path: &Path,
    write: bool,
    config: &Qcow2Config,
    in_use: &mut Vec<InUse>,
) -> Result<(File, File), Qcow2OpenError> {
    let purpose = if write { Purpose::Write } else { Purpose::Read };
    let failed = |source| Qcow2OpenError::File {
        path: path.to_owned(),
        source,
    };
    let opened = open_image(path, purpose, config.patience).map_err(|error| match error {
        LockError::Os { source, .. } => failed(source),
        error @ LockError::NotADisk => failed(io::Error::other(error)),
        source => Qcow2OpenError::InUse {
            path: path.to_owned(),
            source,
        },
    })?;
    in_use.push(opened.in_use);
    let locked = opened.file;
    // The same file, whatever is at the path by now.
    let again = format!("/proc/self/fd/{}", locked.as_raw_fd());
    let file = File::options()
        .read(true)
        .write(write)
        .open(again)
        .map_err(failed)?;
    if config.direct {
        let flags = rustix::fs::fcntl_getfl(&locked).map_err(|error| failed(error.into()))?;
        rustix::fs::fcntl_setfl(&locked, flags | OFlags::DIRECT)
            .map_err(|error| failed(error.into()))?;
    }
    Ok((locked.into(), file))
}

fn read_header(file: &File, path: &Path) -> Result<Header, Qcow2OpenError> {
    Header::read(file).map_err(|error| fault(path, error))
}

fn fault(path: &Path, error: Fault) -> Qcow2OpenError {
    let path = path.to_owned();
    match error {
        Fault::Io(source) => Qcow2OpenError::File { path, source },
        Fault::NotQcow2 => Qcow2OpenError::NotQcow2(path),
        Fault::Damaged(reason) => Qcow2OpenError::Damaged { path, reason },
        Fault::Unsupported(reason) => Qcow2OpenError::Unsupported { path, reason },
    }
}

/// Before an image is written: its refcounts are right. Version 2 has no mark that says so.
fn put_in_order(file: &File, header: &mut Header, path: &Path) -> Result<(), Qcow2OpenError> {
    if header.version == 2 && header.snapshots > 0 {
        let reason = "writing an image of version 2 with snapshots";
        return Err(fault(path, Fault::Unsupported(reason)));
    }
    if header.version > 2 && !header.is_dirty() {
        return repair::check(file, header).map_err(|error| fault(path, error));
    }
    let repaired = repair::repair(file, header).map_err(|error| fault(path, error))?;
    if repaired != repair::Repaired::default() {
        tracing::warn!(
            "{} was not closed by who last wrote it: {} refcounts put right, {} clusters given back",
            path.display(),
            repaired.missing,
            repaired.leaked
        );
    }
    if header.is_dirty() {
        header::set_dirty(file, false)?;
        header.incompatible &= !header::DIRTY;
    }
    Ok(())
}

/// An image with those behind it.
struct Chain<'a> {
    config: &'a Qcow2Config,
    depth: usize,
    in_use: &'a mut Vec<InUse>,
}

impl Chain<'_> {
    /// Opens an image and what is behind it.
    fn open_layer(
        &mut self,
        file: File,
        header: &Header,
        path: &Path,
        write: bool,
    ) -> Result<Image, Qcow2OpenError> {
        let backing = match &header.backing {
            None => None,
            Some(backing) if !self.config.backing => {
                return Err(Qcow2OpenError::BackingNotAllowed {
                    path: path.to_owned(),
                    backing: backing.clone(),
                });
            }
            Some(backing) => Some(self.open_backing(backing, header, path)?),
        };
        let storage = storage(file, path, write, self.config)?;
        caught(path, || {
            let mut image = Qcow2::open_image(storage, write)?;
            image.set_data_file(None);
            image.set_backing(backing);
            Ok(FormatAccess::new(image))
        })
    }

    fn open_backing(
        &mut self,
        name: &str,
        header: &Header,
        path: &Path,
    ) -> Result<Image, Qcow2OpenError> {
        if self.depth == MOST_BACKINGS {
            return Err(Qcow2OpenError::TooManyBackings {
                path: self.config.path.clone(),
                most: MOST_BACKINGS,
            });
        }
        let raw = match header.backing_format.as_deref() {
            Some("raw" | "file") => true,
            Some("qcow2") => false,
            Some(_) => {
                let reason = "a backing file of another format than raw or qcow2";
                return Err(fault(path, Fault::Unsupported(reason)));
            }
            None => {
                return Err(Qcow2OpenError::BackingFormat {
                    path: path.to_owned(),
                    backing: name.to_owned(),
                });
            }
        };
        // Names are paths, relative to the image that has them.
        let backing = path.parent().unwrap_or(Path::new("")).join(name);
        let (locked, file) = open_file(&backing, false, self.config, self.in_use)?;
        if raw {
            let storage = storage(locked, &backing, false, self.config)?;
            return caught(&backing, || {
                Ok(FormatAccess::new(Raw::open_image(storage, false)?))
            });
        }
        let header = read_header(&file, &backing)?;
        if header.is_dirty() {
            return Err(Qcow2OpenError::NotClosed(backing));
        }
        self.depth += 1;
        self.open_layer(locked, &header, &backing, false)
    }
}

fn storage(
    file: File,
    path: &Path,
    write: bool,
    config: &Qcow2Config,
) -> Result<Storage, Qcow2OpenError> {
    let options = StorageOpenOptions::new()
        .write(write)
        .direct(config.direct)
        .filename(path);
    caught(path, || Storage::from_open_file(file, options))
}

/// What the library says, or that it panics.
fn caught<T>(path: &Path, call: impl FnOnce() -> io::Result<T>) -> Result<T, Qcow2OpenError> {
    let path = path.to_owned();
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) if error.raw_os_error().is_some() => Err(Qcow2OpenError::File {
            path,
            source: error,
        }),
        Ok(Err(error)) => Err(Qcow2OpenError::Damaged {
            path,
            reason: error.to_string(),
        }),
        Err(_) => Err(Qcow2OpenError::Damaged {
            path,
            reason: "the qcow2 library cannot cope with it".to_owned(),
        }),
    }
}
