// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A few threads that wait for the medium.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::EventfdFlags;

use super::medium::Medium;
use super::work::Work;
use crate::{Completion, Failure};

/// What a thread needs: system calls, and the list of pieces for one.
const STACK: usize = 128 << 10;
/// How long dropping waits for the threads.
const PATIENCE: Duration = Duration::from_secs(1);

/// Threads that do [`Work`]; they are started when there is something to do.
///
/// When this is dropped they end as soon as they can, which is waited for: a second at most. What they are at keeps its memory and
/// the file until then.
#[derive(Debug)]
pub(super) struct Pool {
    /// There until dropped.
    shared: Option<Arc<Shared>>,
    most: usize,
    /// Each thread has one until it has let go of everything.
    alive: Option<Sender<Infallible>>,
    over: Receiver<Infallible>,
}

#[derive(Debug)]
struct Shared {
    medium: Arc<Medium>,
    state: Mutex<State>,
    work: Condvar,
    /// Readable when something was done.
    event: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<(u32, Work)>,
    done: Vec<Completion>,
    threads: usize,
    /// Threads without work.
    idle: usize,
    ended: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that is done under the lock leaves it half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.state();
        loop {
            let Some((tag, work)) = state.waiting.pop_front() else {
                if state.ended {
                    return;
                }
                state.idle += 1;
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                continue;
            };
            drop(state);
            let result = work.run(&self.medium);
            // The memory goes before anybody hears of it.
            drop(work);
            state = self.state();
            state.done.push(Completion { tag, result });
            if state.done.len() == 1 {
                self.ring();
            }
        }
    }

    fn ring(&self) {
        // Full is readable too.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

impl Pool {
    /// Up to `most` threads.
    pub(super) fn new(medium: Arc<Medium>, most: usize) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = rustix::event::eventfd(0, flags)?;
        let shared = Arc::new(Shared {
            medium,
            state: Mutex::default(),
            work: Condvar::new(),
            event,
        });
        let (alive, over) = mpsc::channel();
        Ok(Self {
            shared: Some(shared),
            most,
            alive: Some(alive),
            over,
        })
    }

    fn shared(&self) -> &Arc<Shared> {
        self.shared.as_ref().expect("there until dropped")
    }

    /// Has `work` done.
    pub(super) fn push(&self, tag: u32, work: Work) {
        let mut state = self.shared().state();
        state.waiting.push_back((tag, work));
        if state.idle >= state.waiting.len() || state.threads >= self.most {
            self.shared().work.notify_one();
            return;
        }
        let shared = Arc::clone(self.shared());
        let alive = self.alive.clone();
        let started = thread::Builder::new()
            .name("vmsg-disk".into())
            .stack_size(STACK)
            .spawn(move || {
                shared.run();
                drop(shared);
                drop(alive);
            });
        match started {
            Ok(_) => state.threads += 1,
            Err(error) if state.threads == 0 => {
                // Nobody else would do it.
                while let Some((tag, _)) = state.waiting.pop_front() {
                    let result = Err(Failure::Io(io::Error::new(error.kind(), "no thread")));
                    state.done.push(Completion { tag, result });
                }
                self.shared().ring();
            }
            Err(_) => {}
        }
    }

    /// Gives up what has not been begun.
    pub(super) fn cancel(&self) {
        let mut state = self.shared().state();
        if state.waiting.is_empty() {
            // The event is there as long as something is to be told, and only then: nobody would take it back.
            return;
        }
        while let Some((tag, _)) = state.waiting.pop_front() {
            let result = Err(Failure::Canceled);
            state.done.push(Completion { tag, result });
        }
        self.shared().ring();
    }

    /// Moves what is done to the end of `done`.
    pub(super) fn completed(&self, done: &mut Vec<Completion>) {
        let mut state = self.shared().state();
        if state.done.is_empty() {
            return;
        }
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.shared().event, &mut count);
        done.append(&mut state.done);
    }

    /// Readable when there may be something for [`Self::completed`].
    pub(super) fn event_fd(&self) -> BorrowedFd<'_> {
        self.shared().event.as_fd()
    }

    /// The same, for whoever keeps it.
    pub(super) fn event(&self) -> io::Result<OwnedFd> {
        self.shared().event.try_clone()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let Some(shared) = self.shared.take() else {
            return;
        };
        let mut state = shared.state();
        state.ended = true;
        let given_up = std::mem::take(&mut state.waiting);
        drop(state);
        drop(given_up);
        shared.work.notify_all();
        drop(shared);
        self.alive = None;
        // Ends with an error: when the last of them is over, or none of them can be waited for any longer.
        let _ = self.over.recv_timeout(PATIENCE);
    }
}
