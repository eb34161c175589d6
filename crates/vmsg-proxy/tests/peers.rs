// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A session and the device hosts found in the field: a test for each thing they do that the protocol does not say.
//!
//! The bus is as bare as there is: 48-byte messages, no descriptors, no windows by message, no claims.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod qemu;

use qemu::{PLATFORM, Qemu, SIZE};
use std::fs::File;
use std::sync::Arc;
use virtio_msg::{DevNum, DeviceStatus, FeatureSet, Instant, Message, QueueIndex, QueueSize};
use vmsg_bus::Capabilities;
use vmsg_proxy::session::{
    CommonMemory, Event, FileId, Op, OpError, Options, OtherMemory, Outcome, QueueSetup,
    ResetReason, ResumeAt, Session, Target, Window,
};

const OURS: u32 = u32::from_le_bytes(*b"vmsg");
const RAM: FileId = FileId {
    device: 1,
    inode: 2,
};
const BASE: u64 = 0x4000_0000;
const LEN: u64 = 0x1000_0000;

const ACCEPTED: DeviceStatus = DeviceStatus::ACKNOWLEDGE
    .union(DeviceStatus::DRIVER)
    .union(DeviceStatus::FEATURES_OK);
const LIVE: DeviceStatus = ACCEPTED.union(DeviceStatus::DRIVER_OK);

fn bare() -> Capabilities {
    Capabilities {
        passes_fds: false,
        runtime_windows: false,
        out_of_band_notify: false,
        enumerates: true,
        claims: false,
        views: false,
        shared_memory: false,
        queue_vectors: false,
        max_message_size: SIZE,
    }
}

struct World {
    now: Instant,
    session: Session,
    host: Qemu,
    epoch: u64,
    events: Vec<Event>,
}

impl World {
    fn new(host: Qemu) -> World {
        World::of(Target::Number(host.number), host)
    }

    fn of(target: Target, host: Qemu) -> World {
        let mut world = World {
            now: Instant(1),
            session: Session::new(target, Options::default()),
            host,
            epoch: 0,
            events: Vec::new(),
        };
        world.session.set_common_memory(Ok(vec![CommonMemory {
            base: BASE,
            len: LEN,
            file_offset: 0,
            file: RAM,
            path: "/dev/shm/ram".into(),
        }]));
        world.connect();
        world
    }

    fn connect(&mut self) {
        self.epoch += 1;
        self.session.handle_link_up(self.now, bare(), self.epoch);
        self.run();
    }

    /// The device host dies, and `next` takes its place.
    fn replace(&mut self, next: Qemu) {
        self.session.handle_link_down(self.now);
        self.host = next;
        self.connect();
    }

    fn run(&mut self) {
        loop {
            while let Some(event) = self.session.poll_event() {
                self.events.push(event);
            }
            let Some(out) = self.session.poll_transmit() else {
                return;
            };
            assert!(out.fds.is_empty(), "the bus passes no descriptors");
            if let Some(answer) = self.host.handle(&out.bytes) {
                self.session.handle_message(self.now, &answer);
            }
        }
    }

    fn op(&mut self, op: Op) -> Result<Outcome, OpError> {
        let id = self.session.submit(self.now, op);
        loop {
            self.run();
            let done = self.events.iter().find_map(|event| match event {
                Event::Done { id: done, result } if *done == id => Some(result.clone()),
                _ => None,
            });
            if let Some(result) = done {
                return result;
            }
            self.now = self.session.poll_timeout().expect("something is awaited");
            self.session.handle_timeout(self.now);
        }
    }

    fn ok(&mut self, op: Op) -> Outcome {
        self.op(op).expect("done")
    }

    fn bring_up(&mut self) {
        self.negotiate();
        for queue in 0..2 {
            self.ok(Op::SetQueue(QueueIndex(queue), setup(ResumeAt::Start)));
        }
        self.ok(Op::SetStatus(LIVE));
    }

