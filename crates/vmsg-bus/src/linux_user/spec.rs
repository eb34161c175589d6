// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the bus `linux-user` is told.

use crate::keyval;
use serde::{Deserialize, Deserializer, Serialize, de};
use std::fmt;
use std::path::{Path, PathBuf};

/// The bus of QEMU's `virtio-msg-bus-linux-user`: two files as queues, a stream socket as doorbell, a file with
/// the driver's memory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct LinuxUserSpec {
    /// What the files of the queues are called after: `queue-NAME-driver`, `queue-NAME-device`. `linux-user` otherwise.
    pub name: QueueName,
    /// Where these files are; the working directory otherwise.
    pub dir: PathBuf,
    /// The doorbell's socket, in `dir` unless absolute; `linux-user.socket` otherwise.
    pub socket: PathBuf,
    /// Whether this side listens on the socket. Otherwise a device host listens, and a driver connects.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server: Option<bool>,
    /// The file with the driver's memory. Without it devices can be looked at and not driven.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<PathBuf>,
    /// Bus address of the beginning of that file; 0x40000000 otherwise, as on QEMU's `virt` machine for arm.
    pub mem_offset: u64,
    /// Bytes of the file below a hole.
    pub mem_low_size: u64,
    /// Bytes of the hole; 0: there is none.
    pub mem_hole: u64,
    /// Which messages go over it.
    pub revision: Revision,
    /// A file that all messages are recorded to: docs/trace.md.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<PathBuf>,
}

/// Which generation of messages a bus carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum Revision {
    /// Revision 1 of the draft.
    #[default]
    #[serde(rename = "1")]
    One,
    /// The 40-byte messages of February 2025, translated.
    #[serde(rename = "r1")]
    R1,
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::One => "1",
            Self::R1 => "r1",
        })
    }
}

/// Part of a file name: not empty, without `/`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct QueueName(String);

impl QueueName {
    /// `name`, if it can be part of a file name.
    pub fn new(name: &str) -> Option<Self> {
        let fits = !name.is_empty() && name.len() <= 200 && !name.contains(['/', '\0']);
        fits.then(|| Self(name.to_owned()))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for QueueName {
    fn default() -> Self {
        Self("linux-user".to_owned())
    }
}

impl<'de> Deserialize<'de> for QueueName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::new(&name)
            .ok_or_else(|| de::Error::custom("the name must be 1 to 200 bytes without a slash"))
    }
}

impl Default for LinuxUserSpec {
    fn default() -> Self {
        Self {
            name: QueueName::default(),
            dir: PathBuf::from("."),
            socket: PathBuf::from("linux-user.socket"),
            server: None,
            ram: None,
            mem_offset: 0x4000_0000,
            mem_low_size: 0,
            mem_hole: 0,
            revision: Revision::One,
            trace: None,
        }
    }
}

impl LinuxUserSpec {
    /// The socket with its directory.
    pub fn socket_path(&self) -> PathBuf {
        self.dir.join(&self.socket)
    }
}

impl fmt::Display for LinuxUserSpec {
    /// The form of the command line, without what is as by default.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = Self::default();
        let path = |path: &Path| keyval::escape(&path.to_string_lossy()).into_owned();
        f.write_str("linux-user")?;
        if self.name != plain.name {
            write!(f, ",name={}", keyval::escape(self.name.as_str()))?;
        }
        if self.dir != plain.dir {
            write!(f, ",dir={}", path(&self.dir))?;
        }
        if self.socket != plain.socket {
            write!(f, ",socket={}", path(&self.socket))?;
        }
        if let Some(server) = self.server {
            write!(f, ",server={}", if server { "on" } else { "off" })?;
        }
        if let Some(ram) = &self.ram {
            write!(f, ",ram={}", path(ram))?;
        }
        if self.mem_offset != plain.mem_offset {
            write!(f, ",mem-offset={:#x}", self.mem_offset)?;
        }
        if self.mem_low_size != plain.mem_low_size {
            write!(f, ",mem-low-size={:#x}", self.mem_low_size)?;
        }
        if self.mem_hole != plain.mem_hole {
            write!(f, ",mem-hole={:#x}", self.mem_hole)?;
        }
        if self.revision != plain.revision {
            write!(f, ",revision={}", self.revision)?;
        }
        crate::spec::write_trace(f, self.trace.as_deref())
    }
}
