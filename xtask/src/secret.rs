// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Searches a process for bytes it must not have: everything that is mapped in it, and everything that the files it
//! has open contain. Those of its children count as its own.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use memchr::memmem::Finder;

/// Bytes that are looked for.
pub(crate) const LENGTH: usize = 64;
/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;

/// Random bytes.
pub(crate) fn random() -> Result<[u8; LENGTH]> {
    let mut bytes = [0; LENGTH];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// As hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// What was searched, and where something was found.
#[derive(Debug, Default)]
pub(crate) struct Search {
    /// Mappings that could be read.
    pub(crate) mappings: usize,
    /// Open files with contents: memory files, and those on disk.
    pub(crate) files: usize,
    /// Bytes read.
    pub(crate) bytes: u64,
    /// Where the bytes are in mappings.
    pub(crate) mapped: Vec<String>,
    /// In which open files they are.
    pub(crate) open: Vec<String>,
}

/// Searches the process `pid` and its children for `secret`.
pub(crate) fn search(pid: u32, secret: &[u8]) -> Result<Search> {
    let mut found = Search::default();
    let finder = Finder::new(secret);
    let mut waiting = vec![pid];
    while let Some(pid) = waiting.pop() {
        let proc = Path::new("/proc").join(pid.to_string());
        let children = fs::read_to_string(proc.join("task").join(pid.to_string()).join("children"))
            .with_context(|| format!("process {pid} is gone"))?;
        waiting.extend(
            children
                .split_whitespace()
                .filter_map(|c| c.parse::<u32>().ok()),
        );
        mappings(&proc, &finder, &mut found)?;
        files(&proc, &finder, &mut found)?;
    }
    ensure!(
        found.mappings > 5 && found.bytes > 1 << 16,
        "next to nothing of process {pid} can be read: {found:?}"
    );
    Ok(found)
}

fn mappings(proc: &Path, finder: &Finder<'_>, found: &mut Search) -> Result<()> {
    let maps = fs::read_to_string(proc.join("maps")).context("no mappings")?;
    let memory = File::open(proc.join("mem")).context("memory cannot be read")?;
    for line in maps.lines() {
        let Some((start, end)) = range(line) else {
            continue;
        };
        let mut at = start;
        let (read, hit) = scan(finder, |buffer| {
            let want =
                usize::try_from(end - at).map_or(buffer.len(), |left| left.min(buffer.len()));
            let read = memory.read_at(&mut buffer[..want], at)?;
            at += read as u64;
            Ok(read)
        });
        found.mappings += usize::from(read > 0);
        found.bytes += read;
        if hit {
            found.mapped.push(line.to_owned());
        }
    }
    Ok(())
}

/// `start-end perms offset …`, in hexadecimal.
fn range(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    // The kernel's own page lies where no offset of a file reaches.
    Some((number(start)?, number(end)?)).filter(|(_, end)| i64::try_from(*end).is_ok())
}

fn files(proc: &Path, finder: &Finder<'_>, found: &mut Search) -> Result<()> {
    for entry in fs::read_dir(proc.join("fd")).context("no open files")? {
        let path = entry?.path();
        // It may have been closed meanwhile.
        let Ok(data) = fs::metadata(&path) else {
            continue;
        };
        let kind = data.file_type();
        if !(kind.is_file() || kind.is_block_device()) {
            continue;
        }
        let target = fs::read_link(&path)?;
        let mut file =
            File::open(&path).with_context(|| format!("cannot read {}", target.display()))?;
        file.seek(SeekFrom::Start(0))?;
        let (read, hit) = scan(finder, |buffer| file.read(buffer));
        found.files += 1;
        found.bytes += read;
        if hit {
            found.open.push(target.display().to_string());
        }
    }
    Ok(())
}

/// Reads to the end, or to what cannot be read, and tells how many bytes that were and whether the secret is in them.
fn scan(finder: &Finder<'_>, mut read: impl FnMut(&mut [u8]) -> io::Result<usize>) -> (u64, bool) {
    let kept = finder.needle().len() - 1;
    let mut buffer = vec![0; kept + CHUNK];
    let (mut filled, mut total) = (0, 0);
    loop {
        match read(&mut buffer[filled..]) {
            Ok(0) | Err(_) => return (total, false),
            Ok(count) => {
                filled += count;
                total += count as u64;
            }
        }
        if finder.find(&buffer[..filled]).is_some() {
            return (total, true);
        }
        // What may be the beginning of it stays.
        let from = filled.saturating_sub(kept);
        buffer.copy_within(from..filled, 0);
        filled -= from;
    }
}

#[cfg(test)]
#[path = "secret_test.rs"]
mod tests;
