// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a device rings for queues whose interrupts are not an eventfd of the client.

use crate::edges::Edges;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use virtio_msg::QueueIndex;

/// Eventfds of this front's, made when they are first needed and kept until the client goes.
#[derive(Debug)]
pub(super) struct Calls {
    edges: Edges,
    own: BTreeMap<u32, Arc<OwnedFd>>,
}

impl Calls {
    pub(super) fn new() -> io::Result<Calls> {
        Ok(Calls {
            edges: Edges::new()?,
            own: BTreeMap::new(),
        })
    }

    /// The one of `queue`; `None` if there are no descriptors left: the device says then by message what it has to say.
    pub(super) fn of(&mut self, queue: QueueIndex) -> Option<Arc<OwnedFd>> {
        if let Some(call) = self.own.get(&queue.0) {
            return Some(call.clone());
        }
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let call = Arc::new(eventfd(0, flags).ok()?);
        self.edges.add(queue, &call).ok()?;
        self.own.insert(queue.0, call.clone());
        Some(call)
    }

    /// Calls `rung` for each queue of which the device has used buffers since the last time.
    pub(super) fn take(&self, rung: impl FnMut(QueueIndex)) -> io::Result<()> {
        self.edges.take(rung)
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        for call in self.own.values() {
            self.edges.remove(call);
        }
    }
}

impl AsFd for Calls {
    /// Readable when there is something to take.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.edges.as_fd()
    }
}
