// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the other side says without being asked.

use virtio_msg::{DevNum, DeviceState, DeviceStatus, Frame, Generation, Message, QueueIndex};

/// An event of the device side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A device has used buffers of a queue.
    Used {
        /// Which device.
        device: DevNum,
        /// Which queue.
        queue: QueueIndex,
    },
    /// The configuration space or the status of a device has changed. The bytes are to be read again.
    Config {
        /// Which device.
        device: DevNum,
        /// The status it has now.
        status: DeviceStatus,
        /// The generation the configuration space has now.
        generation: Generation,
        /// First byte that changed.
        offset: u32,
        /// Number of bytes that changed; 0: not told.
        len: u32,
    },
    /// A device came or went.
    Device {
        /// Which device.
        device: DevNum,
        /// What happened to it.
        state: DeviceState,
    },
    /// More events came than were taken, and some were lost here: look at everything again.
    Lost,
}

impl Event {
    /// The event that a frame carries, if it is one of the device side.
    pub fn from_frame(frame: &Frame<'_>) -> Option<Event> {
        Some(match frame.message {
            Message::EventUsed { queue } => Event::Used {
                device: frame.dev_num,
                queue,
            },
            Message::EventConfig(change) => Event::Config {
                device: frame.dev_num,
                status: change.status,
                generation: change.generation,
                offset: change.offset,
                len: change.len,
            },
            Message::EventDevice { device, state } => Event::Device { device, state },
            _ => return None,
        })
    }
}

/// How many events wait at most until they are taken.
pub const MAX_EVENTS: usize = 64;

/// Events in the order in which they came; no more than [`MAX_EVENTS`].
#[derive(Debug)]
pub(crate) struct EventQueue {
    events: [Event; MAX_EVENTS],
    first: usize,
    len: usize,
    lost: u64,
}

impl EventQueue {
    pub(crate) const fn new() -> Self {
        Self {
            events: [Event::Lost; MAX_EVENTS],
            first: 0,
            len: 0,
            lost: 0,
        }
    }

    /// Takes an event in. A used event whose twin still waits says nothing new and is left out, so that a busy queue cannot
    /// push the others out.
    pub(crate) fn push(&mut self, event: Event) {
        if matches!(event, Event::Used { .. }) && self.iter().any(|waiting| waiting == event) {
            return;
        }
        if self.len == MAX_EVENTS {
            // The last place always tells of what is missing from there on.
            self.lost = self.lost.saturating_add(1);
            return;
        }
        let lost = self.len == MAX_EVENTS - 1;
        if lost {
            self.lost = self.lost.saturating_add(1);
        }
        let at = (self.first + self.len) % MAX_EVENTS;
        self.events[at] = if lost { Event::Lost } else { event };
        self.len += 1;
    }

    pub(crate) fn pop(&mut self) -> Option<Event> {
        if self.len == 0 {
            return None;
        }
        let event = self.events[self.first];
        self.first = (self.first + 1) % MAX_EVENTS;
        self.len -= 1;
        Some(event)
    }

    /// Takes out the first event for which `wanted` holds and leaves the order of the others.
    pub(crate) fn take(&mut self, mut wanted: impl FnMut(&Event) -> bool) -> Option<Event> {
        let place = self.iter().position(|event| wanted(&event))?;
        let event = self.events[(self.first + place) % MAX_EVENTS];
        for i in place..self.len - 1 {
            self.events[(self.first + i) % MAX_EVENTS] =
                self.events[(self.first + i + 1) % MAX_EVENTS];
        }
        self.len -= 1;
        Some(event)
    }

    pub(crate) const fn lost(&self) -> u64 {
        self.lost
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Event> + '_ {
        (0..self.len).map(|i| self.events[(self.first + i) % MAX_EVENTS])
    }
}

#[cfg(test)]
#[path = "event_test.rs"]
mod tests;
