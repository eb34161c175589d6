// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Refcounts of an image whose last writer was killed.
//!
//! The library writes pointers to new tables at once and refcounts later. If it is killed in between, a cluster that is in use
//! has a refcount of zero, and whoever writes next would use it for something else. So an image is marked as dirty while it is
//! written, as QEMU does with lazy refcounts, and before it is written again, all refcounts are compared with what is in use.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use super::header::{Fault, Header, read_up_to};

/// Offsets in entries of tables.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
/// The most clusters that are counted: 4 TiB of the usual ones; two bytes of memory each.
const MOST_CLUSTERS: u64 = 1 << 26;
/// Second-level tables of so many bytes are read at least before their number is doubted.
const PLENTY: u64 = 4 << 30;
/// So much of a block of refcounts is read to look at some of them, in bytes.
const PART: u64 = 4 << 10;

/// What was wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Repaired {
    /// Clusters in use that were not counted, or not often enough.
    pub(super) missing: u64,
    /// Clusters that were counted and are not in use.
    pub(super) leaked: u64,
}

/// How often each cluster is in use.
struct Uses {
    counts: Vec<u16>,
    cluster_bits: u32,
}

impl Uses {
    fn new(cluster_bits: u32) -> Self {
        Self {
            counts: Vec::new(),
            cluster_bits,
        }
    }

    fn slot(&mut self, cluster: u64) -> Result<&mut u16, Fault> {
        let index = usize::try_from(cluster)
            .ok()
            .filter(|_| cluster < MOST_CLUSTERS);
        let Some(index) = index else {
            return Err(Fault::Damaged(format!(
                "cluster {cluster} is too far behind to be looked at"
            )));
        };
        if index >= self.counts.len() {
            self.counts.resize(index + 1, 0);
        }
        Ok(&mut self.counts[index])
    }

    /// These bytes, whole clusters, are used for one thing only.
    fn own(&mut self, offset: u64, len: u64) -> Result<(), Fault> {
        let size = 1u64 << self.cluster_bits;
        if offset & (size - 1) != 0 || offset == 0 && len > size {
            return Err(Fault::Damaged(format!(
                "something at {offset:#x}, which is not where a cluster begins"
            )));
        }
        for cluster in 0..len.div_ceil(size) {
            let slot = self.slot((offset >> self.cluster_bits) + cluster)?;
            if *slot != 0 {
                return Err(Fault::Damaged(format!(
                    "the cluster at {offset:#x} is used twice"
                )));
            }
            *slot = 1;
        }
        Ok(())
    }

    /// These bytes are shared with other compressed clusters.
    fn share(&mut self, offset: u64, len: u64) -> Result<(), Fault> {
        let (first, last) = (
            offset >> self.cluster_bits,
            (offset + len - 1) >> self.cluster_bits,
        );
        for cluster in first..=last {
            let slot = self.slot(cluster)?;
            *slot = slot.saturating_add(1);
        }
        Ok(())
    }
}

