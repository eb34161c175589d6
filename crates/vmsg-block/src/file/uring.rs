// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests in the kernel's hands, through io_uring.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use vmsg_mem::uring::{Finished, Operation, Ring, RingError};
use vmsg_mem::{Held, Pieces};

use super::LIMIT;
use super::medium::{self, CHUNK, HOLE, Kind, Medium};
use super::pool::Pool;
use super::work::Work;
use crate::{Completion, Failure};

/// What io_uring has no operation for is done by so many threads: they are rarely needed.
const THREADS: usize = 2;
/// For the ring: the thread's event.
const THREADS_TAG: u64 = u64::MAX;
/// How often an operation is begun again that the kernel gave up for no reason of the file's.
const TRIES: u32 = 1000;

/// A request under way in the kernel.
#[derive(Debug)]
struct Request {
    tag: u32,
    step: Step,
    /// The kernel uses memory of the peer.
    touches: bool,
    canceled: bool,
    tries: u32,
}

/// What the kernel is doing for a request. The memory is with the ring.
#[derive(Debug)]
enum Step {
    Read {
        offset: u64,
        /// The ring has a buffer of our own: this is where the rest of it goes.
        bounced: Option<Held>,
    },
    Write {
        offset: u64,
        /// Each operation is on the medium when it is done.
        at_once: bool,
        /// All is brought there when all is written.
        then_sync: bool,
    },
    Allocate {
        mode: FallocateFlags,
        offset: u64,
        len: u64,
        then_sync: bool,
        /// What it is done by if it cannot be done so.
        instead: Work,
    },
    Sync,
}

impl Step {
    fn operation(&self, memory: Option<Held>) -> Operation {
        match (self, memory) {
            (&Self::Read { offset, .. }, Some(to)) => Operation::Read { offset, to },
            (
                &Self::Write {
                    offset, at_once, ..
                },
                Some(from),
            ) => Operation::Write {
                offset,
                from,
                sync: at_once,
            },
            (
                &Self::Allocate {
                    mode, offset, len, ..
                },
                _,
            ) => Operation::Allocate { mode, offset, len },
            (Self::Sync, _) => Operation::SyncData,
            (Self::Read { .. } | Self::Write { .. }, None) => {
                unreachable!("the ring gives the memory back")
            }
        }
    }
}

/// How a request goes on.
enum Next {
    /// With what the step says, and this memory.
    Again(Option<Held>),
    Instead(Work),
    Done(Result<(), Failure>),
}

/// Requests in the kernel's hands.
#[derive(Debug)]
pub(super) struct Uring {
    medium: Arc<Medium>,
    ring: Ring,
    /// By the tags of the ring.
    requests: Vec<Option<Request>>,
    free: Vec<usize>,
    /// What the ring did not take: the system is short of something.
    unsent: VecDeque<(u64, Operation)>,
    threads: Option<Threads>,
    /// Requests for which the kernel or a thread uses memory of the peer.
    pub(super) touching: usize,
    /// Pushed to the ring and not given to the kernel.
    pending: bool,
    /// The kernel has refused to take anything, which was logged.
    refused: bool,
    /// Reads of what is in the page cache.
    cache: Cache,
    pub(super) bounced: u64,
    pub(super) retried: u64,
    /// Reads that the page cache had.
    pub(super) cached: u64,
}

/// Whether reading without waiting pays: of a medium whose data is not in the page cache it is a system call in vain.
#[derive(Debug, Default)]
struct Cache {
    /// Reads that are not tried so, as the last try was in vain.
    skip: u32,
    /// How many that were the last time; doubled each time.
    skipped: u32,
    /// The file knows no such reads.
    never: bool,
}

impl Cache {
    const MOST_SKIPPED: u32 = 64;

    fn may_have_it(&mut self) -> bool {
        let skips = self.skip > 0;
        self.skip = self.skip.saturating_sub(1);
        !skips && !self.never
    }

    fn found(&mut self) {
        self.skipped = 0;
    }

