// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Turns any bytes into a story for the machines, and checks after each step what always has to hold. Property tests and fuzz targets share it.

use std::collections::{HashSet, VecDeque};
use virtio_msg::device::{
    Action, ActionResult, Busy, DeviceMachine, Handled, Identity, Options, QueueSlot,
};
use virtio_msg::driver::{
    Bringup, BringupStep, ConfigReader, ConfigStep, ConfigWriter, Enumeration, EnumerationStep,
    Received, Requester,
};
use virtio_msg::{
    ConfigData, ConfigEvent, DevNum, DeviceBitmap, DeviceInfo, DeviceState, DeviceStatus, Duration,
    FeatureBlocks, FeatureSet, Frame, Generation, Instant, Kind, Message, QueueIndex, QueueSize,
    ShmInfo, Token, U32, VqueueConfig, VqueueInfo, decode, feature,
};

/// Bytes, until there are no more; then zeros.
pub(crate) struct Source<'a> {
    bytes: &'a [u8],
}

impl<'a> Source<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Source<'a> {
        Source { bytes }
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn take(&mut self, n: usize) -> &'a [u8] {
        let (head, rest) = self.bytes.split_at(n.min(self.bytes.len()));
        self.bytes = rest;
        head
    }

    fn u8(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    /// Mostly small numbers, sometimes any.
    fn u32(&mut self) -> u32 {
        match self.u8() {
            0xff => u32::from_le_bytes([self.u8(), self.u8(), self.u8(), self.u8()]),
            0xfe => u32::MAX - u32::from(self.u8()),
            0xfd => 1 << (self.u8() % 32),
            n => u32::from(n % 72),
        }
    }

    fn u64(&mut self) -> u64 {
        match self.u8() {
            0xff => u64::MAX - u64::from(self.u8()),
            n => u64::from(n) << 12 | u64::from(self.u8() & 0x30),
        }
    }

    fn data(&mut self) -> &'a [u8] {
        let n = self.u8();
        self.take(usize::from(n % 80))
    }
}

/// Any message that revision 1 can say. `words` is where blocks of features live.
pub(crate) fn any_message<'s: 'w, 'w>(s: &mut Source<'s>, words: &'w mut [U32; 12]) -> Message<'w> {
    let kind = s.u8() % 32;
    let config = |s: &mut Source<'s>| {
        let (generation, offset, data) = (Generation(s.u32()), s.u32(), s.data());
        ConfigData {
            generation,
            offset,
            len: len_of(data),
            data,
        }
    };
    match kind {
        0 => Message::GetDeviceInfo,
        1 => Message::DeviceInfo(DeviceInfo {
            device_id: s.u32(),
            vendor_id: s.u32(),
            feature_bits: s.u32(),
            config_size: s.u32(),
            max_queues: s.u32(),
            admin_first: s.u16(),
            admin_count: s.u16(),
        }),
        2 => Message::GetDeviceFeatures {
            first: s.u32(),
            count: s.u32(),
        },
        3 | 4 => {
            for w in words.iter_mut() {
                *w = s.u32().into();
            }
            let n = s.u8() % 13;
            let first = s.u32();
            let blocks = FeatureBlocks {
                first,
                count: n.into(),
                words: &words[..n.into()],
            };
            if kind == 3 {
                Message::DeviceFeatures(blocks)
            } else {
                Message::SetDriverFeatures(blocks)
            }
        }
        5 => Message::DriverFeaturesSet,
        6 => Message::GetConfig {
            offset: s.u32(),
            len: s.u32(),
        },
        7 => Message::Config(config(s)),
        8 => Message::SetConfig(config(s)),
        9 => {
            let data = config(s);
            let mirrored = data.len == 0 || s.u8() & 1 != 0;
            Message::ConfigSet(if mirrored {
                data
            } else {
                ConfigData { data: &[], ..data }
            })
        }
        10 => Message::GetDeviceStatus,
        11 => Message::DeviceStatus(DeviceStatus::from_bits_retain(s.u32())),
        12 => Message::SetDeviceStatus(DeviceStatus::from_bits_retain(s.u32())),
        13 => Message::DeviceStatusSet(DeviceStatus::from_bits_retain(s.u32())),
        14 => Message::GetVqueue(QueueIndex(s.u32())),
        15 => Message::Vqueue(VqueueInfo {
            index: QueueIndex(s.u32()),
            max_size: QueueSize(s.u32()),
            size: QueueSize(s.u32()),
            descriptor: s.u64(),
            driver: s.u64(),
            device: s.u64(),
        }),
        16 => Message::SetVqueue(VqueueConfig {
            index: QueueIndex(s.u32()),
            size: QueueSize(s.u32()),
            descriptor: s.u64(),
            driver: s.u64(),
            device: s.u64(),
        }),
        17 => Message::VqueueSet,
        18 => Message::ResetVqueue(QueueIndex(s.u32())),
        19 => Message::VqueueReset,
        20 => Message::GetShm { index: s.u32() },
        21 => Message::Shm(ShmInfo {
            index: s.u32(),
            len: s.u32(),
            address: s.u32(),
        }),
        22 => {
            let (status, data) = (DeviceStatus::from_bits_retain(s.u32()), config(s));
            let ConfigData {
                generation,
                offset,
                len,
                data,
            } = data;
            let data = if s.u8() & 1 != 0 { data } else { &[] };
            Message::EventConfig(ConfigEvent {
                status,
                generation,
                offset,
                len,
                data,
            })
        }
        23 => Message::EventAvail {
            queue: QueueIndex(s.u32()),
            next: s.u32(),
        },
        24 => Message::EventUsed {
            queue: QueueIndex(s.u32()),
        },
        25 => Message::GetDevices {
            offset: s.u16(),
            count: s.u16(),
        },
        26 => {
            let bitmap = s.data();
            let count = u16::try_from(bitmap.len() * 8).expect("short");
            Message::Devices(DeviceBitmap {
                offset: s.u16(),
                count,
                next: s.u16(),
                bitmap,
            })
        }
        27 => Message::Ping { data: s.u32() },
        28 => Message::Pong { data: s.u32() },
        29 => Message::EventDevice {
            device: DevNum(s.u16()),
            state: DeviceState::from(s.u16()),
        },
        _ => {
            let id = 0x80 | s.u8();
            let response = id & 0x40 == 0 && s.u8() & 1 != 0;
            Message::BusSpecific {
                id,
                response,
                payload: s.data(),
            }
        }
    }
}

