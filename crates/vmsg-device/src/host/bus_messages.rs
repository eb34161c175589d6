// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages about the bus itself: who is there, what is lent, who holds what.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use virtio_msg::{DevNum, DeviceBitmap, Frame, HEADER_SIZE, Instant, Message, QueueIndex, Token};
use vmsg_bus::control::{
    self, QueueInflight, QueueNotify, Request, Response, SharedMemory, Status,
};
use vmsg_mem::{Access, Doorbell, Mapping};
use vmsg_queue::Inflight;

use super::connection::{ConnId, Connection};
use super::core::{Answer, Core, Waiter};
use super::entry::{Entry, Holder, encode};
use crate::worker::{Command, Record, Resume};

/// Device numbers in one answer to GET_DEVICES at most, so that it fits any message.
const MAX_NUMBERS: u16 = 256;

/// Bytes of the longest record of what is in flight in a queue: one of 32,768 entries.
const MAX_RECORD: u64 = Inflight::bytes_for(1 << 15) as u64;

/// CLAIM requests of one driver that may wait for a device that is just being reset.
const MAX_CLAIMS: usize = 4;

impl Core {
    pub(super) fn handle_bus_message(
        &mut self,
        now: Instant,
        conn: ConnId,
        frame: &Frame<'_>,
        fds: Vec<OwnedFd>,
    ) {
        match frame.message {
            Message::Ping { data } => self.send(conn, &frame.response(Message::Pong { data })),
            Message::GetDevices { offset, count } => {
                self.answer_devices(conn, frame, offset, count)
            }
            Message::BusSpecific {
                id,
                response: false,
                payload,
            } => match Request::decode(id, payload) {
                Ok(request) => self.handle_request(now, conn, frame.token, request, fds),
                Err(error) => {
                    self.counters.malformed += 1;
                    if self.first_complaint(now, conn)
                        && let Some(connection) = self.connections.get(&conn)
                    {
                        tracing::warn!(peer = %connection.peer, %error, "malformed bus message; further ones are only counted");
                    }
                    self.answer_malformed(conn, frame.token, id, payload);
                }
            },
            _ => self.counters.unexpected += 1,
        }
    }

    /// Whether something may be logged about what this connection does, which
    /// is so once, and not if too many others were logged lately.
    pub(super) fn first_complaint(&mut self, now: Instant, conn: ConnId) -> bool {
        let first = self
            .connections
            .get_mut(&conn)
            .is_some_and(Connection::complain);
        first && self.may_log(now)
    }

    /// Answers a request that has an id of ours, and little else that is right.
    fn answer_malformed(&mut self, conn: ConnId, token: Token, id: u8, payload: &[u8]) {
        let Some(subject) = payload.first_chunk::<4>() else {
            return;
        };
        if !Request::is_known(id) {
            return;
        }
        let mut payload = [0; 8];
        payload[..4].copy_from_slice(subject);
        payload[4..].copy_from_slice(&Status::MALFORMED.0.to_le_bytes());
        let message = Message::BusSpecific {
            id,
            response: true,
            payload: &payload,
        };
        self.send(conn, &Frame::bus(token, message));
    }

    fn answer_devices(&mut self, conn: ConnId, frame: &Frame<'_>, offset: u16, count: u16) {
        let Some(max) = self
            .connections
            .get(&conn)
            .map(|connection| connection.max_message)
        else {
            return;
        };
        // The bitmap must fit the bus's messages: 8 bytes of header, 6 of fields.
        let room = u16::try_from(max.saturating_sub(14).min(32) * 8).unwrap_or(MAX_NUMBERS);
        let count = (count & !7).min(room);
        let offset = offset & !7;
        let end = u32::from(offset) + u32::from(count);
        let mut bitmap = [0; 32];
        for num in self.entries.range(offset..).map(|(num, _)| *num) {
            if u32::from(num) >= end {
                break;
            }
            let bit = usize::from(num - offset);
            bitmap[bit / 8] |= 1 << (bit % 8);
        }
        let more = self.entries.keys().any(|num| u32::from(*num) >= end);
        let next = if more && count > 0 {
            u16::try_from(end).unwrap_or(0)
        } else {
            0
        };
        let bytes = usize::from(count / 8);
        let devices = DeviceBitmap {
            offset,
            count,
            next,
            bitmap: &bitmap[..bytes],
        };
        self.send(conn, &frame.response(Message::Devices(devices)));
    }

