// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One driver at the other end of a bus.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use virtio_msg::wire::{HEADER_SIZE, Header, transport};

use super::windows::Windows;
use vmsg_bus::{StaticRam, Vectors};
use vmsg_mem::{Mapping, WindowTable};

/// Names a connection as long as the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// Who is at the other end, as far as the bus knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// What the program calls itself.
    pub name: String,
    /// Its process, if it is on this machine.
    pub pid: Option<u32>,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.name.is_empty() {
            "an unnamed driver"
        } else {
            &self.name
        };
        match self.pid {
            Some(pid) => write!(f, "{name} (pid {pid})"),
            None => f.write_str(name),
        }
    }
}

/// Messages that may wait to be sent before no more are read: a driver that
/// does not listen is not answered for ever.
const MAX_WAITING: usize = 256;

/// Requests of one connection that may wait for devices and workers; some of
/// them hold two file descriptors.
const MAX_DEFERRED: usize = 64;

/// What the host keeps of a connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) peer: Peer,
    pub(super) max_message: usize,
    pub(super) windows: Windows,
    /// The bus lends no memory by message, and does not say where queues go on.
    pub(super) bare: bool,
    /// Where the driver's memory is on such a bus, if that is known.
    pub(super) ram: Option<StaticRam>,
    /// The bus passes no descriptors, and windows are views of memory in common.
    pub(super) common: bool,
    /// That memory, if there is any.
    pub(super) common_memory: Option<Arc<Mapping>>,
    /// On such a bus each device has windows of its own, by its number: a driver may be several guests.
    pub(super) windows_of: BTreeMap<u16, Windows>,
    /// The doorbells that queues can have on such a bus.
    pub(super) vectors: Option<Arc<Vectors>>,
    /// Requests that wait for a device to finish something.
    pub(super) deferred: usize,
    out: VecDeque<(Vec<u8>, Option<Arc<OwnedFd>>)>,
    /// The EVENT_USED messages in `out`, by device and queue: one of each says it all.
    used: HashSet<[u8; HEADER_SIZE + 4]>,
    complained: bool,
    kept_back: bool,
}

impl Connection {
    pub(super) fn new(peer: Peer, max_message: usize) -> Self {
        Self {
            peer,
            max_message,
            windows: Windows::new(),
            bare: false,
            ram: None,
            common: false,
            common_memory: None,
            windows_of: BTreeMap::new(),
            vectors: None,
            deferred: 0,
            out: VecDeque::new(),
            used: HashSet::new(),
            complained: false,
            kept_back: false,
        }
    }

    /// What device `num` sees of the driver's memory.
    pub(super) fn table_for(&self, num: u16) -> Arc<WindowTable> {
        let windows = if self.common {
            self.windows_of.get(&num)
        } else {
            Some(&self.windows)
        };
        windows.map_or_else(Arc::default, |windows| Arc::clone(windows.table()))
    }

    pub(super) fn send(&mut self, message: Vec<u8>) {
        if let Some(event) = used_event(&message)
            && !self.used.insert(event)
        {
            return;
        }
        self.out.push_back((message, None));
    }

    /// As [`Self::send`], with a descriptor.
    pub(super) fn send_with_fd(&mut self, message: Vec<u8>, fd: Arc<OwnedFd>) {
        self.out.push_back((message, Some(fd)));
    }

    /// The next message to go out, left in place.
    pub(super) fn peek(&self) -> Option<&[u8]> {
        self.out.front().map(|(message, _)| message.as_slice())
    }

    /// The descriptor that goes with it.
    pub(super) fn peek_fd(&self) -> Option<BorrowedFd<'_>> {
        self.out.front()?.1.as_ref().map(|fd| fd.as_fd())
    }

    /// Forgets the message that [`peek`](Self::peek) gave: it is sent.
    pub(super) fn sent(&mut self) {
        let sent = self.out.pop_front();
        if let Some(event) = sent.and_then(|(message, _)| used_event(&message)) {
            self.used.remove(&event);
        }
    }

    /// False while the driver has to take answers, or devices have to finish, first.
    pub(super) fn wants_input(&self) -> bool {
        self.has_room() && self.deferred < MAX_DEFERRED
    }

    /// False while events are better kept where they can be merged.
    pub(super) fn has_room(&self) -> bool {
        self.out.len() < MAX_WAITING
    }

    /// True when there is room again for what was kept back: once, after [`Self::keep_back`].
    pub(super) fn wants_kept_back(&mut self) -> bool {
        self.out.len() <= MAX_WAITING / 2 && std::mem::take(&mut self.kept_back)
    }

    /// Notes that devices may have events for this driver that it has no room for.
    pub(super) fn keep_back(&mut self) {
        self.kept_back = true;
    }

    /// True the first time: misbehaviour is logged once per connection.
    pub(super) fn complain(&mut self) -> bool {
        !std::mem::replace(&mut self.complained, true)
    }
}

fn used_event(message: &[u8]) -> Option<[u8; HEADER_SIZE + 4]> {
    let (header, _) = Header::split(message, message.len()).ok()?;
    let is_used = !header.is_bus() && header.msg_id == transport::id::EVENT_USED;
    is_used.then(|| message.first_chunk().copied()).flatten()
}
