// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A worker's thread: epoll around [`Core`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use vmsg_mem::Doorbell;

use super::command::{Command, Slot};
use super::core::{Core, Fds};
use super::outbox::Outbox;
use super::seat::Seats;

/// Queue turns between two looks at the file descriptors.
const STEPS: usize = 32;
/// Or, if the turns are long ones, this much time.
const SLICE: Duration = Duration::from_millis(1);
const EVENTS: usize = 64;

/// How long queues that have become empty are looked at before the worker sleeps: about what waking it takes.
const LINGER: Duration = Duration::from_micros(25);
/// Only if the last pause was no longer than this: who pauses for long once does so again.
const SHORT: Duration = Duration::from_micros(60);
/// Lingering that was in vain is not tried again for so many short pauses at most: on one processor it always is.
const MOST_SKIPPED: u32 = 256;
/// Looks at queues between two at the file descriptors, which take a system call.
const LOOKS: usize = 32;

/// Failure to start a worker.
#[derive(Debug, thiserror::Error)]
#[error("cannot start a worker: {what}: {source}")]
pub struct StartError {
    what: &'static str,
    source: std::io::Error,
}

/// A running worker. Dropping it ends the thread and its devices.
#[derive(Debug)]
pub struct Worker {
    orders: Option<Sender<(Slot, u64, Command)>>,
    wake: Arc<Doorbell>,
    seats: Arc<Seats>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a worker called `name`. It puts what it has to say, with its
    /// `index`, into `replies` and rings `bell` then.
    ///
    /// # Errors
    ///
    /// [`StartError`] if the system has no thread or descriptor left.
    pub fn start(
        name: &str,
        index: usize,
        replies: Arc<Outbox>,
        bell: Arc<Doorbell>,
    ) -> Result<Self, StartError> {
        let failed = |what| move |source: std::io::Error| StartError { what, source };
        let wake = Arc::new(
            Doorbell::new().map_err(|error| failed("eventfd")(std::io::Error::other(error)))?,
        );
        let poll = Poll::new().map_err(|error| failed("epoll")(error.into()))?;
        poll.add(wake.as_fd(), ORDERS, EventFlags::IN)
            .map_err(|error| failed("epoll")(error.into()))?;
        let (orders, inbox) = mpsc::channel();
        let bell_of_thread = Arc::clone(&wake);
        let core = Core::new();
        let seats = core.seats();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let mut thread = Thread {
                    core,
                    poll,
                    inbox,
                    wake: bell_of_thread,
                    replies,
                    bell,
                    index,
                    pause: Pause::default(),
                };
                thread.run();
            })
            .map_err(failed("thread"))?;
        Ok(Self {
            orders: Some(orders),
            wake,
            seats,
            thread: Some(thread),
        })
    }

    /// Gives the worker a command; its answer carries `ticket`. True if it was carried out here and now, and no answer comes: a change of the
    /// memory of a device that sleeps.
    #[must_use]
    pub fn send(&self, slot: Slot, ticket: u64, command: Command) -> bool {
        let seat = self.seats.at(slot);
        let command = match command {
            Command::SetMemory(table) => match seat.try_set(table) {
                Ok(()) => return true,
                Err(table) => Command::SetMemory(table),
            },
            command => command,
        };
        seat.command_sent();
        if let Some(orders) = &self.orders {
            // A worker only ends when its handle is dropped; devices that panic are caught.
            let _ = orders.send((slot, ticket, command));
            let _ = self.wake.ring();
        }
        false
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.orders = None;
        let _ = self.wake.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

const ORDERS: u64 = u64::MAX;
/// Set in the event data of a device's own descriptor; kicks carry slot and queue.
const DEVICE: u64 = 1 << 63;

struct Poll {
    epoll: OwnedFd,
}

impl Poll {
    fn new() -> rustix::io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        })
    }

    fn add(&self, fd: BorrowedFd<'_>, data: u64, flags: EventFlags) -> rustix::io::Result<()> {
        epoll::add(&self.epoll, fd, EventData::new_u64(data), flags)
    }
}

impl Fds for Poll {
    fn add_kick(&mut self, slot: Slot, queue: usize, fd: BorrowedFd<'_>) {
        // Edge-triggered: every write to an eventfd is an event of its own, so the descriptor,
        // which its other holders could make block, is never read.
        let data = u64::from(slot.0) << 16 | queue as u64;
        if let Err(error) = self.add(fd, data, EventFlags::IN | EventFlags::ET) {
            tracing::warn!(slot = slot.0, queue, %error, "cannot watch a kick descriptor");
        }
    }

    fn add_device(&mut self, slot: Slot, fd: BorrowedFd<'_>) {
        if let Err(error) = self.add(fd, DEVICE | u64::from(slot.0), EventFlags::IN) {
            tracing::error!(slot = slot.0, %error, "cannot watch a device's descriptor");
        }
    }

