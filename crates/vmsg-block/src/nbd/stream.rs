// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One connection to a server, once the export is known: requests go out, replies come in, data straight from and to where it
//! belongs.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use rustix::net::{RecvFlags, SendFlags};
use vmsg_mem::Pieces;

use super::ProtocolError;
use super::jobs::Jobs;
use super::negotiate::Export;
use super::replies::{Event, Expected, LONGEST_HEAD, Replies, UnderWay};
use super::wire;

/// Heads of requests that are sent together, in bytes.
const HEADS: usize = 4096;
/// Bytes that are received at once beside data.
const INPUT: usize = 8192;
const _: () = assert!(INPUT >= LONGEST_HEAD);
/// Steps after which others get their turn.
const MOST_STEPS: usize = 256;
/// Bytes of data after which others get their turn.
const MOST_BYTES: usize = 8 << 20;

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("the server has closed the connection")]
    Closed,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the server does not keep to the protocol: {0}")]
    Protocol(#[from] ProtocolError),
    #[error("the server is shutting down")]
    Shutdown,
    #[error("no answer in {0:?}")]
    Silent(std::time::Duration),
}

/// What was done by one call.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Moved {
    pub(super) bytes: usize,
    pub(super) answers: usize,
    /// There may be more, although the socket does not say so.
    pub(super) more: bool,
}

/// Data of a request that is being sent.
#[derive(Debug)]
struct Body {
    part: usize,
    cookie: u64,
    sent: u32,
    len: u32,
}

/// Data of a reply that is being received.
#[derive(Debug)]
struct Taking {
    cookie: u64,
    at: u32,
    left: u32,
}

#[derive(Debug)]
pub(super) struct Stream {
    export: Export,
    replies: Replies,
    input: Box<[u8]>,
    /// What of `input` was received and not yet looked at.
    begin: usize,
    end: usize,
    taking: Option<Taking>,
    heads: Vec<u8>,
    heads_sent: usize,
    body: Option<Body>,
}

/// The requests that a reply may be to: all but the one whose data is not yet sent.
struct Answerable<'j>(&'j mut Jobs, Option<u64>);

impl UnderWay for Answerable<'_> {
    fn get(&mut self, cookie: u64) -> Option<&mut Expected> {
        if self.1 == Some(cookie) {
            return None;
        }
        self.0.get(cookie)
    }
}

impl Stream {
    pub(super) fn new(export: Export) -> Self {
        Self {
            replies: Replies::new(export.structured),
            export,
            input: vec![0; INPUT].into(),
            begin: 0,
            end: 0,
            taking: None,
            heads: Vec::with_capacity(HEADS),
            heads_sent: 0,
            body: None,
        }
    }

    /// Something is left that the socket did not take.
    pub(super) fn has_unsent(&self) -> bool {
        self.heads_sent < self.heads.len() || self.body.is_some()
    }

    /// The part whose data is being sent.
    pub(super) fn sending(&self) -> Option<usize> {
        self.body.as_ref().map(|body| body.part)
    }

