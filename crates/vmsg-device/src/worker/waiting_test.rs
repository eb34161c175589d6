// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device whose requests take their time, told to do what they stand in the way of.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use virtio_msg::FeatureSet;
use vmsg_mem::{Access, BusAddr, Doorbell, Mapping, TableEntry, WindowTable};
use vmsg_queue::ChainHead;

use super::super::{Command, Notice, Pending, Reply, Slot};
use super::*;
use crate::device::{Device, DeviceError, Identity, Io, Progress, Upcoming};
use crate::stand::{self, BASE, ring, table};

const BYTES: usize = 1 << 20;
const SIZE: u16 = 8;
const SLOW: Slot = Slot(0);
const QUICK: Slot = Slot(1);

/// Counts which devices' descriptors are watched.
#[derive(Default)]
struct Watched(isize);

impl Fds for Watched {
    fn add_kick(&mut self, _slot: Slot, _queue: usize, _fd: BorrowedFd<'_>) {}
    fn add_device(&mut self, _slot: Slot, _fd: BorrowedFd<'_>) {
        self.0 += 1;
    }
    fn remove(&mut self, _fd: BorrowedFd<'_>) {
        self.0 -= 1;
    }
}

/// What a device was told, and what it is to do.
#[derive(Default)]
struct Story {
    told: Vec<String>,
    /// Requests that may end.
    ended: usize,
    /// Requests under way.
    under_way: usize,
    process_fails: bool,
    prepare_panics: bool,
    poll_panics: bool,
}

/// Takes all requests, and finishes them when it is polled, as many as have ended.
struct Slow {
    story: Arc<Mutex<Story>>,
    heads: Vec<ChainHead>,
    bell: Doorbell,
}

impl Slow {
    fn story(&self) -> MutexGuard<'_, Story> {
        lock(&self.story)
    }
}

fn lock(story: &Mutex<Story>) -> MutexGuard<'_, Story> {
    story.lock().unwrap_or_else(|error| error.into_inner())
}

impl Device for Slow {
    fn identity(&self) -> Identity {
        Identity {
            device_id: 2,
            vendor_id: 0,
        }
    }
    fn features(&self) -> FeatureSet {
        FeatureSet::EMPTY
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![SIZE]
    }
    fn activate(&mut self, _features: &FeatureSet) {
        self.story().told.push("activate".into());
    }
    fn reset(&mut self) {
        self.story().told.push("reset".into());
        self.heads.clear();
    }
    fn removed(&mut self) {
        self.story().told.push("removed".into());
    }
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(std::os::fd::AsFd::as_fd(&self.bell))
    }
    fn is_touching_memory(&self) -> bool {
        self.story().under_way > 0
    }
    fn prepare(&mut self, upcoming: Upcoming<'_>, io: &mut Io<'_>) -> bool {
        let mut story = self.story();
        assert!(!story.prepare_panics, "a bad end");
        let what = match upcoming {
            Upcoming::Reset => "reset?".to_owned(),
            Upcoming::QueueReset(queue) => format!("queue {queue}?"),
            Upcoming::Memory(table) => {
                assert!(!Arc::ptr_eq(table, io.table), "it is still to come");
                "memory?".to_owned()
            }
        };
        story.told.push(what);
        story.under_way == 0
    }
    fn process(&mut self, _: usize, _: usize, io: &mut Io<'_>) -> Result<Progress, DeviceError> {
        let mut story = lock(&self.story);
        story.told.push("process".into());
        let Some(Some(active)) = io.queues.get_mut(0) else {
            return Ok(Progress::Idle);
        };
        let failed = |source| DeviceError::Queue { queue: 0, source };
        let batch = active.pop(io.space, io.storage, 64).map_err(failed)?;
        for chain in batch.iter() {
            self.heads.push(chain.head());
            story.under_way += 1;
        }
        if story.process_fails {
            return Err(DeviceError::Local("broken on purpose".into()));
        }
        Ok(Progress::Idle)
    }
    fn poll(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let mut story = lock(&self.story);
        story.told.push("poll".into());
        assert!(!story.poll_panics, "a bad poll");
        while story.ended > 0 && story.under_way > 0 {
            story.ended -= 1;
            story.under_way -= 1;
            if let (Some(Some(active)), Some(head)) = (io.queues.get_mut(0), self.heads.pop()) {
                let done = active.complete(io.space, head, 0);
                done.map_err(|source| DeviceError::Queue { queue: 0, source })?;
            }
        }
        drop(story);
        io.publish(0)
    }
}

