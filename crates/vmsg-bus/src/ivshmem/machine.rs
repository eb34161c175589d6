// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How two ends find each other, stay together and part: docs/bus-ivshmem.md §4, §5. Without clock, doorbell and descriptor:
//! time and memory come in, words in memory, rings and events go out.

mod foreign;
mod layout;
mod part;

use super::block::{Block, Card, LEAVING, PRESENT, Place};
use super::geometry::{Geometry, other};
use foreign::Pings;
use part::Part;
use vmsg_mem::QueueMemory;
use vmsg_mem::amp::{self, Life, Side, Start};

/// All times in milliseconds. How often an end shows that it lives.
pub(super) const BEAT: u64 = 500;

/// A peer that has shown nothing for so long is dead.
pub(super) const DEAD: u64 = 3000;

/// An end that is found in memory and shows nothing for so long is none.
pub(super) const STALE: u64 = 1600;

/// What has no block yet may be about to write one.
const GRACE: u64 = 300;

/// Slots of a page.
const SLOTS: u32 = 62;

/// What an end is told once.
#[derive(Clone, Debug)]
pub(super) struct Config {
    pub(super) side: Side,
    pub(super) geometry: Geometry,
    pub(super) card: Card,
    /// Not 0. A driver has another one for each connection, a device for each start.
    pub(super) epoch: u32,
    /// Device: the longest message.
    pub(super) message: usize,
    /// Driver, layouts with pages: there is a device that is not ours, which shows nothing of itself.
    pub(super) blind: bool,
}

/// Where the queues of a connection begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Queues {
    /// Two pages: from zero, or from where they stand.
    Pages {
        resumed: bool,
    },
    Amp {
        layout: amp::Layout,
        start: Start,
    },
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Messages can go; `None` for an end that is not ours, of which nothing is known.
    Up {
        peer: Option<(u32, Card)>,
        queues: Queues,
    },
    /// Not any more: [`Machine::again`] when this end is done with it (a driver begins with another machine).
    Down(&'static str),
    /// Another end has the place. That was all.
    Taken(String),
}

/// Who is to be rung.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whom {
    /// Peer and vector.
    One(u16, u16),
    /// Whoever there is.
    Everyone,
    /// An end of ours that has no number.
    Nameless,
}

/// What comes of one look.
#[derive(Debug, Default)]
pub(super) struct Turn {
    pub(super) event: Option<Event>,
    pub(super) ring: Option<Whom>,
}

#[derive(Clone, Debug)]
enum Phase {
    /// Is there another end in this place?
    Looking {
        seen: Option<(u32, u32)>,
        until: u64,
    },
    /// In its place, and alone.
    Waiting,
    /// Has named that epoch.
    Named(u32),
    /// Together with an end of ours: its epoch, its last beat, and when that was seen.
    Up {
        epoch: u32,
        beat: u32,
        seen: u64,
    },
    /// Together with another end.
    Foreign,
    /// Parted, which was told.
    Down,
    Over,
}

/// A block (epoch, heartbeat, state) and the words of the queues that its owner stores.
type Seen = (Option<(u32, u32, u8)>, [u32; 2]);

/// One end.
#[derive(Debug)]
pub(super) struct Machine {
    config: Config,
    phase: Phase,
    beat: u32,
    beat_at: u64,
    /// The other side's block as it was when this end began to wait: who shows nothing else since is not there.
    found: Option<(u32, u32)>,
    /// The driver that was served last is not served once more: it has another epoch then.
    served: u32,
    /// Since when this end waits.
    since: u64,
    life: Option<Life>,
    /// The driver's index in its page when this end began to wait.
    found_head: u32,
    /// The other side's block (epoch, heartbeat, state) and words as last seen, and since when they are so; its words when the
    /// block became so.
    last: Option<Seen>,
    still: u64,
    base: [u32; 2],
    layout: Option<amp::Layout>,
    pings: Pings,
    /// The number of the end of ours that this one is together with.
    peer: Option<u16>,
    /// An own layout that cannot be, or one of the device's: told once.
    pub(super) layout_error: Option<amp::LayoutError>,
}

impl Machine {
    pub(super) fn new(config: Config) -> Self {
        Self {
            config,
            phase: Phase::Looking {
                seen: None,
                until: 0,
            },
            beat: 0,
            beat_at: 0,
            found: None,
            served: 0,
            since: 0,
            life: None,
            found_head: 0,
            last: None,
            still: 0,
            base: [0; 2],
            layout: None,
            pings: Pings::default(),
            peer: None,
            layout_error: None,
        }
    }

    fn mine(&self) -> Option<Place> {
        self.config.geometry.block(self.config.side)
    }

    fn theirs(&self) -> Option<Place> {
        self.config.geometry.block(other(self.config.side))
    }

