// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Threads that call the library, which waits for the medium.

use std::any::Any;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use imago::Mapping;
use imago::io_buffers::IoBuffer;

use super::header;
use super::lost::Lost;
use super::open::{Image, Opened};
use crate::Failure;

/// Requests that the library works on at the same time.
const THREADS: usize = 4;
/// How long the end of all work is waited for when the disk goes away.
const LAST_WORK: Duration = Duration::from_secs(30);
/// Zeroes that are written where the format has none of its own.
const ZEROES: usize = 64 << 10;

/// What is to be done. Offsets and lengths in bytes.
pub(super) enum Do {
    Read {
        offset: u64,
        data: IoBuffer,
    },
    Write {
        offset: u64,
        data: IoBuffer,
        sync: bool,
    },
    Flush,
    Discard {
        offset: u64,
        len: u64,
    },
    Zeroes {
        offset: u64,
        len: u64,
        unmap: bool,
        sync: bool,
    },
}

/// Something to be done, and what it is part of.
pub(super) struct Work {
    pub(super) job: usize,
    pub(super) what: Do,
}

/// What became of it; reads have their data.
pub(super) struct Finished {
    pub(super) job: usize,
    pub(super) result: Result<Option<IoBuffer>, Failure>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Work>,
    running: usize,
    /// Nothing is begun until nothing runs: what was canceled must not come after what follows.
    fence: bool,
    stop: bool,
    threads: usize,
}

struct Shared {
    /// Only dropped when it is known to be right: that writes what the library has in its caches.
    image: RwLock<Option<Image>>,
    path: PathBuf,
    version: u32,
    backing: bool,
    file: File,
    queue: Mutex<Queue>,
    changed: Condvar,
    finished: Mutex<Vec<Finished>>,
    wake: OwnedFd,
    /// The image is marked as being written.
    marked: Mutex<bool>,
    /// Quick look at `marked`.
    is_marked: AtomicBool,
    /// Writes under way whose tables are not yet in the file.
    allocating: AtomicUsize,
    lost: Lost,
    /// The library has panicked: why. Nothing is asked of it any more.
    broken: Mutex<Option<String>>,
}

/// The threads.
pub(super) struct Workers {
    shared: Arc<Shared>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Workers {
    /// Begins; `wake` is written to when something is finished.
    pub(super) fn new(opened: Opened, path: PathBuf, wake: OwnedFd) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            image: RwLock::new(Some(opened.image)),
            path,
            version: opened.header.version,
            backing: opened.header.backing.is_some(),
            file: opened.file,
            queue: Mutex::default(),
            changed: Condvar::new(),
            finished: Mutex::default(),
            wake,
            marked: Mutex::new(false),
            is_marked: AtomicBool::new(false),
            allocating: AtomicUsize::new(0),
            lost: Lost::default(),
            broken: Mutex::new(None),
        });
        let workers = Self {
            shared: Arc::clone(&shared),
        };
        for number in 0..THREADS {
            lock(&shared.queue).threads += 1;
            let thread = Thread(Arc::clone(&shared));
            thread::Builder::new()
                .name(format!("qcow2-{number}"))
                .spawn(move || thread.run())?;
        }
        Ok(workers)
    }

    pub(super) fn wake(&self) -> &OwnedFd {
        &self.shared.wake
    }

    pub(super) fn add(&self, work: impl IntoIterator<Item = Work>) {
        lock(&self.shared.queue).waiting.extend(work);
        self.shared.changed.notify_all();
    }

    pub(super) fn finished(&self) -> Vec<Finished> {
        std::mem::take(&mut *lock(&self.shared.finished))
    }

    /// Forgets what was not begun: the jobs it is part of. What is begun ends before anything that is added later begins.
    pub(super) fn cancel(&self) -> Vec<usize> {
        let mut queue = lock(&self.shared.queue);
        queue.fence = queue.running > 0;
        queue.waiting.drain(..).map(|work| work.job).collect()
    }
}

/// Waits for what is begun, writes what the library has in its caches, and takes the mark away.
impl Drop for Workers {
    fn drop(&mut self) {
        let end = Instant::now() + LAST_WORK;
        let mut queue = lock(&self.shared.queue);
        queue.stop = true;
        self.shared.changed.notify_all();
        while queue.threads > 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let path = self.shared.path.display();
                tracing::error!(
                    "{path}: requests do not come to their end; the image is left as it is"
                );
                return;
            }
            let waited = self.shared.changed.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(queue);
        self.shared.close();
    }
}

/// One thread; its end is counted however it comes.
struct Thread(Arc<Shared>);

impl Drop for Thread {
    fn drop(&mut self) {
        lock(&self.0.queue).threads -= 1;
        self.0.changed.notify_all();
    }
}

impl Thread {
    fn run(&self) {
        while let Some(work) = self.0.next() {
            let job = work.job;
            let result = self.0.work(work.what);
            self.0.end(Finished { job, result });
        }
    }
}