/// A worker with two such devices, in whose queues there are two requests each, taken.
struct Bench {
    core: Core,
    memory: Arc<Mapping>,
    table: Arc<WindowTable>,
    slow: Arc<Mutex<Story>>,
    quick: Arc<Mutex<Story>>,
    watched: Watched,
    tickets: u64,
}

fn window(memory: &Arc<Mapping>, base: u64, len: usize) -> TableEntry {
    stand::window(memory, base, len, Access::ReadWrite)
}

impl Bench {
    fn new() -> Self {
        let (memory, _fd) = Mapping::memfd("guest", BYTES as u64, true).expect("memfd");
        let memory = Arc::new(memory);
        let mut bench = Self {
            core: Core::new(),
            table: table(&memory),
            memory,
            slow: Arc::default(),
            quick: Arc::default(),
            watched: Watched::default(),
            tickets: 0,
        };
        bench.add(SLOW, Arc::clone(&bench.slow));
        bench.add(QUICK, Arc::clone(&bench.quick));
        for slot in [SLOW, QUICK] {
            bench.bring_up(slot);
        }
        bench
    }

    fn add(&mut self, slot: Slot, story: Arc<Mutex<Story>>) {
        let device = Slow {
            story,
            heads: Vec::new(),
            bell: Doorbell::new().expect("eventfd"),
        };
        let add = Command::Add(Box::new(device));
        self.core.command(slot, 0, add, &mut self.watched);
    }

    /// Puts two requests into the queue of a device, and has it take them.
    fn bring_up(&mut self, slot: Slot) {
        let begin = if slot == SLOW { 0 } else { BYTES / 2 };
        let mut driver = ring(&self.memory, begin, SIZE);
        for _ in 0..2 {
            driver
                .add(&[(BusAddr(BASE + 0x8000), 1)], &[])
                .expect("room");
        }
        driver.publish().expect("published");
        let start = stand::start(0, driver.config());
        self.send(slot, Command::SetMemory(Arc::clone(&self.table)));
        self.send(slot, Command::StartQueue(start));
        self.send(slot, Command::DriverOk(FeatureSet::EMPTY));
        assert_eq!(self.done().len(), 3);
        self.run();
        assert_eq!(lock(self.story(slot)).under_way, 2);
        self.told(slot);
    }

    /// The slow one breaks, with its requests under way.
    fn break_slow(&mut self) {
        lock(&self.slow).process_fails = true;
        self.core.kick(SLOW, 0);
        self.run();
        assert_eq!(self.told(SLOW), ["process"]);
        let broken = |reply| matches!(reply, Reply::Notice(SLOW, Notice::Broken { .. }));
        assert!(self.core.take_replies().any(broken));
    }

    fn story(&self, slot: Slot) -> &Mutex<Story> {
        if slot == SLOW {
            &self.slow
        } else {
            &self.quick
        }
    }

    /// Gives a command; its ticket.
    fn send(&mut self, slot: Slot, command: Command) -> u64 {
        self.tickets += 1;
        self.core
            .command(slot, self.tickets, command, &mut self.watched);
        self.tickets
    }

    fn run(&mut self) {
        self.core.carry_on(&mut self.watched);
        while self.core.step(Instant::now()) {}
        self.core.update_watched(&mut self.watched);
    }