    /// Whether it has yet to see if its place is free.
    pub(super) fn is_looking(&self) -> bool {
        matches!(self.phase, Phase::Looking { .. })
    }

    /// When it has to look again even if nobody rings.
    pub(super) fn deadline(&self) -> u64 {
        match self.phase {
            Phase::Looking { until, .. } => until,
            Phase::Over => u64::MAX,
            _ => self.beat_at,
        }
    }

    /// A driver takes its place once more, for another connection.
    pub(super) fn begin_anew<M: QueueMemory>(&mut self, now: u64, memory: &M, epoch: u32) -> Turn {
        let mut turn = Turn::default();
        let had_it = !self.is_looking()
            && self
                .mine()
                .is_none_or(|mine| mine.is_ours(memory, self.config.epoch));
        self.config.epoch = epoch;
        match had_it {
            true => self.take_place(now, memory, &mut turn),
            false => {
                self.phase = Phase::Looking {
                    seen: None,
                    until: 0,
                }
            }
        }
        turn
    }

    /// Looks at the memory. `gone` says of an id whether there is surely nobody behind it.
    pub(super) fn poll<M: QueueMemory>(
        &mut self,
        now: u64,
        memory: &M,
        rung: bool,
        gone: &dyn Fn(u16) -> bool,
    ) -> Turn {
        let mut turn = Turn::default();
        if let Phase::Looking { seen, until } = self.phase {
            self.look(now, memory, seen, until, gone, &mut turn);
            return turn;
        }
        if matches!(self.phase, Phase::Over) {
            return turn;
        }
        if let Some(mine) = self.mine() {
            if !mine.is_ours(memory, self.config.epoch) {
                let name = mine.read(memory).map(|block| block.card.name);
                self.phase = Phase::Over;
                turn.event = Some(Event::Taken(name.unwrap_or_default()));
                return turn;
            }
            if now >= self.beat_at {
                self.show(memory, mine);
            }
        }
        if now >= self.beat_at {
            self.beat_at = now + BEAT;
            self.mend(now, memory);
        }
        match self.phase {
            Phase::Waiting | Phase::Named(_) => self.approach(now, memory, rung, &mut turn),
            Phase::Up { epoch, beat, seen } => {
                let left = self.peer.is_some_and(gone);
                self.watch(now, memory, epoch, (beat, seen), left, &mut turn);
            }
            Phase::Foreign => self.watch_foreign(now, memory, rung, &mut turn),
            Phase::Looking { .. } | Phase::Down | Phase::Over => {}
        }
        turn
    }

    /// What this end has written and others rely on may have been written over, by a guest that has crashed for example: it must not
    /// keep everybody out from then on.
    fn mend<M: QueueMemory>(&mut self, now: u64, memory: &M) {
        let attached = match self.phase {
            Phase::Waiting | Phase::Foreign => 0,
            Phase::Named(epoch) | Phase::Up { epoch, .. } => epoch,
            Phase::Looking { .. } | Phase::Down | Phase::Over => return,
        };
        if let Some(mine) = self.mine() {
            mine.mend(memory, attached, &self.config.card);
        }
        if matches!(self.phase, Phase::Waiting | Phase::Named(_)) && self.has_lost_layout(memory) {
            self.make_layout(now, memory);
            self.phase = Phase::Waiting;
        }
        if matches!(self.phase, Phase::Waiting) && self.has_lost_head(memory) {
            self.live_again(now, memory);
        }
    }

    fn show<M: QueueMemory>(&mut self, memory: &M, mine: Place) {
        self.beat = self.beat.wrapping_add(1);
        mine.beat(memory, self.beat);
    }

    /// Whether there is another end in this place.
    fn look<M: QueueMemory>(
        &mut self,
        now: u64,
        memory: &M,
        seen: Option<(u32, u32)>,
        until: u64,
        gone: &dyn Fn(u16) -> bool,
        turn: &mut Turn,
    ) {
        let block = self.mine().and_then(|mine| mine.read(memory));
        let Some(block) = block.filter(|block| block.state == PRESENT) else {
            return self.take_place(now, memory, turn);
        };
        let own = block.card.id.is_some() && block.card.id == self.config.card.id;
        if own || block.card.id.is_some_and(gone) {
            return self.take_place(now, memory, turn);
        }
        match seen {
            None => {
                self.phase = Phase::Looking {
                    seen: Some((block.epoch, block.beat)),
                    until: now + STALE,
                };
            }
            Some(seen) if seen != (block.epoch, block.beat) => {
                self.phase = Phase::Over;
                turn.event = Some(Event::Taken(block.card.name));
            }
            Some(_) if now >= until => self.take_place(now, memory, turn),
            Some(_) => {}
        }
    }

