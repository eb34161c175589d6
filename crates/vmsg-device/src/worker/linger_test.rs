// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::sync::Arc;

use virtio_msg::FeatureSet;
use vmsg_mem::{BusAddr, Mapping, WindowTable};

use super::super::{Command, Notice, Reply};
use super::*;
use crate::rng::Rng;
use crate::stand::{self, BASE, NoFds, Ring, ring, table};

const BYTES: u64 = 1 << 20;
const SLOT: Slot = Slot(0);

struct Bench {
    core: Core,
    table: Arc<WindowTable>,
}

impl Bench {
    fn new(mapping: &Arc<Mapping>) -> (Self, Ring<'_>) {
        let table = table(mapping);
        let mut bench = Self {
            core: Core::new(),
            table: Arc::clone(&table),
        };
        bench.tell(Command::Add(Box::new(Rng::new())));
        bench.tell(Command::SetMemory(table));
        let driver = ring(mapping, 0, 8);
        bench.tell(Command::StartQueue(stand::start(0, driver.config())));
        bench.tell(Command::DriverOk(FeatureSet::EMPTY));
        (bench, driver)
    }

    fn tell(&mut self, command: Command) {
        self.core.command(SLOT, 1, command, &mut NoFds);
    }

    fn run(&mut self) {
        while self.core.step(Instant::now()) {}
    }
}

fn memory() -> Arc<Mapping> {
    Arc::new(Mapping::memfd("test", BYTES, true).expect("memfd").0)
}

/// Adds a request; true if the device is to be kicked.
fn ask(driver: &mut Ring<'_>) -> bool {
    let buffer = [(BusAddr(BASE + 0x8000), 16)];
    driver.add(&[], &buffer).expect("room");
    driver.publish().expect("sound")
}

fn answers(driver: &mut Ring<'_>) -> usize {
    std::iter::from_fn(|| driver.pop_used().expect("sound")).count()
}

#[test]
fn an_empty_queue_that_is_looked_at_wants_no_kicks_and_is_served() {
    let mapping = memory();
    let (mut bench, mut driver) = Bench::new(&mapping);
    bench.core.set_linger(true);
    bench.run();
    assert!(bench.core.lingers());
    assert!(!bench.core.look(), "there is nothing");
    for _ in 0..3 {
        assert!(!ask(&mut driver), "no kick");
        assert!(bench.core.look());
        bench.run();
        assert_eq!(answers(&mut driver), 1);
    }
}

#[test]
fn a_queue_that_is_looked_at_no_more_wants_kicks_again() {
    let mapping = memory();
    let (mut bench, mut driver) = Bench::new(&mapping);
    bench.core.set_linger(true);
    bench.run();
    bench.core.settle(Instant::now());
    assert!(!bench.core.lingers() && !bench.core.has_work());
    assert!(ask(&mut driver), "a kick");
}

#[test]
fn a_request_that_came_before_the_last_look_is_found_when_that_ends() {
    let mapping = memory();
    let (mut bench, mut driver) = Bench::new(&mapping);
    bench.core.set_linger(true);
    bench.run();
    assert!(!ask(&mut driver), "no kick");
    bench.core.settle(Instant::now());
    assert!(bench.core.has_work());
    bench.run();
    assert_eq!(answers(&mut driver), 1);
}

#[test]
fn without_lingering_an_empty_queue_wants_kicks_at_once() {
    let mapping = memory();
    let (mut bench, mut driver) = Bench::new(&mapping);
    bench.run();
    assert!(!bench.core.lingers());
    assert!(ask(&mut driver), "a kick");
}

#[test]
fn a_device_that_is_reset_or_removed_is_looked_at_no_more() {
    for command in [Command::Reset, Command::Remove] {
        let mapping = memory();
        let (mut bench, _driver) = Bench::new(&mapping);
        bench.core.set_linger(true);
        bench.run();
        bench.tell(command);
        bench.core.look();
        bench.run();
        assert!(!bench.core.lingers());
    }
}

#[test]
fn memory_that_is_taken_away_meanwhile_breaks_the_device_only() {
    let mapping = memory();
    let (mut bench, _driver) = Bench::new(&mapping);
    bench.core.set_linger(true);
    bench.run();
    bench.tell(Command::SetMemory(Arc::new(WindowTable::empty())));
    assert!(bench.core.look(), "somebody has to find out");
    bench.run();
    let broken = |reply| matches!(reply, Reply::Notice(SLOT, Notice::Broken { .. }));
    assert!(bench.core.take_replies().any(broken));
    bench.tell(Command::Reset);
    bench.tell(Command::SetMemory(Arc::clone(&bench.table)));
    assert!(!bench.core.lingers());
}

#[test]
fn no_more_queues_are_looked_at_than_stay_cheap() {
    let mut linger = Linger {
        on: true,
        ..Linger::default()
    };
    let taken = (0..2 * MOST)
        .filter(|&queue| linger.take(SLOT, queue))
        .count();
    assert_eq!(taken, MOST);
    assert!(linger.take(SLOT, 0), "once more");
    linger.remove(SLOT);
    assert!(linger.queues.is_empty());
}
