// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The name of a bus, as it is written on a command line or in a file.

use crate::keyval;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A bus: `unix,path=b0.sock[,message-size=264]…` or `linux-user[,dir=.]…` on the command line, or a
/// table `{ unix = { path = "b0.sock" } }` in TOML.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum BusSpec {
    /// Processes of one host: docs/bus-unix.md.
    Unix(UnixSpec),
    /// Processes of one host as QEMU joins them: docs/bus-linux-user.md.
    #[cfg(feature = "linux-user")]
    LinuxUser(crate::linux_user::LinuxUserSpec),
    /// Memory and doorbells that two machines share: docs/bus-ivshmem.md.
    #[cfg(feature = "ivshmem")]
    Ivshmem(Box<crate::ivshmem::IvshmemSpec>),
}

/// The bus between processes of one host. The device host listens on `path`, drivers connect to it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct UnixSpec {
    /// The socket.
    pub path: PathBuf,
    /// Longest message in bytes, 48 to 65536. The device host has 320 otherwise; of both sides' numbers the smaller counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message_size: Option<MessageSize>,
    /// Device host only: slots in each queue, 2 to 65536; otherwise 256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<u32>,
    /// Device host only: connections at a time; otherwise 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
    /// Device host only: permissions of the socket, octal; otherwise 0600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// A file that all messages are recorded to: docs/trace.md.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<PathBuf>,
}

/// Longest message in bytes: 48 to 65536.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct MessageSize(u32);

impl MessageSize {
    /// `bytes`, if a bus can have such messages.
    pub fn new(bytes: u32) -> Option<Self> {
        let size = usize::try_from(bytes).ok()?;
        crate::MESSAGE_SIZES.contains(&size).then_some(Self(bytes))
    }

    /// In bytes.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl<'de> Deserialize<'de> for MessageSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = u32::deserialize(deserializer)?;
        Self::new(bytes)
            .ok_or_else(|| de::Error::custom("the message size must be 48 to 65536 bytes"))
    }
}

/// Permissions of a file, written in octal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode(pub u32);

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl<'de> Deserialize<'de> for Mode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let octal = !text.is_empty() && text.bytes().all(|b| matches!(b, b'0'..=b'7'));
        match u32::from_str_radix(&text, 8) {
            Ok(mode) if octal && mode <= 0o777 => Ok(Self(mode)),
            _ => Err(de::Error::custom(format!(
                "expected permissions in octal such as 0660, not `{text}`"
            ))),
        }
    }
}

impl Serialize for Mode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for BusSpec {
    type Err = keyval::Error;

    fn from_str(spec: &str) -> Result<Self, Self::Err> {
        let spec: Self = keyval::from_str(spec)?;
        #[cfg(feature = "ivshmem")]
        if let Self::Ivshmem(bus) = &spec {
            bus.check().map_err(serde::de::Error::custom)?;
        }
        Ok(spec)
    }
}

impl fmt::Display for BusSpec {
    /// The form of the command line, without what is left to defaults.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(unix) => {
                write!(
                    f,
                    "unix,path={}",
                    keyval::escape(&unix.path.to_string_lossy())
                )?;
                if let Some(size) = unix.message_size {
                    write!(f, ",message-size={}", size.get())?;
                }
                if let Some(slots) = unix.slots {
                    write!(f, ",slots={slots}")?;
                }
                if let Some(connections) = unix.max_connections {
                    write!(f, ",max-connections={connections}")?;
                }
                if let Some(mode) = unix.mode {
                    write!(f, ",mode={mode}")?;
                }
                write_trace(f, unix.trace.as_deref())
            }
            #[cfg(feature = "linux-user")]
            Self::LinuxUser(spec) => spec.fmt(f),
            #[cfg(feature = "ivshmem")]
            Self::Ivshmem(spec) => spec.fmt(f),
        }
    }
}

pub(crate) fn write_trace(f: &mut fmt::Formatter<'_>, trace: Option<&Path>) -> fmt::Result {
    match trace {
        Some(path) => write!(f, ",trace={}", keyval::escape(&path.to_string_lossy())),
        None => Ok(()),
    }
}

impl UnixSpec {
    /// The socket at `path`, all else by default.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            message_size: None,
            slots: None,
            max_connections: None,
            mode: None,
            trace: None,
        }
    }
}

#[cfg(feature = "unix")]
impl BusSpec {
    /// Listens on it as a device host called `name`.
    ///
    /// # Errors
    /// [`BindError`](crate::BindError).
    pub fn listen(&self, name: &str) -> Result<crate::Listener, crate::BindError> {
        match self {
            Self::Unix(unix) => unix.listen(name).map(crate::Listener::Unix),
            #[cfg(feature = "linux-user")]
            Self::LinuxUser(spec) => spec.listen(name).map(crate::Listener::LinuxUser),
            #[cfg(feature = "ivshmem")]
            Self::Ivshmem(spec) => {
                let listener = spec.listen(name, None)?;
                Ok(crate::Listener::Ivshmem(Box::new(listener)))
            }
        }
    }

    /// Connects to it as a program called `name`.
    pub fn connector(&self, name: &str) -> crate::Connector {
        match self {
            Self::Unix(unix) => crate::Connector::Unix(unix.connector(name)),
            #[cfg(feature = "linux-user")]
            Self::LinuxUser(spec) => crate::Connector::LinuxUser(spec.connector(name)),
            #[cfg(feature = "ivshmem")]
            Self::Ivshmem(spec) => crate::Connector::Ivshmem(spec.connector(name)),
        }
    }
}

#[cfg(feature = "unix")]
impl UnixSpec {
    /// How a device host called `name` listens on it.
    pub fn listener_options(&self, name: &str) -> crate::unix::ListenerOptions {
        let mut options = crate::unix::ListenerOptions {
            name: name.to_owned(),
            ..Default::default()
        };
        if let Some(size) = self.message_size {
            // Of the range of `MESSAGE_SIZES`.
            options.capabilities.max_message_size = size.get() as usize;
        }
        if let Some(slots) = self.slots {
            options.slots = slots;
        }
        if let Some(connections) = self.max_connections {
            options.max_connections = connections as usize;
        }
        if let Some(mode) = self.mode {
            options.mode = mode.0;
        }
        options.trace = self.trace();
        options
    }

    /// Listens on it as a device host called `name`.
    ///
    /// # Errors
    /// [`BindError`](crate::unix::BindError).
    pub fn listen(&self, name: &str) -> Result<crate::unix::Listener, crate::unix::BindError> {
        crate::unix::Listener::bind(&self.path, self.listener_options(name))
    }

    /// Connects to it as a program called `name`.
    pub fn connector(&self, name: &str) -> crate::unix::Connector {
        crate::unix::Connector::new(&self.path, name)
            .message_size(self.message_size.map_or(0, MessageSize::get))
            .trace(self.trace())
    }

    /// What is recorded, under the name of the socket without its ending.
    fn trace(&self) -> Option<crate::trace::Trace> {
        let path = self.trace.as_ref()?;
        let file = self.path.file_name().unwrap_or_default().to_string_lossy();
        let name = file.split('.').find(|part| !part.is_empty());
        Some(crate::trace::Trace::new(path, name.unwrap_or("bus")))
    }
}

#[cfg(test)]
#[path = "spec_test.rs"]
mod tests;
