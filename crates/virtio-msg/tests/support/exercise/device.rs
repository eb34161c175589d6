// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Stories for the device machine.

use super::{Source, any_message, len_of};
use std::collections::{HashSet, VecDeque};
use virtio_msg::device::{
    Action, ActionResult, Busy, DeviceMachine, Handled, Identity, Options, QueueSlot,
};
use virtio_msg::{
    DevNum, DeviceStatus, FeatureSet, Frame, Instant, Kind, Message, QueueIndex, QueueSize, Token,
    U32, VqueueConfig, decode, feature,
};

const QUEUES: usize = 5;
const DEV: DevNum = DevNum(9);

struct DeviceStory {
    machine: DeviceMachine<Vec<QueueSlot>, Vec<u8>>,
    max: usize,
    /// Requests accepted and not answered: token and id.
    owed: VecDeque<(Token, u8)>,
    /// The message the machine was too busy for.
    kept: Option<Vec<u8>>,
    acting: Option<Action>,
    next_token: u16,
    last_generation: u32,
    event_generations: HashSet<u32>,
    status_before: DeviceStatus,
    /// FEATURES_OK, DRIVER_OK and NEEDS_RESET have no other cause than these.
    granted: DeviceStatus,
    out: Vec<u8>,
}

impl DeviceStory {
    fn offer(&mut self, bytes: &[u8]) {
        let Ok(frame) = decode(bytes, self.max) else {
            return;
        };
        let request = frame.message.kind() == Kind::Request
            && !frame.message.is_bus()
            && frame.dev_num == DEV;
        if request && self.kept.is_some() {
            return;
        }
        match self.machine.handle_message(Instant(1), &frame) {
            Ok(Handled::Request) => {
                assert!(request, "{frame}");
                assert!(self.owed.is_empty(), "one at a time");
                self.owed.push_back((frame.token, frame.message.id()));
            }
            Ok(Handled::Event) => assert!(matches!(frame.message, Message::EventAvail { .. })),
            Ok(Handled::Ignored(_)) => {}
            Err(Busy) => {
                assert!(request, "events are never kept waiting: {frame}");
                assert!(!self.owed.is_empty(), "busy with nothing");
                self.kept = Some(bytes.to_vec());
            }
        }
    }

    fn action(&mut self) -> bool {
        let Some(action) = self.machine.poll_action() else {
            return false;
        };
        match action {
            Action::Avail { queue, next } => {
                assert!(self.machine.queue(queue).is_some());
                let status = self.machine.status();
                assert!(
                    status.contains(DeviceStatus::DRIVER_OK)
                        && !status.contains(DeviceStatus::NEEDS_RESET)
                );
                assert!(!matches!(self.acting, Some(Action::Reset)));
                assert!(next == 0 || self.machine.features().bit(feature::NOTIFICATION_DATA));
            }
            action => {
                assert!(action.wants_completion());
                assert_eq!(self.acting, None, "one at a time");
                match action {
                    Action::FeaturesOk(features) => {
                        assert!(features.is_subset(&self.machine.offered()))
                    }
                    Action::SetQueue(index, config) => {
                        assert_eq!(index, config.index);
                        assert!(
                            index.to_usize() < QUEUES && config.size.0 != 0 && config.size.0 <= 64
                        );
                        assert_eq!(config.descriptor % 16, 0);
                        assert_eq!(self.machine.queue(index), None);
                    }
                    Action::ResetQueue(index) => assert!(self.machine.queue(index).is_some()),
                    Action::WriteConfig { offset, len } => {
                        assert!(offset + len <= 40);
                        assert_eq!(len_of(self.machine.pending_config()), len);
                    }
                    _ => {}
                }
                self.acting = Some(action);
            }
        }
        true
    }

