// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a device's state machine wants done, as commands for its worker.

use std::sync::Arc;

use virtio_msg::VqueueConfig;
use virtio_msg::device::{Action, ActionResult};
use vmsg_mem::BusAddr;
use vmsg_queue::QueueConfig;

use super::core::{Core, Waiter};
use crate::worker::{Command, QueueStart};

impl Core {
    /// Carries out, or has carried out, what the machine of device `num` wants.
    pub(super) fn act(&mut self, num: u16, action: Action) {
        let Some(entry) = self.entries.get_mut(&num) else {
            return;
        };
        let machine = Waiter::Machine(num);
        match action {
            Action::Reset => {
                entry.resumes.clear();
                entry.records.clear();
                self.order_for(num, machine, Command::Reset);
            }
            Action::Failed => entry.complete(ActionResult::Done),
            Action::FeaturesOk(features) => {
                self.find_memory_again(num);
                self.order_for(num, machine, Command::CheckFeatures(features));
            }
            Action::DriverOk => {
                let features = entry.machine.features();
                self.order_for(num, machine, Command::DriverOk(features));
            }
            Action::SetQueue(_, queue) => {
                let resume = entry.resumes.remove(&queue.index.0);
                let resume = resume.or_else(|| self.resume_unasked(num));
                if !self.has_memory(num) {
                    if let Some(entry) = self.entries.get_mut(&num) {
                        entry.complete(ActionResult::Refused);
                    }
                    return;
                }
                let Some(entry) = self.entries.get_mut(&num) else {
                    return;
                };
                let record = entry.records.remove(&queue.index.0);
                let features = entry.machine.features();
                match queue_config(&queue) {
                    Some(config) => {
                        let queue = queue.index.to_usize();
                        let start = QueueStart {
                            queue,
                            config,
                            features,
                            resume,
                            record,
                        };
                        self.order_for(num, Waiter::Queue(num), Command::StartQueue(start));
                    }
                    None => entry.complete(ActionResult::Refused),
                }
            }
            Action::ResetQueue(queue) => {
                self.order_for(num, machine, Command::ResetQueue(queue.to_usize()));
            }
            Action::WriteConfig { offset, .. } => {
                let data = entry.machine.pending_config().to_vec();
                let offset = usize::try_from(offset).expect("inside the space");
                self.order_for(num, machine, Command::WriteConfig { offset, data });
            }
            Action::Avail { queue, .. } => {
                let queue = queue.to_usize();
                if let Some(pending) = entry.kicks.get(queue).filter(|pending| pending.set()) {
                    let pending = Arc::clone(pending);
                    self.order(num, 0, Command::Kick { queue, pending });
                }
            }
            _ => {}
        }
    }
}

fn queue_config(queue: &VqueueConfig) -> Option<QueueConfig> {
    Some(QueueConfig {
        size: queue.size.to_u16()?,
        desc: BusAddr(queue.descriptor),
        driver: BusAddr(queue.driver),
        device: BusAddr(queue.device),
    })
}
