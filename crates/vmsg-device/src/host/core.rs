// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The host without its thread: messages and replies in, messages and orders out.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::os::fd::{BorrowedFd, OwnedFd};

use virtio_msg::device::{self, ActionResult, DeviceMachine, Options, QueueSlot};
use virtio_msg::{
    DevNum, DeviceState, Frame, Instant, Message, QueueIndex, ShmInfo, Token, decode,
};
use vmsg_bus::control::Request;

use super::connection::{ConnId, Connection, Peer};
use super::entry::{Entry, Holder, encode};
use super::log_limit::LogLimit;
use crate::device::{Device, Identity};
use crate::worker::{Command, Notice, Reply, Slot};

/// Largest message the host makes room for: the header, the fields of
/// EVENT_CONFIG and 256 bytes of configuration, rounded up.
pub(super) const BUFFER: usize = 512;

/// A command on its way to a worker.
#[derive(Debug)]
pub struct Order {
    /// Which worker.
    pub worker: usize,
    /// Which of its devices.
    pub slot: Slot,
    /// Comes back in [`Reply::Done`].
    pub ticket: u64,
    /// What to do.
    pub command: Command,
}

/// Why a device cannot be added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddError {
    /// The number has been given to another device.
    #[error("device number {0} is taken by `{1}`")]
    NumberTaken(u16, String),
    /// The name has been given to another device.
    #[error("a device called `{0}` exists already")]
    NameTaken(String),
    /// The number was that of a device that is gone; drivers may still know it.
    #[error("device number {0} was that of a device that is gone")]
    NumberSpent(u16),
    /// All 65,536 numbers are used up, by devices that are there and such that were.
    #[error("no device number is left: a bus has 65536, each for one device as long as it lives")]
    NoNumber,
}

/// What went wrong so far, by whose fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Messages that are no messages.
    pub malformed: u64,
    /// Messages that had no business here.
    pub unexpected: u64,
    /// Attempts to change a device that somebody else holds.
    pub refused: u64,
    /// Devices stopped by an address that no window has, or not for what it was used for.
    pub unmapped: u64,
}

/// Who waits for a worker's answer.
#[derive(Debug)]
pub(super) enum Waiter {
    /// The state machine of a device.
    Machine(u16),
    /// The same, for a queue to be set up.
    Queue(u16),
    /// Somebody beside the bus: the operator.
    Operator,
    /// Nobody but the operator, by this ticket: the device is not on the bus any more.
    Removal { operator: u64, slot: Slot },
    /// A driver, whose answer goes out when the last of several commands is done.
    Driver(u64),
}

/// An answer that waits for workers.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) conn: ConnId,
    pub(super) missing: usize,
    pub(super) failed: bool,
    pub(super) token: Token,
    pub(super) request: Request,
}

/// All devices and connections of one bus.
#[derive(Debug)]
pub struct Core {
    max_message: usize,
    pub(super) entries: BTreeMap<u16, Entry>,
    pub(super) by_slot: HashMap<(usize, Slot), u16>,
    /// Numbers of devices that were removed.
    pub(super) gone: BTreeSet<u16>,
    /// Numbers of devices that may come.
    pub(super) promised: BTreeSet<u16>,
    /// How many of the devices have queues that other processes work on, and need the files of the memory for them.
    pub(super) passthroughs: usize,
    /// Places of workers that are free again.
    pub(super) freed: VecDeque<(usize, Slot)>,
    pub(super) connections: BTreeMap<ConnId, Connection>,
    orders: VecDeque<Order>,
    pub(super) waiters: HashMap<u64, Waiter>,
    pub(super) answers: HashMap<u64, Answer>,
    /// What came of the operator's orders, by their tickets.
    pub(super) operated: VecDeque<(u64, Result<(), String>)>,
    next_ticket: u64,
    next_conn: u64,
    pub(super) counters: Counters,
    /// About connections; devices have their own.
    log: LogLimit,
    /// When something last came in.
    pub(super) now: Instant,
}

