// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two ends under a seeded scheduler: killed at any store, started again, held up, interrupted by the other one between any two stores.

use super::*;
use crate::ivshmem::spec::QueueLayout;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use vmsg_mem::spsc::{Consumer, Layout, Producer};

const BYTES: usize = 16 << 10;

/// SplitMix64.
#[derive(Clone)]
struct Random(Rc<Cell<u64>>);

impl Random {
    fn new(seed: u64) -> Self {
        Self(Rc::new(Cell::new(seed)))
    }

    fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&self, n: u64) -> u64 {
        self.next() % n
    }

    fn word(&self) -> u32 {
        let [a, b, c, d, ..] = self.next().to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }
}

type Hook = Box<dyn Fn()>;

/// The memory, as one end sees it.
#[derive(Clone)]
struct Sim {
    words: Rc<Vec<Cell<u32>>>,
    /// Stores until the end is dead.
    left: Rc<Cell<u64>>,
    /// What happens between two stores.
    hook: Rc<RefCell<Option<Hook>>>,
}

impl Sim {
    fn new() -> Self {
        Self {
            words: Rc::new((0..BYTES / 4).map(|_| Cell::new(0)).collect()),
            left: Rc::new(Cell::new(u64::MAX)),
            hook: Rc::default(),
        }
    }

    /// The same memory for another end.
    fn other(&self) -> Self {
        Self {
            words: Rc::clone(&self.words),
            ..Self::new()
        }
    }

    fn part(&self, offset: usize, len: usize) -> Window {
        Window {
            sim: self.clone(),
            offset,
            len,
        }
    }

    fn put(&self, offset: usize, value: u32) {
        match self.left.get() {
            0 => return,
            u64::MAX => {}
            left => self.left.set(left - 1),
        }
        self.words[offset / 4].set(value);
        if let Ok(hook) = self.hook.try_borrow()
            && let Some(hook) = &*hook
        {
            hook();
        }
    }
}

struct Window {
    sim: Sim,
    offset: usize,
    len: usize,
}

macro_rules! memory {
    ($name:ident, $self:ident => $sim:expr, $base:expr, $len:expr) => {
        impl QueueMemory for $name {
            fn len(&$self) -> usize {
                $len
            }
            fn is_aligned(&self) -> bool {
                true
            }
            fn load_relaxed(&$self, offset: usize) -> u32 {
                $sim.words[($base + offset) / 4].get()
            }
            fn load_acquire(&$self, offset: usize) -> u32 {
                $sim.words[($base + offset) / 4].get()
            }
            fn store_relaxed(&$self, offset: usize, value: u32) {
                $sim.put($base + offset, value);
            }
            fn store_release(&$self, offset: usize, value: u32) {
                $sim.put($base + offset, value);
            }
            fn take(&self, _: usize) -> bool {
                false
            }
            fn fence(&self) {}
            fn read(&$self, offset: usize, into: &mut [u8]) {
                for (at, to) in ($base + offset..).step_by(4).zip(into.chunks_mut(4)) {
                    to.copy_from_slice(&$sim.words[at / 4].get().to_le_bytes()[..to.len()]);
                }
            }
            fn write(&$self, offset: usize, from: &[u8]) {
                for (at, from) in ($base + offset..).step_by(4).zip(from.chunks(4)) {
                    let mut word = [0; 4];
                    word[..from.len()].copy_from_slice(from);
                    $sim.put(at, u32::from_le_bytes(word));
                }
            }
        }
    };
}

memory!(Sim, self => self, 0, BYTES);
memory!(Window, self => self.sim, self.offset, self.len);

enum Pair {
    Pages(Producer<Window>, Consumer<Window>),
    Amp(amp::Queue<Window>),
}

impl Pair {
    fn send(&mut self, message: &[u8; 64]) -> bool {
        match self {
            Self::Pages(tx, _) => tx.try_push(message).is_ok() && tx.publish(),
            Self::Amp(queue) => queue.try_push(message).is_ok() && queue.publish(),
        }
    }

