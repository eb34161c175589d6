// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What fronts hold of a link.

use crate::session::{Counters, Event, Op, OpError, Outcome};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{self, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use virtio_msg::QueueIndex;
use vmsg_mem::Doorbell;

/// More than any operation may take: its end is the session's business.
const CALL_BOUND: Duration = Duration::from_secs(120);

/// What went through a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// Times the thread woke up.
    pub wakeups: u64,
    /// Messages sent on all connections.
    pub sent: u64,
    /// Messages received on all connections.
    pub received: u64,
    /// Connections made.
    pub connections: u64,
    /// What the session counted.
    pub session: Counters,
}

pub(super) enum Command {
    Op(Op, SyncSender<Result<Outcome, OpError>>),
    Kick(QueueIndex),
    Stats(SyncSender<LinkStats>),
}

/// News that wait for the front.
#[derive(Debug)]
pub(super) struct News {
    pub(super) events: Mutex<VecDeque<Event>>,
    pub(super) bell: Doorbell,
}

/// What a front asks its session through. Can be cloned and used from any thread.
#[derive(Clone, Debug)]
pub struct SessionHandle {
    /// Which of the link's sessions it is.
    pub(super) seat: usize,
    pub(super) commands: Sender<(usize, Command)>,
    pub(super) wake: Arc<Doorbell>,
    pub(super) news: Arc<News>,
    pub(super) deadline: Option<Deadline>,
}

/// Until when the calls of a handle may take, whatever becomes of them.
#[derive(Clone, Debug, Default)]
pub struct Deadline(Arc<Mutex<Option<Instant>>>);

impl Deadline {
    /// Calls that are made from now on end by `at`; `None`: with their own time-outs.
    pub fn set(&self, at: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }

    /// What was set.
    pub fn get(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SessionHandle {
    /// A handle of the same session whose calls, and those of its clones, end by a deadline with [`OpError::TimedOut`]. The session does what
    /// it was asked for nevertheless, in order.
    pub fn bounded(&self) -> (SessionHandle, Deadline) {
        let deadline = Deadline::default();
        let handle = SessionHandle {
            deadline: Some(deadline.clone()),
            ..self.clone()
        };
        (handle, deadline)
    }

    /// Does an operation and waits for its end, which the session's time-outs bound.
    ///
    /// # Errors
    /// [`OpError`] of the operation; [`OpError::Ended`] if the link was stopped.
    pub fn call(&self, op: Op) -> Result<Outcome, OpError> {
        let left = self.deadline.as_ref().and_then(Deadline::get);
        let left = left.map_or(CALL_BOUND, |at| {
            at.saturating_duration_since(Instant::now())
        });
        if left.is_zero() {
            return Err(OpError::TimedOut);
        }
        let (reply, result) = mpsc::sync_channel(1);
        self.send(Command::Op(op, reply))?;
        match result.recv_timeout(left) {
            Ok(result) => result,
            Err(mpsc::RecvTimeoutError::Timeout) => Err(OpError::TimedOut),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(OpError::Ended),
        }
    }

    /// Tells the device that there are buffers, by message.
    ///
    /// # Errors
    /// [`OpError::Ended`].
    pub fn kick(&self, queue: QueueIndex) -> Result<(), OpError> {
        self.send(Command::Kick(queue))
    }

    /// What went through the link so far.
    ///
    /// # Errors
    /// [`OpError::Ended`].
    pub fn stats(&self) -> Result<LinkStats, OpError> {
        let (reply, stats) = mpsc::sync_channel(1);
        self.send(Command::Stats(reply))?;
        stats.recv_timeout(CALL_BOUND).map_err(|_| OpError::Ended)
    }

    /// The next news: never [`Event::Done`].
    pub fn poll_event(&self) -> Option<Event> {
        self.news
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }

    /// All news there are: no more than the queues and the kinds of [`Event`], however many come meanwhile.
    pub fn take_events(&self) -> VecDeque<Event> {
        let mut events = self
            .news
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *events)
    }

    /// Readable when there may be news; [`Self::clear`] makes it unreadable again.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.news.bell.as_fd()
    }

    /// Call this before taking the news.
    pub fn clear(&self) {
        // Ours alone: nothing else than "nothing there" can go wrong.
        let _ = self.news.bell.drain();
    }

    fn send(&self, command: Command) -> Result<(), OpError> {
        self.commands
            .send((self.seat, command))
            .map_err(|_| OpError::Ended)?;
        // Full means that it has been rung.
        let _ = self.wake.ring();
        Ok(())
    }
}