    fn handle_request(
        &mut self,
        now: Instant,
        conn: ConnId,
        token: Token,
        request: Request,
        fds: Vec<OwnedFd>,
    ) {
        let status = match request {
            Request::WindowAdd(window) => self.add_window(conn, token, request, window, fds),
            Request::WindowRemove { id, more } => {
                self.remove_window(conn, token, request, id, more)
            }
            Request::QueueNotify(notify) => self.set_notify(conn, token, request, notify, fds),
            Request::QueueResume { dev, queue, from } => {
                Some(match self.entry_with_queue(conn, dev, queue) {
                    Ok(entry) => {
                        let resume = match from {
                            control::Resume::At {
                                avail_idx,
                                used_idx,
                            } => Resume::At {
                                avail: avail_idx,
                                used: used_idx,
                            },
                            control::Resume::UsedInRing => Resume::FromUsedRing,
                        };
                        entry.resumes.insert(queue.0, resume);
                        Status::OK
                    }
                    Err(status) => status,
                })
            }
            Request::BackingAdd(backing) => self.add_backing(conn, token, request, backing, fds),
            Request::BackingRemove { id } => self.remove_backing(conn, token, request, id),
            Request::ViewAdd(view) => self.add_view(conn, token, request, view),
            Request::SharedMemory { dev, id } => {
                self.answer_region(conn, token, request, dev, id);
                None
            }
            Request::QueueInflight(inflight) => Some(self.set_record(conn, inflight, fds)),
            Request::QueueVectors(vectors) => self.set_vectors(conn, token, request, vectors),
            Request::Claim {
                dev,
                release: false,
            } => {
                self.handle_claim(dev.0, conn, token);
                None
            }
            Request::Claim { dev, release: true } => self.release(now, conn, dev, token),
            Request::DeviceName(dev) => {
                let name = self.entries.get(&dev.0).map(|entry| entry.name.clone());
                let status = if name.is_some() {
                    Status::OK
                } else {
                    Status::NOT_FOUND
                };
                self.respond(conn, token, &request, status, &name.unwrap_or_default());
                None
            }
        };
        if let Some(status) = status {
            self.respond(conn, token, &request, status, "");
        }
    }

    /// Lends a region to who holds its device: anybody else could go on looking at what the holder does with it.
    fn answer_region(
        &mut self,
        conn: ConnId,
        token: Token,
        request: Request,
        dev: DevNum,
        id: u32,
    ) {
        let region = match self.entries.get(&dev.0) {
            None => Err(Status::NOT_FOUND),
            Some(entry) if !entry.is_held_by(conn) => Err(Status::DENIED),
            Some(entry) => {
                let mut regions = entry.regions.iter();
                regions
                    .find(|region| u32::from(region.id) == id)
                    .cloned()
                    .ok_or(Status::NOT_FOUND)
            }
        };
        let region = match region {
            Ok(region) => region,
            Err(status) => return self.respond(conn, token, &request, status, ""),
        };
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        if connection.bare || connection.common {
            return self.respond(conn, token, &request, Status::UNSUPPORTED, "");
        }
        let mut response = request.response(Status::OK, "");
        response.memory = Some(SharedMemory {
            len: region.len,
            file_offset: region.file_offset,
        });
        let mut payload = [0; 24];
        let len = response.encode(&mut payload).expect("24 bytes are enough");
        let message = Message::BusSpecific {
            id: request.id(),
            response: true,
            payload: &payload[..len],
        };
        if let Some(bytes) = encode(&Frame::bus(token, message)) {
            connection.send_with_fd(bytes, region.file);
        }
    }

    fn respond(
        &mut self,
        conn: ConnId,
        token: Token,
        request: &Request,
        status: Status,
        name: &str,
    ) {
        let Some(connection) = self.connections.get(&conn) else {
            return;
        };
        // A name for which the driver's messages have no room is cut.
        let room = connection.max_message.saturating_sub(HEADER_SIZE);
        let mut payload = [0; 8 + control::MAX_NAME];
        let room = room.clamp(8, payload.len());
        let response: Response<'_> = request.response(status, name);
        let len = response
            .encode(&mut payload[..room])
            .expect("a response fits 8 bytes, a name is cut");
        let message = Message::BusSpecific {
            id: request.id(),
            response: true,
            payload: &payload[..len],
        };
        self.send(conn, &Frame::bus(token, message));
    }

    /// Answers a CLAIM, now or when the last holder's reset is over.
    pub(super) fn handle_claim(&mut self, num: u16, conn: ConnId, token: Token) {
        let request = Request::Claim {
            dev: DevNum(num),
            release: false,
        };
        let Some(entry) = self.entries.get_mut(&num) else {
            return self.respond(conn, token, &request, Status::NOT_FOUND, "");
        };
        match entry.holder {
            Holder::Leaving
                if entry
                    .claims
                    .iter()
                    .filter(|(from, _)| *from == conn)
                    .count()
                    >= MAX_CLAIMS =>
            {
                self.respond(conn, token, &request, Status::TOO_MANY, "");
            }
            Holder::Leaving => entry.claims.push_back((conn, token)),
            Holder::Nobody => {
                self.claim(num, conn);
                self.respond(conn, token, &request, Status::OK, "");
            }
            Holder::Driver(holder) if holder == conn => {
                self.respond(conn, token, &request, Status::OK, "");
            }
            Holder::Driver(holder) => {
                let name = self
                    .connections
                    .get(&holder)
                    .map(|other| other.peer.to_string());
                self.counters.refused += 1;
                self.respond(
                    conn,
                    token,
                    &request,
                    Status::HELD,
                    &name.unwrap_or_default(),
                );
            }
        }
    }

