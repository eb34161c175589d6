// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Functions, as sysfs shows them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{Address, Error};

/// PCI vendor and device id of ivshmem.
const ID: [u16; 2] = [0x1af4, 0x1110];
/// Capability of MSI-X (linux/pci_regs.h).
const MSI_X: u8 = 0x11;
/// Offset of the command register in configuration space, and its bits: the memory answers, and the function may
/// write to memory, as its interrupts do.
pub(super) const COMMAND: u64 = 4;
pub(super) const MEMORY: u16 = 1 << 1;
pub(super) const BUS_MASTER: u16 = 1 << 2;

/// Where the files of the kernel are.
#[derive(Clone, Debug)]
pub struct Tree {
    pub(super) sys: PathBuf,
    pub(super) dev: PathBuf,
}

impl Default for Tree {
    fn default() -> Self {
        Self::new("/sys", "/dev")
    }
}

/// What a function offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Memory alone: `ivshmem-plain`.
    Plain,
    /// Memory and doorbells: `ivshmem-doorbell`.
    Doorbell,
}

/// Where a BAR is in the machine's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bar {
    pub(super) start: u64,
    /// In bytes; 0: there is none.
    pub(super) size: u64,
}

/// A function with the PCI id of ivshmem.
#[derive(Clone, Debug)]
pub struct Function {
    tree: Tree,
    address: Address,
    revision: u8,
    bars: [Bar; 3],
    vectors: Option<u16>,
    driver: Option<String>,
    group: Option<u32>,
}

impl Tree {
    /// Looks for sysfs at `sys` and for devices at `dev`, rather than at /sys and /dev.
    pub fn new(sys: impl Into<PathBuf>, dev: impl Into<PathBuf>) -> Self {
        Self {
            sys: sys.into(),
            dev: dev.into(),
        }
    }

    /// All functions of ivshmem, by address.
    ///
    /// # Errors
    ///
    /// sysfs cannot be read. A machine without PCI just has none.
    pub fn functions(&self) -> Result<Vec<Function>, Error> {
        let dir = self.sys.join("bus/pci/devices");
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|error| Error::file(dir.clone(), error))?,
        };
        let mut functions = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| Error::file(dir.clone(), error))?;
            let name = entry.file_name();
            let Some(address) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            match self.function(address) {
                Ok(function) => functions.push(function),
                Err(Error::NotThere(_)) => {}
                Err(error) => return Err(error),
            }
        }
        functions.sort_by_key(|function| function.address);
        Ok(functions)
    }

    /// The function at an address.
    ///
    /// # Errors
    ///
    /// [`Error::NotThere`], also if the function is none of ivshmem.
    pub fn function(&self, address: Address) -> Result<Function, Error> {
        self.function_of(address, ID)
    }

    /// One with another PCI id.
    pub(super) fn function_of(
        &self,
        address: Address,
        wanted: [u16; 2],
    ) -> Result<Function, Error> {
        let dir = self.device(address);
        let id = [hex(&dir, "vendor"), hex(&dir, "device")];
        if id != wanted.map(|word| Some(u64::from(word))) {
            return Err(match wanted {
                ID => Error::NotThere(address),
                [vendor, device] => Error::NotOfKind {
                    address,
                    vendor,
                    device,
                },
            });
        }
        let revision = hex(&dir, "revision").and_then(|revision| u8::try_from(revision).ok());
        let config = fs::read(dir.join("config")).unwrap_or_default();
        Ok(Function {
            tree: self.clone(),
            address,
            revision: revision.unwrap_or(0),
            bars: bars(&fs::read_to_string(dir.join("resource")).unwrap_or_default()),
            vectors: vectors(&config),
            driver: link(&dir, "driver"),
            group: link(&dir, "iommu_group").and_then(|group| group.parse().ok()),
        })
    }

    /// The only function there is; among several the only one with doorbells.
    ///
    /// # Errors
    ///
    /// [`Error::None`], [`Error::Several`].
    pub fn only_function(&self) -> Result<Function, Error> {
        let mut functions = self.functions()?;
        if functions.len() > 1 {
            let all: Vec<String> = functions
                .iter()
                .map(|function| function.address.to_string())
                .collect();
            functions.retain(|function| function.kind() == Kind::Doorbell);
            if functions.len() != 1 {
                return Err(Error::Several(all.join(", ")));
            }
        }
        functions.pop().ok_or(Error::None)
    }

    pub(super) fn device(&self, address: Address) -> PathBuf {
        self.sys.join("bus/pci/devices").join(address.to_string())
    }
}

impl Function {
    /// Where it is.
    pub fn address(&self) -> Address {
        self.address
    }

    /// 1 since QEMU 2.6; 0 for the `ivshmem` of before.
    pub fn revision(&self) -> u8 {
        self.revision
    }

