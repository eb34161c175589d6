// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The two ends of a bus.

use crate::line::Line;
use crate::link::Parts;
use crate::trace::Interface;
use crate::{Capabilities, CommonRam, Peer, Vectors};
use rustix::event::epoll::{self, EventFlags};
use std::any::Any;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use virtio_msg::{Channel, ChannelError};

/// What to wait on while asleep. Poll both edge-triggered and read neither:
/// the other side may hold the eventfd as well, and what lies in a socket
/// belongs to the bus.
#[derive(Clone, Copy, Debug)]
pub struct WakeFds<'a> {
    /// An eventfd, or what else tells, for `EPOLLIN | EPOLLET`: messages, or room. `None` on a
    /// loopback without doorbells.
    pub doorbell: Option<BorrowedFd<'a>>,
    /// A socket, for `EPOLLRDHUP | EPOLLET`: the other side is gone. `None`
    /// where the doorbell tells this too.
    pub hangup: Option<BorrowedFd<'a>>,
}

impl WakeFds<'_> {
    /// Has an epoll instance watch them, edge-triggered; their events have the data 0.
    ///
    /// # Errors
    ///
    /// Of epoll_ctl(2).
    pub fn add_to(&self, epoll: impl AsFd) -> io::Result<()> {
        let data = epoll::EventData::new_u64(0);
        if let Some(doorbell) = self.doorbell {
            epoll::add(&epoll, doorbell, data, EventFlags::IN | EventFlags::ET)?;
        }
        if let Some(hangup) = self.hangup {
            epoll::add(&epoll, hangup, data, EventFlags::RDHUP | EventFlags::ET)?;
        }
        Ok(())
    }
}

/// What went over one end of a bus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Messages sent.
    pub sent: u64,
    /// Messages received.
    pub received: u64,
    /// Doorbells rung.
    pub rings: u64,
    /// How often there was no room.
    pub full: u64,
    /// File descriptors sent.
    pub fds_sent: u64,
    /// File descriptors received.
    pub fds_received: u64,
    /// Times or descriptors that came with a message that takes none, or that were too many; closed at once.
    pub fds_dropped: u64,
}

/// One end of a bus, whichever bus and end it is: what the two ends and the
/// wrappers around them have in common.
///
/// Sending: [`try_send`](Channel::try_send) until done or
/// [`Full`](ChannelError::Full), then [`flush`](Channel::flush). When full, and
/// [`arm_for_room`](Bus::arm_for_room) says true, sleep, then try again.
///
/// Receiving: [`try_recv`](Channel::try_recv) until `None`, then
/// [`arm`](Bus::arm): if true, sleep; if false, receive again.
pub trait Bus: Channel {
    /// What the bus can do.
    fn capabilities(&self) -> &Capabilities;

