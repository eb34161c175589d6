// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reading traces back, whoever wrote them; anything may stand in them.

use super::block::{self, BYTE_ORDER, FRAME, option};
use super::{Head, LINK_TYPE, Layout, Way};
use std::io::{self, Read, Seek, SeekFrom};

/// Longest block that is read; those of messages are at most 65536 bytes and a little.
pub(super) const MAX_BLOCK: usize = 1 << 20;

/// Interfaces that are remembered: connections over the life of a file. Somebody may connect and leave without end, and
/// what others said is to be read all the same.
const MAX_INTERFACES: usize = 1 << 20;

/// Longest name or comment that is kept.
const MAX_TEXT: usize = 1024;

/// Bytes asked for at a time.
const CHUNK: usize = 1 << 16;

/// Why a trace cannot be read on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Not what pcapng says.
    #[error("at offset {offset}: {why}")]
    Corrupt {
        /// What is wrong.
        why: &'static str,
        /// Where the block begins in which it is.
        offset: u64,
    },
    /// The system said no.
    #[error("at offset {offset}: {source}")]
    Os {
        /// Where reading was.
        offset: u64,
        /// What was said.
        source: io::Error,
    },
}

/// Where messages were recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// Name of the interface, as it stands in the file; may hold any characters.
    pub name: String,
    /// Description of the interface.
    pub description: String,
}

/// A message as it was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Captured<'a> {
    /// Number of the interface, counted through all sections.
    pub interface: usize,
    /// The interface.
    pub source: &'a Source,
    /// Nanoseconds since 1970.
    pub time: u64,
    /// Which way it went.
    pub way: Way,
    /// How it is laid out.
    pub layout: Layout,
    /// File descriptors that went with it.
    pub fds: u8,
    /// Messages of the interface that are missing before this one.
    pub lost: u64,
    /// How long the message was, if it was cut short.
    pub cut_from: Option<usize>,
    /// Its bytes.
    pub message: &'a [u8],
}

/// What stands in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Item<'a> {
    /// A section begins: a file was begun or continued.
    Section {
        /// The program that wrote it.
        application: &'a str,
    },
    /// An interface appears; its number.
    Interface {
        /// Its number, counted through all sections.
        interface: usize,
        /// What it is.
        source: &'a Source,
    },
    /// A message.
    Message(Captured<'a>),
    /// A packet that is no message of this kind, and why.
    Foreign {
        /// Where its block begins.
        offset: u64,
        /// Why.
        why: &'static str,
    },
    /// What an interface has seen in all, at its end.
    Statistics {
        /// Number of the interface.
        interface: usize,
        /// Messages.
        seen: u64,
        /// Of those, not recorded.
        lost: u64,
    },
}

struct Interface {
    source: Source,
    /// Packets are messages.
    ours: bool,
    resolution: Resolution,
    /// Seconds.
    offset: i64,
}

/// Ticks in a second: a power of ten or of two.
#[derive(Clone, Copy)]
enum Resolution {
    Ten(u8),
    Two(u8),
}

impl Resolution {
    /// Ticks as nanoseconds.
    fn nanoseconds(self, ticks: u64) -> u64 {
        let ticks = u128::from(ticks);
        let ns = match self {
            Resolution::Ten(n @ 0..=9) => ticks * 10u128.pow(9 - u32::from(n)),
            Resolution::Ten(n) => 10u128
                .checked_pow(u32::from(n) - 9)
                .map_or(0, |per| ticks / per),
            // Below 2^94.
            Resolution::Two(n) => (ticks * 1_000_000_000)
                .checked_shr(u32::from(n))
                .unwrap_or(0),
        };
        u64::try_from(ns).unwrap_or(u64::MAX)
    }
}

