// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Answers to what other threads ask of the host.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use vmsg_mem::Doorbell;

use super::core::{Core, Waiter};
use super::entry::Holder;
use super::handle::{Handle, HandleError, Report, Request};
use crate::device::Operation;
use crate::worker::Command;

/// Requests of one turn; others must have theirs.
const BUDGET: usize = 16;

/// Who waits for the end of an operation.
#[derive(Debug)]
struct Asker {
    device: String,
    answer: Sender<Result<(), HandleError>>,
}

/// The host's end of all [`Handle`]s.
#[derive(Debug)]
pub(super) struct Operators {
    handle: Handle,
    inbox: Receiver<Request>,
    /// By the ticket of the operation.
    asked: HashMap<u64, Asker>,
}

impl Operators {
    pub(super) fn new(bell: Arc<Doorbell>) -> Self {
        let (handle, inbox) = Handle::new(bell);
        Self {
            handle,
            inbox,
            asked: HashMap::new(),
        }
    }

    pub(super) fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// The requests that have come, some of them; and whether there may be more.
    pub(super) fn take_requests(&mut self) -> (Vec<Request>, bool) {
        let requests: Vec<Request> = self.inbox.try_iter().take(BUDGET).collect();
        let more = requests.len() == BUDGET;
        (requests, more)
    }

    /// Has `begin` done to the device called `device` on one of the buses `cores`. It gives a ticket, by which
    /// [`answer`](Self::answer) finds who wants to know what comes of it.
    pub(super) fn begin(
        &mut self,
        cores: &mut [&mut Core],
        bus: Option<usize>,
        device: String,
        answer: Sender<Result<(), HandleError>>,
        begin: impl FnOnce(&mut Core, &str) -> Option<u64>,
    ) {
        let mut found = cores.iter_mut().enumerate().filter(|(index, core)| {
            bus.is_none_or(|bus| bus == *index) && core.present(&device).is_some()
        });
        let result = match (found.next(), found.next()) {
            (Some((_, core)), None) => {
                begin(core, &device).ok_or_else(|| HandleError::NoDevice(device.clone()))
            }
            (Some(_), Some(_)) => Err(HandleError::Ambiguous(device.clone())),
            (None, _) => Err(HandleError::NoDevice(device.clone())),
        };
        match result {
            Ok(ticket) => {
                self.asked.insert(ticket, Asker { device, answer });
            }
            Err(error) => {
                let _ = answer.send(Err(error));
            }
        }
    }

    /// Passes on what came of the operations of one bus.
    pub(super) fn answer(&mut self, core: &mut Core) {
        while let Some((ticket, result)) = core.poll_operated() {
            if let Some(Asker { device, answer }) = self.asked.remove(&ticket) {
                let result = result.map_err(|why| HandleError::Refused { device, why });
                let _ = answer.send(result);
            }
        }
    }
}

impl Core {
    /// All there is to say about the devices of this bus, whose index is `bus`.
    pub(super) fn reports(&self, bus: usize) -> impl Iterator<Item = Report> {
        self.entries.values().map(move |entry| Report {
            bus,
            number: entry.num,
            name: entry.name.clone(),
            device_id: entry.machine.info().device_id,
            status: entry.machine.status(),
            features: entry.machine.features(),
            holder: match entry.holder {
                Holder::Driver(conn) => self.connections.get(&conn).map(|conn| conn.peer.clone()),
                Holder::Nobody | Holder::Leaving => None,
            },
            worker: entry.worker,
            snapshot: entry.monitor.as_ref().map(|monitor| monitor.snapshot()),
        })
    }

    /// Has `operation` done to a device; `None` if there is none of this name.
    /// What came of it is told by [`poll_operated`](Self::poll_operated) with
    /// the ticket that is returned.
    pub fn operate(&mut self, name: &str, operation: Operation) -> Option<u64> {
        let num = self.present(name)?;
        let ticket = self.ticket();
        self.waiters.insert(ticket, Waiter::Operator);
        self.order(num, ticket, Command::Operate(operation));
        Some(ticket)
    }

    /// What came of an operation, with its ticket.
    pub fn poll_operated(&mut self) -> Option<(u64, Result<(), String>)> {
        self.operated.pop_front()
    }
}
