// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ends that are not ours: docs/bus-ivshmem.md §6.

use super::super::geometry::other;
use super::layout::load_layout;
use super::part::Part;
use super::{DEAD, Event, Machine, Phase, Queues, SLOTS, Turn};
use vmsg_mem::QueueMemory;
use vmsg_mem::amp::{self, Head, Life, Side};

/// Signs of life of an end that is not ours.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pings {
    pub(super) count: u32,
    pub(super) last: u64,
    pub(super) period: u64,
    pub(super) heard: u64,
}

impl Machine {
    /// A foreign end of the AMP layout.
    pub(super) fn approach_amp<M: QueueMemory>(
        &mut self,
        now: u64,
        memory: &M,
        rung: bool,
    ) -> Option<Queues> {
        let side = self.config.side;
        let amp = Part::new(memory, &self.config.geometry);
        if side == Side::Driver {
            match load_layout(&amp) {
                Ok(layout) if layout == self.layout => {}
                Ok(layout) => {
                    self.layout = layout;
                    self.life = None;
                }
                Err(error) => {
                    self.layout = None;
                    self.layout_error = Some(error);
                }
            }
        }
        let layout = self.layout?;
        let (own, theirs) = (layout.head(side), layout.head(other(side)));
        let their_head = Head::load(&amp, theirs);
        if self.life.is_none() {
            let (life, store) = Life::begin(
                side,
                layout.elements(),
                now,
                Head::load(&amp, own),
                their_head,
            );
            let (at, word) = store.word();
            amp.store_release(own + at, word);
            self.life = Some(life);
        }
        let (stores, event) = self.life.as_mut()?.step(now, their_head, rung);
        for (at, word) in stores.map(amp::Store::word) {
            amp.store_release(own + at, word);
        }
        match event {
            Some(amp::Event::Up(start)) => Some(Queues::Amp { layout, start }),
            _ => None,
        }
    }

    /// A foreign end of the layouts with pages, which is seen by what it does.
    pub(super) fn approach_pages<M: QueueMemory>(
        &mut self,
        memory: &M,
        one_of_ours: bool,
    ) -> Option<Queues> {
        let up = match self.config.side {
            Side::Driver => self.config.blind,
            Side::Device => {
                let [head, tail] = self.incoming(memory);
                if head.max(tail) >= SLOTS {
                    return None;
                }
                // Of ours there are other words than those it has left, or this would not be asked.
                one_of_ours || head != tail || head != self.found_head
            }
        };
        up.then_some(Queues::Pages { resumed: true })
    }

    /// Together with another end.
    pub(super) fn watch_foreign<M: QueueMemory>(
        &mut self,
        now: u64,
        memory: &M,
        rung: bool,
        turn: &mut Turn,
    ) {
        let block = self.theirs().and_then(|theirs| theirs.read(memory));
        if block.is_some_and(|block| self.lives(&block)) {
            self.part(0);
            turn.event = Some(Event::Down("an end of ours has come in its place"));
            return;
        }
        let Pings {
            count,
            last,
            period,
            heard,
        } = self.pings;
        if count >= 2 && now.saturating_sub(heard.max(last)) >= DEAD.max(3 * period) {
            self.part(0);
            turn.event = Some(Event::Down("it does not ping any more"));
            return;
        }
        let (Some(layout), Some(life)) = (self.layout, &mut self.life) else {
            return;
        };
        let amp = Part::new(memory, &self.config.geometry);
        let their_head = Head::load(&amp, layout.head(other(self.config.side)));
        let (_, event) = life.step(now, their_head, rung);
        if let Some(amp::Event::Down(end)) = event {
            self.part(0);
            turn.event = Some(Event::Down(match end {
                amp::End::Restarted => "it has begun anew",
                amp::End::Shutdown => "it has shut down",
                amp::End::TookUsForDead => "it takes this end for dead",
                amp::End::Broken => "its queue head is none any more",
            }));
        }
    }

    /// A message of a foreign end was received.
    pub(in super::super) fn heard(&mut self, now: u64, ping: bool) {
        self.pings.heard = now;
        if ping && matches!(self.phase, Phase::Foreign) {
            if self.pings.count > 0 {
                self.pings.period = self.pings.period.max(now.saturating_sub(self.pings.last));
            }
            self.pings.count = self.pings.count.saturating_add(1);
            self.pings.last = now;
        }
    }
}

#[cfg(test)]
#[path = "foreign_test.rs"]
mod tests;