    fn receive(&mut self, message: &mut [u8; 64]) -> Result<bool, ()> {
        let popped = match self {
            Self::Pages(_, rx) => rx.try_pop_sized(message, |_| 64),
            Self::Amp(queue) => queue.try_pop_sized(message, |_| 64),
        };
        match self {
            Self::Pages(_, rx) => drop(rx.release()),
            Self::Amp(queue) => queue.release(),
        }
        popped.map(|popped| popped.is_some()).map_err(|_| ())
    }
}

struct Session {
    pair: Pair,
    theirs: u32,
    sent: u32,
    received: u32,
}

struct One {
    sim: Sim,
    machine: Machine,
    epoch: u32,
    events: Vec<Event>,
    session: Option<Session>,
    rung: bool,
    dead: bool,
    /// When it looked last.
    looked: u64,
}

/// Both ends. Everything an end does, it does in `turn`.
struct World {
    geometry: Geometry,
    random: Random,
    now: Cell<u64>,
    memory: Sim,
    ends: [RefCell<Option<One>>; 2],
    epochs: Cell<u32>,
    /// Another one may write anything.
    hostile: bool,
    joined: Cell<u32>,
    messages: Cell<u32>,
}

const SIDES: [Side; 2] = [Side::Device, Side::Driver];

impl World {
    fn new(layout: QueueLayout, seed: u64, hostile: bool) -> Rc<Self> {
        let base = if layout == QueueLayout::Amp { 4096 } else { 0 };
        let world = Rc::new(Self {
            geometry: Geometry::new(layout, base, BYTES).unwrap(),
            random: Random::new(seed),
            now: Cell::new(1000),
            memory: Sim::new(),
            ends: [RefCell::default(), RefCell::default()],
            epochs: Cell::new(1),
            hostile,
            joined: Cell::new(0),
            messages: Cell::new(0),
        });
        if seed.is_multiple_of(3) {
            // What another use of the memory has left.
            for word in world.memory.words.iter().take(3000) {
                word.set(world.random.word());
            }
        }
        world
    }

    fn epoch(&self) -> u32 {
        self.epochs.set(self.epochs.get() + 1);
        self.epochs.get()
    }

    fn start(self: &Rc<Self>, side: usize) {
        let sim = self.memory.other();
        let world = Rc::downgrade(self);
        let hook = move || {
            let Some(world) = world.upgrade() else { return };
            if world.random.below(4) == 0 {
                world.turn(1 - side);
            }
        };
        *sim.hook.borrow_mut() = Some(Box::new(hook));
        let epoch = self.epoch();
        // Numbers of peers that come again may be the old ones or not; some have none.
        let id = match self.random.below(3) {
            0 => None,
            1 => Some(u16::try_from(side).unwrap()),
            _ => Some(u16::try_from(self.random.below(1000)).unwrap() + 10),
        };
        let config = Config {
            side: SIDES[side],
            geometry: self.geometry,
            card: Card {
                id,
                name: format!("{side} of {epoch}"),
                ..Card::default()
            },
            epoch,
            message: 64,
            blind: false,
        };
        *self.ends[side].borrow_mut() = Some(One {
            sim,
            machine: Machine::new(config),
            epoch,
            events: Vec::new(),
            session: None,
            rung: false,
            dead: false,
            looked: self.now.get(),
        });
    }

    /// One end looks, sends and receives; not if it does so already.
    fn turn(&self, side: usize) {
        let Ok(mut end) = self.ends[side].try_borrow_mut() else {
            return;
        };
        let Some(one) = end.as_mut().filter(|one| !one.dead) else {
            return;
        };
        one.looked = self.now.get();
        let turn = one.machine.poll(
            self.now.get(),
            &one.sim,
            std::mem::take(&mut one.rung),
            &|_| false,
        );
        one.events.extend(turn.event);
        let mut ring = turn.ring.is_some();
        for event in std::mem::take(&mut one.events) {
            ring |= self.happened(one, side, event);
        }
        self.talk(one, side);
        one.dead |= one.sim.left.get() == 0;
        drop(end);
        if ring
            && let Ok(mut other) = self.ends[1 - side].try_borrow_mut()
            && let Some(other) = other.as_mut()
        {
            other.rung = true;
        }
    }

