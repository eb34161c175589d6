// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Daemons that end, again and again, over the same requests.
//!
//! What a daemon that was ended has not done, the next one begins again. If it is a request that ends it, so does that one: as with every
//! front end of vhost-user, nobody gives the request up, since a daemon that is mended does it and its guest goes on. But it is called less
//! and less often, and it is said why.

use std::time::{Duration, Instant};

use vmsg_mem::AddressSpace;

use super::{Bridge, FIRST_PAUSE, LASTING, State};

/// The longest pause after a daemon that has ended soon and has done nothing of what was there to do, unless another one is asked for.
const LONGEST_IN_VAIN: Duration = Duration::from_secs(5);
/// So many ends in a row over the same requests are said.
const SAID_AFTER: u32 = 5;

/// The ends of a queue's daemons.
#[derive(Debug, Default)]
pub(super) struct Ends {
    /// The used index when the daemon got the queue.
    given_at: Option<u16>,
    /// Since something was used for the last time: ends with something to be done.
    in_vain: u32,
}

impl Ends {
    /// The daemon has got the queue, whose used index is this one.
    pub(super) fn given(&mut self, used: Option<u16>) {
        self.given_at = used;
    }

    /// Its daemon has ended: whether it has done something. `more`: there is something to be done, for which the driver waits.
    fn ended(&mut self, used: Option<u16>, more: bool) -> bool {
        let done = self.given_at.is_some() && used.is_some() && used != self.given_at;
        self.given_at = None;
        self.in_vain = match more && !done {
            true => self.in_vain.saturating_add(1),
            false => 0,
        };
        done
    }
}

impl Bridge {
    /// The connection is no more: what is to be known of the queues before they are taken for stopped. Returns the shortest pause before
    /// the next one.
    pub(super) fn ended(&mut self, now: Instant, space: AddressSpace<'_>) -> Duration {
        if !matches!(self.state, State::Up(_)) {
            return Duration::ZERO;
        }
        let counts = self.running.is_some() && !self.halted && self.preparing.is_none();
        let (mut done, mut in_vain, mut to_say) = (false, false, None);
        for (queue, ring) in self
            .rings
            .iter_mut()
            .enumerate()
            .filter(|(_, ring)| ring.live)
        {
            let more = counts && self.kind.is_asked(queue) && ring.has_more(space);
            let used = ring.used_at(space);
            done |= ring.ends.ended(used, more);
            in_vain |= ring.ends.in_vain > 0;
            if ring.ends.in_vain == SAID_AFTER {
                to_say.get_or_insert(queue);
            }
        }
        if let Some(queue) = to_say {
            let path = self.settings.socket.display();
            let device = self.settings.name.as_deref().unwrap_or_default();
            tracing::warn!(
                device,
                %path,
                queue,
                "the daemon has ended {SAID_AFTER} times in a row over the same requests, and has done nothing of them: look into its own log, and start one that can do them, which goes on with them; or have the guest's driver start over, which drops them"
            );
        }
        if done || now.saturating_duration_since(self.since) >= LASTING {
            self.pause = FIRST_PAUSE;
            self.ends_in_vain = 0;
            return Duration::ZERO;
        }
        if !in_vain {
            return Duration::ZERO;
        }
        let longest = LONGEST_IN_VAIN.max(self.settings.reconnect);
        let pause = FIRST_PAUSE * (1 << self.ends_in_vain.min(16));
        self.ends_in_vain = self.ends_in_vain.saturating_add(1);
        pause.min(longest)
    }
}

#[cfg(test)]
#[path = "vain_test.rs"]
mod tests;
