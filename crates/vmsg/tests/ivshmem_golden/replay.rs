// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A recorded conversation, held once more.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use virtio_msg::{DevNum, Frame, Kind, Message, QueueIndex, Token, decode};

use super::compare::compare;
use super::device::{self, NET};
use super::place::{Devices, Place};
use super::recording::{Direction, Line, Recording};
use super::wire::{Layout, Wire};

const PATIENCE: Duration = Duration::from_secs(20);

/// What `/dev/virtio-msg-N` wants after an EVENT_AVAIL.
fn answers_an_event(line: &Line) -> bool {
    line.bytes[..2] == [0x01, 0x41]
}

fn frame(line: &Line) -> Frame<'_> {
    decode(&line.bytes, 274).expect("a recorded message")
}

/// What the device side has said and nobody has asked for yet.
struct Heard {
    wire: Wire,
    responses: VecDeque<Vec<u8>>,
    events: Vec<Vec<u8>>,
}

impl Heard {
    /// Takes one message off the queue.
    fn hear(&mut self, timeout: Duration) -> bool {
        let Some(slot) = self.wire.recv(timeout) else {
            return false;
        };
        let size = usize::from(u16::from_le_bytes([slot[6], slot[7]]));
        let message = slot.get(..size).expect("a message in a slot").to_vec();
        if message[0] & 1 == 1 {
            self.responses.push_back(message);
        } else {
            self.events.push(message);
        }
        true
    }

    fn response(&mut self, name: &str) -> Vec<u8> {
        loop {
            if let Some(response) = self.responses.pop_front() {
                return response;
            }
            assert!(self.hear(PATIENCE), "{name}: no answer");
        }
    }

    /// The event that has the same bytes.
    fn event(&mut self, name: &str, wanted: &[u8]) {
        loop {
            if let Some(at) = self.events.iter().position(|event| event == wanted) {
                self.events.remove(at);
                return;
            }
            assert!(
                self.hear(PATIENCE),
                "{name}: no event {wanted:02x?}; there are {:02x?}",
                self.events
            );
        }
    }
}

/// How many buffers of a queue were told of as used before the driver kicked that queue, or `until`, again.
fn told(rest: &[Line], dev: DevNum, queue: QueueIndex, until: QueueIndex) -> usize {
    rest.iter()
        .filter(|line| !answers_an_event(line))
        .map(frame)
        .take_while(|frame| {
            let kick = matches!(frame.message, Message::EventAvail { queue, .. } if queue == until);
            !(kick && frame.dev_num == dev)
        })
        .filter(|frame| {
            frame.dev_num == dev
                && matches!(frame.message, Message::EventUsed { queue: used } if used == queue)
        })
        .count()
}

/// Holds the conversation; how many answers and events were compared.
pub(crate) fn replay(recording: &Recording, layout: Layout, devices: Devices) -> usize {
    let shown = device::shown(recording);
    // That of QEMU's test program begins where an arm64 machine's does.
    let base = if recording.name.starts_with("qemu/") {
        0x4000_0000
    } else {
        0
    };
    let mut place = Place::new(layout, devices, &shown, base);
    let mut heard = Heard {
        wire: place.wire(),
        responses: VecDeque::new(),
        events: Vec::new(),
    };
    let mut compared = 0;
    for (at, line) in recording.lines.iter().enumerate() {
        let name = format!("{} line {}", recording.name, line.number);
        if answers_an_event(line) {
            continue;
        }
        let frame = frame(line);
        let dev = frame.dev_num;
        match (line.direction, frame.message.kind()) {
            (Direction::ToDevice, _) => {
                place.guest.about_to_send(dev, &frame.message);
                if let Message::EventAvail { queue: index, .. } = frame.message {
                    let is_net = shown
                        .get(&dev)
                        .and_then(|shown| shown.info)
                        .is_some_and(|info| info.device_id == NET);
                    let rest = &recording.lines[at + 1..];
                    kick(&mut place, dev, index, is_net, rest);
                    let before = place.guest.used(dev, index);
                    heard.wire.send(&line.bytes);
                    if !(is_net && index.0 == 0) {
                        settle(&place, &heard.wire, dev, index, before, &name);
                    }
                } else {
                    heard.wire.send(&line.bytes);
                }
            }
            (Direction::FromDevice, Kind::Event) => {
                // What comes back from a network is up to the network.
                let of_the_network = matches!(frame.message, Message::EventUsed { queue } if queue.0 == 0)
                    && devices == Devices::Ours
                    && shown[&dev].info.is_some_and(|info| info.device_id == NET);
                if !of_the_network {
                    heard.event(&name, &line.bytes);
                    compared += 1;
                }
            }
            (Direction::FromDevice, _) => {
                let response = heard.response(&name);
                compare(&name, devices, &line.bytes, &response);
                compared += 1;
            }
        }
    }
    // Nothing else was said: this is answered last.
    let mut ping = [0; 12];
    let last = Frame {
        dev_num: DevNum(0),
        token: Token(0x7a57),
        message: Message::Ping { data: 0x1a57 },
    };
    let size = last.encode(&mut ping).expect("12 bytes");
    heard.wire.send(&ping[..size]);
    let answer = heard.response(&recording.name);
    assert_eq!(
        answer[4..6],
        0x7a57_u16.to_le_bytes(),
        "{}: an answer that nobody recorded: {answer:02x?}",
        recording.name
    );
    assert!(
        heard.events.is_empty(),
        "{}: {:02x?}",
        recording.name,
        heard.events
    );
    heard.wire.shut_down();
    place.end();
    compared
}

/// Puts into the rings what the driver had put there before it sent EVENT_AVAIL.
fn kick(place: &mut Place, dev: DevNum, index: QueueIndex, is_net: bool, rest: &[Line]) {
    if !is_net {
        let told = told(rest, dev, index, index) > 0;
        place.guest.offer(dev, index, true, 0, told);
    } else if index.0 == 0 {
        for _ in 0..32 {
            place.guest.offer(dev, index, true, 0, true);
        }
    } else {
        let frames = told(rest, dev, QueueIndex(0), index);
        let first = u8::try_from(frames).expect("a few");
        let told = told(rest, dev, index, index) > 0;
        place.guest.offer(dev, index, false, first, told);
    }
}

/// Waits until the device has used the buffer, which it may not have to tell.
fn settle(place: &Place, wire: &Wire, dev: DevNum, index: QueueIndex, before: u16, name: &str) {
    let end = Instant::now() + PATIENCE;
    while place.guest.used(dev, index) == before {
        assert!(Instant::now() < end, "{name}: the buffer is not used");
        wire.wait(Duration::from_millis(2));
    }
}
