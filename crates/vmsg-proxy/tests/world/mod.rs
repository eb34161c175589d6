// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A session and a scripted device host on a virtual clock.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::cast_possible_truncation,
    reason = "each test program uses another part"
)]

use crate::common::{Host, MAX};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use virtio_msg::{DevNum, DeviceStatus, FeatureSet, Instant, QueueIndex};
use vmsg_bus::Capabilities;
use vmsg_proxy::session::{
    Event, FileId, Op, OpError, OpId, Options, Outcome, QueueSetup, ResumeAt, Session, Target,
    Window,
};

pub const LIVE: DeviceStatus = DeviceStatus::ACKNOWLEDGE
    .union(DeviceStatus::DRIVER)
    .union(DeviceStatus::FEATURES_OK)
    .union(DeviceStatus::DRIVER_OK);

/// What happens to the message with the number it stands with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mishap {
    Never,
    Late,
    OtherAnswer,
    Garbage,
    LinkLost,
    LinkLostAfter,
}

pub struct World {
    pub now: Instant,
    pub session: Session,
    pub host: Host,
    pub epoch: u64,
    /// Messages sent so far.
    pub sent: usize,
    pub mishap: Option<(usize, Mishap)>,
    pub late: Vec<Vec<u8>>,
    pub events: Vec<Event>,
    /// What the bus can do.
    pub caps: Capabilities,
}

impl World {
    pub fn new(target: Target, host: Host) -> World {
        World {
            now: Instant(1_000_000_000),
            session: Session::new(target, Options::default()),
            host,
            epoch: 7,
            sent: 0,
            mishap: None,
            late: Vec::new(),
            events: Vec::new(),
            caps: Capabilities::all(MAX),
        }
    }

    pub fn up(target: Target, host: Host) -> World {
        let mut world = World::new(target, host);
        world.connect();
        world
    }

    pub fn net() -> World {
        World::up(Target::Number(DevNum(3)), Host::net())
    }

    pub fn connect(&mut self) {
        self.session.handle_link_up(self.now, self.caps, self.epoch);
        self.run();
    }

    pub fn disconnect(&mut self) {
        self.host.end_of_connection();
        self.session.handle_link_down(self.now);
        self.run();
    }

    /// The process with which the connection was ends.
    pub fn host_ended(&mut self) {
        self.session.handle_host_ended(self.now);
        self.run();
    }

    /// Another device host in place of this one.
    pub fn replace(&mut self, host: Host) {
        self.disconnect();
        self.host = host;
        self.epoch += 1;
        self.connect();
    }

    pub fn fds(out: &vmsg_proxy::session::Outgoing) -> Vec<OwnedFd> {
        out.fds.iter().map(|fd| fd.try_clone().unwrap()).collect()
    }

    /// Until nothing moves without time.
    pub fn run(&mut self) {
        loop {
            while let Some(event) = self.session.poll_event() {
                self.events.push(event);
            }
            let Some(out) = self.session.poll_transmit() else {
                return;
            };
            self.sent += 1;
            let mishap = self
                .mishap
                .filter(|(at, _)| *at == self.sent)
                .map(|(_, mishap)| mishap);
            if mishap == Some(Mishap::LinkLost) {
                self.disconnect();
                continue;
            }
            let Some(mut answer) = self.host.handle(&out.bytes, World::fds(&out)) else {
                continue;
            };
            match mishap {
                None => {
                    let fds = self.host.region_fds(&answer);
                    self.session.handle_message_with_fds(self.now, &answer, fds);
                }
                Some(Mishap::Never) => {}
                Some(Mishap::Late) => self.late.push(answer),
                Some(Mishap::OtherAnswer) => {
                    // Right token, right id, but about something else.
                    let len = answer.len();
                    if len > 8 {
                        answer[8] ^= 0x40;
                        self.session.handle_message(self.now, &answer);
                    } else {
                        answer[1] = 0x07;
                        self.session.handle_message(self.now, &answer);
                    }
                }
                Some(Mishap::Garbage) => self.session.handle_message(self.now, &[0xff; 20]),
                Some(Mishap::LinkLost) => unreachable!(),
                Some(Mishap::LinkLostAfter) => self.disconnect(),
            }
        }
    }

    /// Lets time pass to the next deadline. False: there is none.
    pub fn tick(&mut self) -> bool {
        let Some(at) = self.session.poll_timeout() else {
            return false;
        };
        self.now = at.max(self.now);
        self.session.handle_timeout(self.now);
        self.run();
        true
    }

    pub fn submit(&mut self, op: Op) -> OpId {
        let id = self.session.submit(self.now, op);
        self.run();
        id
    }

    pub fn result(&self, id: OpId) -> Option<Result<Outcome, OpError>> {
        self.events.iter().find_map(|e| match e {
            Event::Done { id: done, result } if *done == id => Some(result.clone()),
            _ => None,
        })
    }

    pub fn op(&mut self, op: Op) -> Result<Outcome, OpError> {
        let id = self.submit(op);
        self.result(id).expect("done without waiting")
    }

    pub fn bring_up_ops() -> Vec<Op> {
        let features = FeatureSet::from_bits(&[29, 32]);
        vec![
            Op::Claim,
            Op::SetWindows(vec![
                window(0, 0x10_0000, 1),
                window(0x1_0000_0000, 0x20_0000, 2),
            ]),
            Op::SetStatus(DeviceStatus::RESET),
            Op::SetStatus(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER),
            Op::SetFeatures(features),
            Op::SetStatus(LIVE & !DeviceStatus::DRIVER_OK),
            Op::SetNotify {
                queue: QueueIndex(0),
                kick: Some(eventfd()),
                call: Some(eventfd()),
            },
            Op::SetQueue(QueueIndex(0), setup(0x1000)),
            Op::SetQueue(QueueIndex(1), setup(0x8000)),
            Op::SetStatus(LIVE),
        ]
    }

    pub fn bring_up(&mut self) {
        for op in World::bring_up_ops() {
            self.op(op.clone())
                .unwrap_or_else(|e| panic!("{op:?}: {e}"));
        }
    }

    #[track_caller]
    pub fn assert_host_is_live(&self) {
        assert!(self.session.is_ready());
        assert!(self.host.claimed);
        assert_eq!(self.host.status, LIVE);
        assert_eq!(self.host.features, FeatureSet::from_bits(&[29, 32]));
        assert_eq!(self.host.queues.keys().copied().collect::<Vec<_>>(), [0, 1]);
        assert_eq!(self.host.queues[&1].descriptor, 0x8000);
        assert_eq!(self.host.windows.len(), 2);
        assert_eq!(self.host.window_files.len(), 2);
        assert_eq!(self.host.notify[&0].1.len(), 2);
        assert!(self.host.kicks.contains(&0) && self.host.kicks.contains(&1));
    }
}

pub fn eventfd() -> Arc<OwnedFd> {
    Arc::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap())
}

pub fn window(base: u64, len: u64, inode: u64) -> Window {
    Window {
        base,
        len,
        file_offset: 0,
        writable: true,
        fd: eventfd(),
        file: FileId { device: 1, inode },
    }
}

pub fn setup(at: u64) -> QueueSetup {
    QueueSetup {
        size: 128,
        descriptor: at,
        driver: at + 0x1000,
        device: at + 0x2000,
        resume: ResumeAt::Start,
    }
}
