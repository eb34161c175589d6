// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which memory, and the way to it.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use ivshmem::pci::{Access, Address, Function, Tree};
use ivshmem::{Client, Device, PeerId, Plain};
use serde::Deserialize;
use vmsg_bus::keyval;

use crate::Usage;

/// How long a server may take to say what a client needs.
const PATIENCE: Duration = Duration::from_secs(5);

/// The memory: `--socket`, `--shm` or `--file` on the host, `--pci` in a guest.
#[derive(Debug, Args)]
pub(super) struct Place {
    /// On the host: the socket of an ivshmem server
    #[arg(long, value_name = "PATH", group = "way")]
    socket: Option<PathBuf>,
    /// On the host, without doorbells: /dev/shm/NAME, as of QEMU's ivshmem-plain
    #[arg(long, value_name = "NAME", group = "way")]
    shm: Option<String>,
    /// On the host, without doorbells: a file
    #[arg(long, value_name = "PATH", group = "way")]
    file: Option<PathBuf>,
    /// In a guest: the address of the PCI function, or auto: the only one, or the only one with doorbells
    #[arg(long, value_name = "ADDRESS", group = "way")]
    pci: Option<Which>,
    /// In a guest: by VFIO if vfio-pci has the function, otherwise by sysfs, where no doorbell is heard
    #[arg(long, value_enum, default_value_t, requires = "pci")]
    access: Way,
    /// With --shm and --file: so many bytes of it, which is made if it is not there
    #[arg(long, value_name = "SIZE", value_parser = bytes, conflicts_with_all = ["socket", "pci"])]
    size: Option<u64>,
}

/// The way to a PCI function.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Way {
    #[default]
    Auto,
    Vfio,
    Sysfs,
}

impl From<Way> for Access {
    fn from(way: Way) -> Self {
        match way {
            Way::Auto => Self::Auto,
            Way::Vfio => Self::Vfio,
            Way::Sysfs => Self::Sysfs,
        }
    }
}

/// A PCI function.
#[derive(Clone, Copy, Debug)]
pub(super) enum Which {
    /// The one that suggests itself.
    Auto,
    /// By its address.
    At(Address),
}

impl FromStr for Which {
    type Err = ivshmem::pci::BadAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            address => address.parse().map(Self::At),
        }
    }
}

impl Which {
    /// The function.
    pub(super) fn function(self) -> Result<Function, ivshmem::pci::Error> {
        let tree = Tree::default();
        match self {
            Self::Auto => tree.only_function(),
            Self::At(address) => tree.function(address),
        }
    }
}

impl Place {
    /// Whether any memory is named.
    pub(super) fn is_named(&self) -> bool {
        self.socket.is_some() || self.shm.is_some() || self.file.is_some() || self.pci.is_some()
    }

    /// Reaches the memory.
    pub(super) fn open(&self) -> anyhow::Result<Device> {
        // A file of somebody else's may be truncated, a function taken away.
        vmsg_mem::fault::install().context("guard against truncated files")?;
        if let Some(path) = &self.socket {
            let client = Client::connect(path, PATIENCE)?;
            return Device::client(client).context("the server's memory");
        }
        let plain = |place: Plain| Ok(Device::plain(&place, self.size)?);
        if let Some(name) = &self.shm {
            return plain(Plain::Shm(name.clone()));
        }
        if let Some(path) = &self.file {
            return plain(Plain::File(path.clone()));
        }
        if let Some(which) = self.pci {
            return Ok(Device::pci(&which.function()?, self.access.into())?);
        }
        Err(Usage(
            "name the memory: --socket, --shm or --file on the host, --pci in a guest".into(),
        )
        .into())
    }
}

/// A peer and one of its vectors: `PEER` or `PEER:VECTOR`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// Whom to ring.
    pub peer: PeerId,
    /// By which of its vectors.
    pub vector: u16,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (peer, vector) = text.split_once(':').unwrap_or((text, "0"));
        let number = |text: &str| {
            text.parse::<u16>().map_err(|_| {
                format!("{text:?} is no number from 0 to 65535; a peer is 3, its second vector 3:1")
            })
        };
        Ok(Self {
            peer: PeerId(number(peer)?),
            vector: number(vector)?,
        })
    }
}

/// A number of bytes, or an offset: `4096`, `0x1000`, `4K`.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    #[derive(Deserialize)]
    struct Bytes {
        bytes: u64,
    }
    let unclear = || "expected a number such as 264, 0x40, 64K, 2M or 1G".to_owned();
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).map_err(|_| unclear());
    }
    let Bytes { bytes } = keyval::from_str(text).map_err(|_| unclear())?;
    Ok(bytes)
}

/// Seconds, with a part of one: more than 0, at most a day.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| format!("{text:?} is no number of seconds"))?;
    if !(seconds > 0.0 && seconds <= 86_400.0) {
        return Err("more than 0 and at most 86400 seconds".into());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Bytes for people.
pub(super) fn size(bytes: u64) -> String {
    for (unit, shift) in [("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if bytes >> shift > 0 && bytes.trailing_zeros() >= shift {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_people_write_them() {
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes("0x1000"), Ok(4096));
        assert_eq!(bytes("4K"), Ok(4096));
        assert!(bytes("4X").is_err() && bytes("-1").is_err() && bytes("0x").is_err());
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        assert!(seconds("0").is_err() && seconds("nan").is_err() && seconds("1e9").is_err());
        assert_eq!(size(1 << 20), "1 MiB");
        assert_eq!(
            (size(1025), size(0)),
            ("1025 bytes".into(), "0 bytes".into())
        );
    }

    #[test]
    fn a_vector_is_0_unless_named() {
        let target = |text: &str| text.parse::<Target>();
        let peer = PeerId(3);
        assert_eq!(target("3"), Ok(Target { peer, vector: 0 }));
        assert_eq!(target("3:7"), Ok(Target { peer, vector: 7 }));
        for text in ["", "65536", "3:", ":1", "3:1:2", "-1"] {
            assert!(target(text).is_err(), "{text}");
        }
    }
}
