// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Waiting for a socket path to become connectable, without a timer.

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Tells when it is worth connecting to a path.
///
/// Make the watch first, then try to connect. If nobody is there, wait until
/// the watch is readable, and when [`ready`](Watch::ready) says true, try again: a
/// listener makes its socket appear only once it can be connected
/// (docs/bus-unix.md §1), so one attempt for each event is enough. Directories
/// on the way that do not exist yet, or are replaced, are waited for as well.
///
/// For listeners that are only busy, or refuse, there is no event.
#[derive(Debug)]
pub struct Watch {
    inotify: OwnedFd,
    /// The directory of the socket.
    dir: PathBuf,
    /// The socket's name in it.
    name: OsString,
    /// What is watched: `dir`, or the nearest directory above it that exists.
    watched: PathBuf,
    wd: i32,
}

impl Watch {
    /// Watches for `path`.
    ///
    /// # Errors
    /// `InvalidInput` if the path does not name a file; those of `inotify_init1`
    /// and `inotify_add_watch` (too many watches, no permission to read the directory).
    pub fn new(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a socket path without a file name",
            ));
        };
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let mut watch = Self {
            inotify,
            dir: dir.to_owned(),
            name: name.to_owned(),
            watched: PathBuf::new(),
            wd: -1,
        };
        watch.rewatch()?;
        Ok(watch)
    }

    /// Takes the events that are there. True: something happened to the path,
    /// try to connect. False: nothing that matters. Never waits.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn ready(&mut self) -> io::Result<bool> {
        let mut ready = false;
        let mut moved = false;
        // Room for the longest name; a reader that is drained holds nothing back.
        let mut buf = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buf);
        let lost =
            ReadFlags::IGNORED | ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::UNMOUNT;
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                moved = true;
            } else if event.wd() != self.wd {
                // Of a watch that was given up since.
            } else if event.events().intersects(lost) || self.watched != self.dir {
                moved = true;
            } else if event
                .file_name()
                .is_some_and(|n| OsStr::from_bytes(n.to_bytes()) == self.name)
            {
                ready = true;
            }
        }
        if moved {
            self.rewatch()?;
            // The socket may have come before the watch on its directory.
            ready = ready || self.watched == self.dir;
        }
        Ok(ready)
    }

    /// Watches the directory, or the nearest one above it that exists.
    fn rewatch(&mut self) -> io::Result<()> {
        let flags = WatchFlags::CREATE
            | WatchFlags::MOVED_TO
            | WatchFlags::ATTRIB
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        // A directory that comes between two of these steps is found by doing them again; who
        // makes and removes directories all the time is not waited for.
        for _ in 0..16 {
            let mut found = None;
            for dir in self.dir.ancestors() {
                let path = CString::new(dir.as_os_str().as_bytes())?;
                match inotify::add_watch(&self.inotify, path.as_c_str(), flags) {
                    Ok(wd) => {
                        found = Some((dir.to_owned(), wd));
                        break;
                    }
                    Err(Errno::NOENT | Errno::NOTDIR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            let Some((dir, wd)) = found else {
                return Err(io::ErrorKind::NotFound.into());
            };
            if wd != self.wd && self.wd != -1 {
                // Fails if the directory is gone, and its watch with it.
                let _ = inotify::remove_watch(&self.inotify, self.wd);
            }
            self.watched = dir;
            self.wd = wd;
            let next_exists = self
                .dir
                .ancestors()
                .take_while(|dir| *dir != self.watched)
                .last()
                .is_some_and(Path::is_dir);
            if !next_exists {
                break;
            }
        }
        Ok(())
    }
}

impl AsFd for Watch {
    /// Readable when there is something to do for [`Watch::ready`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}