fn len_of(data: &[u8]) -> u32 {
    u32::try_from(data.len()).expect("short")
}

/// Any frame goes over the wire and comes back the same, and decoding any bytes is total.
pub(crate) fn codec(bytes: &[u8]) {
    for max in [48, 65536] {
        if let Ok(frame) = decode(bytes, max) {
            let mut again = vec![0; 65535];
            let size = frame.encode(&mut again).expect("it came out of a message");
            assert_eq!(decode(&again[..size], max), Ok(frame));
            assert!(!frame.to_string().is_empty());
            assert_eq!(frame.message.is_bus(), bytes[0] & 2 != 0);
        }
    }
    let mut words = [U32::new(0); 12];
    let mut source = Source::new(bytes);
    let (dev_num, token) = (DevNum(source.u16()), Token(source.u16()));
    let frame = Frame {
        dev_num,
        token,
        message: any_message(&mut source, &mut words),
    };
    let mut out = [0xee; 300];
    let size = frame.encode(&mut out).expect("all of these are short");
    assert_eq!(decode(&out, 300), Ok(frame), "{frame}");
    assert_eq!(out[size..], [0xee; 300][size..]);
    assert!(frame.encode(&mut out[..size - 1]).is_err());
    let header = virtio_msg::Header::split(&out[..size], size)
        .expect("own message")
        .0;
    assert_eq!(header.is_event(), frame.message.kind() == Kind::Event);
    assert_eq!(header.is_response(), frame.message.kind() == Kind::Response);
    assert_eq!(header.msg_id, frame.message.id());
}

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
        let mut out = vec![0xee; self.max.min(65535)];
        let Some(size) = self.machine.poll_transmit(&mut out) else {
            return false;
        };
        let frame = decode(&out[..size], self.max).expect("what is sent can be read");
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
        true
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

/// The driver side against a device that answers anything, or nothing.
pub(crate) fn driver(bytes: &[u8]) {
    requests(&mut Source::new(bytes));
    sequences(&mut Source::new(bytes));
}

