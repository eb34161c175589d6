// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device served to one client over a socket.

use crate::capabilities::Negotiated;
use crate::device::Device;
use crate::dma::Dma;
use crate::machine::{Answer, Machine};
use crate::receiver::{Next, Receiver};
use crate::shared::Shared;
use crate::socket::receive;
use crate::wire::{HEADER, HeaderError, Malformed};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// What messages have besides their header and data: 16 bytes of a region access, 16 of an access to memory.
const HEAD: usize = 16;
/// The longest message without data: a VERSION, or a full REGION_WRITE_MULTI (4808 bytes).
const MIN_MESSAGE: usize = 8192;
/// QEMU does not take a larger value for an answer.
const MAX_FDS: u32 = 16;
/// QEMU reads a configuration space in one go.
const MIN_XFER: u32 = 4096;
/// QEMU does not take a larger value for an answer.
const MAX_XFER: u32 = 64 << 20;

/// The limits of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// How many descriptors a message of the client may bring: 1 to 16.
    pub max_msg_fds: u32,
    /// The most bytes of a region that are read or written with one message: 4 KiB to 64 MiB.
    pub max_data_xfer_size: u32,
    /// How many pieces of memory the client is told that it may lend at a time. [`Device::map`] has to refuse more than it can take.
    pub max_dma_maps: u32,
    /// How long a call of [`Dma`] takes at most.
    pub dma_timeout: Duration,
}

impl Default for Options {
    /// 16 descriptors, 1 MiB, 65,535 pieces, 3 s.
    fn default() -> Options {
        Options {
            max_msg_fds: MAX_FDS,
            max_data_xfer_size: 1 << 20,
            max_dma_maps: 65_535,
            dma_timeout: Duration::from_secs(3),
        }
    }
}

/// What a turn did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Turn {
    /// How many messages were handled.
    pub handled: u32,
    /// There may be more to do right now: call again without waiting for the socket.
    pub more: bool,
    /// How many panics of the device were caught. Each was answered with EIO; what the device is worth after that, the caller has to know.
    pub panics: u32,
}

/// What to wait for before the next turn, level-triggered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Until there is something to read. Not while the client does not read what it asked for.
    pub read: bool,
    /// Until there is room to write.
    pub write: bool,
}

/// Why a connection has ended.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum End {
    /// The client closed it.
    #[error("closed by the client")]
    Closed,
    /// The client closed it in the middle of a message.
    #[error("closed by the client in the middle of a message")]
    Cut,
    /// What should be a header is none.
    #[error("this is not vfio-user: {0}")]
    Header(#[from] HeaderError),
    /// The system said no.
    #[error("socket: {0}")]
    Os(io::Error),
}

impl From<Errno> for End {
    fn from(errno: Errno) -> End {
        match errno {
            Errno::PIPE | Errno::CONNRESET => End::Closed,
            errno => End::Os(errno.into()),
        }
    }
}

/// What happened on a connection so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Commands.
    pub commands: u64,
    /// Those answered with an error, or that would have been had they asked for an answer.
    pub refused: u64,
    /// Those among the refused that no correct client sends.
    pub malformed: u64,
    /// Panics of the device.
    pub panics: u64,
    /// Answers to nothing that was asked.
    pub stray_replies: u64,
}

/// Serves a device to one client.
///
/// It has no thread and never waits: [`Connection::turn`] is to be called when the socket is ready for [`Connection::interest`]. Dropping it closes the socket and ends all calls of its [`Dma`]s;
/// letting go of the memory and the eventfds of the client is up to the owner of the device.
#[derive(Debug)]
pub struct Connection {
    shared: Arc<Shared>,
    receiver: Receiver,
    machine: Machine,
    /// Where answers are put together.
    out: Vec<u8>,
    dma_timeout: Duration,
}

impl Connection {
    /// Takes a socket that a client has connected to. Limits outside of their ranges are brought into them.
    ///
    /// # Errors
    ///
    /// The system has no descriptor left.
    pub fn new(socket: UnixStream, mut options: Options) -> io::Result<Connection> {
        options.max_msg_fds = options.max_msg_fds.clamp(1, MAX_FDS);
        options.max_data_xfer_size = options.max_data_xfer_size.clamp(MIN_XFER, MAX_XFER);
        let data = usize::try_from(options.max_data_xfer_size).unwrap_or(usize::MAX);
        let max_message = MIN_MESSAGE.max(HEADER + HEAD + data);
        let max_fds = usize::try_from(options.max_msg_fds).unwrap_or(1);
        Ok(Connection {
            shared: Arc::new(Shared::new(socket)?),
            receiver: Receiver::new(max_message, max_fds),
            dma_timeout: options.dma_timeout,
            machine: Machine::new(options),
            out: Vec::new(),
        })
    }