    /// What it offers: the one with doorbells has MSI-X, and a BAR for it.
    pub fn kind(&self) -> Kind {
        if self.bars[1].size > 0 || self.vectors.is_some() {
            Kind::Doorbell
        } else {
            Kind::Plain
        }
    }

    /// How many vectors its MSI-X has; `None` without doorbells, or where only root may know.
    pub fn vectors(&self) -> Option<u16> {
        self.vectors
    }

    /// Size of the memory in bytes.
    pub fn memory_size(&self) -> u64 {
        self.bars[2].size
    }

    /// The kernel's driver that it is bound to.
    pub fn driver(&self) -> Option<&str> {
        self.driver.as_deref()
    }

    /// Its IOMMU group.
    pub fn group(&self) -> Option<u32> {
        self.group
    }

    /// The file of its memory, for programs that map it themselves: ordinary memory on arm64 too.
    pub fn memory_path(&self) -> PathBuf {
        self.dir().join("resource2_wc")
    }

    pub(super) fn tree(&self) -> &Tree {
        &self.tree
    }

    pub(super) fn dir(&self) -> PathBuf {
        self.tree.device(self.address)
    }

    pub(super) fn bar(&self, number: usize) -> Bar {
        self.bars.get(number).copied().unwrap_or_default()
    }

    pub(super) fn open_resource(&self, name: &str) -> Result<File, Error> {
        let path = self.dir().join(name);
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        opened.map_err(|error| Error::file(path, error))
    }

    /// Makes the memory answer: where nobody has switched that on, all of it reads as 0 or −1.
    pub(super) fn enable(&self) -> Result<(), Error> {
        if self.is_on()? {
            return Ok(());
        }
        if let Some(driver) = &self.driver {
            return Err(Error::Off {
                address: self.address,
                driver: driver.clone(),
            });
        }
        let path = self.dir().join("enable");
        fs::write(&path, "1").map_err(|error| Error::file(path, error))?;
        if self.is_on()? {
            return Ok(());
        }
        // The kernel takes it for enabled already, and leaves it as it is.
        let path = self.dir().join("config");
        let failed = |error| Error::file(path.clone(), error);
        let config = OpenOptions::new().read(true).write(true).open(&path);
        let config = config.map_err(failed)?;
        let mut command = [0; 2];
        config
            .read_exact_at(&mut command, COMMAND)
            .map_err(failed)?;
        let command = u16::from_le_bytes(command) | MEMORY;
        config
            .write_all_at(&command.to_le_bytes(), COMMAND)
            .map_err(failed)
    }

    /// Whether the memory answers.
    fn is_on(&self) -> Result<bool, Error> {
        let path = self.dir().join("config");
        let failed = |error| Error::file(path.clone(), error);
        let mut command = [0; 2];
        let config = File::open(&path).map_err(failed)?;
        config
            .read_exact_at(&mut command, COMMAND)
            .map_err(failed)?;
        Ok(u16::from_le_bytes(command) & MEMORY != 0)
    }
}

/// A number in a file, with or without 0x.
fn hex(dir: &Path, name: &str) -> Option<u64> {
    parse_hex(fs::read_to_string(dir.join(name)).ok()?.trim())
}

fn parse_hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
}

/// The last part of what a link points at.
pub(super) fn link(dir: &Path, name: &str) -> Option<String> {
    let target = fs::read_link(dir.join(name)).ok()?;
    Some(target.file_name()?.to_str()?.into())
}

/// The first BARs, of the file `resource`: a line with first and last address and flags for each.
fn bars(resource: &str) -> [Bar; 3] {
    let mut bars = [Bar::default(); 3];
    for (bar, line) in bars.iter_mut().zip(resource.lines()) {
        let mut numbers = line.split_whitespace().map(parse_hex);
        let (Some(Some(start)), Some(Some(end))) = (numbers.next(), numbers.next()) else {
            continue;
        };
        // One that is not there is all zeroes.
        if end > start {
            let size = (end - start).saturating_add(1);
            *bar = Bar { start, size };
        }
    }
    bars
}

/// How many vectors MSI-X has, by the capability in configuration space. Others than root see the first 64 bytes
/// only, where there are no capabilities.
fn vectors(config: &[u8]) -> Option<u16> {
    let byte = |at: usize| config.get(at).copied();
    // Bit 4 of the status register: there are capabilities.
    if byte(6)? & 0x10 == 0 {
        return None;
    }
    let mut at = usize::from(byte(0x34)? & !3);
    // As many as there is room for: the list may be a ring.
    for _ in 0..48 {
        if at < 0x40 {
            return None;
        }
        if byte(at)? == MSI_X {
            let control = u16::from_le_bytes([byte(at + 2)?, byte(at + 3)?]);
            return Some((control & 0x7ff) + 1);
        }
        at = usize::from(byte(at + 1)? & !3);
    }
    None
}

#[cfg(test)]
#[path = "function_test.rs"]
mod tests;
