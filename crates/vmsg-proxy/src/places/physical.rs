// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which physical addresses of this machine are the common memory.

use super::PlaceError;
use std::fs;
use std::io;
use std::path::Path;
use vmsg_bus::Physical;

/// Physical addresses from here on have no hole on any machine there is.
const FOUR_GIB: u64 = 1 << 32;
/// Firmware keeps less than that at the end of the memory below the hole.
const TOP: u64 = 16 << 20;
/// Memory of a machine begins at a multiple of this; the first pages may not be the kernel's to use.
const BEGIN: u64 = 1 << 30;

/// The physical addresses of the common memory, in the order of its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PhysicalWindow {
    /// Physical address, offset in the common memory, bytes; sorted, without overlaps.
    runs: Vec<(u64, u64, u64)>,
    name: String,
    remedy: String,
}

impl PhysicalWindow {
    /// Looks up what `physical` is on the machine whose `/proc` and `/sys` are below `root`. `len`: bytes of the common memory, if known.
    ///
    /// # Errors
    /// [`PlaceError::NoWindow`] if there is no such node, or the kernel does not say; [`PlaceError::NotPermitted`].
    pub fn new(
        root: &Path,
        physical: Physical,
        len: Option<u64>,
    ) -> Result<PhysicalWindow, PlaceError> {
        let remedy = "bind the guest's memory to what is in common";
        match physical {
            Physical::Node(node) => {
                let runs = node_runs(root, node)?;
                let bind = format!(
                    "give the guest's memory-backend-file host-nodes={node},policy=bind,prealloc=on"
                );
                Ok(Self::of_runs(runs, format!("NUMA node {node}"), bind))
            }
            Physical::Window { base, size } => {
                if size == 0 || base.checked_add(size).is_none() {
                    let why = format!("window={base:#x}+{size:#x} is no range of addresses");
                    return Err(PlaceError::NoWindow(why));
                }
                let name = format!("the {size:#x} bytes at {base:#x}");
                Ok(Self::of_runs(vec![(base, size)], name, remedy.to_owned()))
            }
            Physical::Whole => {
                let runs = whole_runs(root, len)?;
                let name = "the memory of this machine".to_owned();
                Ok(Self::of_runs(runs, name, remedy.to_owned()))
            }
        }
    }

    /// Runs of addresses that follow each other in the common memory.
    fn of_runs(runs: Vec<(u64, u64)>, name: String, remedy: String) -> PhysicalWindow {
        let mut offset = 0;
        let runs = runs.into_iter().map(|(base, len)| {
            let run = (base, offset, len);
            offset += len;
            run
        });
        PhysicalWindow {
            runs: runs.collect(),
            name,
            remedy,
        }
    }

    /// Where `len` bytes at a physical address are in the common memory, if all of them are.
    pub fn offset_of(&self, physical: u64, len: u64) -> Option<u64> {
        let at = self.runs.partition_point(|(base, ..)| *base <= physical);
        let (base, offset, run) = *self.runs.get(at.checked_sub(1)?)?;
        let into = physical - base;
        (into.checked_add(len)? <= run).then_some(offset + into)
    }

    /// The error of a page that is not there.
    pub(super) fn elsewhere(&self, file_offset: u64, physical: u64) -> PlaceError {
        PlaceError::Elsewhere {
            file_offset,
            physical,
            window: self.name.clone(),
            remedy: self.remedy.clone(),
        }
    }
}

fn no_window(why: impl std::fmt::Display) -> PlaceError {
    PlaceError::NoWindow(format!(
        "{why}; say which physical addresses are in common: window=BASE+SIZE"
    ))
}

fn read_hex(path: &Path) -> Result<u64, PlaceError> {
    let cannot = |error: io::Error| no_window(format!("cannot read `{}`: {error}", path.display()));
    let text = fs::read_to_string(path).map_err(cannot)?;
    u64::from_str_radix(text.trim(), 16)
        .map_err(|_| no_window(format!("`{}` is not a number", path.display())))
}

/// The memory blocks of a node, as the kernel has them in sysfs.
fn blocks(folder: &Path) -> io::Result<Vec<String>> {
    let mut blocks = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let number = name.strip_prefix("memory");
        if number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) {
            blocks.push(name);
        }
    }
    Ok(blocks)
}

