// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk in a file or on a block device.

mod config;
mod mapped;
mod medium;
mod open;
mod pool;
mod uring;
mod work;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use vmsg_mem::WindowTable;

use crate::in_use::InUse;
use crate::{Completion, Disk, Facts, Failure, QCOW2_MAGIC, Request, Submitted};
use mapped::Mapped;
use medium::Medium;
use pool::Pool;
use uring::Uring;
use work::Work;

pub use config::{Engine, FileConfig, OpenError};

/// Most requests under way.
const LIMIT: usize = 256;
/// Threads of [`Engine::Threads`], and for long requests of [`Engine::Inline`].
const THREADS: usize = 8;
/// Bytes of a request, above which [`Engine::Inline`] does not do it in the thread that submits.
const LONG: u64 = 2 << 20;
/// How often the size is looked at: no event says that it has changed which is not also there for each write.
const LOOK: Duration = Duration::from_secs(1);
/// When the kernel is asked again that was short of something.
const AGAIN: Duration = Duration::from_millis(2);

/// A disk in a regular file or on a block device.
///
/// A file whose size is no multiple of the block size has a rest that is no part of the disk. Where the file has become
/// shorter than the disk, reads fail. Resizing is noticed within a second or two.
///
/// After a failed flush, each later one fails too: what was written before may be lost, and nobody can tell what. Opening the
/// file anew ends that.
pub struct FileDisk {
    /// Goes first: who waits for the image from then on waits for the rest to end.
    _in_use: InUse,
    medium: Arc<Medium>,
    facts: Facts,
    write_back: bool,
    workers: Workers,
    /// The file, if it is in memory and the thread that submits reads and writes it.
    mapped: Option<Mapped>,
    /// The file is in memory.
    in_memory: bool,
    /// What the file begins with must not look like an image.
    guessed: bool,
    details: Vec<(&'static str, String)>,
    /// Requests that wait until others are done.
    waiting: VecDeque<(u32, Work)>,
    /// A request is under way beside which there must be no other.
    alone: bool,
    in_flight: usize,
    /// Of those under way, the ones whose memory others than this thread use, if threads do the work.
    touching: Vec<u32>,
    /// To be told.
    done: Vec<Completion>,
    look: Instant,
    /// When the kernel is to be asked again.
    again: Option<Instant>,
}

#[derive(Debug)]
enum Workers {
    /// Long requests are done by threads.
    Inline(Pool),
    Threads(Pool),
    Uring(Box<Uring>),
}

impl Workers {
    fn engine(&self) -> Engine {
        match self {
            Self::Inline(_) => Engine::Inline,
            Self::Threads(_) => Engine::Threads,
            Self::Uring(_) => Engine::Uring,
        }
    }
}

impl FileDisk {
    /// Opens the file and takes its locks ([`open_image`](crate::open_image)).
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn open(config: &FileConfig) -> Result<Self, OpenError> {
        let opened = open::open(config)?;
        let medium = Arc::new(opened.medium);
        let threads = || {
            Pool::new(Arc::clone(&medium), THREADS).map_err(|source| OpenError::Os {
                what: "have threads for",
                path: config.path.clone(),
                source,
            })
        };
        let mut why = None;
        let workers = match config.engine {
            Engine::Inline => Workers::Inline(threads()?),
            Engine::Auto if opened.in_memory => {
                why = Some("the file is in memory".to_owned());
                Workers::Inline(threads()?)
            }
            Engine::Threads => Workers::Threads(threads()?),
            Engine::Uring | Engine::Auto => match Uring::new(Arc::clone(&medium)) {
                Ok(uring) => Workers::Uring(Box::new(uring)),
                Err(source) if config.engine == Engine::Uring => {
                    let path = config.path.clone();
                    return Err(OpenError::NoUring { path, source });
                }
                Err(error) => {
                    why = Some(error.to_string());
                    Workers::Threads(threads()?)
                }
            },
        };
        // Whether a page is there the kernel says only of files that may be written: what is read from holes of others would fill the
        // memory. A disk that the guest writes it can fill anyway.
        let maps = opened.in_memory && (!opened.facts.read_only || open::is_in_huge_pages(&medium));
        let mapped = (maps && matches!(workers, Workers::Inline(_)))
            .then(|| Mapped::new(&medium, opened.facts.size, opened.facts.read_only))
            .flatten();
        let mut details = opened.details;
        details.push(("engine", workers.engine().name().to_owned()));
        details.extend(why.map(|why| ("engine-why", why)));
        Ok(Self {
            _in_use: opened.in_use,
            in_memory: opened.in_memory,
            guessed: config.guessed,
            details,
            medium,
            facts: opened.facts,
            write_back: true,
            workers,
            mapped,
            waiting: VecDeque::new(),
            alone: false,
            in_flight: 0,
            touching: Vec::new(),
            done: Vec::new(),
            look: next_look(Instant::now()),
            again: None,
        })
    }

