// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One end of a connection: two message queues, a doorbell each way, and a way
//! for messages with file descriptors. The same code for every bus of ours;
//! docs/bus-unix.md §3, §4.

use crate::bell::Bell;
use crate::carrier::Carrier;
use crate::memory::Part;
use crate::queue::Queue;
use crate::{Capabilities, Counters, Peer, WakeFds};
use rustix::event::{Timespec, epoll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};
use virtio_msg::ChannelError;
use vmsg_mem::spsc::{Consumer, Layout, Producer, PushError};

/// The most file descriptors with one message.
pub const MAX_FDS: usize = 4;

/// Stands in the queue for a message that went another way because of its descriptors.
pub(crate) const MARKER: [u8; 8] = [0x02, crate::control::id::MARKER, 0, 0, 0, 0, 8, 0];

/// Messages are published without being asked for when so many wait.
const PUBLISH_AT_LEAST_EVERY: u32 = 64;

/// Where the message queues are.
pub(crate) enum Queues {
    /// In fresh memory, with arm flags.
    Fresh {
        outgoing: Part,
        incoming: Part,
        slot_size: usize,
    },
    /// Going on from where they stand.
    #[cfg(feature = "linux-user")]
    Resumed {
        tx: Producer<Part>,
        rx: Consumer<Part>,
        files: [std::sync::Arc<vmsg_mem::Mapping>; 2],
    },
    /// In memory of which [`Bell::Port`] knows whether it is still there.
    #[cfg(feature = "ivshmem")]
    Shared {
        tx: Producer<Part>,
        rx: Consumer<Part>,
    },
    /// The same in the AMP layout.
    #[cfg(feature = "ivshmem")]
    Amp(vmsg_mem::amp::Queue<Part>),
}

/// How long messages are in the queue.
#[derive(Clone, Copy)]
pub(crate) enum Framing {
    /// As their header says.
    Sized,
    /// Filled up with zeros to so many bytes when they are sent; received as their header says.
    #[cfg(feature = "linux-user")]
    Padded(usize),
    /// All alike.
    #[cfg(feature = "linux-user")]
    Fixed(usize),
}

impl Framing {
    /// Bytes of every message, if they are all alike.
    #[inline]
    fn fixed(self) -> Option<usize> {
        match self {
            #[cfg(feature = "linux-user")]
            Self::Fixed(size) => Some(size),
            _ => None,
        }
    }
}

/// Everything an end is made of.
pub(crate) struct Parts {
    pub(crate) queues: Queues,
    pub(crate) framing: Framing,
    /// Wakes the other side.
    pub(crate) theirs: Bell,
    /// Wakes this side.
    pub(crate) ours: Bell,
    pub(crate) carrier: Carrier,
    pub(crate) capabilities: Capabilities,
    pub(crate) peer: Peer,
    pub(crate) epoch: u64,
}

pub(crate) struct Link {
    queue: Queue,
    framing: Framing,
    /// What the queues lie in, if that can shrink.
    files: Option<[std::sync::Arc<vmsg_mem::Mapping>; 2]>,
    theirs: Bell,
    ours: Bell,
    carrier: Carrier,
    capabilities: Capabilities,
    peer: Peer,
    epoch: u64,
    counters: Counters,
    /// Why the connection is over.
    over: Option<ChannelError>,
    /// A packet did not go out since the last message came in.
    carrier_full: bool,
    /// Watches `ours` and the carrier, once somebody waits.
    epoll: Option<OwnedFd>,
}

