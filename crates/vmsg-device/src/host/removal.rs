// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that come and go while drivers are there.
//!
//! A device that is to go is first reset, whoever holds it. Then it is not on the bus any more: what waited for it is answered as by a
//! device that is not there, drivers hear of it, and its worker lets go of it. Its number is never given to another one: drivers in the
//! field take what they know of a number for true as long as the bus lives.

use virtio_msg::{
    ConfigData, DevNum, DeviceInfo, DeviceState, DeviceStatus, FeatureBlocks, Frame, Generation,
    Instant, Kind, Message, QueueSize, ShmInfo, Token, U32, VqueueInfo, decode,
};

use super::connection::ConnId;
use super::core::{Core, Waiter};
use super::entry::{Holder, encode};
use crate::worker::{Command, Slot};

/// Blocks of features in one answer at most: more than any device has.
const BLOCKS: u32 = 8;

impl Core {
    /// Begins to remove the device called `name`; `None` if there is none. When its worker has let go of it, that is told by
    /// [`poll_operated`](Self::poll_operated) with the ticket that is returned.
    pub fn remove_device(&mut self, now: Instant, name: &str) -> Option<u64> {
        self.now = now;
        let num = self.present(name)?;
        let ticket = self.ticket();
        let entry = self.entries.get_mut(&num)?;
        entry.removal = Some(ticket);
        if entry.holder != Holder::Leaving {
            entry.leave(now);
        }
        self.pump(now, num);
        Some(ticket)
    }

    /// The number of the device with this name, unless it is on its way out.
    pub(super) fn present(&self, name: &str) -> Option<u16> {
        let mut entries = self.entries.iter();
        let found = entries.find(|(_, entry)| entry.name == name && entry.removal.is_none());
        found.map(|(num, _)| *num)
    }

    /// Takes a device off the bus whose reset is over.
    pub(super) fn finish_removal(&mut self, num: u16, operator: u64) {
        let Some(slot) = self.entries.get(&num).map(|entry| entry.slot) else {
            return;
        };
        let waiter = Waiter::Removal { operator, slot };
        self.order_for(num, waiter, Command::Remove);
        let Some(entry) = self.entries.remove(&num) else {
            return;
        };
        self.by_slot.remove(&(entry.worker, entry.slot));
        self.passthroughs -= usize::from(entry.passthrough);
        self.gone.insert(num);
        for (conn, bytes) in entry.waiting {
            if let Some(connection) = self.connections.get_mut(&conn) {
                connection.deferred = connection.deferred.saturating_sub(1);
                if let Ok(frame) = decode(&bytes, usize::from(u16::MAX)) {
                    self.answer_for_absent(conn, &frame);
                }
            }
        }
        for (conn, token) in entry.claims {
            self.handle_claim(num, conn, token);
        }
        if let Some((conn, token)) = entry.release {
            self.released(num, conn, token);
        }
        for connection in self.connections.values_mut() {
            // On a bus where windows belong to devices.
            connection.windows_of.remove(&num);
        }
        tracing::info!(device = %entry.name, number = num, "removed");
        self.tell_all(DevNum(num), DeviceState::Removed);
    }

    /// The worker has let go of the device that was removed.
    pub(super) fn removed(
        &mut self,
        worker: usize,
        slot: Slot,
        operator: u64,
        result: Result<(), String>,
    ) {
        if let Err(why) = result {
            tracing::warn!(%why, "a device that was removed did not end well");
        }
        self.freed.push_back((worker, slot));
        self.operated.push_back((operator, Ok(())));
    }

    /// A place of a worker that can be given to another device: its index, and the place.
    pub fn poll_freed(&mut self) -> Option<(usize, Slot)> {
        self.freed.pop_front()
    }

    /// EVENT_DEVICE to all connections.
    pub(super) fn tell_all(&mut self, device: DevNum, state: DeviceState) {
        let event = Frame::bus(Token(0), Message::EventDevice { device, state });
        let Some(bytes) = encode(&event) else {
            return;
        };
        for connection in self.connections.values_mut() {
            tracing::trace!(peer = %connection.peer, frame = %event, "sending");
            connection.send(bytes.clone());
        }
    }

    /// A request to a number that has no device. The protocol has but one answer there, to GET_DEVICE_INFO. A driver whose device was
    /// removed may have asked before it heard of that, and must not wait: it is told of a device that has nothing and is reset.
    pub(super) fn answer_for_absent(&mut self, conn: ConnId, frame: &Frame<'_>) {
        let known = self.gone.contains(&frame.dev_num.0);
        let asks = frame.message == Message::GetDeviceInfo;
        let words = [U32::ZERO; BLOCKS as usize];
        let nothing = |offset| ConfigData {
            generation: Generation(0),
            offset,
            len: 0,
            data: &[],
        };
        let answer = match frame.message {
            _ if !(asks || known) || frame.message.kind() != Kind::Request => None,
            Message::GetDeviceInfo => Some(Message::DeviceInfo(DeviceInfo::ABSENT)),
            Message::GetDeviceFeatures { first, count } => {
                let count = count.min(BLOCKS);
                let words = &words[..count as usize];
                Some(Message::DeviceFeatures(FeatureBlocks {
                    first,
                    count,
                    words,
                }))
            }
            Message::SetDriverFeatures(_) => Some(Message::DriverFeaturesSet),
            Message::GetConfig { offset, .. } => Some(Message::Config(nothing(offset))),
            Message::SetConfig(config) => Some(Message::ConfigSet(nothing(config.offset))),
            Message::GetDeviceStatus => Some(Message::DeviceStatus(DeviceStatus::RESET)),
            Message::SetDeviceStatus(_) => Some(Message::DeviceStatusSet(DeviceStatus::RESET)),
            Message::GetVqueue(index) => Some(Message::Vqueue(VqueueInfo {
                index,
                max_size: QueueSize(0),
                size: QueueSize(0),
                descriptor: 0,
                driver: 0,
                device: 0,
            })),
            Message::SetVqueue(_) => Some(Message::VqueueSet),
            Message::ResetVqueue(_) => Some(Message::VqueueReset),
            Message::GetShm { index } => Some(Message::Shm(ShmInfo {
                index,
                ..ShmInfo::default()
            })),
            _ => None,
        };
        match answer {
            Some(answer) => self.send(conn, &frame.response(answer)),
            None => self.counters.unexpected += 1,
        }
    }
}

#[cfg(test)]
#[path = "removal_test.rs"]
mod tests;
