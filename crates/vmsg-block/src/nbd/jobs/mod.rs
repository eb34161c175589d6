// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests on their way to a server and back, over as many connections as it takes.
//!
//! A *job* is what was wanted of the disk; on the wire it is one or more *parts*, each a request of the protocol. A part that is
//! on the wire when the connection is lost is sent again on the next one.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use vmsg_mem::{Held, Pieces};

use crate::nbd::negotiate::Export;
use crate::nbd::replies::{Expected, UnderWay};
use crate::nbd::unflushed::{self, Entry, Unflushed, Written};
use crate::nbd::wire::{self, RequestHeader};
use crate::{Completion, Failure};

mod ending;

/// Requests on the wire at the same time.
const MOST_PARTS: usize = 64;
/// Jobs at the same time.
pub(in crate::nbd) const MOST_JOBS: usize = 1024;
/// The most data of one request, in bytes, whatever the server takes: as much is copied at once when a write is answered.
const LARGEST: u32 = 2 << 20;
/// The most that is zeroed or discarded by one request, in bytes.
const LARGEST_RANGE: u32 = 1 << 30;
/// A job that is answered by nothing for so many timeouts fails, even if the server answers others.
const PATIENCE: u32 = 4;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) enum What {
    Read,
    Write,
    Flush,
    Trim,
    Zeroes { hole: bool },
}

impl What {
    fn changes(self) -> bool {
        matches!(self, Self::Write | Self::Zeroes { .. } | Self::Trim)
    }
}

/// Whose a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// The disk's user's, by its tag.
    User(u32),
    /// Nobody's any more.
    Nobody,
    /// A write that the server may have lost.
    Again,
    /// A flush so that fewer writes need to be kept.
    Relief,
}

#[derive(Debug)]
struct Job {
    owner: Owner,
    what: What,
    offset: u64,
    len: u64,
    data: Option<Held>,
    /// How much of it was made into parts.
    cut: u64,
    /// Parts that are not answered.
    open: usize,
    failure: Option<Failure>,
    /// A flush follows the write.
    then_flush: bool,
    /// For a flush: the writes it covers end before this number.
    covers: u64,
    since: Instant,
}

#[derive(Debug)]
struct Part {
    job: usize,
    header: RequestHeader,
    /// Where its data is in the job's.
    skip: u64,
    expected: Expected,
    /// It is on the wire, or part of it is.
    sent: bool,
}

/// All jobs.
#[derive(Debug)]
pub(in crate::nbd) struct Jobs {
    jobs: Vec<Option<Job>>,
    count: usize,
    parts: Vec<Option<Part>>,
    on_wire: usize,
    /// Counts parts, so that cookies are not used again.
    cookies: u32,
    /// Jobs of which something is still to be cut off.
    fresh: VecDeque<usize>,
    /// Parts that were on a connection that is lost.
    again: VecDeque<usize>,
    pub(in crate::nbd) unflushed: Unflushed,
    /// The number of the next unflushed write that is to be written again; `None` if there are none.
    replay: Option<u64>,
    /// The server was gone with writes that it had answered, and they could not be written again.
    lost: Option<String>,
    relief: bool,
    /// Jobs of nobody's that change something: nothing overtakes them.
    ghosts: usize,
    pub(in crate::nbd) done: Vec<Completion>,
    pub(in crate::nbd) write_back: bool,
    /// Counted for operators.
    pub(in crate::nbd) resent: u64,
    pub(in crate::nbd) rewritten: u64,
}

impl Jobs {
    pub(in crate::nbd) fn new() -> Self {
        Self {
            jobs: Vec::new(),
            count: 0,
            parts: (0..MOST_PARTS).map(|_| None).collect(),
            on_wire: 0,
            cookies: 0,
            fresh: VecDeque::new(),
            again: VecDeque::new(),
            unflushed: Unflushed::default(),
            replay: None,
            lost: None,
            relief: false,
            ghosts: 0,
            done: Vec::new(),
            write_back: true,
            resent: 0,
            rewritten: 0,
        }
    }

    /// Jobs whose owner waits for them.
    pub(in crate::nbd) fn waiting(&self) -> usize {
        let users = |job: &&Job| matches!(job.owner, Owner::User(_));
        self.jobs.iter().flatten().filter(users).count()
    }

    pub(in crate::nbd) fn is_full(&self) -> bool {
        self.count >= MOST_JOBS
    }

    pub(in crate::nbd) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Something is on the wire that changes the export.
    pub(in crate::nbd) fn is_changing(&self) -> bool {
        let changing = |part: &Part| part.sent && part.header.command != wire::CMD_READ;
        self.parts.iter().flatten().any(changing)
    }

