// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long a device host that does not do its part can hold a front up: a VMM stands still for as long as an operation takes.
#![allow(missing_docs)]

mod common;

use common::{Host, MAX};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use virtio_msg::{ConfigEvent, DevNum, DeviceStatus, Frame, Generation, Instant, Message, Token};
use vmsg_bus::Capabilities;
use vmsg_proxy::session::{
    Event, FileId, Op, OpError, OpId, Options, Outcome, QueueSetup, ResumeAt, Session, Target,
    Window,
};

const LIVE: DeviceStatus = DeviceStatus::ACKNOWLEDGE
    .union(DeviceStatus::DRIVER)
    .union(DeviceStatus::FEATURES_OK)
    .union(DeviceStatus::DRIVER_OK);

/// How the host treats requests from now on.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Prompt,
    /// Answers each request after so long.
    Slow(Duration),
    /// Is stopped, or has lost its mind.
    Silent,
    /// Prompt, but what is to let go of queues is not answered, as long as they have requests under way.
    Busy,
    /// Prompt, but says before each answer that the configuration has changed.
    Talkative,
}

struct World {
    now: Instant,
    session: Session,
    host: Host,
    mood: Mood,
    /// Answers that wait until the device is not busy any more.
    due: Vec<Vec<u8>>,
    events: Vec<Event>,
}

impl World {
    fn new(host: Host) -> World {
        World {
            now: Instant(1_000_000_000),
            session: Session::new(Target::Number(host.number), Options::default()),
            host,
            mood: Mood::Prompt,
            due: Vec::new(),
            events: Vec::new(),
        }
    }

    fn connect(&mut self) {
        self.host.end_of_connection();
        let caps = Capabilities::all(MAX);
        self.session.handle_link_up(self.now, caps, 7);
    }

    /// One message, one deadline. False: nothing moves any more.
    fn step(&mut self) -> bool {
        while let Some(event) = self.session.poll_event() {
            self.events.push(event);
        }
        let Some(out) = self.session.poll_transmit() else {
            let Some(at) = self.session.poll_timeout() else {
                return false;
            };
            self.now = at.max(self.now);
            self.session.handle_timeout(self.now);
            return true;
        };
        if self.mood == Mood::Silent {
            return true;
        }
        let fds: Vec<OwnedFd> = out.fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
        let Some(answer) = self.host.handle(&out.bytes, fds) else {
            return true;
        };
        let frame = virtio_msg::decode(&out.bytes, MAX).unwrap();
        let lets_go = match frame.message {
            Message::SetDeviceStatus(status) => status.is_empty(),
            Message::ResetVqueue(_) => true,
            _ => false,
        };
        if self.mood == Mood::Busy && lets_go {
            self.due.push(answer);
            return true;
        }
        if let Mood::Slow(delay) = self.mood {
            let then = self.now + delay;
            while let Some(due) = self.session.poll_timeout().filter(|due| *due < then) {
                self.now = due;
                self.session.handle_timeout(due);
            }
            self.now = then;
        }
        if self.mood == Mood::Talkative {
            let event = Message::EventConfig(ConfigEvent {
                status: self.host.status,
                generation: Generation(1),
                offset: 0,
                len: 0,
                data: &[],
            });
            let mut bytes = [0; 64];
            let frame = Frame::new(self.host.number, Token(0), event);
            let len = frame.encode(&mut bytes).unwrap();
            self.session.handle_message(self.now, &bytes[..len]);
        }
        self.session.handle_message(self.now, &answer);
        true
    }

    /// What comes of an operation, and how long that takes.
    #[track_caller]
    fn op(&mut self, op: Op) -> (Result<Outcome, OpError>, Duration) {
        let begin = self.now;
        let id = self.session.submit(self.now, op);
        for _ in 0..100_000 {
            if let Some(result) = self.result(id) {
                return (result, Duration::from_nanos(self.now.0 - begin.0));
            }
            assert!(self.step(), "the operation has no end");
        }
        panic!("the operation has no end");
    }

    fn result(&mut self, id: OpId) -> Option<Result<Outcome, OpError>> {
        while let Some(event) = self.session.poll_event() {
            self.events.push(event);
        }
        self.events.iter().find_map(|e| match e {
            Event::Done { id: done, result } if *done == id => Some(result.clone()),
            _ => None,
        })
    }

