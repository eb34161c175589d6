// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who is at the other end: a program of ours says so in its lock file, docs/bus-linux-user.md §1.

use super::{QueueError, Role, Site};
use crate::Peer;
use crate::ending;
use crate::lock::{self, FileLock, LockError};
use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

/// What stands in the lock file of a role: `NAME (pid PID)`, then `epoch EPOCH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) name: String,
    pub(super) pid: Option<u32>,
    pub(super) epoch: Option<u64>,
}

impl Program {
    /// This process, which calls itself `name`.
    pub(super) fn this(name: &str, epoch: Option<u64>) -> Self {
        Self {
            name: Peer::named(name).name,
            pid: Some(std::process::id()),
            epoch,
        }
    }

    /// From the text of a lock file, which may be anything.
    pub(super) fn parse(text: &str) -> Self {
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        let (name, pid) = match first.rsplit_once(" (pid ") {
            Some((name, pid)) => (name, pid.trim_end_matches(')').parse().ok()),
            None => (first, None),
        };
        let epoch = lines.find_map(|line| line.strip_prefix("epoch ")?.parse().ok());
        Self {
            name: Peer::named(name).name,
            pid,
            epoch,
        }
    }

    /// As [`Self::parse`], for a message about who is in the way.
    pub(super) fn shown(text: &str) -> String {
        match Self::parse(text) {
            Self {
                name, pid: None, ..
            } if name.is_empty() => "another program".to_owned(),
            Self { name, pid, .. } => Peer {
                pid,
                ..Peer::named(&name)
            }
            .to_string(),
        }
    }
}

impl fmt::Display for Program {
    /// The text of a lock file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if let Some(pid) = self.pid {
            write!(f, " (pid {pid})")?;
        }
        match self.epoch {
            Some(epoch) => write!(f, "\nepoch {epoch}"),
            None => Ok(()),
        }
    }
}

/// Takes the lock of `role` for `program`. A process that has it and is ending is waited for.
pub(super) fn take_role(
    site: &Site,
    role: Role,
    program: &Program,
    patience: Duration,
) -> Result<FileLock, LockError> {
    let take = || {
        // Others look at the lock by taking it for a moment. It is let go of before an end is waited for.
        let _no_others = lock::wait(&site.short_lock(), patience)?;
        lock::take(&site.role_lock(role), &program.to_string())
    };
    ending::attempt_past(take, |error| match error {
        LockError::Held(text) => Program::parse(text).pid,
        LockError::Os { .. } => None,
    })
}

/// The program at the other end of `socket`, if it is the one of ours that has `role`. Others have
/// no lock, or belong to another connection.
pub(super) fn at(
    site: &Site,
    role: Role,
    socket: BorrowedFd<'_>,
    patience: Duration,
) -> Result<Option<Program>, QueueError> {
    let text = {
        // Who takes such a lock must not find it taken by us.
        let _no_others = lock::wait(&site.short_lock(), patience)?;
        lock::holder(&site.role_lock(role))?
    };
    let pid = crate::unix::packet::credentials(socket).0;
    let program = text.map(|text| Program::parse(&text));
    Ok(program.filter(|program| program.pid == pid))
}

/// Who is at the other end of `socket`, for messages to people.
pub(super) fn peer(socket: BorrowedFd<'_>, program: Option<&Program>) -> Peer {
    let (pid, uid) = crate::unix::packet::credentials(socket);
    let name = match (program, pid) {
        (Some(program), _) => program.name.clone(),
        (None, Some(pid)) => command(pid).unwrap_or_default(),
        (None, None) => String::new(),
    };
    Peer {
        pid,
        uid,
        ..Peer::named(&name)
    }
}

/// What the kernel calls a process.
fn command(pid: u32) -> Option<String> {
    let comm = Path::new("/proc").join(pid.to_string()).join("comm");
    Some(std::fs::read_to_string(comm).ok()?.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let program = Program {
            name: "vmsg proxy net0 (x)".to_owned(),
            pid: Some(12),
            epoch: Some(u64::MAX),
        };
        assert_eq!(Program::parse(&program.to_string()), program);
        let driver = Program::this("ls", None);
        assert_eq!(Program::parse(&driver.to_string()), driver);
    }

    #[test]
    fn any_text_is_somebody() {
        for text in [
            "",
            "\n\n",
            " (pid ",
            "x (pid y)",
            "\u{1b}[2J (pid 4)\nepoch -1",
        ] {
            let program = Program::parse(text);
            assert!(program.epoch.is_none() && !program.name.contains('\u{1b}'));
            assert!(!Program::shown(text).is_empty());
        }
        assert_eq!(Program::shown(""), "another program");
        assert_eq!(Program::shown("a (pid 3)\nepoch 7"), "a (pid 3)");
    }
}