impl Core {
    /// A bus without devices that carries messages of up to `max_message` bytes.
    ///
    /// `tickets` is the first ticket of its commands: several buses that share
    /// workers need ranges of their own.
    pub fn new(max_message: usize, tickets: u64) -> Self {
        Self {
            max_message: max_message.min(BUFFER),
            entries: BTreeMap::new(),
            by_slot: HashMap::new(),
            gone: BTreeSet::new(),
            promised: BTreeSet::new(),
            freed: VecDeque::new(),
            passthroughs: 0,
            connections: BTreeMap::new(),
            orders: VecDeque::new(),
            waiters: HashMap::new(),
            answers: HashMap::new(),
            operated: VecDeque::new(),
            next_ticket: tickets,
            next_conn: 0,
            counters: Counters::default(),
            log: LogLimit::new(),
            now: Instant(0),
        }
    }

    /// Puts `device` on the bus, served by `worker` at `slot`, which must be
    /// its own there. Without `num` it gets the lowest number that no device has had.
    /// Drivers that are there hear of it.
    ///
    /// The descriptors of lent files are kept while there is a device whose queues another process works on
    /// ([`Device::passthrough`]). What a connection lent before there was one has no file: such a device finds
    /// that out and refuses the queues of a driver that does not lend its memory anew.
    ///
    /// # Errors
    ///
    /// [`AddError`] if the number or the name is taken.
    pub fn add_device(
        &mut self,
        name: &str,
        num: Option<u16>,
        worker: usize,
        slot: Slot,
        mut device: Box<dyn Device>,
    ) -> Result<DevNum, AddError> {
        if self.entries.values().any(|entry| entry.name == name) {
            return Err(AddError::NameTaken(name.to_owned()));
        }
        let num = match num {
            Some(num) => num,
            None => (0..=u16::MAX)
                .find(|num| {
                    let taken = [&self.gone, &self.promised];
                    !self.entries.contains_key(num) && !taken.iter().any(|set| set.contains(num))
                })
                .ok_or(AddError::NoNumber)?,
        };
        if self.gone.contains(&num) {
            return Err(AddError::NumberSpent(num));
        }
        if let Some(entry) = self.entries.get(&num) {
            return Err(AddError::NumberTaken(num, entry.name.clone()));
        }
        let Identity {
            device_id,
            vendor_id,
        } = device.identity();
        let identity = device::Identity {
            device_id,
            vendor_id,
            admin_first: 0,
            admin_count: 0,
        };
        let queues: Box<[QueueSlot]> = device
            .queue_sizes()
            .into_iter()
            .map(QueueSlot::new)
            .collect();
        let machine = DeviceMachine::new(
            DevNum(num),
            identity,
            device.features(),
            queues,
            device.config().into_boxed_slice(),
            Options::new(self.max_message),
        );
        let unordered = (0..machine.queue_count())
            .filter(|queue| !device.in_order(QueueIndex(*queue).to_usize()))
            .collect();
        let mut entry = Entry::new(
            name.to_owned(),
            DevNum(num),
            worker,
            slot,
            machine,
            unordered,
        );
        entry.monitor = device.monitor();
        entry.passthrough = device.passthrough().is_some();
        self.passthroughs += usize::from(entry.passthrough);
        for region in device.shared_memory() {
            // GET_SHM has 32 bits for the length; SHARED_MEMORY says the whole of it.
            let info = ShmInfo {
                index: region.id.into(),
                len: u32::try_from(region.len).unwrap_or(u32::MAX),
                address: 0,
            };
            if region.len != 0 && entry.machine.set_region(info) {
                entry.regions.push(region);
            }
        }
        self.entries.insert(num, entry);
        self.by_slot.insert((worker, slot), num);
        self.order(num, 0, Command::Add(device));
        self.tell_all(DevNum(num), DeviceState::Ready);
        Ok(DevNum(num))
    }

    /// A device may come that passes the driver's memory on: the files of memory that is lent before are kept for it. No device is
    /// given its number `num` without asking for it.
    pub fn expect_passthrough(&mut self, num: Option<u16>) {
        self.passthroughs += 1;
        self.promised.extend(num);
    }

    /// The devices: number, name, and who holds it.
    pub fn devices(&self) -> impl Iterator<Item = (DevNum, &str, Option<&Peer>)> {
        self.entries.iter().map(|(num, entry)| {
            let holder = match entry.holder {
                Holder::Driver(conn) => self.connections.get(&conn).map(|conn| &conn.peer),
                Holder::Nobody | Holder::Leaving => None,
            };
            (DevNum(*num), entry.name.as_str(), holder)
        })
    }

