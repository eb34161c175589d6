// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device whose queues somebody else works on.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use virtio_msg::FeatureSet;
use vmsg_mem::{Access, BusAddr, Doorbell, Mapping, WindowTable};
use vmsg_queue::{Inflight, QueueConfig};

use super::super::core::Fds;
use super::super::{Command, Core, Notice, Pending, QueueStart, Record, Reply, Resume, Slot};
use crate::device::{Device, DeviceError, Identity, Io, Passthrough, Progress, Upcoming};
use crate::stand::{BASE, ring, start, table, window};

const BYTES: usize = 1 << 16;
const SIZE: u16 = 8;
const SLOT: Slot = Slot(0);

struct NoKicks;

impl Fds for NoKicks {
    fn add_kick(&mut self, _slot: Slot, _queue: usize, _fd: BorrowedFd<'_>) {
        panic!("kicks are for somebody else");
    }
    fn add_device(&mut self, _slot: Slot, _fd: BorrowedFd<'_>) {}
    fn remove(&mut self, _fd: BorrowedFd<'_>) {
        panic!("nothing is watched");
    }
}

#[derive(Default)]
struct Story {
    told: Vec<String>,
    starts: Vec<QueueStart>,
    busy: bool,
    in_order: bool,
    refuses: bool,
}

struct PassesOn(Arc<Mutex<Story>>);

impl PassesOn {
    fn tell(&self, what: impl Into<String>) {
        lock(&self.0).told.push(what.into());
    }
}

fn lock(story: &Mutex<Story>) -> MutexGuard<'_, Story> {
    story.lock().expect("nothing panics")
}

impl Device for PassesOn {
    fn identity(&self) -> Identity {
        Identity {
            device_id: 26,
            vendor_id: 0,
        }
    }
    fn features(&self) -> FeatureSet {
        FeatureSet::EMPTY
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![SIZE; 2]
    }
    fn in_order(&self, _queue: usize) -> bool {
        lock(&self.0).in_order
    }
    fn activate(&mut self, _features: &FeatureSet) {
        self.tell("activate");
    }
    fn reset(&mut self) {
        self.tell("reset");
    }
    fn queues_changed(&mut self, _io: &mut Io<'_>, _resumed: bool) {
        panic!("there are no rings");
    }
    fn process(&mut self, _: usize, _: usize, _: &mut Io<'_>) -> Result<Progress, DeviceError> {
        panic!("there are no rings");
    }
    fn prepare(&mut self, upcoming: Upcoming<'_>, io: &mut Io<'_>) -> bool {
        assert!(io.queues.iter().all(Option::is_none));
        self.tell(match upcoming {
            Upcoming::Memory(_) => "memory?",
            Upcoming::Reset => "reset?",
            Upcoming::QueueReset(_) => "stop?",
        });
        !lock(&self.0).busy
    }
    fn passthrough(&mut self) -> Option<&mut dyn Passthrough> {
        Some(self)
    }
}

impl Passthrough for PassesOn {
    fn set_memory(&mut self, table: &Arc<WindowTable>) {
        self.tell(format!("memory of {}", table.places().count()));
    }
    fn start_queue(&mut self, start: &QueueStart) -> Result<(), String> {
        self.tell(format!("start {}", start.queue));
        lock(&self.0).starts.push(start.clone());
        if lock(&self.0).refuses {
            return Err("nobody is there".to_owned());
        }
        Ok(())
    }
    fn set_notify(&mut self, queue: usize, kick: Option<&Doorbell>, call: Option<&Doorbell>) {
        let (kick, call) = (kick.is_some(), call.is_some());
        self.tell(format!("notify {queue} {kick} {call}"));
    }
    fn kick(&mut self, queue: usize) {
        self.tell(format!("kick {queue}"));
    }
    fn stop_queue(&mut self, queue: usize) {
        self.tell(format!("stop {queue}"));
    }
}

struct Bench {
    core: Core,
    memory: Arc<Mapping>,
    table: Arc<WindowTable>,
    story: Arc<Mutex<Story>>,
    /// Requests are made available, and used, up to these.
    config: QueueConfig,
}

