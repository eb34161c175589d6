// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Foreign drivers and their pings, in virtual time: the machine looks when its deadline says so, and no sooner.

use super::super::Config;
use super::*;
use crate::ivshmem::block::Card;
use crate::ivshmem::geometry::Geometry;
use crate::ivshmem::spec::QueueLayout;
use std::sync::Arc;
use vmsg_mem::{DeviceSlice, Mapping};

const BYTES: usize = 64 << 10;
/// A day in milliseconds.
const DAY: u64 = 86_400_000;

/// A device host with a foreign driver.
struct Host {
    memory: DeviceSlice,
    machine: Machine,
    now: u64,
}

impl Host {
    /// With a driver that has begun, and was heard to.
    fn new(layout: QueueLayout) -> Self {
        let mapping = Mapping::memfd("memory", BYTES as u64, false).unwrap().0;
        let memory = DeviceSlice::of_ram(Arc::new(mapping), 0, BYTES).unwrap();
        let base = if layout == QueueLayout::Amp { 4096 } else { 0 };
        let geometry = Geometry::new(layout, base, BYTES).unwrap();
        let machine = Machine::new(Config {
            side: Side::Device,
            geometry,
            card: Card::default(),
            epoch: 7,
            message: 64,
            blind: false,
        });
        let mut host = Self {
            memory,
            machine,
            now: 1000,
        };
        assert_eq!(host.look(true), None, "it only takes its place");
        match layout {
            QueueLayout::Amp => host.amp_driver_begins(&geometry),
            _ => {
                // A message, with which the driver is there.
                host.memory.store_release(geometry.page(Side::Driver), 1);
                let event = host.look(true);
                assert!(matches!(event, Some(Event::Up { peer: None, .. })));
            }
        }
        host
    }

    fn amp_driver_begins(&mut self, geometry: &Geometry) {
        let copy = self.memory.clone();
        let amp = Part::new(&copy, geometry);
        let layout = load_layout(&amp).unwrap().unwrap();
        let (own, theirs) = (layout.head(Side::Driver), layout.head(Side::Device));
        let head = |at| Head::load(&amp, at);
        let (mut life, first) = Life::begin(
            Side::Driver,
            layout.elements(),
            self.now,
            head(own),
            head(theirs),
        );
        let store = |store: amp::Store| {
            let (at, word) = store.word();
            amp.store_release(own + at, word);
        };
        store(first);
        for _ in 0..100 {
            self.now += 100;
            let (stores, up) = life.step(self.now, head(theirs), true);
            stores.for_each(store);
            let event = self.look(true);
            if matches!(up, Some(amp::Event::Up(_))) && event.is_none() {
                return;
            }
            assert!(
                matches!(event, None | Some(Event::Up { peer: None, .. })),
                "{event:?}"
            );
        }
        panic!("they have not come together");
    }

    fn look(&mut self, rung: bool) -> Option<Event> {
        let turn = self.machine.poll(self.now, &self.memory, rung, &|_| false);
        turn.event
    }

    /// Time passes; what happens, and when.
    fn until(&mut self, end: u64) -> Option<(u64, Event)> {
        while self.now < end {
            let due = self.machine.deadline();
            assert!(due > self.now, "it would look all the time");
            self.now = due.min(end);
            if let Some(event) = self.look(false) {
                return Some((self.now, event));
            }
        }
        None
    }

    /// So many pings, one each `period`; when the last one was.
    fn pings(&mut self, count: u32, period: u64) -> u64 {
        for _ in 0..count {
            assert_eq!(self.until(self.now + period), None, "it pings");
            self.machine.heard(self.now, true);
        }
        self.now
    }
}

const LAYOUTS: [QueueLayout; 3] = [QueueLayout::Amp, QueueLayout::Spsc, QueueLayout::AmpPci];

#[test]
fn a_foreign_driver_that_stops_to_ping_is_dead_after_three_seconds() {
    for layout in LAYOUTS {
        let mut host = Host::new(layout);
        let last = host.pings(3600, 1000);
        let (when, event) = host.until(last + DAY).expect("it is dead");
        assert_eq!(event, Event::Down("it does not ping any more"));
        // Seen at the next beat at the latest.
        let after = when - last;
        assert!((3000..=3500).contains(&after), "{layout}: {after} ms");
    }
}

#[test]
fn who_pings_slowly_has_three_of_its_periods() {
    for layout in LAYOUTS {
        let mut host = Host::new(layout);
        let last = host.pings(10, 20_000);
        let (when, _) = host.until(last + DAY).expect("it is dead");
        let after = when - last;
        assert!((60_000..=60_500).contains(&after), "{layout}: {after} ms");
    }
}

#[test]
fn other_messages_are_signs_of_life_as_well() {
    for layout in LAYOUTS {
        let mut host = Host::new(layout);
        host.pings(5, 1000);
        for _ in 0..100 {
            assert_eq!(host.until(host.now + 2400), None);
            host.machine.heard(host.now, false);
        }
        let last = host.now;
        let (when, _) = host.until(last + DAY).expect("it is dead");
        assert!((3000..=3500).contains(&(when - last)));
    }
}

#[test]
fn a_foreign_driver_that_never_pings_is_never_dead() {
    for layout in LAYOUTS {
        let mut host = Host::new(layout);
        assert_eq!(host.until(host.now + DAY), None);
        host.machine.heard(host.now, false);
        assert_eq!(host.until(host.now + DAY), None);
        // Nor is one that has pinged once, as a person may try it.
        host.machine.heard(host.now, true);
        assert_eq!(host.until(host.now + DAY), None);
    }
}
