// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The conversation with a daemon: requests in, messages out; messages in, answers out.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::stream::{Incoming, Message};
use crate::wire::{NEED_REPLY, REPLY};
use crate::{Answer, Fault, Request};

/// Which request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// A request that is done.
#[derive(Debug)]
pub struct Done {
    /// Which one.
    pub ticket: Ticket,
    /// What was asked.
    pub request: Request,
    /// What came of it.
    pub answer: Answer,
}

/// The conversation with one daemon.
///
/// One request is under way at a time. Each is confirmed: by its answer; by an acknowledgement, if the daemon has REPLY_ACK; else by the
/// answer to a GET_FEATURES that is asked behind it, as the daemon works in order.
#[derive(Debug)]
pub struct FrontEnd {
    patience: Duration,
    acks: bool,
    line: VecDeque<(Ticket, Request)>,
    asked: Option<Asked>,
    next: u64,
}

#[derive(Debug)]
struct Asked {
    ticket: Ticket,
    request: Request,
    deadline: Instant,
    how: How,
}

/// By what a request is confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Answer,
    Ack,
    /// GET_FEATURES is still to be asked.
    Behind,
    /// It is asked.
    Asked,
}

impl FrontEnd {
    /// Begins a conversation in which each answer may take `patience`.
    pub fn new(patience: Duration) -> Self {
        Self {
            patience,
            acks: false,
            line: VecDeque::new(),
            asked: None,
            next: 0,
        }
    }

    /// REPLY_ACK is in use from now on.
    pub fn use_acks(&mut self) {
        self.acks = true;
    }

    /// Puts a request in line.
    pub fn ask(&mut self, request: Request) -> Ticket {
        let ticket = Ticket(self.next);
        self.next += 1;
        self.line.push_back((ticket, request));
        ticket
    }

    /// Nothing is asked, and nothing is to be.
    pub fn is_idle(&self) -> bool {
        self.line.is_empty() && self.asked.is_none()
    }

    /// How many requests are not done.
    pub fn under_way(&self) -> usize {
        self.line.len() + usize::from(self.asked.is_some())
    }

    /// The next message for the daemon, once the last one was sent.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<Message> {
        if let Some(asked) = &mut self.asked {
            if asked.how != How::Behind {
                return None;
            }
            asked.how = How::Asked;
            return Some(Request::GetFeatures.message(0));
        }
        let (ticket, request) = self.line.pop_front()?;
        let (how, flags) = match (request.is_question(), self.acks) {
            (true, _) => (How::Answer, 0),
            (false, true) => (How::Ack, NEED_REPLY),
            (false, false) => (How::Behind, 0),
        };
        let message = request.message(flags);
        self.asked = Some(Asked {
            ticket,
            request,
            deadline: now + self.patience,
            how,
        });
        Some(message)
    }

    /// Takes what the daemon says.
    ///
    /// # Errors
    /// [`Fault::Unasked`], [`Fault::Answer`], [`Fault::Nonsense`]: the connection is to be closed.
    pub fn handle(&mut self, message: Incoming) -> Result<Done, Fault> {
        let header = message.header;
        let Some(Asked {
            ticket,
            request,
            how,
            ..
        }) = self.asked.take().filter(|asked| asked.how != How::Behind)
        else {
            return Err(Fault::Unasked { id: header.id });
        };
        let question = match how {
            How::Answer | How::Ack => &request,
            How::Behind | How::Asked => &Request::GetFeatures,
        };
        if header.id != question.id()
            || !header.is_of_version()
            || header.flags & REPLY == 0
            || !question.fits(message.body.len())
        {
            return Err(Fault::Answer {
                request: question.name(),
                id: header.id,
                flags: header.flags,
                len: header.len,
            });
        }
        let answer = match (how, question.read(message)?) {
            (How::Ack, Answer::Number(0)) => Answer::Done,
            (How::Ack, Answer::Number(code)) => Answer::Refused(code),
            (How::Asked, _) => Answer::Sent,
            (_, answer) => answer,
        };
        Ok(Done {
            ticket,
            request,
            answer,
        })
    }

    /// When [`check_time`](Self::check_time) has something to say.
    pub fn deadline(&self) -> Option<Instant> {
        self.asked.as_ref().map(|asked| asked.deadline)
    }

    /// Whether an answer is late.
    ///
    /// # Errors
    /// [`Fault::Silent`].
    pub fn check_time(&self, now: Instant) -> Result<(), Fault> {
        match &self.asked {
            Some(asked) if asked.deadline <= now => Err(Fault::Silent {
                request: asked.request.name(),
                time: self.patience,
            }),
            _ => Ok(()),
        }
    }
}
