// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A terminal, from the side where somebody sits.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

use super::PATIENCE;

pub(crate) struct Terminal {
    master: File,
    slave: OwnedFd,
    child: Option<Child>,
    /// What was shown and not looked at yet.
    shown: String,
}

impl Terminal {
    pub(crate) fn new(cols: u16, rows: u16) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&master).expect("granted");
        unlockpt(&master).expect("unlocked");
        let name = ptsname(&master, Vec::new()).expect("a name");
        let name = std::ffi::OsStr::from_bytes(name.as_bytes());
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = rustix::fs::open(name, flags, Mode::empty()).expect("its other end");
        let terminal = Self {
            master: File::from(master),
            slave,
            child: None,
            shown: String::new(),
        };
        terminal.resize(cols, rows);
        terminal
    }

    pub(crate) fn resize(&self, cols: u16, rows: u16) {
        let size = Winsize {
            ws_col: cols,
            ws_row: rows,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.master, size).expect("a size");
    }

    /// How it treats what is typed.
    pub(crate) fn modes(&self) -> String {
        format!("{:?}", tcgetattr(&self.slave).expect("modes"))
    }

    /// Runs a program on it, which gets its signals.
    pub(crate) fn run(&mut self, command: &mut Command) {
        let end = || Stdio::from(self.slave.try_clone().expect("a descriptor"));
        let mut leader = Command::new("setsid");
        leader
            .args(["--ctty", "--wait"])
            .arg(command.get_program())
            .args(command.get_args())
            .current_dir(command.get_current_dir().expect("a folder"))
            .env("VMSG_LOG", "error")
            .stdin(end())
            .stdout(end())
            .stderr(end());
        self.child = Some(leader.spawn().expect("setsid runs"));
    }

    pub(crate) fn press(&mut self, keys: &[u8]) {
        self.master.write_all(keys).expect("room");
    }

    /// Waits until `words` are shown; gives what came up to their end.
    pub(crate) fn see(&mut self, words: &str) -> String {
        let due = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.shown.find(words) {
                let rest = self.shown.split_off(at + words.len());
                return std::mem::replace(&mut self.shown, rest);
            }
            let left = due.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).expect("short");
            let mut fds = [PollFd::new(&self.master, PollFlags::IN)];
            let count = poll(&mut fds, Some(&left)).expect("poll");
            assert!(count > 0, "no '{words}' in {:?}", self.shown);
            self.read(words);
        }
    }

    fn read(&mut self, words: &str) {
        let mut chunk = [0; 4096];
        match self.master.read(&mut chunk) {
            Ok(count) => self
                .shown
                .push_str(&String::from_utf8_lossy(&chunk[..count])),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("{error}; no '{words}' in {:?}", self.shown),
        }
    }

    /// Has the program end by SIGTERM.
    pub(crate) fn terminate(&self) {
        let leader = self.child.as_ref().expect("it runs").id();
        // The program is the only child of the one that waits for it.
        let children = std::fs::read_to_string(format!("/proc/{leader}/task/{leader}/children"));
        let children = children.expect("its children");
        let child = children.split_whitespace().next();
        let pid = child.map_or_else(|| leader.to_string(), str::to_owned);
        let killed = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(killed.expect("kill runs").success());
    }

    /// Waits for its end.
    pub(crate) fn end(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("it runs");
        let due = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().expect("a child") {
                return status;
            }
            assert!(
                Instant::now() < due,
                "it does not end; shown: {:?}",
                self.shown
            );
            // What it still says must not hold it up.
            let mut fds = [PollFd::new(&self.master, PollFlags::IN)];
            let soon = Timespec {
                tv_sec: 0,
                tv_nsec: 10_000_000,
            };
            if poll(&mut fds, Some(&soon)).expect("poll") > 0 {
                self.read("end");
            }
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