    /// Begins a job of the user's.
    pub(in crate::nbd) fn begin(
        &mut self,
        tag: u32,
        what: What,
        range: (u64, u64),
        data: Option<Held>,
        now: Instant,
    ) {
        self.add(Owner::User(tag), what, range, data, now);
    }

    fn add(
        &mut self,
        owner: Owner,
        what: What,
        (offset, len): (u64, u64),
        data: Option<Held>,
        now: Instant,
    ) -> usize {
        let job = Job {
            owner,
            what,
            offset,
            len,
            data,
            cut: 0,
            open: 0,
            failure: None,
            then_flush: false,
            covers: 0,
            since: now,
        };
        self.count += 1;
        let free = self.jobs.iter().position(Option::is_none);
        let index = free.unwrap_or(self.jobs.len());
        match free {
            Some(free) => self.jobs[free] = Some(job),
            None => self.jobs.push(Some(job)),
        }
        if owner == Owner::Again {
            self.fresh.push_front(index);
        } else {
            self.fresh.push_back(index);
        }
        index
    }

    /// Cuts the next request that is to be sent: its number here and its header.
    pub(in crate::nbd) fn next(
        &mut self,
        export: &Export,
        now: Instant,
    ) -> Option<(usize, RequestHeader)> {
        if self.on_wire >= MOST_PARTS || self.ghosts > 0 {
            return None;
        }
        if let Some(number) = self.replay {
            return self.next_replayed(number, export, now);
        }
        while let Some(index) = self.again.pop_front() {
            let Some(part) = self.parts[index].as_mut() else {
                continue;
            };
            let at = part.job;
            let Some(job) = self.jobs[at].as_mut() else {
                continue;
            };
            // It may be another export by now.
            if let Some(fault) = fault(job, export, &mut self.lost) {
                job.failure.get_or_insert(fault);
                (job.cut, job.open) = (job.len, job.open - 1);
                let over = job.open == 0;
                self.parts[index] = None;
                if over {
                    self.finish(at, export, now);
                }
                continue;
            }
            job.covers = self.unflushed.end();
            part.sent = true;
            self.on_wire += 1;
            self.resent += 1;
            return Some((index, part.header));
        }
        if self.unflushed.cost() > unflushed::MANY && !self.relief {
            self.relief = true;
            let relief = self.add(Owner::Relief, What::Flush, (0, 0), None, now);
            // First of all.
            self.fresh.pop_back();
            self.fresh.push_front(relief);
        }
        loop {
            let index = *self.fresh.front()?;
            let Some(job) = self.jobs[index].as_mut() else {
                self.fresh.pop_front();
                continue;
            };
            // What is on the wire will be kept, too.
            let kept = self.unflushed.cost() + writing(&self.parts);
            if job.what.changes() && kept > unflushed::TOO_MANY {
                return None;
            }
            let fault = fault(job, export, &mut self.lost);
            let nothing = job.what == What::Flush && export.flags & wire::FLAG_SEND_FLUSH == 0;
            if fault.is_some() || nothing {
                self.fresh.pop_front();
                job.failure = job.failure.take().or(fault);
                job.cut = job.len;
                if job.open == 0 {
                    self.finish(index, export, now);
                }
                continue;
            }
            if job.what.changes() && job.cut == 0 {
                let (offset, end) = (job.offset, job.offset + job.len);
                let in_the_way = |other: &Job| {
                    let overlaps = other.offset < end && offset < other.offset + other.len;
                    other.open > 0 && other.what.changes() && overlaps
                };
                // Then it is known which came last, also when both must be written again.
                if self.jobs.iter().flatten().any(in_the_way) {
                    return None;
                }
            }
            return Some(self.cut(index, export));
        }
    }

    fn next_replayed(
        &mut self,
        number: u64,
        export: &Export,
        now: Instant,
    ) -> Option<(usize, RequestHeader)> {
        // What was begun goes on.
        if let Some(&index) = self.fresh.front() {
            let unfinished = self.jobs[index].as_ref();
            if unfinished.is_some_and(|job| job.owner == Owner::Again) {
                return Some(self.cut(index, export));
            }
        }
        let Some(entry) = self.unflushed.from(number).next().cloned() else {
            if self
                .jobs
                .iter()
                .flatten()
                .all(|job| job.owner != Owner::Again)
            {
                self.replay = None;
                return self.next(export, now);
            }
            return None;
        };
        let rewriting =
            |job: &Job| job.owner == Owner::Again && entry.overlaps(job.offset, job.len);
        if self.jobs.iter().flatten().any(rewriting) {
            return None;
        }
        if entry.offset.saturating_add(entry.len) > export.size {
            self.give_up_replay("it has become smaller");
            return self.next(export, now);
        }
        self.replay = Some(number + 1);
        self.rewritten += 1;
        let (what, data) = match entry.what {
            Written::Data(data) => (What::Write, Some(data)),
            Written::Zeroes { hole } => (What::Zeroes { hole }, None),
        };
        let index = self.add(Owner::Again, what, (entry.offset, entry.len), data, now);
        Some(self.cut(index, export))
    }