impl Shared {
    fn next(&self) -> Option<Work> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.stop {
                return None;
            }
            if !queue.fence
                && let Some(work) = queue.waiting.pop_front()
            {
                queue.running += 1;
                return Some(work);
            }
            queue = self
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn end(&self, finished: Finished) {
        lock(&self.finished).push(finished);
        let mut queue = lock(&self.queue);
        queue.running -= 1;
        if queue.running == 0 && queue.fence {
            queue.fence = false;
            self.changed.notify_all();
        }
        drop(queue);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn broken(&self) -> Option<Failure> {
        let broken = lock(&self.broken).clone()?;
        Some(Failure::Io(io::Error::other(broken)))
    }

    fn work(&self, what: Do) -> Result<Option<IoBuffer>, Failure> {
        if let Some(broken) = self.broken() {
            return Err(broken);
        }
        match catch_unwind(AssertUnwindSafe(|| self.call(what))) {
            Ok(result) => result.map_err(Failure::Io),
            Err(panic) => {
                let reason = format!("the qcow2 library has panicked: {}", words(&*panic));
                tracing::error!(
                    "{}: {reason}; all further requests fail",
                    self.path.display()
                );
                lock(&self.broken).get_or_insert(reason);
                Err(self.broken().unwrap_or(Failure::Canceled))
            }
        }
    }

    fn call(&self, what: Do) -> io::Result<Option<IoBuffer>> {
        match what {
            Do::Read { offset, mut data } => {
                self.read_image(|image| image.read(&mut data, offset))?;
                Ok(Some(data))
            }
            Do::Write { offset, data, sync } => {
                self.mark()?;
                self.read_image(|image| self.write(image, offset, &data, sync))?;
                Ok(None)
            }
            Do::Flush => {
                self.read_image(|image| self.flush(image))?;
                Ok(None)
            }
            Do::Discard { offset, len } => {
                self.mark()?;
                self.write_image(|image| match self.version {
                    2 if self.backing => Ok(()),
                    2 => image.discard_to_backing(offset, len),
                    _ => image.discard_to_any(offset, len),
                })?;
                self.read_image(Image::flush)?;
                Ok(None)
            }
            Do::Zeroes {
                offset,
                len,
                unmap,
                sync,
            } => {
                self.mark()?;
                // Alone, as the library looks at parts of clusters beside the range and then zeroes whole ones.
                self.write_image(|image| {
                    match (self.version, unmap) {
                        (2, _) => write_zeroes(image, offset, len)?,
                        (_, true) => image.discard_to_zero(offset, len)?,
                        (_, false) => image.write_zeroes(offset, len)?,
                    }
                    if sync {
                        self.flush(image)
                    } else {
                        image.flush()
                    }
                })?;
                Ok(None)
            }
        }
    }

    /// What was told as written is in the file from then on, with the tables that lead to it: the library has these in its own
    /// memory, and its user may go on with another process after this one was killed.
    fn write(&self, image: &Image, offset: u64, data: &IoBuffer, sync: bool) -> io::Result<()> {
        // What is allocated already may be so in the library's memory only, by a request that is not done yet. Looked at in this
        // order: that request is counted before others can see what it has allocated.
        let tables = !is_allocated(image, offset, data.len() as u64)?
            || self.allocating.load(Ordering::SeqCst) > 0;
        if tables {
            self.allocating.fetch_add(1, Ordering::SeqCst);
        }
        let written = image
            .write(data, offset)
            .and_then(|()| match (sync, tables) {
                (true, _) => self.flush(image),
                (false, true) => image.flush(),
                (false, false) => Ok(()),
            });
        // After an error nobody knows what is where: from then on all writes have tables written.
        if tables && written.is_ok() {
            self.allocating.fetch_sub(1, Ordering::SeqCst);
        }
        written
    }

    /// All that was written is on the medium: first what the library has in its caches goes to the file.
    fn flush(&self, image: &Image) -> io::Result<()> {
        image.flush()?;
        self.lost.note(image.sync())
    }

    fn read_image<T>(&self, call: impl FnOnce(&Image) -> io::Result<T>) -> io::Result<T> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        call(image.as_ref().ok_or(io::ErrorKind::NotConnected)?)
    }

    fn write_image<T>(&self, call: impl FnOnce(&mut Image) -> io::Result<T>) -> io::Result<T> {
        let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        call(image.as_mut().ok_or(io::ErrorKind::NotConnected)?)
    }

    /// Before the first change: whoever finds the mark knows that refcounts may be wrong.
    fn mark(&self) -> io::Result<()> {
        if self.version == 2 || self.is_marked.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut marked = lock(&self.marked);
        if !*marked {
            header::set_dirty(&self.file, true)?;
            *marked = true;
            self.is_marked.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Nobody calls the library any more.
    fn close(&self) {
        if self.broken().is_some() {
            return;
        }
        let closed = catch_unwind(AssertUnwindSafe(|| {
            self.write_image(|image| self.flush(image))
        }));
        match closed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(
                    "{}: cannot write the last changes: {error}",
                    self.path.display()
                );
                return;
            }
            Err(_) => return,
        }
        if *lock(&self.marked)
            && let Err(error) = header::set_dirty(&self.file, false)
        {
            tracing::error!("{}: cannot close it: {error}", self.path.display());
        }
        let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        drop(image.take());
    }
}

/// An image that was not closed is left as it is in the file, and locked until this process ends.
impl Drop for Shared {
    fn drop(&mut self) {
        let image = self.image.get_mut().unwrap_or_else(PoisonError::into_inner);
        std::mem::forget(image.take());
    }
}

/// Whether all of a range has clusters of its own, which are written in place.
fn is_allocated(image: &Image, mut offset: u64, mut len: u64) -> io::Result<bool> {
    while len > 0 {
        match image.get_mapping(offset, len)? {
            (Mapping::Raw { writable: true, .. }, there) if there > 0 => {
                let there = there.min(len);
                (offset, len) = (offset + there, len - there);
            }
            _ => return Ok(false),
        }
    }
    Ok(true)
}

fn write_zeroes(image: &Image, mut offset: u64, mut len: u64) -> io::Result<()> {
    let zeroes = [0; ZEROES];
    while len > 0 {
        let now = usize::try_from(len).unwrap_or(ZEROES).min(ZEROES);
        image.write(&zeroes[..now], offset)?;
        offset += now as u64;
        len -= now as u64;
    }
    Ok(())
}

fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a word")
}
