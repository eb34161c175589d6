// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same world, where nothing is left to chance but what the device does: everybody has a turn after another, and somebody is killed
//! at a moment that is given.

use crate::echo::QUEUES;
use crate::guest::Memory;
use crate::setting::{Faults, Setting};
use crate::world::World;

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Who {
    /// The device host.
    Host,
    /// The process with the session; the front end connects to the next one.
    Proxy,
    /// The front end and its guest.
    Guest,
}

/// When: counted from the last killing, or from the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// So many messages were delivered to the device host.
    ToHost(usize),
    /// So many were delivered to the driver.
    ToDriver(usize),
    /// So many turns were made since the guest has set its device up.
    Traffic(usize),
    /// At once.
    Now,
}

/// How a case has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// All that was asked for was answered.
    Recovered,
    /// The device needed a reset; after it all went on.
    Refused(String),
    /// The moment never came.
    NotReached,
    /// Nothing moved any more.
    Hung(String),
}

/// What can be counted in a case in which nobody is killed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lengths {
    pub(crate) to_host: usize,
    pub(crate) to_driver: usize,
}

/// Turns after which a case hangs. A replay takes a few hundred.
const PATIENCE: usize = 20_000;
/// Requests that have to be answered after the last killing.
const ENOUGH: u64 = 12;

impl World<'_> {
    /// Everybody does what can be done; `strike` is asked after each step.
    fn turn(&mut self, strike: &mut impl FnMut(&mut Self)) {
        self.moved = false;
        let swallowed = self.line.swallowed;
        for step in [
            Self::front,
            Self::deliver_to_host,
            Self::work,
            Self::work,
            Self::reply,
            Self::deliver_to_driver,
        ] {
            step(self);
            self.gather();
            strike(self);
        }
        if self.is_set_up() {
            self.traffic += 1;
            if !self.resting {
                self.ask(self.traffic % QUEUES);
                self.gather();
            }
            strike(self);
        }
        if self.process.is_none() {
            self.start_host();
        } else if !self.linked {
            self.link();
            self.gather();
        } else if !self.moved && !self.works() && self.line.swallowed == swallowed {
            self.wait();
            self.gather();
        }
    }

    fn strike(&mut self, who: Who) {
        match who {
            Who::Host => self.kill(),
            Who::Proxy => self.kill_proxy(),
            Who::Guest => self.start_over(),
        }
        self.gather();
        self.delivered = [0; 2];
        self.traffic = 0;
    }

    fn is_due(&self, when: When) -> bool {
        match when {
            When::ToHost(count) => self.delivered[0] == count,
            When::ToDriver(count) => self.delivered[1] == count,
            When::Traffic(count) => self.is_set_up() && self.traffic == count,
            When::Now => true,
        }
    }
}

/// How many messages it takes until the guest's device is set up.
pub(crate) fn lengths(setting: Setting, memory: &Memory) -> Lengths {
    let mut world = World::new(1, Faults::default(), setting, memory);
    for _ in 0..PATIENCE {
        if world.is_set_up() {
            let [to_host, to_driver] = world.delivered;
            return Lengths { to_host, to_driver };
        }
        world.turn(&mut |_| {});
    }
    panic!("without anybody being killed, {setting:?} does not get set up");
}

/// Plays one case: kills those in `plan`, one after another.
pub(crate) fn play(seed: u64, setting: Setting, plan: &[(When, Who)], memory: &Memory) -> Ending {
    let mut world = World::new(seed, Faults::default(), setting, memory);
    let mut left = plan.iter().copied();
    let mut next = left.next();
    let mut struck_at = 0;
    let mut refusals = 0;
    let mut turns = 0;
    loop {
        world.turn(&mut |world| {
            while let Some((when, who)) = next
                && world.is_due(when)
            {
                next = left.next();
                world.strike(who);
                struck_at = world.completed();
            }
        });
        turns += 1;
        if world.reasons.len() > refusals {
            // Whoever starts over has to get on as well.
            refusals = world.reasons.len();
            struck_at = world.completed();
            world.resting = false;
        }
        if let Some((When::ToHost(_) | When::ToDriver(_) | When::Traffic(_), _)) = next
            && world.traffic > 300
        {
            return Ending::NotReached;
        }
        if next.is_none() && world.completed() >= struck_at + ENOUGH {
            world.resting = true;
        }
        if next.is_none() && world.resting && world.is_at_rest() {
            return match world.reasons.first() {
                None => Ending::Recovered,
                Some(reason) => Ending::Refused(reason.clone()),
            };
        }
        if turns > PATIENCE {
            return Ending::Hung(world.story());
        }
    }
}
