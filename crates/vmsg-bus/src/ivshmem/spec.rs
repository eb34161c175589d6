// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the bus `ivshmem` is told.

use crate::MessageSize;
use crate::keyval;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::path::{Path, PathBuf};

/// A bus in memory that two machines share, with doorbells or without: docs/bus-ivshmem.md.
///
/// Where the memory is, is said by one of `socket`, `listen`, `pci`, `shm` and `file`; [`Self::check`] finds what contradicts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct IvshmemSpec {
    /// The socket of an ivshmem server, of which this side is a client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Device host only: where it is to be the server itself, for QEMU's `ivshmem-doorbell`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<PathBuf>,
    /// In a guest: the PCI function, as `0000:00:04.0`, or `auto`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci: Option<String>,
    /// The name of POSIX shared memory: alone, memory without doorbells; with `listen`, what the server keeps its memory in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shm: Option<String>,
    /// The same with a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// With `listen`, `shm` and `file`: bytes of the memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// With `listen`: doorbell vectors of each peer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vectors: Option<u16>,
    /// How the queues lie in the memory.
    pub layout: QueueLayout,
    /// Where the layout begins in the memory, in bytes; 4096 for `amp` and 0 for the others if it is not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The other end's number, where it cannot be found out: ends that are not ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<u16>,
    /// The vector that the bus has, on both sides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vector: Option<u16>,
    /// Device host with layout `amp` only: longest message in bytes; otherwise 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message_size: Option<MessageSize>,
    /// How the driver's memory is reached from the device host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryMode>,
    /// What the memory is that both sides have in common.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<Ram>,
    /// Where in it the common part begins, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram_offset: Option<u64>,
    /// Bytes of the common part; otherwise to its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram_size: Option<u64>,
    /// With `memory=known`: bus address of the beginning of that memory; 0 otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_offset: Option<u64>,
    /// With `memory=known`: bytes of it below a hole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_low_size: Option<u64>,
    /// With `memory=known`: bytes of the hole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_hole: Option<u64>,
    /// Driver's side: the NUMA node whose memory is the common one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<u32>,
    /// Driver's side: physical addresses that are the common memory, instead of `node`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<PhysicalWindow>,
    /// A file that all messages are recorded to: docs/trace.md.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<PathBuf>,
}

/// How message queues lie in the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum QueueLayout {
    /// The layout that describes itself, as Linux's AMP drivers of 2026 have it.
    #[default]
    Amp,
    /// Two pages of 4 KiB, the driver's queue and the device's, as QEMU has it.
    Spsc,
    /// Those two pages in the memory of the PCI function 10ee:9039, 4 KiB into each FIFO's 16 KiB.
    AmpPci,
}

impl QueueLayout {
    /// As on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Amp => "amp",
            Self::Spsc => "spsc",
            Self::AmpPci => "amp-pci",
        }
    }
}

impl fmt::Display for QueueLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the device host comes by the driver's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryMode {
    /// Both sides know where it is: bus address = guest physical address.
    Known,
    /// All of the driver's machine, shown page by page.
    Whole,
    /// A window that the driver's guest lives in, shown page by page.
    Segment,
    /// A window that is copied into and out of; nothing of the guest is shown.
    Bounce,
}

impl MemoryMode {
    /// As an end's block has it (docs/bus-ivshmem.md §3); 0 there: not said.
    pub(crate) const fn code(self) -> u16 {
        match self {
            Self::Known => 1,
            Self::Whole => 2,
            Self::Segment => 3,
            Self::Bounce => 4,
        }
    }

    /// The mode of a block's number.
    pub(crate) const fn from_code(code: u16) -> Option<Self> {
        Some(match code {
            1 => Self::Known,
            2 => Self::Whole,
            3 => Self::Segment,
            4 => Self::Bounce,
            _ => return None,
        })
    }

    /// As on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Known => "known",
            Self::Whole => "whole",
            Self::Segment => "segment",
            Self::Bounce => "bounce",
        }
    }
}