impl Link {
    pub(crate) fn new(parts: Parts) -> Result<Self, vmsg_mem::Error> {
        let (queue, files) = match parts.queues {
            Queues::Fresh {
                outgoing,
                incoming,
                slot_size,
            } => {
                let layout = Layout::armed(slot_size);
                let tx = Producer::new(outgoing, layout)?;
                let rx = Consumer::new(incoming, layout)?;
                (Queue::Pair { tx, rx }, None)
            }
            #[cfg(feature = "linux-user")]
            Queues::Resumed { tx, rx, files } => (Queue::Pair { tx, rx }, Some(files)),
            #[cfg(feature = "ivshmem")]
            Queues::Shared { tx, rx } => (Queue::Pair { tx, rx }, None),
            #[cfg(feature = "ivshmem")]
            Queues::Amp(queue) => (Queue::Amp(queue), None),
        };
        Ok(Self {
            queue,
            framing: parts.framing,
            files,
            theirs: parts.theirs,
            ours: parts.ours,
            carrier: parts.carrier,
            capabilities: parts.capabilities,
            peer: parts.peer,
            epoch: parts.epoch,
            counters: Counters::default(),
            over: None,
            carrier_full: false,
            epoll: None,
        })
    }

    pub(crate) fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.over.is_some()
    }

    fn alive(&self) -> Result<(), ChannelError> {
        self.over.map_or(Ok(()), Err)
    }

    /// Ends the connection because of what the other side did.
    #[cold]
    fn fail(&mut self, why: &'static str) -> ChannelError {
        let error = ChannelError::Corrupt(why);
        if self.over.is_none() {
            // Whoever uses the bus is told by the error, and knows how often that may be logged.
            tracing::debug!(peer = %self.peer, why, "closing the connection: the other side broke the bus");
            self.over = Some(error);
            self.end();
        }
        error
    }

    /// Tells the other side that nothing more will come.
    fn end(&mut self) {
        self.carrier.close();
        // Not every carrier can be waited for: who sleeps has to look again.
        if self.carrier.hangup_fd().is_none() {
            let _ = self.theirs.ring();
        }
    }

    pub(crate) fn close(&mut self) {
        if self.over.is_none() {
            let _ = self.flush();
            self.over.get_or_insert(ChannelError::Closed);
            self.end();
        }
    }

    #[inline]
    pub(crate) fn try_send(&mut self, message: &[u8]) -> Result<(), ChannelError> {
        if message.len() > self.capabilities.max_message_size || message.starts_with(&MARKER[..2]) {
            return Err(ChannelError::TooLong);
        }
        self.push(message)
    }

    #[inline]
    fn push(&mut self, message: &[u8]) -> Result<(), ChannelError> {
        self.alive()?;
        let pushed = match self.framing {
            Framing::Sized => self.queue.try_push(message),
            #[cfg(feature = "linux-user")]
            Framing::Fixed(_) => self.queue.try_push(message),
            #[cfg(feature = "linux-user")]
            Framing::Padded(size) => {
                let mut slot = [0; 64];
                match slot.get_mut(..message.len()) {
                    Some(start) => start.copy_from_slice(message),
                    None => return Err(ChannelError::TooLong),
                }
                self.queue.try_push(&slot[..size.clamp(message.len(), 64)])
            }
        };
        match pushed {
            Ok(()) => self.ours.room_found(),
            Err(PushError::Full) => {
                self.counters.full += 1;
                self.ours.drain();
                // What is in the way may not even be visible yet.
                self.flush()?;
                return Err(ChannelError::Full);
            }
            Err(PushError::TooLong) => return Err(ChannelError::TooLong),
            Err(PushError::Corrupt(_)) => return Err(self.fail("impossible index of the consumer")),
        }
        self.counters.sent += 1;
        // The flush that must follow looks once more whether the other side sleeps.
        if self.queue.unpublished() >= PUBLISH_AT_LEAST_EVERY && self.queue.publish_early() {
            return self.ring();
        }
        Ok(())
    }

    pub(crate) fn try_send_with_fds(
        &mut self,
        message: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        if fds.is_empty() {
            return self.try_send(message);
        }
        if !self.capabilities.passes_fds
            || fds.len() > MAX_FDS
            || message.len() > self.capabilities.max_message_size
            || message.len() < MARKER.len()
        {
            return Err(ChannelError::TooLong);
        }
        self.alive()?;
        // Once the packet is out there must be a slot for its marker.
        self.flush()?;
        if self.queue.arm_for_room() {
            self.counters.full += 1;
            return Err(ChannelError::Full);
        }
        match self.carrier.send(message, fds) {
            Ok(true) => {}
            Ok(false) => {
                self.counters.full += 1;
                self.carrier_full = true;
                return Err(ChannelError::Full);
            }
            Err(_) => {
                self.over.get_or_insert(ChannelError::Closed);
                return Err(ChannelError::Closed);
            }
        }
        match self.push(&MARKER) {
            Ok(()) => {
                self.counters.fds_sent += fds.len() as u64;
                self.flush()
            }
            Err(ChannelError::Full) => Err(self.fail("the consumer took room back")),
            Err(error) => Err(error),
        }
    }

    #[inline]
    pub(crate) fn flush(&mut self) -> Result<(), ChannelError> {
        self.alive()?;
        if self.queue.publish() {
            self.ring()
        } else {
            Ok(())
        }
    }

    fn ring(&mut self) -> Result<(), ChannelError> {
        self.counters.rings += 1;
        match self.theirs.ring() {
            Ok(()) => Ok(()),
            Err(why) => Err(self.fail(why)),
        }
    }

    #[inline]
    pub(crate) fn try_recv(
        &mut self,
        buf: &mut [u8],
        fds: Option<&mut Vec<OwnedFd>>,
    ) -> Result<Option<usize>, ChannelError> {
        let max = self.capabilities.max_message_size;
        let Some(buf) = buf.get_mut(..max) else {
            return Err(ChannelError::TooLong);
        };
        if let Some(error @ ChannelError::Corrupt(_)) = self.over {
            return Err(error);
        }
        // A size that cannot be is for the decoder to refuse and to count.
        let fixed = self.framing.fixed();
        let size_of = |header: &[u8; 8]| {
            if let Some(size) = fixed {
                return size;
            }
            let size = usize::from(u16::from_le_bytes([header[6], header[7]]));
            if (8..=max).contains(&size) { size } else { max }
        };
        let popped = match self.queue.try_pop_sized(buf, size_of) {
            Ok(popped) => popped,
            Err(_) => return Err(self.fail("impossible index of the producer")),
        };
        // Also when nothing was popped: the producer may have asked for room since. After the end nobody waits.
        if self.queue.release() && self.over.is_none() {
            self.ring()?;
        }
        let Some(size) = popped else {
            return match self.over {
                Some(error) => Err(error),
                None => {
                    // The next call tells, once there is nothing more to receive.
                    if self.ours.polled() {
                        self.look_for_end();
                    }
                    Ok(None)
                }
            };
        };
        if self.is_lost() {
            return Err(self.fail("the file of a queue has shrunk, or its disk is full"));
        }
        self.counters.received += 1;
        self.ours.received(buf);
        self.carrier_full = false;
        if self.capabilities.passes_fds && buf.starts_with(&MARKER) {
            return self.recv_packet(buf, fds).map(Some);
        }
        Ok(Some(size))
    }

    /// Whether what this side reads and writes is not what the other one does.
    #[inline]
    fn is_lost(&self) -> bool {
        let files = self.files.as_ref();
        files.is_some_and(|files| files.iter().any(|file| file.is_lost()))
    }

    /// Receives the message a marker stands for.
    #[cold]
    fn recv_packet(
        &mut self,
        buf: &mut [u8],
        fds: Option<&mut Vec<OwnedFd>>,
    ) -> Result<usize, ChannelError> {
        let mut unwanted = Vec::new();
        let wanted = fds.is_some();
        let fds = fds.unwrap_or(&mut unwanted);
        fds.clear();
        let packet = match self.carrier.recv(buf, fds) {
            Ok(Some(packet)) => packet,
            Ok(None) => return Err(self.fail("a marker without its message")),
            Err(why) => return Err(self.fail(why)),
        };
        if packet.len < MARKER.len() {
            return Err(self.fail("a message without a header"));
        }
        let came = fds.len() as u64;
        self.counters.fds_received += came;
        if packet.fds_lost {
            // Half a set would be worse than none.
            fds.clear();
        }
        if packet.fds_lost || !wanted {
            if self.counters.fds_dropped == 0 {
                tracing::warn!(peer = %self.peer, "dropping file descriptors that cannot be taken with their message");
            }
            self.counters.fds_dropped += came.max(1);
        }
        Ok(packet.len)
    }

    /// Asks to be woken. True: nothing to receive, sleep. False: receive again.
    pub(crate) fn arm(&mut self) -> bool {
        if self.over.is_some() || self.flush().is_err() {
            return false;
        }
        // Before looking for messages: who rings has published.
        self.ours.drain();
        if self.queue.release() && self.ring().is_err() {
            return false;
        }
        if !self.queue.arm() {
            return false;
        }
        if self.is_lost() {
            self.fail("the file of a queue has shrunk, or its disk is full");
            return false;
        }
        if self.look_for_end() {
            self.queue.disarm();
            return false;
        }
        self.ours.before_sleep();
        true
    }

    /// Whether the other side has ended the connection. What it published before is still to be received.
    pub(crate) fn look_for_end(&mut self) -> bool {
        let gone = self.carrier.is_gone();
        if gone {
            self.over.get_or_insert(ChannelError::Closed);
        }
        gone
    }

    /// Asks to be woken when there is room. True: there is none, sleep. False: send again.
    pub(crate) fn arm_for_room(&mut self) -> bool {
        if self.over.is_some() || self.flush().is_err() {
            return false;
        }
        self.ours.drain();
        // A packet that did not fit waits behind others that will be answered.
        let wait = (self.queue.arm_for_room() || self.carrier_full) && !self.look_for_end();
        if wait {
            self.ours.wait_for_room();
        }
        wait
    }

    pub(crate) fn wake_fds(&self) -> WakeFds<'_> {
        WakeFds {
            doorbell: self.ours.as_fd(),
            hangup: self.carrier.hangup_fd(),
        }
    }

    /// Wakes this side: there is something to receive that did not come over the queue just now.
    #[cfg(feature = "linux-user")]
    pub(crate) fn wake_self(&self) {
        if let Bell::Stream(stream) = &self.ours {
            stream.start_timer(Duration::from_nanos(1));
        }
    }

    pub(crate) fn take_wake(&self) -> bool {
        self.ours.take()
    }

    /// One file descriptor for both of [`Self::wake_fds`].
    pub(crate) fn poll_fd(&mut self) -> io::Result<BorrowedFd<'_>> {
        #[cfg(feature = "linux-user")]
        if let Bell::Stream(stream) = &self.ours {
            return Ok(stream.as_fd());
        }
        #[cfg(feature = "ivshmem")]
        if let Bell::Port(port) = &self.ours {
            return Ok(port.as_fd());
        }
        if self.epoll.is_none() {
            let fds = self.wake_fds();
            if fds.doorbell.is_none() {
                return Err(io::ErrorKind::Unsupported.into());
            }
            let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            // Edge-triggered, for the doorbell is never read (docs/bus-unix.md §3).
            fds.add_to(&epoll)?;
            self.epoll = Some(epoll);
        }
        self.epoll
            .as_ref()
            .map(AsFd::as_fd)
            .ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    /// Makes [`Self::poll_fd`] unreadable until the next wake.
    pub(crate) fn clear_poll_fd(&mut self) -> io::Result<bool> {
        let woken = self.poll_until(Some(Instant::now()));
        // Also by who does not want to receive now.
        self.ours.drain();
        woken
    }

    fn poll_until(&mut self, deadline: Option<Instant>) -> io::Result<bool> {
        let epoll = self.poll_fd()?;
        let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 2];
        loop {
            let left = deadline
                .and_then(|d| Timespec::try_from(d.saturating_duration_since(Instant::now())).ok());
            match epoll::wait(epoll, &mut events, left.as_ref()) {
                Ok((events, _)) => return Ok(!events.is_empty()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sleeps, armed, until there may be something to receive or to notice. False: the time is over.
    pub(crate) fn sleep(&mut self, timeout: Option<Duration>) -> io::Result<bool> {
        self.poll_until(timeout.and_then(|t| Instant::now().checked_add(t)))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close();
    }
}
