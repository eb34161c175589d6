// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A file in memory that is mapped: reading and writing it is a copy, without a system call.
//!
//! Three things of a mapping are not those of a file. A hole that is touched takes memory, even if it is only read, and if there is
//! none left that is no error but a signal: so only pages are touched that are known to be there, from a read or a write by a system
//! call. And whoever cuts the file off takes pages away: [`fault`] puts others in their place, which is noticed after the copy;
//! the request is done by a system call then, which says what is wrong. And the time of its last change stays the same, by which others see
//! whether they have to look at it: it is set from time to time.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Timespec, Timestamps, UTIME_NOW};
use rustix::process::{Resource, getrlimit};
use vmsg_mem::{Access, Mapping, Pieces, RamSlice, fault};

use super::medium::Medium;
use super::{open, work};
use crate::{Failure, Request};

/// Pages of a word.
const BITS: u64 = u64::BITS as u64;

/// Of a file so many bytes at most are mapped, its first ones: what is noted of each page takes memory.
const MOST: u64 = 1 << 40;

/// A mapped file.
#[derive(Debug)]
pub(super) struct Mapped {
    /// `None`: it cannot be had, or was lost.
    mapping: Option<Mapping>,
    access: Access,
    /// Pages that are there have their bits set.
    there: Vec<u64>,
    page: u64,
    /// The file cannot be written in any other way: holes take memory then, too.
    is_only_way: bool,
    /// The memory of guests needs the addresses that there are.
    has_few_addresses: bool,
    file: Arc<OwnedFd>,
    /// Something was written since the time of the last change was set.
    is_changed: bool,
}

impl Mapped {
    /// Maps `medium`, a regular file of which `size` bytes are the disk. `None` if that cannot be had.
    pub(super) fn new(medium: &Medium, size: u64, read_only: bool) -> Option<Self> {
        fault::install().ok()?;
        let access = if read_only {
            Access::Read
        } else {
            Access::ReadWrite
        };
        let mut mapped = Self {
            mapping: None,
            access,
            there: Vec::new(),
            page: rustix::param::page_size() as u64,
            is_only_way: open::is_in_huge_pages(medium),
            has_few_addresses: usize::BITS < 64 || getrlimit(Resource::As).current.is_some(),
            file: Arc::clone(&medium.fd),
            is_changed: false,
        };
        mapped.map(medium, size);
        mapped.mapping.is_some().then_some(mapped)
    }

    /// So much of `size` bytes is mapped.
    fn part(&self, size: u64) -> u64 {
        let most = match (self.is_only_way, self.has_few_addresses) {
            (true, _) => u64::MAX,
            (false, true) => 0,
            (false, false) => MOST,
        };
        // What is behind the end of the file in the last page is no part of it, and what is written there is lost.
        let size = size.min(most);
        size - size % self.page
    }

    fn map(&mut self, medium: &Medium, size: u64) {
        let size = self.part(size);
        self.mapping = Mapping::of_fd(medium.fd.as_fd(), 0, size, self.access).ok();
        let words = (size / self.page).div_ceil(BITS);
        self.there = match (&self.mapping, usize::try_from(words)) {
            (Some(_), Ok(words)) => vec![0; words],
            _ => Vec::new(),
        };
    }

    /// To be called from time to time. Maps the file anew if `size` bytes are another part of it than before, or if the mapping was lost.
    pub(super) fn renew(&mut self, medium: &Medium, size: u64) {
        let have = self.mapping.as_ref().map(|mapping| mapping.len() as u64);
        if have != Some(self.part(size)) {
            self.mapping = None;
            self.map(medium, size);
        }
        self.set_time();
    }

