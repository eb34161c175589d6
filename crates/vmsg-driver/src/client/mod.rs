// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Asking and waiting for the answer.

mod calls;
#[cfg(feature = "std")]
mod control;
mod enumerate;

use core::time::Duration;

#[cfg(feature = "std")]
use virtio_msg::DeviceStatus;
use virtio_msg::driver::{Received, RequestError, RequestId, Requester};
use virtio_msg::{
    Channel, ChannelError, DevNum, DeviceState, Frame, Instant, Message, QueueIndex, Token, decode,
};

use crate::error::Error;
use crate::event::{Event, EventQueue};
use crate::wait::{Interest, Wait};

/// How long an answer may take unless [`Client::set_timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(3);

/// Messages that are handled in a row before the clock is looked at again: a flood of events must not keep a request from
/// timing out.
const BURST: usize = 64;

/// Sends the bytes of a message over a channel.
type Put<'a, C> = &'a mut dyn FnMut(&mut C, &[u8]) -> Result<(), ChannelError>;

/// Takes an answer.
type Answered<'a> = &'a mut dyn FnMut(RequestId, &Message<'_>);

/// Requests that can wait for an answer at the same time: as many as a scan of all device numbers needs.
const MAX_OUTSTANDING: usize = virtio_msg::driver::SCANNED_DEVICES as usize;

/// Devices of which it is kept that they were removed.
const MAX_REMOVED: usize = 8;

/// Bytes of the answer to a PING.
const PONG_SIZE: usize = 12;

/// What a client has counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests sent.
    pub requests: u64,
    /// Answers that belonged to a request.
    pub answers: u64,
    /// Requests without an answer in time.
    pub timeouts: u64,
    /// Messages that were none: malformed, or of an unknown kind.
    pub malformed: u64,
    /// Answers to nothing that was asked (wrong token, message id or device number, or too late), and messages that only
    /// drivers send.
    pub dropped: u64,
    /// Events received.
    pub events: u64,
    /// Events lost because nobody took them.
    pub events_lost: u64,
}

/// The driver end of a bus: blocking requests over a [`Channel`].
///
/// Any number of devices can be driven over one client. Requests are made one after another; events that arrive in between are
/// kept, in order, until [`Client::next_event`] takes them. `B` is memory for two messages: an array, a `Vec`, a `&mut [u8]`.
///
/// Nothing the other side sends makes a client panic, wait longer than the time-out for an answer, or use more memory.
#[derive(Debug)]
pub struct Client<C, W, B> {
    channel: C,
    wait: W,
    buffers: B,
    max: usize,
    timeout: Duration,
    requester: Requester<MAX_OUTSTANDING>,
    events: EventQueue,
    /// Devices that were removed, and where the next of them is put.
    removed: [Option<DevNum>; MAX_REMOVED],
    next_removed: usize,
    malformed: u64,
}

/// A client of a bus of this workspace, for a thread of its own.
#[cfg(feature = "std")]
pub type BusClient = Client<vmsg_bus::DriverBus, crate::Sleep, Vec<u8>>;

#[cfg(feature = "std")]
impl<C: vmsg_bus::Bus> Client<C, crate::Sleep, Vec<u8>> {
    /// A client on `bus` that sleeps while it waits.
    pub fn on_bus(bus: C) -> Self {
        let room = bus.max_message_size() * 2;
        Self::new(bus, crate::Sleep::new(), vec![0; room]).expect("there is room for two messages")
    }
}

impl<C: Channel, W: Wait<C>, B: AsRef<[u8]> + AsMut<[u8]>> Client<C, W, B> {
    /// A client on `channel`. `buffers` holds at least twice the bus's message size.
    ///
    /// # Errors
    /// [`Error::NoRoom`] if the buffers are too small.
    pub fn new(channel: C, wait: W, buffers: B) -> Result<Self, Error> {
        let max = channel.max_message_size();
        let (need, have) = (max.saturating_mul(2), buffers.as_ref().len());
        if have < need {
            return Err(Error::NoRoom {
                request: "any message",
                need,
                have,
            });
        }
        Ok(Self {
            channel,
            wait,
            buffers,
            max,
            timeout: DEFAULT_TIMEOUT,
            requester: Requester::new(),
            events: EventQueue::new(),
            removed: [None; MAX_REMOVED],
            next_removed: 0,
            malformed: 0,
        })
    }

    /// Sets how long an answer may take.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// How long an answer may take.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// The longest message of the bus, in bytes.
    pub fn max_message_size(&self) -> usize {
        self.max
    }

    /// What was counted so far.
    pub fn counters(&self) -> Counters {
        let requester = self.requester.counters();
        Counters {
            requests: requester.requests,
            answers: requester.responses,
            timeouts: requester.timeouts,
            malformed: self.malformed,
            dropped: requester.dropped,
            events: requester.events,
            events_lost: self.events.lost(),
        }
    }

    /// The channel.
    pub fn channel(&self) -> &C {
        &self.channel
    }