/// What is wrong if the ends were not told the same. A driver that was told nothing may only want to look.
pub(super) fn modes_differ(
    ours: Option<MemoryMode>,
    theirs: Option<MemoryMode>,
    driver: bool,
) -> Option<String> {
    let (drivers, hosts) = if driver {
        (ours?, theirs)
    } else {
        (theirs?, ours)
    };
    (hosts != Some(drivers)).then(|| {
        let hosts = hosts.map_or("nothing of it".to_owned(), |mode| format!("memory={mode}"));
        format!(
            "the driver's side was told memory={drivers}, the device host {hosts}: give both the same"
        )
    })
}

impl fmt::Display for MemoryMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the common memory is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ram {
    /// The memory that the messages are in, behind them.
    Bar,
    /// A file.
    File(PathBuf),
    /// The memory of a PCI function, by sysfs.
    Pci(String),
}

impl Ram {
    /// The file that it is; `None` for [`Self::Bar`].
    pub fn path(&self) -> Option<PathBuf> {
        match self {
            Self::Bar => None,
            Self::File(path) => Some(path.clone()),
            Self::Pci(address) => {
                let devices = Path::new("/sys/bus/pci/devices");
                Some(devices.join(address).join("resource2_wc"))
            }
        }
    }
}

impl fmt::Display for Ram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bar => f.write_str("bar"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Pci(address) => write!(f, "pci:{address}"),
        }
    }
}

impl Serialize for Ram {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Ram {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == "bar" {
            return Ok(Self::Bar);
        }
        match text.strip_prefix("pci:") {
            Some(address) if !is_address(address) => Err(de::Error::custom(format!(
                "expected a PCI address such as pci:0000:00:04.0, not `{text}`"
            ))),
            Some(address) => Ok(Self::Pci(address.to_owned())),
            None if text.is_empty() => {
                Err(de::Error::custom("expected `bar`, a file, or pci:ADDRESS"))
            }
            None => Ok(Self::File(text.into())),
        }
    }
}

/// Whether it looks like one, and is no path.
fn is_address(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b':' | b'.'))
        && text.contains(':')
        && !text.contains("..")
}

/// Physical addresses of this machine, `BASE+SIZE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhysicalWindow {
    /// The first.
    pub base: u64,
    /// Bytes, not 0.
    pub size: u64,
}

impl fmt::Display for PhysicalWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.base, self.size)
    }
}

impl Serialize for PhysicalWindow {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PhysicalWindow {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let window = text.split_once('+').and_then(|(base, size)| {
            let window = Self {
                base: keyval::number(base)?,
                size: keyval::number(size)?,
            };
            (window.size > 0 && window.base.checked_add(window.size).is_some()).then_some(window)
        });
        window.ok_or_else(|| {
            de::Error::custom(format!(
                "expected physical addresses as BASE+SIZE, such as 0x100000000+1G, not `{text}`"
            ))
        })
    }
}

/// What is wrong with a specification.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SpecError(pub String);

/// Where the memory is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A server's socket.
    Socket(PathBuf),
    /// Here, where others come to.
    Listen(PathBuf),
    /// A PCI function: its address, or `auto`.
    Pci(String),
    /// POSIX shared memory without doorbells.
    Shm(String),
    /// A file without doorbells.
    File(PathBuf),
}