/// Reads a trace block by block.
///
/// Everything before a fault is returned before the fault is. At the end of the file
/// [`next_item`](Self::next_item) gives `None`; it may be called again when the file has grown.
pub struct Reader<R> {
    input: R,
    buffer: Vec<u8>,
    /// Where the next block begins in `buffer`.
    at: usize,
    /// Where the next block begins in the file.
    offset: u64,
    big_endian: bool,
    interfaces: Vec<Interface>,
    /// The first of this section.
    section: usize,
    application: String,
}

impl<R: Read> Reader<R> {
    /// Reads from `input`, from the beginning of a file.
    pub fn new(input: R) -> Self {
        Self {
            input,
            buffer: Vec::new(),
            at: 0,
            offset: 0,
            big_endian: false,
            interfaces: Vec::new(),
            section: 0,
            application: String::new(),
        }
    }

    /// What it reads from.
    pub fn get_ref(&self) -> &R {
        &self.input
    }

    /// Where the next block begins, and how many of its bytes are there at the end of the file: more than 0 after
    /// [`next_item`](Self::next_item) gave `None` means that the file ends within a block.
    pub fn unfinished(&self) -> (u64, usize) {
        (self.offset, self.buffer.len() - self.at)
    }

    /// The next item; `None` at the end of what is there.
    ///
    /// # Errors
    /// [`ReadError`]; nothing can be read after that.
    pub fn next_item(&mut self) -> Result<Option<Item<'_>>, ReadError> {
        loop {
            let Some((kind, len)) = self.block()? else {
                return Ok(None);
            };
            let start = self.at;
            let offset = self.offset;
            self.at += len;
            self.offset += len as u64;
            let body = start + 8..start + len - 4;
            let corrupt = |why| ReadError::Corrupt { why, offset };
            match kind {
                block::SECTION => {
                    self.begin_section(body).map_err(corrupt)?;
                    return Ok(Some(Item::Section {
                        application: &self.application,
                    }));
                }
                block::INTERFACE => {
                    self.add_interface(body).map_err(corrupt)?;
                    let interface = self.interfaces.len() - 1;
                    return Ok(Some(Item::Interface {
                        interface,
                        source: &self.interfaces[interface].source,
                    }));
                }
                block::PACKET => return self.packet(body, offset).map(Some),
                block::STATISTICS => {
                    let body = Body::new(&self.buffer[body], self.big_endian);
                    let number = body.u32(0).ok_or(corrupt("statistics cut short"))?;
                    let interface = self.number(number).ok_or(corrupt(UNKNOWN))?;
                    let (mut seen, mut lost) = (0, 0);
                    for (code, value) in body.options(12) {
                        match code {
                            option::STATISTICS_RECEIVED => seen = value.u64(0).unwrap_or(0),
                            option::STATISTICS_DROPPED => lost = value.u64(0).unwrap_or(0),
                            _ => {}
                        }
                    }
                    // It has ended: of many, the names would be most of the memory.
                    self.interfaces[interface].source = Source::default();
                    return Ok(Some(Item::Statistics {
                        interface,
                        seen,
                        lost,
                    }));
                }
                // Simple packets, and the packets of old, say nothing of where they come from.
                2 | 3 => {
                    return Ok(Some(Item::Foreign {
                        offset,
                        why: "a packet of a kind that traces do not have",
                    }));
                }
                _ => {}
            }
        }
    }

    /// Type and length of the next block, once all of it is in the buffer.
    fn block(&mut self) -> Result<Option<(u32, usize)>, ReadError> {
        let offset = self.offset;
        let corrupt = |why| ReadError::Corrupt { why, offset };
        // The type of a section reads the same in both byte orders.
        if !self.fill(4)? {
            let there = &self.buffer[self.at..];
            return if offset == 0 && !block::SECTION.to_le_bytes().starts_with(there) {
                Err(corrupt(NO_TRACE))
            } else {
                Ok(None)
            };
        }
        let first = Body::new(&self.buffer[self.at..], self.big_endian).u32(0);
        if first == Some(block::SECTION) {
            if !self.fill(FRAME)? {
                return Ok(None);
            }
            let there = &self.buffer[self.at..];
            let order = |big| Body::new(there, big).u32(8) == Some(BYTE_ORDER);
            self.big_endian = match (order(false), order(true)) {
                (true, _) => false,
                (_, true) => true,
                _ => return Err(corrupt("a section header without byte order")),
            };
        } else if offset == 0 {
            return Err(corrupt(NO_TRACE));
        }
        if !self.fill(FRAME)? {
            return Ok(None);
        }
        let head = Body::new(&self.buffer[self.at..], self.big_endian);
        let (kind, len) = (head.u32(0).unwrap_or(0), head.u32(4).unwrap_or(0));
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len < FRAME || len % 4 != 0 {
            return Err(corrupt("a block of impossible length"));
        }
        if len > MAX_BLOCK {
            return Err(corrupt("a block of more than 1 MiB"));
        }
        if !self.fill(len)? {
            return Ok(None);
        }
        let again = Body::new(&self.buffer[self.at..], self.big_endian).u32(len - 4);
        if again.and_then(|again| usize::try_from(again).ok()) != Some(len) {
            return Err(corrupt("a block with two different lengths"));
        }
        Ok(Some((kind, len)))
    }

    /// Reads until `len` bytes from `at` on are there; false at the end of the file.
    fn fill(&mut self, len: usize) -> Result<bool, ReadError> {
        while self.buffer.len() - self.at < len {
            self.buffer.drain(..self.at);
            self.at = 0;
            let have = self.buffer.len();
            self.buffer.resize(have + CHUNK, 0);
            let read = loop {
                match self.input.read(&mut self.buffer[have..]) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    other => break other,
                }
            };
            self.buffer.truncate(have + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(source) => {
                    let offset = self.offset + have as u64;
                    return Err(ReadError::Os { offset, source });
                }
            }
        }
        Ok(true)
    }

    fn begin_section(&mut self, body: std::ops::Range<usize>) -> Result<(), &'static str> {
        let body = Body::new(&self.buffer[body], self.big_endian);
        if body.u16(4) != Some(1) {
            return Err("a section of another version than 1 of pcapng");
        }
        self.application.clear();
        for (code, value) in body.options(16) {
            if code == option::SECTION_APPLICATION {
                self.application = value.text();
            }
        }
        self.section = self.interfaces.len();
        Ok(())
    }

    fn add_interface(&mut self, body: std::ops::Range<usize>) -> Result<(), &'static str> {
        if self.interfaces.len() >= MAX_INTERFACES {
            return Err("more than 1048576 interfaces");
        }
        let body = Body::new(&self.buffer[body], self.big_endian);
        let link_type = body.u16(0).ok_or("an interface cut short")?;
        let mut interface = Interface {
            source: Source::default(),
            ours: link_type == LINK_TYPE,
            resolution: Resolution::Ten(6),
            offset: 0,
        };
        for (code, value) in body.options(8) {
            match (code, value.bytes) {
                (option::INTERFACE_NAME, _) => interface.source.name = value.text(),
                (option::INTERFACE_DESCRIPTION, _) => interface.source.description = value.text(),
                (option::INTERFACE_RESOLUTION, [n, ..]) if n & 0x80 != 0 => {
                    interface.resolution = Resolution::Two(n & 0x7f);
                }
                (option::INTERFACE_RESOLUTION, [n, ..]) => {
                    interface.resolution = Resolution::Ten(*n);
                }
                (option::INTERFACE_OFFSET, _) => {
                    let seconds = value.u64(0).unwrap_or(0);
                    interface.offset = i64::from_ne_bytes(seconds.to_ne_bytes());
                }
                _ => {}
            }
        }
        self.interfaces.push(interface);
        Ok(())
    }

    fn number(&self, in_section: u32) -> Option<usize> {
        let number = self
            .section
            .checked_add(usize::try_from(in_section).ok()?)?;
        (number < self.interfaces.len()).then_some(number)
    }

    fn packet(&self, body: std::ops::Range<usize>, offset: u64) -> Result<Item<'_>, ReadError> {
        let corrupt = |why| ReadError::Corrupt { why, offset };
        let body = Body::new(&self.buffer[body], self.big_endian);
        let word = |at| body.u32(at).ok_or(corrupt("a packet cut short"));
        let number = self.number(word(0)?).ok_or(corrupt(UNKNOWN))?;
        let ticks = u64::from(word(4)?) << 32 | u64::from(word(8)?);
        let size = |at| Ok(usize::try_from(word(at)?).unwrap_or(usize::MAX));
        let (kept, original) = (size(12)?, size(16)?);
        let packet = body
            .bytes
            .get(20..)
            .and_then(|rest| rest.get(..kept))
            .ok_or(corrupt("a packet that is longer than its block"))?;
        let interface = &self.interfaces[number];
        if !interface.ours {
            let why = "a packet of another link type than USER0";
            return Ok(Item::Foreign { offset, why });
        }
        let (head, message) = match Head::split(packet) {
            Ok(split) => split,
            Err(why) => return Ok(Item::Foreign { offset, why }),
        };
        let mut lost = 0;
        for (code, value) in body.options(20 + kept.next_multiple_of(4)) {
            if code == option::PACKET_DROPS {
                lost = value.u64(0).unwrap_or(0);
            }
        }
        let shift = interface.offset.saturating_mul(1_000_000_000);
        let time = interface.resolution.nanoseconds(ticks);
        Ok(Item::Message(Captured {
            interface: number,
            source: &interface.source,
            time: time.saturating_add_signed(shift),
            way: head.way,
            layout: head.layout,
            fds: head.fds,
            lost,
            cut_from: (original > kept).then(|| original - (kept - message.len())),
            message,
        }))
    }
}

