// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The socket file of a listener and who may have it: docs/bus-unix.md §1.

use crate::ending;
use crate::lock::{self, FileLock, LockError};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::{fs, process};

/// The longest path of a socket, in bytes: `sun_path` has 107 and a NUL, and
/// the socket is made under a name that is longer by four.
pub const MAX_PATH: usize = 103;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Why a listener could not have its path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// The path does not fit into a socket address.
    #[error("the socket path `{}` is too long: {} bytes, at most {MAX_PATH}; use a shorter or a relative one",
        path.display(), path.as_os_str().len())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Somebody else listens there.
    #[error("`{}` is in use by {}; end that process or choose another path", path.display(), holder(*pid))]
    InUse {
        /// The path.
        path: PathBuf,
        /// The process that listens, if it could be found out.
        pid: Option<u32>,
    },
    /// There is a file that is not a socket.
    #[error("`{}` exists and is not a socket; remove it or choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// An option is out of range.
    #[error("{0}")]
    BadOption(&'static str),
    /// Another device host has the bus.
    #[error("{bus} is served by {holder} already; end that process first, or use another name=")]
    Held {
        /// The bus.
        bus: String,
        /// Who has it.
        holder: String,
    },
    /// The queues cannot be used.
    #[cfg(feature = "linux-user")]
    #[error(transparent)]
    Queue(#[from] crate::linux_user::QueueError),
    /// The memory of the bus cannot be had.
    #[cfg(feature = "ivshmem")]
    #[error(transparent)]
    Ivshmem(Box<crate::ivshmem::OpenError>),
    /// Messages cannot be recorded.
    #[error(transparent)]
    Trace(#[from] crate::trace::OpenError),
    /// The system said no.
    #[error("cannot {what} `{}`: {source}", path.display())]
    Os {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What was said.
        source: io::Error,
    },
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or("another process".to_owned(), |pid| format!("process {pid}"))
}

fn os(what: &'static str, path: &Path, source: impl Into<io::Error>) -> BindError {
    BindError::Os {
        what,
        path: path.to_owned(),
        source: source.into(),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// A listening socket with its file and the lock on it. Dropping removes both files.
#[derive(Debug)]
pub struct Address {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the socket file, to remove no other.
    identity: (u64, u64),
    /// Let go of last.
    _lock: FileLock,
}

impl Address {
    /// Takes the path and listens there, with a socket of type `kind` that does not block; `mode` is that of its file.
    /// A process that has the path and is ending is waited for ([`ending`]).
    ///
    /// # Errors
    /// [`BindError`]: somebody listens there, or something else is in the way.
    pub fn bind(path: &Path, mode: u32, kind: SocketType) -> Result<Self, BindError> {
        if path.as_os_str().as_bytes().len() > MAX_PATH {
            return Err(BindError::PathTooLong {
                path: path.to_owned(),
            });
        }
        let take = || -> Result<FileLock, BindError> {
            let lock = take_lock(path)?;
            make_way(path, kind)?;
            Ok(lock)
        };
        let lock = ending::attempt_past(take, |error| match error {
            BindError::InUse { pid, .. } => *pid,
            _ => None,
        })?;
        // Under another name first, so that the path is never there without being connectable.
        let new = with_suffix(path, ".new");
        match fs::symlink_metadata(&new) {
            Ok(file) if !file.file_type().is_socket() => {
                return Err(BindError::NotASocket { path: new });
            }
            Ok(_) => fs::remove_file(&new).map_err(|e| os("remove", &new, e))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(os("look at", &new, error)),
        }
        let socket =
            socket(kind, SocketFlags::NONBLOCK).map_err(|e| os("make a socket for", path, e))?;
        let address = SocketAddrUnix::new(&new).map_err(|e| os("use the path", path, e))?;
        rustix::net::bind(&socket, &address).map_err(|e| os("create the socket", path, e))?;
        let listen = || -> io::Result<(u64, u64)> {
            fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
            rustix::net::listen(&socket, BACKLOG)?;
            let file = fs::symlink_metadata(&new)?;
            fs::rename(&new, path)?;
            Ok((file.dev(), file.ino()))
        };
        match listen() {
            Ok(identity) => Ok(Self {
                socket,
                path: path.to_owned(),
                identity,
                _lock: lock,
            }),
            Err(error) => {
                let _ = fs::remove_file(&new);
                Err(os("listen on", path, error))
            }
        }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Address {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Address {
    fn drop(&mut self) {
        let ours = |file: &fs::Metadata| (file.dev(), file.ino()) == self.identity;
        if fs::symlink_metadata(&self.path).is_ok_and(|file| ours(&file)) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Refuses to go on where somebody listens without our lock, or where a file is in the way.
/// A socket file that nobody answers on stays, to be renamed over.
fn make_way(path: &Path, kind: SocketType) -> Result<(), BindError> {
    match fs::symlink_metadata(path) {
        Ok(file) if !file.file_type().is_socket() => {
            return Err(BindError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(os("look at", path, error)),
    }
    let socket =
        socket(kind, SocketFlags::NONBLOCK).map_err(|e| os("make a socket for", path, e))?;
    let address = SocketAddrUnix::new(path).map_err(|e| os("use the path", path, e))?;
    match rustix::net::connect(&socket, &address) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(()),
        Ok(()) => {
            let pid = super::packet::credentials(socket.as_fd()).0;
            Err(BindError::InUse {
                path: path.to_owned(),
                pid,
            })
        }
        // A full backlog, or a listener for another type of socket.
        Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(BindError::InUse {
            path: path.to_owned(),
            pid: None,
        }),
        Err(error) => Err(os("find out who listens on", path, error)),
    }
}

/// A socket of the `unix` bus.
pub(super) fn seqpacket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    socket(SocketType::SEQPACKET, flags)
}

/// A Unix socket.
pub(crate) fn socket(kind: SocketType, flags: SocketFlags) -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        kind,
        flags | SocketFlags::CLOEXEC,
        None,
    )
}

/// Takes the exclusive lock on `PATH.lock`.
fn take_lock(socket: &Path) -> Result<FileLock, BindError> {
    lock::take(&with_suffix(socket, ".lock"), &process::id().to_string()).map_err(|error| {
        match error {
            LockError::Held(text) => BindError::InUse {
                path: socket.to_owned(),
                pid: text.trim().parse().ok(),
            },
            LockError::Os { what, path, source } => BindError::Os { what, path, source },
        }
    })
}
