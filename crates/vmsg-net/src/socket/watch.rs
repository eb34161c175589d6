// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tells when a path comes into being.

use std::ffi::OsString;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

/// A watch over one name in its folder.
#[derive(Debug)]
pub(crate) struct PathWatch {
    inotify: OwnedFd,
    name: OsString,
}

impl PathWatch {
    /// `None` if the folder is not there, or the system has no watches left: then timers have to do.
    pub(crate) fn new(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_owned();
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).ok()?;
        let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO;
        inotify::add_watch(&inotify, folder, flags).ok()?;
        Some(Self { inotify, name })
    }

    /// Readable when [`appeared`](Self::appeared) should be asked.
    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.inotify
    }

    /// True if the path has come into being since the last call.
    pub(crate) fn appeared(&self) -> bool {
        let mut room = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.inotify, &mut room);
        let mut appeared = false;
        while let Ok(event) = events.next() {
            let name = event.file_name().map(|name| name.to_bytes());
            // Without a name: events were lost.
            appeared |= name.is_none_or(|name| name == self.name.as_bytes());
        }
        appeared
    }
}
