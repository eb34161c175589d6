// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What has happened to the descriptors that a back end watches.

use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use rustix::event::Timespec;
use rustix::event::epoll::{self, Event};

/// The events that wait in the set `epoll` now, at most as many as `room` holds; none if it cannot be asked.
pub(crate) fn waiting(epoll: impl AsFd, room: &mut [MaybeUninit<Event>]) -> &[Event] {
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    epoll::wait(epoll, room, Some(&at_once)).map_or(&[], |(events, _)| events)
}