impl Bench {
    /// With a queue of which `used` of `made` requests have been used.
    fn new(made: u16, used: u16) -> Self {
        let (memory, _fd) = Mapping::memfd("guest", BYTES as u64, true).expect("memfd");
        let mut driver = ring(&memory, 0, SIZE);
        for _ in 0..made {
            driver.add(&[(BusAddr(BASE), 1)], &[]).expect("room");
        }
        driver.publish().expect("published");
        let config = driver.config();
        let index = usize::try_from(config.device.0 - BASE).expect("inside") + 2;
        memory.ram().write(index, &used.to_le_bytes());
        let memory = Arc::new(memory);
        let story = Arc::new(Mutex::new(Story {
            in_order: true,
            ..Story::default()
        }));
        let mut core = Core::new();
        let add = Command::Add(Box::new(PassesOn(Arc::clone(&story))));
        core.command(SLOT, 0, add, &mut NoKicks);
        let mut bench = Self {
            core,
            table: table(&memory),
            memory,
            story,
            config,
        };
        bench
            .tell(Command::SetMemory(Arc::clone(&bench.table)))
            .expect("memory");
        assert_eq!(bench.told(), ["memory?", "memory of 1"]);
        bench
    }

    fn tell(&mut self, command: Command) -> Result<(), String> {
        self.core.command(SLOT, 1, command, &mut NoKicks);
        let mut replies = self.core.take_replies();
        let answer = replies.find_map(|reply| match reply {
            Reply::Done { result, .. } => Some(result),
            Reply::Notice(..) => None,
        });
        answer.expect("every command is answered")
    }

    fn start(&self, resume: Option<Resume>, record: Option<Record>) -> Command {
        Command::StartQueue(QueueStart {
            resume,
            record,
            ..start(1, self.config)
        })
    }

    fn run(&mut self) {
        self.core.carry_on(&mut NoKicks);
        while self.core.step(Instant::now()) {}
    }

    fn told(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.story).told)
    }
}

fn at(avail: u16, used: u16) -> Option<Resume> {
    Some(Resume::At { avail, used })
}

#[test]
fn a_device_hears_of_queues_kicks_and_descriptors_that_others_use() {
    let mut bench = Bench::new(1, 0);
    bench.tell(bench.start(None, None)).expect("started");
    let kick = || Command::Kick {
        queue: 1,
        pending: Arc::new(Pending::default()),
    };
    bench.core.command(SLOT, 0, kick(), &mut NoKicks);
    bench.run();
    assert_eq!(
        bench.told(),
        ["start 1"],
        "kicks come when the driver is ready"
    );

    bench
        .tell(Command::DriverOk(FeatureSet::EMPTY))
        .expect("running");
    bench.run();
    assert_eq!(
        bench.told(),
        ["activate", "kick 1"],
        "what came before is told"
    );
    bench.core.command(SLOT, 0, kick(), &mut NoKicks);
    bench.run();
    assert_eq!(bench.told(), ["kick 1"]);

    let bell = Doorbell::new().expect("eventfd");
    let notify = Command::SetNotify {
        queue: 1,
        kick: bell.try_clone().ok(),
        call: None,
    };
    bench.tell(notify).expect("set");
    bench.run();
    assert_eq!(bench.told(), ["notify 1 true false"], "nobody has kicked");

    bench.tell(Command::ResetQueue(1)).expect("stopped");
    bench.tell(Command::ResetQueue(1)).expect("nothing to do");
    bench.core.command(SLOT, 0, kick(), &mut NoKicks);
    bench.run();
    assert_eq!(bench.told(), ["stop?", "stop 1", "stop?"]);
    bench.tell(bench.start(None, None)).expect("started again");
    bench.run();
    assert_eq!(bench.told(), ["start 1", "kick 1"]);
    bench.tell(Command::Reset).expect("reset");
    bench.run();
    assert_eq!(bench.told(), ["reset?", "reset"]);
}

#[test]
fn memory_is_never_changed_behind_its_back() {
    let mut bench = Bench::new(0, 0);
    let seat = bench.core.seats().at(SLOT);
    seat.try_set(Arc::clone(&bench.table))
        .expect_err("it must be told");
    let more = window(&bench.memory, 0, BYTES, Access::ReadWrite);
    let more = Arc::new(bench.table.changed(&[], vec![more]).expect("a window"));
    seat.try_set(Arc::clone(&more)).expect_err("even of more");

    bench.tell(bench.start(None, None)).expect("started");
    bench
        .tell(Command::DriverOk(FeatureSet::EMPTY))
        .expect("running");
    bench.run();
    bench.told();
    lock(&bench.story).busy = true;
    bench
        .core
        .command(SLOT, 1, Command::SetMemory(more), &mut NoKicks);
    let pending = Arc::new(Pending::default());
    let kick = Command::Kick { queue: 1, pending };
    bench.core.command(SLOT, 0, kick, &mut NoKicks);
    bench.run();
    assert_eq!(bench.core.take_replies().count(), 0);
    lock(&bench.story).busy = false;
    bench.core.poll_device(SLOT, Instant::now());
    bench.run();
    assert_eq!(bench.core.take_replies().count(), 1);
    assert_eq!(
        bench.told(),
        ["memory?", "memory?", "memory of 2", "kick 1"]
    );
}

