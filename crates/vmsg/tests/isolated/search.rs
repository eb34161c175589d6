// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Looks for bytes in all that a process can see.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Bytes looked at in one go.
const CHUNK: usize = 1 << 20;
const PAGE: usize = 4096;

/// Whether `needle` is in `hay`, of which most pages are empty.
pub(crate) fn holds(hay: &[u8], needle: &[u8]) -> bool {
    const EMPTY: [u8; PAGE] = [0; PAGE];
    let mut from = 0;
    while from < hay.len() {
        let to = hay.len().min(from + PAGE);
        if hay[from..to] != EMPTY[..to - from] {
            // It may begin in a page before that looks empty, and end in one behind.
            let begin = from.saturating_sub(needle.len());
            let end = hay.len().min(to + needle.len());
            if hay[begin..end].windows(needle.len()).any(|w| w == needle) {
                return true;
            }
        }
        from = to;
    }
    false
}

/// Whether `needle` lies between `start` and `end` of what `file` gives. What cannot be read is nobody's.
fn holds_in(file: &File, start: u64, end: u64, needle: &[u8]) -> bool {
    let mut chunk = vec![0; CHUNK + needle.len()];
    let mut at = start;
    while at < end {
        let most = usize::try_from(end - at).map_or(chunk.len(), |left| left.min(chunk.len()));
        let len = file.read_at(&mut chunk[..most], at).unwrap_or(0);
        if holds(&chunk[..len], needle) {
            return true;
        }
        at += if len > needle.len() && len == chunk.len() {
            CHUNK as u64
        } else {
            most as u64
        };
    }
    false
}

/// Where in the mappings of a process `needle` is.
pub(crate) fn in_mappings(pid: u32, needle: &[u8]) -> Vec<String> {
    let mut maps = String::new();
    let mut file = File::open(format!("/proc/{pid}/maps")).expect("its maps");
    file.read_to_string(&mut maps).expect("text");
    let memory = File::open(format!("/proc/{pid}/mem")).expect("its memory");
    let mut found = Vec::new();
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (range, rights) = (
            fields.next().expect("a range"),
            fields.next().expect("rights"),
        );
        // Programs and libraries, and what the kernel provides.
        if !rights.starts_with("rw") {
            continue;
        }
        let (start, end) = range.split_once('-').expect("a range");
        let number = |text| u64::from_str_radix(text, 16).expect("an address");
        if holds_in(&memory, number(start), number(end), needle) {
            found.push(line.to_owned());
        }
    }
    found
}

/// Which files that a process holds have `needle` in them.
pub(crate) fn in_files(pid: u32, needle: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).expect("its files") {
        let path = entry.expect("a file").path();
        // It may be closed by now.
        let Ok(meta) = fs::metadata(&path) else {
            continue;
        };
        if !meta.is_file() {
            continue;
        }
        let name = fs::read_link(&path).unwrap_or_default();
        if File::open(&path).is_ok_and(|file| holds_in(&file, 0, meta.len(), needle)) {
            found.push(name);
        }
    }
    found
}

pub(crate) fn everywhere(pid: u32, needle: &[u8]) -> Vec<String> {
    let mut found = in_mappings(pid, needle);
    let files = in_files(pid, needle);
    found.extend(files.iter().map(|file| file.display().to_string()));
    found
}
