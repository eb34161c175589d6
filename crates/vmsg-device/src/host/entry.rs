// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One device of the host: its state machine, who holds it, what waits for it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use virtio_msg::device::{Action, ActionResult, DeviceMachine, QueueSlot};
use virtio_msg::{
    ConfigData, DevNum, DeviceStatus, Frame, Generation, Instant, Kind, Message, Token, decode,
};

use super::connection::ConnId;
use super::log_limit::LogLimit;
use crate::device::{Monitor, SharedRegion};
use crate::worker::{Pending, Record, Resume, Slot};

pub(super) type Machine = DeviceMachine<Box<[QueueSlot]>, Box<[u8]>>;

/// What became of a message for a device.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Handled {
    /// The machine has it.
    Taken,
    /// The device is busy; the message waits.
    Deferred,
    /// The sender may not do that; this is the answer.
    Refused(Vec<u8>),
    /// Nothing: an event or response that has no business here.
    Dropped,
}

/// Who holds a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    Nobody,
    Driver(ConnId),
    /// The driver is gone; the device is being reset.
    Leaving,
}

/// A device as control sees it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) num: DevNum,
    pub(super) worker: usize,
    pub(super) slot: Slot,
    pub(super) machine: Machine,
    pub(super) holder: Holder,
    /// Who gets the answer that the machine gives next; `None`: nobody.
    asker: Option<ConnId>,
    pub(super) waiting: VecDeque<(ConnId, Vec<u8>)>,
    /// Positions for the next SET_VQUEUE of a queue.
    pub(super) resumes: HashMap<u32, Resume>,
    /// Queues that are not used in order.
    pub(super) unordered: Vec<u32>,
    /// Records of what is in flight in them, for the next SET_VQUEUE.
    pub(super) records: HashMap<u32, Record>,
    /// CLAIM requests that wait until the device was reset, with their answers' tokens.
    pub(super) claims: VecDeque<(ConnId, Token)>,
    /// Who has released the device and hears when it was reset.
    pub(super) release: Option<(ConnId, Token)>,
    /// The operator's ticket, if the device is to go when it was reset.
    pub(super) removal: Option<u64>,
    /// Whose memory the worker sees.
    pub(super) memory_of: Option<ConnId>,
    /// For each queue, whether a kick is on its way to the worker.
    pub(super) kicks: Box<[Arc<Pending>]>,
    /// Its shared-memory regions.
    pub(super) regions: Vec<SharedRegion>,
    /// How the device does.
    pub(super) monitor: Option<Arc<dyn Monitor>>,
    /// Another process works on its queues.
    pub(super) passthrough: bool,
    pub(super) log: LogLimit,
    /// An action that the machine has asked for is under way.
    acting: bool,
    leave_when_idle: bool,
}

impl Entry {
    pub(super) fn new(
        name: String,
        num: DevNum,
        worker: usize,
        slot: Slot,
        machine: Machine,
        unordered: Vec<u32>,
    ) -> Self {
        let kicks = (0..machine.queue_count()).map(|_| Arc::default()).collect();
        Self {
            name,
            num,
            worker,
            slot,
            machine,
            holder: Holder::Nobody,
            asker: None,
            waiting: VecDeque::new(),
            resumes: HashMap::new(),
            unordered,
            records: HashMap::new(),
            claims: VecDeque::new(),
            release: None,
            removal: None,
            memory_of: None,
            kicks,
            regions: Vec::new(),
            monitor: None,
            passthrough: false,
            log: LogLimit::new(),
            acting: false,
            leave_when_idle: false,
        }
    }

    pub(super) fn is_held_by(&self, conn: ConnId) -> bool {
        self.holder == Holder::Driver(conn)
    }

    /// Gives a message to the machine, as far as `conn` may send it and the
    /// device has time. Sets `claimed` if it made `conn` the holder.
    pub(super) fn offer(
        &mut self,
        now: Instant,
        conn: ConnId,
        bytes: &[u8],
        max: usize,
        claimed: &mut bool,
    ) -> Handled {
        let Ok(frame) = decode(bytes, max) else {
            return Handled::Dropped;
        };
        let event = match frame.message.kind() {
            Kind::Request => false,
            Kind::Event => true,
            Kind::Response => return Handled::Dropped,
        };
        if !event && (!self.waiting.is_empty() || self.holder == Holder::Leaving) {
            self.waiting.push_back((conn, bytes.to_vec()));
            return Handled::Deferred;
        }
        match self.hand_over(now, conn, &frame, claimed) {
            Handled::Deferred => {
                self.waiting.push_back((conn, bytes.to_vec()));
                Handled::Deferred
            }
            other => other,
        }
    }

    /// Goes on with the messages that waited, until one makes the device busy
    /// again; `each` hears what became of them.
    pub(super) fn resume(
        &mut self,
        now: Instant,
        max: usize,
        mut each: impl FnMut(&mut Self, ConnId, Handled, bool),
    ) {
        while self.holder != Holder::Leaving {
            let Some((conn, bytes)) = self.waiting.pop_front() else {
                return;
            };
            let mut claimed = false;
            let handled = match decode(&bytes, max) {
                Ok(frame) => self.hand_over(now, conn, &frame, &mut claimed),
                Err(_) => Handled::Dropped,
            };
            if handled == Handled::Deferred {
                self.waiting.push_front((conn, bytes));
                return;
            }
            each(self, conn, handled, claimed);
        }
    }

