// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A story from any bytes: two ends, time, and somebody who writes any word at any moment. For tests and for `fuzz/`.

use super::block::Card;
use super::geometry::Geometry;
use super::machine::{Config, Event, Machine, Queues};
use super::spec::QueueLayout;
use std::sync::atomic::AtomicU64;
use vmsg_mem::amp::{self, Side};
use vmsg_mem::spsc::{Consumer, Layout, Producer};
use vmsg_mem::{DeviceRegion, QueueMemory};

const BYTES: usize = 48 << 10;
/// Where the layout begins, and where the memory ends that it may use.
const BASE: usize = 8 << 10;
const END: usize = BASE + (20 << 10);
const BLOCKS: usize = 128;

/// What stands where nobody has any business.
const GUARD: u64 = 0xa5a5_5a5a_0ff0_f00f;

/// The most that is played of one story.
const STEPS: usize = 400;

struct Bytes<'b>(&'b [u8]);

impl Bytes<'_> {
    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn half(&mut self) -> usize {
        let low = self.next().unwrap_or(0);
        usize::from(u16::from_le_bytes([low, self.next().unwrap_or(0)]))
    }
}

struct End {
    side: Side,
    machine: Machine,
    is_up: bool,
    together: bool,
}

struct World<'m> {
    memory: DeviceRegion<'m>,
    geometry: Geometry,
    now: u64,
    epochs: u32,
    ends: [End; 2],
}

fn card(side: Side) -> Card {
    Card {
        id: Some(match side {
            Side::Device => 0,
            Side::Driver => 7,
        }),
        vectors: 2,
        name: "an end with a name that is too long".to_owned(),
        ..Card::default()
    }
}

fn end(side: Side, geometry: Geometry, epoch: u32) -> End {
    let config = Config {
        side,
        geometry,
        card: card(side),
        epoch,
        message: 64,
        blind: false,
    };
    End {
        side,
        machine: Machine::new(config),
        is_up: false,
        together: false,
    }
}

impl World<'_> {
    fn epoch(&mut self) -> u32 {
        self.epochs += 1;
        self.epochs.wrapping_mul(0x9e37_79b9) | 1
    }

    /// Looks, as an owner of the end does, and does what that does about it.
    fn look(&mut self, which: usize, rung: bool, gone: bool) {
        let epoch = self.epoch();
        let Self {
            memory,
            geometry,
            now,
            ends,
            ..
        } = self;
        let End {
            side,
            machine,
            is_up,
            together,
        } = &mut ends[which];
        let turn = machine.poll(*now, memory, rung, &|_| gone);
        assert!(
            turn.event.is_some() || machine.deadline() > *now,
            "its owner would spin"
        );
        match turn.event {
            None => {}
            Some(Event::Up { peer, queues }) => {
                assert!(!*is_up, "twice");
                *is_up = true;
                *together = peer.is_some();
                if !opens(memory, geometry, *side, queues) {
                    *is_up = false;
                    part(machine, *side, *now, memory, epoch);
                }
            }
            Some(Event::Down(why)) => {
                assert!(!why.is_empty() && *is_up);
                (*is_up, *together) = (false, false);
                part(machine, *side, *now, memory, epoch);
            }
            Some(Event::Taken(name)) => {
                assert!(!name.contains(char::is_control));
                (*is_up, *together) = (false, false);
                part(machine, *side, *now, memory, epoch);
            }
        }
    }

    fn step(&mut self, bytes: &mut Bytes<'_>) -> Option<()> {
        let step = bytes.next()?;
        let which = usize::from(step >> 7);
        match step & 0x0f {
            0..=3 => self.look(which, step & 0x10 != 0, step & 0x60 == 0x60),
            4 => self.now += u64::from(bytes.next()?),
            5 => self.now += u64::from(bytes.next()?) * 40,
            // Any word.
            6..=8 => {
                let at = self.place(bytes.half());
                let value = match bytes.next()? {
                    0 => u32::from_le_bytes(*b"VMiv"),
                    1 => u32::from_le_bytes(*b"vmiv"),
                    small @ 2..64 => u32::from(small),
                    status @ 64..80 => 0x514f | u32::from(status & 15) << 16,
                    _ => u32::try_from(bytes.half() << 16 | bytes.half()).unwrap_or(u32::MAX),
                };
                assert!(self.memory.write_u32(at, value));
            }
            // One from elsewhere.
            9 | 10 => {
                let value = self.memory.read_u32(self.place(bytes.half()));
                let to = self.place(bytes.half());
                assert!(self.memory.write_u32(to, value.unwrap_or(0)));
            }
            // Its owner is killed, and begins anew.
            11 => {
                let (side, epoch) = (self.ends[which].side, self.epoch());
                self.ends[which] = end(side, self.geometry, epoch);
            }
            // The same in order.
            12 => {
                let (side, epoch) = (self.ends[which].side, self.epoch());
                self.ends[which].machine.leave(&self.memory);
                self.ends[which] = end(side, self.geometry, epoch);
            }
            // Its owner is done with the connection.
            13 => {
                let epoch = self.epoch();
                let End {
                    side,
                    machine,
                    is_up,
                    together,
                } = &mut self.ends[which];
                if std::mem::take(is_up) {
                    *together = false;
                    part(machine, *side, self.now, &self.memory, epoch);
                }
            }
            _ => {
                let machine = &mut self.ends[which].machine;
                machine.heard(self.now, step & 0x10 != 0);
            }
        }
        Some(())
    }

    /// A place where words mean something, mostly.
    fn place(&self, number: usize) -> usize {
        let from = BASE - BLOCKS;
        let len = match number & 3 {
            0 => END - from,
            1 => 2 * BLOCKS,
            _ if self.geometry.is_amp() => 512,
            _ => 256,
        };
        let page = if number & 4 != 0 && !self.geometry.is_amp() {
            4096
        } else {
            0
        };
        let at = from + page + (number >> 3) * 4 % len;
        at.min(END - 4)
    }

    fn guards(&self) -> bool {
        let guarded = (0..BASE - BLOCKS).chain(END..BYTES).step_by(8);
        guarded
            .into_iter()
            .all(|at| self.memory.read_u64(at) == Some(GUARD))
    }
}