    /// A guest that runs.
    fn live(host: Host) -> World {
        let mut world = World::new(host);
        world.connect();
        for op in bring_up() {
            world.op(op).0.unwrap();
        }
        assert_eq!(world.host.status, LIVE);
        world
    }
}

fn window(base: u64) -> Window {
    let fd = Arc::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap());
    let file = FileId {
        device: 1,
        inode: base,
    };
    Window {
        base,
        len: 0x1000,
        file_offset: 0,
        writable: true,
        fd,
        file,
    }
}

fn set_queue() -> Op {
    let setup = QueueSetup {
        size: 64,
        descriptor: 0x1000,
        driver: 0x2000,
        device: 0x3000,
        resume: ResumeAt::Start,
    };
    Op::SetQueue(virtio_msg::QueueIndex(0), setup)
}

fn bring_up() -> Vec<Op> {
    vec![
        Op::Describe,
        Op::Claim,
        Op::SetWindows(vec![window(0)]),
        Op::SetStatus(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER),
        Op::SetFeatures(virtio_msg::FeatureSet::from_bits(&[32])),
        Op::SetStatus(LIVE & !DeviceStatus::DRIVER_OK),
        set_queue(),
        Op::SetStatus(LIVE),
    ]
}

/// All that a guest's reboot, its end, and its next start ask for.
fn requests() -> Vec<Op> {
    let mut ops = vec![
        Op::ReadConfig { offset: 0, len: 6 },
        Op::StopQueue(virtio_msg::QueueIndex(0)),
        Op::SetStatus(DeviceStatus::RESET),
    ];
    ops.extend(bring_up());
    ops.push(Op::SetWindows((0..40).map(|i| window(i << 20)).collect()));
    ops.push(Op::SetNotify {
        queue: virtio_msg::QueueIndex(0),
        kick: None,
        call: None,
    });
    ops.push(Op::Release);
    ops
}

const BOUND: Duration = Duration::from_millis(2001);

#[test]
fn a_silent_host_holds_a_front_up_once_and_briefly() {
    for op in requests() {
        let mut world = World::live(Host::net());
        world.mood = Mood::Silent;
        let (result, took) = world.op(op.clone());
        assert!(
            result.is_ok(),
            "{op:?}: recorded for the replay: {result:?}"
        );
        assert!(took <= BOUND, "{op:?} took {took:?}");
        // The connection is given up: everything after that is immediate.
        let mut took = Duration::ZERO;
        for op in requests() {
            took += world.op(op).1;
        }
        assert!(took <= BOUND, "all the rest took {took:?}");
    }
}

#[test]
fn what_a_silent_host_did_not_do_the_next_does() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Silent;
    world.op(Op::SetWindows(vec![window(0x10_0000)])).0.unwrap();
    world.mood = Mood::Prompt;
    world.connect();
    world.op(Op::Describe).0.unwrap();
    let windows: Vec<u64> = world.host.windows.values().map(|w| w.base.0).collect();
    assert_eq!(windows, [0x10_0000]);
    assert_eq!(world.host.status, LIVE);
}

#[test]
fn a_guest_that_ends_before_a_silent_host_leaves_nothing_to_replay() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Silent;
    world.op(Op::Release).0.unwrap();
    world.mood = Mood::Prompt;
    world.connect();
    world.op(Op::Describe).0.unwrap();
    assert!(world.host.windows.is_empty() && !world.host.claimed);
    assert_eq!(world.host.status, DeviceStatus::RESET);
}

/// What is to be taken back waits until a host that was lost knows that it was; a guest that ends meanwhile stands behind that.
#[test]
fn a_guest_that_ends_behind_what_is_held_back_leaves_nothing_to_replay() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Silent;
    let unmap = Op::ChangeWindows {
        remove: vec![0],
        add: Vec::new(),
    };
    let unmapped = world.session.submit(world.now, unmap);
    // Its time is up in the middle of that.
    world.now = world.now + Duration::from_millis(20);
    let (result, took) = world.op(Op::Release);
    assert_eq!(result, Ok(Outcome::Done));
    assert!(took <= BOUND + Duration::from_millis(100), "{took:?}");
    assert_eq!(world.result(unmapped), Some(Ok(Outcome::Done)));
    world.mood = Mood::Prompt;
    world.connect();
    world.op(Op::Describe).0.unwrap();
    assert!(world.host.windows.is_empty() && !world.host.claimed);
    assert_eq!(world.host.status, DeviceStatus::RESET);
}

