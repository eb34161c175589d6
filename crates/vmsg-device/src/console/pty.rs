// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A pseudoterminal with a name that stays.
//!
//! Its master says by a hang-up that nobody has the other end open, but not that somebody has opened it again; inotify
//! does. Without inotify the other end is held open here, and counts as used.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, inotify};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, QueueSelector, tcflush, tcgetattr, tcsetattr};

/// The name, and whether it is used.
#[derive(Debug)]
pub(super) struct Pty {
    link: PathBuf,
    /// Where the link leads.
    terminal: PathBuf,
    uses: Uses,
}

#[derive(Debug)]
enum Uses {
    /// This becomes readable when somebody opens or closes it.
    Watched { inotify: OwnedFd, used: bool },
    /// It is held open.
    Unknown { _held: OwnedFd },
}

impl Pty {
    /// Makes one that is called `link`; also returns its master, which does not block.
    pub(super) fn open(link: &Path) -> io::Result<(Self, OwnedFd)> {
        match fs::symlink_metadata(link) {
            Ok(file) if !file.is_symlink() => {
                return Err(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    "there is something that is not a symbolic link",
                ));
            }
            _ => {}
        }
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let flags = rustix::fs::fcntl_getfl(&master)?;
        rustix::fs::fcntl_setfl(&master, flags | OFlags::NONBLOCK)?;
        let name = ptsname(&master, Vec::new())?;
        let terminal = PathBuf::from(std::ffi::OsStr::from_bytes(name.as_bytes()));
        let held = open_terminal(&terminal)?;
        let mut modes = tcgetattr(&held)?;
        modes.make_raw();
        tcsetattr(&held, OptionalActions::Now, &modes)?;
        // From the first time that it is closed on, the master knows of hang-ups.
        let uses = match watch(&terminal) {
            Ok(inotify) => Uses::Watched {
                inotify,
                used: false,
            },
            Err(_) => Uses::Unknown { _held: held },
        };
        // Under another name first: the old link stays until there is a new one.
        let mut new = link.as_os_str().to_owned();
        new.push(".new");
        let _ = fs::remove_file(&new);
        std::os::unix::fs::symlink(&terminal, &new)?;
        fs::rename(&new, link)?;
        let pty = Self {
            link: link.to_owned(),
            terminal,
            uses,
        };
        Ok((pty, master))
    }

    /// What is readable when [`look`](Self::look) has something to see.
    pub(super) fn watch(&self) -> Option<BorrowedFd<'_>> {
        match &self.uses {
            Uses::Watched { inotify, .. } => Some(inotify.as_fd()),
            Uses::Unknown { .. } => None,
        }
    }

    /// Whether somebody may have it open.
    pub(super) fn is_used(&self) -> bool {
        match self.uses {
            Uses::Watched { used, .. } => used,
            Uses::Unknown { .. } => true,
        }
    }

    /// Finds out whether it is used. What the last user has left unread is dropped.
    pub(super) fn look(&mut self, master: BorrowedFd<'_>) {
        let Uses::Watched { inotify, used } = &mut self.uses else {
            return;
        };
        let mut room = [MaybeUninit::uninit(); 1024];
        let mut events = inotify::Reader::new(&*inotify, &mut room);
        // Which they are does not matter: several may have become one.
        while !matches!(events.next(), Err(error) if error != Errno::INTR) {}
        let was = std::mem::replace(used, !hung_up(master));
        if was
            && !*used
            && let Ok(terminal) = open_terminal(&self.terminal)
        {
            let _ = tcflush(terminal, QueueSelector::IOFlush);
        }
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        // Somebody may have put another link there.
        if fs::read_link(&self.link).is_ok_and(|target| target == self.terminal) {
            let _ = fs::remove_file(&self.link);
        }
    }
}

fn open_terminal(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    rustix::fs::open(path, flags, Mode::empty())
}

fn hung_up(master: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(master, PollFlags::empty())];
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&at_once)).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}

fn watch(terminal: &Path) -> rustix::io::Result<OwnedFd> {
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(
        watch.as_fd(),
        terminal,
        inotify::WatchFlags::OPEN | inotify::WatchFlags::CLOSE,
    )?;
    Ok(watch)
}