/// What an owner does with the queues of a connection; false if they cannot be had.
fn opens(memory: &DeviceRegion<'_>, geometry: &Geometry, side: Side, queues: Queues) -> bool {
    match queues {
        Queues::Amp { layout, start } => {
            assert!(geometry.base + layout.len() <= END);
            assert!(usize::from(layout.element_size()) >= *crate::MESSAGE_SIZES.start());
            let memory = memory.get(geometry.base, layout.len()).expect("inside");
            amp::Queue::new(memory, &layout, side, start).expect("checked");
            true
        }
        Queues::Pages { resumed } => {
            let page = |side| memory.get(geometry.page(side), 4096).expect("inside");
            let other = super::geometry::other(side);
            match resumed {
                true => {
                    Producer::resume(page(side), Layout::PLAIN).is_ok()
                        && Consumer::resume(page(other), Layout::PLAIN).is_ok()
                }
                false => {
                    Producer::new(page(side), Layout::PLAIN).expect("two pages");
                    Consumer::new(page(other), Layout::PLAIN).expect("two pages");
                    true
                }
            }
        }
    }
}

/// The connection is over, and the next one is waited for.
fn part<M: QueueMemory>(machine: &mut Machine, side: Side, now: u64, memory: &M, epoch: u32) {
    machine.let_go(memory);
    match side {
        Side::Device => {
            machine.again(now, memory);
            machine.retake(now, memory);
        }
        Side::Driver => drop(machine.begin_anew(now, memory, epoch)),
    }
}

/// Plays a story. Nobody panics, spins or writes where it has no business; and when whoever writes any word has stopped, two ends of
/// ours come together.
///
/// # Panics
/// If they do not.
pub fn story(bytes: &[u8]) {
    let mut bytes = Bytes(bytes);
    let layout = match bytes.next().unwrap_or(0) % 3 {
        0 => QueueLayout::Amp,
        1 => QueueLayout::Spsc,
        _ => QueueLayout::AmpPci,
    };
    let words: Vec<AtomicU64> = (0..BYTES / 8)
        .map(|at| {
            let inside = (BASE - BLOCKS..END).contains(&(at * 8));
            AtomicU64::new(if inside { 0 } else { GUARD })
        })
        .collect();
    let geometry = Geometry::new(layout, BASE as u64, END).expect("enough memory");
    let mut world = World {
        memory: DeviceRegion::from_atomics(&words),
        geometry,
        now: 0,
        epochs: 2,
        ends: [
            end(Side::Device, geometry, 1),
            end(Side::Driver, geometry, 2),
        ],
    };
    for _ in 0..STEPS {
        if world.step(&mut bytes).is_none() {
            break;
        }
    }
    assert!(world.guards());
    // From here on only the two do anything. A driver gives up after a while and begins anew, as programs do.
    let mut waited = 0;
    for turn in 0.. {
        if world.ends.iter().all(|end| end.together) {
            break;
        }
        assert!(turn < 400, "they never come together");
        world.now += 100;
        world.look(0, false, false);
        world.look(1, false, false);
        waited += 1;
        if waited == 50 && !world.ends[1].together {
            waited = 0;
            let epoch = world.epoch();
            let End { machine, is_up, .. } = &mut world.ends[1];
            *is_up = false;
            part(machine, Side::Driver, world.now, &world.memory, epoch);
        }
    }
    assert!(world.guards());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn two_ends_outlive_whoever_writes_anything(bytes in prop::collection::vec(any::<u8>(), 0..1200)) {
            story(&bytes);
        }
    }
}
