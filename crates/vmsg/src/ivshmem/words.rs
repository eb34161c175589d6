// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ivshmem peek`, `poke` and `dump`.

use std::io::{self, Write};

use anyhow::{bail, ensure};
use clap::Args;
use ivshmem::{Device, Memory};
use vmsg_mem::DeviceRegion;

use super::place::{Place, bytes};
use crate::Usage;
use crate::out::Out;

/// Bytes in a line of a dump.
const LINE: usize = 16;

/// `vmsg ivshmem peek`.
#[derive(Debug, Args)]
pub struct PeekArgs {
    #[command(flatten)]
    place: Place,
    /// Where: 4096, 0x1000 or 4K
    #[arg(value_name = "OFFSET", value_parser = bytes)]
    offset: u64,
    /// Bytes that are loaded at once: 1, 2, 4 or 8; the offset is a multiple of it
    #[arg(value_name = "WIDTH", default_value_t = 4)]
    width: u8,
}

/// `vmsg ivshmem poke`.
#[derive(Debug, Args)]
pub struct PokeArgs {
    #[command(flatten)]
    place: Place,
    /// Where: 4096, 0x1000 or 4K
    #[arg(value_name = "OFFSET", value_parser = bytes)]
    offset: u64,
    /// Bytes that are stored at once: 1, 2, 4 or 8; the offset is a multiple of it
    #[arg(value_name = "WIDTH")]
    width: u8,
    /// What to store, little-endian
    #[arg(value_name = "VALUE", value_parser = bytes)]
    value: u64,
}

/// `vmsg ivshmem dump`.
#[derive(Debug, Args)]
pub struct DumpArgs {
    #[command(flatten)]
    place: Place,
    /// Where: 4096, 0x1000 or 4K
    #[arg(value_name = "OFFSET", value_parser = bytes, default_value = "0")]
    offset: u64,
    /// How many bytes
    #[arg(value_name = "LENGTH", value_parser = bytes, default_value = "256")]
    length: u64,
}

/// Prints one word.
pub(super) fn peek(args: &PeekArgs) -> anyhow::Result<()> {
    let device = args.place.open()?;
    let offset = place(device.memory(), args.offset, args.width)?;
    let value = load(device.memory().region(), offset, args.width);
    still_there(&device)?;
    let digits = usize::from(args.width) * 2;
    writeln!(Out::lock(), "0x{value:0digits$x}")?;
    Ok(())
}

/// Stores one word.
pub(super) fn poke(args: &PokeArgs) -> anyhow::Result<()> {
    let device = args.place.open()?;
    let offset = place(device.memory(), args.offset, args.width)?;
    if !store(device.memory().region(), offset, args.width, args.value) {
        bail!(Usage(format!(
            "the value 0x{:x} has more than {} bytes",
            args.value, args.width
        )));
    }
    still_there(&device)
}

/// Prints bytes.
pub(super) fn dump(args: &DumpArgs) -> anyhow::Result<()> {
    let device = args.place.open()?;
    let size = device.memory().len();
    let part = usize::try_from(args.offset).ok().and_then(|offset| {
        let length = usize::try_from(args.length).ok()?;
        device.memory().region().get(offset, length)
    });
    let Some(part) = part else {
        bail!(Usage(format!(
            "{} bytes from 0x{:x} on are not all in the memory, which has 0x{size:x}",
            args.length, args.offset
        )));
    };
    hexdump(&mut Out::lock(), part, args.offset)?;
    still_there(&device)
}

fn still_there(device: &Device) -> anyhow::Result<()> {
    ensure!(
        !device.memory().is_lost(),
        "the memory is gone: its file was truncated, or the function taken away"
    );
    Ok(())
}

