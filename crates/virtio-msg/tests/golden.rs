// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Recordings of other implementations: decoded, encoded again, and replayed against the device machine.

#[path = "support/recording.rs"]
mod recording;

use recording::{Direction, Line, recordings};
use std::collections::BTreeMap;
use virtio_msg::device::{
    Action, ActionResult, DeviceMachine, Handled, Identity, Options, QueueSlot, answer_absent,
};
use virtio_msg::{
    DecodeError, DevNum, DeviceInfo, FeatureSet, Frame, Instant, Kind, Message, QueueIndex, Token,
    VqueueInfo, bus, decode,
};

/// What `/dev/virtio-msg-N` wants after an EVENT_AVAIL: the one recorded message that revision 1 does not have.
fn answers_an_event(line: &Line) -> bool {
    line.bytes[..2] == [0x01, 0x41]
}

#[test]
fn every_recorded_message_decodes_and_encodes_to_the_same_bytes() {
    let mut count = 0;
    for recording in recordings() {
        for line in &recording.lines {
            let name = format!("{} line {}", recording.name, line.number);
            if answers_an_event(line) {
                assert!(recording.name.starts_with("linux/"), "{name}");
                assert_eq!(
                    decode(&line.bytes, 274),
                    Err(DecodeError::Unknown {
                        msg_type: 1,
                        msg_id: 0x41
                    })
                );
                continue;
            }
            let frame = decode(&line.bytes, 274).unwrap_or_else(|e| panic!("{name}: {e}"));
            let mut again = [0xee; 274];
            let size = frame.encode(&mut again).expect("fits");
            assert_eq!(again[..size], line.bytes, "{name}: {frame}");
            assert_eq!(
                frame.message.kind() == Kind::Response,
                line.bytes[0] & 1 != 0,
                "{name}"
            );
            count += 1;
        }
    }
    assert!(
        count > 1100,
        "{count} messages: some recordings are missing"
    );
}

#[test]
fn a_recorded_message_decodes_the_same_from_a_longer_slot_and_not_from_a_shorter_one() {
    for line in recordings()
        .iter()
        .flat_map(|r| &r.lines)
        .filter(|l| !answers_an_event(l))
    {
        let mut slot = [0xff; 300];
        slot[..line.bytes.len()].copy_from_slice(&line.bytes);
        assert_eq!(decode(&slot, 274), decode(&line.bytes, 274));
        for cut in 0..line.bytes.len() {
            assert!(matches!(
                decode(&line.bytes[..cut], 274),
                Err(DecodeError::TooShort { .. })
            ));
        }
    }
}

type Machine = DeviceMachine<Vec<QueueSlot>, Vec<u8>>;

/// A device as the recorded one showed itself.
#[derive(Default)]
struct Shown {
    info: Option<DeviceInfo>,
    offered: FeatureSet,
    queues: BTreeMap<u32, u16>,
    config: BTreeMap<u32, u8>,
}

impl Shown {
    fn learn(&mut self, message: &Message<'_>) {
        match *message {
            Message::DeviceInfo(info) => self.info = Some(info),
            Message::DeviceFeatures(blocks) => assert!(!blocks.store(&mut self.offered)),
            Message::Vqueue(VqueueInfo {
                index, max_size, ..
            }) => {
                self.queues
                    .insert(index.0, u16::try_from(max_size.0).expect("a queue size"));
            }
            Message::Config(data) => self
                .config
                .extend((data.offset..).zip(data.data.iter().copied())),
            _ => {}
        }
    }

    fn machine(&self, dev: DevNum, options: Options) -> Option<Machine> {
        let info = self.info?;
        let queues = (0..info.max_queues)
            // A test program did not ask how large the queues can be.
            .map(|i| QueueSlot::new(self.queues.get(&i).copied().unwrap_or(256)))
            .collect();
        let config = (0..info.config_size)
            .map(|i| self.config.get(&i).copied().unwrap_or(0))
            .collect();
        let identity = Identity {
            device_id: info.device_id,
            vendor_id: info.vendor_id,
            ..Identity::default()
        };
        Some(DeviceMachine::new(
            dev,
            identity,
            self.offered,
            queues,
            config,
            options,
        ))
    }
}

