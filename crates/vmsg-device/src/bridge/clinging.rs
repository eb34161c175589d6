// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A daemon that was cut off with queues of the driver's in its hands.
//!
//! It has the driver's memory mapped, and whatever it has begun it may go on with. So nothing that takes the memory from it is said to be
//! done, and no other connection to it begins, until it has closed its end of this one, which the system does for a process that ends, when
//! its memory is gone. There is no other limit: whoever runs the daemon can end it, and a queue that two work on, or memory that is written to
//! after it was given to somebody else, nobody can mend. A daemon that says that it has stopped, or closes the connection, is believed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::net::{Shutdown, shutdown, sockopt};
use vmsg_mem::AddressSpace;

use super::ring::Base;
use super::{Bridge, HELD, Resume, State};
use crate::device::Upcoming;

/// The connection to a daemon that was cut off.
#[derive(Debug)]
pub(super) struct Clinging {
    socket: OwnedFd,
    /// That somebody waits for it has been said.
    said: bool,
}

impl Clinging {
    /// Whether the other end is closed.
    fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::empty())];
        let polled = poll(&mut fds, Some(&Timespec::default()));
        let gone = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        polled.is_ok() && fds[0].revents().intersects(gone)
    }
}

impl AsFd for Clinging {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Bridge {
    /// The daemon is about to be cut off: keeps the connection, if it may be working on a queue, to see when it closes it.
    pub(super) fn cling(&mut self, space: AddressSpace<'_>) {
        let drains = |ring: &super::Ring| self.resume == Resume::Record && ring.is_draining(space);
        if !self.rings.iter().any(|ring| ring.held || drains(ring)) {
            return;
        }
        let State::Up(link) = std::mem::replace(&mut self.state, State::Down(Instant::now()))
        else {
            return;
        };
        let _ = epoll::delete(&self.epoll, &*link);
        let socket = link.into_socket();
        // The daemon hears of the end when it reads. Both ways, and its end could not be told from ours.
        let _ = shutdown(&socket, Shutdown::Write);
        let clinging = Clinging {
            socket,
            said: false,
        };
        // The system tells of a closed end whatever it is asked for.
        let watched = self.watch(&clinging, HELD, epoll::EventFlags::ET);
        if watched.is_ok() && !clinging.is_closed() {
            self.clinging = Some(clinging);
        }
    }

    /// Looks whether the daemon that was cut off is gone.
    pub(super) fn has_let_go(&mut self, now: Instant, space: AddressSpace<'_>) {
        if !self.clinging.as_ref().is_some_and(Clinging::is_closed) {
            return;
        }
        self.clinging = None;
        for ring in &mut self.rings {
            // What comes from now on was not begun by anybody.
            let idle = ring.idle_at(space);
            if let (Some(wanted), Some(idle)) = (&mut ring.wanted, idle)
                && wanted.base == Base::InRing
            {
                wanted.base = Base::At(idle);
            }
        }
        let path = self.settings.socket.display();
        tracing::info!(%path, "the daemon that was cut off has closed its connection");
        // It could not be called before.
        if let State::Down(until) = &mut self.state {
            *until = (*until).min(now + self.pause);
        }
        self.wake();
    }

    /// Whether nobody is in the way of what is `upcoming`.
    pub(super) fn lets_go(&mut self, upcoming: &Upcoming<'_>) -> bool {
        if let Upcoming::Memory(table) = upcoming
            && table.has_all_of(&self.table)
        {
            return true;
        }
        let Some(clinging) = &mut self.clinging else {
            return true;
        };
        if !std::mem::replace(&mut clinging.said, true) {
            let path = self.settings.socket.display();
            let pid = sockopt::socket_peercred(&clinging.socket);
            let pid = pid.map_or(0, |who| who.pid.as_raw_nonzero().get());
            tracing::warn!(%path, pid, "the daemon was cut off and may still write to the driver's memory: the driver's reset waits until it closes its connection, or ends");
        }
        false
    }
}