    fn remove(&mut self, fd: BorrowedFd<'_>) {
        // Refused only for a descriptor that could not be added.
        let _ = epoll::delete(&self.epoll, fd);
    }
}

struct Thread {
    core: Core,
    poll: Poll,
    inbox: Receiver<(Slot, u64, Command)>,
    wake: Arc<Doorbell>,
    replies: Arc<Outbox>,
    bell: Arc<Doorbell>,
    index: usize,
    pause: Pause,
}

/// How long the worker has nothing to do, and whether lingering pays the next time.
#[derive(Debug, Default)]
struct Pause {
    /// Since when nothing was to be done.
    since: Option<Instant>,
    /// Short pauses that are let pass without lingering, as it was in vain.
    skip: u32,
    /// How many that were the last time; doubled each time.
    skipped: u32,
}

impl Pause {
    /// There is work again, found without lingering; true if lingering pays the next time.
    fn over(&mut self, now: Instant) -> bool {
        let Some(since) = self.since.take() else {
            return self.skip == 0;
        };
        if now.saturating_duration_since(since) > SHORT {
            return false;
        }
        let skips = self.skip > 0;
        self.skip = self.skip.saturating_sub(1);
        !skips
    }

    /// Lingering has found work.
    fn found(&mut self) {
        *self = Self::default();
    }

    /// Lingering has found nothing. If the next work comes soon all the same, somebody needs this processor to make it.
    fn in_vain(&mut self) {
        self.skipped = (2 * self.skipped).clamp(1, MOST_SKIPPED);
        self.skip = self.skipped;
    }
}

impl Thread {
    fn run(&mut self) {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(EVENTS);
        loop {
            self.settle();
            self.wait(&mut events);
            let now = Instant::now();
            if !events.is_empty() || self.core.has_work() {
                let pays = self.pause.over(now);
                self.core.set_linger(pays);
            }
            for event in events.drain(..) {
                let data = event.data.u64();
                if data == ORDERS {
                    // Ours alone; an empty one just means that nothing was missed.
                    let _ = self.wake.drain();
                } else if data & DEVICE != 0 {
                    self.core.poll_device(slot_of(data & !DEVICE), now);
                } else {
                    self.core
                        .kick(slot_of(data >> 16), (data & 0xffff) as usize);
                }
            }
            if !self.take_orders() {
                return;
            }
            self.core.handle_timeouts(now);
            self.core.carry_on(&mut self.poll);
            for _ in 0..STEPS {
                if !(self.core.step(now) || self.look()) || now.elapsed() > SLICE {
                    break;
                }
            }
            self.core.update_watched(&mut self.poll);
            self.core.update_residents();
            self.answer();
        }
    }

    /// Looks at queues that have just become empty, for a moment. True if one has work.
    fn look(&mut self) -> bool {
        if !self.core.lingers() {
            return false;
        }
        for _ in 0..LOOKS {
            if self.core.look() {
                self.pause.found();
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    /// Looks at them no more if that has taken as long as it may; once if there is other work.
    fn settle(&mut self) {
        if self.core.has_work() {
            self.core.look();
            return;
        }
        let now = Instant::now();
        let since = *self.pause.since.get_or_insert(now);
        if self.core.lingers() && now.saturating_duration_since(since) >= LINGER {
            self.core.settle(now);
            self.pause.in_vain();
        }
    }

    fn wait(&self, events: &mut Vec<epoll::Event>) {
        let timeout = if self.core.has_work() || self.core.lingers() {
            Some(Duration::ZERO)
        } else {
            self.core
                .next_timeout()
                .map(|due| due.saturating_duration_since(Instant::now()))
        };
        let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
        match epoll::wait(
            &self.poll.epoll,
            rustix::buffer::spare_capacity(events),
            timeout.as_ref(),
        ) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => tracing::error!(%error, "epoll_wait"),
        }
    }

    /// Carries out what control has sent; false when control is gone.
    fn take_orders(&mut self) -> bool {
        loop {
            match self.inbox.try_recv() {
                Ok((slot, ticket, command)) => {
                    self.core.command(slot, ticket, command, &mut self.poll);
                    self.core.seats().at(slot).command_done();
                }
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn answer(&mut self) {
        let replies = self.core.take_replies();
        if replies.len() > 0 {
            self.replies.extend(self.index, replies);
            let _ = self.bell.ring();
        }
    }
}

fn slot_of(data: u64) -> Slot {
    Slot(u32::try_from(data & 0xffff_ffff).expect("masked to 32 bits"))
}

#[cfg(test)]
#[path = "thread_test.rs"]
mod tests;