    /// Takes the place: says what it is, and names nobody.
    fn take_place<M: QueueMemory>(&mut self, now: u64, memory: &M, turn: &mut Turn) {
        let mine = self.mine();
        if let Some(mine) = mine {
            mine.withdraw(memory);
        }
        self.wait_from(now, memory);
        self.life = None;
        if self.config.geometry.is_amp() && self.config.side == Side::Device {
            self.make_layout(now, memory);
        }
        if let Some(mine) = mine {
            mine.write(memory, self.config.epoch, &self.config.card);
        }
        self.beat = 0;
        self.beat_at = now + BEAT;
        self.phase = Phase::Waiting;
        turn.ring = Some(self.whom(memory));
    }

    fn wait_from<M: QueueMemory>(&mut self, now: u64, memory: &M) {
        self.since = now;
        self.last = None;
        let found = self.theirs().and_then(|theirs| theirs.read(memory));
        self.found = found.map(|block| (block.epoch, block.beat));
        self.pings = Pings::default();
        if !self.config.geometry.is_amp() {
            self.found_head = self.incoming(memory)[0];
        }
    }

    /// Indices of the page that the other side fills.
    fn incoming<M: QueueMemory>(&self, memory: &M) -> [u32; 2] {
        let geometry = &self.config.geometry;
        geometry.indices(memory, other(self.config.side))
    }

    /// Who may wait on the other side.
    fn whom<M: QueueMemory>(&self, memory: &M) -> Whom {
        let block = self.theirs().and_then(|theirs| theirs.read(memory));
        match block.and_then(|block| Some((block.card.id?, block.card.vector))) {
            Some((id, vector)) => Whom::One(id, vector),
            None => Whom::Everyone,
        }
    }

    /// Not together with anybody yet.
    fn approach<M: QueueMemory>(&mut self, now: u64, memory: &M, rung: bool, turn: &mut Turn) {
        let block = self.theirs().and_then(|theirs| theirs.read(memory));
        if let Some(block) = &block
            && self.lives(block)
        {
            return self.join(now, memory, block, turn);
        }
        let unfinished = self.theirs_unfinished(memory);
        let seen = block
            .as_ref()
            .map(|block| (block.epoch, block.beat, block.state))
            .or(unfinished.then_some((0, 0, PRESENT)));
        let words = self.their_words(memory);
        if self.last != Some((seen, words)) {
            if self.last.is_some_and(|(last, _)| last != seen) {
                self.forget_life(now, memory);
            }
            if self.last.is_none_or(|(last, _)| last != seen) {
                self.base = words;
            }
            self.last = Some((seen, words));
            self.still = now;
        }
        // What one of ours has left was said to another end.
        if seen.is_some() && words == self.base {
            return;
        }
        let present = seen.filter(|(_, _, state)| *state != LEAVING);
        let (since, grace) = match (present, self.config.side) {
            // There was one of ours. If it still is and was only held up, it shows that before it goes on.
            (Some(_), _) => (self.still.max(self.since), STALE),
            (None, Side::Driver) => (self.since, GRACE),
            (None, Side::Device) => (self.since, 0),
        };
        if now.saturating_sub(since) < grace {
            return;
        }
        let queues = match self.config.geometry.is_amp() {
            true => self.approach_amp(now, memory, rung && seen.is_none()),
            false => self.approach_pages(memory, seen.is_some()),
        };
        if let Some(queues) = queues {
            let now_there = self.theirs().and_then(|theirs| theirs.read(memory));
            if now_there.as_ref().map(|block| (block.epoch, block.beat))
                != block.as_ref().map(|block| (block.epoch, block.beat))
            {
                // An end of ours, which has come in between.
                self.forget_life(now, memory);
                return;
            }
            self.pings = Pings {
                heard: now,
                ..Pings::default()
            };
            self.phase = Phase::Foreign;
            turn.event = Some(Event::Up { peer: None, queues });
        }
    }

    fn theirs_unfinished<M: QueueMemory>(&self, memory: &M) -> bool {
        self.theirs()
            .is_some_and(|theirs| theirs.is_unfinished(memory))
    }

    /// Whether a block shows that somebody is there and free: it has changed, or names this end.
    fn lives(&self, block: &Block) -> bool {
        block.state == PRESENT
            && block.epoch != self.served
            // Until it lets go of another end, it may still read what that one has written.
            && (block.attached == 0 || block.attached == self.config.epoch)
            && (block.attached == self.config.epoch || self.found != Some((block.epoch, block.beat)))
    }