    fn hand_over(
        &mut self,
        now: Instant,
        conn: ConnId,
        frame: &Frame<'_>,
        claimed: &mut bool,
    ) -> Handled {
        let event = frame.message.kind() == Kind::Event;
        if changes_state(&frame.message) && !self.is_held_by(conn) {
            if event {
                return Handled::Dropped;
            }
            let reset = matches!(
                frame.message,
                Message::SetDeviceStatus(status) if status == DeviceStatus::RESET
            );
            match self.holder {
                Holder::Nobody if reset => {}
                Holder::Nobody => {
                    if self.machine.is_busy() {
                        return Handled::Deferred;
                    }
                    self.holder = Holder::Driver(conn);
                    *claimed = true;
                }
                Holder::Driver(_) | Holder::Leaving => return self.refuse(frame),
            }
        }
        if !event && self.machine.is_busy() {
            return Handled::Deferred;
        }
        if !event {
            self.asker = Some(conn);
        }
        match self.machine.handle_message(now, frame) {
            Ok(_) => Handled::Taken,
            Err(_) => Handled::Deferred,
        }
    }

    /// What a driver hears that tries to change a device that another one holds.
    fn refuse(&self, frame: &Frame<'_>) -> Handled {
        let answer = match frame.message {
            Message::SetDeviceStatus(_) => Message::DeviceStatusSet(self.machine.status()),
            Message::SetDriverFeatures(_) => Message::DriverFeaturesSet,
            Message::SetConfig(config) => Message::ConfigSet(ConfigData {
                generation: self.generation(),
                offset: config.offset,
                len: 0,
                data: &[],
            }),
            Message::SetVqueue(_) => Message::VqueueSet,
            Message::ResetVqueue(_) => Message::VqueueReset,
            _ => return Handled::Dropped,
        };
        encode(&frame.response(answer)).map_or(Handled::Dropped, Handled::Refused)
    }

    fn generation(&self) -> Generation {
        self.machine.generation()
    }

    /// The next message of the machine and who gets it. Without `events` only
    /// an answer; the machine merges the events that wait. To be called when
    /// [`poll_action`](Self::poll_action) gives nothing.
    pub(super) fn poll_transmit(
        &mut self,
        buffer: &mut [u8],
        events: bool,
    ) -> Option<(Option<ConnId>, usize)> {
        let answer = self.machine.is_busy() && !self.acting;
        if !answer && !events {
            return None;
        }
        let len = self.machine.poll_transmit(buffer)?;
        let response = buffer[0] & virtio_msg::wire::header::TYPE_RESPONSE != 0;
        let to = match (response, self.holder) {
            (true, _) => self.asker.take(),
            (false, Holder::Driver(conn)) => Some(conn),
            (false, _) => None,
        };
        Some((to, len))
    }

    /// The next thing the machine wants done.
    pub(super) fn poll_action(&mut self) -> Option<Action> {
        let action = self.machine.poll_action();
        self.acting |= action.as_ref().is_some_and(Action::wants_completion);
        action
    }

    /// The outstanding action was carried out, or not.
    pub(super) fn complete(&mut self, result: ActionResult) {
        self.machine.complete(result);
        self.acting = false;
    }

    /// Drops what `conn` still had in line; returns how many it were.
    pub(super) fn forget(&mut self, conn: ConnId) -> usize {
        let before = self.waiting.len();
        self.waiting.retain(|(from, _)| *from != conn);
        self.claims.retain(|(from, _)| *from != conn);
        self.release.take_if(|(from, _)| *from == conn);
        if self.asker == Some(conn) {
            self.asker = None;
        }
        before - self.waiting.len()
    }

    /// Begins to reset the device because its driver is gone, or it is to go itself.
    pub(super) fn leave(&mut self, now: Instant) {
        self.holder = Holder::Leaving;
        self.resumes.clear();
        self.records.clear();
        self.leave_when_idle = self.machine.is_busy();
        if self.leave_when_idle {
            return;
        }
        self.asker = None;
        let reset = Frame::new(
            self.num,
            Token(0),
            Message::SetDeviceStatus(DeviceStatus::RESET),
        );
        // Cannot be busy: that was just asked.
        let _ = self.machine.handle_message(now, &reset);
    }

    /// Goes on with [`leave`](Self::leave) when what the driver had asked for
    /// is done and answered; true if it did.
    pub(super) fn leave_if_idle(&mut self, now: Instant) -> bool {
        let go = self.leave_when_idle && !self.machine.is_busy();
        if go {
            self.leave(now);
        }
        go
    }

    /// True when a leaving driver's reset is over.
    pub(super) fn has_left(&self) -> bool {
        self.holder == Holder::Leaving && !self.leave_when_idle && !self.machine.is_busy()
    }
}

/// Whether only the holder of a device may send this.
fn changes_state(message: &Message<'_>) -> bool {
    matches!(
        message,
        Message::SetDeviceStatus(_)
            | Message::SetDriverFeatures(_)
            | Message::SetConfig(_)
            | Message::SetVqueue(_)
            | Message::ResetVqueue(_)
            | Message::EventAvail { .. }
    )
}

/// The bytes of a frame of our own making.
pub(super) fn encode(frame: &Frame<'_>) -> Option<Vec<u8>> {
    let mut bytes = vec![0; virtio_msg::HEADER_SIZE + 512];
    let len = frame.encode(&mut bytes).ok()?;
    bytes.truncate(len);
    Some(bytes)
}
