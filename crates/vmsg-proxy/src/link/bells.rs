// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kicks and calls on buses that do not pass eventfds on: the link waits on the kicks itself, and rings the calls.

use crate::edges::Edges;
use crate::session;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use virtio_msg::QueueIndex;
use vmsg_mem::Doorbell;

/// An eventfd of the front end.
#[derive(Debug)]
struct Bell {
    /// As the session has it, to see when it is another.
    source: Arc<OwnedFd>,
    /// `None`: it is no eventfd, and its owner goes without.
    bell: Option<Doorbell>,
}

impl Bell {
    fn new(source: &Arc<OwnedFd>) -> Bell {
        let bell = source.try_clone().and_then(Doorbell::from_fd);
        Bell {
            source: source.clone(),
            bell: bell.ok(),
        }
    }

    fn is(&self, source: Option<&Arc<OwnedFd>>) -> bool {
        source.is_some_and(|source| Arc::ptr_eq(&self.source, source))
    }
}

/// The eventfds of a session's queues.
#[derive(Debug)]
pub(super) struct Bells {
    edges: Edges,
    kicks: BTreeMap<u32, Bell>,
    calls: BTreeMap<u32, Bell>,
}

impl Bells {
    pub(super) fn new() -> io::Result<Bells> {
        Ok(Bells {
            edges: Edges::new()?,
            kicks: BTreeMap::new(),
            calls: BTreeMap::new(),
        })
    }

    /// Takes over what the session has now. Gives the queues whose kick cannot be waited on.
    pub(super) fn sync<'a>(
        &mut self,
        wanted: impl Iterator<Item = session::Bell<'a>>,
    ) -> Vec<QueueIndex> {
        let wanted: BTreeMap<u32, session::Bell<'a>> =
            wanted.map(|bell| (bell.queue.0, bell)).collect();
        let edges = &self.edges;
        self.kicks.retain(|queue, kick| {
            let stays = wanted.get(queue).is_some_and(|bell| kick.is(bell.kick));
            if !stays && let Some(bell) = &kick.bell {
                edges.remove(bell);
            }
            stays
        });
        self.calls
            .retain(|queue, call| wanted.get(queue).is_some_and(|bell| call.is(bell.call)));
        let mut deaf = Vec::new();
        for (queue, wanted) in wanted {
            if let Some(kick) = wanted.kick
                && !self.kicks.contains_key(&queue)
            {
                let kick = Bell::new(kick);
                let queue = QueueIndex(queue);
                let watched = kick
                    .bell
                    .as_ref()
                    .is_some_and(|bell| self.edges.add(queue, bell).is_ok());
                if !watched {
                    deaf.push(queue);
                }
                self.kicks.insert(queue.0, kick);
            }
            if let Some(call) = wanted.call
                && !self.calls.contains_key(&queue)
            {
                let call = Bell::new(call);
                // The one before may have been rung after its owner had looked for the last time.
                if let Some(bell) = &call.bell {
                    let _ = bell.ring();
                }
                self.calls.insert(queue, call);
            }
        }
        deaf
    }

    /// Calls `kicked` for each queue that was kicked since the last time.
    pub(super) fn take(&self, kicked: impl FnMut(QueueIndex)) -> io::Result<()> {
        self.edges.take(kicked)
    }

    /// Tells the driver that a queue has used buffers. False: there is no call to ring.
    pub(super) fn ring(&self, queue: QueueIndex) -> bool {
        let Some(call) = self.calls.get(&queue.0) else {
            return false;
        };
        if let Some(bell) = &call.bell {
            // Whoever makes its eventfd unusable goes without interrupts; full means that it has been rung.
            let _ = bell.ring();
        }
        true
    }

    /// Tells the driver to look at all its queues.
    pub(super) fn ring_all(&self) {
        for queue in self.calls.keys() {
            self.ring(QueueIndex(*queue));
        }
    }
}

impl AsFd for Bells {
    /// Readable when there are kicks to take.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.edges.as_fd()
    }
}

#[cfg(test)]
#[path = "bells_test.rs"]
mod tests;
