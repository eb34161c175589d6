// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Addresses of sockets, and what can be wrong with them.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
    sockopt,
};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// Another process listens there.
    #[error("{}: another process has this socket", .0.display())]
    InUse(PathBuf),
    /// There is something else.
    #[error("{}: is there and is no socket", .0.display())]
    NotASocket(PathBuf),
    /// A name that leads nowhere.
    #[error("{0}: the name has no address")]
    NoAddress(String),
    /// Both ends must be of the same kind, and multicast groups are IPv4.
    #[error("{0}")]
    Addresses(&'static str),
    /// The peer is not there, and waiting is not wanted.
    #[error("{address}: {source}; with reconnect= it may come later")]
    NoPeer {
        /// Where it should be.
        address: String,
        /// What the system says.
        source: io::Error,
    },
    /// Anything else.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: String,
        /// What the system says.
        source: io::Error,
    },
}

pub(crate) fn os(what: impl Into<String>) -> impl FnOnce(Errno) -> SocketError {
    let what = what.into();
    move |error| SocketError::Os {
        what,
        source: error.into(),
    }
}

pub(crate) fn new_socket(family: AddressFamily, kind: SocketType) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    socket_with(family, kind, flags, None)
}

pub(super) fn family(address: &SocketAddr) -> AddressFamily {
    match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    }
}

pub(super) fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, SocketError> {
    let addresses: Vec<_> = (host, port)
        .to_socket_addrs()
        .map_err(|source| SocketError::Os {
            what: host.to_owned(),
            source,
        })?
        .collect();
    if addresses.is_empty() {
        return Err(SocketError::NoAddress(host.to_owned()));
    }
    Ok(addresses)
}

pub(super) fn listen_tcp(addresses: &[SocketAddr], shown: &str) -> Result<OwnedFd, SocketError> {
    let first = addresses
        .first()
        .ok_or_else(|| SocketError::NoAddress(shown.to_owned()))?;
    let failed = || os(shown);
    let listener = new_socket(family(first), SocketType::STREAM).map_err(failed())?;
    // A server that is started again shall not wait for old connections to be forgotten.
    sockopt::set_socket_reuseaddr(&listener, true).map_err(failed())?;
    bind(&listener, first).map_err(failed())?;
    listen(&listener, 8).map_err(failed())?;
    Ok(listener)
}

/// A path that a socket of this process is bound to; it is removed with it.
#[derive(Debug)]
pub struct BoundPath {
    path: PathBuf,
    /// Device and inode: somebody else may have put another socket there.
    identity: Option<(u64, u64)>,
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

impl BoundPath {
    /// A stream socket that never blocks, bound to `path` and then given to `ready`, which has it listen. What a dead process has left
    /// there is removed.
    ///
    /// # Errors
    /// [`SocketError::InUse`], [`SocketError::NotASocket`], [`SocketError::Os`].
    pub fn stream(
        path: &Path,
        ready: impl FnOnce(&OwnedFd) -> Result<(), Errno>,
    ) -> Result<(OwnedFd, Self), SocketError> {
        let shown = || path.display().to_string();
        let socket = new_socket(AddressFamily::UNIX, SocketType::STREAM).map_err(os(shown()))?;
        let bound = Self::bind(&socket, SocketType::STREAM, path)?;
        ready(&socket).map_err(os(shown()))?;
        Ok((socket, bound))
    }

    /// Binds `socket` to `path`. What a dead process has left there is removed.
    pub(crate) fn bind(
        socket: &OwnedFd,
        kind: SocketType,
        path: &Path,
    ) -> Result<Self, SocketError> {
        let shown = || path.display().to_string();
        let address = SocketAddrUnix::new(path).map_err(os(shown()))?;
        if let Ok(metadata) = std::fs::symlink_metadata(path) {
            if !metadata.file_type().is_socket() {
                return Err(SocketError::NotASocket(path.to_owned()));
            }
            let probe = new_socket(AddressFamily::UNIX, kind).map_err(os(shown()))?;
            match connect(&probe, &address) {
                Err(Errno::CONNREFUSED) => {
                    std::fs::remove_file(path).map_err(|source| SocketError::Os {
                        what: shown(),
                        source,
                    })?;
                }
                _ => return Err(SocketError::InUse(path.to_owned())),
            }
        }
        bind(socket, &address).map_err(os(shown()))?;
        Ok(Self {
            path: path.to_owned(),
            identity: identity(path),
        })
    }
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // Gone already: nothing to do.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
