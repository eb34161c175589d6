// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kicks and calls on buses that do not pass eventfds on: the link waits on the kicks itself, and rings the calls. Between it and the device they
//! are messages, or doorbells of the bus where it has some for queues.

use crate::edges::Edges;
use crate::session::{self, QueueVectors};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use virtio_msg::QueueIndex;
use vmsg_bus::Vectors;
use vmsg_mem::Doorbell;

/// Set in what stands for a vector among the queues, of which there are not so many.
const VECTOR: u32 = 1 << 31;

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
    /// The doorbells that the connection has for queues.
    vectors: Option<Arc<Vectors>>,
    /// Which of them each queue has.
    of_queues: BTreeMap<u32, QueueVectors>,
    /// Those by which calls come, each with a descriptor of its own.
    heard: BTreeMap<u16, OwnedFd>,
}

/// What was rung.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rung {
    /// The driver has kicked a queue.
    Kick(QueueIndex),
    /// The device has used buffers of a queue whose driver has no eventfd to be rung.
    Used(QueueIndex),
}

impl Bells {
    pub(super) fn new() -> io::Result<Bells> {
        Ok(Bells {
            edges: Edges::new()?,
            kicks: BTreeMap::new(),
            calls: BTreeMap::new(),
            vectors: None,
            of_queues: BTreeMap::new(),
            heard: BTreeMap::new(),
        })
    }

    /// The doorbells of another connection, or of none. Queues have none of them until the next [`Self::sync`].
    pub(super) fn set_vectors(&mut self, vectors: Option<Arc<Vectors>>) {
        for fd in std::mem::take(&mut self.heard).values() {
            self.edges.remove(fd);
        }
        self.of_queues.clear();
        self.vectors = vectors;
    }

    /// Listens to the doorbells by which calls come.
    fn sync_vectors(&mut self, of_queues: BTreeMap<u32, QueueVectors>) {
        self.of_queues = of_queues;
        let calls = || self.of_queues.values().filter_map(|vectors| vectors.call);
        let edges = &self.edges;
        self.heard.retain(|vector, fd| {
            let stays = calls().any(|call| call == *vector);
            if !stays {
                edges.remove(fd);
            }
            stays
        });
        for vector in calls() {
            if self.heard.contains_key(&vector) {
                continue;
            }
            let fd = self
                .vectors
                .as_ref()
                .and_then(|vectors| vectors.own_fd(vector));
            let fd = fd.and_then(|fd| fd.try_clone_to_owned().ok());
            // Without descriptors there are no interrupts either; the next connection is another chance.
            if let Some(fd) = fd
                && edges
                    .add(QueueIndex(VECTOR | u32::from(vector)), &fd)
                    .is_ok()
            {
                self.heard.insert(vector, fd);
            }
        }
    }

    /// Takes over what the session has now. Gives the queues whose kick cannot be waited on.
    pub(super) fn sync<'a>(
        &mut self,
        wanted: impl Iterator<Item = session::Bell<'a>>,
    ) -> Vec<QueueIndex> {
        let wanted: BTreeMap<u32, session::Bell<'a>> =
            wanted.map(|bell| (bell.queue.0, bell)).collect();
        let has_some = |bell: &&session::Bell<'_>| bell.vectors != QueueVectors::default();
        let of_queues = wanted.values().filter(has_some);
        let of_queues = of_queues.map(|bell| (bell.queue.0, bell.vectors)).collect();
        self.sync_vectors(of_queues);
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

    /// Says what was rung since the last time and is not passed on by itself: calls that came by doorbells are, where the driver has an eventfd.
    pub(super) fn take(&self, mut rung: impl FnMut(Rung)) -> io::Result<()> {
        self.edges.take(|QueueIndex(what)| {
            let Some(vector) = what.checked_sub(VECTOR) else {
                return rung(Rung::Kick(QueueIndex(what)));
            };
            for (queue, vectors) in &self.of_queues {
                if vectors.call.map(u32::from) == Some(vector) && !self.ring(QueueIndex(*queue)) {
                    rung(Rung::Used(QueueIndex(*queue)));
                }
            }
        })
    }

    /// Kicks a queue of the device by its doorbell. False: it has none that can be rung, a message has to do.
    pub(super) fn kick(&self, queue: QueueIndex) -> bool {
        let vector = self.of_queues.get(&queue.0).and_then(|v| v.kick);
        let bell = vector.and_then(|vector| self.vectors.as_ref()?.bell(vector));
        bell.is_some_and(|bell| bell.ring().is_ok())
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
