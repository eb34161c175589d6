// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Replies on their way from the workers to control.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::command::{Notice, Reply, Slot};

/// What workers have said and control has not heard. It holds one reply for
/// each command, and of repeated notices the last, so that no driver can make
/// it grow by keeping its device busy.
#[derive(Debug, Default)]
pub struct Outbox(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    replies: Vec<(usize, Reply)>,
    /// Worker, slot and queue of the [`Notice::Used`] in `replies`.
    used: HashSet<(usize, Slot, usize)>,
    /// Where in `replies` the [`Notice::Config`] about these bytes is: worker, slot, offset, length.
    config: HashMap<(usize, Slot, usize, usize), usize>,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Nothing is left half done by a panic here.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds what `worker` says.
    pub fn extend(&self, worker: usize, replies: impl Iterator<Item = Reply>) {
        let mut waiting = self.lock();
        for reply in replies {
            waiting.push(worker, reply);
        }
    }

    /// Everything with the workers it comes from, in order. `into` is empty
    /// and gets its place.
    pub fn take(&self, into: &mut Vec<(usize, Reply)>) {
        let mut waiting = self.lock();
        std::mem::swap(&mut waiting.replies, into);
        waiting.used.clear();
        waiting.config.clear();
    }
}

impl Waiting {
    fn push(&mut self, worker: usize, reply: Reply) {
        match &reply {
            // A queue that stops and starts again in between cannot be mixed up: control has to
            // hear of the first before it orders the second.
            Reply::Notice(slot, Notice::Used { queue })
                if !self.used.insert((worker, *slot, *queue)) =>
            {
                return;
            }
            Reply::Notice(slot, Notice::Config { offset, data }) => {
                let key = (worker, *slot, *offset, data.len());
                let at = *self.config.entry(key).or_insert(self.replies.len());
                if let Some(before) = self.replies.get_mut(at) {
                    before.1 = reply;
                    return;
                }
            }
            _ => {}
        }
        self.replies.push((worker, reply));
    }
}

#[cfg(test)]
#[path = "outbox_test.rs"]
mod tests;
