// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that copies.

use super::division::Division;
use super::lane::{Common, Halt, Lane};
use super::pool::Pool;
use super::segment::Plot;
use super::shared::{Bell, Command, NewQueue, Shared};
use super::types::{Broken, Counters, StartError};
use crate::memory::GuestMemory;
use rustix::event::{Timespec, epoll};
use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vmsg_mem::RamSlice;
use vmsg_queue::remote::RemoteStorage;

/// Chains taken together, at most.
const CHAINS: usize = 64;
/// A chain may always have so many buffers, also in a shorter queue: QEMU takes as many.
const LONGEST_CHAIN: usize = 1024;
/// Calls looked at together.
const CALLS: usize = 64;
/// Turns after which calls are looked at even if there is enough to do.
const TURNS: usize = 8;
/// In place of a queue, in the epoll set: the doorbell of this thread.
const WAKE: u64 = u64::MAX;
/// With a queue, in the epoll set: the guest's eventfd, not the device's.
const KICK: u64 = 1 << 32;

/// What the thread is given.
pub(super) struct Start {
    pub(super) memory: Arc<dyn GuestMemory>,
    pub(super) shared: Arc<Shared>,
    pub(super) plot: Arc<Plot>,
    pub(super) division: Arc<Division>,
    pub(super) base: u64,
    pub(super) epoll: OwnedFd,
}

/// An epoll set with the doorbell of the thread in it.
pub(super) fn epoll_set(shared: &Shared) -> io::Result<OwnedFd> {
    let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let data = epoll::EventData::new_u64(WAKE);
    epoll::add(&set, &shared.wake, data, epoll::EventFlags::IN)?;
    Ok(set)
}

/// The queues and what they share.
struct Worker<'m> {
    shared: Arc<Shared>,
    plot: &'m Plot,
    division: Arc<Division>,
    base: u64,
    ram: RamSlice<'m>,
    epoll: OwnedFd,
    common: Common<'m>,
    storage: RemoteStorage,
    lanes: Vec<Option<Lane<'m>>>,
    bells: Vec<Bell>,
    /// The guest's eventfds, where it kicks by such.
    kicks: Vec<Option<Arc<OwnedFd>>>,
    /// Queues with something to do, each once.
    ready: VecDeque<usize>,
    is_ready: Vec<bool>,
    /// Queues whose sides were not asked yet to tell when there is something.
    unarmed: Vec<usize>,
    is_unarmed: Vec<bool>,
    /// The driver is there: before, its memory is not touched.
    running: bool,
    /// Nothing is touched until the reset.
    broken: bool,
}

/// Runs until it is told to end.
fn run(start: Start) {
    let plot = start.plot.clone();
    let ram = plot.ram();
    let queues = start.division.places.len();
    let sizes = start.division.places.iter().flatten();
    let longest = sizes.map(|place| place.size.into()).max().unwrap_or(0);
    let mut worker = Worker {
        common: Common {
            memory: start.memory,
            pool: Pool::new(ram, start.base, &start.division),
            parts: Vec::new(),
            counters: Counters::default(),
            freed: false,
        },
        storage: RemoteStorage::with_capacity(CHAINS, longest.max(LONGEST_CHAIN)),
        shared: start.shared,
        plot: &plot,
        division: start.division,
        base: start.base,
        ram,
        epoll: start.epoll,
        lanes: (0..queues).map(|_| None).collect(),
        bells: (0..queues).map(|_| Bell::Front).collect(),
        kicks: vec![None; queues],
        ready: VecDeque::with_capacity(queues),
        is_ready: vec![false; queues],
        unarmed: Vec::with_capacity(queues),
        is_unarmed: vec![false; queues],
        running: false,
        broken: false,
    };
    worker.work();
}