    fn negotiate(&mut self) {
        self.ok(Op::Claim);
        self.ok(Op::SetWindows(vec![window(BASE, LEN, 0, RAM)]));
        self.ok(Op::SetStatus(DeviceStatus::RESET));
        self.ok(Op::SetStatus(
            DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER,
        ));
        self.ok(Op::SetFeatures(FeatureSet::from_bits(&[29, 32])));
        self.ok(Op::SetStatus(ACCEPTED));
    }

    fn reset_reason(&self) -> Option<&ResetReason> {
        self.events.iter().rev().find_map(|event| match event {
            Event::NeedsReset(reason) => Some(reason),
            _ => None,
        })
    }
}

fn setup(resume: ResumeAt) -> QueueSetup {
    QueueSetup {
        size: 128,
        descriptor: BASE + 0x1000,
        driver: BASE + 0x2000,
        device: BASE + 0x3000,
        resume,
    }
}

fn window(base: u64, len: u64, file_offset: u64, file: FileId) -> Window {
    Window {
        base,
        len,
        file_offset,
        writable: true,
        fd: Arc::new(File::open("/dev/null").unwrap().into()),
        file,
    }
}

// Device hosts as QEMU

#[test]
fn nothing_is_sent_that_would_be_dropped_without_an_answer() {
    let mut world = World::new(Qemu::net());
    world.bring_up();
    world.ok(Op::SetNotify {
        queue: QueueIndex(0),
        kick: None,
        call: None,
    });
    world.ok(Op::StopQueue(QueueIndex(1)));
    world.ok(Op::SetWindows(Vec::new()));
    world.ok(Op::Release);
    assert_eq!(world.host.dropped, Vec::<String>::new());
    assert_eq!(world.session.counters().timeouts, 0);
}

#[test]
fn a_request_left_without_an_answer_ends_the_wait_in_time() {
    let mut world = World::new(Qemu::net());
    world.bring_up();
    world.host.is_silent = true;
    let begin = world.now;
    let result = world.op(Op::WriteConfig {
        offset: 0,
        data: vec![1],
    });
    assert_eq!(result, Err(OpError::TimedOut));
    assert!(world.now.0 - begin.0 <= 4_000_000_000);
    assert_eq!(world.session.counters().timeouts, 1);
    assert!(matches!(world.events.last(), Some(Event::LinkFault(_))));
}

#[test]
fn a_name_where_devices_have_none_is_an_error_that_says_what_to_do() {
    let mut world = World::of(Target::Name("net0".into()), Qemu::net());
    let error = world.op(Op::Describe).unwrap_err();
    assert!(matches!(error, OpError::NeedsReset(_)), "{error:?}");
    assert!(error.to_string().contains("dev=0"), "{error}");
    assert_eq!(world.host.dropped.len(), 1, "one device, asked once");
    // A host that has names may come later.
    let mut named = Qemu::net();
    named.name = Some("net0");
    world.replace(named);
    assert!(world.session.is_ready());
}

#[test]
fn answers_to_get_devices_have_token_0_and_a_next_offset_that_never_becomes_0() {
    let mut host = Qemu::net();
    host.number = DevNum(40);
    host.name = Some("net0");
    let world = World::of(Target::Name("net0".into()), host);
    assert!(world.session.is_ready());
    assert_eq!(world.session.device().map(|d| d.number), Some(DevNum(40)));
    let lists = world
        .host
        .log
        .iter()
        .filter(|line| line.contains("GET_DEVICES"));
    assert!(lists.count() <= 65536 / 32);
    assert_eq!(world.session.counters().late, 0);
}

