// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the thread that serves a client and those that wait for its memory have in common: the way out, and the list of who waits.
//!
//! One message is one `send`. A socket takes a message of up to half its buffer whole or not at all, and QEMU gives up on a connection where it finds half a header.

use crate::capabilities::Negotiated;
use crate::dma::{Layout, Transfer};
use crate::socket::transmit;
use crate::wire::Header;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use thiserror::Error;

/// With more bytes than these waiting to be sent, no further command is taken.
const MAX_QUEUED: usize = 64 * 1024;
/// How many transfers may be under way at a time.
const MAX_TRANSFERS: usize = 256;

/// Why memory of the client was not read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DmaError {
    /// The client says no: EFAULT, ENODEV or EPERM for memory that is not there or may not be used so. EPROTO if its answer makes no sense, ENOTCONN if it has not said its version yet, EBUSY if
    /// too many ask at a time.
    #[error("refused by the client: {0}")]
    Refused(Errno),
    /// The client does not answer.
    #[error("the client does not answer")]
    TimedOut,
    /// The connection has ended.
    #[error("the connection has ended")]
    Gone,
    /// [`crate::Dma::cancel`] was called.
    #[error("cancelled")]
    Cancelled,
}

/// A message on its way out.
#[derive(Debug)]
struct Packet {
    bytes: Vec<u8>,
    sent: usize,
    fd: Option<OwnedFd>,
    /// The transfer it asks for.
    transfer: Option<u16>,
}

#[derive(Debug)]
struct Waiting {
    transfer: Transfer,
    answer: Option<Result<Vec<u8>, DmaError>>,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Packet>,
    /// Bytes in `queue`.
    queued: usize,
    ended: bool,
    /// How often everybody was sent home.
    cancels: u64,
    /// How many wait for room in the socket.
    pollers: u32,
    next_id: u16,
    waiting: HashMap<u16, Waiting>,
    negotiated: Option<Negotiated>,
    layout: Option<Layout>,
}

/// The way out of a connection.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) socket: UnixStream,
    state: Mutex<State>,
    answered: Condvar,
    /// Readable while those who wait for room in the socket have to look up.
    look_up: OwnedFd,
}