    fn give_up_replay(&mut self, reason: &str) {
        let lost = format!(
            "the server may have lost writes that it had answered, which cannot be written again: {reason}"
        );
        tracing::error!("{lost}; the next flush fails");
        self.lost = Some(lost);
        self.unflushed.clear();
        self.replay = Some(self.unflushed.end());
    }

    /// The next part of a job that has one.
    fn cut(&mut self, index: usize, export: &Export) -> (usize, RequestHeader) {
        let job = self.jobs[index].as_mut().expect("a job of the queue");
        let left = job.len - job.cut;
        let most = match job.what {
            What::Read | What::Write => export.maximum.min(LARGEST),
            What::Flush | What::Trim | What::Zeroes { .. } => LARGEST_RANGE,
        };
        // Parts begin where requests may.
        let most = (most & !(export.minimum.max(512) - 1)).max(512);
        let len = u32::try_from(left.min(u64::from(most))).unwrap_or(most);
        let (command, mut flags) = match job.what {
            What::Read => (wire::CMD_READ, 0),
            What::Write => (wire::CMD_WRITE, 0),
            What::Flush => (wire::CMD_FLUSH, 0),
            What::Trim => (wire::CMD_TRIM, 0),
            What::Zeroes { hole: true } => (wire::CMD_WRITE_ZEROES, 0),
            What::Zeroes { hole: false } => (wire::CMD_WRITE_ZEROES, wire::CMD_FLAG_NO_HOLE),
        };
        if matches!(job.what, What::Write | What::Zeroes { .. }) {
            if !self.write_back && export.flags & wire::FLAG_SEND_FUA != 0 {
                flags |= wire::CMD_FLAG_FUA;
            } else {
                job.then_flush |= !self.write_back;
            }
        }
        if job.what == What::Flush {
            job.covers = self.unflushed.end();
        }
        let free = self.parts.iter().position(Option::is_none);
        // Those that wait for being sent again are not on the wire, and what is written again goes out before them.
        let part = free.unwrap_or_else(|| {
            self.parts.push(None);
            self.parts.len() - 1
        });
        self.cookies = self.cookies.wrapping_add(1);
        let offset = if job.what == What::Flush {
            0
        } else {
            job.offset + job.cut
        };
        let header = RequestHeader {
            flags,
            command,
            cookie: u64::from(self.cookies) << 32 | part as u64,
            offset,
            len,
        };
        let wanted = if job.what == What::Read { len } else { 0 };
        self.parts[part] = Some(Part {
            job: index,
            header,
            skip: job.cut,
            expected: Expected::new(offset, wanted),
            sent: true,
        });
        self.on_wire += 1;
        job.cut += u64::from(len);
        job.open += 1;
        if job.cut == job.len {
            let at = self.fresh.iter().position(|&fresh| fresh == index);
            at.map(|at| self.fresh.remove(at));
        }
        (part, header)
    }

