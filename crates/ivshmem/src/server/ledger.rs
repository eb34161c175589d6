// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which ids were given to users of memory that has a name, and outlives its server.
//!
//! A client of a server that has ended goes on with its memory, its id and the doorbells that it knows. So that no
//! other gets its id, the next server of the same memory begins after the last one that was given. That is written in a
//! file beside the memory, `NAME.ids`, locked as long as a server has the memory:
//!
//! ```text
//! PID next 00007
//! memory DEVICE INODE
//! fixed 3 9
//! ```
//!
//! Where nobody else has the memory open (a write lease is had), all are gone, and ids begin at 0 again.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use vmsg_mem::{LeaseError, WriteLease};

use super::lock::{self, FileLock, LockError};
use crate::PeerId;

/// Why ids cannot be given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// Another server has the memory.
    #[error("the memory `{}` is served by {} already; end that one, or take other memory", path.display(), process(*pid))]
    InUse {
        /// The memory.
        path: PathBuf,
        /// The server's process.
        pid: Option<u32>,
    },
    /// The file is not one of ours.
    #[error("`{}` does not say which ids were given; remove it when no client of `{}` is left", path.display(), memory.display())]
    NotUnderstood {
        /// The file.
        path: PathBuf,
        /// The memory.
        memory: PathBuf,
    },
    /// A client of an earlier server may have an id that a port is to have.
    #[error("id={id} may be that of a client of an earlier server, which still has the memory `{}` open; end it or choose an id from {next} on", memory.display())]
    IdTaken {
        /// The id.
        id: PeerId,
        /// The memory.
        memory: PathBuf,
        /// The first id that was never given.
        next: u32,
    },
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

pub(super) fn process(pid: Option<u32>) -> String {
    pid.map_or("another process".to_owned(), |pid| format!("process {pid}"))
}

/// The file beside named memory, locked.
#[derive(Debug)]
pub(super) struct Ledger {
    lock: FileLock,
    path: PathBuf,
    memory: PathBuf,
}

/// What a server begins with.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Start {
    /// The first id that was never given.
    pub(super) next: u32,
    /// Whether clients of an earlier server may still be there.
    pub(super) elders: bool,
    /// Ids that ports have, or had while elders were there.
    pub(super) fixed: BTreeSet<PeerId>,
}

/// What the file says.
#[derive(Debug, PartialEq, Eq)]
struct Record {
    next: u32,
    memory: (u64, u64),
    fixed: BTreeSet<PeerId>,
}

impl Ledger {
    /// Takes the file beside the memory at `memory`; there is one server for it at a time.
    pub(super) fn take(memory: &Path) -> Result<Self, LedgerError> {
        let mut path = OsString::from(memory);
        path.push(".ids");
        let path = PathBuf::from(path);
        match lock::take(&path, false) {
            Ok(lock) => Ok(Self {
                lock,
                path,
                memory: memory.to_owned(),
            }),
            Err(LockError::Held(text)) => Err(LedgerError::InUse {
                path: memory.to_owned(),
                pid: lock::holder(&text),
            }),
            Err(LockError::Os { what, path, source }) => {
                Err(LedgerError::Os { what, path, source })
            }
        }
    }

    /// Finds out where ids begin, for ports with the ids `fixed`, and writes that down.
    pub(super) fn start(
        &self,
        memory: &OwnedFd,
        fixed: &BTreeSet<PeerId>,
    ) -> Result<Start, LedgerError> {
        let os = |what| {
            move |source: io::Error| LedgerError::Os {
                what,
                path: self.path.clone(),
                source,
            }
        };
        let stat =
            rustix::fs::fstat(memory).map_err(|error| os("look at the memory of")(error.into()))?;
        // The types of the fields differ between architectures.
        #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
        let identity = (stat.st_dev as u64, stat.st_ino as u64);
        let text = self.lock.text();
        let old = match parse(&text) {
            Some(record) if record.memory == identity => Some(record),
            // That of other memory, which is no more.
            Some(_) => None,
            None if text.trim().is_empty() => None,
            None => {
                return Err(LedgerError::NotUnderstood {
                    path: self.path.clone(),
                    memory: self.memory.clone(),
                });
            }
        };
        let start = match old {
            Some(record) if is_in_use(memory) => {
                let taken =
                    |id: &&PeerId| u32::from(id.0) < record.next && !record.fixed.contains(*id);
                if let Some(id) = fixed.iter().find(taken) {
                    return Err(LedgerError::IdTaken {
                        id: *id,
                        memory: self.memory.clone(),
                        next: record.next,
                    });
                }
                Start {
                    next: record.next,
                    elders: true,
                    fixed: record.fixed.union(fixed).copied().collect(),
                }
            }
            _ => Start {
                next: 0,
                elders: false,
                fixed: fixed.clone(),
            },
        };
        let ids: Vec<String> = start.fixed.iter().map(ToString::to_string).collect();
        let text = format!(
            "{}memory {} {}\nfixed {}\n",
            first_line(start.next),
            identity.0,
            identity.1,
            ids.join(" ")
        );
        self.lock.write(&text).map_err(os("write"))?;
        Ok(start)
    }

    /// Writes down that all ids below `next` were given. In one piece, also if this process is killed meanwhile.
    pub(super) fn note(&self, next: u32) -> io::Result<()> {
        self.lock.write_over(&first_line(next))
    }

    /// Has the file removed at the end, with the memory.
    pub(super) fn remove_at_end(&mut self) {
        self.lock.remove_at_end();
    }
}

/// Always of the same length.
fn first_line(next: u32) -> String {
    format!("{:010} next {next:05}\n", std::process::id())
}

fn parse(text: &str) -> Option<Record> {
    let mut lines = text.lines();
    let first: Vec<&str> = lines.next()?.split(' ').collect();
    let memory: Vec<&str> = lines.next()?.split(' ').collect();
    let mut fixed = lines.next()?.split_ascii_whitespace();
    let (["memory", device, inode], [_, "next", next], Some("fixed")) =
        (&memory[..], &first[..], fixed.next())
    else {
        return None;
    };
    Some(Record {
        next: next.parse().ok().filter(|next| *next <= 65_536)?,
        memory: (device.parse().ok()?, inode.parse().ok()?),
        fixed: fixed
            .map(|id| id.parse().ok().map(PeerId))
            .collect::<Option<_>>()?,
    })
}

/// Whether anybody else may have the memory open, or mapped.
fn is_in_use(memory: &OwnedFd) -> bool {
    match WriteLease::take(memory) {
        Ok(_lease) => false,
        Err(LeaseError::InUse) => true,
        Err(error) => {
            tracing::debug!(%error, "clients of an earlier server may be there");
            true
        }
    }
}

#[cfg(test)]
#[path = "ledger_test.rs"]
mod tests;
