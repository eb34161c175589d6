// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The control queues (VIRTIO 1.3, 5.3.6.2).
//!
//! What the driver is still to be told is a set of facts for each port, not a list of messages: a driver that asks
//! for the same again and again, and takes no answer, makes it no longer.

use std::ops::{BitOr, BitOrAssign};

use super::{CONTROL_RECEIVE, Console, MAX_PORTS, Port, SizeOrder, add};
use crate::device::{DeviceError, Io, Progress};

/// Control messages taken, or told, at a time.
const BATCH: usize = 16;

/// Events of control messages.
pub(super) mod event {
    pub(crate) const DEVICE_READY: u16 = 0;
    pub(crate) const DEVICE_ADD: u16 = 1;
    pub(crate) const PORT_READY: u16 = 3;
    pub(crate) const CONSOLE_PORT: u16 = 4;
    pub(crate) const RESIZE: u16 = 5;
    pub(crate) const PORT_OPEN: u16 = 6;
    pub(crate) const PORT_NAME: u16 = 7;
}

/// Which messages about a port are still to be told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pending(u8);

impl Pending {
    /// DEVICE_ADD.
    pub(super) const ADD: Self = Self(1);
    /// CONSOLE_PORT.
    pub(super) const CONSOLE: Self = Self(1 << 1);
    /// PORT_NAME.
    pub(super) const NAME: Self = Self(1 << 2);
    /// PORT_OPEN. Before RESIZE: only what is open has a size.
    pub(super) const OPEN: Self = Self(1 << 3);
    /// RESIZE.
    pub(super) const RESIZE: Self = Self(1 << 4);

    pub(super) fn insert(&mut self, other: Self) {
        *self |= other;
    }

    /// The one that is to be told first.
    fn first(self) -> Option<Self> {
        (self.0 != 0).then(|| Self(1 << self.0.trailing_zeros()))
    }

    fn remove(&mut self, other: Self) {
        self.0 &= !other.0;
    }
}

impl BitOr for Pending {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Pending {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

/// A message about the port with this number, in the order of the wire.
fn message(id: usize, event: u16, value: u16) -> Vec<u8> {
    let id = u32::try_from(id).expect("at most MAX_PORTS");
    let mut message = Vec::with_capacity(16);
    message.extend(id.to_le_bytes());
    message.extend(event.to_le_bytes());
    message.extend(value.to_le_bytes());
    message
}

impl Port {
    /// The message that tells `what` about this port, the one with number `id`; `None` if there is nothing to tell.
    fn message(&self, id: usize, what: Pending, order: SizeOrder) -> Option<Vec<u8>> {
        Some(match what {
            Pending::ADD => message(id, event::DEVICE_ADD, 1),
            Pending::CONSOLE => message(id, event::CONSOLE_PORT, 1),
            Pending::NAME => {
                let mut message = message(id, event::PORT_NAME, 1);
                message.extend(self.name.as_ref()?.bytes());
                message
            }
            // Output is always taken, whether somebody watches or not.
            Pending::OPEN => message(id, event::PORT_OPEN, 1),
            _ => {
                let size = self.hub.size()?;
                let [first, second] = match order {
                    SizeOrder::ColsFirst => [size.cols, size.rows],
                    SizeOrder::RowsFirst => [size.rows, size.cols],
                };
                let mut message = message(id, event::RESIZE, 1);
                message.extend(first.to_le_bytes());
                message.extend(second.to_le_bytes());
                message
            }
        })
    }
}

impl Console {
    /// Takes what the driver has to say.
    pub(super) fn hear(&mut self, queue: usize, io: &mut Io<'_>) -> Result<Progress, DeviceError> {
        let mut heard = [None; BATCH];
        let Some(Some(active)) = io.queues.get_mut(queue) else {
            return Ok(Progress::Idle);
        };
        let ring = active.ring();
        let failed = |source| DeviceError::Queue { queue, source };
        let batch = ring.pop(io.space, io.storage, BATCH).map_err(failed)?;
        let count = batch.len();
        for (chain, place) in batch.iter().zip(&mut heard) {
            *place = chain.readable().read_array::<8>();
            ring.complete(io.space, chain.head(), 0).map_err(failed)?;
        }
        for message in &heard[..count] {
            add(&self.counters.control, 1);
            let done = message.and_then(|message| self.obey(message, io));
            if done.is_none() {
                add(&self.counters.refused, 1);
            }
        }
        // Linux waits for each, with its processor: after what it asks for is on its way.
        io.publish(queue)?;
        Ok(if count == 0 {
            Progress::Idle
        } else {
            Progress::More
        })
    }

