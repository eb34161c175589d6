// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which response belongs to which request.

use std::collections::{HashMap, VecDeque};

use virtio_msg::Kind;
use vmsg_bus::trace::{Captured, Way};

use super::decode::Decoded;

/// Requests that are remembered. In a trace with more that were never answered the oldest are forgotten.
const MAX_REQUESTS: usize = 1 << 16;

/// What request and response have in common. Tokens belong to a connection and a direction.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    interface: usize,
    to_device: bool,
    bus: bool,
    dev: u16,
    token: Option<u16>,
    id: u8,
}

/// The requests that have no response yet, with their times.
#[derive(Default)]
pub(super) struct Pairs {
    requests: HashMap<Key, (u64, u64)>,
    /// Oldest first; also such as were answered, which have another number than in `requests` or are not there.
    order: VecDeque<(Key, u64)>,
    next: u64,
}

impl Pairs {
    /// Takes note of a message. Of a response: the nanoseconds since its request.
    pub(super) fn see(&mut self, captured: &Captured<'_>, message: &Decoded) -> Option<u64> {
        let key = |way| Key {
            interface: captured.interface,
            to_device: way == Way::ToDevice,
            bus: message.bus,
            dev: message.dev,
            token: message.token,
            id: message.id,
        };
        match message.kind {
            Kind::Event => None,
            Kind::Request => {
                let key = key(captured.way);
                self.requests.insert(key, (captured.time, self.next));
                self.order.push_back((key, self.next));
                self.next += 1;
                if self.order.len() > MAX_REQUESTS
                    && let Some((oldest, number)) = self.order.pop_front()
                    && self.requests.get(&oldest).is_some_and(|r| r.1 == number)
                {
                    self.requests.remove(&oldest);
                }
                None
            }
            Kind::Response => {
                let asked = match captured.way {
                    Way::ToDevice => Way::ToDriver,
                    Way::ToDriver => Way::ToDevice,
                };
                let (time, _) = self.requests.remove(&key(asked))?;
                Some(captured.time.saturating_sub(time))
            }
        }
    }
}
