// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The session against a scripted device host, with a virtual clock and without any I/O.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;

use common::{Host, MAX};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use virtio_msg::{
    ConfigEvent, DevNum, DeviceState, DeviceStatus, FeatureSet, Frame, Generation, Instant,
    Message, QueueIndex, Token,
};
use vmsg_bus::Capabilities;
use vmsg_bus::control::Resume;
use vmsg_proxy::session::{
    Event, FileId, Op, OpError, OpId, Options, Outcome, QueueSetup, ResetReason, ResumeAt, Session,
    Target, Window,
};

const LIVE: DeviceStatus = DeviceStatus::ACKNOWLEDGE
    .union(DeviceStatus::DRIVER)
    .union(DeviceStatus::FEATURES_OK)
    .union(DeviceStatus::DRIVER_OK);

/// What happens to the message with the number it stands with.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mishap {
    Never,
    Late,
    OtherAnswer,
    Garbage,
    LinkLost,
    LinkLostAfter,
}

struct World {
    now: Instant,
    session: Session,
    host: Host,
    epoch: u64,
    /// Messages sent so far.
    sent: usize,
    mishap: Option<(usize, Mishap)>,
    late: Vec<Vec<u8>>,
    events: Vec<Event>,
}

impl World {
    fn new(target: Target, host: Host) -> World {
        World {
            now: Instant(1_000_000_000),
            session: Session::new(target, Options::default()),
            host,
            epoch: 7,
            sent: 0,
            mishap: None,
            late: Vec::new(),
            events: Vec::new(),
        }
    }

    fn up(target: Target, host: Host) -> World {
        let mut world = World::new(target, host);
        world.connect();
        world
    }

    fn net() -> World {
        World::up(Target::Number(DevNum(3)), Host::net())
    }

    fn connect(&mut self) {
        self.session
            .handle_link_up(self.now, Capabilities::all(MAX), self.epoch);
        self.run();
    }

    fn disconnect(&mut self) {
        self.host.end_of_connection();
        self.session.handle_link_down(self.now);
        self.run();
    }

    /// Another device host in place of this one.
    fn replace(&mut self, host: Host) {
        self.disconnect();
        self.host = host;
        self.epoch += 1;
        self.connect();
    }

    fn fds(out: &vmsg_proxy::session::Outgoing) -> Vec<OwnedFd> {
        out.fds.iter().map(|fd| fd.try_clone().unwrap()).collect()
    }