    /// Does what a message wants; `None` if it makes no sense.
    fn obey(&mut self, message: [u8; 8], io: &mut Io<'_>) -> Option<()> {
        let [a, b, c, d, e, f, g, h] = message;
        let id = usize::try_from(u32::from_le_bytes([a, b, c, d])).ok();
        let event = u16::from_le_bytes([e, f]);
        let value = u16::from_le_bytes([g, h]);
        if event == event::DEVICE_READY {
            // The number means nothing here.
            if value == 0 {
                return None;
            }
            self.session.ready = true;
            for port in &mut self.ports {
                port.pending = Pending::ADD;
            }
            io.again(CONTROL_RECEIVE);
            return Some(());
        }
        let id = id.filter(|id| *id < self.ports.len() && self.session.ready)?;
        let port = &mut self.ports[id];
        match event {
            // The driver cannot have it.
            event::PORT_READY if value == 0 => return None,
            event::PORT_READY => {
                port.pending |= Pending::OPEN;
                if port.name.is_some() {
                    port.pending |= Pending::NAME;
                } else {
                    port.pending |= Pending::CONSOLE;
                }
                if port.name.is_none() && self.session.size {
                    port.pending |= Pending::RESIZE;
                }
                io.again(CONTROL_RECEIVE);
            }
            event::PORT_OPEN => self.set_open(id, value != 0, io),
            _ => return None,
        }
        Some(())
    }

    /// Tells the driver what it is still to be told, as far as it has buffers.
    pub(super) fn tell(&mut self, queue: usize, io: &mut Io<'_>) -> Result<Progress, DeviceError> {
        let order = self.settings.size_order;
        let Some(Some(active)) = io.queues.get_mut(queue) else {
            return Ok(Progress::Blocked);
        };
        let ring = active.ring();
        let failed = |source| DeviceError::Queue { queue, source };
        // Each message once at most, however many are asked for meanwhile.
        for _ in 0..BATCH.max(MAX_PORTS) {
            let next = self.ports.iter().enumerate();
            let next = next.filter_map(|(id, port)| Some((id, port.pending.first()?)));
            let Some((id, what)) = next.min_by_key(|(id, what)| (what.0, *id)) else {
                break;
            };
            let port = &mut self.ports[id];
            let Some(message) = port.message(id, what, order) else {
                port.pending.remove(what);
                continue;
            };
            let batch = ring.pop(io.space, io.storage, 1).map_err(failed)?;
            let Some(chain) = batch.get(0) else {
                // Without buffers the driver must say when there are some.
                io.publish(queue)?;
                return Ok(Progress::Idle);
            };
            port.pending.remove(what);
            let mut written = 0;
            if chain.writable().len() >= message.len() {
                written = chain.writable().write(&message);
            } else {
                add(&self.counters.too_small, 1);
            }
            let written = u32::try_from(written).expect("a short message");
            ring.complete(io.space, chain.head(), written)
                .map_err(failed)?;
        }
        let more = self.ports.iter().any(|port| port.pending.first().is_some());
        io.publish(queue)?;
        Ok(if more {
            Progress::More
        } else {
            Progress::Blocked
        })
    }
}
