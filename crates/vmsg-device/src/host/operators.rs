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

    /// Takes requests and answers those that can be answered at once; true if
    /// there may be more.
    pub(super) fn take_requests(&mut self, cores: &mut [&mut Core]) -> bool {
        for _ in 0..BUDGET {
            let Ok(request) = self.inbox.try_recv() else {
                return false;
            };
            match request {
                Request::List(answer) => {
                    let buses = cores.iter().enumerate();
                    let all = buses.flat_map(|(index, core)| core.reports(index));
                    // Who has given up waiting wants no answer.
                    let _ = answer.send(all.collect());
                }
                Request::Operate {
                    bus,
                    device,
                    operation,
                    answer,
                } => {
                    let mut found = cores.iter_mut().enumerate().filter(|(index, core)| {
                        bus.is_none_or(|bus| bus == *index) && core.has_device(&device)
                    });
                    let result = match (found.next(), found.next()) {
                        (Some((_, core)), None) => core
                            .operate(&device, operation)
                            .ok_or_else(|| HandleError::NoDevice(device.clone())),
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
            }
        }
        true
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

    /// Whether a device has this name.
    pub(super) fn has_device(&self, name: &str) -> bool {
        self.entries.values().any(|entry| entry.name == name)
    }

    /// Has `operation` done to a device; `None` if there is none of this name.
    /// What came of it is told by [`poll_operated`](Self::poll_operated) with
    /// the ticket that is returned.
    pub fn operate(&mut self, name: &str, operation: Operation) -> Option<u64> {
        let mut entries = self.entries.iter();
        let (num, _) = entries.find(|(_, entry)| entry.name == name)?;
        let num = *num;
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