    /// An end of ours is there.
    fn join<M: QueueMemory>(&mut self, now: u64, memory: &M, block: &Block, turn: &mut Turn) {
        let (Some(mine), Some(theirs)) = (self.mine(), self.theirs()) else {
            return;
        };
        if !matches!(self.phase, Phase::Named(epoch) if epoch == block.epoch) {
            if !self.zero(memory) {
                return;
            }
            mine.attach(memory, block.epoch);
            self.phase = Phase::Named(block.epoch);
            self.show(memory, mine);
            turn.ring = Some(match block.card.id {
                Some(id) => Whom::One(id, block.card.vector),
                // Who can be rung without a number, if anybody.
                None => Whom::Nameless,
            });
        }
        // It may have named this end meanwhile, and not ring for it.
        let Some(block) = theirs.read(memory).filter(|now| now.epoch == block.epoch) else {
            return;
        };
        if block.attached != self.config.epoch {
            return;
        }
        let queues = match self.layout {
            Some(layout) if self.config.geometry.is_amp() => Queues::Amp {
                layout,
                start: Start::default(),
            },
            _ => Queues::Pages { resumed: false },
        };
        self.phase = Phase::Up {
            epoch: block.epoch,
            beat: block.beat,
            seen: now,
        };
        self.peer = block.card.id;
        turn.event = Some(Event::Up {
            peer: Some((block.epoch, block.card)),
            queues,
        });
    }

    /// Together with an end of ours.
    fn watch<M: QueueMemory>(
        &mut self,
        now: u64,
        memory: &M,
        epoch: u32,
        (beat, seen): (u32, u64),
        left: bool,
        turn: &mut Turn,
    ) {
        let block = self.theirs().and_then(|theirs| theirs.pulse(memory));
        let why = match block {
            None => "it has taken its block away",
            Some(block) if block.epoch != epoch => "it has begun anew",
            Some(block) if block.state != PRESENT => "it has ended",
            Some(block) if block.attached != self.config.epoch => "it has let go",
            Some(block) if block.beat != beat && !left => {
                self.phase = Phase::Up {
                    epoch,
                    beat: block.beat,
                    seen: now,
                };
                return;
            }
            Some(_) if left => "it has left the server",
            Some(_) if now.saturating_sub(seen) >= DEAD => "it shows no sign of life",
            Some(_) => return,
        };
        self.part(epoch);
        turn.event = Some(Event::Down(why));
    }

    /// The other end stays named until this one is done with the queues.
    fn part(&mut self, epoch: u32) {
        if self.config.side == Side::Device {
            self.served = epoch;
        }
        self.phase = Phase::Down;
    }

    fn name_nobody<M: QueueMemory>(&self, memory: &M) {
        if let Some(mine) = self.mine()
            && mine.is_ours(memory, self.config.epoch)
        {
            mine.attach(memory, 0);
        }
    }

    /// This end does not use the queues of its connection any more, if it has one; says who is to be told.
    pub(super) fn let_go<M: QueueMemory>(&mut self, memory: &M) -> Option<Whom> {
        match self.phase {
            Phase::Up { epoch, .. } => self.part(epoch),
            Phase::Foreign => self.part(0),
            Phase::Down => {}
            _ => return None,
        }
        self.name_nobody(memory);
        // Who is not of ours would only read once more what was said before.
        Some(self.whom(memory)).filter(|whom| !matches!(whom, Whom::Everyone))
    }

    /// The device is done with a connection and waits for the next one.
    pub(super) fn again<M: QueueMemory>(&mut self, now: u64, memory: &M) {
        if matches!(self.phase, Phase::Over | Phase::Looking { .. }) {
            return;
        }
        self.name_nobody(memory);
        self.wait_from(now, memory);
        self.phase = Phase::Waiting;
        self.live_again(now, memory);
    }

    /// Looks once more whether its place is free, for an end that has lost it.
    pub(super) fn retake<M: QueueMemory>(&mut self, now: u64, memory: &M) -> Turn {
        match self.phase {
            Phase::Over => self.begin_anew(now, memory, self.config.epoch),
            _ => Turn::default(),
        }
    }

    /// The last words of this end; says who is to be told.
    pub(super) fn leave<M: QueueMemory>(&mut self, memory: &M) -> Option<Whom> {
        if matches!(self.phase, Phase::Over | Phase::Looking { .. }) {
            return None;
        }
        let whom = self.whom(memory);
        self.phase = Phase::Over;
        if let Some(mine) = self.mine() {
            if !mine.is_ours(memory, self.config.epoch) {
                return None;
            }
            mine.leave(memory);
        }
        if let Some(layout) = self.layout.filter(|_| self.config.geometry.is_amp()) {
            let amp = Part::new(memory, &self.config.geometry);
            let (at, word) = Life::shutdown().word();
            amp.store_release(layout.head(self.config.side) + at, word);
            if self.config.side == Side::Device {
                amp::Layout::withdraw(&amp);
            }
        }
        Some(whom)
    }
}

#[cfg(test)]
#[path = "machine_test.rs"]
mod tests;