    /// Who reads and writes; never [`Engine::Auto`].
    pub fn engine(&self) -> Engine {
        self.workers.engine()
    }

    /// Why a request is not for this disk, if it is not.
    fn refuse(&self, request: &Request<'_>) -> Result<(), Failure> {
        let (offset, len) = match *request {
            Request::Flush => return Ok(()),
            Request::Read { offset, to } => (offset, to.len() as u64),
            _ if self.facts.read_only => return Err(Failure::ReadOnly),
            Request::Discard { .. } if !self.facts.discard => return Err(Failure::Unsupported),
            Request::Write { offset, from } => (offset, from.len() as u64),
            Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. } => {
                (offset, len)
            }
        };
        // Who asks has looked; but a write behind the end would make the file longer.
        match offset.checked_add(len) {
            Some(end) if end <= self.facts.size => Ok(()),
            _ => Err(Failure::Io(io::Error::new(
                io::ErrorKind::InvalidInput,
                "outside the disk",
            ))),
        }
    }

    /// Begins what may be begun.
    fn pump(&mut self) {
        while let Some((tag, work)) = self.waiting.pop_front() {
            let alone = work.is_exclusive(&self.medium);
            let others = self.in_flight - self.waiting.len() - 1;
            if self.alone || (alone && others > 0) {
                return self.waiting.push_front((tag, work));
            }
            self.alone = alone;
            self.start(tag, work);
        }
    }

    fn start(&mut self, tag: u32, work: Work) {
        match &mut self.workers {
            Workers::Uring(uring) => uring.start(tag, work, &mut self.done),
            Workers::Threads(pool) | Workers::Inline(pool) => {
                if work.has_memory() {
                    self.touching.push(tag);
                }
                pool.push(tag, work);
            }
        }
    }

    /// Whether the size is another than before.
    fn look(&mut self) -> bool {
        let Ok(size) = self.medium.size() else {
            return false;
        };
        let size = open::usable(&self.medium, self.facts.block_size, size);
        if let Some(mapped) = &mut self.mapped {
            mapped.renew(&self.medium, size);
        }
        if size == self.facts.size {
            return false;
        }
        tracing::info!(before = self.facts.size, size, "the disk was resized");
        self.facts.size = size;
        true
    }
}

impl Disk for FileDisk {
    fn facts(&self) -> Facts {
        self.facts
    }

    fn submit(&mut self, tag: u32, request: Request<'_>, memory: &Arc<WindowTable>) -> Submitted {
        if let Err(failure) = self.refuse(&request) {
            return Submitted::Done(Err(failure));
        }
        let len = match request {
            Request::Read { to, .. } => to.len() as u64,
            Request::Write { from, .. } => from.len() as u64,
            Request::Discard { len, .. } | Request::WriteZeroes { len, .. } => len,
            Request::Flush => 0,
        };
        if len == 0 && !matches!(request, Request::Flush) {
            return Submitted::Done(Ok(()));
        }
        let request = match request {
            Request::WriteZeroes { offset, len, unmap } => Request::WriteZeroes {
                offset,
                len,
                unmap: unmap && self.facts.discard,
            },
            request => request,
        };
        let sync = !self.write_back;
        // Even memory takes its time for gigabytes. Past the page cache who is alone with a block must be known: nothing is
        // done beside anything else then.
        let is_short = len <= LONG || self.medium.direct.is_some();
        let at_once = is_short && matches!(self.workers, Workers::Inline(_));
        let guarded = self.guessed && matches!(request, Request::Write { offset: 0, .. });
        if at_once && !guarded {
            let medium = &self.medium;
            return Submitted::Done(match &mut self.mapped {
                Some(mapped) => mapped.run(medium, request, sync),
                None => work::run(medium, request, sync),
            });
        }
        if let Some(mapped) = &mut self.mapped {
            mapped.forget(&request);
        }
        if is_short
            && let (Workers::Uring(uring), Request::Read { offset, to }) =
                (&mut self.workers, request)
            && uring.read_now(offset, to)
        {
            return Submitted::Done(Ok(()));
        }
        if self.in_flight >= LIMIT {
            return Submitted::Full;
        }
        let mut work = match Work::new(request, memory, sync) {
            Ok(work) => work,
            Err(failure) => return Submitted::Done(Err(failure)),
        };
        if guarded && work.settle(&self.medium) == QCOW2_MAGIC {
            return Submitted::Done(Err(Failure::Image));
        }
        if at_once {
            return Submitted::Done(work.run(&self.medium));
        }
        self.in_flight += 1;
        if self.waiting.is_empty() && !self.alone && !work.is_exclusive(&self.medium) {
            self.start(tag, work);
        } else {
            self.waiting.push_back((tag, work));
            self.pump();
        }
        Submitted::Pending
    }

