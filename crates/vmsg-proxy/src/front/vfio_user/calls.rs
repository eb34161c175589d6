// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is waited on for a client: what a device rings for queues whose interrupts are not an eventfd of the client, and what the client rings
//! when its guest has handled an interrupt of the line.

use crate::edges::Edges;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use virtio_msg::QueueIndex;

/// Stands for the client's eventfd among the queues, which are fewer.
const UNMASK: QueueIndex = QueueIndex(u32::MAX);

/// What was rung.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rung {
    /// The device has used buffers.
    Queue(QueueIndex),
    /// The interrupt line is to be looked at again.
    Unmask,
}

/// Eventfds of this front's, made when they are first needed and kept until the client goes; and one of the client's.
#[derive(Debug)]
pub(super) struct Calls {
    edges: Edges,
    unmask: Option<OwnedFd>,
    own: BTreeMap<u32, Arc<OwnedFd>>,
}

impl Calls {
    pub(super) fn new() -> io::Result<Calls> {
        Ok(Calls {
            edges: Edges::new()?,
            unmask: None,
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

    /// The eventfd by which the client unmasks the interrupt line.
    pub(super) fn set_unmask(&mut self, fd: Option<OwnedFd>) -> io::Result<()> {
        if let Some(old) = self.unmask.take() {
            self.edges.remove(&old);
        }
        if let Some(fd) = fd {
            self.edges.add(UNMASK, &fd)?;
            self.unmask = Some(fd);
        }
        Ok(())
    }

    /// Calls `rung` for each that was rung since the last time.
    pub(super) fn take(&self, mut rung: impl FnMut(Rung)) -> io::Result<()> {
        self.edges.take(|queue| match queue {
            UNMASK => rung(Rung::Unmask),
            queue => rung(Rung::Queue(queue)),
        })
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        if let Some(unmask) = &self.unmask {
            self.edges.remove(unmask);
        }
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
