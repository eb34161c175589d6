// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::sync::Arc;
use std::time::Instant;

use virtio_msg::FeatureSet;
use vmsg_mem::{BusAddr, Doorbell, Mapping, WindowTable};
use vmsg_queue::QueueConfig;

use super::super::{QueueStart, Resume};
use super::*;
use crate::device::{Identity, Operation, ReadOnly};
use crate::rng::Rng;
use crate::stand::{BASE, NoFds, Ring, Stand, is_also, ring, start, table};

const BYTES: usize = 1 << 20;
const SLOT: Slot = Slot(0);

/// A device, and memory that its driver may lend.
struct Bench {
    stand: Stand,
    mapping: Arc<Mapping>,
    table: Arc<WindowTable>,
}

is_also!(Bench, stand: Stand);

impl Bench {
    fn new(device: Box<dyn Device>) -> Self {
        let (mapping, _fd) = Mapping::memfd("test", BYTES as u64, true).expect("memfd");
        Self::on(device, Arc::new(mapping))
    }

    /// With memory that was there before.
    fn on(device: Box<dyn Device>, mapping: Arc<Mapping>) -> Self {
        Self {
            stand: Stand::new(device),
            table: table(&mapping),
            mapping,
        }
    }

    fn lend(&mut self) {
        let table = Arc::clone(&self.table);
        self.tell(Command::SetMemory(table)).expect("memory");
    }

    fn start(&mut self, config: QueueConfig, resume: Option<Resume>) -> Result<(), String> {
        let start = QueueStart {
            resume,
            ..start(0, config)
        };
        self.tell(Command::StartQueue(start))
    }

    fn drive(&mut self) {
        self.tell(Command::DriverOk(FeatureSet::EMPTY))
            .expect("running");
    }

    fn run(&mut self) -> Vec<Notice> {
        self.stand.run();
        self.take_notices()
    }
}

fn driver(mapping: &Mapping) -> Ring<'_> {
    ring(mapping, 0, 8)
}

/// Asks for so many bytes.
fn ask(driver: &mut Ring<'_>, len: u32) {
    let buffer = [(BusAddr(BASE + 0x8000), len)];
    driver.add(&[], &buffer).expect("added");
    driver.publish().expect("published");
}

#[test]
fn a_request_is_filled_and_announced() {
    let mut bench = Bench::new(Box::new(Rng::new()));
    bench.lend();
    let mapping = Arc::clone(&bench.mapping);
    let mut driver = driver(&mapping);
    ask(&mut driver, 1000);
    bench.start(driver.config(), None).expect("started");
    assert_eq!(bench.run(), [], "nothing happens before DRIVER_OK");
    bench.drive();
    assert_eq!(bench.run(), [Notice::Used { queue: 0 }]);
    assert_eq!(
        driver.pop_used().expect("sound").map(|used| used.written),
        Some(1000)
    );
    let mut bytes = [0; 1000];
    mapping.ram().read(0x8000, &mut bytes);
    assert!(bytes.iter().any(|byte| *byte != 0));
}

#[test]
fn a_queue_outside_the_memory_is_refused() {
    let mut bench = Bench::new(Box::new(Rng::new()));
    let config = driver(&bench.mapping).config();
    let why = bench
        .start(config, None)
        .expect_err("no memory is lent yet");
    assert!(why.contains("outside every window"), "{why}");
}

#[test]
fn memory_taken_away_under_a_running_queue_breaks_only_the_device() {
    let mut bench = Bench::new(Box::new(Rng::new()));
    bench.lend();
    let config = driver(&bench.mapping).config();
    bench.start(config, None).expect("started");
    bench.drive();
    bench.run();
    bench
        .tell(Command::SetMemory(Arc::new(WindowTable::empty())))
        .expect("memory");
    bench.core.kick(SLOT, 0);
    let notices = bench.run();
    assert!(
        matches!(&notices[..], [Notice::Broken { .. }]),
        "{notices:?}"
    );
    bench.core.kick(SLOT, 0);
    assert_eq!(bench.run(), [], "a broken device is left alone");
    bench.tell(Command::Reset).expect("reset");
    bench.lend();
    bench.start(config, None).expect("started again");
}