#[test]
fn a_queue_goes_on_where_its_ring_says_and_the_driver_is_interrupted_once() {
    for (resume, expected, used) in [
        (None, None, false),
        (at(5, 5), at(5, 5), true),
        (Some(Resume::FromUsedRing), at(3, 3), true),
        (Some(Resume::AsFound), at(3, 3), true),
    ] {
        let mut bench = Bench::new(5, 3);
        bench.tell(bench.start(resume, None)).expect("started");
        assert_eq!(lock(&bench.story).starts[0].resume, expected);
        let ok = Command::DriverOk(FeatureSet::EMPTY);
        bench.core.command(SLOT, 1, ok, &mut NoKicks);
        let notice = Reply::Notice(SLOT, Notice::Used { queue: 1 });
        let told = bench.core.take_replies().filter(|reply| *reply == notice);
        assert_eq!(told.count(), usize::from(used), "{resume:?}");
    }
    // By the descriptor, if there is one.
    let mut bench = Bench::new(5, 3);
    let bell = Doorbell::new().expect("eventfd");
    let notify = Command::SetNotify {
        queue: 1,
        kick: None,
        call: bell.try_clone().ok(),
    };
    bench.tell(notify).expect("set");
    bench.tell(bench.start(at(3, 3), None)).expect("started");
    let ok = Command::DriverOk(FeatureSet::EMPTY);
    bench.core.command(SLOT, 1, ok, &mut NoKicks);
    assert_eq!(bench.core.take_replies().count(), 1, "the answer");
    let mut poll = [rustix::event::PollFd::from_borrowed_fd(
        bell.as_fd(),
        rustix::event::PollFlags::IN,
    )];
    let now = rustix::event::Timespec::default();
    assert_eq!(rustix::event::poll(&mut poll, Some(&now)), Ok(1));
}

#[test]
fn a_record_reaches_the_device_and_without_one_nothing_goes_on_that_may_be_in_flight() {
    let len = u64::try_from(Inflight::bytes_for(SIZE)).expect("small");
    let (memory, _fd) = Mapping::memfd("record", len, true).expect("memfd");
    let memory = Arc::new(memory);
    let record = |resume| {
        let memory = Arc::clone(&memory);
        Some(Record { memory, resume })
    };
    let mut bench = Bench::new(5, 3);
    lock(&bench.story).in_order = false;
    let why = bench.tell(bench.start(at(3, 3), None));
    assert!(why.is_err_and(|why| why.contains("record")));
    bench.tell(bench.start(at(5, 5), None)).expect("nothing is");
    for (resume, expected) in [(true, at(3, 3)), (false, None)] {
        lock(&bench.story).starts.clear();
        bench
            .tell(bench.start(at(9, 9), record(resume)))
            .expect("started");
        let start = lock(&bench.story).starts[0].clone();
        assert_eq!(start.resume, expected);
        let given = start.record.expect("it is told of the record");
        assert!(Arc::ptr_eq(&given.memory, &memory));
        assert_eq!(given.resume, resume);
    }
    // Who uses chains in their order has no use for one.
    lock(&bench.story).in_order = true;
    lock(&bench.story).starts.clear();
    bench
        .tell(bench.start(at(3, 3), record(true)))
        .expect("started");
    let start = lock(&bench.story).starts[0].clone();
    assert!(start.record.is_none());
    assert_eq!(start.resume, at(3, 3));
}

#[test]
fn a_queue_outside_of_the_memory_or_that_nobody_takes_is_refused() {
    let mut bench = Bench::new(0, 0);
    bench.config.desc = BusAddr(BASE + BYTES as u64);
    assert!(bench.tell(bench.start(None, None)).is_err());
    assert!(bench.told().is_empty(), "the device does not hear of it");

    let mut bench = Bench::new(0, 0);
    lock(&bench.story).refuses = true;
    let why = bench.tell(bench.start(None, None));
    assert_eq!(why, Err("nobody is there".to_owned()));
    bench
        .tell(Command::DriverOk(FeatureSet::EMPTY))
        .expect("running");
    bench.run();
    assert_eq!(bench.told(), ["start 1", "activate"], "it is not kicked");
}