    /// True if one of this bus's devices is at `slot` of `worker`.
    pub fn owns(&self, worker: usize, slot: Slot) -> bool {
        self.by_slot.contains_key(&(worker, slot))
    }

    /// True if this bus has sent the command with `ticket` and waits for its answer.
    pub fn awaits(&self, ticket: u64) -> bool {
        self.waiters.contains_key(&ticket)
    }

    /// What went wrong so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// A driver has come. `max_message` is the largest message on its
    /// connection in bytes.
    pub fn connect(&mut self, peer: Peer, max_message: usize) -> ConnId {
        let conn = ConnId(self.next_conn);
        self.next_conn += 1;
        self.connections
            .insert(conn, Connection::new(peer, max_message));
        conn
    }

    /// A driver is gone: its devices are reset, its memory is let go.
    pub fn disconnect(&mut self, now: Instant, conn: ConnId) {
        self.now = now;
        let nums: Vec<u16> = self.entries.keys().copied().collect();
        for num in nums {
            let entry = self
                .entries
                .get_mut(&num)
                .expect("the number is from the map");
            entry.forget(conn);
            if entry.is_held_by(conn) {
                entry.leave(now);
                self.pump(now, num);
            }
        }
        self.connections.remove(&conn);
    }

    /// False while nothing more must be read from `conn`.
    pub fn wants_input(&self, conn: ConnId) -> bool {
        self.connections
            .get(&conn)
            .is_some_and(Connection::wants_input)
    }

    /// A message has come from `conn`, with what descriptors came with it.
    pub fn handle_message(&mut self, now: Instant, conn: ConnId, bytes: &[u8], fds: Vec<OwnedFd>) {
        self.now = now;
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        let frame = match decode(bytes, connection.max_message) {
            Ok(frame) => frame,
            Err(error) => {
                self.counters.malformed += 1;
                if connection.complain() && self.log.admit(now) {
                    tracing::warn!(peer = %connection.peer, %error, "malformed message dropped; further ones are only counted");
                }
                return;
            }
        };
        tracing::trace!(peer = %connection.peer, %frame, "received");
        if frame.message.is_bus() {
            self.handle_bus_message(now, conn, &frame, fds);
            return;
        }
        let num = frame.dev_num.0;
        let max = connection.max_message;
        let Some(entry) = self.entries.get_mut(&num) else {
            return self.answer_for_absent(conn, &frame);
        };
        if let Message::GetShm { index } = frame.message
            && (connection.bare || connection.common)
        {
            // Its file cannot be had there.
            let none = ShmInfo {
                index,
                ..ShmInfo::default()
            };
            return self.send(conn, &frame.response(Message::Shm(none)));
        }
        let mut claimed = false;
        let handled = entry.offer(now, conn, bytes, max, &mut claimed);
        self.settle(num, conn, handled, claimed);
        self.pump(now, num);
    }

    /// A worker has something to say.
    pub fn handle_reply(&mut self, now: Instant, worker: usize, reply: Reply) {
        self.now = now;
        match reply {
            Reply::Done { ticket, result } => match self.waiters.remove(&ticket) {
                Some(waiter @ (Waiter::Machine(num) | Waiter::Queue(num))) => {
                    let mute = matches!(waiter, Waiter::Queue(_)) && self.is_bare(num);
                    let Some(entry) = self.entries.get_mut(&num) else {
                        return;
                    };
                    let mute = mute && result.is_err();
                    let result = match result {
                        Ok(()) => ActionResult::Done,
                        Err(why) => {
                            if entry.log.admit(now) {
                                tracing::warn!(device = %entry.name, %why, "the driver's request was refused");
                            }
                            ActionResult::Refused
                        }
                    };
                    entry.complete(result);
                    if mute {
                        // Some of these buses have no other way to say that the queue is not there.
                        entry.machine.set_needs_reset();
                    }
                    self.pump(now, num);
                }
                Some(Waiter::Operator) => self.operated.push_back((ticket, result)),
                Some(Waiter::Driver(answer)) => self.count_down(answer, result),
                Some(Waiter::Removal { operator, slot }) => {
                    self.removed(worker, slot, operator, result);
                }
                None => {}
            },
            Reply::Notice(slot, notice) => {
                let Some(&num) = self.by_slot.get(&(worker, slot)) else {
                    return;
                };
                let Some(entry) = self.entries.get_mut(&num) else {
                    return;
                };
                match notice {
                    Notice::Used { queue } => {
                        let queue = u32::try_from(queue).expect("queues are few");
                        entry.machine.notify_used(QueueIndex(queue));
                    }
                    Notice::Config { offset, data } => {
                        let offset = u32::try_from(offset).expect("the space is small");
                        entry.machine.update_config(offset, &data);
                    }
                    Notice::CallStuck { queue, error } => {
                        if entry.log.admit(now) {
                            tracing::warn!(device = %entry.name, queue, %error, "interrupt descriptor dropped");
                        }
                    }
                    Notice::Broken { why, unmapped } => {
                        self.counters.unmapped += u64::from(unmapped);
                        if entry.log.admit(now) {
                            tracing::warn!(device = %entry.name, %why, "device needs reset");
                        }
                        entry.machine.set_needs_reset();
                    }
                }
                self.pump(now, num);
            }
        }
    }

