// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The doorbell: a stream socket, docs/bus-linux-user.md §3.

use crate::room_wait::RoomWait;
use rustix::event::{Timespec, epoll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What is sent for a message.
const RING: [u8; 1] = [0xed];

/// The most that is read at a time: more than a socket holds unless somebody writes without end.
const MOST: usize = 256 * 1024;

/// A connected socket with all that one side waits for: bytes, the end, and a timer.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: OwnedFd,
    timer: OwnedFd,
    /// Holds both, edge-triggered.
    epoll: OwnedFd,
    /// The other side has ended the connection.
    over: AtomicBool,
    room_wait: RoomWait,
}

impl Stream {
    /// Takes `socket`, which must not block.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(0);
        let edge = epoll::EventFlags::ET;
        // Also told of room in the socket, which is told when the other side has read something.
        let all = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP;
        epoll::add(&epoll, &socket, data, all | edge)?;
        epoll::add(&epoll, &timer, data, epoll::EventFlags::IN | edge)?;
        Ok(Self {
            socket,
            timer,
            epoll,
            over: AtomicBool::new(false),
            room_wait: RoomWait::default(),
        })
    }

    /// From now on only bytes and the end wake this side.
    pub(super) fn ignore_reads(&self) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        let data = epoll::EventData::new_u64(0);
        Ok(epoll::modify(&self.epoll, &self.socket, data, flags)?)
    }

    /// Wakes the other side. If the socket is full it has plenty to read; if it is gone, that
    /// is noticed by [`Self::drain`].
    pub(crate) fn ring(&self) {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let _ = retry_on_intr(|| rustix::net::send(&self.socket, &RING, flags));
    }

    /// Reads what is in the socket, all of which means no more than that there may be something
    /// in the queue. The other side may wait for this.
    pub(crate) fn drain(&self) -> usize {
        let mut bytes = [MaybeUninit::<u8>::uninit(); 4096];
        let mut read = 0;
        while read < MOST && !self.is_over() {
            match rustix::net::recv(&self.socket, &mut bytes, RecvFlags::DONTWAIT) {
                Ok(((_, _), 0)) => self.over.store(true, Ordering::Relaxed),
                Ok(((_, _), more)) => read += more,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => self.over.store(true, Ordering::Relaxed),
            }
        }
        read
    }

    /// Whether [`Self::drain`] has come to the end.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Makes sure that this side wakes, though nobody may ring when there is room.
    pub(crate) fn wait_for_room(&self) {
        self.start_timer(self.room_wait.next());
    }

    /// There was room.
    pub(crate) fn room_found(&self) {
        self.room_wait.found();
    }

    /// Wakes this side once after `time`.
    pub(crate) fn start_timer(&self, time: Duration) {
        let zero = Timespec::default();
        let timer = Itimerspec {
            it_interval: zero,
            it_value: Timespec::try_from(time).unwrap_or(zero),
        };
        // Fails only for times that are none.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer);
    }

    /// Takes what [`AsFd`] tells; whether that was anything.
    pub(super) fn take_events(&self) -> io::Result<bool> {
        let mut events = [const { MaybeUninit::<epoll::Event>::uninit() }; 2];
        let now = Timespec::default();
        match epoll::wait(&self.epoll, &mut events, Some(&now)) {
            Ok((events, _)) => Ok(!events.is_empty()),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Ends the connection.
    pub(crate) fn close(&self) {
        // Fails only if the other side was first.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

impl AsFd for Stream {
    /// Readable when there are bytes, the end or the time is over.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
