// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The process of a device host, without threads: its control side and its worker.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use virtio_msg::DevNum;
use vmsg_device::device::Device;
use vmsg_device::host::{ConnId, Core as Host};
use vmsg_device::worker::{Core as Worker, Fds, Reply, Slot};

use crate::line::Bus;

pub(crate) const SLOT: Slot = Slot(0);

/// Which queue belongs to which kick descriptor.
#[derive(Debug, Default)]
pub(crate) struct Watched(pub(crate) Vec<(RawFd, usize)>);

impl Fds for Watched {
    fn add_kick(&mut self, _slot: Slot, queue: usize, fd: BorrowedFd<'_>) {
        self.0.push((fd.as_raw_fd(), queue));
    }
    fn add_device(&mut self, _slot: Slot, _fd: BorrowedFd<'_>) {}
    fn remove(&mut self, fd: BorrowedFd<'_>) {
        self.0.retain(|(watched, _)| *watched != fd.as_raw_fd());
    }
}

/// A device host's process.
pub(crate) struct HostProcess {
    pub(crate) host: Host,
    pub(crate) worker: Worker,
    pub(crate) watched: Watched,
    pub(crate) replies: VecDeque<Reply>,
    pub(crate) conn: Option<ConnId>,
    /// The device was removed, and another one is to come.
    pub(crate) unplugged: bool,
}

impl HostProcess {
    pub(crate) fn start(bus: Bus, device: Box<dyn Device>) -> Self {
        let mut host = Host::new(bus.max_message(), 0);
        host.add_device("device", Some(number(bus).0), 0, SLOT, device)
            .expect("an empty bus");
        Self {
            host,
            worker: Worker::new(),
            watched: Watched::default(),
            replies: VecDeque::new(),
            conn: None,
            unplugged: false,
        }
    }
}

/// The older messages know device 0 only.
pub(crate) fn number(bus: Bus) -> DevNum {
    DevNum(if bus == Bus::BareR1 { 0 } else { 3 })
}