impl IvshmemSpec {
    /// On the server at `socket`, all else by default.
    pub fn socket(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: Some(socket.into()),
            ..Self::default()
        }
    }

    /// In the file `file` without doorbells, all else by default.
    pub fn file(file: impl Into<PathBuf>) -> Self {
        Self {
            file: Some(file.into()),
            ..Self::default()
        }
    }

    /// Where the memory is.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn place(&self) -> Result<Place, SpecError> {
        let mut said = Vec::new();
        if let Some(path) = &self.socket {
            said.push(("socket=", Place::Socket(path.clone())));
        }
        if let Some(path) = &self.listen {
            said.push(("listen=", Place::Listen(path.clone())));
        }
        if let Some(address) = &self.pci {
            said.push(("pci=", Place::Pci(address.clone())));
        }
        // With `listen` these say what the server's memory is.
        if self.listen.is_none() {
            if let Some(name) = &self.shm {
                said.push(("shm=", Place::Shm(name.clone())));
            }
            if let Some(path) = &self.file {
                said.push(("file=", Place::File(path.clone())));
            }
        }
        match said.as_mut_slice() {
            [] => Err(SpecError(
                "it is not said where the memory is; give one of socket=, listen=, pci=, shm=, file=".into(),
            )),
            [_] => Ok(said.remove(0).1),
            [(first, _), (second, _), ..] => Err(SpecError(format!("{first} and {second} contradict each other"))),
        }
    }

    /// Whether `ram=` says by another name what the memory of the messages is.
    fn names_its_memory(&self, place: &Place) -> bool {
        match (&self.ram, place) {
            (Some(Ram::Pci(ram)), Place::Pci(address)) => ram == address,
            (Some(Ram::File(ram)), _) => {
                let shm = self.shm.as_ref();
                let shm = shm.map(|name| Path::new("/dev/shm").join(name.trim_start_matches('/')));
                Some(ram) == self.file.as_ref() || Some(ram) == shm.as_ref()
            }
            _ => false,
        }
    }

    /// Where the layout begins in the memory.
    pub fn layout_offset(&self) -> u64 {
        self.offset.unwrap_or(match self.layout {
            QueueLayout::Amp => 4096,
            QueueLayout::Spsc | QueueLayout::AmpPci => 0,
        })
    }

    /// Where the common memory begins in what `ram=` names, in bytes. In the memory of the messages that is behind them: at the first whole
    /// MiB, if it is not said.
    pub fn common_offset(&self) -> u64 {
        const BEHIND: u64 = 1 << 20;
        self.ram_offset.unwrap_or(match self.ram {
            Some(Ram::Bar) => (self.layout_offset() / BEHIND + 1).saturating_mul(BEHIND),
            _ => 0,
        })
    }

    /// Looks for what contradicts.
    ///
    /// # Errors
    /// [`SpecError`], with the keys named.
    pub fn check(&self) -> Result<(), SpecError> {
        let place = self.place()?;
        let refuse = |text: String| Err(SpecError(text));
        if self.listen.is_some() && self.shm.is_some() && self.file.is_some() {
            return refuse("shm= and file= contradict each other".into());
        }
        if let Place::Pci(address) = &place
            && address != "auto"
            && !is_address(address)
        {
            return refuse(format!(
                "pci={address}: expected an address such as 0000:00:04.0, or auto"
            ));
        }
        let has = |key: bool, name: &str, needs: &str| match key {
            true => Err(SpecError(format!("{name} needs {needs}"))),
            false => Ok(()),
        };
        let listens = matches!(place, Place::Listen(_));
        let plain = matches!(place, Place::Shm(_) | Place::File(_));
        has(
            self.size.is_some() && !listens && !plain,
            "size=",
            "listen=, shm= or file=; elsewhere the memory has its size",
        )?;
        has(self.vectors.is_some() && !listens, "vectors=", "listen=")?;
        if plain && (self.peer.is_some() || self.vector.is_some()) {
            return refuse("peer= and vector= need doorbells: socket=, listen= or pci=".into());
        }
        has(
            self.message_size.is_some_and(|size| size.get() != 64)
                && self.layout != QueueLayout::Amp,
            "message-size=",
            "layout=amp; the slots of the other layouts have 64 bytes",
        )?;
        if !self.layout_offset().is_multiple_of(64) {
            return refuse(format!(
                "offset={} is not a multiple of 64",
                self.layout_offset()
            ));
        }
        let ram = self.ram.is_some();
        let seen_from_driver = self.node.is_some() || self.window.is_some();
        has(self.ram_offset.is_some() && !ram, "ram-offset=", "ram=")?;
        has(self.ram_size.is_some() && !ram, "ram-size=", "ram=")?;
        has(
            ram && self.memory.is_none(),
            "ram=",
            "memory=, the way it is used",
        )?;
        let known = self.memory == Some(MemoryMode::Known);
        has(
            self.mem_offset.is_some() && !known,
            "mem-offset=",
            "memory=known",
        )?;
        has(
            self.mem_low_size.is_some() && !known,
            "mem-low-size=",
            "memory=known",
        )?;
        has(
            self.mem_hole.is_some() && !known,
            "mem-hole=",
            "memory=known",
        )?;
        match (self.mem_low_size.unwrap_or(0), self.mem_hole.unwrap_or(0)) {
            (0, 1..) => {
                return refuse("mem-hole= needs mem-low-size=, the bytes below the hole".into());
            }
            (1.., 0) => {
                return refuse("mem-low-size= needs mem-hole=, the bytes of the hole above".into());
            }
            _ => {}
        }
        if self.node.is_some() && self.window.is_some() {
            return refuse("node= and window= contradict each other".into());
        }
        let paged = matches!(self.memory, Some(MemoryMode::Whole | MemoryMode::Segment));
        has(
            seen_from_driver && !paged,
            "node= or window=",
            "memory=whole or memory=segment",
        )?;
        if self.memory == Some(MemoryMode::Bounce) && !ram {
            return refuse("memory=bounce needs ram=, what is copied into".into());
        }
        if !known && self.names_its_memory(&place) {
            return refuse("ram= names the memory of the messages, which is ram=bar".into());
        }
        if let (Some(Ram::Bar), Some(at)) = (&self.ram, self.ram_offset) {
            // With the blocks of both ends before the layout, if there are some.
            let messages = match self.layout {
                QueueLayout::Amp => self.layout_offset().saturating_sub(128),
                QueueLayout::Spsc | QueueLayout::AmpPci => self.layout_offset(),
            };
            let before = self.ram_size.and_then(|size| at.checked_add(size));
            if at <= self.layout_offset() && before.is_none_or(|end| end > messages) {
                return refuse(format!(
                    "ram-offset={at:#x}: the messages lie there, from {messages:#x} on; the common memory is to begin behind them, or to end \
                     before (ram-size=)"
                ));
            }
        }
        if known && self.ram == Some(Ram::Bar) {
            return refuse("memory=known needs ram= with a file: the driver's guest does not live in the memory of the messages".into());
        }
        Ok(())
    }
}