    fn commit(&mut self) {
        let Workers::Uring(uring) = &mut self.workers else {
            return;
        };
        self.again = if uring.commit() {
            None
        } else {
            Some(Instant::now() + AGAIN)
        };
    }

    fn completed(&mut self, done: &mut Vec<Completion>) {
        loop {
            match &mut self.workers {
                Workers::Uring(uring) => uring.completed(&mut self.done),
                Workers::Threads(pool) | Workers::Inline(pool) => {
                    pool.completed(&mut self.done);
                    let told = &self.done;
                    self.touching
                        .retain(|tag| told.iter().all(|completion| completion.tag != *tag));
                }
            }
            if self.done.is_empty() {
                break;
            }
            self.in_flight -= self.done.len();
            done.append(&mut self.done);
            if self.in_flight == self.waiting.len() {
                self.alone = false;
            }
            if self.waiting.is_empty() {
                break;
            }
            self.pump();
        }
        // What goes on.
        self.commit();
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.workers {
            Workers::Threads(pool) | Workers::Inline(pool) => Some(pool.event_fd()),
            Workers::Uring(uring) => Some(uring.event_fd()),
        }
    }

    fn next_timeout(&self) -> Option<Instant> {
        if !self.done.is_empty() {
            // No event tells of them.
            return Some(Instant::now());
        }
        Some(self.again.map_or(self.look, |again| again.min(self.look)))
    }

    fn poll(&mut self, now: Instant) -> bool {
        if self.again.is_some_and(|again| again <= now) {
            self.commit();
        }
        if now < self.look {
            return false;
        }
        self.look = next_look(now);
        self.look()
    }

    fn look_soon(&mut self, now: Instant) {
        self.look = now;
    }

    fn cancel(&mut self) {
        for (tag, _) in self.waiting.drain(..) {
            let result = Err(Failure::Canceled);
            self.done.push(Completion { tag, result });
        }
        match &mut self.workers {
            Workers::Threads(pool) | Workers::Inline(pool) => pool.cancel(),
            Workers::Uring(uring) => uring.cancel(&mut self.done),
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn touching_memory(&self) -> usize {
        match &self.workers {
            Workers::Threads(_) | Workers::Inline(_) => self.touching.len(),
            Workers::Uring(uring) => uring.touching,
        }
    }

    fn set_write_back(&mut self, on: bool) {
        self.write_back = on;
    }

    /// The last descriptor of a block device waits for its page cache, that of a file on a network for the server. To take a mapping of
    /// many pages down takes its time, too.
    fn ends_at_once(&self) -> bool {
        self.in_memory && self.in_flight == 0 && self.mapped.is_none()
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        self.details.clone()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        match &self.workers {
            Workers::Uring(uring) => {
                vec![
                    ("cached", uring.cached),
                    ("bounced", uring.bounced),
                    ("retried", uring.retried),
                ]
            }
            Workers::Inline(_) | Workers::Threads(_) => Vec::new(),
        }
    }
}

impl fmt::Debug for FileDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileDisk")
            .field("engine", &self.engine())
            .field("facts", &self.facts)
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

/// When sizes are looked at after `now`: at the same time for all disks, so that a thread with many of them wakes up once.
fn next_look(now: Instant) -> Instant {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let first = *FIRST.get_or_init(|| now);
    let since = now.saturating_duration_since(first);
    first
        + LOOK
            * (u32::try_from(since.as_secs())
                .unwrap_or(u32::MAX)
                .saturating_add(1))
}

#[cfg(test)]
#[path = "file_test.rs"]
mod tests;