    fn happened(&self, one: &mut One, side: usize, event: Event) -> bool {
        match event {
            Event::Up { peer, queues } => {
                if peer.is_none() && !self.hostile {
                    // One that was killed in the very moment in which it wrote may leave what looks like a word of a foreign one, and so may one that was held up for too long. Nobody who
                    // lives is taken for that.
                    let other = self.ends[1 - side].try_borrow();
                    let lives = other.is_ok_and(|other| {
                        other.as_ref().is_some_and(|one| {
                            let held_up = self.now.get() - one.looked >= STALE;
                            let begun = !one.machine.is_looking() && !held_up;
                            begun && !one.dead && one.sim.left.get() > 0
                        })
                    });
                    assert!(!lives, "an end of ours was not known for one");
                }
                let geometry = &self.geometry;
                let pair = match queues {
                    Queues::Pages { resumed } => {
                        let tx = one.sim.part(geometry.page(SIDES[side]), 4096);
                        let rx = one.sim.part(geometry.page(SIDES[1 - side]), 4096);
                        match resumed {
                            false => Producer::new(tx, Layout::PLAIN).and_then(|tx| {
                                Consumer::new(rx, Layout::PLAIN).map(|rx| Pair::Pages(tx, rx))
                            }),
                            true => Producer::resume(tx, Layout::PLAIN).and_then(|tx| {
                                Consumer::resume(rx, Layout::PLAIN).map(|rx| Pair::Pages(tx, rx))
                            }),
                        }
                    }
                    Queues::Amp { layout, start } => {
                        let part = one.sim.part(geometry.base, layout.len());
                        amp::Queue::new(part, &layout, SIDES[side], start).map(Pair::Amp)
                    }
                };
                let resumed_foreign = peer.is_none();
                let Ok(pair) = pair else {
                    assert!(
                        self.hostile || resumed_foreign,
                        "queues of ours that cannot be"
                    );
                    return self.end(one, side);
                };
                self.joined.set(self.joined.get() + 1);
                one.session = Some(Session {
                    pair,
                    theirs: peer.map_or(0, |(epoch, _)| epoch),
                    sent: 0,
                    received: 0,
                });
                false
            }
            Event::Down(_) => self.end(one, side),
            Event::Taken(name) => {
                assert!(
                    self.hostile || one.sim.left.get() == 0,
                    "a place that nobody else has: {name}"
                );
                one.dead = true;
                false
            }
        }
    }

    /// Is done with a connection, and goes on.
    fn end(&self, one: &mut One, side: usize) -> bool {
        one.session = None;
        let told = one.machine.let_go(&one.sim).is_some();
        match SIDES[side] {
            Side::Device => {
                one.machine.again(self.now.get(), &one.sim);
                told
            }
            Side::Driver => {
                one.epoch = self.epoch();
                let turn = one.machine.begin_anew(self.now.get(), &one.sim, one.epoch);
                told || turn.ring.is_some()
            }
        }
    }

    fn talk(&self, one: &mut One, side: usize) {
        let Some(session) = &mut one.session else {
            return;
        };
        let mut message = [0; 64];
        loop {
            match session.pair.receive(&mut message) {
                Ok(false) => break,
                Ok(true) => {
                    self.messages.set(self.messages.get() + 1);
                    if self.hostile || session.theirs == 0 {
                        if self.random.below(80) == 0 {
                            break;
                        }
                        continue;
                    }
                    let word =
                        |at: usize| u32::from_le_bytes(message[at..at + 4].try_into().unwrap());
                    let said = (word(0), word(4), word(8));
                    let expected = (session.theirs, one.epoch, session.received);
                    assert_eq!(said, expected, "a message of another connection");
                    session.received += 1;
                }
                Err(()) => {
                    // The other one may have been killed while it made an index; never so of ours, whose stores are whole.
                    assert!(
                        self.hostile || session.theirs == 0,
                        "an index that cannot be"
                    );
                    self.end(one, side);
                    return;
                }
            }
        }
        if self.random.below(2) == 0 {
            message[..4].copy_from_slice(&one.epoch.to_le_bytes());
            message[4..8].copy_from_slice(&session.theirs.to_le_bytes());
            message[8..12].copy_from_slice(&session.sent.to_le_bytes());
            if session.pair.send(&message) {
                session.sent += 1;
            }
        }
    }