/// The offset, if a word of this width may be there.
fn place(memory: &Memory, offset: u64, width: u8) -> Result<usize, Usage> {
    if !matches!(width, 1 | 2 | 4 | 8) {
        return Err(Usage(format!("a width of {width}: it is 1, 2, 4 or 8")));
    }
    let width = u64::from(width);
    if !offset.is_multiple_of(width) {
        return Err(Usage(format!(
            "the offset 0x{offset:x} is no multiple of the width, {width}"
        )));
    }
    let size = memory.len() as u64;
    match usize::try_from(offset) {
        Ok(place) if offset.checked_add(width).is_some_and(|end| end <= size) => Ok(place),
        _ => Err(Usage(format!(
            "the offset 0x{offset:x} is beyond the memory, which has 0x{size:x} bytes"
        ))),
    }
}

fn load(region: DeviceRegion<'_>, offset: usize, width: u8) -> u64 {
    let value = match width {
        1 => region.read_u8(offset).map(u64::from),
        2 => region.read_u16(offset).map(u64::from),
        4 => region.read_u32(offset).map(u64::from),
        _ => region.read_u64(offset),
    };
    value.expect("checked before")
}

/// False if the value does not fit.
fn store(region: DeviceRegion<'_>, offset: usize, width: u8, value: u64) -> bool {
    match width {
        1 => u8::try_from(value).is_ok_and(|value| region.write_u8(offset, value)),
        2 => u16::try_from(value).is_ok_and(|value| region.write_u16(offset, value)),
        4 => u32::try_from(value).is_ok_and(|value| region.write_u32(offset, value)),
        _ => region.write_u64(offset, value),
    }
}

/// Bytes in hexadecimal and as text; lines that repeat the one before are shown as one asterisk.
fn hexdump(out: &mut impl Write, region: DeviceRegion<'_>, base: u64) -> io::Result<()> {
    let mut before = None;
    let mut skipped = false;
    let mut at = 0;
    while at < region.len() {
        let mut line = [0; LINE];
        let count = region.read(at, &mut line);
        let is_last = at + count >= region.len();
        if before == Some(line) && !is_last {
            if !skipped {
                writeln!(out, "*")?;
            }
            skipped = true;
        } else {
            write!(out, "{:08x} ", base + at as u64)?;
            for column in 0..LINE {
                let gap = if column % 8 == 0 { " " } else { "" };
                match line[..count].get(column) {
                    Some(byte) => write!(out, "{gap}{byte:02x} ")?,
                    None => write!(out, "{gap}   ")?,
                }
            }
            let text: String = line[..count]
                .iter()
                .map(|byte| match byte {
                    0x20..=0x7e => char::from(*byte),
                    _ => '.',
                })
                .collect();
            writeln!(out, " |{text}|")?;
            skipped = false;
        }
        before = Some(line);
        at += count;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn a_dump_shows_bytes_and_text_and_leaves_out_what_repeats() {
        let words: Vec<AtomicU64> = (0..10).map(|_| AtomicU64::new(0)).collect();
        let region = DeviceRegion::from_atomics(&words);
        region.write(0, b"Hello, memory\n");
        let mut out = Vec::new();
        hexdump(&mut out, region.get(0, 70).expect("inside"), 0x1000).expect("written");
        let text = String::from_utf8(out).expect("text");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[0],
            "00001000  48 65 6c 6c 6f 2c 20 6d  65 6d 6f 72 79 0a 00 00  |Hello, memory...|"
        );
        assert!(lines[1].starts_with("00001010  00 00"));
        assert_eq!(lines[2], "*");
        assert_eq!(
            lines[3],
            "00001040  00 00 00 00 00 00                                 |......|"
        );
        assert_eq!(lines.len(), 4);
    }

    #[test]
    fn words_are_little_endian_and_values_that_do_not_fit_are_refused() {
        let words = [AtomicU64::new(0)];
        let region = DeviceRegion::from_atomics(&words);
        assert!(store(region, 4, 4, 0x0403_0201));
        assert_eq!(load(region, 4, 1), 1);
        assert_eq!(load(region, 6, 2), 0x0403);
        assert_eq!(load(region, 0, 8), 0x0403_0201_0000_0000);
        assert!(!store(region, 0, 1, 256));
        assert!(store(region, 0, 8, u64::MAX));
    }
}
