// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Stories for the r1 adapters.

use super::{Source, any_message};
use std::collections::VecDeque;
use virtio_msg::r1::{
    DeviceAdapter, DriverAdapter, DriverOptions, Frame, MESSAGE_SIZE, Message, Outcome, SIZE,
    decode,
};
use virtio_msg::{
    DevNum, DeviceStatus, Generation, Kind, Message as Rev1, QueueIndex, QueueSize, Token, U32,
    VqueueConfig, VqueueInfo,
};

const QUEUES: usize = 5;

/// Any r1 message.
fn any_r1(s: &mut Source<'_>) -> Message {
    let status = |s: &mut Source<'_>| DeviceStatus::from_bits_retain(s.u32());
    match s.u8() % 24 {
        0 => Message::GetDeviceInfo,
        1 => Message::DeviceInfo {
            version: s.u32(),
            device_id: s.u32(),
            vendor_id: s.u32(),
        },
        2 => Message::GetFeatures { index: s.u32() },
        3 => Message::Features {
            index: s.u32(),
            features: s.u64(),
        },
        4 => Message::SetFeatures {
            index: s.u32(),
            features: s.u64(),
        },
        5 => Message::FeaturesSet {
            index: s.u32(),
            features: s.u64(),
        },
        6 => Message::GetConfig {
            offset: s.u32() & 0xff_ffff,
            size: s.u8(),
        },
        7 => Message::Config {
            offset: s.u32() & 0xff_ffff,
            size: s.u8(),
            data: s.u64(),
        },
        8 => Message::SetConfig {
            offset: s.u32() & 0xff_ffff,
            size: s.u8(),
            data: s.u64(),
        },
        9 => Message::ConfigSet {
            offset: s.u32() & 0xff_ffff,
            size: s.u8(),
            data: s.u64(),
        },
        10 => Message::GetConfigGen,
        11 => Message::ConfigGen(Generation(s.u32())),
        12 => Message::GetDeviceStatus,
        13 => Message::DeviceStatus(status(s)),
        14 => Message::SetDeviceStatus(status(s)),
        15 => Message::GetVqueue(QueueIndex(s.u32())),
        16 => Message::Vqueue {
            index: QueueIndex(s.u32()),
            max_size: QueueSize(s.u32()),
        },
        17 => Message::SetVqueue(VqueueConfig {
            index: QueueIndex(s.u32()),
            size: QueueSize(s.u32()),
            descriptor: s.u64(),
            driver: s.u64(),
            device: s.u64(),
        }),
        18 => Message::ResetVqueue(QueueIndex(s.u32())),
        19 => Message::EventConfig {
            status: status(s),
            offset: s.u32() & 0xff_ffff,
            size: s.u8(),
            value: [s.u8(); 16],
        },
        20 => Message::EventAvail {
            queue: QueueIndex(s.u32()),
            next_offset: s.u64(),
            next_wrap: s.u64(),
        },
        21 => Message::EventUsed {
            queue: QueueIndex(s.u32()),
        },
        22 => Message::IommuEnable(s.u8() & 1 != 0),
        _ => Message::IommuTranslate {
            va: s.u64(),
            prot: s.u8(),
        },
    }
}

/// What a well-meaning device answers, with values of the story.
fn answer_of(s: &mut Source<'_>, request: Message) -> Option<Message> {
    Some(match request {
        Message::GetDeviceInfo => Message::DeviceInfo {
            version: 1,
            device_id: s.u32(),
            vendor_id: 0,
        },
        Message::GetFeatures { index } => Message::Features {
            index,
            features: s.u64(),
        },
        Message::SetFeatures { index, features } => Message::FeaturesSet { index, features },
        Message::GetConfig { offset, size } => {
            let data = s.u64();
            Message::Config { offset, size, data }
        }
        Message::SetConfig { offset, size, data } => Message::ConfigSet { offset, size, data },
        Message::GetConfigGen => Message::ConfigGen(Generation(s.u32())),
        Message::GetDeviceStatus => Message::DeviceStatus(DeviceStatus::from_bits_retain(s.u32())),
        Message::GetVqueue(index) => Message::Vqueue {
            index,
            max_size: QueueSize(s.u32()),
        },
        _ => return None,
    })
}

/// A driver adapter between a driver that asks anything and a device that says anything.
struct DriverStory {
    adapter: DriverAdapter<QUEUES>,
    /// Tokens of the requests that may still be answered.
    asked: Vec<Token>,
    token: u16,
    /// Requests that were sent and not answered, as far as the device knows.
    owed: VecDeque<Message>,
    status: DeviceStatus,
}