/// Looks whether what an image is made of is counted as in use, and each of it used once. Without that, the library takes it for free
/// space, or never comes to its end. What is in the clusters of the disk is not looked at.
pub(super) fn check(file: &File, header: &Header) -> Result<(), Fault> {
    let size = header.cluster_size();
    let l1 = read_table(file, header.l1_offset, u64::from(header.l1_entries))?;
    let reftable_len = u64::from(header.reftable_clusters) * size;
    let reftable = read_table(file, header.reftable_offset, reftable_len / 8)?;
    let mut clusters = vec![0];
    for (offset, len) in [
        (header.l1_offset, l1.len() as u64 * 8),
        (header.reftable_offset, reftable_len),
    ] {
        let first = offset >> header.cluster_bits;
        clusters.extend(first..first + len.div_ceil(size));
    }
    let l2 = l1
        .iter()
        .map(|entry| entry & OFFSET)
        .filter(|&offset| offset != 0);
    for offset in l2.chain(reftable.iter().copied().filter(|&block| block != 0)) {
        if offset & (size - 1) != 0 {
            return Err(Fault::Damaged(format!(
                "a table at {offset:#x}, which is not where a cluster begins"
            )));
        }
        clusters.push(offset >> header.cluster_bits);
    }
    clusters.sort_unstable();
    if let Some(twice) = clusters.windows(2).find(|two| two[0] == two[1]) {
        return Err(Fault::Damaged(format!(
            "cluster {} has two tables",
            twice[0]
        )));
    }
    let per_block = (size * 8) >> header.refcount_order;
    // Of blocks only what is looked at is read: large ones may be many, and have a single number each.
    let part = size.min(PART);
    let per_part = (part * 8) >> header.refcount_order;
    let mut numbers = vec![0; usize::try_from(part).unwrap_or(0)];
    let mut loaded = None;
    for cluster in clusters {
        let index = cluster / per_part;
        if loaded != Some(index) {
            let entry = usize::try_from(cluster / per_block)
                .ok()
                .and_then(|block| reftable.get(block));
            let offset = entry.copied().filter(|&offset| offset != 0);
            let Some(offset) = offset else {
                return Err(Fault::Damaged("tables that have no refcounts".to_owned()));
            };
            numbers.fill(0);
            let inside = cluster % per_block / per_part * part;
            read_up_to(file, &mut numbers, offset.saturating_add(inside))?;
            loaded = Some(index);
        }
        let at = usize::try_from(cluster % per_part).unwrap_or(0);
        if get(&numbers, header.refcount_order, at) == 0 {
            return Err(Fault::Damaged(format!(
                "cluster {cluster} has a table and is counted as free"
            )));
        }
    }
    Ok(())
}

/// Puts refcounts in order, and says what was not.
pub(super) fn repair(file: &File, header: &Header) -> Result<Repaired, Fault> {
    if header.snapshots > 0 {
        return Err(Fault::Damaged(
            "it was not closed by who last wrote it, and has snapshots".to_owned(),
        ));
    }
    let mut uses = Uses::new(header.cluster_bits);
    let reftable = count_uses(file, header, &mut uses)?;
    let repaired = compare(file, header, &uses, &reftable)?;
    if repaired != Repaired::default() {
        file.sync_data()?;
    }
    Ok(repaired)
}

fn count_uses(file: &File, header: &Header, uses: &mut Uses) -> Result<Vec<u64>, Fault> {
    let cluster = header.cluster_size();
    uses.own(0, cluster)?;
    let l1 = read_table(file, header.l1_offset, u64::from(header.l1_entries))?;
    uses.own(header.l1_offset, l1.len() as u64 * 8)?;
    let reftable_len = u64::from(header.reftable_clusters) * cluster;
    let reftable = read_table(file, header.reftable_offset, reftable_len / 8)?;
    uses.own(header.reftable_offset, reftable_len)?;
    for block in reftable.iter().filter(|&&block| block != 0) {
        uses.own(*block, cluster)?;
    }
    let tables = l1.iter().filter(|&&entry| entry & OFFSET != 0).count() as u64;
    let room = file.metadata()?.blocks().saturating_mul(1024).max(PLENTY);
    if tables.saturating_mul(cluster) > room {
        return Err(Fault::Damaged(format!(
            "{tables} tables, for which the file has no room"
        )));
    }
    for entry in l1.iter().filter(|&&entry| entry & OFFSET != 0) {
        let offset = entry & OFFSET;
        uses.own(offset, cluster)?;
        for entry in read_table(file, offset, header.l2_entries())? {
            if entry & COMPRESSED != 0 {
                // Offset, then sectors beside the first: 62 bits together (qcow2.txt, "Compressed Clusters Descriptor").
                let bits = 62 - (header.cluster_bits - 8);
                let offset = entry & ((1 << bits) - 1);
                let sectors = (entry & (COMPRESSED - 1)) >> bits;
                let len = (sectors + 1) * 512 - (offset & 511);
                uses.share(offset, len)?;
            } else if entry & OFFSET != 0 {
                uses.own(entry & OFFSET, cluster)?;
            }
        }
    }
    Ok(reftable)
}