    /// Some of the requests of a device end, and it is polled.
    fn end(&mut self, slot: Slot, requests: usize) {
        lock(self.story(slot)).ended += requests;
        self.core.poll_device(slot, Instant::now());
        self.run();
    }

    /// The commands that were answered, and how.
    fn answers(&mut self) -> Vec<(u64, Result<(), String>)> {
        let replies = self.core.take_replies();
        let done = replies.filter_map(|reply| match reply {
            Reply::Done { ticket, result } => Some((ticket, result)),
            Reply::Notice(..) => None,
        });
        done.collect()
    }

    /// Those that were carried out.
    fn done(&mut self) -> Vec<u64> {
        let answers = self.answers().into_iter();
        let done = answers.map(|(ticket, result)| {
            result.expect("carried out");
            ticket
        });
        done.collect()
    }

    fn told(&self, slot: Slot) -> Vec<String> {
        std::mem::take(&mut lock(self.story(slot)).told)
    }

    fn smaller(&self) -> Arc<WindowTable> {
        let entry = window(&self.memory, BASE, BYTES / 2);
        Arc::new(WindowTable::new(vec![entry]).expect("a window"))
    }

    fn larger(&self) -> Arc<WindowTable> {
        let more = window(&self.memory, BASE + (BYTES as u64) * 4, BYTES);
        Arc::new(self.table.changed(&[], vec![more]).expect("a window"))
    }
}

#[test]
fn a_reset_waits_for_the_requests_and_nobody_else_does() {
    let mut bench = Bench::new();
    let reset = bench.send(SLOW, Command::Reset);
    assert_eq!(bench.done(), []);
    assert_eq!(bench.told(SLOW), ["reset?"]);

    // The other one is reset, set up and reset again meanwhile.
    bench.end(QUICK, 2);
    let other = bench.send(QUICK, Command::Reset);
    assert_eq!(bench.done(), [other]);
    bench.bring_up(QUICK);

    bench.end(SLOW, 1);
    assert_eq!(bench.done(), []);
    assert_eq!(bench.told(SLOW), ["poll", "reset?"]);
    bench.end(SLOW, 1);
    assert_eq!(bench.done(), [reset]);
    assert_eq!(bench.told(SLOW), ["poll", "reset?", "reset"]);

    // What comes later does not wait.
    let reset = bench.send(SLOW, Command::Reset);
    assert_eq!(bench.done(), [reset]);
}

#[test]
fn what_ends_while_a_reset_waits_is_still_seen_by_the_driver() {
    let mut bench = Bench::new();
    bench.send(SLOW, Command::Reset);
    bench.answers();
    bench.end(SLOW, 1);
    let replies: Vec<Reply> = bench.core.take_replies().collect();
    assert_eq!(replies, [Reply::Notice(SLOW, Notice::Used { queue: 0 })]);
    bench.end(SLOW, 1);
    let replies: Vec<Reply> = bench.core.take_replies().collect();
    let used = Reply::Notice(SLOW, Notice::Used { queue: 0 });
    assert_eq!(replies[0], used, "before it hears that the device is reset");
    assert!(
        matches!(replies[1], Reply::Done { ticket: 7, .. }),
        "{replies:?}"
    );
}