    /// The next message for `conn`, left in line until [`sent`](Self::sent).
    pub fn poll_transmit(&self, conn: ConnId) -> Option<&[u8]> {
        self.connections.get(&conn)?.peek()
    }

    /// The descriptor that goes with the message which [`poll_transmit`](Self::poll_transmit) gives.
    pub fn transmit_fd(&self, conn: ConnId) -> Option<BorrowedFd<'_>> {
        self.connections.get(&conn)?.peek_fd()
    }

    /// The message that [`poll_transmit`](Self::poll_transmit) gave is on its way.
    pub fn sent(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        connection.sent();
        if connection.wants_kept_back() {
            let held: Vec<u16> = self
                .entries
                .iter()
                .filter(|(_, entry)| entry.is_held_by(conn))
                .map(|(num, _)| *num)
                .collect();
            for num in held {
                self.pump(self.now, num);
            }
        }
    }

    /// Whether a line may be logged about what connections do.
    pub(super) fn may_log(&mut self, now: Instant) -> bool {
        self.log.admit(now)
    }

    /// The next command for a worker.
    pub fn poll_order(&mut self) -> Option<Order> {
        self.orders.pop_front()
    }

    /// Sends a frame of our own making.
    pub(super) fn send(&mut self, conn: ConnId, frame: &Frame<'_>) {
        if let (Some(connection), Some(bytes)) = (self.connections.get_mut(&conn), encode(frame)) {
            tracing::trace!(peer = %connection.peer, %frame, "sending");
            connection.send(bytes);
        }
    }

    pub(super) fn ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket
    }

    pub(super) fn order(&mut self, num: u16, ticket: u64, command: Command) {
        let Some(entry) = self.entries.get(&num) else {
            return;
        };
        self.orders.push_back(Order {
            worker: entry.worker,
            slot: entry.slot,
            ticket,
            command,
        });
    }

    /// Sends a command whose answer somebody waits for.
    pub(super) fn order_for(&mut self, num: u16, waiter: Waiter, command: Command) {
        let ticket = self.ticket();
        self.waiters.insert(ticket, waiter);
        self.order(num, ticket, command);
    }

    /// The number under which an answer waits for `missing` workers.
    pub(super) fn defer_answer(&mut self, answer: Answer) -> u64 {
        let id = self.ticket();
        if let Some(connection) = self.connections.get_mut(&answer.conn) {
            connection.deferred += 1;
        }
        self.answers.insert(id, answer);
        id
    }

    /// Makes `conn` the holder of a free device and shows the device its memory.
    pub(super) fn claim(&mut self, num: u16, conn: ConnId) {
        let Some(entry) = self.entries.get_mut(&num) else {
            return;
        };
        let Some(connection) = self.connections.get(&conn) else {
            return;
        };
        entry.holder = Holder::Driver(conn);
        entry.memory_of = Some(conn);
        if entry.log.admit(self.now) {
            tracing::info!(device = %entry.name, holder = %connection.peer, "claimed");
        }
        if connection.ram.is_some() {
            return self.find_memory(num, conn);
        }
        let table = connection.table_for(num);
        self.order(num, 0, Command::SetMemory(table));
    }
}

#[cfg(test)]
#[path = "core_test.rs"]
mod tests;