    /// A way to the memory of the client that came without descriptors.
    pub fn dma(&self) -> Dma {
        Dma::new(Arc::clone(&self.shared), self.dma_timeout)
    }

    /// What was agreed on with the client, once it has said its version.
    pub fn negotiated(&self) -> Option<Negotiated> {
        self.machine.negotiated()
    }

    /// What happened so far.
    pub fn counters(&self) -> Counters {
        self.machine.counters
    }

    /// What to wait for.
    pub fn interest(&self) -> Interest {
        let (queued, too_much) = self.shared.backlog();
        Interest {
            read: !too_much,
            write: queued > 0,
        }
    }

    /// Reads, dispatches and answers up to `budget` messages, or as many as there are. Never waits.
    ///
    /// # Errors
    ///
    /// The connection has ended. There is nothing to do but to drop it.
    pub fn turn(&mut self, device: &mut dyn Device, budget: u32) -> Result<Turn, End> {
        let result = self.try_turn(device, budget.max(1));
        if result.is_err() {
            self.shared.end();
        }
        result
    }

    fn try_turn(&mut self, device: &mut dyn Device, budget: u32) -> Result<Turn, End> {
        let mut turn = Turn::default();
        let panics = self.machine.counters.panics;
        self.shared.flush()?;
        // A read may bring nothing to handle, so reads are counted as well.
        let mut reads = 0;
        let mut drained = false;
        while !self.shared.backlog().1 {
            if turn.handled >= budget || reads > budget {
                turn.more = true;
                break;
            }
            if self.handle_next(device)? {
                turn.handled += 1;
            } else if drained {
                break;
            } else {
                reads += 1;
                match self.read()? {
                    Some(likely_more) => drained = !likely_more,
                    None => break,
                }
            }
        }
        let panics = self.machine.counters.panics - panics;
        turn.panics = u32::try_from(panics).unwrap_or(u32::MAX);
        Ok(turn)
    }

    /// Reads once. `None` if there was nothing, otherwise whether there is likely to be more.
    fn read(&mut self) -> Result<Option<bool>, End> {
        let space = self.receiver.space();
        let room = space.len();
        match receive(self.shared.socket.as_fd(), space) {
            Ok(received) if received.bytes > 0 => {
                // A read stops at descriptors even if there is more behind.
                let likely_more = received.bytes == room || !received.fds.is_empty();
                self.receiver.received(received);
                Ok(Some(likely_more))
            }
            Ok(_) if self.receiver.is_partial() => Err(End::Cut),
            Ok(_) => Err(End::Closed),
            Err(Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Handles a message, if there is one.
    fn handle_next(&mut self, device: &mut dyn Device) -> Result<bool, End> {
        let answer = match self.receiver.next()? {
            Next::Nothing => return Ok(false),
            Next::TooLong(header) if header.is_reply() => {
                self.machine.reply(self.shared.answer(&header, &[]));
                Answer::None
            }
            Next::TooLong(header) => self.machine.too_long(&header, &mut self.out),
            Next::Message(message) if message.header.is_reply() => {
                let expected = self.shared.answer(&message.header, message.payload);
                self.machine.reply(expected);
                Answer::None
            }
            Next::Message(message) => {
                let fds = if message.lost_fds {
                    Err(Malformed::LostDescriptors)
                } else {
                    Ok(message.fds)
                };
                let (header, payload) = (message.header, message.payload);
                let unknown = self.machine.negotiated().is_none();
                let answer = self
                    .machine
                    .command(&header, payload, fds, device, &mut self.out);
                if let Some(negotiated) = self.machine.negotiated().filter(|_| unknown) {
                    self.shared.set_negotiated(negotiated);
                }
                answer
            }
        };
        if let Answer::Send(fd) = answer {
            self.shared.send(&self.out, fd)?;
        }
        if self.out.capacity() > MAX_KEPT {
            self.out = Vec::new();
        }
        Ok(true)
    }
}

/// The largest room for answers that is kept between them.
const MAX_KEPT: usize = 64 * 1024;

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.socket.as_fd()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.end();
        // A Dma that lives longer keeps the socket: the client is to see the end now.
        let _ = self.shared.socket.shutdown(std::net::Shutdown::Both);
    }
}
