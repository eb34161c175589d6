// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The disk.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;

use imago::io_buffers::IoBuffer;
use rustix::event::{EventfdFlags, eventfd};
use vmsg_mem::{Held, Pieces, WindowTable};

use super::config::{Qcow2Config, Qcow2OpenError};
use super::open;
use super::work::{Do, Work, Workers};
use crate::in_use::InUse;
use crate::lock::Purpose;
use crate::{Completion, Disk, Facts, Failure, Request, Submitted};

/// Requests at the same time.
const MOST_JOBS: usize = 128;
/// Data of one step, in bytes: longer requests are done one step after the other.
const STEP: usize = 1 << 20;
/// What buffers begin at a multiple of.
const ALIGN: usize = 4096;

/// A disk in a qcow2 image.
///
/// The library `imago` does the work in threads of this disk, on buffers of their own: the memory of requests is touched in calls of
/// the user alone. Several reads and writes are done at the same time; discards and zeroes are done alone. A flush writes what the
/// library has in its caches, and then waits for the medium.
///
/// While the image is written it carries QEMU's mark that refcounts may be wrong (the dirty bit; version 3 of the format). After
/// an orderly end it is taken away. An image that carries it is looked through and put in order before it is written again, by
/// this disk or by QEMU.
///
/// Nobody else can resize an image that is in use: QEMU's tools are kept away by locks.
///
/// If the library panics all further requests fail and the image is left as it is.
pub struct Qcow2Disk {
    /// Goes first: who waits for the image from then on waits for the rest to end.
    _in_use: Vec<InUse>,
    path: PathBuf,
    facts: Facts,
    workers: Workers,
    jobs: Vec<Option<Job>>,
    count: usize,
    /// Work that is not yet given to the threads.
    begun: Vec<Work>,
    done: Vec<Completion>,
    write_back: bool,
    version: u32,
}

#[derive(Debug)]
enum Data {
    /// To be filled.
    Read(Held),
    /// To be written.
    Write(Held),
    None,
}

#[derive(Debug)]
struct Job {
    /// `None`: it was canceled.
    tag: Option<u32>,
    offset: u64,
    data: Data,
    /// Bytes that are done.
    at: usize,
}

impl Qcow2Disk {
    /// Opens an image. If it was not closed by who last wrote it, its refcounts are put in order, which reads all its tables.
    ///
    /// # Errors
    ///
    /// [`Qcow2OpenError`].
    pub fn open(config: &Qcow2Config) -> Result<Self, Qcow2OpenError> {
        let mut opened = open::open(config)?;
        let in_use = std::mem::take(&mut opened.in_use);
        let header = &opened.header;
        let cluster = u32::try_from(header.cluster_size()).unwrap_or(1 << 21);
        let version = header.version;
        let block_size = u32::try_from(opened.image.req_align())
            .unwrap_or(512)
            .max(512);
        let write = !config.read_only;
        let facts = Facts {
            size: header.size & !(u64::from(block_size) - 1),
            block_size,
            physical_block_size: cluster.clamp(block_size, 4096.max(block_size)),
            alignment_offset: 0,
            optimal_io_size: cluster,
            read_only: config.read_only,
            // Without zero clusters, what is behind would be seen.
            discard: write && (version > 2 || header.backing.is_none()),
            discard_granularity: cluster,
            write_zeroes: write && version > 2,
        };
        let wake =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(io::Error::from)?;
        Ok(Self {
            _in_use: in_use,
            path: config.path.clone(),
            facts,
            workers: Workers::new(opened, config.path.clone(), wake)?,
            jobs: Vec::new(),
            count: 0,
            begun: Vec::new(),
            done: Vec::new(),
            write_back: true,
            version,
        })
    }

    fn add(&mut self, tag: u32, offset: u64, data: Data) -> usize {
        let job = Job {
            tag: Some(tag),
            offset,
            data,
            at: 0,
        };
        self.count += 1;
        if let Some(free) = self.jobs.iter().position(Option::is_none) {
            self.jobs[free] = Some(job);
            return free;
        }
        self.jobs.push(Some(job));
        self.jobs.len() - 1
    }

    /// The next step of a request with data; `None` if all are done.
    fn step(job: &Job, sync: bool) -> Option<io::Result<Do>> {
        let (held, write) = match &job.data {
            Data::Read(held) => (held, false),
            Data::Write(held) => (held, true),
            Data::None => return None,
        };
        let rest = held.pieces().skip(job.at);
        if rest.is_empty() {
            return None;
        }
        let offset = job.offset + job.at as u64;
        let len = rest.len().min(STEP);
        let data = IoBuffer::new(len, ALIGN);
        Some(data.map(|mut data| {
            if write {
                rest.read(data.as_mut().into_slice());
                let sync = sync && len == rest.len();
                Do::Write { offset, data, sync }
            } else {
                Do::Read { offset, data }
            }
        }))
    }

    fn tell(&mut self, index: usize, result: Result<(), Failure>) {
        if let Some(job) = self.jobs[index].take() {
            self.count -= 1;
            if let Some(tag) = job.tag {
                self.done.push(Completion { tag, result });
            }
        }
    }

    /// A step is done.
    fn advance(&mut self, index: usize, result: Result<Option<IoBuffer>, Failure>) {
        let Some(Some(job)) = self.jobs.get_mut(index) else {
            return;
        };
        let data = match result {
            Ok(data) => data,
            Err(failure) => return self.tell(index, Err(failure)),
        };
        if job.tag.is_none() {
            return self.tell(index, Ok(()));
        }
        match (&job.data, data) {
            (Data::Read(held), Some(data)) => {
                held.pieces().skip(job.at).write(data.as_ref().into_slice());
                job.at += data.len();
            }
            (Data::Write(held), _) => job.at += STEP.min(held.len() - job.at),
            (Data::Read(_) | Data::None, _) => {}
        }
        match Self::step(job, !self.write_back) {
            None => self.tell(index, Ok(())),
            Some(Ok(what)) => self.begun.push(Work { job: index, what }),
            Some(Err(error)) => self.tell(index, Err(error.into())),
        }
    }

