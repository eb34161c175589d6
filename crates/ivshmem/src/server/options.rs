// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a server is to do.

use std::path::PathBuf;
use std::time::Duration;

use crate::PeerId;
use crate::protocol::MAX_VECTORS;

/// The smallest memory, in bytes: a page, which is what a BAR is mapped by.
pub const MIN_SIZE: u64 = 4096;

/// Where a server listens, and what its clients there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The Unix socket; at most [`MAX_PATH`](super::MAX_PATH) bytes.
    pub path: PathBuf,
    /// Permissions of the socket's file; 0o600 by default.
    pub mode: u32,
    /// With an id: one client at a time, which always has this one. Its eventfds are made once, so that doorbells that
    /// are rung while it is away wait for its return, and its peers see it as there as long as the server is.
    ///
    /// Without: any number of clients, whose ids are counted up from 0 as those of QEMU's server.
    pub id: Option<PeerId>,
    /// Interrupt vectors of each client, 1 to [`MAX_VECTORS`].
    pub vectors: u16,
}

impl Port {
    /// A port for any number of clients, for this user only.
    pub fn new(path: impl Into<PathBuf>, vectors: u16) -> Self {
        Self {
            path: path.into(),
            mode: 0o600,
            id: None,
            vectors,
        }
    }

    /// The same for one client at a time, with this id.
    #[must_use]
    pub fn with_id(self, id: PeerId) -> Self {
        Self {
            id: Some(id),
            ..self
        }
    }
}

/// Where the shared memory comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A new one that nobody can resize and that ends with its last user.
    Memfd,
    /// A POSIX shared memory object (shm_open(3)), found or made: `/dev/shm/NAME`.
    Shm(String),
    /// A regular file, found or made; on tmpfs or hugetlbfs it is memory.
    File(PathBuf),
}

/// What a server is to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it listens; at least one.
    pub ports: Vec<Port>,
    /// The memory.
    pub source: Source,
    /// Bytes of memory: a power of two, as BARs of PCI devices are; at least [`MIN_SIZE`].
    pub size: u64,
    /// Remove named memory and what is known of its ids when the server ends.
    pub unlink: bool,
    /// How many clients there may be at a time.
    pub max_clients: usize,
    /// How long a client may leave unread what was sent to it when the socket is full.
    pub stall: Duration,
    /// End when there was no client for so long, the time from the start to the first one included.
    pub linger: Option<Duration>,
}

impl Options {
    /// A memfd of `size` bytes for clients at `ports`.
    pub fn new(ports: Vec<Port>, size: u64) -> Self {
        Self {
            ports,
            source: Source::Memfd,
            size,
            unlink: false,
            max_clients: 1024,
            stall: Duration::from_secs(10),
            linger: None,
        }
    }

    /// Whether a server can do this at all.
    ///
    /// # Errors
    /// [`OptionsError`].
    pub fn check(&self) -> Result<(), OptionsError> {
        if self.ports.is_empty() {
            return Err(OptionsError::NoPort);
        }
        if !self.size.is_power_of_two() || self.size < MIN_SIZE || self.size > i64::MAX as u64 {
            return Err(OptionsError::Size(self.size));
        }
        if let Source::Shm(name) = &self.source {
            // One component below /dev/shm, and room for what is kept beside it.
            let plain = name.strip_prefix('/').unwrap_or(name);
            if plain.is_empty()
                || plain.len() > 240
                || plain.contains(['/', '\0'])
                || plain.starts_with('.')
            {
                return Err(OptionsError::Name(name.clone()));
            }
        }
        for (number, port) in self.ports.iter().enumerate() {
            if !(1..=MAX_VECTORS).contains(&port.vectors) {
                return Err(OptionsError::Vectors(port.vectors));
            }
            for other in &self.ports[..number] {
                if other.path == port.path {
                    return Err(OptionsError::PathTwice(port.path.clone()));
                }
                if let (Some(id), true) = (port.id, other.id == port.id) {
                    return Err(OptionsError::IdTwice(id));
                }
            }
        }
        Ok(())
    }
}

/// Options that no server can follow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// It would listen nowhere.
    #[error("a server needs a socket")]
    NoPort,
    /// QEMU ends when a BAR has such a size.
    #[error("{0} bytes: the memory must be a power of two and at least {MIN_SIZE}")]
    Size(u64),
    /// Out of range.
    #[error("{0} vectors: 1 to {MAX_VECTORS} are possible")]
    Vectors(u16),
    /// Not the name of a shared memory object.
    #[error(
        "`{0}` is no name of shared memory: one word of at most 240 bytes, without `/`, that does not begin with a dot"
    )]
    Name(String),
    /// Two ports have the same path.
    #[error("the socket `{}` is given twice", .0.display())]
    PathTwice(PathBuf),
    /// Two ports have the same id.
    #[error("the id {0} is given twice")]
    IdTwice(PeerId),
}