    fn complete(&mut self, done: bool) {
        let acting = self.acting.take();
        if done {
            match acting {
                Some(Action::FeaturesOk(_)) => self.granted |= DeviceStatus::FEATURES_OK,
                Some(Action::DriverOk) => self.granted |= DeviceStatus::DRIVER_OK,
                _ => {}
            }
        } else if acting == Some(Action::DriverOk) {
            self.granted |= DeviceStatus::NEEDS_RESET;
        }
        if acting == Some(Action::Reset) {
            self.granted = DeviceStatus::RESET;
            self.status_before = DeviceStatus::RESET;
        }
        self.machine.complete(if done {
            ActionResult::Done
        } else {
            ActionResult::Refused
        });
        if acting == Some(Action::Reset) {
            assert_eq!(self.machine.status(), DeviceStatus::RESET);
            assert!((0..8).all(|i| self.machine.queue(QueueIndex(i)).is_none()));
        }
    }

    fn transmit(&mut self) -> bool {
        let mut out = std::mem::take(&mut self.out);
        let size = self.machine.poll_transmit(&mut out);
        let sent = size.is_some();
        if let Some(size) = size {
            self.sent(&out[..size]);
        }
        self.out = out;
        sent
    }

    fn sent(&mut self, bytes: &[u8]) {
        let size = bytes.len();
        let frame = decode(bytes, self.max).expect("what is sent can be read");
        assert_eq!(frame.dev_num, DEV);
        let generation = match frame.message {
            Message::Config(data) | Message::ConfigSet(data) => {
                assert_eq!(len_of(data.data), data.len);
                Some(data.generation.0)
            }
            Message::EventConfig(event) => {
                assert_eq!(size, 24 + event.data.len());
                assert_eq!(len_of(event.data), event.len);
                assert!(event.len == 0 || self.event_generations.insert(event.generation.0));
                assert_eq!(event.status, self.machine.status());
                Some(event.generation.0)
            }
            _ => None,
        };
        if let Some(generation) = generation {
            assert!(generation >= self.last_generation, "a generation went back");
            self.last_generation = generation;
        }
        match frame.message.kind() {
            Kind::Response => {
                assert_eq!(
                    self.owed.pop_front(),
                    Some((frame.token, frame.message.id()))
                );
                assert_eq!(self.acting, None, "answered before it was done");
                if let Some(kept) = self.kept.take() {
                    self.offer(&kept);
                }
            }
            Kind::Event => {
                assert_eq!(frame.token, Token(0));
                assert!(self.machine.status().contains(DeviceStatus::DRIVER_OK));
                if let Message::EventUsed { queue } = frame.message {
                    assert!(self.machine.queue(queue).is_some());
                    assert_eq!(size, 12);
                }
            }
            Kind::Request => panic!("a device asks nothing: {frame}"),
        }
    }

    fn check(&mut self) {
        let status = self.machine.status();
        assert!(
            status.contains(self.status_before),
            "bits went away without a reset: {} {status}",
            self.status_before
        );
        self.status_before = status;
        let guarded =
            DeviceStatus::FEATURES_OK | DeviceStatus::DRIVER_OK | DeviceStatus::NEEDS_RESET;
        assert!(
            self.granted.contains(status & guarded),
            "{status} was not granted"
        );
        assert!(DeviceStatus::NAMED.contains(status) && !status.contains(DeviceStatus::SUSPEND));
        assert!(
            !status.contains(DeviceStatus::DRIVER_OK) || status.contains(DeviceStatus::FEATURES_OK)
        );
        assert!(self.machine.features().is_subset(&self.machine.offered()));
        for i in 0..8 {
            if let Some(queue) = self.machine.queue(QueueIndex(i)) {
                assert!(i < 5 && status.contains(DeviceStatus::FEATURES_OK));
                assert!(
                    queue
                        .size
                        .is_valid(self.machine.features().bit(feature::RING_PACKED))
                );
            }
        }
        assert_eq!(self.machine.is_busy(), !self.owed.is_empty());
    }
}