    /// Sends what there is, as far as the socket takes it.
    pub(super) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        jobs: &mut Jobs,
        now: Instant,
    ) -> Result<Moved, Lost> {
        let mut moved = Moved::default();
        loop {
            self.fill(jobs, now);
            if !self.has_unsent() {
                return Ok(moved);
            }
            if moved.bytes >= MOST_BYTES {
                // The socket is writable, and says so.
                return Ok(moved);
            }
            let heads = &self.heads[self.heads_sent..];
            let data = match &self.body {
                Some(body) => jobs.data(body.part, body.sent),
                None => Pieces::EMPTY,
            };
            let sent = match data.send_from(socket, heads, SendFlags::DONTWAIT) {
                Ok(sent) => sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(moved),
                Err(error) => return Err(error.into()),
            };
            moved.bytes += sent;
            let of_heads = sent.min(heads.len());
            self.heads_sent += of_heads;
            if self.heads_sent == self.heads.len() {
                self.heads.clear();
                self.heads_sent = 0;
            }
            if let Some(body) = &mut self.body {
                body.sent += u32::try_from(sent - of_heads).unwrap_or(u32::MAX);
                if body.sent >= body.len {
                    self.body = None;
                }
            }
        }
    }

    /// Takes heads of requests until one with data is among them.
    fn fill(&mut self, jobs: &mut Jobs, now: Instant) {
        while self.body.is_none() && self.heads.len() + wire::REQUEST_LEN <= HEADS {
            let Some((part, header)) = jobs.next(&self.export, now) else {
                return;
            };
            self.heads.extend_from_slice(&header.to_bytes());
            if header.command == wire::CMD_WRITE {
                self.body = Some(Body {
                    part,
                    cookie: header.cookie,
                    sent: 0,
                    len: header.len,
                });
            }
        }
    }

    /// Receives what is there, up to what others can wait for.
    pub(super) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        jobs: &mut Jobs,
        now: Instant,
    ) -> Result<Moved, Lost> {
        let mut moved = Moved::default();
        for _ in 0..MOST_STEPS {
            if moved.bytes >= MOST_BYTES {
                break;
            }
            let step = if self.taking.is_some() {
                self.take(socket, jobs)?
            } else {
                match self.look(jobs, now, &mut moved)? {
                    true => continue,
                    false => self.more(socket)?,
                }
            };
            match step {
                Some(bytes) => moved.bytes += bytes,
                None => return Ok(moved),
            }
        }
        moved.more = self.begin < self.end;
        Ok(moved)
    }

    /// Looks at what was received. False if more is needed.
    fn look(&mut self, jobs: &mut Jobs, now: Instant, moved: &mut Moved) -> Result<bool, Lost> {
        let unsent = self.body.as_ref().map(|body| body.cookie);
        let bytes = &self.input[self.begin..self.end];
        let Some((len, event)) = self.replies.next(bytes, &mut Answerable(jobs, unsent))? else {
            return Ok(false);
        };
        self.begin += len;
        match event {
            Event::Data { cookie, at, len } => {
                self.taking = Some(Taking {
                    cookie,
                    at,
                    left: len,
                });
            }
            Event::Zeroes { cookie, at, len } => {
                if let Some(part) = jobs.find(cookie) {
                    let len = usize::try_from(len).unwrap_or(usize::MAX);
                    fill_with_zeroes(jobs.data(part, at).take(len));
                }
            }
            Event::Failed {
                cookie,
                error,
                text,
            } => {
                if error == wire::ESHUTDOWN {
                    return Err(Lost::Shutdown);
                }
                if let Some(part) = jobs.find(cookie) {
                    jobs.failed(part, meaning(error, text));
                }
            }
            Event::Done { cookie } => {
                if let Some(part) = jobs.find(cookie) {
                    jobs.answered(part, &self.export, now);
                    moved.answers += 1;
                }
            }
        }
        Ok(true)
    }

    /// Receives into `input`. `None` if nothing is there.
    fn more(&mut self, socket: BorrowedFd<'_>) -> Result<Option<usize>, Lost> {
        self.input.copy_within(self.begin..self.end, 0);
        self.end -= self.begin;
        self.begin = 0;
        let free = &mut self.input[self.end..];
        let received = Pieces::EMPTY.recv_into(socket, free, RecvFlags::DONTWAIT);
        let received = something(received)?;
        self.end += received.unwrap_or(0);
        Ok(received)
    }

    /// Receives data to where it belongs. `None` if nothing is there.
    fn take(&mut self, socket: BorrowedFd<'_>, jobs: &Jobs) -> Result<Option<usize>, Lost> {
        let Some(taking) = &mut self.taking else {
            return Ok(Some(0));
        };
        let left = usize::try_from(taking.left).unwrap_or(usize::MAX);
        let part = jobs.find(taking.cookie);
        // Of requests that nobody waits for any more there is no data.
        let to = part
            .map_or(Pieces::EMPTY, |part| jobs.data(part, taking.at))
            .take(left);
        let there = self.end - self.begin;
        let taken = if there > 0 {
            let taken = there.min(left);
            to.write(&self.input[self.begin..][..taken]);
            self.begin += taken;
            taken
        } else if to.is_empty() {
            (self.begin, self.end) = (0, 0);
            let sink = left.min(INPUT);
            let received =
                Pieces::EMPTY.recv_into(socket, &mut self.input[..sink], RecvFlags::DONTWAIT);
            match something(received)? {
                Some(taken) => taken,
                None => return Ok(None),
            }
        } else {
            (self.begin, self.end) = (0, 0);
            // What follows comes along, unless the data ends in the middle of the memory for it.
            let received = if to.len() == left {
                to.read_between(&mut [], &mut self.input, socket)
            } else {
                to.read_from(socket)
            };
            match something(received)? {
                Some(received) => {
                    let taken = received.min(to.len());
                    self.end = received - taken;
                    taken
                }
                None => return Ok(None),
            }
        };
        let count = u32::try_from(taken).unwrap_or(u32::MAX);
        taking.at = taking.at.saturating_add(count);
        taking.left = taking.left.saturating_sub(count);
        if taking.left == 0 {
            self.taking = None;
        }
        Ok(Some(taken))
    }
}

/// The end of the stream is an error, and that nothing is there is none.
fn something(received: io::Result<usize>) -> Result<Option<usize>, Lost> {
    match received {
        Ok(0) => Err(Lost::Closed),
        Ok(received) => Ok(Some(received)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn fill_with_zeroes(mut pieces: Pieces<'_>) {
    const ZEROES: &[u8] = &[0; 4096];
    while !pieces.is_empty() {
        let filled = pieces.write(&ZEROES[..ZEROES.len().min(pieces.len())]);
        if filled == 0 {
            return;
        }
        pieces = pieces.skip(filled);
    }
}

/// The numbers of the protocol are those of Linux; others are to be taken as EINVAL.
fn meaning(error: u32, text: String) -> io::Error {
    let number = match error {
        1 | 5 | 12 | 22 | 28 | 75 | 95 => i32::try_from(error).unwrap_or(22),
        _ => 22,
    };
    let meaning = io::Error::from_raw_os_error(number);
    if text.is_empty() {
        meaning
    } else {
        io::Error::new(meaning.kind(), format!("{meaning}: {text}"))
    }
}
