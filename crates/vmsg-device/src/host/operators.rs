// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Answers to what other threads ask of the host.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use vmsg_mem::Doorbell;

use super::core::Core;
use super::handle::{Handle, HandleError, Request};

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
