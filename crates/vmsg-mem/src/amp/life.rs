// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How two ends come together and part: words read, words to be stored.

use super::{Head, Side, Status, index_word, state_word};

/// A driver that finds the device running waits so long (milliseconds) for it to notice that a driver begins.
const NOTICE: u64 = 2000;

/// Where an end's indices begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// The element of its own queue that it writes first.
    pub tail: u16,
    /// The element of the other side's queue that it reads first.
    pub head: u16,
}

/// A word of the own queue head to be stored (release), in the order in which they are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// The first one.
    State(u32),
    /// The second one.
    Indices(u32),
}

impl Store {
    /// Where in the queue head it goes, in bytes, and what.
    pub const fn word(self) -> (usize, u32) {
        match self {
            Self::State(word) => (0, word),
            Self::Indices(word) => (4, word),
        }
    }
}

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Messages can go, with own indices that begin there.
    Up(Start),
    /// Not any more. [`Life::again`] when this end is done with that.
    Down(End),
}

/// How the other side has parted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It begins anew.
    Restarted,
    /// It has ended in order.
    Shutdown,
    /// It takes this side for dead.
    TookUsForDead,
    /// Its queue head is not one any more.
    Broken,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Says INIT. `found` is what the other side's head was at the beginning, `own` what stood in this one.
    Waiting { found: Head, own: Head, since: u64 },
    /// Indices are zero, says READY.
    Ready,
    /// Says RUN.
    Up { seen_running: bool },
    /// What it said was told to be over.
    Down,
}

/// One end's life: without clock and memory. [`Self::step`] whenever the other side may have stored something, and from time to
/// time, for whoever changes its status does not ring.
///
/// A device may find a driver that runs and has never seen it end: it was itself that ended, or the driver is long gone and only
/// the memory is left. It waits until the driver stores something or has something for it to read, and goes on
/// where the driver is.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    side: Side,
    elements: u16,
    phase: Phase,
}

/// Up to four words to be stored, in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stores {
    words: [Option<Store>; 4],
    len: usize,
}

impl Stores {
    fn push(&mut self, store: Store) {
        if let Some(word) = self.words.get_mut(self.len) {
            *word = Some(store);
            self.len += 1;
        }
    }

    fn into_iter(self) -> impl Iterator<Item = Store> {
        self.words.into_iter().flatten()
    }
}

impl Life {
    /// Begins, `now` in milliseconds of any clock; `own` and `theirs` are the queue heads as they are found, `elements` the
    /// number of the queues' elements.
    pub fn begin(side: Side, elements: u16, now: u64, own: Head, theirs: Head) -> (Self, Store) {
        let phase = Phase::Waiting {
            found: theirs,
            own,
            since: now,
        };
        let life = Self {
            side,
            elements,
            phase,
        };
        (life, Store::State(state_word(Status::Init)))
    }

    /// Whether messages can go.
    pub const fn is_up(&self) -> bool {
        matches!(self.phase, Phase::Up { .. })
    }

    /// Looks at the other side's queue head; `rung` if a doorbell was, since the last time. What it returns is to be stored before
    /// anything else is done.
    pub fn step(
        &mut self,
        now: u64,
        theirs: Head,
        rung: bool,
    ) -> (impl Iterator<Item = Store> + use<>, Option<Event>) {
        let mut stores = Stores::default();
        let event = match self.phase {
            Phase::Down => None,
            Phase::Up { seen_running } => self.watch(theirs, seen_running).map(Event::Down),
            Phase::Waiting { .. } | Phase::Ready => {
                let start = self.approach(now, theirs, rung, &mut stores);
                start.map(Event::Up)
            }
        };
        match event {
            Some(Event::Up(_)) => {
                self.phase = Phase::Up {
                    seen_running: theirs.status() == Some(Status::Run),
                };
            }
            Some(Event::Down(_)) => self.phase = Phase::Down,
            None => {}
        }
        (stores.into_iter(), event)
    }

    /// Up: how the other side has parted.
    fn watch(&mut self, theirs: Head, seen_running: bool) -> Option<End> {
        match theirs.status() {
            Some(Status::Run) => {
                self.phase = Phase::Up { seen_running: true };
                None
            }
            Some(Status::Ready) if !seen_running => None,
            Some(Status::Init | Status::Ready) => Some(End::Restarted),
            Some(Status::Shutdown) => Some(End::Shutdown),
            Some(Status::PeerDead) => Some(End::TookUsForDead),
            Some(Status::Unknown) | None => Some(End::Broken),
        }
    }

    /// Not up: goes on as far as the other side allows.
    fn approach(
        &mut self,
        now: u64,
        theirs: Head,
        rung: bool,
        stores: &mut Stores,
    ) -> Option<Start> {
        let status = theirs.status()?;
        if let Phase::Waiting { found, own, since } = self.phase {
            let begins = match (self.side, status) {
                (_, Status::Init | Status::Ready) => true,
                // It has not noticed yet that a driver begins, and would take its indices for those of the last one.
                (Side::Driver, Status::Run) => now.saturating_sub(since) >= NOTICE,
                (Side::Device, Status::Run) => {
                    let start = self.go_on(found, own, theirs, rung)?;
                    stores.push(Store::Indices(index_word(start.tail, start.head)));
                    stores.push(Store::State(state_word(Status::Run)));
                    return Some(start);
                }
                _ => false,
            };
            if !begins {
                return None;
            }
            stores.push(Store::Indices(index_word(0, 0)));
            stores.push(Store::State(state_word(Status::Ready)));
            self.phase = Phase::Ready;
        }
        match status {
            Status::Ready | Status::Run => {
                stores.push(Store::State(state_word(Status::Run)));
                Some(Start::default())
            }
            _ => None,
        }
    }

    /// Where to go on with a driver that runs.
    fn go_on(&self, found: Head, own: Head, theirs: Head, rung: bool) -> Option<Start> {
        // Nothing of this end stands there: whatever the driver runs on, it is not this memory as it was.
        own.status()?;
        let start = Start {
            tail: theirs.head(),
            head: own.head(),
        };
        let in_range = [start.tail, start.head, theirs.tail()]
            .iter()
            .all(|index| *index < self.elements);
        let speaks = theirs.tail() != start.head;
        let lives = theirs != found || speaks || rung;
        (in_range && lives).then_some(start)
    }

    /// This end is done with a connection that is over, and waits for the next one; `own` and `theirs` are the queue heads now.
    pub fn again(
        &mut self,
        now: u64,
        own: Head,
        theirs: Head,
    ) -> impl Iterator<Item = Store> + use<> {
        let mut stores = Stores::default();
        if self.side == Side::Device && theirs.status() == Some(Status::Shutdown) {
            // So that the next driver, which finds this, need not wait until it is noticed.
            stores.push(Store::State(state_word(Status::Init)));
            stores.push(Store::Indices(index_word(0, 0)));
            stores.push(Store::State(state_word(Status::Ready)));
            self.phase = Phase::Ready;
        } else {
            stores.push(Store::State(state_word(Status::Init)));
            self.phase = Phase::Waiting {
                found: theirs,
                own,
                since: now,
            };
        }
        stores.into_iter()
    }

    /// The last word of this end.
    pub const fn shutdown() -> Store {
        Store::State(state_word(Status::Shutdown))
    }

    /// What an end says from the beginning that has come together with the other one in another way than this: its indices are zero.
    pub const fn joined() -> [Store; 2] {
        [
            Store::Indices(index_word(0, 0)),
            Store::State(state_word(Status::Run)),
        ]
    }
}