    /// Has others see that the file was changed, if it was.
    fn set_time(&mut self) {
        if std::mem::take(&mut self.is_changed) {
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_NOW,
            };
            // Whoever may write it may set both, and only the owner one of them.
            let both = Timestamps {
                last_access: now,
                last_modification: now,
            };
            // Nothing is lost without it.
            let _ = rustix::fs::futimens(&self.file, &both);
        }
    }

    /// As [`work::run`].
    pub(super) fn run(
        &mut self,
        medium: &Medium,
        request: Request<'_>,
        sync: bool,
    ) -> Result<(), Failure> {
        match request {
            Request::Read { offset, to } => {
                if !self.read(offset, to) {
                    medium.read(offset, to)?;
                    self.look(offset, to.len());
                }
                return Ok(());
            }
            Request::Write { offset, from } => {
                if self.write(offset, from) {
                    self.is_changed = true;
                } else {
                    medium.write(offset, from)?;
                    self.note(offset, from.len());
                }
            }
            Request::Discard { .. } | Request::WriteZeroes { .. } | Request::Flush => {
                self.forget(&request);
                return work::run(medium, request, sync);
            }
        }
        if sync { medium.sync() } else { Ok(()) }
    }

    /// `request` is about to be done by somebody else: pages that it takes away are not there any more.
    pub(super) fn forget(&mut self, request: &Request<'_>) {
        let (Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. }) = request
        else {
            return;
        };
        for (at, bits) in words(*offset, *len, self.page) {
            if let Some(word) = self.there.get_mut(at) {
                *word &= !bits;
            }
        }
    }

    /// False: that is to be done in another way.
    fn read(&mut self, offset: u64, to: Pieces<'_>) -> bool {
        self.is_there(offset, to.len())
            && self.copy(offset, to.len(), |file| Pieces::new(&[file]).copy_to(to))
    }

    /// Likewise.
    fn write(&mut self, offset: u64, from: Pieces<'_>) -> bool {
        (self.is_only_way || self.is_there(offset, from.len()))
            && self.copy(offset, from.len(), |file| {
                from.copy_to(Pieces::new(&[file]))
            })
    }

    /// Has `copy` copy from or to a part of the file. False: there is none, or it was taken away.
    fn copy(&mut self, offset: u64, len: usize, copy: impl FnOnce(RamSlice<'_>) -> usize) -> bool {
        let Some(mapping) = &self.mapping else {
            return false;
        };
        let at = usize::try_from(offset).ok();
        let Some(part) = at.and_then(|at| mapping.ram().get(at, len)) else {
            return false;
        };
        let done = copy(part) == len;
        if mapping.is_lost() {
            // What was copied is nobody's.
            self.mapping = None;
            return false;
        }
        done
    }

    fn is_there(&self, offset: u64, len: usize) -> bool {
        words(offset, len as u64, self.page)
            .all(|(at, bits)| self.there.get(at).is_some_and(|word| word & bits == bits))
    }

    /// These pages were written: they are there.
    fn note(&mut self, offset: u64, len: usize) {
        for (at, bits) in words(offset, len as u64, self.page) {
            if let Some(word) = self.there.get_mut(at) {
                *word |= bits;
            }
        }
    }

    /// These pages were read: finds out whether they are there.
    fn look(&mut self, offset: u64, len: usize) {
        let (Some(mapping), Ok(at)) = (&self.mapping, usize::try_from(offset)) else {
            return;
        };
        if mapping.is_resident(at, len).unwrap_or(false) {
            self.note(offset, len);
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        self.set_time();
    }
}

/// The words with the bits of all pages that have one of `len` bytes from `offset` on, and which bits those are.
fn words(offset: u64, len: u64, page: u64) -> impl Iterator<Item = (usize, u64)> {
    let first = offset / page;
    let end = offset.saturating_add(len).div_ceil(page);
    let last_word = end.saturating_sub(1) / BITS;
    (first / BITS..=last_word).map(move |word| {
        let (from, to) = (word * BITS, (word + 1) * BITS);
        let low = u64::MAX << (first.max(from) - from);
        let high = u64::MAX >> (to - end.min(to));
        // Behind all words if it does not fit.
        (usize::try_from(word).unwrap_or(usize::MAX), low & high)
    })
}

#[cfg(test)]
#[path = "mapped_test.rs"]
mod tests;