#[test]
fn a_device_plugged_without_its_bus_sits_at_number_31() {
    let mut host = Qemu::net();
    host.number = DevNum(31);
    let mut world = World::new(host);
    world.bring_up();
    assert_eq!(world.host.status, LIVE);
    // And by its name, where there are names.
    let mut host = Qemu::net();
    host.number = DevNum(31);
    host.name = Some("net0");
    let world = World::of(Target::Name("net0".into()), host);
    assert_eq!(world.session.device().map(|d| d.number), Some(DevNum(31)));
}

#[test]
fn access_platform_is_accepted_whenever_it_is_offered_and_hidden_from_the_guest() {
    let mut world = World::new(Qemu::net());
    world.bring_up();
    assert_eq!(
        world.host.features,
        FeatureSet::from_bits(&[29, 32, PLATFORM])
    );
    assert_eq!(world.session.features(), FeatureSet::from_bits(&[29, 32]));
    // In a replay as well; and not where it is not offered.
    let mut ours = Qemu::net();
    ours.vendor = OURS;
    world.replace(ours);
    assert!(world.session.is_ready());
    assert!(world.host.features.bit(PLATFORM));
    let mut plain = Qemu::net();
    plain.vendor = OURS;
    plain.offered.remove(PLATFORM);
    world.replace(plain);
    assert!(world.session.is_ready());
    assert!(!world.host.features.bit(PLATFORM));
}

#[test]
fn get_vqueue_shows_the_largest_size_before_set_up() {
    let mut world = World::new(Qemu::net());
    let facts = world.session.device().unwrap();
    assert_eq!(facts.queue_sizes, [256, 256, 64]);
    world.bring_up();
    assert_eq!(world.host.queues[&0].size, QueueSize(128));
}

#[test]
fn get_vqueue_need_not_echo_addresses() {
    let mut host = Qemu::net();
    host.echoes_addresses = false;
    let mut world = World::new(host);
    world.bring_up();
    assert_eq!(world.host.status, LIVE);
    // Our own hosts do, on a bus of revision 1: one that does not has refused.
    let mut host = Qemu::net();
    host.vendor = OURS;
    host.echoes_addresses = false;
    let mut world = World::new(host);
    world.negotiate();
    let result = world.op(Op::SetQueue(QueueIndex(0), setup(ResumeAt::Start)));
    assert!(matches!(result, Err(OpError::Refused { .. })), "{result:?}");
}

#[test]
fn configuration_is_read_and_written_in_pieces_of_28_bytes() {
    let mut host = Qemu::net();
    host.config = (0..60).collect();
    let mut world = World::new(host);
    assert!(world.session.is_ready());
    let Outcome::Config(data) = world.ok(Op::ReadConfig { offset: 1, len: 59 }) else {
        panic!("no configuration");
    };
    assert_eq!(data, (1..60).collect::<Vec<u8>>());
    world.ok(Op::WriteConfig {
        offset: 2,
        data: vec![0xaa; 57],
    });
    assert_eq!(world.host.config[..2], [0, 1]);
    assert_eq!(world.host.config[2..59], [0xaa; 57]);
    assert_eq!(world.host.config[59], 59);
}

#[test]
fn a_configuration_that_changes_without_an_event_is_read_anew() {
    let mut world = World::new(Qemu::net());
    world.bring_up();
    world.host.config[6] = 0;
    let read = world.ok(Op::ReadConfig { offset: 6, len: 2 });
    assert_eq!(read, Outcome::Config(vec![0, 0]));
}

#[test]
fn set_config_ignores_the_generation_and_echoes_the_request() {
    let mut world = World::new(Qemu::net());
    world.ok(Op::WriteConfig {
        offset: 0,
        data: vec![2, 3],
    });
    assert_eq!(world.host.config[..2], [2, 3]);
    world.ok(Op::WriteConfig {
        offset: 1,
        data: vec![4],
    });
    assert_eq!(world.host.config[..2], [2, 4]);
}

