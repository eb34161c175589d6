// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header of an image (QEMU's `docs/interop/qcow2.txt`). The library reads it again; what it does not look at, and what
//! decides which files are opened, is looked at here, before.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

const MAGIC: u32 = u32::from_be_bytes(QCOW2_MAGIC);
/// How each qcow2 image begins.
pub const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// Where the incompatible features are, in images of version 3.
const INCOMPATIBLE: u64 = 72;
const V2_LEN: usize = 72;
const V3_LEN: usize = 104;
/// Longest name of a backing file, in bytes.
const LONGEST_NAME: u32 = 1023;
/// Largest first-level table, in bytes: QEMU's limit.
const LARGEST_L1: u64 = 32 << 20;
/// Largest refcount table, in bytes: QEMU's limit.
const LARGEST_REFTABLE: u64 = 8 << 20;
/// Header extensions that are looked at.
const MOST_EXTENSIONS: u32 = 64;

/// Refcounts may be wrong: whoever set it has not cleared it.
pub(super) const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;

/// Why a header is not taken.
#[derive(Debug)]
pub(super) enum Fault {
    Io(io::Error),
    NotQcow2,
    Damaged(String),
    Unsupported(&'static str),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn damaged<T>(reason: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Damaged(reason.into()))
}

/// What matters of a header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// Of the disk, in bytes.
    pub(super) size: u64,
    /// Entries of the first-level table.
    pub(super) l1_entries: u32,
    pub(super) l1_offset: u64,
    pub(super) reftable_offset: u64,
    pub(super) reftable_clusters: u32,
    pub(super) snapshots: u32,
    pub(super) incompatible: u64,
    /// log2 of the bits of a refcount.
    pub(super) refcount_order: u32,
    pub(super) backing: Option<String>,
    pub(super) backing_format: Option<String>,
    /// It has extensions that may own clusters.
    pub(super) unknown_extensions: bool,
}

