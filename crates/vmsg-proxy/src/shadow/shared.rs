// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the threads of a front and the thread of the shadow queues share.

use super::types::{Broken, Counters, Event, StartError};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use virtio_msg::QueueIndex;
use vmsg_mem::{Doorbell, Mapping};
use vmsg_queue::{QueueConfig, QueueFeatures};

/// A queue to start.
#[derive(Debug)]
pub(super) struct NewQueue {
    pub(super) index: usize,
    /// The guest's.
    pub(super) config: QueueConfig,
    /// Where it begins.
    pub(super) at: u16,
    pub(super) guest: QueueFeatures,
    pub(super) device: QueueFeatures,
    pub(super) kick: Doorbell,
    pub(super) call: Arc<OwnedFd>,
    /// The record of the guest's requests in flight, where somebody keeps one.
    pub(super) record: Option<Mapping>,
}

/// How a guest's driver is told.
#[derive(Debug)]
pub(super) enum Bell {
    Nobody,
    Eventfd(Doorbell),
    Front,
}

/// What a front tells the thread.
#[derive(Debug)]
pub(super) enum Command {
    Start(Box<NewQueue>, SyncSender<Result<(), StartError>>),
    Stop(usize, SyncSender<()>),
    Reset(SyncSender<()>),
    /// Another device host begins at the beginning of all queues. False: it cannot.
    Renew(SyncSender<bool>),
    Run,
    Interrupt(usize, Bell),
    /// The eventfd by which the guest's driver kicks.
    Kick(usize, Option<Arc<OwnedFd>>),
    /// What goes with it goes when the thread has ended.
    End(SyncSender<()>),
}

/// Bits for queues, set by one side and taken by the other.
#[derive(Debug)]
struct Bits(Box<[AtomicU64]>);

impl Bits {
    fn new(queues: usize) -> Bits {
        Bits(
            (0..queues.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
        )
    }

    /// False for a queue that there is not.
    fn set(&self, queue: usize) -> bool {
        let bit = 1 << (queue % 64);
        match self.0.get(queue / 64) {
            Some(word) => {
                word.fetch_or(bit, Ordering::Release);
                true
            }
            None => false,
        }
    }

    fn any(&self) -> bool {
        self.0.iter().any(|word| word.load(Ordering::Relaxed) != 0)
    }

    fn take(&self, mut each: impl FnMut(usize)) {
        for (n, word) in self.0.iter().enumerate() {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Ordering::Acquire);
            while bits != 0 {
                each(n * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }

    fn take_one(&self) -> Option<usize> {
        self.0.iter().enumerate().find_map(|(n, word)| {
            let bits = word.load(Ordering::Relaxed);
            let bit = (bits != 0).then(|| bits.trailing_zeros())?;
            word.fetch_and(!(1 << bit), Ordering::Acquire);
            Some(n * 64 + bit as usize)
        })
    }

    fn clear(&self) {
        self.take(|_| ());
    }
}

/// See the module. No lock in it is held while anybody waits.
#[derive(Debug)]
pub(super) struct Shared {
    /// `None`: the thread has ended.
    commands: Mutex<Option<VecDeque<Command>>>,
    /// There are commands.
    commanded: AtomicBool,
    /// Queues that the guest has kicked.
    kicked: Bits,
    /// The thread sleeps, or is about to.
    sleeping: AtomicBool,
    /// Ends its sleep.
    pub(super) wake: Doorbell,
    /// Queues of which the front is to be told.
    used: Bits,
    broken: Mutex<Option<Broken>>,
    /// The front has news to take.
    pub(super) news: Doorbell,
    counters: Mutex<Counters>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A thread that waits for a VMM obeys late. Whoever has a queue's eventfds changed again and again meanwhile leaves one command for each, not all
/// of them, each with its descriptor.
fn enqueue(commands: &mut VecDeque<Command>, command: Command) {
    let same = |other: &Command| match (other, &command) {
        (Command::Interrupt(of, _), Command::Interrupt(queue, _))
        | (Command::Kick(of, _), Command::Kick(queue, _)) => of == queue,
        _ => false,
    };
    match commands.iter().position(same) {
        Some(at) => commands[at] = command,
        None => commands.push_back(command),
    }
}

impl Shared {
    pub(super) fn new(queues: usize) -> io::Result<Shared> {
        Ok(Shared {
            commands: Mutex::new(Some(VecDeque::new())),
            commanded: AtomicBool::new(false),
            kicked: Bits::new(queues),
            sleeping: AtomicBool::new(false),
            wake: Doorbell::new()?,
            used: Bits::new(queues),
            broken: Mutex::default(),
            news: Doorbell::new()?,
            counters: Mutex::default(),
        })
    }

    /// Drops the command, and what it would be answered with, when there is nobody any more to obey it.
    pub(super) fn command(&self, command: Command) {
        match &mut *lock(&self.commands) {
            Some(commands) => enqueue(commands, command),
            None => return,
        }
        self.commanded.store(true, Ordering::Release);
        self.rouse();
    }

    pub(super) fn is_commanded(&self) -> bool {
        self.commanded.load(Ordering::Relaxed)
    }

    pub(super) fn take_command(&self) -> Option<Command> {
        let mut commands = lock(&self.commands);
        let commands = commands.as_mut()?;
        let command = commands.pop_front();
        if commands.is_empty() {
            self.commanded.store(false, Ordering::Relaxed);
        }
        command
    }

    /// The thread ends: no command is obeyed any more.
    pub(super) fn end(&self) {
        let left = lock(&self.commands).take();
        self.commanded.store(false, Ordering::Relaxed);
        drop(left);
    }

    pub(super) fn kick(&self, queue: usize) {
        if self.kicked.set(queue) {
            self.rouse();
        }
    }

    pub(super) fn take_kicks(&self, each: impl FnMut(usize)) {
        self.kicked.take(each);
    }

    /// Wakes the thread if it sleeps.
    fn rouse(&self) {
        // SYNC POINT: what was set is out before the flag is read. The thread sets the flag, then looks; one sees the other.
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) && self.sleeping.swap(false, Ordering::Relaxed) {
            // Ours alone: it can only be full, which means that it was rung.
            let _ = self.wake.ring();
        }
    }

    /// The thread is about to sleep. False if it may not: there is something for it. [`Self::awake`] follows either way.
    pub(super) fn may_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::Relaxed);
        // SYNC POINT: see `rouse`.
        fence(Ordering::SeqCst);
        !self.kicked.any() && !self.is_commanded()
    }

    pub(super) fn awake(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }

    pub(super) fn queue_used(&self, queue: usize) {
        if self.used.set(queue) {
            let _ = self.news.ring();
        }
    }

    pub(super) fn set_broken(&self, broken: Broken) {
        *lock(&self.broken) = Some(broken);
        let _ = self.news.ring();
    }

    /// Forgets all news and kicks.
    pub(super) fn forget(&self) {
        *lock(&self.broken) = None;
        self.used.clear();
        self.kicked.clear();
    }

    pub(super) fn poll_event(&self) -> Option<Event> {
        if let Some(broken) = lock(&self.broken).take() {
            return Some(Event::NeedsReset(broken));
        }
        let queue = u32::try_from(self.used.take_one()?).ok()?;
        Some(Event::QueueUsed(QueueIndex(queue)))
    }

    pub(super) fn count(&self, counters: Counters) {
        *lock(&self.counters) = counters;
    }

    pub(super) fn counters(&self) -> Counters {
        *lock(&self.counters)
    }
}