#[test]
fn no_queue_is_reset_that_the_device_does_not_have() {
    // That would crash it: the host of this test asserts it.
    let mut world = World::new(Qemu::net());
    world.bring_up();
    for queue in [3, 31, 4096, u32::MAX] {
        let result = world.op(Op::StopQueue(QueueIndex(queue)));
        assert!(matches!(result, Err(OpError::Invalid(_))), "{result:?}");
    }
    world.ok(Op::StopQueue(QueueIndex(1)));
    assert_eq!(world.host.queues.len(), 1);
}

// Memory that is in common

#[test]
fn memory_in_common_is_not_lent_and_roms_are_left_out() {
    let mut world = World::new(Qemu::net());
    let rom = FileId {
        device: 1,
        inode: 3,
    };
    world.ok(Op::SetWindows(vec![
        window(BASE + 0x10_0000, 0x20_0000, 0x10_0000, RAM),
        window(0, 0x4_0000, 0, rom),
    ]));
    assert!(world.events.contains(&Event::LeftOut {
        base: 0,
        len: 0x4_0000
    }));
    let in_rom = QueueSetup {
        driver: 0x1000,
        ..setup(ResumeAt::Start)
    };
    world.negotiate();
    let result = world.op(Op::SetQueue(QueueIndex(0), in_rom));
    assert!(matches!(result, Err(OpError::Invalid(_))), "{result:?}");
}

#[test]
fn a_guest_with_other_memory_is_refused_with_the_file_it_should_have() {
    let mut world = World::new(Qemu::net());
    let other = FileId {
        device: 1,
        inode: 3,
    };
    let result = world.op(Op::SetWindows(vec![window(BASE, LEN, 0, other)]));
    let Err(OpError::OtherMemory(OtherMemory::OtherFile { path, size, base })) = result else {
        panic!("{result:?}");
    };
    assert_eq!((path.as_str(), size, base), ("/dev/shm/ram", LEN, BASE));
    let result = world.op(Op::SetWindows(vec![window(0, LEN, 0, RAM)]));
    let error = result.unwrap_err().to_string();
    assert!(error.contains("mem-offset="), "{error}");
}

#[test]
fn a_bus_that_comes_back_with_other_memory_is_refused() {
    let mut world = World::new(Qemu::net());
    world.bring_up();
    world.session.handle_link_down(world.now);
    world.session.set_common_memory(Ok(vec![CommonMemory {
        base: BASE,
        len: LEN,
        file_offset: 0,
        file: FileId {
            device: 1,
            inode: 99,
        },
        path: "/dev/shm/new".into(),
    }]));
    world.connect();
    assert!(!world.session.is_ready());
    assert!(matches!(
        world.reset_reason(),
        Some(ResetReason::OtherMemory(_))
    ));
}

// Device hosts that come back

#[test]
fn our_own_device_host_goes_on_where_the_ring_stands() {
    let mut host = Qemu::net();
    host.vendor = OURS;
    let mut world = World::new(host);
    world.bring_up();
    let mut next = Qemu::net();
    next.vendor = OURS;
    world.replace(next);
    assert!(world.session.is_ready());
    assert_eq!(world.host.status, LIVE);
    assert_eq!(world.host.queues.len(), 2);
    assert_eq!(world.host.kicks, [0, 1], "each queue is looked at");
    assert_eq!(world.host.dropped, Vec::<String>::new(), "no QUEUE_RESUME");
}

#[test]
fn a_foreign_device_host_would_begin_anew_so_the_guest_is_not_given_to_it() {
    let mut world = World::new(Qemu::net());
    world.bring_up();
    world.replace(Qemu::net());
    assert_eq!(
        world.reset_reason(),
        Some(&ResetReason::CannotResume { queue: 0 })
    );
    assert!(world.host.queues.is_empty() && world.host.status.is_empty());
    // A driver that starts anew is served again.
    let result = world.op(Op::SetStatus(ACCEPTED));
    assert!(matches!(result, Err(OpError::NeedsReset(_))), "{result:?}");
    // The host of before may live, so this one is reset first.
    let before = world.host.log.len();
    world.ok(Op::Release);
    let reset = Message::SetDeviceStatus(DeviceStatus::RESET).to_string();
    assert_eq!(world.host.log[before..], [reset]);
    assert!(
        world
            .events
            .iter()
            .any(|event| matches!(event, Event::LinkFault(_)))
    );
    world.connect();
    world.bring_up();
    assert_eq!(world.host.status, LIVE);
}