#[test]
fn a_queue_resumes_at_its_used_index() {
    let mut bench = Bench::new(Box::new(Rng::new()));
    bench.lend();
    let config = driver(&bench.mapping).config();
    bench
        .start(config, Some(Resume::At { avail: 3, used: 3 }))
        .expect("started");
    let why = bench
        .start(
            config,
            Some(Resume::At {
                avail: 300,
                used: 3,
            }),
        )
        .expect_err("297 chains cannot be in flight in a queue of 8");
    assert!(!why.is_empty());
    bench
        .start(config, Some(Resume::FromUsedRing))
        .expect("started");
}

#[test]
fn a_queue_of_which_nobody_says_where_it_is_goes_on_where_its_rings_say() {
    let mapping = {
        let bench = Bench::new(Box::new(Rng::new()));
        Arc::clone(&bench.mapping)
    };
    let mut driver = driver(&mapping);
    for round in 0..3 {
        // Another device host each time.
        let mut bench = Bench::on(Box::new(Rng::new()), Arc::clone(&mapping));
        bench.lend();
        ask(&mut driver, 16);
        bench
            .start(driver.config(), Some(Resume::AsFound))
            .expect("started");
        bench.drive();
        bench.run();
        assert!(driver.pop_used().expect("sound").is_some(), "round {round}");
        assert!(driver.pop_used().expect("sound").is_none(), "round {round}");
    }
    // What an old ring has left where a new one is: a used index that goes with nothing.
    let config = driver.config();
    let device = usize::try_from(config.device.0 - BASE).expect("inside");
    mapping.ram().write(device + 2, &300u16.to_le_bytes());
    mapping.ram().write(
        usize::try_from(config.driver.0 - BASE).expect("inside") + 2,
        &1u16.to_le_bytes(),
    );
    let mut bench = Bench::on(Box::new(Rng::new()), Arc::clone(&mapping));
    bench.lend();
    bench.start(config, Some(Resume::AsFound)).expect("started");
    bench.drive();
    assert_eq!(bench.run(), [Notice::Used { queue: 0 }]);
    let mut used = [0; 2];
    mapping.ram().read(device + 2, &mut used);
    assert_eq!(u16::from_le_bytes(used), 1, "begun at 0");
}

/// Panics when a queue is processed.
struct Panicking;

impl Device for Panicking {
    fn identity(&self) -> Identity {
        Identity {
            device_id: 4,
            vendor_id: 0,
        }
    }
    fn features(&self) -> FeatureSet {
        FeatureSet::EMPTY
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![8]
    }
    fn write_config(&mut self, _offset: usize, _data: &[u8]) -> Result<(), ReadOnly> {
        panic!("bad write")
    }
    fn activate(&mut self, _features: &FeatureSet) {}
    fn reset(&mut self) {}
    fn process(&mut self, _: usize, _: usize, _: &mut Io<'_>) -> Result<Progress, DeviceError> {
        panic!("bad queue")
    }
}

#[test]
fn a_device_that_panics_needs_reset_and_nothing_else_falls() {
    let mut bench = Bench::new(Box::new(Panicking));
    bench
        .core
        .command(Slot(1), 0, Command::Add(Box::new(Rng::new())), &mut NoFds);
    bench.lend();
    let config = driver(&bench.mapping).config();
    bench.start(config, None).expect("started");
    bench.drive();
    let notices = bench.run();
    assert!(
        matches!(&notices[..], [Notice::Broken { why, .. }] if why.contains("bad queue")),
        "{notices:?}"
    );
    let operate = Command::Operate(Operation::SetLink(true));
    let why = bench.tell(operate).expect_err("it is not asked any more");
    assert!(why.contains("out of order"), "{why}");
    let write = Command::WriteConfig {
        offset: 0,
        data: vec![1],
    };
    let why = bench.tell(write).expect_err("the device panics");
    assert!(why.contains("bad write"), "{why}");
}

