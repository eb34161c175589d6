// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests on their way, and the responses that belong to them.

use crate::message::{EncodeError, Frame, Kind, Message};
use crate::types::{DevNum, Instant, Token};
use core::time::Duration;
use thiserror::Error;

/// A request of one [`Requester`]; never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

/// Why a request was not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RequestError {
    /// As many requests are outstanding as there can be.
    #[error("too many requests are outstanding")]
    Full,
    /// The message is a response or an event.
    #[error("the message is not a request")]
    NotARequest,
    /// The message does not fit.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

/// What a received frame is to the driver side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received<'a> {
    /// The response to this request.
    Response(RequestId, Message<'a>),
    /// An event of the device or the bus.
    Event(Frame<'a>),
    /// A request of the other side, PING for one: to be answered.
    Request(Frame<'a>),
    /// Nothing to be done.
    Dropped(Unexpected),
}

/// Why a frame was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Unexpected {
    /// A response to no request that is outstanding: too late, twice, or made up.
    #[error("response to no outstanding request")]
    Response,
    /// A message that only drivers send.
    #[error("message that only drivers send")]
    FromDevice,
}

/// What a [`Requester`] has seen. All counts wrap around.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequesterCounters {
    /// Requests started.
    pub requests: u64,
    /// Responses that had a request.
    pub responses: u64,
    /// Events received.
    pub events: u64,
    /// Requests given up for lack of a response.
    pub timeouts: u64,
    /// Frames dropped.
    pub dropped: u64,
}

#[derive(Clone, Copy, Debug)]
struct Outstanding {
    id: RequestId,
    token: Token,
    dev_num: DevNum,
    bus: bool,
    msg_id: u8,
    deadline: Instant,
}

/// Up to `N` requests at a time, over one bus, for any number of devices. It holds no bytes and sends nothing itself.
#[derive(Clone, Debug)]
pub struct Requester<const N: usize> {
    outstanding: [Option<Outstanding>; N],
    last_token: u16,
    next_id: u64,
    counters: RequesterCounters,
}

impl<const N: usize> Default for Requester<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> Requester<N> {
    /// Every request outstanding has a token of its own, and 0 is none.
    const ENOUGH_TOKENS: () = assert!(N > 0 && N < 65535);

    /// Nothing outstanding.
    pub fn new() -> Requester<N> {
        let () = Self::ENOUGH_TOKENS;
        Requester {
            outstanding: [None; N],
            last_token: 0,
            next_id: 0,
            counters: RequesterCounters::default(),
        }
    }

    /// Starts a request: gives it a token, writes it to `out` and gives its size. `out` is as long as the message size of the bus. The caller sends
    /// it; if it cannot, it [`cancel`](Self::cancel)s. Bus messages go to device number 0 whatever `dev_num` says.
    ///
    /// # Errors
    /// [`RequestError`]; then nothing is outstanding.
    pub fn start(
        &mut self,
        now: Instant,
        dev_num: DevNum,
        message: &Message<'_>,
        timeout: Duration,
        out: &mut [u8],
    ) -> Result<(RequestId, usize), RequestError> {
        if message.kind() != Kind::Request {
            return Err(RequestError::NotARequest);
        }
        let free = self
            .outstanding
            .iter()
            .position(Option::is_none)
            .ok_or(RequestError::Full)?;
        let token = self.free_token().ok_or(RequestError::Full)?;
        let bus = message.is_bus();
        let dev_num = if bus { DevNum(0) } else { dev_num };
        let size = Frame::new(dev_num, token, *message).encode(out)?;
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.last_token = token.0;
        self.outstanding[free] = Some(Outstanding {
            id,
            token,
            dev_num,
            bus,
            msg_id: message.id(),
            deadline: now.saturating_add(timeout),
        });
        self.counters.requests = self.counters.requests.wrapping_add(1);
        Ok((id, size))
    }