#[test]
fn commands_keep_their_order_behind_one_that_waits() {
    let mut bench = Bench::new();
    let table = bench.smaller();
    let notify = || Command::SetNotify {
        queue: 0,
        kick: None,
        call: None,
    };
    let memory = bench.send(SLOW, Command::SetMemory(Arc::clone(&table)));
    let call = bench.send(SLOW, notify());
    let refused = bench.send(SLOW, Command::ResetQueue(7));
    let stop = bench.send(SLOW, Command::ResetQueue(0));
    let larger = bench.send(SLOW, Command::SetMemory(bench.larger()));
    let reset = bench.send(SLOW, Command::Reset);
    assert_eq!(bench.answers(), []);
    assert_eq!(Arc::strong_count(&table), 2, "here and in the line");
    bench.end(SLOW, 1);
    assert_eq!(bench.answers(), []);
    bench.end(SLOW, 1);
    let answers = bench.answers();
    let tickets: Vec<u64> = answers.iter().map(|(ticket, _)| *ticket).collect();
    assert_eq!(tickets, [memory, call, refused, stop, larger, reset]);
    let bad: Vec<u64> = answers
        .iter()
        .filter_map(|(ticket, result)| result.is_err().then_some(*ticket))
        .collect();
    assert_eq!(bad, [refused], "there is no such queue");
    assert_eq!(Arc::strong_count(&table), 1, "nothing holds it any more");
    let told = bench.told(SLOW).join(" ");
    let asked = "memory? poll memory? poll memory? queue 0?";
    // `larger` has all that `smaller` has.
    assert_eq!(told, format!("{asked} reset? reset"));
}

#[test]
fn queues_are_left_alone_while_commands_wait_and_are_all_looked_at_then() {
    let mut bench = Bench::new();
    let stop = bench.send(SLOW, Command::SetMemory(bench.smaller()));
    bench.told(SLOW);
    for _ in 0..10 {
        bench.core.kick(SLOW, 0);
        let kick = Command::Kick {
            queue: 0,
            pending: Arc::new(Pending::default()),
        };
        bench.core.command(SLOW, 0, kick, &mut bench.watched);
        bench.run();
    }
    assert!(bench.told(SLOW).is_empty());
    assert!(!bench.core.has_work(), "kicks keep nobody awake");
    bench.end(SLOW, 2);
    assert_eq!(bench.done(), [stop]);
    assert_eq!(bench.told(SLOW), ["poll", "memory?", "process"]);
}

#[test]
fn memory_that_only_grows_is_shown_at_once() {
    let mut bench = Bench::new();
    let larger = bench.larger();
    let grow = bench.send(SLOW, Command::SetMemory(Arc::clone(&larger)));
    assert_eq!(bench.done(), [grow]);
    let shrink = bench.send(SLOW, Command::SetMemory(Arc::clone(&bench.table)));
    assert_eq!(bench.done(), []);
    // Even that is behind what goes.
    let grow = bench.send(SLOW, Command::SetMemory(larger));
    assert_eq!(bench.done(), []);
    bench.end(SLOW, 2);
    assert_eq!(bench.done(), [shrink, grow]);
}

#[test]
fn control_changes_no_memory_under_requests() {
    let mut bench = Bench::new();
    let seat = bench.core.seats().at(SLOW);
    let (smaller, larger) = (bench.smaller(), bench.larger());
    assert!(
        seat.try_set(Arc::clone(&smaller)).is_err(),
        "two are under way"
    );
    seat.try_set(Arc::clone(&larger)).expect("nothing goes");
    seat.try_set(Arc::clone(&bench.table))
        .expect_err("some of it goes");

    let shrink = bench.send(SLOW, Command::SetMemory(smaller));
    seat.try_set(larger)
        .expect_err("it would overtake another one");
    bench.end(SLOW, 2);
    assert_eq!(bench.done(), [shrink]);
    seat.try_set(Arc::default()).expect("nothing is under way");

    // A device without such requests, and one that is new at a place where there was one.
    bench.send(QUICK, Command::Remove);
    bench.end(QUICK, 2);
    bench.add(QUICK, Arc::default());
    let seat = bench.core.seats().at(QUICK);
    seat.try_set(Arc::clone(&bench.table)).expect("it sleeps");
    seat.try_set(Arc::default()).expect("it sleeps");
}