#[test]
fn a_device_that_panics_in_a_command_needs_reset_too() {
    let mut bench = Bench::new(Box::new(Panicking));
    let write = Command::WriteConfig {
        offset: 0,
        data: vec![1],
    };
    bench.core.command(SLOT, 7, write, &mut NoFds);
    let replies: Vec<Reply> = bench.core.take_replies().collect();
    assert!(
        matches!(
            &replies[..],
            [
                Reply::Done { ticket: 7, result: Err(_) },
                Reply::Notice(SLOT, Notice::Broken { why, .. })
            ] if why.contains("bad write")
        ),
        "{replies:?}"
    );
}

#[test]
fn ready_queues_have_their_turns_in_order() {
    let mut ready = Ready::default();
    ready.add(0, 2);
    ready.add(5, 1);
    for (slot, queue) in [(0, 1), (5, 0), (0, 1), (0, 0), (9, 0), (0, 7)] {
        ready.push(slot, queue);
    }
    let turns: Vec<_> = std::iter::from_fn(|| ready.pop()).collect();
    assert_eq!(
        turns,
        [(0, 1), (5, 0), (0, 0)],
        "each once, unknown ones not at all"
    );
}

/// Wants to be polled at changing times, and its queue processed after each poll.
struct Ticking {
    next: Option<Instant>,
    step: std::time::Duration,
    processed: Arc<std::sync::atomic::AtomicU32>,
}

impl Device for Ticking {
    fn identity(&self) -> Identity {
        Identity {
            device_id: 4,
            vendor_id: 0,
        }
    }
    fn features(&self) -> FeatureSet {
        FeatureSet::EMPTY
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![8]
    }
    fn activate(&mut self, _features: &FeatureSet) {}
    fn reset(&mut self) {}
    fn process(&mut self, _: usize, _: usize, _: &mut Io<'_>) -> Result<Progress, DeviceError> {
        self.processed
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(Progress::Blocked)
    }
    fn next_timeout(&self) -> Option<Instant> {
        self.next
    }
    fn poll(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.next = Some(io.now + self.step);
        io.again(0);
        Ok(())
    }
}

#[test]
fn timeouts_follow_the_device_and_queues_are_processed_again_when_it_says_so() {
    let begin = Instant::now();
    let step = std::time::Duration::from_secs(3);
    let processed = Arc::default();
    let device = Ticking {
        next: Some(begin),
        step,
        processed: Arc::clone(&processed),
    };
    let mut bench = Bench::new(Box::new(device));
    bench.lend();
    let config = driver(&bench.mapping).config();
    bench.start(config, None).expect("started");
    bench.drive();
    assert_eq!(bench.run(), []);
    let count = || processed.load(std::sync::atomic::Ordering::Relaxed);
    let before = count();
    for turn in 0..5u32 {
        let now = begin + step * turn;
        assert_eq!(bench.core.next_timeout(), Some(now));
        bench.core.handle_timeouts(now);
        assert_eq!(bench.run(), []);
        assert_eq!(count(), before + turn + 1);
    }
}

#[test]
fn interrupts_go_the_same_way_after_a_queue_was_reset() {
    let mut bench = Bench::new(Box::new(Rng::new()));
    let mapping = Arc::clone(&bench.mapping);
    let call = Doorbell::new().expect("an eventfd");
    bench.lend();
    bench
        .tell(Command::SetNotify {
            queue: 0,
            kick: None,
            call: Some(call.try_clone().expect("a descriptor")),
        })
        .expect("notified");
    bench.drive();
    for _ in 0..3 {
        let mut driver = driver(&mapping);
        ask(&mut driver, 100);
        bench.start(driver.config(), None).expect("started");
        assert_eq!(bench.run(), [], "no message");
        assert_eq!(call.drain().expect("an eventfd"), 1);
        bench.tell(Command::ResetQueue(0)).expect("reset");
    }
}

