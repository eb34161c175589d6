// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A port's socket and who may have it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::MAX_PATH;
use super::ledger::process;
use super::lock::{self, FileLock, LockError};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Why a server cannot listen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// The path does not fit into a socket address.
    #[error("the socket path `{}` is too long: {} bytes, at most {MAX_PATH}; use a shorter or a relative one", path.display(), path.as_os_str().len())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Somebody else listens there.
    #[error("`{}` is in use by {}; end that process or choose another path", path.display(), process(*pid))]
    InUse {
        /// The path.
        path: PathBuf,
        /// The process that listens, if it could be found out.
        pid: Option<u32>,
        /// Whether it is known to be listening: otherwise it is about to, or about to end.
        listening: bool,
    },
    /// There is a file that is not a socket.
    #[error("`{}` exists and is not a socket; remove it or choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system said no.
    #[error("cannot {what} `{}`: {source}", path.display())]
    Os {
        /// What was tried.
        what: &'static str,
        /// With which path.
        path: PathBuf,
        /// What was said.
        source: io::Error,
    },
}

/// In the lock file of a socket on which somebody listens.
const LISTENING: &str = "listening";

/// A socket that listens, with its file and the lock on it. Dropping removes both files.
#[derive(Debug)]
pub(super) struct Listening {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the socket file, to remove no other.
    identity: (u64, u64),
    /// Let go of last.
    lock: FileLock,
}

impl Listening {
    pub(super) fn bind(path: &Path, mode: u32) -> Result<Self, ListenError> {
        if path.as_os_str().as_bytes().len() > MAX_PATH {
            return Err(ListenError::PathTooLong {
                path: path.to_owned(),
            });
        }
        let os = |what| {
            move |source: io::Error| ListenError::Os {
                what,
                path: path.to_owned(),
                source,
            }
        };
        let lock = lock::take(&with_suffix(path, ".lock"), true).map_err(|error| match error {
            LockError::Held(text) => ListenError::InUse {
                path: path.to_owned(),
                pid: lock::holder(&text),
                listening: text.contains(LISTENING),
            },
            LockError::Os { what, path, source } => ListenError::Os { what, path, source },
        })?;
        let pid = std::process::id();
        lock.write(&format!("{pid}\n")).map_err(os("lock"))?;
        make_way(path)?;
        // Under another name first, so that the path is never there without being connectable.
        let new = with_suffix(path, ".new");
        match fs::symlink_metadata(&new) {
            Ok(file) if !file.file_type().is_socket() => {
                return Err(ListenError::NotASocket { path: new });
            }
            Ok(_) => fs::remove_file(&new).map_err(os("clear the way of"))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(os("look at")(error)),
        }
        let listen = || -> io::Result<(OwnedFd, (u64, u64))> {
            let socket = socket()?;
            rustix::net::bind(&socket, &SocketAddrUnix::new(&new)?)?;
            fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
            rustix::net::listen(&socket, BACKLOG)?;
            let file = fs::symlink_metadata(&new)?;
            fs::rename(&new, path)?;
            lock.write(&format!("{pid} {LISTENING}\n"))?;
            Ok((socket, identity(&file)))
        };
        match listen() {
            Ok((socket, identity)) => Ok(Self {
                socket,
                path: path.to_owned(),
                identity,
                lock,
            }),
            Err(error) => {
                let _ = fs::remove_file(&new);
                Err(os("listen on")(error))
            }
        }
    }

    /// Tells those who find the lock taken that it is about to be free.
    pub(super) fn announce_end(&self) {
        // Who does not see it is refused a moment longer.
        let _ = self.lock.write(&format!("{}\n", std::process::id()));
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let ours = |file: &fs::Metadata| identity(file) == self.identity;
        if fs::symlink_metadata(&self.path).is_ok_and(|file| ours(&file)) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

fn socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Device and inode.
fn identity(file: &fs::Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// Refuses to go on where somebody listens without our lock, or where a file is in the way. A socket file that nobody
/// answers on stays, to be renamed over.
fn make_way(path: &Path) -> Result<(), ListenError> {
    let os = |what| {
        move |source: io::Error| ListenError::Os {
            what,
            path: path.to_owned(),
            source,
        }
    };
    match fs::symlink_metadata(path) {
        Ok(file) if !file.file_type().is_socket() => {
            return Err(ListenError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(os("look at")(error)),
    }
    let asked = socket().map_err(|error| os("make a socket for")(error.into()))?;
    let address = SocketAddrUnix::new(path).map_err(|error| os("use the path")(error.into()))?;
    let in_use = |pid| ListenError::InUse {
        path: path.to_owned(),
        pid,
        listening: true,
    };
    match rustix::net::connect(&asked, &address) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(()),
        Ok(()) => Err(in_use(peer(asked.as_fd()))),
        // A full backlog, or a listener for another type of socket.
        Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(in_use(None)),
        Err(error) => Err(os("find out who listens on")(error.into())),
    }
}

/// The process at the other end, as it was when it connected or listened.
pub(super) fn peer(socket: BorrowedFd<'_>) -> Option<u32> {
    let credentials = sockopt::socket_peercred(socket).ok()?;
    u32::try_from(credentials.pid.as_raw_pid()).ok()
}