impl<R: Read + Seek> Reader<R> {
    /// Forgets what was read of an unfinished block, to read it again when the file has grown: it may have been cut off and
    /// written over by then.
    ///
    /// # Errors
    /// Of the seek.
    pub fn reread(&mut self) -> io::Result<()> {
        self.buffer.truncate(self.at);
        self.input.seek(SeekFrom::Start(self.offset)).map(drop)
    }
}

const UNKNOWN: &str = "an interface that was not announced";
const NO_TRACE: &str = "this is no trace: no pcapng section header";

/// Bytes in the byte order of their section.
#[derive(Clone, Copy)]
struct Body<'a> {
    bytes: &'a [u8],
    big_endian: bool,
}

impl<'a> Body<'a> {
    fn new(bytes: &'a [u8], big_endian: bool) -> Self {
        Self { bytes, big_endian }
    }

    fn array<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        let mut bytes = *self.bytes.get(at..)?.first_chunk::<N>()?;
        if self.big_endian {
            bytes.reverse();
        }
        Some(bytes)
    }

    fn u16(&self, at: usize) -> Option<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    fn u32(&self, at: usize) -> Option<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> Option<u64> {
        self.array(at).map(u64::from_le_bytes)
    }

    fn text(&self) -> String {
        let bytes = &self.bytes[..self.bytes.len().min(MAX_TEXT)];
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// Options from `at` on, up to their end or to what is none.
    fn options(self, mut at: usize) -> impl Iterator<Item = (u16, Body<'a>)> {
        std::iter::from_fn(move || {
            let code = self.u16(at)?;
            let len = usize::from(self.u16(at + 2)?);
            if code == option::END {
                return None;
            }
            let value = self.bytes.get(at + 4..)?.get(..len)?;
            at += 4 + len.next_multiple_of(4);
            Some((code, Body::new(value, self.big_endian)))
        })
    }
}

#[cfg(test)]
#[path = "reader_test.rs"]
mod tests;