    /// The token that was not used for longest, as far as it is free.
    fn free_token(&self) -> Option<Token> {
        let mut token = self.last_token;
        for _ in 0..=N {
            token = token.wrapping_add(1).max(1);
            if !self
                .outstanding
                .iter()
                .flatten()
                .any(|o| o.token.0 == token)
            {
                return Some(Token(token));
            }
        }
        None
    }

    /// Takes a frame from the device side in.
    pub fn handle_frame<'a>(&mut self, frame: &Frame<'a>) -> Received<'a> {
        match frame.message.kind() {
            Kind::Response => match self.take(frame) {
                Some(id) => {
                    self.counters.responses = self.counters.responses.wrapping_add(1);
                    Received::Response(id, frame.message)
                }
                None => self.dropped(Unexpected::Response),
            },
            Kind::Event if matches!(frame.message, Message::EventAvail { .. }) => {
                self.dropped(Unexpected::FromDevice)
            }
            Kind::Event => {
                self.counters.events = self.counters.events.wrapping_add(1);
                Received::Event(*frame)
            }
            Kind::Request
                if matches!(
                    frame.message,
                    Message::Ping { .. } | Message::BusSpecific { .. }
                ) =>
            {
                Received::Request(*frame)
            }
            Kind::Request => self.dropped(Unexpected::FromDevice),
        }
    }

    fn dropped<'a>(&mut self, why: Unexpected) -> Received<'a> {
        self.counters.dropped = self.counters.dropped.wrapping_add(1);
        Received::Dropped(why)
    }

    fn take(&mut self, frame: &Frame<'_>) -> Option<RequestId> {
        let bus = frame.message.is_bus();
        let same_kind = |o: &Outstanding| {
            o.bus == bus && o.msg_id == frame.message.id() && (bus || o.dev_num == frame.dev_num)
        };
        let exact = self
            .outstanding
            .iter()
            .position(|o| o.is_some_and(|o| o.token == frame.token && same_kind(&o)));
        let at = exact.or_else(|| {
            // QEMU answers GET_DEVICES and PING with token 0 whatever was sent.
            let lax = matches!(frame.message, Message::Devices(_) | Message::Pong { .. })
                && frame.token == Token(0);
            let candidates = self
                .outstanding
                .iter()
                .enumerate()
                .filter_map(|(i, o)| Some((i, (*o)?)));
            candidates
                .filter(|(_, o)| lax && same_kind(o))
                .min_by_key(|(_, o)| o.id)
                .map(|(i, _)| i)
        })?;
        self.outstanding[at].take().map(|o| o.id)
    }

    /// When [`handle_timeout`](Self::handle_timeout) is to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.outstanding.iter().flatten().map(|o| o.deadline).min()
    }

    /// Gives up one request whose time is over, the longest overdue first. Call until `None`. Its response, if it still comes, is dropped.
    pub fn handle_timeout(&mut self, now: Instant) -> Option<RequestId> {
        let overdue = self
            .outstanding
            .iter_mut()
            .filter(|o| o.is_some_and(|o| o.deadline <= now));
        let id = overdue
            .min_by_key(|o| o.map(|o| (o.deadline, o.id)))?
            .take()?
            .id;
        self.counters.timeouts = self.counters.timeouts.wrapping_add(1);
        Some(id)
    }

    /// Forgets a request; says whether it was outstanding.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        self.outstanding
            .iter_mut()
            .find(|o| o.is_some_and(|o| o.id == id))
            .and_then(Option::take)
            .is_some()
    }

    /// Forgets every request, when the bus is gone.
    pub fn cancel_all(&mut self) {
        self.outstanding = [None; N];
    }

    /// How many requests are outstanding.
    pub fn outstanding(&self) -> usize {
        self.outstanding.iter().flatten().count()
    }

    /// What was counted.
    pub fn counters(&self) -> &RequesterCounters {
        &self.counters
    }
}

#[cfg(test)]
#[path = "requester_test.rs"]
mod tests;