    /// Gives a device back; answered when it was reset.
    fn release(&mut self, now: Instant, conn: ConnId, dev: DevNum, token: Token) -> Option<Status> {
        match self.entries.get_mut(&dev.0) {
            None => Some(Status::NOT_FOUND),
            Some(entry) if entry.is_held_by(conn) => {
                entry.release = Some((conn, token));
                entry.leave(now);
                self.pump(now, dev.0);
                None
            }
            Some(_) => Some(Status::BAD_STATE),
        }
    }

    /// Answers who has released a device.
    pub(super) fn released(&mut self, num: u16, conn: ConnId, token: Token) {
        let request = Request::Claim {
            dev: DevNum(num),
            release: true,
        };
        self.respond(conn, token, &request, Status::OK, "");
    }

    /// The device, if it has this queue and its driver is `conn`.
    pub(super) fn entry_with_queue(
        &mut self,
        conn: ConnId,
        dev: DevNum,
        queue: QueueIndex,
    ) -> Result<&mut Entry, Status> {
        let entry = self.entries.get_mut(&dev.0).ok_or(Status::NOT_FOUND)?;
        if !entry.is_held_by(conn) {
            return Err(Status::DENIED);
        }
        if queue.0 >= entry.machine.queue_count() {
            return Err(Status::NOT_FOUND);
        }
        Ok(entry)
    }

    fn set_notify(
        &mut self,
        conn: ConnId,
        token: Token,
        request: Request,
        notify: QueueNotify,
        fds: Vec<OwnedFd>,
    ) -> Option<Status> {
        if let Err(status) = self.entry_with_queue(conn, notify.dev, notify.queue) {
            return Some(status);
        }
        if fds.len() != notify.fds() {
            return Some(Status::BAD_FD);
        }
        let mut fds = fds.into_iter();
        let mut doorbell = |given: bool| -> Result<Option<Doorbell>, Status> {
            if !given {
                return Ok(None);
            }
            let fd = fds.next().ok_or(Status::BAD_FD)?;
            Doorbell::from_fd(fd).map(Some).map_err(|_| Status::BAD_FD)
        };
        let (kick, call) = match (doorbell(notify.kick), doorbell(notify.call)) {
            (Ok(kick), Ok(call)) => (kick, call),
            (Err(status), _) | (_, Err(status)) => return Some(status),
        };
        let command = Command::SetNotify {
            queue: notify.queue.to_usize(),
            kick,
            call,
        };
        self.order_for_driver(conn, token, request, notify.dev.0, command);
        None
    }

    /// A command of which the driver hears when it was carried out.
    pub(super) fn order_for_driver(
        &mut self,
        conn: ConnId,
        token: Token,
        request: Request,
        num: u16,
        command: Command,
    ) {
        let answer = self.defer_answer(Answer {
            conn,
            missing: 1,
            failed: false,
            token,
            request,
        });
        self.order_for(num, Waiter::Driver(answer), command);
    }

    /// Keeps the record of a queue for its next set-up, if the device has use for it.
    fn set_record(&mut self, conn: ConnId, inflight: QueueInflight, fds: Vec<OwnedFd>) -> Status {
        let entry = match self.entry_with_queue(conn, inflight.dev, inflight.queue) {
            Ok(entry) => entry,
            Err(status) => return status,
        };
        let Ok([fd]) = <[OwnedFd; 1]>::try_from(fds) else {
            return Status::BAD_FD;
        };
        if !entry.unordered.contains(&inflight.queue.0) {
            return Status::OK;
        }
        if inflight.len > MAX_RECORD {
            return Status::TOO_MANY;
        }
        if inflight.len == 0 || !inflight.offset.is_multiple_of(8) {
            return Status::MALFORMED;
        }
        let mapping = vmsg_mem::check_backing(fd.as_fd()).and_then(|()| {
            Mapping::of_fd(fd.as_fd(), inflight.offset, inflight.len, Access::ReadWrite)
        });
        let Ok(mut mapping) = mapping else {
            return Status::BAD_FD;
        };
        if entry.passthrough {
            // For whoever works on the queue.
            mapping = mapping.with_file(Arc::new(fd), inflight.offset);
        }
        let record = Record {
            memory: Arc::new(mapping),
            resume: inflight.resume,
        };
        entry.records.insert(inflight.queue.0, record);
        Status::OK
    }

    /// One of the workers that an answer waits for is done.
    pub(super) fn count_down(&mut self, id: u64, result: Result<(), String>) {
        let Some(answer) = self.answers.get_mut(&id) else {
            return;
        };
        answer.missing -= 1;
        answer.failed |= result.is_err();
        if answer.missing > 0 {
            return;
        }
        let Some(answer) = self.answers.remove(&id) else {
            return;
        };
        if let Some(connection) = self.connections.get_mut(&answer.conn) {
            connection.deferred = connection.deferred.saturating_sub(1);
        }
        let status = if answer.failed {
            Status::BAD_STATE
        } else {
            Status::OK
        };
        self.respond(answer.conn, answer.token, &answer.request, status, "");
    }
}