    fn collect(&mut self) {
        let _ = rustix::io::read(self.workers.wake(), &mut [0; 8]);
        for finished in self.workers.finished() {
            self.advance(finished.job, finished.result);
        }
        self.commit();
    }
}

impl Disk for Qcow2Disk {
    fn facts(&self) -> Facts {
        self.facts
    }

    fn submit(&mut self, tag: u32, request: Request<'_>, memory: &Arc<WindowTable>) -> Submitted {
        let hold = |pieces: Pieces<'_>| {
            Held::new(pieces, memory).map_err(|error| Failure::Io(io::Error::other(error)))
        };
        let changes = !matches!(request, Request::Read { .. } | Request::Flush);
        if changes && self.facts.read_only {
            return Submitted::Done(Err(Failure::ReadOnly));
        }
        let (offset, len) = match request {
            Request::Read { offset, to } => (offset, to.len() as u64),
            Request::Write { offset, from } => (offset, from.len() as u64),
            Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. } => {
                (offset, len)
            }
            Request::Flush if self.facts.read_only => return Submitted::Done(Ok(())),
            Request::Flush => (0, 0),
        };
        let inside = offset
            .checked_add(len)
            .is_some_and(|end| end <= self.facts.size);
        if !inside || (offset | len) & (u64::from(self.facts.block_size) - 1) != 0 {
            return Submitted::Done(Err(io::Error::from(io::ErrorKind::InvalidInput).into()));
        }
        if len == 0 && !matches!(request, Request::Flush) {
            return Submitted::Done(Ok(()));
        }
        if self.count >= MOST_JOBS {
            return Submitted::Full;
        }
        let sync = !self.write_back;
        let (data, what) = match request {
            Request::Read { to, .. } => match hold(to) {
                Ok(held) => (Data::Read(held), None),
                Err(failure) => return Submitted::Done(Err(failure)),
            },
            Request::Write { from, .. } => match hold(from) {
                Ok(held) => (Data::Write(held), None),
                Err(failure) => return Submitted::Done(Err(failure)),
            },
            Request::Flush => (Data::None, Some(Do::Flush)),
            Request::Discard { .. } if !self.facts.discard => {
                return Submitted::Done(Err(Failure::Unsupported));
            }
            Request::Discard { offset, len } => (Data::None, Some(Do::Discard { offset, len })),
            Request::WriteZeroes { offset, len, unmap } => {
                let what = Do::Zeroes {
                    offset,
                    len,
                    unmap,
                    sync,
                };
                (Data::None, Some(what))
            }
        };
        let index = self.add(tag, offset, data);
        let job = self.jobs[index].as_ref().expect("just put there");
        match what.map_or_else(|| Self::step(job, sync), |what| Some(Ok(what))) {
            Some(Ok(what)) => {
                self.begun.push(Work { job: index, what });
                Submitted::Pending
            }
            Some(Err(error)) => {
                self.jobs[index] = None;
                self.count -= 1;
                Submitted::Done(Err(error.into()))
            }
            None => {
                self.jobs[index] = None;
                self.count -= 1;
                Submitted::Done(Ok(()))
            }
        }
    }

    fn commit(&mut self) {
        if !self.begun.is_empty() {
            self.workers.add(self.begun.drain(..));
        }
    }

    fn completed(&mut self, done: &mut Vec<Completion>) {
        self.collect();
        done.append(&mut self.done);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.workers.wake().as_fd())
    }

    /// What the threads are at goes on in buffers of its own; nothing that is submitted later is begun before it is done.
    fn cancel(&mut self) {
        let forgotten: Vec<_> = self.begun.drain(..).map(|work| work.job).collect();
        for index in self.workers.cancel().into_iter().chain(forgotten) {
            self.tell(index, Err(Failure::Canceled));
        }
        for job in self.jobs.iter_mut().flatten() {
            if let Some(tag) = job.tag.take() {
                job.data = Data::None;
                self.done.push(Completion {
                    tag,
                    result: Err(Failure::Canceled),
                });
            }
        }
        if !self.done.is_empty() {
            let _ = rustix::io::write(self.workers.wake(), &1u64.to_ne_bytes());
        }
    }

    fn in_flight(&self) -> usize {
        self.jobs
            .iter()
            .flatten()
            .filter(|job| job.tag.is_some())
            .count()
            + self.done.len()
    }

    /// None: memory is touched in calls of this alone.
    fn touching_memory(&self) -> usize {
        0
    }

    /// What is begun, and the tables.
    fn ends_at_once(&self) -> bool {
        false
    }

    fn set_write_back(&mut self, on: bool) {
        self.write_back = on;
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        let purpose = if self.facts.read_only {
            Purpose::Read
        } else {
            Purpose::Write
        };
        vec![
            ("path", self.path.display().to_string()),
            ("format", "qcow2".to_owned()),
            ("lock", purpose.describe().to_owned()),
            ("engine", "threads".to_owned()),
        ]
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("qcow2_version", u64::from(self.version))]
    }
}

impl std::fmt::Debug for Qcow2Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2Disk")
            .field("path", &self.path)
            .field("facts", &self.facts)
            .finish_non_exhaustive()
    }
}
