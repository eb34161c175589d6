// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The socket that front ends connect to.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use thiserror::Error;

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
pub(super) struct Bound {
    pub(super) listener: UnixListener,
    pub(super) path: PathBuf,
    /// So that no other program's socket is removed.
    inode: (u64, u64),
}

impl Bound {
    /// Takes the place of a socket nobody listens on, and of nothing else. The file appears when it can be connected.
    pub(super) fn new(path: &Path, mode: u32) -> Result<Bound, BindError> {
        let os = |source| BindError::Os {
            path: path.to_owned(),
            source,
        };
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(os(error)),
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(BindError::NotASocket(path.to_owned()));
            }
            Ok(_) => match UnixStream::connect(path) {
                Ok(_) => return Err(BindError::InUse(path.to_owned())),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(os(error)),
            },
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

impl Drop for Bound {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.inode)
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}