    /// Sends a message together with up to [`MAX_FDS`](crate::MAX_FDS) file
    /// descriptors, in order with all other messages, and flushes.
    ///
    /// # Errors
    /// As [`Channel::try_send`]; [`ChannelError::TooLong`] also if there are too
    /// many descriptors or the bus passes none.
    fn try_send_with_fds(
        &mut self,
        message: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError>;

    /// As [`Channel::try_recv`], which closes descriptors that come with a
    /// message; this puts them into `fds`, in place of what was there.
    fn try_recv_with_fds(
        &mut self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Option<usize>, ChannelError>;

    /// Flushes, and asks to be woken for the next message. True: there is
    /// none, sleep on [`Self::wake_fds`]. False: receive again; there is a
    /// message, or an error to be told.
    fn arm(&mut self) -> bool;

    /// Flushes, and asks to be woken when there is room again. True: there is
    /// none, sleep on [`Self::wake_fds`]. False: send again.
    fn arm_for_room(&mut self) -> bool;

    /// What to sleep on.
    fn wake_fds(&self) -> WakeFds<'_>;

    /// Whether the connection is known to be over. What the other side sent
    /// before may still be received.
    fn is_closed(&self) -> bool;

    /// Who is at the other end.
    fn peer(&self) -> &Peer;
}

macro_rules! end {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        pub struct $name {
            line: Line,
            /// The driver's memory, on buses where both sides know it from the start.
            #[cfg(feature = "linux-user")]
            static_ram: Option<crate::StaticRam>,
            common: Option<Arc<CommonRam>>,
            vectors: Option<Arc<Vectors>>,
            /// Lets go of a place in a listener when the connection ends.
            _place: Option<Box<dyn Any + Send + Sync>>,
        }

        impl $name {
            pub(crate) fn new(parts: Parts, place: Option<Box<dyn Any + Send + Sync>>) -> Result<Self, vmsg_mem::Error> {
                Ok(Self {
                    line: Line::new(parts)?,
                    #[cfg(feature = "linux-user")]
                    static_ram: None,
                    common: None,
                    vectors: None,
                    _place: place,
                })
            }

            /// Where the driver's memory is, on a bus without windows at run time on which that was said.
            #[cfg(feature = "linux-user")]
            pub fn static_ram(&self) -> Option<&crate::StaticRam> {
                self.static_ram.as_ref()
            }

            #[cfg(feature = "linux-user")]
            pub(crate) fn set_static_ram(&mut self, ram: Option<crate::StaticRam>) {
                self.static_ram = ram;
            }

            /// The memory that both ends have in common, on a bus whose windows are views of that.
            pub fn common(&self) -> Option<&Arc<CommonRam>> {
                self.common.as_ref()
            }

            /// The doorbells that queues can have, on a bus with [`Capabilities::queue_vectors`].
            pub fn vectors(&self) -> Option<&Arc<Vectors>> {
                self.vectors.as_ref()
            }

            #[cfg(any(feature = "loopback", feature = "ivshmem"))]
            pub(crate) fn share(&mut self, common: Option<Arc<CommonRam>>, vectors: Option<Arc<Vectors>>) {
                self.common = common;
                self.vectors = vectors;
            }

            /// Speaks the 40-byte messages on the wire.
            #[cfg(feature = "linux-user")]
            pub(crate) fn translate(&mut self, translation: crate::translation::Translation) {
                self.line.translate(translation);
            }

            /// Records all messages from now on to a trace, or to none.
            pub fn set_trace(&mut self, trace: Option<Interface>) {
                self.line.set_trace(trace);
            }

            /// What the bus can do.
            pub fn capabilities(&self) -> &Capabilities {
                self.line.link.capabilities()
            }

            /// See [`Bus::try_send_with_fds`].
            ///
            /// # Errors
            /// As there.
            pub fn try_send_with_fds(&mut self, message: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
                self.line.try_send(message, fds)
            }

            /// See [`Bus::try_recv_with_fds`].
            ///
            /// # Errors
            /// As [`Channel::try_recv`].
            pub fn try_recv_with_fds(
                &mut self,
                buf: &mut [u8],
                fds: &mut Vec<OwnedFd>,
            ) -> Result<Option<usize>, ChannelError> {
                fds.clear();
                self.line.try_recv(buf, Some(fds))
            }

            /// See [`Bus::arm`].
            pub fn arm(&mut self) -> bool {
                self.line.arm()
            }

            /// See [`Bus::arm_for_room`].
            pub fn arm_for_room(&mut self) -> bool {
                self.line.arm_for_room()
            }

            /// See [`Bus::wake_fds`].
            pub fn wake_fds(&self) -> WakeFds<'_> {
                self.line.link.wake_fds()
            }

            /// Whether this end was rung since the last call; only on a loopback without
            /// doorbells, elsewhere always false.
            pub fn take_wake(&self) -> bool {
                self.line.link.take_wake()
            }

            /// One file descriptor in place of the two of [`Self::wake_fds`]: readable after
            /// a wake, until [`Self::clear_poll_fd`]. Costs an epoll instance, made at the first call.
            ///
            /// # Errors
            /// Of `epoll_create1` and `epoll_ctl`; `Unsupported` on a loopback without doorbells.
            pub fn poll_fd(&mut self) -> io::Result<BorrowedFd<'_>> {
                self.line.link.poll_fd()
            }

            /// Makes [`Self::poll_fd`] unreadable until the next wake; tells whether it was readable.
            ///
            /// # Errors
            /// As [`Self::poll_fd`].
            pub fn clear_poll_fd(&mut self) -> io::Result<bool> {
                self.line.link.clear_poll_fd()
            }

            /// Arms and sleeps until there may be a message, room or an end to
            /// notice; spurious wakes happen. False: `timeout` is over.
            ///
            /// # Errors
            /// As [`Self::poll_fd`].
            pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<bool> {
                self.line.wait(timeout)
            }

            /// Whether the connection is known to be over.
            pub fn is_closed(&self) -> bool {
                self.line.link.is_closed()
            }

            /// Flushes and ends the connection; dropping does the same.
            pub fn close(&mut self) {
                self.line.link.close();
            }

            /// Who is at the other end.
            pub fn peer(&self) -> &Peer {
                self.line.link.peer()
            }

            /// Name of the program at the other end, as it calls itself.
            pub fn peer_name(&self) -> &str {
                &self.line.link.peer().name
            }

            /// Another value each time the device side starts: after a reconnect, another epoch means that
            /// all device state is gone.
            pub fn epoch(&self) -> u64 {
                self.line.link.epoch()
            }

            /// What went over this end.
            pub fn counters(&self) -> &Counters {
                self.line.link.counters()
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($name))
                    .field("peer", self.peer())
                    .field("capabilities", self.capabilities())
                    .field("closed", &self.is_closed())
                    .finish_non_exhaustive()
            }
        }

        impl Channel for $name {
            fn max_message_size(&self) -> usize {
                self.line.link.capabilities().max_message_size
            }

            #[inline]
            fn try_send(&mut self, message: &[u8]) -> Result<(), ChannelError> {
                self.line.try_send(message, &[])
            }

            #[inline]
            fn try_recv(&mut self, buf: &mut [u8]) -> Result<Option<usize>, ChannelError> {
                self.line.try_recv(buf, None)
            }

            #[inline]
            fn flush(&mut self) -> Result<(), ChannelError> {
                self.line.flush()
            }
        }

        impl Bus for $name {
            fn capabilities(&self) -> &Capabilities {
                self.line.link.capabilities()
            }

            fn try_send_with_fds(&mut self, message: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
                self.line.try_send(message, fds)
            }

            fn try_recv_with_fds(
                &mut self,
                buf: &mut [u8],
                fds: &mut Vec<OwnedFd>,
            ) -> Result<Option<usize>, ChannelError> {
                $name::try_recv_with_fds(self, buf, fds)
            }

            fn arm(&mut self) -> bool {
                self.line.arm()
            }

            fn arm_for_room(&mut self) -> bool {
                self.line.arm_for_room()
            }

            fn wake_fds(&self) -> WakeFds<'_> {
                self.line.link.wake_fds()
            }

            fn is_closed(&self) -> bool {
                self.line.link.is_closed()
            }

            fn peer(&self) -> &Peer {
                self.line.link.peer()
            }
        }
    };
}

end! {
    /// The driver's end of a connection to a device host.
    DriverBus
}

end! {
    /// The device host's end of a connection to a driver.
    DeviceBus
}