    /// The channel, to use what only this kind of bus has. Messages taken from it are missing here.
    pub fn channel_mut(&mut self) -> &mut C {
        &mut self.channel
    }

    /// The clock of the client.
    pub fn now(&mut self) -> Instant {
        self.wait.now()
    }

    /// Gives the channel back.
    pub fn into_channel(self) -> C {
        self.channel
    }

    /// Takes in what has arrived, without waiting, and gives the oldest event.
    ///
    /// # Errors
    /// [`Error::Channel`] once the bus is of no use any more and all events are taken.
    pub fn next_event(&mut self) -> Result<Option<Event>, Error> {
        let polled = self.poll();
        match (self.events.pop(), polled) {
            (Some(event), _) => Ok(Some(event)),
            (None, Err(error)) => Err(error),
            (None, Ok(())) => Ok(None),
        }
    }

    /// Takes in what has arrived, without waiting, and gives the oldest event for which `wanted` holds. Others stay.
    ///
    /// # Errors
    /// [`Error::Channel`] once the bus is of no use any more and no such event is left.
    pub fn take_event(
        &mut self,
        wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Option<Event>, Error> {
        let polled = self.poll();
        match (self.events.take(wanted), polled) {
            (Some(event), _) => Ok(Some(event)),
            (None, Err(error)) => Err(error),
            (None, Ok(())) => Ok(None),
        }
    }

    /// Waits for an event, at most for `timeout`. `None`: there was none.
    ///
    /// # Errors
    /// As [`Client::next_event`].
    pub fn wait_event(&mut self, timeout: Duration) -> Result<Option<Event>, Error> {
        let deadline = self.wait.now() + timeout;
        loop {
            if let Some(event) = self.next_event()? {
                return Ok(Some(event));
            }
            if self.wait.now() >= deadline {
                return Ok(None);
            }
            self.wait
                .wait(&mut self.channel, Interest::Message, deadline);
        }
    }

    /// Waits until a message may have come, at most until `deadline`. It is taken in by the next call.
    #[cfg(feature = "std")]
    pub(crate) fn wait_for_message(&mut self, deadline: Instant) {
        self.wait
            .wait(&mut self.channel, Interest::Message, deadline);
    }

    /// Tells a device that buffers are available in a queue. `next` is 0 unless NOTIFICATION_DATA was negotiated.
    ///
    /// # Errors
    /// [`Error::Channel`]; [`Error::Timeout`] if the bus has no room for that long.
    pub fn notify_available(
        &mut self,
        device: DevNum,
        queue: QueueIndex,
        next: u32,
    ) -> Result<(), Error> {
        let deadline = self.wait.now() + self.timeout;
        let event = Frame::new(device, Token(0), Message::EventAvail { queue, next });
        let (out, _) = self.buffers.as_mut().split_at_mut(self.max);
        let no_room = |e: virtio_msg::EncodeError| Error::NoRoom {
            request: event.message.name(),
            need: e.size,
            have: e.room,
        };
        let size = event.encode(out).map_err(no_room)?;
        self.send(
            event.message.name(),
            size,
            deadline,
            &mut C::try_send,
            &mut |_, _| {},
        )
    }

    /// Takes in what has arrived, without waiting.
    ///
    /// # Errors
    /// [`Error::Channel`] if the bus is of no use any more.
    pub fn poll(&mut self) -> Result<(), Error> {
        self.pump(&mut |_, _| {}).map(|_| ())
    }

    /// Asks `device` and gives what `accept` makes of the answer: `None` is an answer that makes no sense.
    pub(crate) fn ask<R>(
        &mut self,
        device: DevNum,
        request: Message<'_>,
        accept: impl FnMut(&Message<'_>) -> Option<R>,
    ) -> Result<R, Error> {
        self.exchange(request.name(), device, request, &mut C::try_send, accept)
    }

    /// Whether the other side has said that `device` was removed; the last eight of them are remembered.
    pub fn is_removed(&self, device: DevNum) -> bool {
        self.removed.contains(&Some(device))
    }

    /// Whether an event that nobody has taken yet says that `device` is broken.
    #[cfg(feature = "std")]
    pub(crate) fn needs_reset(&self, device: DevNum) -> bool {
        self.events.iter().any(|event| {
            matches!(event, Event::Config { device: of, status, .. }
                if of == device && status.contains(DeviceStatus::NEEDS_RESET))
        })
    }

    /// A device came or went.
    fn note(&mut self, device: DevNum, state: DeviceState) {
        match state {
            DeviceState::Removed if !self.is_removed(device) => {
                self.removed[self.next_removed] = Some(device);
                self.next_removed = (self.next_removed + 1) % MAX_REMOVED;
            }
            DeviceState::Ready => {
                for removed in &mut self.removed {
                    removed.take_if(|removed| *removed == device);
                }
            }
            _ => {}
        }
    }

    /// As [`Client::ask`], with the name of the request for errors, and with the way to send it.
    fn exchange<R>(
        &mut self,
        name: &'static str,
        device: DevNum,
        request: Message<'_>,
        put: Put<'_, C>,
        mut accept: impl FnMut(&Message<'_>) -> Option<R>,
    ) -> Result<R, Error> {
        // Whether it is there can always be asked.
        let needs = (!request.is_bus() && request != Message::GetDeviceInfo).then_some(device);
        if let Some(device) = needs.filter(|device| self.is_removed(*device)) {
            return Err(Error::NoDevice(device));
        }
        let id = self.start(name, device, &request, put, &mut |_, _| {})?;
        let mut result = None;
        let outcome = self.collect(needs, &mut |answered, message| {
            if answered == id {
                result = Some(accept(message));
            }
        });
        self.requester.cancel(id);
        match (result, outcome) {
            (Some(Some(answer)), _) => Ok(answer),
            (Some(None), _) => Err(Error::BadAnswer { request: name }),
            (None, Err(error)) => Err(error),
            (None, Ok(())) => Err(Error::Timeout { request: name }),
        }
    }

    /// Sends a request; its answer is collected later. Answers to others may come meanwhile.
    fn start(
        &mut self,
        name: &'static str,
        device: DevNum,
        request: &Message<'_>,
        put: Put<'_, C>,
        answered: Answered<'_>,
    ) -> Result<RequestId, Error> {
        let now = self.wait.now();
        let (out, _) = self.buffers.as_mut().split_at_mut(self.max);
        let started = self
            .requester
            .start(now, device, request, self.timeout, out);
        let (id, size) = started.map_err(|error| match error {
            RequestError::Encode(e) => Error::NoRoom {
                request: name,
                need: e.size,
                have: e.room,
            },
            _ => Error::Busy,
        })?;
        match self.send(name, size, now + self.timeout, put, answered) {
            Ok(()) => Ok(id),
            Err(error) => {
                self.requester.cancel(id);
                Err(error)
            }
        }
    }

    /// Receives until each request has an answer or has waited too long, or the device that they `need` was removed.
    fn collect(&mut self, need: Option<DevNum>, answered: Answered<'_>) -> Result<(), Error> {
        loop {
            let busy = self.pump(answered)?;
            if let Some(device) = need.filter(|device| self.is_removed(*device)) {
                return Err(Error::NoDevice(device));
            }
            let now = self.wait.now();
            while self.requester.handle_timeout(now).is_some() {}
            let Some(deadline) = self.requester.poll_timeout() else {
                return Ok(());
            };
            if !busy {
                self.wait
                    .wait(&mut self.channel, Interest::Message, deadline);
            }
        }
    }

    /// Sends the first `size` bytes of the buffers, waiting for room until `deadline`.
    fn send(
        &mut self,
        name: &'static str,
        size: usize,
        deadline: Instant,
        put: Put<'_, C>,
        answered: Answered<'_>,
    ) -> Result<(), Error> {
        loop {
            match put(&mut self.channel, &self.buffers.as_ref()[..size]) {
                Ok(()) => return Ok(self.channel.flush()?),
                Err(ChannelError::Full) => {}
                Err(error) => return Err(error.into()),
            }
            self.channel.flush()?;
            // The other side may be waiting for us to make room for its own messages.
            self.pump(answered)?;
            if self.wait.now() >= deadline {
                return Err(Error::Timeout { request: name });
            }
            self.wait.wait(&mut self.channel, Interest::Room, deadline);
        }
    }

    /// Receives at most [`BURST`] messages without waiting. True if there may be more. The first half of the buffers, where a
    /// message may wait to be sent, stays as it is.
    fn pump(&mut self, answered: Answered<'_>) -> Result<bool, Error> {
        for _ in 0..BURST {
            let (_, incoming) = self.buffers.as_mut().split_at_mut(self.max);
            let Some(received) = self.channel.try_recv(incoming)? else {
                return Ok(false);
            };
            let bytes = incoming.get(..received).unwrap_or(incoming);
            let Ok(frame) = decode(bytes, self.max) else {
                self.malformed = self.malformed.wrapping_add(1);
                continue;
            };
            match self.requester.handle_frame(&frame) {
                Received::Response(id, message) => answered(id, &message),
                Received::Event(frame) => {
                    if let Some(event) = Event::from_frame(&frame) {
                        self.events.push(event);
                        if let Event::Device { device, state } = event {
                            self.note(device, state);
                        }
                    }
                }
                Received::Request(frame) => {
                    let Message::Ping { data } = frame.message else {
                        continue;
                    };
                    let mut pong = [0; PONG_SIZE];
                    if let Ok(size) = frame.response(Message::Pong { data }).encode(&mut pong) {
                        // Whoever leaves no room for the answer does not get one.
                        match self.channel.try_send(&pong[..size]) {
                            Ok(()) => self.channel.flush()?,
                            Err(ChannelError::Full) => {}
                            Err(error) => return Err(error.into()),
                        }
                    }
                }
                Received::Dropped(_) => {}
            }
        }
        Ok(true)
    }
}