impl Header {
    pub(super) fn read(file: &File) -> Result<Self, Fault> {
        let mut head = [0; V3_LEN];
        let len = read_up_to(file, &mut head, 0)?;
        if len < V2_LEN || be32(&head, 0) != MAGIC {
            return Err(Fault::NotQcow2);
        }
        let version = be32(&head, 4);
        let header_len = match version {
            2 => V2_LEN,
            3 if len == V3_LEN => usize::try_from(be32(&head, 100)).unwrap_or(usize::MAX),
            3 => return damaged("it ends in its header"),
            _ => return Err(Fault::Unsupported("this version of qcow2")),
        };
        let (incompatible, refcount_order) = match version {
            2 => (0, 4),
            _ => (be64(&head, 72), be32(&head, 96)),
        };
        let mut header = Self {
            version,
            cluster_bits: be32(&head, 20),
            size: be64(&head, 24),
            l1_entries: be32(&head, 36),
            l1_offset: be64(&head, 40),
            reftable_offset: be64(&head, 48),
            reftable_clusters: be32(&head, 56),
            snapshots: be32(&head, 60),
            incompatible,
            refcount_order,
            backing: None,
            backing_format: None,
            unknown_extensions: false,
        };
        header.check(be32(&head, 32))?;
        let least = if version == 2 { V2_LEN } else { V3_LEN };
        if header_len < least || header_len as u64 > header.cluster_size() {
            return damaged(format!("a header of {header_len} bytes"));
        }
        header.read_backing(file, be64(&head, 8), be32(&head, 16))?;
        header.read_extensions(file, header_len as u64)?;
        Ok(header)
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of a second-level table.
    pub(super) fn l2_entries(&self) -> u64 {
        self.cluster_size() / 8
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.incompatible & DIRTY != 0
    }

    fn check(&self, encryption: u32) -> Result<(), Fault> {
        if !(9..=21).contains(&self.cluster_bits) {
            return damaged(format!("clusters of 2^{} bytes", self.cluster_bits));
        }
        if encryption != 0 {
            return Err(Fault::Unsupported("encryption"));
        }
        if self.incompatible & CORRUPT != 0 {
            return damaged("it is marked as corrupt");
        }
        for (bit, what) in [
            (EXTERNAL_DATA, "a data file beside the image"),
            (COMPRESSION, "another compression than zlib"),
            (EXTENDED_L2, "clusters with subclusters (extended_l2)"),
            (!DIRTY, "an incompatible feature that is not known"),
        ] {
            if self.incompatible & bit != 0 {
                return Err(Fault::Unsupported(what));
            }
        }
        if self.refcount_order > 6 {
            return damaged(format!("refcounts of 2^{} bits", self.refcount_order));
        }
        if self.size > i64::MAX.unsigned_abs() {
            return damaged(format!("a size of {} bytes", self.size));
        }
        let inside = self.cluster_size() - 1;
        if (self.l1_offset | self.reftable_offset) & inside != 0 || self.reftable_offset == 0 {
            return damaged("a table that does not begin where a cluster does");
        }
        let bytes = u64::from(self.l1_entries) * 8;
        let needed = self.size.div_ceil(self.cluster_size() * self.l2_entries());
        if bytes > LARGEST_L1 || needed > u64::from(self.l1_entries) {
            return damaged(format!(
                "a first-level table with {} entries",
                self.l1_entries
            ));
        }
        if self.l1_entries > 0 && self.l1_offset == 0 {
            return damaged("no first-level table");
        }
        let bytes = u64::from(self.reftable_clusters) * self.cluster_size();
        if bytes == 0 || bytes > LARGEST_REFTABLE.max(self.cluster_size()) {
            return damaged(format!("a refcount table of {bytes} bytes"));
        }
        Ok(())
    }

    fn read_backing(&mut self, file: &File, offset: u64, len: u32) -> Result<(), Fault> {
        if offset == 0 {
            return Ok(());
        }
        let end = offset.checked_add(u64::from(len));
        if len > LONGEST_NAME || end.is_none_or(|end| end > self.cluster_size()) {
            return damaged("the name of its backing file is too long");
        }
        self.backing = Some(read_text(file, offset, len)?);
        Ok(())
    }

    fn read_extensions(&mut self, file: &File, mut at: u64) -> Result<(), Fault> {
        for _ in 0..MOST_EXTENSIONS {
            let mut head = [0; 8];
            if at + 8 > self.cluster_size() {
                // Version 2 may do without an end.
                return Ok(());
            }
            if read_up_to(file, &mut head, at)? < head.len() {
                return Ok(());
            }
            let (kind, len) = (be32(&head, 0), be32(&head, 4));
            at += 8;
            if at + u64::from(len) > self.cluster_size() {
                return damaged("a header extension longer than its cluster");
            }
            match kind {
                END => return Ok(()),
                BACKING_FORMAT if len <= LONGEST_NAME => {
                    self.backing_format = Some(read_text(file, at, len)?);
                }
                BACKING_FORMAT => return damaged("a long name of a format"),
                FEATURE_NAMES => {}
                _ => self.unknown_extensions = true,
            }
            at += u64::from(len).next_multiple_of(8);
        }
        damaged("header extensions without end")
    }
}

/// Sets or clears the mark that refcounts may be wrong. Images of version 2 have none.
pub(super) fn set_dirty(file: &File, dirty: bool) -> io::Result<()> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, INCOMPATIBLE)?;
    let features = u64::from_be_bytes(bytes);
    let features = if dirty {
        features | DIRTY
    } else {
        features & !DIRTY
    };
    file.write_all_at(&features.to_be_bytes(), INCOMPATIBLE)?;
    file.sync_data()
}

fn read_text(file: &File, offset: u64, len: u32) -> Result<String, Fault> {
    let mut text = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_exact_at(&mut text, offset)?;
    match String::from_utf8(text) {
        Ok(text) => Ok(text),
        Err(_) => damaged("a name that is not UTF-8"),
    }
}

/// Reads until `bytes` is full or the file ends.
pub(super) fn read_up_to(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.get(at..).and_then(<[u8]>::first_chunk);
    u32::from_be_bytes(*bytes.expect("inside a header"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    let bytes = bytes.get(at..).and_then(<[u8]>::first_chunk);
    u64::from_be_bytes(*bytes.expect("inside a header"))
}