impl Shared {
    pub(crate) fn new(socket: UnixStream) -> io::Result<Shared> {
        socket.set_nonblocking(true)?;
        Ok(Shared {
            socket,
            state: Mutex::default(),
            answered: Condvar::new(),
            look_up: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Nothing that could panic happens under the lock in between two consistent states.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a message, or keeps what does not go.
    pub(crate) fn send(&self, bytes: &[u8], fd: Option<OwnedFd>) -> rustix::io::Result<()> {
        let mut state = self.lock();
        state.flush(&self.socket)?;
        let mut sent = 0;
        if state.queue.is_empty() {
            let fd = fd.as_ref().map(AsFd::as_fd);
            match transmit(self.socket.as_fd(), bytes, fd) {
                Ok(len) => sent = len,
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(error),
            }
        }
        if sent < bytes.len() {
            state.enqueue(Packet {
                bytes: bytes.to_vec(),
                sent,
                fd: fd.filter(|_| sent == 0),
                transfer: None,
            });
        }
        Ok(())
    }

    /// Sends what waits, as far as it goes.
    pub(crate) fn flush(&self) -> rustix::io::Result<()> {
        self.lock().flush(&self.socket)
    }

    /// Bytes that wait to be sent, and whether they are too many to go on.
    pub(crate) fn backlog(&self) -> (usize, bool) {
        let queued = self.lock().queued;
        (queued, queued > MAX_QUEUED)
    }

    pub(crate) fn set_negotiated(&self, negotiated: Negotiated) {
        self.lock().negotiated = Some(negotiated);
    }

    pub(crate) fn negotiated(&self) -> Option<Negotiated> {
        self.lock().negotiated
    }

    pub(crate) fn layout(&self) -> Option<Layout> {
        self.lock().layout
    }

    pub(crate) fn set_layout(&self, layout: Layout) {
        self.lock().layout = Some(layout);
    }

    /// Nobody is answered any more.
    pub(crate) fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        state.queue.clear();
        state.queued = 0;
        self.wake(&state);
    }

    /// Sends home who waits now.
    pub(crate) fn cancel(&self) {
        let mut state = self.lock();
        state.cancels += 1;
        self.wake(&state);
    }

    pub(crate) fn cancels(&self) -> u64 {
        self.lock().cancels
    }

    fn wake(&self, state: &State) {
        self.answered.notify_all();
        if state.pollers > 0 {
            // It fails only if it is readable already.
            let _ = rustix::io::write(&self.look_up, &1u64.to_ne_bytes());
        }
    }

    /// Takes the answer to a transfer; false if nobody waits for it.
    pub(crate) fn answer(&self, header: &Header, payload: &[u8]) -> bool {
        let mut state = self.lock();
        let Some(waiting) = state.waiting.get_mut(&header.id) else {
            return false;
        };
        if waiting.transfer.command != header.command || waiting.answer.is_some() {
            return false;
        }
        waiting.answer = Some(waiting.transfer.answer(header, payload));
        self.answered.notify_all();
        true
    }

    /// Asks the client for a transfer and waits for the answer, until `deadline` or until the count of cancels is another than `cancels`.
    pub(crate) fn transfer(
        &self,
        transfer: Transfer,
        data: &[u8],
        cancels: u64,
        deadline: Instant,
    ) -> Result<Vec<u8>, DmaError> {
        let mut state = self.lock();
        if state.ended {
            return Err(DmaError::Gone);
        }
        if state.waiting.len() >= MAX_TRANSFERS {
            return Err(DmaError::Refused(Errno::BUSY));
        }
        while state.waiting.contains_key(&state.next_id) {
            state.next_id = state.next_id.wrapping_add(1);
        }
        let id = state.next_id;
        state.next_id = id.wrapping_add(1);
        let waiting = Waiting {
            transfer,
            answer: None,
        };
        state.waiting.insert(id, waiting);
        state.enqueue(Packet {
            bytes: transfer.message(id, data),
            sent: 0,
            fd: None,
            transfer: Some(id),
        });
        let result = loop {
            if let Some(result) = state.result(id, cancels) {
                break result;
            }
            // Who serves the client may be asleep and know nothing of this message: it is sent from here.
            if state.flush(&self.socket).is_err() {
                break Err(DmaError::Gone);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Err(DmaError::TimedOut);
            }
            state = if state.is_queued(id) {
                self.wait_for_room(state, left)
            } else {
                let waited = self.answered.wait_timeout(state, left);
                waited.unwrap_or_else(PoisonError::into_inner).0
            };
        };
        state.waiting.remove(&id);
        state.forget(id);
        result
    }

    fn wait_for_room<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        left: Duration,
    ) -> MutexGuard<'a, State> {
        state.pollers += 1;
        drop(state);
        let mut fds = [
            PollFd::new(&self.socket, PollFlags::OUT),
            PollFd::new(&self.look_up, PollFlags::IN),
        ];
        // Whatever ends it, interruptions included: what to do then is seen from the state.
        let _ = poll(&mut fds, Timespec::try_from(left).ok().as_ref());
        let mut state = self.lock();
        state.pollers -= 1;
        if state.pollers == 0 {
            let _ = rustix::io::read(&self.look_up, &mut [0; 8]);
        }
        state
    }
}

impl State {
    fn enqueue(&mut self, packet: Packet) {
        self.queued += packet.bytes.len() - packet.sent;
        self.queue.push_back(packet);
    }

    fn flush(&mut self, socket: &UnixStream) -> rustix::io::Result<()> {
        while let Some(packet) = self.queue.front_mut() {
            let fd = packet.fd.as_ref().map(AsFd::as_fd);
            match transmit(socket.as_fd(), &packet.bytes[packet.sent..], fd) {
                Ok(len) => {
                    packet.fd = None;
                    packet.sent += len;
                    self.queued -= len;
                    if packet.sent == packet.bytes.len() {
                        self.queue.pop_front();
                    }
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn is_queued(&self, id: u16) -> bool {
        self.queue.iter().any(|packet| packet.transfer == Some(id))
    }

    /// What has become of a transfer, if it is decided.
    fn result(&mut self, id: u16, cancels: u64) -> Option<Result<Vec<u8>, DmaError>> {
        if self.ended {
            return Some(Err(DmaError::Gone));
        }
        if self.cancels != cancels {
            return Some(Err(DmaError::Cancelled));
        }
        self.waiting.get_mut(&id)?.answer.take()
    }

    /// Nobody waits for a transfer any more: it need not be sent, unless some of it was.
    fn forget(&mut self, id: u16) {
        let unsent = |packet: &Packet| packet.transfer == Some(id) && packet.sent == 0;
        self.queue.retain(|packet| !unsent(packet));
        self.queued = self
            .queue
            .iter()
            .map(|packet| packet.bytes.len() - packet.sent)
            .sum();
    }
}