/// Whatever device and driver say: what goes out is what a driver may say, no response comes twice, and once the device answers again, so does the
/// adapter.
pub(crate) fn r1_driver(bytes: &[u8]) {
    let s = &mut Source::new(bytes);
    let options = DriverOptions {
        dev_num: DevNum(u16::from(s.u8() % 2)),
        config_size: None,
        ask_translate: s.u8() % 4 == 0,
    };
    let mut story = DriverStory {
        adapter: DriverAdapter::new(options),
        asked: Vec::new(),
        token: 0,
        owed: VecDeque::new(),
        status: DeviceStatus::RESET,
    };
    while !s.is_empty() {
        match s.u8() % 8 {
            0 | 1 => story.request(s),
            2 => story.say(s),
            3 => {
                let raw = s.data();
                let _ = story.adapter.handle_wire(raw);
                let taken = story.adapter.handle_request(raw) == Ok(Outcome::Taken);
                match virtio_msg::decode(raw, MESSAGE_SIZE) {
                    Ok(frame) if taken && frame.message.kind() == Kind::Request => {
                        story.asked.push(frame.token);
                    }
                    _ => {}
                }
            }
            4 | 5 => story.answer(s),
            6 => story.fetch_wire(1),
            _ => {
                story.fetch_messages();
                if s.u8() % 16 == 0 {
                    story.adapter.answer_translate(s.u64(), s.u8());
                }
            }
        }
    }
    // Nobody asks any more, the device answers everything: all comes to an end.
    for _ in 0..2000 {
        story.fetch_wire(usize::MAX);
        story.fetch_messages();
        if !story.adapter.is_busy() {
            return;
        }
        if story.owed.is_empty() {
            // The device was told nonsense by the story: further requests get the adapter going.
            story.ping();
        }
        story.answer(s);
    }
    panic!("stuck: {:?}", story.adapter);
}

impl DriverStory {
    fn send(&mut self, dev_num: DevNum, message: Rev1<'_>) {
        self.token = self.token.wrapping_add(1).max(1);
        let token = Token(self.token);
        let mut out = [0; 300];
        let frame = virtio_msg::Frame {
            dev_num,
            token,
            message,
        };
        let Ok(size) = frame.encode(&mut out) else {
            return;
        };
        if self.adapter.handle_request(&out[..size]) == Ok(Outcome::Taken)
            && message.kind() == Kind::Request
        {
            self.asked.push(token);
        }
    }

    fn request(&mut self, s: &mut Source<'_>) {
        let mut words = [U32::new(0); 12];
        let dev_num = DevNum(u16::from(s.u8() % 4 == 0));
        let message = any_message(s, &mut words);
        self.send(dev_num, message);
    }

    fn ping(&mut self) {
        self.send(DevNum(0), Rev1::Ping { data: 1 });
    }

    fn say(&mut self, s: &mut Source<'_>) {
        let frame = Frame::new(DevNum(u16::from(s.u8() % 3)), any_r1(s));
        let bytes = frame.to_bytes();
        assert_eq!(decode(&bytes), Ok(frame));
        let _ = self.adapter.handle_wire(&bytes);
    }

    fn answer(&mut self, s: &mut Source<'_>) {
        if let Some(answer) = self.owed.pop_front().and_then(|m| answer_of(s, m)) {
            self.adapter
                .handle_wire(&Frame::new(DevNum(0), answer).to_bytes())
                .expect("responses have room");
        }
    }

    fn fetch_wire(&mut self, most: usize) {
        let mut wire = [0; SIZE];
        for n in 0..most {
            let Some(size) = self.adapter.poll_wire(&mut wire) else {
                return;
            };
            assert!(size == SIZE && n < 50, "the adapter has too much to say");
            let message = decode(&wire).expect("an r1 message").message;
            match message {
                Message::GetConfig { offset, size } | Message::SetConfig { offset, size, .. } => {
                    assert!([1, 2, 4].contains(&size) && offset % u32::from(size) == 0);
                    assert!(offset + u32::from(size) <= 1 << 24);
                }
                Message::SetDeviceStatus(status) => self.status = status,
                Message::GetVqueue(queue) | Message::ResetVqueue(queue) => {
                    assert!(queue.to_usize() < QUEUES);
                }
                Message::SetVqueue(config) => {
                    assert!(config.index.to_usize() < QUEUES && config.size.to_u16().is_some());
                }
                Message::EventAvail { queue, .. } => {
                    assert!(queue.to_usize() < QUEUES);
                    assert!(self.status.contains(DeviceStatus::DRIVER_OK));
                }
                Message::IommuTranslated { .. } => {}
                _ => assert_eq!(message.kind(), Kind::Request),
            }
            if message.kind() == Kind::Request {
                self.owed.push_back(message);
            }
        }
    }