    /// The data of a part, behind its first `at` bytes.
    pub(in crate::nbd) fn data(&self, part: usize, at: u32) -> Pieces<'_> {
        let Some(part) = self.parts.get(part).and_then(Option::as_ref) else {
            return Pieces::EMPTY;
        };
        let data = self.jobs[part.job]
            .as_ref()
            .and_then(|job| job.data.as_ref());
        let skip = usize::try_from(part.skip + u64::from(at)).unwrap_or(usize::MAX);
        let len = usize::try_from(part.header.len - at.min(part.header.len)).unwrap_or(0);
        data.map_or(Pieces::EMPTY, |data| data.pieces().skip(skip).take(len))
    }

    /// The part with this cookie, if it is on the wire.
    pub(in crate::nbd) fn find(&self, cookie: u64) -> Option<usize> {
        let index = usize::try_from(cookie & 0xffff_ffff).ok()?;
        let part = self.parts.get(index)?.as_ref()?;
        (part.header.cookie == cookie && part.sent).then_some(index)
    }

    /// The server says that a part has failed.
    pub(in crate::nbd) fn failed(&mut self, part: usize, error: io::Error) {
        let Some(part) = &self.parts[part] else {
            return;
        };
        if let Some(job) = self.jobs[part.job].as_mut() {
            job.failure.get_or_insert(Failure::Io(error));
        }
    }

    /// The reply to a part is complete.
    pub(in crate::nbd) fn answered(&mut self, part: usize, export: &Export, now: Instant) {
        let Some(part) = self.parts[part].take() else {
            return;
        };
        self.on_wire -= 1;
        let Some(job) = self.jobs[part.job].as_mut() else {
            return;
        };
        job.open -= 1;
        if job.failure.is_some() {
            // The rest is not sent.
            job.cut = job.len;
        } else if export.flags & wire::FLAG_SEND_FLUSH != 0
            && job.owner != Owner::Again
            && let Some(entry) = keep(&part, job)
        {
            // At once, not when all of the job is answered: the connection may be lost before.
            self.unflushed.push(entry);
        }
        if job.open == 0 && job.cut == job.len {
            self.finish(part.job, export, now);
        }
    }

    fn finish(&mut self, index: usize, export: &Export, now: Instant) {
        let Some(job) = self.jobs[index].as_mut() else {
            return;
        };
        let flushes = export.flags & wire::FLAG_SEND_FLUSH != 0;
        if job.failure.is_none() {
            if job.what == What::Flush {
                self.unflushed.flushed(job.covers);
            } else if job.then_flush && flushes && matches!(job.owner, Owner::User(_)) {
                (job.what, job.len, job.cut) = (What::Flush, 0, 0);
                (job.then_flush, job.data, job.since) = (false, None, now);
                self.fresh.push_back(index);
                return;
            }
        }
        let Some(job) = self.jobs[index].take() else {
            return;
        };
        self.count -= 1;
        self.fresh.retain(|&fresh| fresh != index);
        match (job.owner, job.failure) {
            (Owner::User(tag), failure) => {
                let result = failure.map_or(Ok(()), Err);
                self.done.push(Completion { tag, result });
            }
            (Owner::Nobody, _) => {
                if job.what.changes() {
                    self.ghosts -= 1;
                }
            }
            (Owner::Again, Some(failure)) => self.give_up_replay(&failure.to_string()),
            (Owner::Again, None) => {}
            (Owner::Relief, failure) => {
                self.relief = false;
                // The server cannot flush: what it has is told at the next flush that is wanted.
                if failure.is_some() {
                    self.give_up_replay("it cannot flush");
                    self.replay = None;
                }
            }
        }
    }
}

impl UnderWay for Jobs {
    fn get(&mut self, cookie: u64) -> Option<&mut Expected> {
        let index = self.find(cookie)?;
        self.parts[index].as_mut().map(|part| &mut part.expected)
    }
}

/// Why a job cannot be done on this export, although it could be when it was begun.
fn fault(job: &Job, export: &Export, lost: &mut Option<String>) -> Option<Failure> {
    let unsupported = || Some(Failure::Unsupported);
    match job.what {
        What::Flush => return lost.take().map(|lost| Failure::Io(io::Error::other(lost))),
        What::Trim if export.flags & wire::FLAG_SEND_TRIM == 0 => return unsupported(),
        What::Zeroes { .. } if export.flags & wire::FLAG_SEND_WRITE_ZEROES == 0 => {
            return unsupported();
        }
        _ => {}
    }
    if job.what.changes() && export.flags & wire::FLAG_READ_ONLY != 0 {
        return Some(Failure::ReadOnly);
    }
    if job
        .offset
        .checked_add(job.len)
        .is_none_or(|end| end > export.size)
    {
        let gone = "the export has become smaller";
        return Some(Failure::Io(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            gone,
        )));
    }
    None
}

/// Bytes of writes that are on the wire.
fn writing(parts: &[Option<Part>]) -> usize {
    let written = |part: &Part| match part.header.command {
        wire::CMD_WRITE if part.sent => part.header.len as usize,
        _ => 0,
    };
    parts.iter().flatten().map(written).sum()
}

/// What the server may have in its memory alone of a part that it has answered.
fn keep(part: &Part, job: &Job) -> Option<Entry> {
    let RequestHeader {
        flags,
        command,
        offset,
        len,
        ..
    } = part.header;
    if flags & wire::CMD_FLAG_FUA != 0 {
        return None;
    }
    let what = match command {
        wire::CMD_WRITE => {
            let data = job.data.as_ref()?.pieces();
            let skip = usize::try_from(part.skip).ok()?;
            Written::Data(copy(data.skip(skip).take(len as usize)))
        }
        wire::CMD_WRITE_ZEROES => Written::Zeroes {
            hole: flags & wire::CMD_FLAG_NO_HOLE == 0,
        },
        _ => return None,
    };
    let len = u64::from(len);
    Some(Entry { offset, len, what })
}

/// The same bytes in memory of our own.
fn copy(data: Pieces<'_>) -> Held {
    let copy = Held::buffer(data.len(), 1);
    data.copy_to(copy.pieces());
    copy
}