impl fmt::Display for IvshmemSpec {
    /// The form of the command line, without what is as by default.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ivshmem")?;
        let mut say = |key: &str, value: Option<String>| match value {
            Some(value) => write!(f, ",{key}={}", keyval::escape(&value)),
            None => Ok(()),
        };
        let path = |path: &Option<PathBuf>| {
            path.as_ref()
                .map(|path| path.to_string_lossy().into_owned())
        };
        let number = |number: Option<u64>| number.map(|number| format!("{number:#x}"));
        let all = [
            ("socket", path(&self.socket)),
            ("listen", path(&self.listen)),
            ("pci", self.pci.clone()),
            ("shm", self.shm.clone()),
            ("file", path(&self.file)),
            ("size", number(self.size)),
            ("vectors", self.vectors.map(|vectors| vectors.to_string())),
            (
                "layout",
                (self.layout != QueueLayout::default()).then(|| self.layout.to_string()),
            ),
            ("offset", number(self.offset)),
            ("peer", self.peer.map(|peer| peer.to_string())),
            ("vector", self.vector.map(|vector| vector.to_string())),
            (
                "message-size",
                self.message_size.map(|size| size.get().to_string()),
            ),
            ("memory", self.memory.map(|mode| mode.to_string())),
            ("ram", self.ram.as_ref().map(Ram::to_string)),
            ("ram-offset", number(self.ram_offset)),
            ("ram-size", number(self.ram_size)),
            ("mem-offset", number(self.mem_offset)),
            ("mem-low-size", number(self.mem_low_size)),
            ("mem-hole", number(self.mem_hole)),
            ("node", self.node.map(|node| node.to_string())),
            ("window", self.window.map(|window| window.to_string())),
            ("trace", path(&self.trace)),
        ];
        let mut text = Ok(());
        for (key, value) in all {
            text = text.and_then(|()| say(key, value));
        }
        text
    }
}

#[cfg(test)]
#[path = "spec_test.rs"]
mod tests;