    fn fetch_messages(&mut self) {
        let mut out = [0; MESSAGE_SIZE];
        let mut count = 0;
        while let Some(size) = self.adapter.poll_message(&mut out) {
            count += 1;
            assert!(count < 100, "the adapter has too much to say");
            let frame = virtio_msg::decode(&out[..size], MESSAGE_SIZE).expect("a message");
            if frame.message.kind() == Kind::Response {
                let at = self.asked.iter().position(|t| *t == frame.token);
                self.asked.swap_remove(at.expect("one response each"));
            } else {
                assert!(matches!(
                    frame.message,
                    Rev1::EventUsed { .. } | Rev1::EventConfig(_)
                ));
            }
        }
    }
}

/// Whatever an r1 driver says: it is answered in the order of its requests, each of them once at most, and never what has no response.
pub(crate) fn r1_device(bytes: &[u8]) {
    let s = &mut Source::new(bytes);
    let mut adapter = DeviceAdapter::<4>::new();
    let mut asked: VecDeque<Frame> = VecDeque::new();
    let mut open: Option<Vec<u8>> = None;
    while !s.is_empty() {
        match s.u8() % 8 {
            0..=2 => {
                let frame = Frame::new(DevNum(u16::from(s.u8() % 3)), any_r1(s));
                if adapter.handle_wire(&frame.to_bytes()) == Ok(Outcome::Taken)
                    && frame.message.kind() == Kind::Request
                {
                    asked.push_back(frame);
                }
            }
            3 => {
                let raw = s.data();
                let _ = adapter.handle_message(raw);
                if decode(raw).is_err() {
                    assert!(matches!(adapter.handle_wire(raw), Ok(Outcome::Ignored(_))));
                }
            }
            4 | 5 => {
                let mut out = [0; MESSAGE_SIZE];
                if let Some(size) = adapter.poll_message(&mut out) {
                    let frame = virtio_msg::decode(&out[..size], MESSAGE_SIZE).expect("a message");
                    match frame.message.kind() {
                        Kind::Request => {
                            assert!(open.is_none(), "two requests at once");
                            open = Some(out[..size].to_vec());
                        }
                        _ => assert!(matches!(frame.message, Rev1::EventAvail { .. })),
                    }
                }
                if let Some(request) = open.take() {
                    reply(s, &mut adapter, &request);
                }
            }
            6 => {
                let mut words = [U32::new(0); 12];
                let message = any_message(s, &mut words);
                let mut out = [0; 300];
                let frame = virtio_msg::Frame {
                    dev_num: DevNum(u16::from(s.u8() % 3)),
                    token: Token(0),
                    message,
                };
                if let Ok(size) = frame.encode(&mut out) {
                    let _ = adapter.handle_message(&out[..size]);
                }
            }
            _ => {
                let mut wire = [0; SIZE];
                while adapter.poll_wire(&mut wire).is_some() {
                    let frame = decode(&wire).expect("an r1 message");
                    if frame.message.kind() != Kind::Response {
                        assert!(matches!(
                            frame.message,
                            Message::EventUsed { .. } | Message::EventConfig { .. }
                        ));
                        continue;
                    }
                    // Requests of devices that are not there are skipped.
                    loop {
                        let request = asked.pop_front().expect("a response to each request");
                        if request.dev_num == frame.dev_num
                            && request.message.id() == frame.message.id()
                        {
                            break;
                        }
                    }
                }
            }
        }
    }
}

/// What a device answers. Number 2 is absent, and some responses are the wrong ones.
fn reply(s: &mut Source<'_>, adapter: &mut DeviceAdapter<4>, request: &[u8]) {
    let frame = virtio_msg::decode(request, MESSAGE_SIZE).expect("a request");
    let mut words = [U32::new(0); 12];
    let answer = match frame.message {
        Rev1::GetDeviceInfo => Rev1::DeviceInfo(virtio_msg::DeviceInfo {
            device_id: u32::from(frame.dev_num != DevNum(2)),
            ..Default::default()
        }),
        Rev1::GetDeviceStatus => Rev1::DeviceStatus(DeviceStatus::RESET),
        Rev1::SetDeviceStatus(status) => Rev1::DeviceStatusSet(status),
        Rev1::SetVqueue(_) => Rev1::VqueueSet,
        Rev1::ResetVqueue(_) => Rev1::VqueueReset,
        Rev1::GetVqueue(index) => Rev1::Vqueue(VqueueInfo {
            index,
            ..Default::default()
        }),
        Rev1::SetDriverFeatures(_) => Rev1::DriverFeaturesSet,
        _ => any_message(s, &mut words),
    };
    let mut out = [0; 300];
    if let Ok(size) = frame.response(answer).encode(&mut out) {
        let _ = adapter.handle_message(&out[..size]);
    }
}