/// A node's memory, from its lowest block on.
fn node_runs(root: &Path, node: u32) -> Result<Vec<(u64, u64)>, PlaceError> {
    let nodes = root.join("sys/devices/system/node");
    let folder = nodes.join(format!("node{node}"));
    let cannot =
        |error: io::Error| no_window(format!("cannot read `{}`: {error}", folder.display()));
    if !folder.exists() {
        return Err(PlaceError::NoWindow(format!(
            "this machine has no NUMA node {node} (`{}` is not there); `numactl -H` shows what it has",
            folder.display()
        )));
    }
    let mine = blocks(&folder).map_err(cannot)?;
    if mine.is_empty() {
        return Err(no_window(format!(
            "NUMA node {node} has no memory, or the kernel does not say which"
        )));
    }
    for other in fs::read_dir(&nodes).map_err(cannot)? {
        let other = other.map_err(cannot)?.path();
        let is_node = |name: &str| name.starts_with("node") && name != format!("node{node}");
        if !other
            .file_name()
            .is_some_and(|name| is_node(&name.to_string_lossy()))
        {
            continue;
        }
        let theirs = blocks(&other).unwrap_or_default();
        if let Some(block) = mine.iter().find(|block| theirs.contains(block)) {
            return Err(no_window(format!(
                "{block} belongs to more than one NUMA node"
            )));
        }
    }
    let size = read_hex(&root.join("sys/devices/system/memory/block_size_bytes"))?;
    let mut bases = Vec::new();
    for block in &mine {
        let index = read_hex(&folder.join(block).join("phys_index"))?;
        let base = index
            .checked_mul(size)
            .filter(|base| size != 0 && base.checked_add(size).is_some());
        bases.push(base.ok_or_else(|| no_window(format!("{block} is at no address")))?);
    }
    bases.sort_unstable();
    bases.dedup();
    Ok(join(bases.into_iter().map(|base| (base, size))))
}

/// Neighbours become one.
fn join(runs: impl IntoIterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (base, len) in runs {
        match joined.last_mut() {
            Some((last, so_far)) if *last + *so_far == base => *so_far += len,
            _ => joined.push((base, len)),
        }
    }
    joined
}

/// All memory of a machine: one run, or two where there is a hole below 4 GiB (x86).
fn whole_runs(root: &Path, len: Option<u64>) -> Result<Vec<(u64, u64)>, PlaceError> {
    let path = root.join("proc/iomem");
    let text = fs::read_to_string(&path)
        .map_err(|error| no_window(format!("cannot read `{}`: {error}", path.display())))?;
    let mut ram: Vec<(u64, u64)> = Vec::new();
    for line in text.lines() {
        // Those of the top are not indented.
        let Some((range, "System RAM")) = line.split_once(" : ") else {
            continue;
        };
        let bound = |text: &str| u64::from_str_radix(text, 16).ok();
        let range = range.split_once('-');
        let range = range.and_then(|(from, to)| Some((bound(from)?, bound(to)?.checked_add(1)?)));
        ram.extend(range.filter(|(from, to)| from < to));
    }
    ram.sort_unstable();
    if ram.is_empty() || ram.iter().all(|(_, to)| *to == 1) {
        // Without the privilege all addresses are 0.
        return Err(PlaceError::NotPermitted);
    }
    let (first, end) = (ram[0].0, ram.iter().map(|run| run.1).max().unwrap_or(0));
    let begin = first / BEGIN * BEGIN;
    let low_end = ram
        .iter()
        .filter(|(from, _)| *from < FOUR_GIB)
        .map(|run| run.1)
        .max();
    let high = ram.iter().find(|(from, _)| *from >= FOUR_GIB);
    let (Some(low_end), Some(_)) = (low_end, high) else {
        let len = len.unwrap_or(end - begin).max(end - begin);
        return Ok(vec![(begin, len)]);
    };
    if low_end >= FOUR_GIB || len.is_some_and(|len| end - begin <= len) {
        // No hole.
        return Ok(vec![(begin, end - begin)]);
    }
    let above = end - FOUR_GIB;
    let low = match len {
        Some(len) => len.checked_sub(above),
        None => Some(low_end.next_multiple_of(TOP) - begin),
    };
    let fits = |low: &u64| begin + low >= low_end && begin + low <= FOUR_GIB;
    let low = low.filter(fits).ok_or_else(|| {
        no_window(format!(
            "this machine has memory up to {end:#x}, with a hole below 4 GiB from {low_end:#x} on, which does not fit ram-size={:#x}",
            len.unwrap_or(0)
        ))
    })?;
    Ok(vec![(begin, low), (FOUR_GIB, above)])
}