/// The recorded response as revision 1 has it: see the table in `golden/README.md`.
fn straightened(recorded: Frame<'_>, qemu: bool, set_up: bool) -> Frame<'_> {
    if !qemu {
        return recorded;
    }
    let message = match recorded.message {
        Message::Devices(map) => Message::Devices(virtio_msg::DeviceBitmap { next: 0, ..map }),
        Message::Vqueue(info) if !set_up => Message::Vqueue(VqueueInfo {
            size: Default::default(),
            ..info
        }),
        other => other,
    };
    Frame {
        message,
        ..recorded
    }
}

#[test]
fn the_device_machine_answers_recorded_drivers_as_the_recorded_devices_did() {
    let mut compared = 0;
    for pair in recording::conversations() {
        let mut shown = BTreeMap::<DevNum, Shown>::new();
        for line in pair
            .lines
            .iter()
            .filter(|l| l.direction == Direction::FromDevice && !answers_an_event(l))
        {
            let frame = decode(&line.bytes, 274).expect("decoded before");
            if !frame.message.is_bus() {
                shown
                    .entry(frame.dev_num)
                    .or_default()
                    .learn(&frame.message);
            }
        }
        // QEMU's virtio-mmio proxy sets up 1024 entries where 256 and 64 were the most.
        let tolerated_queue_size = if pair.name == "qemu/v2-net-mmio" {
            1024
        } else {
            0
        };
        let options = Options {
            tolerated_queue_size,
            ..Options::new(274)
        };
        let mut machines: BTreeMap<_, _> = shown
            .iter()
            .filter_map(|(&dev, shown)| Some((dev, shown.machine(dev, options)?)))
            .collect();
        // Responses are matched by order: the 2025 tree of Linux has one token for all.
        let mut answers = std::collections::VecDeque::new();
        for line in &pair.lines {
            let name = format!("{} line {}", pair.name, line.number);
            if answers_an_event(line) {
                continue;
            }
            let frame = decode(&line.bytes, 274).expect("decoded before");
            match (line.direction, frame.message.kind()) {
                (Direction::ToDevice, Kind::Request) => {
                    answers.push_back(answer(&mut machines, &frame, &name))
                }
                (Direction::ToDevice, Kind::Event) => {
                    let machine = machines.get_mut(&frame.dev_num).expect("a device");
                    assert_eq!(
                        machine.handle_message(Instant(1), &frame),
                        Ok(Handled::Event),
                        "{name}"
                    );
                    assert!(
                        matches!(machine.poll_action(), Some(Action::Avail { .. })),
                        "{name}"
                    );
                }
                (Direction::ToDevice, Kind::Response) => {
                    assert!(matches!(frame.message, Message::Pong { .. }))
                }
                (Direction::FromDevice, Kind::Response) => {
                    let (ours, set_up) = answers.pop_front().expect("a request");
                    let ours = decode(&ours, 274).expect("own message");
                    let theirs = straightened(frame, pair.name.starts_with("qemu/"), set_up);
                    // QEMU's other token.
                    let theirs = if matches!(theirs.message, Message::Devices(_)) {
                        Frame {
                            token: ours.token,
                            ..theirs
                        }
                    } else {
                        theirs
                    };
                    assert_eq!(ours, theirs, "{name}");
                    compared += 1;
                }
                (Direction::FromDevice, _) => {
                    let Message::EventUsed { queue } = frame.message else {
                        panic!("{name}: {frame}")
                    };
                    let machine = machines.get_mut(&frame.dev_num).expect("a device");
                    machine.notify_used(queue);
                    let mut out = [0; 274];
                    let size = machine.poll_transmit(&mut out).expect("an event");
                    assert_eq!(out[..size], line.bytes, "{name}");
                }
            }
        }
        assert!(
            answers.is_empty(),
            "{}: responses that were not recorded",
            pair.name
        );
        for machine in machines.values() {
            assert_eq!(machine.counters().ignored, 0, "{}", pair.name);
            assert_eq!(machine.counters().bad_queue_setups, 0, "{}", pair.name);
            assert_eq!(machine.counters().refused_status, 0, "{}", pair.name);
        }
    }
    assert!(
        compared > 450,
        "{compared} responses compared: some recordings are missing"
    );
}

/// Our response, and whether the request was about a queue that is set up.
fn answer(
    machines: &mut BTreeMap<DevNum, Machine>,
    frame: &Frame<'_>,
    name: &str,
) -> (Vec<u8>, bool) {
    let mut out = [0; 274];
    if frame.message.is_bus() {
        let highest = machines.keys().next_back().copied();
        // QEMU has 32 numbers and tells of no more, whatever it is asked.
        let frame = match frame.message {
            Message::GetDevices { offset, count } => Frame {
                message: Message::GetDevices {
                    offset,
                    count: count.min(32),
                },
                ..*frame
            },
            _ => *frame,
        };
        let size = bus::answer(
            &frame,
            highest,
            |dev| machines.contains_key(&dev),
            274,
            &mut out,
        );
        return (out[..size.expect("answered")].to_vec(), false);
    }
    let Some(machine) = machines.get_mut(&frame.dev_num) else {
        let size = answer_absent(frame, &mut out).expect("only asked what it is");
        return (out[..size].to_vec(), false);
    };
    let set_up = matches!(frame.message, Message::GetVqueue(q) if machine.queue(q).is_some());
    assert_eq!(
        machine.handle_message(Instant(1), frame),
        Ok(Handled::Request),
        "{name}"
    );
    while let Some(action) = machine.poll_action() {
        if action.wants_completion() {
            machine.complete(ActionResult::Done);
        }
    }
    let size = machine
        .poll_transmit(&mut out)
        .unwrap_or_else(|| panic!("{name}: no answer to {frame}"));
    (out[..size].to_vec(), set_up)
}

#[test]
fn trace_lines_read_like_this() {
    let lines: Vec<String> = recordings()
        .into_iter()
        .filter(|r| r.name == "linux/g2iv-net-dev.txt")
        .flat_map(|r| r.lines)
        .map(|l| decode(&l.bytes, 274).expect("decoded before").to_string())
        .collect();
    for line in [
        "bus #2 GET_DEVICES: devices 0+32",
        "bus #2 GET_DEVICES response: devices 0+32, next 0, present 0",
        "dev 0 #3 GET_DEVICE_INFO",
        "dev 0 #3 GET_DEVICE_INFO response: device id 1, vendor 0x4d534756, 64 feature bits, 12 config bytes, 2 queues",
        "dev 0 #10 GET_DEVICE_FEATURES response: blocks 0+2: 0x00010020 0x00000003",
        "dev 0 #11 SET_DRIVER_FEATURES: blocks 0+2: 0x00010020 0x00000003",
        "dev 0 #11 SET_DRIVER_FEATURES response",
        "dev 0 #13 SET_DEVICE_STATUS: 0x0b",
        "dev 0 #13 SET_DEVICE_STATUS response: 0x0b",
        "dev 0 #21 GET_VQUEUE: queue 0",
        "dev 0 #21 GET_VQUEUE response: queue 0, size 0 of 64",
        "dev 0 #22 SET_VQUEUE: queue 0, size 64, descriptor 0x2b9e000, driver 0x2b9e400, device 0x2b9f000",
        "bus #30 PING: data 0x12345678",
        "dev 0 EVENT_AVAIL: queue 0",
        "dev 0 #35 GET_CONFIG: offset 6, length 2",
        "dev 0 #35 GET_CONFIG response: generation 0, offset 6, length 2: 0100",
        "dev 0 EVENT_USED: queue 1",
    ] {
        assert!(lines.iter().any(|l| l == line), "no line {line:?}");
    }
    let event = Frame::new(
        DevNum(7),
        Token(0),
        Message::EventAvail {
            queue: QueueIndex(2),
            next: 0x8000_0005,
        },
    );
    assert_eq!(
        event.to_string(),
        "dev 7 EVENT_AVAIL: queue 2, next 5, wrap 1"
    );
}
