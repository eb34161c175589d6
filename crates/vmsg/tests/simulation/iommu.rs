// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest behind an IOMMU: each buffer is shown to the device before its request, and hidden after it.

use vmsg_proxy::session::{Op, OpError, OpId, Outcome, Window};

use super::World;

/// A window on its way: the buffer that it is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change {
    pub(super) queue: usize,
    pub(super) slot: usize,
    /// Otherwise it is to be hidden.
    pub(super) show: bool,
    /// The guest is at fault, and lets the device use it after that.
    use_after: bool,
}

impl World<'_> {
    pub(super) fn show(&mut self, queue: usize, slot: usize) {
        let add = vec![self.guest.shown(queue, slot)];
        self.change(queue, slot, Vec::new(), add);
    }

    pub(super) fn hide(&mut self, queue: usize, slot: usize) -> OpId {
        let remove = vec![self.guest.shown(queue, slot).base];
        self.change(queue, slot, remove, Vec::new())
    }

    fn change(&mut self, queue: usize, slot: usize, remove: Vec<u64>, add: Vec<Window>) -> OpId {
        let change = Change {
            queue,
            slot,
            show: !add.is_empty(),
            use_after: false,
        };
        let op = Op::ChangeWindows { remove, add };
        let id = self.session.submit(self.now, op);
        self.changes.insert(id, change);
        id
    }

    /// A change of the windows is done.
    pub(super) fn changed(&mut self, change: Change, result: &Result<Outcome, OpError>) {
        let Change {
            queue,
            slot,
            show,
            use_after,
        } = change;
        match (show, result) {
            // What was asked for before the guest had to start over is not used any more.
            (true, Ok(_)) if self.releasing => {}
            (true, Ok(_)) if self.faults.early && self.random.chance(1, 16) => {
                let id = self.hide(queue, slot);
                let change = self.changes.get_mut(&id);
                change.expect("just begun").use_after = true;
            }
            (true, Ok(_)) => {
                if self.guest.submit_shown(queue, slot) {
                    self.kick(queue);
                }
                if self.faults.early && self.random.chance(1, 8) {
                    self.guest.give_up(queue, slot);
                    self.hide(queue, slot);
                }
            }
            (true, Err(OpError::TooMany)) => self.guest.give_back(queue, slot),
            (false, Ok(_)) if use_after => {
                let kick = self.guest.submit_shown(queue, slot);
                self.guest.give_up(queue, slot);
                self.guest.is_hidden(queue, slot);
                if kick {
                    self.kick(queue);
                }
            }
            (false, Ok(_)) => self.guest.is_hidden(queue, slot),
            // Whoever had the connection before may have it for ever: the guest does not use it for anything else.
            (false, Err(OpError::StillInUse)) => self.guest.lose(queue, slot),
            (false, Err(OpError::TooMany)) if use_after => self.guest.give_back(queue, slot),
            (false, Err(OpError::TooMany)) => self.guest.back.push((queue, slot)),
            (_, Err(error)) => panic!("a window that comes and goes: {error}"),
        }
    }
}