    fn in_vain(&mut self) {
        self.skipped = (2 * self.skipped).clamp(1, Self::MOST_SKIPPED);
        self.skip = self.skipped;
    }
}

/// Beside the ring.
#[derive(Debug)]
struct Threads {
    pool: Pool,
    event: Arc<OwnedFd>,
    /// The ring tells of the event.
    heard: bool,
    /// Requests with memory.
    touching: Vec<u32>,
}

impl Uring {
    pub(super) fn new(medium: Arc<Medium>) -> Result<Self, RingError> {
        Ok(Self {
            medium,
            // One more for the event.
            ring: Ring::new(u32::try_from(LIMIT + 1).expect("few"))?,
            requests: Vec::new(),
            free: Vec::new(),
            unsent: VecDeque::new(),
            threads: None,
            touching: 0,
            pending: false,
            refused: false,
            cache: Cache::default(),
            bounced: 0,
            retried: 0,
            cached: 0,
        })
    }

    pub(super) fn event_fd(&self) -> BorrowedFd<'_> {
        self.ring.event_fd()
    }

    /// Reads what the page cache has, here and now: the ring would do the same, with more ado. False: that is for the ring.
    pub(super) fn read_now(&mut self, offset: u64, to: Pieces<'_>) -> bool {
        if self.medium.direct.is_some() || !self.cache.may_have_it() {
            return false;
        }
        let result = to.read_from_at_now(&self.medium.fd, offset);
        let all = matches!(result, Ok(count) if count == to.len());
        match result {
            Ok(_) if all => {
                self.cache.found();
                self.cached += 1;
            }
            Err(error) if medium::is_unsupported(&error) => self.cache.never = true,
            // Whatever is wrong the ring finds out, too.
            _ => self.cache.in_vain(),
        }
        all
    }

    /// Begins `work` with the next [`commit`](Self::commit).
    pub(super) fn start(&mut self, tag: u32, work: Work, done: &mut Vec<Completion>) {
        let medium = &self.medium;
        let (step, memory, touches) = match work {
            Work::Read { offset, to } if self.is_for_ring(offset, &to) => {
                let bounces = !medium.takes(to.pieces());
                let (bounced, memory) = if bounces {
                    let buffer = medium.buffer(to.len());
                    (Some(to), buffer)
                } else {
                    (None, to)
                };
                (Step::Read { offset, bounced }, Some(memory), !bounces)
            }
            Work::Write { offset, from, sync } if self.is_for_ring(offset, &from) => {
                let bounces = !medium.takes(from.pieces());
                let memory = if bounces {
                    let buffer = medium.buffer(from.len());
                    from.pieces().copy_to(buffer.pieces());
                    buffer
                } else {
                    from
                };
                // Past the page cache the system can do both at once. Otherwise an error must say whether something that was
                // written before is lost.
                let at_once = sync && medium.direct.is_some();
                let step = Step::Write {
                    offset,
                    at_once,
                    then_sync: sync && !at_once,
                };
                (step, Some(memory), !bounces)
            }
            Work::Flush => {
                if let Err(failure) = medium.is_intact() {
                    let result = Err(failure);
                    return done.push(Completion { tag, result });
                }
                (Step::Sync, None, false)
            }
            Work::Discard { offset, len } if medium.kind == Kind::Regular => {
                let step = Step::Allocate {
                    mode: HOLE,
                    offset,
                    len,
                    then_sync: false,
                    instead: work,
                };
                (step, None, false)
            }
            Work::Zero {
                offset,
                len,
                unmap,
                sync,
            } => match medium.way_to_zero(unmap) {
                Some(mode) if !work.is_exclusive(medium) => {
                    let step = Step::Allocate {
                        mode,
                        offset,
                        len,
                        then_sync: sync,
                        instead: work,
                    };
                    (step, None, false)
                }
                _ => return self.start_thread(tag, work, done),
            },
            work => return self.start_thread(tag, work, done),
        };
        self.touching += usize::from(touches);
        self.bounced += u64::from(memory.is_some() && !touches);
        let operation = step.operation(memory);
        let at = self.free.pop().unwrap_or_else(|| {
            self.requests.push(None);
            self.requests.len() - 1
        });
        self.requests[at] = Some(Request {
            tag,
            step,
            touches,
            canceled: false,
            tries: 0,
        });
        self.push(at as u64, operation);
    }

    /// Whether the kernel can read or write there with at most a small buffer of our own.
    fn is_for_ring(&self, offset: u64, memory: &Held) -> bool {
        self.medium.is_aligned(offset, memory.len() as u64)
            && (memory.len() <= CHUNK || self.medium.takes(memory.pieces()))
    }

    fn push(&mut self, index: u64, operation: Operation) {
        self.pending = true;
        // In order: nothing overtakes what the system was too short of something for.
        let refused = if self.unsent.is_empty() {
            self.ring.push(index, &self.medium.fd, operation).err()
        } else {
            Some(operation)
        };
        if let Some(operation) = refused {
            self.unsent.push_back((index, operation));
        }
    }

    fn start_thread(&mut self, tag: u32, work: Work, done: &mut Vec<Completion>) {
        if self.threads.is_none() {
            let medium = Arc::clone(&self.medium);
            let threads = Pool::new(medium, THREADS).and_then(|pool| {
                Ok(Threads {
                    event: Arc::new(pool.event()?),
                    pool,
                    heard: false,
                    touching: Vec::new(),
                })
            });
            match threads {
                Ok(threads) => self.threads = Some(threads),
                Err(error) => {
                    let result = Err(Failure::Io(error));
                    return done.push(Completion { tag, result });
                }
            }
        }
        self.listen();
        let threads = self.threads.as_mut().expect("just made");
        if work.has_memory() {
            self.touching += 1;
            threads.touching.push(tag);
        }
        threads.pool.push(tag, work);
    }

    /// Has the ring tell when a thread is done with something. False: it could not be told so, and is to be asked again.
    fn listen(&mut self) -> bool {
        let Some(threads) = self.threads.as_mut().filter(|threads| !threads.heard) else {
            return true;
        };
        let (offset, to) = (0, Held::buffer(8, 8));
        let read = Operation::Read { offset, to };
        // There is room for it always; but the kernel may have taken nothing of what is to be submitted.
        threads.heard = self.ring.push(THREADS_TAG, &threads.event, read).is_ok();
        self.pending = true;
        threads.heard
    }

    /// Gives the kernel what was started. False: it did not take it, and is to be asked again in a moment.
    pub(super) fn commit(&mut self) -> bool {
        if !self.pending {
            return true;
        }
        let listens = self.listen();
        while let Some((index, operation)) = self.unsent.pop_front() {
            if let Err(operation) = self.ring.push(index, &self.medium.fd, operation) {
                self.unsent.push_front((index, operation));
                break;
            }
        }
        let submitted = self.ring.submit();
        if let Err(error) = &submitted
            && !is_short_of_something(error)
            && !mem::replace(&mut self.refused, true)
        {
            tracing::error!(%error, "the kernel takes no requests for a disk any more: they wait until it does");
        }
        self.pending = submitted.is_err() || !self.unsent.is_empty() || !listens;
        !self.pending
    }

    pub(super) fn completed(&mut self, done: &mut Vec<Completion>) {
        while let Some(finished) = self.ring.pop() {
            if finished.tag == THREADS_TAG {
                if let Some(threads) = &mut self.threads {
                    threads.heard = false;
                }
                self.listen();
                continue;
            }
            self.finished(finished, done);
        }
        if let Some(threads) = &mut self.threads {
            let first = done.len();
            threads.pool.completed(done);
            for completion in &done[first..] {
                let at = threads
                    .touching
                    .iter()
                    .position(|tag| *tag == completion.tag);
                if let Some(at) = at {
                    threads.touching.swap_remove(at);
                    self.touching -= 1;
                }
            }
        }
    }

    /// Goes on with a request after the kernel has done something for it.
    fn finished(&mut self, finished: Finished, done: &mut Vec<Completion>) {
        let at = usize::try_from(finished.tag).expect("as it was pushed");
        let mut request = self.requests[at].take().expect("under way");
        let next = match finished.result {
            Err(error) if is_passing(&error) => {
                if !request.canceled && request.tries < TRIES {
                    request.tries += 1;
                    self.retried += 1;
                    Next::Again(finished.memory)
                } else if request.canceled {
                    Next::Done(Err(Failure::Canceled))
                } else {
                    Next::Done(Err(Failure::Io(error)))
                }
            }
            result => self.step(&mut request.step, result, finished.memory),
        };
        match next {
            Next::Again(_) if request.canceled => {
                self.end(at, &request, Err(Failure::Canceled), done);
            }
            Next::Again(memory) => {
                let operation = request.step.operation(memory);
                self.requests[at] = Some(request);
                self.push(finished.tag, operation);
            }
            Next::Instead(work) => {
                self.free.push(at);
                self.start_thread(request.tag, work, done);
            }
            Next::Done(result) => self.end(at, &request, result, done),
        }
    }

    /// What comes after a step that the kernel has done.
    fn step(&self, step: &mut Step, result: io::Result<usize>, memory: Option<Held>) -> Next {
        let then_sync = match step {
            Step::Sync => return Next::Done(self.medium.synced(result.map(drop))),
            Step::Allocate {
                then_sync, instead, ..
            } => match result {
                Err(error) if medium::is_unsupported(&error) => {
                    let work = mem::replace(instead, Work::Flush);
                    return Next::Instead(work);
                }
                Err(error) => return Next::Done(Err(error.into())),
                Ok(_) => *then_sync,
            },
            Step::Read { offset, .. } | Step::Write { offset, .. } => {
                let count = match result {
                    Ok(count) => count,
                    Err(error) => return Next::Done(Err(error.into())),
                };
                let mut memory = memory.expect("the ring gives it back");
                let goes_on = self.medium.goes_on(count, memory.len());
                let is_done = count == memory.len();
                *offset += count as u64;
                if let Step::Read {
                    bounced: Some(to), ..
                } = step
                {
                    memory.pieces().take(count).copy_to(to.pieces());
                    to.advance(count);
                }
                match step {
                    _ if goes_on && !is_done => {
                        memory.advance(count);
                        return Next::Again(Some(memory));
                    }
                    Step::Write { then_sync, .. } if is_done => *then_sync,
                    Step::Write { .. } => return Next::Done(Err(medium::nothing_written())),
                    _ if is_done => false,
                    _ => return Next::Done(Err(medium::too_short())),
                }
            }
        };
        if then_sync {
            *step = Step::Sync;
            return Next::Again(None);
        }
        Next::Done(Ok(()))
    }

    fn end(
        &mut self,
        at: usize,
        request: &Request,
        result: Result<(), Failure>,
        done: &mut Vec<Completion>,
    ) {
        self.free.push(at);
        self.touching -= usize::from(request.touches);
        let tag = request.tag;
        done.push(Completion { tag, result });
    }

    /// Gives up what can be given up.
    pub(super) fn cancel(&mut self, done: &mut Vec<Completion>) {
        for request in self.requests.iter_mut().flatten() {
            request.canceled = true;
        }
        for (index, _) in mem::take(&mut self.unsent) {
            let at = usize::try_from(index).expect("as it was pushed");
            let request = self.requests[at].take().expect("not yet begun");
            self.end(at, &request, Err(Failure::Canceled), done);
        }
        if let Some(threads) = &self.threads {
            threads.pool.cancel();
        }
        self.ring.cancel_all();
    }
}

/// Whether what is to be submitted may be taken a moment later.
fn is_short_of_something(error: &io::Error) -> bool {
    [Errno::AGAIN, Errno::BUSY, Errno::NOMEM]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Whether the kernel gave an operation up for no reason of the file's: the thread that began it has ended, for one.
fn is_passing(error: &io::Error) -> bool {
    [Errno::CANCELED, Errno::INTR, Errno::AGAIN]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}