/// A device machine under any messages, completions, changes and polls, in any order.
pub(crate) fn device(bytes: &[u8]) {
    let mut s = Source::new(bytes);
    let max = [48, 50, 64, 264, 65536][usize::from(s.u8() % 5)];
    let mut offered = FeatureSet::from_u64(u64::from(s.u16()) | 1 << 32);
    offered.set(feature::RING_PACKED, s.u8() & 1 != 0);
    offered.set(feature::NOTIFICATION_DATA, s.u8() & 1 != 0);
    let options = Options {
        notification_data: s.u8() & 1 != 0,
        ..Options::new(max)
    };
    let identity = Identity {
        device_id: 1,
        vendor_id: 2,
        ..Identity::default()
    };
    let machine = DeviceMachine::new(
        DEV,
        identity,
        offered,
        vec![QueueSlot::new(64); QUEUES],
        vec![0; 40],
        options,
    );
    let mut story = DeviceStory {
        machine,
        max,
        owed: VecDeque::new(),
        kept: None,
        acting: None,
        next_token: 0,
        last_generation: 0,
        event_generations: HashSet::new(),
        status_before: DeviceStatus::RESET,
        granted: DeviceStatus::RESET,
        out: vec![0; max.min(65535)],
    };
    // Half of the stories begin with a device at work.
    if s.u8() & 1 != 0 {
        start_up(&mut story);
    }
    while !s.is_empty() {
        step(&mut story, &mut s);
        story.check();
    }
    settle(&mut story);
    assert!(story.owed.is_empty() && story.kept.is_none() && !story.machine.is_busy());
    let counters = story.machine.counters();
    assert_eq!(counters.requests, counters.responses);
}

fn step(story: &mut DeviceStory, s: &mut Source<'_>) {
    match s.u8() % 16 {
        0..=5 => {
            let mut words = [U32::new(0); 12];
            let message = any_message(s, &mut words);
            say(story, message);
        }
        6 => {
            // The way up, in any order.
            let status = DeviceStatus::from_bits_retain(
                [0, 1, 3, 11, 15, 4, 128, 139][usize::from(s.u8() % 8)],
            );
            say(story, Message::SetDeviceStatus(status));
        }
        7 => {
            let areas = u64::from(s.u8()) << 4;
            let index = QueueIndex(u32::from(s.u8() % 6));
            let config = VqueueConfig {
                index,
                size: QueueSize(16),
                descriptor: areas,
                driver: areas,
                device: areas,
            };
            say(story, Message::SetVqueue(config));
        }
        8 => {
            let bytes = s.data();
            story.offer(bytes);
        }
        9 => {
            story.action();
        }
        10 => story.complete(s.u8() % 8 != 0),
        11 => {
            story.transmit();
        }
        12 => story.machine.notify_used(QueueIndex(s.u32())),
        13 => {
            story.machine.update_config(s.u32(), s.data());
        }
        14 if s.u8() % 8 == 0 => {
            story.granted |= DeviceStatus::NEEDS_RESET;
            story.machine.set_needs_reset();
        }
        _ => settle(story),
    }
}

fn say(story: &mut DeviceStory, message: Message<'_>) {
    story.next_token = story.next_token.wrapping_add(1);
    let mut out = [0; 300];
    let size = Frame::new(DEV, Token(story.next_token), message)
        .encode(&mut out)
        .expect("all of these are short");
    story.offer(&out[..size]);
}

fn settle(story: &mut DeviceStory) {
    loop {
        let mut moved = story.action();
        if story.acting.is_some() {
            story.complete(true);
            moved = true;
        }
        moved |= story.transmit();
        story.check();
        if !moved {
            return;
        }
    }
}

fn start_up(story: &mut DeviceStory) {
    for status in [0, 1, 3, 11] {
        say(
            story,
            Message::SetDeviceStatus(DeviceStatus::from_bits_retain(status)),
        );
        settle(story);
    }
    for index in 0..3 {
        let areas = 0x1000 * u64::from(index);
        let index = QueueIndex(index);
        let config = VqueueConfig {
            index,
            size: QueueSize(16),
            descriptor: areas,
            driver: areas,
            device: areas,
        };
        say(story, Message::SetVqueue(config));
        settle(story);
        assert_eq!(story.machine.queue(index), Some(config));
    }
    say(
        story,
        Message::SetDeviceStatus(DeviceStatus::from_bits_retain(15)),
    );
    settle(story);
    assert!(story.machine.status().contains(DeviceStatus::DRIVER_OK));
}