    fn act(self: &Rc<Self>) {
        let side = usize::try_from(self.random.below(2)).unwrap();
        match self.random.below(24) {
            0..12 => self.turn(side),
            12..18 => self.now.set(self.now.get() + self.random.below(200)),
            18 => self.now.set(self.now.get() + self.random.below(1500)),
            19 => *self.ends[side].borrow_mut() = None,
            20 => {
                // Killed in the middle of what it does next.
                if let Some(one) = &*self.ends[side].borrow() {
                    one.sim.left.set(self.random.below(40));
                }
                self.turn(side);
            }
            21 => {
                if let Some(one) = &mut *self.ends[side].borrow_mut()
                    && !one.dead
                {
                    one.session = None;
                    one.machine.leave(&one.sim);
                    one.dead = true;
                }
            }
            _ => {
                let gone = self.ends[side].borrow().as_ref().is_none_or(|one| one.dead);
                if gone {
                    self.start(side);
                }
            }
        }
        if self.hostile && self.random.below(2) == 0 {
            let word = match self.random.below(3) {
                // Where it hurts most.
                0 => 4096 / 4 - 32 + self.random.below(100),
                1 => self.random.below(40),
                _ => self.random.below(BYTES as u64 / 4),
            };
            let value = match self.random.below(4) {
                0 => 0,
                1 => super::super::block::MAGIC,
                2 => u32::from(amp::QUEUE_MAGIC) | (self.random.word() & 0x7) << 16,
                _ => self.random.word(),
            };
            self.memory.words[usize::try_from(word).unwrap()].set(value);
        }
    }

    /// From now on nothing happens to anybody: both must come together, and stay so.
    fn settle(self: &Rc<Self>) {
        for end in &self.ends {
            if let Some(one) = &mut *end.borrow_mut() {
                match one.sim.left.get() {
                    0 => one.dead = true,
                    _ => one.sim.left.set(u64::MAX),
                }
            }
        }
        for side in [0, 1] {
            let gone = self.ends[side].borrow().as_ref().is_none_or(|one| one.dead);
            if gone {
                self.start(side);
            }
        }
        let turns = |times: u32| {
            for _ in 0..times {
                self.now.set(self.now.get() + 50);
                self.turn(0);
                self.turn(1);
            }
        };
        turns(300);
        let before = (self.joined.get(), self.messages.get());
        for end in &self.ends {
            let end = end.borrow();
            let one = end.as_ref().expect("started");
            assert!(
                one.session.is_some(),
                "they have not come together: {:?}",
                one.machine
            );
        }
        turns(100);
        assert_eq!(self.joined.get(), before.0, "they have not stayed together");
        assert!(self.messages.get() > before.1 + 50);
    }
}

/// Runs `act` many times for each seed; a failing seed is named. There are fewer where each takes ten times as long.
fn seeds(layout: QueueLayout, count: u64, hostile: bool) {
    let count = if cfg!(debug_assertions) {
        count / 10
    } else {
        count
    };
    let from = std::env::var("SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let all = from.map_or(0..count, |seed: u64| seed..seed + 1);
    for seed in all {
        let run = std::panic::catch_unwind(|| {
            let world = World::new(layout, seed, hostile);
            for _ in 0..400 {
                world.act();
            }
            if !hostile {
                world.settle();
            }
        });
        assert!(run.is_ok(), "SEED={seed}");
    }
}

#[test]
fn ends_over_pages_find_each_other_whatever_happens() {
    seeds(QueueLayout::Spsc, 5000, false);
}

#[test]
fn ends_over_the_amp_layout_find_each_other_whatever_happens() {
    seeds(QueueLayout::Amp, 5000, false);
}

#[test]
fn whoever_writes_anything_anywhere_breaks_connections_alone() {
    seeds(QueueLayout::Spsc, 3000, true);
    seeds(QueueLayout::Amp, 3000, true);
}