#[test]
fn a_device_that_is_removed_ends_its_requests_first() {
    let mut bench = Bench::new();
    let remove = bench.send(SLOW, Command::Remove);
    assert_eq!(bench.done(), []);
    assert_eq!(bench.watched.0, 2);
    bench.end(SLOW, 2);
    assert_eq!(bench.done(), [remove]);
    assert_eq!(
        bench.told(SLOW),
        ["reset?", "poll", "reset?", "reset", "removed"]
    );
    assert_eq!(Arc::strong_count(&bench.slow), 1, "it is gone");
    assert_eq!(bench.watched.0, 1);
    // Its place can be had by another one.
    bench.add(SLOW, Arc::clone(&bench.slow));
    bench.bring_up(SLOW);
}

#[test]
fn commands_behind_the_end_of_a_device_are_answered() {
    let mut bench = Bench::new();
    let remove = bench.send(SLOW, Command::Remove);
    let reset = bench.send(SLOW, Command::Reset);
    bench.end(SLOW, 2);
    let mut answers = bench.answers();
    answers.sort();
    assert_eq!(answers[0], (remove, Ok(())));
    assert!(matches!(&answers[1], (ticket, Err(_)) if *ticket == reset));
}

#[test]
fn a_device_that_is_out_of_order_ends_its_requests_too() {
    let mut bench = Bench::new();
    bench.break_slow();
    assert_eq!(bench.watched.0, 1, "it is left alone");
    bench.end(SLOW, 1);
    assert!(bench.told(SLOW).is_empty());

    let reset = bench.send(SLOW, Command::Reset);
    bench.run();
    assert_eq!(bench.watched.0, 2, "until it is to be reset");
    assert_eq!(bench.done(), []);
    bench.end(SLOW, 1);
    assert_eq!(bench.done(), [reset]);
    assert_eq!(bench.told(SLOW), ["reset?", "poll", "reset?", "reset"]);
    assert_eq!(bench.watched.0, 2);

    // One whose memory changes stays out of order.
    lock(&bench.slow).process_fails = false;
    bench.bring_up(SLOW);
    bench.break_slow();
    let memory = bench.send(SLOW, Command::SetMemory(Arc::default()));
    bench.run();
    assert_eq!(bench.watched.0, 2);
    bench.end(SLOW, 2);
    assert_eq!(bench.done(), [memory]);
    assert_eq!(bench.watched.0, 1);
}

#[test]
fn a_panic_ends_the_waiting() {
    // In `prepare`, of a device that was sound.
    let mut bench = Bench::new();
    lock(&bench.slow).prepare_panics = true;
    let reset = bench.send(SLOW, Command::Reset);
    assert_eq!(bench.done(), [reset]);
    assert_eq!(bench.told(SLOW), ["reset"]);

    // In `poll`, of one that was out of order.
    let mut bench = Bench::new();
    bench.break_slow();
    let reset = bench.send(SLOW, Command::Reset);
    assert_eq!(bench.done(), []);
    lock(&bench.slow).poll_panics = true;
    bench.end(SLOW, 0);
    assert_eq!(bench.done(), [reset]);

    // In `poll`, of one that was sound: it is asked once more.
    let mut bench = Bench::new();
    let reset = bench.send(SLOW, Command::Reset);
    lock(&bench.slow).poll_panics = true;
    bench.end(SLOW, 0);
    assert_eq!(bench.done(), []);
    bench.end(SLOW, 0);
    assert_eq!(bench.done(), [reset]);
    assert_eq!(
        bench.told(SLOW),
        ["reset?", "poll", "reset?", "poll", "reset"]
    );
}

#[test]
fn a_device_that_waits_takes_no_frames_of_others() {
    let mut bench = Bench::new();
    bench.send(SLOW, Command::Reset);
    let Some(Some(entry)) = bench.core.entries.first() else {
        panic!("it is there");
    };
    assert!(entry.waits());
    let key = entry.key;
    let mut result = Ok(());
    bench.core.call(QUICK, Instant::now(), |_, io| {
        result = io.others.fill(key, &mut |_| panic!("there is no room"));
        Ok(None)
    });
    assert_eq!(result, Err(vmsg_net::Closed::NoDriver));
}
