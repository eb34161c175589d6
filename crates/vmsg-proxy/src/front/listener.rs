// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The socket that VMMs connect to.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use thiserror::Error;
use vmsg_bus::ending;

/// Why a front cannot listen.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BindError {
    /// Another program listens there.
    #[error("`{}` is in use: another program listens on it", .0.display())]
    InUse(PathBuf),
    /// There is a file that is no socket.
    #[error("`{}` exists and is no socket", .0.display())]
    NotASocket(PathBuf),
    /// The folder for the socket is missing.
    #[error("there is no folder `{}` for the socket", .0.display())]
    NoFolder(PathBuf),
    /// The system said no.
    #[error("cannot listen on `{}`: {source}", path.display())]
    Os {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A listening socket whose file goes with it.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) listener: UnixListener,
    pub(crate) path: PathBuf,
    /// So that no other program's socket is removed.
    inode: (u64, u64),
}

impl Bound {
    /// Takes the place of a socket nobody listens on, and of nothing else. The file appears when it can be connected.
    pub(crate) fn new(path: &Path, mode: u32) -> Result<Bound, BindError> {
        let os = |source| BindError::Os {
            path: path.to_owned(),
            source,
        };
        if let Some(meta) = look(path).map_err(os)? {
            if !meta.file_type().is_socket() {
                return Err(BindError::NotASocket(path.to_owned()));
            }
            // Who was killed a moment ago answers until its memory is unmapped.
            let probe = || match UnixStream::connect(path) {
                Ok(stream) => Err(Taken::By(owner(&stream))),
                Err(error) if is_free(&error) => Ok(()),
                Err(error) => Err(Taken::Unknown(error)),
            };
            let owner = |taken: &Taken| match taken {
                Taken::By(pid) => *pid,
                Taken::Unknown(_) => None,
            };
            ending::attempt_past(probe, owner).map_err(|taken| match taken {
                Taken::By(_) => BindError::InUse(path.to_owned()),
                Taken::Unknown(error) => os(error),
            })?;
        }
        let mut aside = path.as_os_str().to_owned();
        aside.push(format!(".{}", std::process::id()));
        let aside = PathBuf::from(aside);
        let _ = fs::remove_file(&aside);
        let listener = UnixListener::bind(&aside).map_err(|error| {
            let folder = match path.parent() {
                Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
                Some(folder) => folder,
                None => Path::new("/"),
            };
            if error.kind() == io::ErrorKind::NotFound && !folder.is_dir() {
                return BindError::NoFolder(folder.to_owned());
            }
            os(error)
        })?;
        let ready = || -> io::Result<(u64, u64)> {
            listener.set_nonblocking(true)?;
            fs::set_permissions(&aside, fs::Permissions::from_mode(mode))?;
            let meta = fs::symlink_metadata(&aside)?;
            fs::rename(&aside, path)?;
            Ok((meta.dev(), meta.ino()))
        };
        match ready() {
            Ok(inode) => Ok(Bound {
                listener,
                path: path.to_owned(),
                inode,
            }),
            Err(error) => {
                let _ = fs::remove_file(&aside);
                Err(os(error))
            }
        }
    }
}

impl Bound {
    /// The next VMM that has connected; `None` if nobody waits.
    pub(crate) fn accept(&self) -> io::Result<Option<UnixStream>> {
        loop {
            match self.listener.accept() {
                Ok((socket, _)) => return Ok(Some(socket)),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => return Err(error),
                },
            }
        }
    }
}

/// Why a socket may not be replaced.
enum Taken {
    /// A process listens there; its id, if that can be known.
    By(Option<u32>),
    Unknown(io::Error),
}

/// The file at `path`, if there is one.
fn look(path: &Path) -> io::Result<Option<fs::Metadata>> {
    match fs::symlink_metadata(path) {
        Ok(meta) => Ok(Some(meta)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether this is how connecting fails where nobody listens.
fn is_free(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(error.kind(), ConnectionRefused | NotFound)
}

/// The process that listens where `stream` has connected.
fn owner(stream: &UnixStream) -> Option<u32> {
    let pid = rustix::net::sockopt::socket_peercred(stream).ok()?.pid;
    u32::try_from(pid.as_raw_pid()).ok()
}

impl Drop for Bound {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.inode)
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
#[path = "listener_test.rs"]
mod tests;