#[test]
fn a_device_does_not_go_on_in_memory_that_is_gone() {
    let (mapping, fd) = Mapping::memfd("test", BYTES as u64, false).expect("memfd");
    let mapping = Arc::new(mapping);
    vmsg_mem::fault::install().expect("a handler");
    let mut bench = Bench::on(Box::new(Rng::new()), Arc::clone(&mapping));
    bench.lend();
    let mut driver = driver(&mapping);
    driver
        .add(&[], &[(BusAddr(BASE + BYTES as u64 - 4096), 4096)])
        .expect("added");
    driver.publish().expect("published");
    bench.start(driver.config(), None).expect("started");
    rustix::fs::ftruncate(&fd, BYTES as u64 - 4096).expect("truncated");
    bench.drive();
    let notices = bench.run();
    assert!(
        matches!(&notices[..], [.., Notice::Broken { why, .. }] if why.contains("gone")),
        "{notices:?}"
    );
}

#[test]
fn a_place_is_free_when_its_device_is_removed() {
    let mut bench = Bench::new(Box::new(Rng::new()));
    let settings = crate::net::Settings::new(crate::net::Mac([0x52, 0x54, 0, 0, 0, 1]));
    let net = crate::net::Net::new(&settings, Box::new(vmsg_net::Null::default()));
    let place = Slot(1);
    bench
        .core
        .command(place, 0, Command::Add(Box::new(net)), &mut NoFds);
    // Queues of the one that goes still have their turn before them.
    for queue in 0..3 {
        bench.core.kick(place, queue);
    }
    bench.core.command(place, 7, Command::Remove, &mut NoFds);
    let replies: Vec<Reply> = bench.core.take_replies().collect();
    assert!(
        matches!(
            replies[..],
            [Reply::Done {
                ticket: 7,
                result: Ok(())
            }]
        ),
        "{replies:?}"
    );
    bench
        .core
        .command(place, 0, Command::Add(Box::new(Panicking)), &mut NoFds);
    assert_eq!(bench.run(), [], "the new one has no queue at work");
    bench.core.command(place, 8, Command::Remove, &mut NoFds);
    bench.core.command(place, 9, Command::Remove, &mut NoFds);
    let replies: Vec<Reply> = bench.core.take_replies().collect();
    assert!(
        matches!(
            replies[..],
            [
                Reply::Done {
                    ticket: 8,
                    result: Ok(())
                },
                Reply::Done {
                    ticket: 9,
                    result: Err(_)
                },
            ]
        ),
        "{replies:?}"
    );
    bench.core.poll_device(place, Instant::now());
    assert_eq!(bench.run(), []);
}

/// Without queues; others say when it is to be polled.
struct Resident(Arc<std::sync::Mutex<Option<Instant>>>);

impl Device for Resident {
    fn identity(&self) -> Identity {
        Identity {
            device_id: 0,
            vendor_id: 0,
        }
    }
    fn features(&self) -> FeatureSet {
        FeatureSet::EMPTY
    }
    fn queue_sizes(&self) -> Vec<u16> {
        Vec::new()
    }
    fn activate(&mut self, _features: &FeatureSet) {}
    fn reset(&mut self) {}
    fn process(&mut self, _: usize, _: usize, _: &mut Io<'_>) -> Result<Progress, DeviceError> {
        Ok(Progress::Blocked)
    }
    fn next_timeout(&self) -> Option<Instant> {
        *self.0.lock().expect("sound")
    }
    fn poll(&mut self, _: &mut Io<'_>) -> Result<(), DeviceError> {
        *self.0.lock().expect("sound") = None;
        Ok(())
    }
}

#[test]
fn what_others_want_of_a_resident_is_seen_before_the_worker_sleeps() {
    let due = Arc::default();
    let mut core = Core::new();
    let resident = Box::new(Resident(Arc::clone(&due)));
    core.command(SLOT, 0, Command::Add(resident), &mut NoFds);
    assert_eq!(core.next_timeout(), None);
    let now = Instant::now();
    *due.lock().expect("sound") = Some(now);
    core.update_residents();
    assert_eq!(core.next_timeout(), Some(now));
    core.handle_timeouts(now);
    assert_eq!(core.next_timeout(), None);
    core.command(SLOT, 1, Command::Remove, &mut NoFds);
    *due.lock().expect("sound") = Some(now);
    core.update_residents();
    assert_eq!(core.next_timeout(), None, "it is gone");
}
