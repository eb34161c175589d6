// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A session and a device host of changing moods, on a virtual clock.
#![allow(dead_code, unreachable_pub)]

use crate::common::{Host, MAX};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use virtio_msg::{ConfigEvent, DeviceStatus, Frame, Generation, Instant, Message, Token};
use vmsg_bus::Capabilities;
use vmsg_bus::control::id::CLAIM;
use vmsg_proxy::session::{
    Event, FileId, Op, OpError, OpId, Options, Outcome, QueueSetup, ResumeAt, Session, Target,
    Window,
};

pub const LIVE: DeviceStatus = DeviceStatus::ACKNOWLEDGE
    .union(DeviceStatus::DRIVER)
    .union(DeviceStatus::FEATURES_OK)
    .union(DeviceStatus::DRIVER_OK);

/// How the host treats requests from now on.
#[derive(Clone, Copy, PartialEq)]
pub enum Mood {
    Prompt,
    /// Answers each request after so long.
    Slow(Duration),
    /// Is stopped, or has lost its mind.
    Silent,
    /// Prompt, but what is to let go of queues is not answered, as long as they have requests under way.
    Busy,
    /// Prompt, but a CLAIM is not answered as long as requests of another connection are under way.
    HoldsClaims,
    /// Prompt, but says before each answer that the configuration has changed.
    Talkative,
}

pub struct World {
    pub now: Instant,
    pub session: Session,
    pub host: Host,
    pub mood: Mood,
    /// Answers that wait until the device is not busy any more.
    pub due: Vec<Vec<u8>>,
    pub events: Vec<Event>,
}

impl World {
    pub fn new(host: Host) -> World {
        World {
            now: Instant(1_000_000_000),
            session: Session::new(Target::Number(host.number), Options::default()),
            host,
            mood: Mood::Prompt,
            due: Vec::new(),
            events: Vec::new(),
        }
    }

    pub fn connect(&mut self) {
        self.host.end_of_connection();
        let caps = Capabilities::all(MAX);
        self.session.handle_link_up(self.now, caps, 7);
    }

    /// One message, one deadline. False: nothing moves any more.
    pub fn step(&mut self) -> bool {
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
        let claims = matches!(frame.message, Message::BusSpecific { id, .. } if id == CLAIM);
        let waits = match self.mood {
            Mood::Busy => lets_go,
            Mood::HoldsClaims => claims,
            _ => false,
        };
        if waits {
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
    pub fn op(&mut self, op: Op) -> (Result<Outcome, OpError>, Duration) {
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

    pub fn result(&mut self, id: OpId) -> Option<Result<Outcome, OpError>> {
        while let Some(event) = self.session.poll_event() {
            self.events.push(event);
        }
        self.events.iter().find_map(|e| match e {
            Event::Done { id: done, result } if *done == id => Some(result.clone()),
            _ => None,
        })
    }

    /// A guest that runs.
    pub fn live(host: Host) -> World {
        let mut world = World::new(host);
        world.connect();
        for op in bring_up() {
            world.op(op).0.unwrap();
        }
        assert_eq!(world.host.status, LIVE);
        world
    }
}

pub fn window(base: u64) -> Window {
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

pub fn set_queue() -> Op {
    let setup = QueueSetup {
        size: 64,
        descriptor: 0x1000,
        driver: 0x2000,
        device: 0x3000,
        resume: ResumeAt::Start,
    };
    Op::SetQueue(virtio_msg::QueueIndex(0), setup)
}

pub fn bring_up() -> Vec<Op> {
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

impl World {
    /// The requests under way have ended.
    pub fn rest(&mut self) {
        self.mood = Mood::Prompt;
        for answer in std::mem::take(&mut self.due) {
            self.session.handle_message(self.now, &answer);
        }
    }

    pub fn is_given_up(&self) -> bool {
        let fault = |event: &Event| matches!(event, Event::LinkFault(_));
        self.events.iter().any(fault)
    }
}