impl Worker<'_> {
    fn work(&mut self) {
        let mut turns = 0;
        loop {
            while self.shared.is_commanded() {
                match self.shared.take_command() {
                    Some(Command::End(_reply)) => return self.reset(),
                    Some(command) => self.obey(command),
                    None => break,
                }
            }
            self.take_kicks();
            let Some(queue) = self.ready.pop_front() else {
                self.rest();
                turns = 0;
                continue;
            };
            self.is_ready[queue] = false;
            self.turn(queue);
            turns += 1;
            if turns >= TURNS {
                turns = 0;
                self.take_calls(false);
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            // Nobody waits any more for an answer that cannot be sent.
            Command::Start(new, reply) => {
                let _ = reply.send(self.start(*new));
            }
            Command::Stop(queue, reply) => {
                self.stop(queue);
                let _ = reply.send(());
            }
            Command::Reset(reply) => {
                self.reset();
                let _ = reply.send(());
            }
            Command::Renew(reply) => {
                let _ = reply.send(self.renew());
            }
            Command::Run => {
                self.running = true;
                (0..self.lanes.len()).for_each(|queue| self.make_ready(queue));
            }
            Command::Interrupt(queue, bell) => {
                let Some(old) = self.bells.get_mut(queue) else {
                    return;
                };
                let was = std::mem::replace(old, bell);
                if matches!(was, Bell::Nobody) && self.lanes[queue].is_some() {
                    self.interrupt(queue);
                }
            }
            Command::Kick(queue, kick) => self.set_kick(queue, kick),
            Command::End(_) => {}
        }
    }

    fn start(&mut self, new: NewQueue) -> Result<(), StartError> {
        let index = new.index;
        let queue = u32::try_from(index).unwrap_or(u32::MAX);
        let place = self.division.places.get(index).and_then(Option::as_ref);
        let place = place.ok_or(StartError::NoQueue(queue))?;
        if self.lanes[index].is_some() {
            return Err(StartError::InUse(queue));
        }
        let longest = self.storage.longest_chain();
        let table = self.division.table;
        let lane = Lane::new(new, place, table, self.ram, self.base, longest).map_err(|error| {
            let why = error.to_string();
            StartError::BadQueue { queue, why }
        })?;
        let data = epoll::EventData::new_u64(index as u64);
        // Held by the device host, too: it is never read, each ring of it is an edge.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&self.epoll, &lane.call, data, flags).map_err(|error| StartError::Os {
            queue,
            why: error.to_string(),
        })?;
        self.lanes[index] = Some(lane);
        self.make_ready(index);
        Ok(())
    }

    fn set_kick(&mut self, queue: usize, kick: Option<Arc<OwnedFd>>) {
        let Some(place) = self.kicks.get_mut(queue) else {
            return;
        };
        if let Some(old) = place.take() {
            // The VMM has it, too: it does not leave the set by being closed here.
            let _ = epoll::delete(&self.epoll, &old);
        }
        let Some(kick) = kick.filter(|_| self.lanes[queue].is_some()) else {
            return;
        };
        let data = epoll::EventData::new_u64(KICK | queue as u64);
        // Held by others: never read, each kick is an edge.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        match epoll::add(&self.epoll, &kick, data, flags) {
            Ok(()) => *place = Some(kick),
            Err(error) => tracing::warn!("queue {queue} goes without kicks: {error}"),
        }
    }

    fn stop(&mut self, queue: usize) {
        self.set_kick(queue, None);
        let Some(lane) = self.lanes.get_mut(queue).and_then(Option::take) else {
            return;
        };
        let _ = epoll::delete(&self.epoll, &lane.call);
        lane.end(&mut self.common.pool);
        self.feed_waiting();
    }

    /// Ends all queues and forgets everything but what was counted.
    fn reset(&mut self) {
        self.running = false;
        self.broken = false;
        (0..self.lanes.len()).for_each(|queue| self.stop(queue));
        self.ready.clear();
        self.unarmed.clear();
        self.is_ready.fill(false);
        self.is_unarmed.fill(false);
        self.bells.fill_with(|| Bell::Front);
        self.shared.forget();
        // What the device host wrote where nothing was, goes, too; and the memory is free again.
        let rings = self.division.places.iter().flatten();
        let rings = rings.map(|place| place.rings.clone());
        self.plot.wipe(rings.chain(self.common.pool.take_touched()));
        self.shared.count(self.common.counters);
    }

    /// Begins all queues in the segment anew. False: the device needs a reset.
    fn renew(&mut self) -> bool {
        if self.plot.is_lost() {
            return false;
        }
        for queue in 0..self.lanes.len() {
            if self.broken {
                return false;
            }
            if let Some(lane) = &mut self.lanes[queue] {
                match lane.renew() {
                    Ok(()) => self.make_ready(queue),
                    Err(halt) => self.halt(queue, halt),
                }
            }
        }
        self.common.counters.renewals += 1;
        self.shared.count(self.common.counters);
        !self.broken
    }

    /// Puts a queue into the line, if it is one that runs.
    fn make_ready(&mut self, queue: usize) {
        let runs = self.running && !self.broken;
        if runs && self.lanes.get(queue).is_some_and(Option::is_some) && !self.is_ready[queue] {
            self.is_ready[queue] = true;
            self.ready.push_back(queue);
        }
    }

    fn take_kicks(&mut self) {
        let shared = self.shared.clone();
        shared.take_kicks(|queue| {
            if let Some(Some(lane)) = self.lanes.get_mut(queue) {
                lane.kicked();
                self.make_ready(queue);
            }
        });
    }

    /// Looks which queues the device has called for. With `wait`, until there is something.
    fn take_calls(&mut self, wait: bool) {
        let mut space = [const { MaybeUninit::<epoll::Event>::uninit() }; CALLS];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let time = (!wait).then_some(&now);
        let Ok((found, _)) = epoll::wait(&self.epoll, &mut space, time) else {
            // Interrupted.
            return;
        };
        for event in found {
            match event.data.u64() {
                WAKE => {
                    let _ = self.shared.wake.drain();
                }
                whose => {
                    let queue = usize::try_from(whose & !KICK).unwrap_or(usize::MAX);
                    if let Some(Some(lane)) = self.lanes.get_mut(queue) {
                        if whose & KICK == 0 {
                            lane.called();
                        } else {
                            lane.kicked();
                        }
                        self.make_ready(queue);
                    }
                }
            }
        }
    }

    /// Lets a queue work.
    fn turn(&mut self, queue: usize) {
        let Some(lane) = &mut self.lanes[queue] else {
            return;
        };
        let turn = if self.plot.is_lost() {
            Err(Halt::Broken(Broken::Lost))
        } else {
            lane.turn(&mut self.common, &mut self.storage)
        };
        if !self.is_unarmed[queue] {
            self.is_unarmed[queue] = true;
            self.unarmed.push(queue);
        }
        match turn {
            Ok(turn) => {
                if turn.interrupt {
                    self.interrupt(queue);
                }
                if turn.more {
                    self.make_ready(queue);
                }
            }
            Err(halt) => self.halt(queue, halt),
        }
        if std::mem::take(&mut self.common.freed) {
            self.feed_waiting();
        }
        self.shared.count(self.common.counters);
    }

    /// Those who wait for room look again.
    fn feed_waiting(&mut self) {
        for queue in 0..self.lanes.len() {
            if self.lanes[queue].as_ref().is_some_and(Lane::waits) {
                self.make_ready(queue);
            }
        }
    }

    fn halt(&mut self, queue: usize, halt: Halt) {
        match halt {
            // Somebody wants something of this thread; after that it goes on.
            Halt::Cancelled => self.make_ready(queue),
            Halt::Broken(broken) => {
                // The front says it, and how often it says such things is bounded.
                tracing::debug!("shadow queues stand still until the device is reset: {broken}");
                self.broken = true;
                self.ready.clear();
                self.is_ready.fill(false);
                self.shared.set_broken(broken);
            }
        }
    }

    fn interrupt(&mut self, queue: usize) {
        self.common.counters.interrupts += 1;
        match &self.bells[queue] {
            Bell::Nobody => {}
            Bell::Eventfd(bell) => {
                // Whoever makes its eventfd unusable goes without interrupts; full means that it has been rung.
                let _ = bell.ring();
            }
            Bell::Front => self.shared.queue_used(queue),
        }
    }

    /// There is nothing to do: asks all sides to tell when there is, and sleeps until then.
    fn rest(&mut self) {
        while let Some(&queue) = self.unarmed.last() {
            if self.shared.is_commanded() {
                return;
            }
            if self.broken {
                break;
            }
            let Some(lane) = &mut self.lanes[queue] else {
                self.unarmed.pop();
                self.is_unarmed[queue] = false;
                continue;
            };
            match lane.arm(&self.common) {
                Ok(more) => {
                    self.unarmed.pop();
                    self.is_unarmed[queue] = false;
                    if more {
                        self.make_ready(queue);
                    }
                }
                Err(halt @ Halt::Broken(_)) => return self.halt(queue, halt),
                // Once more, after what this thread is wanted for.
                Err(Halt::Cancelled) => return,
            }
        }
        if !self.ready.is_empty() {
            return;
        }
        if self.shared.may_sleep() {
            self.common.counters.sleeps += 1;
            self.shared.count(self.common.counters);
            self.take_calls(true);
        }
        self.shared.awake();
    }
}

/// The thread, with a word to the front if it ends by a mistake.
pub(super) fn guarded(start: Start) {
    let shared = start.shared.clone();
    let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(start)));
    if ran.is_err() {
        shared.set_broken(Broken::Ended);
    }
    shared.end();
}
