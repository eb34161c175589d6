// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Waiting asleep, on the file descriptors of a bus.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant as Clock};

use rustix::event::{Timespec, epoll};
use virtio_msg::Instant;
use vmsg_bus::{Bus, WakeFds};

use crate::wait::{Interest, Wait};

/// How long to spin before sleeping where there is another processor: waking a sleeper takes about as long.
pub const DEFAULT_SPIN: Duration = Duration::from_micros(25);

/// Waits on a bus of this workspace: spins a little, then arms the bus's doorbell and sleeps.
///
/// It belongs to one bus: the file descriptors are those of the first channel it waits on.
#[derive(Debug)]
pub struct Sleep {
    start: Clock,
    spin: Duration,
    epoll: Option<OwnedFd>,
    /// For which deadline it spins, and until when.
    spinning_until: Option<(Instant, Clock)>,
}

impl Sleep {
    /// Spins for [`DEFAULT_SPIN`] if there is more than one processor.
    pub fn new() -> Self {
        let alone = std::thread::available_parallelism().map_or(true, |n| n.get() == 1);
        Self::spinning(if alone { Duration::ZERO } else { DEFAULT_SPIN })
    }

    /// Spins for `spin` before it sleeps.
    pub fn spinning(spin: Duration) -> Self {
        Self {
            start: Clock::now(),
            spin,
            epoll: None,
            spinning_until: None,
        }
    }

    /// Sleeps until the bus rings or `deadline` has come. Failures end in an early return: the caller looks again anyway.
    fn sleep(&mut self, fds: WakeFds<'_>, deadline: Instant) -> io::Result<()> {
        let epoll = match &self.epoll {
            Some(epoll) => epoll,
            None => {
                let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
                // Edge-triggered, for nobody reads them (`docs/bus-unix.md` §3).
                fds.add_to(&epoll)?;
                self.epoll.insert(epoll)
            }
        };
        let now = Instant(nanos(self.start.elapsed()));
        let left = deadline.saturating_since(now);
        let left = Timespec::try_from(left).ok();
        let mut events = [const { MaybeUninit::<epoll::Event>::uninit() }; 2];
        match epoll::wait(epoll, &mut events, left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Default for Sleep {
    fn default() -> Self {
        Self::new()
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl<C: Bus> Wait<C> for Sleep {
    fn now(&mut self) -> Instant {
        Instant(nanos(self.start.elapsed()))
    }

    fn wait(&mut self, channel: &mut C, interest: Interest, deadline: Instant) {
        let now = Clock::now();
        // Another deadline is another thing to wait for. While spinning the doorbell is not armed, so that nobody has to ring it.
        let (for_deadline, until) = self.spinning_until.unwrap_or((deadline, now));
        if self.spinning_until.is_none() || for_deadline != deadline {
            self.spinning_until = Some((deadline, now + self.spin));
            return;
        }
        if now < until {
            std::hint::spin_loop();
            return;
        }
        let idle = match interest {
            Interest::Message => channel.arm(),
            // Both: who waits for room must take messages, or the other side may wait for room as well.
            Interest::Room => channel.arm_for_room() && channel.arm(),
        };
        if !idle {
            return;
        }
        let fds = channel.wake_fds();
        if fds.doorbell.is_none() || self.sleep(fds, deadline).is_err() {
            std::thread::yield_now();
        }
    }
}