fn compare(file: &File, header: &Header, uses: &Uses, reftable: &[u64]) -> Result<Repaired, Fault> {
    let per_block = (header.cluster_size() * 8) >> header.refcount_order;
    let per_block = usize::try_from(per_block).unwrap_or(usize::MAX);
    let block_len = usize::try_from(header.cluster_size()).unwrap_or(usize::MAX);
    let order = header.refcount_order;
    let mut repaired = Repaired::default();
    let mut block = vec![0; block_len];
    for (index, &offset) in reftable.iter().enumerate() {
        let first = index.saturating_mul(per_block);
        let used = uses.counts.get(first..).unwrap_or(&[]);
        let used = &used[..used.len().min(per_block)];
        if offset == 0 {
            if used.iter().any(|&count| count != 0) {
                return Err(Fault::Damaged(
                    "clusters that have no refcounts are in use".to_owned(),
                ));
            }
            continue;
        }
        if first as u64 >= MOST_CLUSTERS {
            // None of them is in use, and there may be any number of them.
            return Err(Fault::Damaged(format!(
                "refcounts from cluster {first} on are too far behind to be looked at"
            )));
        }
        block.fill(0);
        read_up_to(file, &mut block, offset)?;
        let mut changed = false;
        for at in 0..per_block {
            let wanted = u64::from(used.get(at).copied().unwrap_or(0));
            let counted = get(&block, order, at);
            if counted < wanted {
                repaired.missing += 1;
            } else if counted > wanted && !header.unknown_extensions {
                repaired.leaked += 1;
            } else {
                continue;
            }
            if order < 6 && wanted >> (1u32 << order) != 0 {
                return Err(Fault::Damaged(format!("a cluster is used {wanted} times")));
            }
            set(&mut block, order, at, wanted);
            changed = true;
        }
        if changed {
            file.write_all_at(&block, offset)?;
        }
    }
    let counted = reftable.len().saturating_mul(per_block);
    if uses.counts.len() > counted {
        return Err(Fault::Damaged(
            "clusters that have no refcounts are in use".to_owned(),
        ));
    }
    Ok(repaired)
}

/// The refcount number `at`, of 2^`order` bits.
fn get(block: &[u8], order: u32, at: usize) -> u64 {
    if order < 3 {
        let (bits, byte) = (1usize << order, at >> (3 - order));
        let shift = (at << order) & 7;
        return u64::from(block[byte] >> shift) & ((1 << bits) - 1);
    }
    let len = 1usize << (order - 3);
    let number = block[at * len..][..len].iter();
    number.fold(0, |number, &byte| number << 8 | u64::from(byte))
}

fn set(block: &mut [u8], order: u32, at: usize, value: u64) {
    let bytes = value.to_be_bytes();
    if order < 3 {
        let (bits, byte) = (1usize << order, at >> (3 - order));
        let shift = (at << order) & 7;
        let mask = u8::MAX >> (8 - bits);
        block[byte] = block[byte] & !(mask << shift) | (bytes[7] & mask) << shift;
        return;
    }
    let len = 1usize << (order - 3);
    block[at * len..][..len].copy_from_slice(&bytes[8 - len..]);
}

/// Numbers of a table; what is behind the end of the file is zero.
fn read_table(file: &File, offset: u64, entries: u64) -> io::Result<Vec<u64>> {
    let entries = usize::try_from(entries).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut bytes = vec![0; entries * 8];
    read_up_to(file, &mut bytes, offset)?;
    let number = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("eight each"));
    Ok(bytes.chunks_exact(8).map(number).collect())
}

#[cfg(test)]
#[path = "repair_test.rs"]
mod tests;
