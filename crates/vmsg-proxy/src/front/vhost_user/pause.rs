// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Times in which nobody is let in: there is no socket to connect to, so that a front end with `reconnect` keeps trying.

use super::guest::GuestError;
use crate::session::OpError;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// The first pause for a device that another driver holds, or that is not ready for one; each is twice the one before.
const FIRST: Duration = Duration::from_secs(2);
/// The longest.
const LONGEST: Duration = Duration::from_secs(32);

/// Why nobody is let in.
#[derive(Debug)]
pub(super) enum Pause {
    /// The link is down, and the front end knows because it is not connected.
    LinkDown {
        /// The process of that front end: another one has still to be told. `None` if it is not known.
        process: Option<OwnedFd>,
    },
    /// The device was removed, and none was found in its place yet.
    Removed,
    /// Something that takes time to change.
    Until(Instant),
}

impl Pause {
    /// After a front end has been sent away because the link went down.
    pub(super) fn link_down(socket: impl AsFd) -> Pause {
        // Of another name space, or gone already: then only the link counts.
        let pid = rustix::net::sockopt::socket_peercred(socket).ok();
        let pid = pid.map(|cred| cred.pid).filter(|pid| *pid != own_pid());
        Pause::LinkDown {
            process: pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()),
        }
    }

    /// What to wait on beside news.
    pub(super) fn poll_fd(&self) -> Option<PollFd<'_>> {
        match self {
            Pause::LinkDown { process } => process
                .as_ref()
                .map(|process| PollFd::new(process, PollFlags::IN)),
            Pause::Removed | Pause::Until(_) => None,
        }
    }

    pub(super) fn until(&self) -> Option<Instant> {
        match self {
            Pause::LinkDown { .. } | Pause::Removed => None,
            Pause::Until(at) => Some(*at),
        }
    }
}

/// A VMM within this process, as tests have it, does not end.
fn own_pid() -> Pid {
    rustix::process::getpid()
}

/// How often in a row front ends could not be served because another driver holds the device, or it has requests under way.
#[derive(Debug, Default)]
pub(super) struct Patience {
    held: u32,
}

impl Patience {
    /// How long nobody is let in after a front end was sent away because of `error`.
    pub(super) fn after(&mut self, error: &GuestError) -> Option<Duration> {
        let is_held = matches!(
            error,
            GuestError::Op {
                error: OpError::Held(_) | OpError::Busy,
                ..
            }
        );
        if !is_held {
            self.held = 0;
            return None;
        }
        let pause = FIRST.saturating_mul(1 << self.held.min(8)).min(LONGEST);
        self.held = self.held.saturating_add(1);
        Some(pause)
    }
}

#[cfg(test)]
#[path = "pause_test.rs"]
mod tests;