#[test]
fn a_guest_that_ends_before_its_device_was_seen_leaves_nothing_either() {
    let mut world = World::new(Host::net());
    world
        .op(Op::ChangeWindows {
            remove: Vec::new(),
            add: vec![window(0)],
        })
        .0
        .unwrap();
    let (result, _) = world.op(Op::Release);
    assert_eq!(result, Err(OpError::TimedOut));
    world.connect();
    world.op(Op::Describe).0.unwrap();
    assert!(world.host.windows.is_empty());
}

impl World {
    /// The requests under way have ended.
    fn rest(&mut self) {
        self.mood = Mood::Prompt;
        for answer in std::mem::take(&mut self.due) {
            self.session.handle_message(self.now, &answer);
        }
    }

    fn is_given_up(&self) -> bool {
        let fault = |event: &Event| matches!(event, Event::LinkFault(_));
        self.events.iter().any(fault)
    }
}

#[test]
fn a_reset_is_not_done_before_the_device_has_done_it() {
    let reset = Op::SetStatus(DeviceStatus::RESET);
    for op in [Op::StopQueue(virtio_msg::QueueIndex(0)), reset.clone()] {
        let mut world = World::live(Host::net());
        world.mood = Mood::Busy;
        let (result, took) = world.op(op.clone());
        assert_eq!(result, Err(OpError::Busy), "{op:?}");
        assert!(took <= BOUND, "{took:?}");
        // As long as it takes: nothing is asked for twice, and the connection stays.
        for _ in 0..20 {
            let (result, took) = world.op(op.clone());
            assert_eq!(result, Err(OpError::Busy));
            assert!(took <= BOUND, "{took:?}");
        }
        assert_eq!(world.session.counters().overdue, 1);
        assert_eq!(world.due.len(), 2, "and once more, if the answer was lost");
        // What needs no device is answered, and nothing else is done.
        let read = Op::ReadConfig { offset: 0, len: 6 };
        assert!(matches!(world.op(read).0, Ok(Outcome::Config(_))));
        assert_eq!(world.op(Op::Claim).0, Ok(Outcome::Done));
        assert_eq!(
            world.op(Op::SetWindows(Vec::new())).0,
            Err(OpError::Busy),
            "memory may be in use"
        );
        assert_eq!(world.op(set_queue()).0, Err(OpError::Busy));
        world.rest();
        assert!(!world.is_given_up());
        let (result, took) = world.op(reset.clone());
        assert_eq!(result, Ok(Outcome::Status(DeviceStatus::RESET)));
        assert_eq!(took, Duration::ZERO);
        for op in bring_up() {
            world.op(op).0.unwrap();
        }
        assert_eq!(world.host.status, LIVE);
    }
}

#[test]
fn a_front_that_asks_again_by_itself_is_told_at_once_that_the_device_is_busy() {
    let mut world = World::live(Host::net());
    let options = Options {
        overdue_timeout: Duration::ZERO,
        ..Options::default()
    };
    world.session = Session::new(Target::Number(DevNum(3)), options);
    world.connect();
    for op in bring_up() {
        world.op(op).0.unwrap();
    }
    world.mood = Mood::Busy;
    let reset = Op::SetStatus(DeviceStatus::RESET);
    assert_eq!(world.op(reset.clone()).0, Err(OpError::Busy));
    let begin = world.now;
    for _ in 0..1000 {
        assert_eq!(
            world.op(reset.clone()),
            (Err(OpError::Busy), Duration::ZERO)
        );
    }
    assert_eq!(world.now, begin);
    world.rest();
    assert!(world.op(reset).0.is_ok());
}

#[test]
fn a_busy_host_that_falls_silent_is_given_up() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Busy;
    let reset = Op::SetStatus(DeviceStatus::RESET);
    assert_eq!(world.op(reset.clone()).0, Err(OpError::Busy));
    world.mood = Mood::Silent;
    let mut took = Duration::ZERO;
    while !world.is_given_up() {
        took += world.op(reset.clone()).1;
        assert!(took <= 2 * BOUND, "{took:?}");
    }
    // What it had is the next one's business.
    assert_eq!(world.op(reset).0, Ok(Outcome::Status(DeviceStatus::RESET)));
    world.mood = Mood::Prompt;
    world.connect();
    for op in bring_up() {
        world.op(op).0.unwrap();
    }
    assert_eq!(world.host.status, LIVE);
}