#[test]
fn a_queue_in_its_middle_is_not_given_to_a_foreign_device_host() {
    let mut world = World::new(Qemu::net());
    world.negotiate();
    for resume in [
        ResumeAt::UsedIndex,
        ResumeAt::Explicit { avail: 5, used: 5 },
    ] {
        let result = world.op(Op::SetQueue(QueueIndex(1), setup(resume)));
        assert_eq!(
            result,
            Err(OpError::NeedsReset(ResetReason::CannotResume { queue: 1 }))
        );
    }
    // Our own begin at the used index of the ring, and cannot be told anything else there.
    let mut host = Qemu::net();
    host.vendor = OURS;
    let mut world = World::new(host);
    world.negotiate();
    world.ok(Op::SetQueue(QueueIndex(0), setup(ResumeAt::UsedIndex)));
    let split = ResumeAt::Explicit { avail: 7, used: 5 };
    assert!(world.op(Op::SetQueue(QueueIndex(1), setup(split))).is_err());
}

// Notifications by message

#[test]
fn kicks_that_wait_for_room_are_one() {
    let mut world = World::new(Qemu::net());
    world.bring_up();
    world.host.kicks.clear();
    // The bus is full: nothing is taken meanwhile.
    for _ in 0..10_000 {
        world.session.kick(QueueIndex(0));
        world.session.kick(QueueIndex(1));
        world.session.kick(QueueIndex(9));
    }
    world.run();
    world.host.kicks.sort_unstable();
    assert_eq!(world.host.kicks, [0, 1]);
    world.session.kick(QueueIndex(0));
    world.run();
    assert_eq!(world.host.kicks, [0, 1, 0]);
}

#[test]
fn a_kick_for_a_queue_stopped_meanwhile_is_not_sent() {
    let mut world = World::new(Qemu::net());
    world.bring_up();
    world.host.kicks.clear();
    world.session.kick(QueueIndex(1));
    let id = world
        .session
        .submit(world.now, Op::SetStatus(DeviceStatus::RESET));
    world.run();
    assert!(
        world
            .events
            .iter()
            .any(|event| matches!(event, Event::Done { id: done, .. } if *done == id))
    );
    assert!(world.host.kicks.len() <= 1);
    world.session.kick(QueueIndex(1));
    world.run();
    assert!(world.host.kicks.len() <= 1);
}

#[test]
fn the_eventfds_stay_with_whoever_has_the_session() {
    let mut world = World::new(Qemu::net());
    world.negotiate();
    let bell = || Arc::new(rustix_eventfd());
    let (kick, call) = (bell(), bell());
    let before = world.session.bells_version();
    world.ok(Op::SetNotify {
        queue: QueueIndex(0),
        kick: Some(kick.clone()),
        call: Some(call.clone()),
    });
    assert_ne!(world.session.bells_version(), before);
    let bells: Vec<_> = world.session.bells().collect();
    assert_eq!(bells.len(), 1);
    assert!(bells[0].kick.is_some_and(|fd| Arc::ptr_eq(fd, &kick)));
    assert!(bells[0].call.is_some_and(|fd| Arc::ptr_eq(fd, &call)));
    world.ok(Op::SetStatus(DeviceStatus::RESET));
    assert_eq!(world.session.bells().count(), 0);
    assert_eq!(world.host.dropped, Vec::<String>::new());
}

fn rustix_eventfd() -> std::os::fd::OwnedFd {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()
}