    /// Until nothing moves without time.
    fn run(&mut self) {
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
                None => self.session.handle_message(self.now, &answer),
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
    fn tick(&mut self) -> bool {
        let Some(at) = self.session.poll_timeout() else {
            return false;
        };
        self.now = at.max(self.now);
        self.session.handle_timeout(self.now);
        self.run();
        true
    }

    fn submit(&mut self, op: Op) -> OpId {
        let id = self.session.submit(self.now, op);
        self.run();
        id
    }

    fn result(&self, id: OpId) -> Option<Result<Outcome, OpError>> {
        self.events.iter().find_map(|e| match e {
            Event::Done { id: done, result } if *done == id => Some(result.clone()),
            _ => None,
        })
    }

    fn op(&mut self, op: Op) -> Result<Outcome, OpError> {
        let id = self.submit(op);
        self.result(id).expect("done without waiting")
    }

    fn bring_up_ops() -> Vec<Op> {
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

    fn bring_up(&mut self) {
        for op in World::bring_up_ops() {
            self.op(op.clone())
                .unwrap_or_else(|e| panic!("{op:?}: {e}"));
        }
    }

    #[track_caller]
    fn assert_host_is_live(&self) {
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

fn eventfd() -> Arc<OwnedFd> {
    Arc::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap())
}

fn window(base: u64, len: u64, inode: u64) -> Window {
    Window {
        base,
        len,
        file_offset: 0,
        writable: true,
        fd: eventfd(),
        file: FileId { device: 1, inode },
    }
}

fn setup(at: u64) -> QueueSetup {
    QueueSetup {
        size: 128,
        descriptor: at,
        driver: at + 0x1000,
        device: at + 0x2000,
        resume: ResumeAt::Start,
    }
}

#[test]
fn a_device_is_found_by_its_number_and_described() {
    let mut world = World::net();
    let Ok(Outcome::Device(facts)) = world.op(Op::Describe) else {
        panic!()
    };
    assert_eq!(facts.number, DevNum(3));
    assert_eq!(facts.info.device_id, 1);
    assert_eq!(facts.queue_sizes, [256; 3]);
    assert_eq!(facts.offered, world.host.offered);
    assert!(!world.host.claimed, "looking is not claiming");
}

#[test]
fn a_device_is_found_by_its_name_among_others() {
    let mut world = World::up(Target::Name("net0".into()), Host::net());
    let Ok(Outcome::Device(facts)) = world.op(Op::Describe) else {
        panic!()
    };
    assert_eq!(facts.number, DevNum(3));
}

#[test]
fn a_device_that_is_missing_is_taken_when_it_appears() {
    for target in [Target::Name("net0".into()), Target::Number(DevNum(3))] {
        let mut host = Host::net();
        host.number = DevNum(9);
        host.name = "else".into();
        let mut world = World::up(target, host);
        assert!(world.events.contains(&Event::DeviceAbsent));
        let describe = world.submit(Op::Describe);
        assert_eq!(world.result(describe), None);
        world.host = Host::net();
        let event = Frame::bus(
            Token(0),
            Message::EventDevice {
                device: DevNum(3),
                state: DeviceState::Ready,
            },
        );
        let mut bytes = [0; 64];
        let len = event.encode(&mut bytes).unwrap();
        world.session.handle_message(world.now, &bytes[..len]);
        world.run();
        assert!(matches!(
            world.result(describe),
            Some(Ok(Outcome::Device(_)))
        ));
    }
}

#[test]
fn a_device_that_never_comes_ends_the_wait_with_a_name() {
    let mut world = World::up(Target::Number(DevNum(5)), Host::net());
    let describe = world.submit(Op::Describe);
    while world.result(describe).is_none() {
        assert!(world.tick());
    }
    assert_eq!(world.result(describe), Some(Err(OpError::NoDevice)));
}

#[test]
fn bringing_up_says_everything_in_order() {
    let mut world = World::net();
    world.bring_up();
    world.assert_host_is_live();
    assert_eq!(world.host.table_changes, 1, "both windows at once");
    assert_eq!(world.host.kicks, [0, 1]);
}

#[test]
fn a_new_host_gets_all_that_was_negotiated() {
    let mut world = World::net();
    world.bring_up();
    let next = world.host.restarted();
    world.replace(next);
    world.assert_host_is_live();
    assert_eq!(world.host.resume[&0], Resume::UsedInRing);
    assert_eq!(world.host.resume[&1], Resume::UsedInRing);
    assert_eq!(world.host.table_changes, 1);
    assert_eq!(world.host.kicks, [0, 1]);
    assert_eq!(world.session.counters().replays, 1);
    assert!(world.events.contains(&Event::Ready {
        replayed: true,
        new_host: true
    }));
    // Claim, windows, status, features, queues, and the kicks at the very end.
    let at = |needle: &str| {
        world
            .host
            .log
            .iter()
            .position(|line| line.contains(needle))
            .unwrap_or_else(|| panic!("{needle}: {:?}", world.host.log))
    };
    assert!(at("SET_DEVICE_STATUS") < at("SET_DRIVER_FEATURES"));
    assert!(at("SET_DRIVER_FEATURES") < at("SET_VQUEUE"));
    assert!(at("SET_VQUEUE") < at("EVENT_AVAIL"));
}

#[test]
fn an_explicit_position_is_told_once_and_after_that_the_ring_decides() {
    let mut world = World::net();
    let mut ops = World::bring_up_ops();
    let explicit = ResumeAt::Explicit {
        avail: 17,
        used: 15,
    };
    ops[7] = Op::SetQueue(
        QueueIndex(0),
        QueueSetup {
            resume: explicit,
            ..setup(0x1000)
        },
    );
    for op in ops {
        world.op(op).unwrap();
    }
    assert_eq!(
        world.host.resume[&0],
        Resume::At {
            avail_idx: 17,
            used_idx: 15
        }
    );
    assert!(!world.host.resume.contains_key(&1));
    let next = world.host.restarted();
    world.replace(next);
    assert_eq!(world.host.resume[&0], Resume::UsedInRing);
}

#[test]
fn operations_while_the_host_is_away_are_recorded_and_replayed() {
    let mut world = World::net();
    world.disconnect();
    world.bring_up();
    assert_eq!(
        world.op(Op::ReadConfig { offset: 0, len: 2 }),
        Ok(Outcome::Config(vec![0x52, 0x54]))
    );
    let foreign = FeatureSet::from_bits(&[5]);
    assert_eq!(
        world.op(Op::SetFeatures(foreign)),
        Err(OpError::NotOffered(foreign))
    );
    let write = world.submit(Op::WriteConfig {
        offset: 0,
        data: vec![9],
    });
    assert_eq!(world.result(write), None, "a write waits for the device");
    world.connect();
    world.assert_host_is_live();
    assert_eq!(world.result(write), Some(Ok(Outcome::Done)));
    assert_eq!(world.host.config[0], 9);
}

#[test]
fn nothing_waits_for_ever_and_not_everything_may_wait() {
    let mut world = World::new(Target::Number(DevNum(3)), Host::net());
    let ids: Vec<OpId> = (0..100).map(|_| world.submit(Op::Claim)).collect();
    let refused = ids
        .iter()
        .filter(|id| world.result(**id) == Some(Err(OpError::TooMany)))
        .count();
    assert_eq!(refused, 100 - Options::default().max_waiting);
    while world.tick() {}
    let expired = ids
        .iter()
        .filter(|id| world.result(**id) == Some(Err(OpError::TimedOut)))
        .count();
    assert_eq!(expired, Options::default().max_waiting);
}

#[test]
fn a_host_that_offers_less_needs_a_reset_with_the_reason() {
    type Change = fn(&mut Host);
    let cases: [(Change, ResetReason); 6] = [
        (
            |h| h.offered.remove(29),
            ResetReason::FeaturesMissing(FeatureSet::from_bits(&[29])),
        ),
        (
            |h| h.info.device_id = 2,
            ResetReason::DeviceIdChanged { was: 1, is: 2 },
        ),
        (
            |h| h.info.max_queues = 2,
            ResetReason::QueuesChanged { was: 3, is: 2 },
        ),
        (
            |h| {
                h.config.push(0);
                h.info.config_size += 1;
            },
            ResetReason::ConfigSizeChanged { was: 10, is: 11 },
        ),
        (
            |h| h.queue_sizes[1] = 64,
            ResetReason::QueueTooLarge {
                queue: 1,
                size: 128,
                max: 64,
            },
        ),
        (|h| h.refuse_features = true, ResetReason::FeaturesRefused),
    ];
    for (change, reason) in cases {
        let mut world = World::net();
        world.bring_up();
        let mut next = world.host.restarted();
        change(&mut next);
        world.replace(next);
        assert!(
            world.events.contains(&Event::NeedsReset(reason.clone())),
            "{reason}: {:?}",
            world.events
        );
        assert!(world.session.status().contains(DeviceStatus::NEEDS_RESET));
        assert!(!world.session.is_ready());
        assert!(
            !world.host.status.contains(DeviceStatus::DRIVER_OK),
            "{reason}"
        );
        assert_eq!(
            world.op(Op::SetStatus(LIVE)),
            Err(OpError::NeedsReset(reason.clone()))
        );
        // A reset makes good: on the next connection the device is taken as it is.
        assert_eq!(
            world.op(Op::SetStatus(DeviceStatus::RESET)),
            Ok(Outcome::Status(DeviceStatus::RESET))
        );
        assert!(
            world
                .events
                .iter()
                .any(|e| matches!(e, Event::LinkFault(_)))
        );
        world.host.refuse_features = false;
        world.disconnect();
        world.connect();
        assert!(world.session.is_ready(), "{reason}");
        assert!(
            matches!(world.op(Op::Describe), Ok(Outcome::Device(facts)) if facts.info == world.host.info)
        );
    }
}

#[test]
fn a_host_that_offers_more_is_as_good() {
    let mut world = World::net();
    world.bring_up();
    let mut next = world.host.restarted();
    next.offered.insert(40);
    next.config[6] = 0;
    world.replace(next);
    world.assert_host_is_live();
    assert!(
        world.events.contains(&Event::ConfigChanged),
        "the link status differs"
    );
}

#[test]
fn a_host_that_comes_back_with_the_same_epoch_is_known() {
    let mut world = World::net();
    world.bring_up();
    world.disconnect();
    world.events.clear();
    world.connect();
    world.assert_host_is_live();
    assert!(world.events.contains(&Event::Ready {
        replayed: true,
        new_host: false
    }));
}

#[test]
fn changes_of_the_memory_table_are_atomic_and_leave_the_rest_alone() {
    let mut world = World::net();
    world.bring_up();
    let before: Vec<u32> = world.host.windows.keys().copied().collect();
    let kept = window(0, 0x10_0000, 1);
    world
        .op(Op::SetWindows(vec![
            kept.clone(),
            window(0x1_0010_0000, 0x20_0000, 3),
            window(0x2_0000_0000, 0x1000, 4),
        ]))
        .unwrap();
    assert_eq!(world.host.table_changes, 2);
    assert_eq!(world.host.windows.len(), 3);
    assert!(
        world.host.windows.contains_key(&before[0]),
        "the window that stays was not touched"
    );
    assert!(!world.host.windows.contains_key(&before[1]));
    world.op(Op::SetWindows(vec![kept])).unwrap();
    assert_eq!(world.host.windows.len(), 1);
    let sent = world.sent;
    world
        .op(Op::SetWindows(vec![window(0, 0x10_0000, 1)]))
        .unwrap();
    assert_eq!(world.sent, sent, "nothing to say");
}

#[test]
fn windows_that_overlap_or_wrap_are_not_lent() {
    let mut world = World::net();
    for bad in [
        vec![window(0, 0x2000, 1), window(0x1000, 0x2000, 2)],
        vec![window(0, 0, 1)],
        vec![window(u64::MAX - 10, 0x1000, 1)],
        (0..1000).map(|i| window(i * 0x1000, 0x1000, i)).collect(),
    ] {
        let sent = world.sent;
        assert!(matches!(
            world.op(Op::SetWindows(bad)),
            Err(OpError::Invalid(_))
        ));
        assert_eq!(world.sent, sent);
    }
}

#[test]
fn refused_windows_make_the_session_start_over() {
    let mut world = World::net();
    world.bring_up();
    world.host.refuse_windows = true;
    let result = world.op(Op::SetWindows(vec![window(0x5000_0000, 0x1000, 9)]));
    assert_eq!(
        result,
        Err(OpError::Refused {
            what: "WINDOW_ADD",
            code: 6
        })
    );
    assert!(
        world
            .events
            .iter()
            .any(|e| matches!(e, Event::LinkFault(_)))
    );
    world.host.refuse_windows = false;
    world.disconnect();
    world.connect();
    world.assert_host_is_live();
}

#[test]
fn a_device_held_by_another_is_asked_for_until_it_is_free() {
    let mut world = World::net();
    world.host.held_by = Some("vmsg top");
    let claim = world.submit(Op::Claim);
    assert_eq!(world.result(claim), None);
    assert!(world.tick());
    world.host.held_by = None;
    assert!(world.tick());
    assert_eq!(world.result(claim), Some(Ok(Outcome::Done)));

    let mut world = World::net();
    world.host.held_by = Some("vmsg top");
    let claim = world.submit(Op::Claim);
    while world.result(claim).is_none() {
        assert!(world.tick());
    }
    assert_eq!(
        world.result(claim),
        Some(Err(OpError::Held("vmsg top".into())))
    );
}

#[test]
fn a_replay_waits_for_the_claim_and_gives_up_with_the_holder() {
    let mut world = World::net();
    world.bring_up();
    let mut next = world.host.restarted();
    next.held_by = Some("thief");
    world.replace(next);
    assert!(world.tick());
    world.host.held_by = None;
    assert!(world.tick());
    world.assert_host_is_live();

    let mut next = world.host.restarted();
    next.held_by = Some("thief");
    world.replace(next);
    while world.tick() {}
    assert!(
        world
            .events
            .contains(&Event::NeedsReset(ResetReason::Held("thief".into())))
    );
}

#[test]
fn configuration_longer_than_a_message_is_read_in_one_generation() {
    let config: Vec<u8> = (0..600).map(|i| i as u8).collect();
    let mut world = World::up(
        Target::Number(DevNum(2)),
        Host::new(2, "big", 2, 1, &config),
    );
    world.host.unstable_reads = 2;
    assert_eq!(
        world.op(Op::ReadConfig {
            offset: 10,
            len: 580
        }),
        Ok(Outcome::Config(config[10..590].to_vec()))
    );
    assert_eq!(
        world.op(Op::ReadConfig { offset: 10, len: 0 }),
        Ok(Outcome::Config(Vec::new()))
    );
    assert!(matches!(
        world.op(Op::ReadConfig {
            offset: 10,
            len: 591
        }),
        Err(OpError::Invalid(_))
    ));
    assert!(matches!(
        world.op(Op::ReadConfig {
            offset: u32::MAX,
            len: 2
        }),
        Err(OpError::Invalid(_))
    ));
    // One that never stops changing is read all the same.
    world.host.unstable_reads = u32::MAX;
    assert!(matches!(
        world.op(Op::ReadConfig {
            offset: 0,
            len: 600
        }),
        Ok(Outcome::Config(_))
    ));
}

#[test]
fn a_write_with_an_old_generation_is_repeated_with_the_new_one() {
    let mut world = World::net();
    world.host.generation += 5;
    assert_eq!(
        world.op(Op::WriteConfig {
            offset: 2,
            data: vec![0xaa, 0xbb]
        }),
        Ok(Outcome::Done)
    );
    assert_eq!(&world.host.config[2..4], [0xaa, 0xbb]);
}

#[test]
fn changes_of_configuration_and_status_are_passed_on() {
    let mut world = World::net();
    world.bring_up();
    let mut bytes = [0; 64];
    let event = |status, data: &'static [u8]| ConfigEvent {
        status,
        generation: Generation(9),
        offset: 6,
        len: data.len() as u32,
        data,
    };
    let len = Frame::new(
        DevNum(3),
        Token(0),
        Message::EventConfig(event(LIVE, &[0, 0])),
    )
    .encode(&mut bytes)
    .unwrap();
    let sent = world.sent;
    world.session.handle_message(world.now, &bytes[..len]);
    world.run();
    assert!(world.events.contains(&Event::ConfigChanged));
    assert_eq!(world.sent, sent, "the event carried the data");
    world.disconnect();
    assert_eq!(
        world.op(Op::ReadConfig { offset: 6, len: 2 }),
        Ok(Outcome::Config(vec![0, 0]))
    );
    world.connect();

    world.events.clear();
    world.host.config[7] = 0x77;
    let len = Frame::new(DevNum(3), Token(0), Message::EventConfig(event(LIVE, &[])))
        .encode(&mut bytes)
        .unwrap();
    world.session.handle_message(world.now, &bytes[..len]);
    world.run();
    assert!(
        world.events.contains(&Event::ConfigChanged),
        "it was read again"
    );
    world.disconnect();
    assert_eq!(
        world.op(Op::ReadConfig { offset: 7, len: 1 }),
        Ok(Outcome::Config(vec![0x77]))
    );
    world.connect();

    let sick = Frame::new(
        DevNum(3),
        Token(0),
        Message::EventConfig(event(LIVE | DeviceStatus::NEEDS_RESET, &[])),
    );
    let len = sick.encode(&mut bytes).unwrap();
    world.session.handle_message(world.now, &bytes[..len]);
    world.run();
    assert!(
        world
            .events
            .contains(&Event::NeedsReset(ResetReason::DeviceReported))
    );
}

#[test]
fn the_end_of_a_guest_leaves_nothing_behind() {
    let mut world = World::net();
    world.bring_up();
    world.op(Op::Release).unwrap();
    assert!(!world.host.claimed);
    assert!(world.host.windows.is_empty());
    assert_eq!(world.host.status, DeviceStatus::RESET);
    let next = world.host.restarted();
    world.replace(next);
    assert!(!world.host.claimed && world.host.windows.is_empty());
    world.bring_up();
    world.assert_host_is_live();
}

#[test]
fn a_queue_that_was_not_taken_is_noticed_although_the_answer_is_the_same() {
    let mut world = World::net();
    world.bring_up();
    world.host.refuse_queues = true;
    let refused = OpError::Refused {
        what: "SET_VQUEUE",
        code: 0,
    };
    assert_eq!(
        world.op(Op::SetQueue(QueueIndex(2), setup(0x2_0000))),
        Err(refused)
    );
    let mut next = world.host.restarted();
    next.refuse_queues = true;
    world.replace(next);
    let reason = ResetReason::ReplayRefused {
        what: "SET_VQUEUE",
        code: 0,
    };
    assert!(world.events.contains(&Event::NeedsReset(reason)));
}

#[test]
fn queues_stop_and_start_while_others_run() {
    let mut world = World::net();
    world.bring_up();
    world.op(Op::StopQueue(QueueIndex(0))).unwrap();
    assert_eq!(world.host.queues.keys().copied().collect::<Vec<_>>(), [1]);
    world.host.kicks.clear();
    world
        .op(Op::SetQueue(QueueIndex(0), setup(0x1_0000)))
        .unwrap();
    assert_eq!(world.host.kicks, [0], "started late, kicked at once");
    for bad in [
        QueueSetup {
            size: 512,
            ..setup(0)
        },
        QueueSetup {
            size: 0,
            ..setup(0)
        },
        QueueSetup {
            size: 100,
            ..setup(0)
        },
    ] {
        assert!(matches!(
            world.op(Op::SetQueue(QueueIndex(2), bad)),
            Err(OpError::Invalid(_))
        ));
    }
    assert!(matches!(
        world.op(Op::SetQueue(QueueIndex(3), setup(0))),
        Err(OpError::Invalid(_))
    ));
}

/// How many messages attaching and bringing up take.
fn whole_length() -> usize {
    let mut world = World::net();
    world.bring_up();
    world.sent
}

/// Whatever goes wrong at whichever message: nothing panics, every operation ends, and on a connection that works everything is
/// set up as it was accepted.
#[test]
fn a_mishap_at_every_step_ends_well() {
    let length = whole_length();
    let mut cases = 0;
    for mishap in [
        Mishap::Never,
        Mishap::Late,
        Mishap::OtherAnswer,
        Mishap::Garbage,
        Mishap::LinkLost,
        Mishap::LinkLostAfter,
    ] {
        for at in 1..=length {
            let mut world = World::new(Target::Number(DevNum(3)), Host::net());
            world.mishap = Some((at, mishap));
            world.connect();
            let mut failed = 0;
            for op in World::bring_up_ops() {
                // A front repeats what failed until it works.
                for attempt in 0.. {
                    assert!(attempt < 4, "{mishap:?} at {at}: {op:?} never works");
                    let id = world.submit(op.clone());
                    while world.result(id).is_none() {
                        let faulty = world
                            .events
                            .iter()
                            .any(|e| matches!(e, Event::LinkFault(_)));
                        if faulty
                            || !world.tick()
                            || !world.session.is_ready() && world.session.poll_timeout().is_none()
                        {
                            reconnect(&mut world);
                        }
                        if world.session.device().is_none()
                            && matches!(mishap, Mishap::LinkLost | Mishap::LinkLostAfter)
                        {
                            reconnect(&mut world);
                        }
                    }
                    if world.result(id).unwrap().is_ok() {
                        break;
                    }
                    failed += 1;
                }
            }
            if !world.session.is_ready() {
                reconnect(&mut world);
            }
            for late in std::mem::take(&mut world.late) {
                let before = world.session.counters().late;
                world.session.handle_message(world.now, &late);
                world.run();
                assert_eq!(world.session.counters().late, before + 1);
            }
            assert!(
                failed <= 1,
                "{mishap:?} at {at}: {failed} operations failed"
            );
            world.assert_host_is_live();
            cases += 1;
        }
    }
    assert_eq!(cases, 6 * length);
}

/// The same for a replay: the second host stumbles, the third takes over.
#[test]
fn a_mishap_at_every_step_of_a_replay_ends_well() {
    let mut world = World::net();
    world.bring_up();
    let first = world.sent;
    let next = world.host.restarted();
    world.replace(next);
    let length = world.sent - first;
    for mishap in [
        Mishap::Never,
        Mishap::Late,
        Mishap::OtherAnswer,
        Mishap::Garbage,
        Mishap::LinkLost,
        Mishap::LinkLostAfter,
    ] {
        for at in 1..=length {
            let mut world = World::net();
            world.bring_up();
            world.mishap = Some((world.sent + at, mishap));
            world.events.clear();
            let next = world.host.restarted();
            world.replace(next);
            while !world.session.is_ready()
                && !world
                    .events
                    .iter()
                    .any(|e| matches!(e, Event::LinkFault(_) | Event::NeedsReset(_)))
                && world.tick()
            {}
            if matches!(mishap, Mishap::Never | Mishap::Late | Mishap::Garbage)
                && !world.session.is_ready()
            {
                assert!(world.session.counters().timeouts == 1, "{mishap:?} at {at}");
            }
            if world
                .events
                .iter()
                .any(|e| matches!(e, Event::NeedsReset(_)))
            {
                // Only a host that lies about what it is gets that far.
                assert_eq!(mishap, Mishap::OtherAnswer);
                continue;
            }
            if !world.session.is_ready() {
                let next = world.host.restarted();
                world.replace(next);
            }
            world.assert_host_is_live();
        }
    }
}

fn reconnect(world: &mut World) {
    world.events.retain(|e| !matches!(e, Event::LinkFault(_)));
    world.disconnect();
    world.connect();
}

#[test]
fn a_flood_of_nonsense_is_counted_and_costs_no_memory() {
    let mut world = World::net();
    world.bring_up();
    let mut bytes = [0; 64];
    let used = Frame::new(
        DevNum(3),
        Token(0),
        Message::EventUsed {
            queue: QueueIndex(1),
        },
    );
    let len = used.encode(&mut bytes).unwrap();
    for i in 0..10_000u32 {
        world.session.handle_message(world.now, &i.to_le_bytes());
        world.session.handle_message(world.now, &bytes[..len]);
        let mut ping = [0; 64];
        let n = Frame::bus(Token(5), Message::Ping { data: i })
            .encode(&mut ping)
            .unwrap();
        world.session.handle_message(world.now, &ping[..n]);
    }
    let mut out = 0;
    while world.session.poll_transmit().is_some() {
        out += 1;
    }
    assert!(out <= 16, "{out} answers to pings");
    let mut events = 0;
    while world.session.poll_event().is_some() {
        events += 1;
    }
    assert_eq!(events, 1, "one for the used queue");
    assert!(world.session.counters().malformed >= 10_000);
    assert!(world.now + Duration::from_secs(1) > world.now);
}