#[test]
fn a_guest_that_ends_at_a_busy_device_is_gone() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Busy;
    let reset = Op::SetStatus(DeviceStatus::RESET);
    assert_eq!(world.op(reset).0, Err(OpError::Busy));
    let (result, took) = world.op(Op::Release);
    assert_eq!(result, Ok(Outcome::Done));
    assert!(took <= BOUND, "{took:?}");
    assert!(
        world.is_given_up(),
        "the host learns it from the connection"
    );
    world.mood = Mood::Prompt;
    world.due.clear();
    world.connect();
    world.op(Op::Describe).0.unwrap();
    assert!(world.host.windows.is_empty() && !world.host.claimed);
}

#[test]
fn answers_to_pings_that_were_not_asked_for_change_nothing() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Silent;
    let reset = world
        .session
        .submit(world.now, Op::SetStatus(DeviceStatus::RESET));
    let out = world.session.poll_transmit().unwrap();
    let token = virtio_msg::decode(&out.bytes, MAX).unwrap().token;
    let mut pong = |token, data| {
        let mut bytes = [0; 64];
        let frame = Frame::new(DevNum(0), token, Message::Pong { data });
        let len = frame.encode(&mut bytes).unwrap();
        world.session.handle_message(world.now, &bytes[..len]);
    };
    // Before it is asked, of another request, with other data.
    pong(token, 0);
    pong(Token(token.0 + 1), 0);
    pong(token, 7);
    while world.result(reset).is_none() {
        assert!(world.step());
    }
    assert!(world.is_given_up());
    assert_eq!(world.session.counters().overdue, 0);
}

#[test]
fn a_write_of_configuration_fails_in_time() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Silent;
    let write = Op::WriteConfig {
        offset: 0,
        data: vec![1],
    };
    let (result, took) = world.op(write.clone());
    assert_eq!(result, Err(OpError::TimedOut));
    assert!(took <= BOUND, "{took:?}");
    let (result, took) = world.op(write);
    assert_eq!(result, Err(OpError::TimedOut));
    assert!(took <= BOUND, "{took:?}");
}

#[test]
fn a_host_that_answers_each_request_just_in_time_gains_nothing() {
    for delay in [300, 900, 1900] {
        for op in requests() {
            let mut world = World::live(Host::net());
            world.mood = Mood::Slow(Duration::from_millis(delay));
            let (result, took) = world.op(op.clone());
            assert!(result.is_ok(), "{op:?}: {result:?}");
            assert!(
                took <= BOUND + Duration::from_millis(delay),
                "{op:?} took {took:?}"
            );
        }
    }
}

#[test]
fn a_host_that_takes_its_time_to_attach_does_not_hold_a_front_up() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Slow(Duration::from_millis(900));
    world.connect();
    let (result, took) = world.op(Op::StopQueue(virtio_msg::QueueIndex(0)));
    assert_eq!(result, Ok(Outcome::Done));
    assert!(took <= BOUND + Duration::from_secs(1), "{took:?}");
    assert!(
        world
            .events
            .iter()
            .any(|e| matches!(e, Event::LinkFault(_)))
    );
}

#[test]
fn news_of_the_configuration_without_end_do_not_keep_a_front_waiting() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Talkative;
    for op in requests() {
        let (result, took) = world.op(op.clone());
        assert!(result.is_ok(), "{op:?}: {result:?}");
        assert!(took == Duration::ZERO, "{op:?} took {took:?}");
    }
}

#[test]
fn a_device_that_was_never_seen_is_waited_for_once() {
    let mut world = World::new(Host::net());
    let (result, took) = world.op(Op::Describe);
    assert_eq!(result, Err(OpError::TimedOut));
    assert!(took >= Duration::from_secs(2) && took <= Duration::from_secs(5));
    let (result, took) = world.op(Op::Describe);
    assert_eq!(result, Err(OpError::TimedOut));
    assert!(took < Duration::from_millis(500), "{took:?}");
    world.connect();
    world.op(Op::Describe).0.unwrap();
    assert_eq!(world.session.device().unwrap().number, DevNum(3));
}