fn requests(s: &mut Source<'_>) {
    let mut requester = Requester::<3>::new();
    let mut outstanding: Vec<(virtio_msg::driver::RequestId, Token, DevNum, (bool, u8))> =
        Vec::new();
    let mut now = Instant(0);
    while !s.is_empty() {
        match s.u8() % 8 {
            0..=2 => {
                let mut words = [U32::new(0); 12];
                let message = any_message(s, &mut words);
                let mut out = [0; 300];
                let dev = DevNum(u16::from(s.u8() % 2));
                let timeout = Duration::from_nanos(s.u8().into());
                if let Ok((id, size)) = requester.start(now, dev, &message, timeout, &mut out) {
                    let frame = decode(&out[..size], 300).expect("own message");
                    assert!(frame.message.kind() == Kind::Request && frame.token != Token(0));
                    assert!(outstanding.iter().all(|o| o.1 != frame.token && o.0 != id));
                    outstanding.push((
                        id,
                        frame.token,
                        frame.dev_num,
                        (message.is_bus(), message.id()),
                    ));
                } else {
                    assert!(outstanding.len() == 3 || message.kind() != Kind::Request);
                }
            }
            3..=5 => {
                let mut words = [U32::new(0); 12];
                let message = any_message(s, &mut words);
                let (dev_num, mut token) = (DevNum(u16::from(s.u8() % 2)), Token(s.u8().into()));
                if let Some(o) = outstanding.get(usize::from(s.u8() % 4)) {
                    token = o.1;
                }
                let frame = Frame {
                    dev_num,
                    token,
                    message,
                };
                match requester.handle_frame(&frame) {
                    Received::Response(id, answer) => {
                        let at = outstanding
                            .iter()
                            .position(|o| o.0 == id)
                            .expect("outstanding");
                        let (_, sent, to, msg_id) = outstanding.remove(at);
                        assert_eq!(msg_id, (answer.is_bus(), answer.id()));
                        assert!(
                            sent == token
                                || matches!(answer, Message::Devices(_)) && token == Token(0)
                        );
                        assert!(to == dev_num || answer.is_bus());
                    }
                    Received::Event(_) => assert_eq!(message.kind(), Kind::Event),
                    Received::Request(_) => assert_eq!(message.kind(), Kind::Request),
                    Received::Dropped(_) => {
                        let name = (message.is_bus(), message.id());
                        let known = |o: &(_, Token, DevNum, _)| {
                            o.1 == token && o.3 == name && (o.2 == dev_num || name.0)
                        };
                        let response = message.kind() == Kind::Response;
                        assert!(!response || !outstanding.iter().any(known));
                    }
                }
            }
            6 => now = now.saturating_add(Duration::from_nanos(s.u8().into())),
            _ => {
                while let Some(id) = requester.handle_timeout(now) {
                    let at = outstanding
                        .iter()
                        .position(|o| o.0 == id)
                        .expect("outstanding");
                    outstanding.remove(at);
                }
                assert!(requester.poll_timeout().is_none_or(|t| t > now));
            }
        }
        assert_eq!(requester.outstanding(), outstanding.len());
    }
    while let Some(deadline) = requester.poll_timeout() {
        assert!(requester.handle_timeout(deadline).is_some());
    }
    assert_eq!(requester.outstanding(), 0);
}

/// Each sequence ends by itself once nothing is answered any more, and takes whatever comes before.
fn sequences(s: &mut Source<'_>) {
    let mut bringup = Bringup::new();
    let mut steps = 0;
    while !matches!(bringup.step(), BringupStep::Ready | BringupStep::Failed(_)) {
        steps += 1;
        assert!(steps < 10_000);
        match bringup.step() {
            BringupStep::ChooseFeatures(_) => {
                bringup.choose_features(FeatureSet::from_u64(u64::MAX))
            }
            BringupStep::Queues(None) if s.u8() & 1 != 0 => bringup.get_queue(QueueIndex(0)),
            BringupStep::Queues(Some(info)) => bringup.set_queue(VqueueConfig {
                index: info.index,
                ..Default::default()
            }),
            BringupStep::Queues(None) => bringup.finish(),
            _ if s.is_empty() => bringup.handle_timeout(),
            _ => bringup.handle_response(&any_message(s, &mut [U32::new(0); 12])),
        }
    }

    let mut enumeration = Enumeration::new(48);
    let mut steps = 0;
    let mut found = HashSet::new();
    while enumeration.step() != EnumerationStep::Done {
        steps += 1;
        assert!(steps < 10_000);
        if s.is_empty() {
            enumeration.handle_timeout();
        } else {
            let mut words = [U32::new(0); 12];
            enumeration.handle_response(&any_message(s, &mut words), |d| {
                assert!(found.insert(d), "{d} twice")
            });
        }
    }

    let mut buf = [0; 100];
    let mut reader = ConfigReader::new(s.u32(), &mut buf, 48);
    while let ConfigStep::Send(_) | ConfigStep::Wait = reader.step() {
        reader.handle_response(&any_message(s, &mut [U32::new(0); 12]));
    }
    let mut writer = ConfigWriter::new(s.u32(), &[1; 100], Generation(0), 48);
    while let ConfigStep::Send(_) | ConfigStep::Wait = writer.step() {
        writer.handle_response(&any_message(s, &mut [U32::new(0); 12]));
    }
}
