// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver that does anything, at any time, with several pairs.

use vmsg_net::VnetHeader;

use super::bench::{Bench, Incoming};
use crate::device::Operation;
use crate::net::bits;
use crate::worker::Command;

const PAIRS: u16 = 4;
const CONTROL: usize = 2 * PAIRS as usize;

const FEATURES: [u32; 24] = [
    bits::CSUM,
    bits::GUEST_CSUM,
    bits::CTRL_GUEST_OFFLOADS,
    bits::MTU,
    bits::GUEST_TSO4,
    bits::GUEST_TSO6,
    bits::GUEST_ECN,
    bits::GUEST_UFO,
    bits::HOST_TSO4,
    bits::HOST_TSO6,
    bits::HOST_ECN,
    bits::HOST_UFO,
    bits::MRG_RXBUF,
    bits::STATUS,
    bits::CTRL_VQ,
    bits::CTRL_RX,
    bits::CTRL_VLAN,
    bits::CTRL_RX_EXTRA,
    bits::GUEST_ANNOUNCE,
    bits::MQ,
    bits::CTRL_MAC_ADDR,
    bits::HOST_USO,
    bits::HASH_REPORT,
    bits::RSS,
];

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 20).expect("64 bits") % limit
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).expect("a byte")
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.byte()).collect()
    }

    /// Often one of the numbers that are compared with.
    fn half(&mut self) -> u16 {
        let usual = [
            0, 1, 2, 3, 4, 5, 13, 14, 34, 54, 127, 128, 1500, 0xfffe, 0xffff,
        ];
        match self.below(usual.len() + 1) {
            at if at < usual.len() => usual[at],
            _ => u16::from_le_bytes([self.byte(), self.byte()]),
        }
    }

    /// An Ethernet frame that may well be one of IP.
    fn frame(&mut self) -> Vec<u8> {
        let len = match self.below(8) {
            0 => self.below(20),
            1 => 1500 + self.below(8000),
            _ => 14 + self.below(200),
        };
        let mut frame = self.bytes(len);
        if len > 40 && self.below(3) > 0 {
            let v6 = self.below(2) == 0;
            frame[12..14].copy_from_slice(if v6 { &[0x86, 0xdd] } else { &[8, 0] });
            frame[14] = if v6 { 0x60 } else { 0x40 | self.byte() & 0xf };
            frame[if v6 { 20 } else { 23 }] = [6, 17, 0, 43, 44, 60, 58][self.below(7)];
        }
        frame
    }

    fn header(&mut self) -> VnetHeader {
        VnetHeader {
            flags: self.byte() & 0x87,
            gso_type: [0, 1, 3, 4, 5, 0x80, 0x81, 0x84, 0xff][self.below(9)],
            hdr_len: self.half(),
            gso_size: self.half(),
            csum_start: self.half(),
            csum_offset: self.half(),
        }
    }

    /// Data of a command: right in part.
    fn command(&mut self, class: u8, code: u8) -> Vec<u8> {
        let mut data = match (class, code) {
            (1, 0) => {
                let mut data = Vec::new();
                for _ in 0..2 {
                    let count = [0, 1, 3, 200, 2000][self.below(5)];
                    data.extend(u32::try_from(count).expect("small").to_le_bytes());
                    data.extend(self.bytes(6 * count));
                }
                data
            }
            (4, 0) => (self.half() % 8).to_le_bytes().to_vec(),
            (4, 1) => {
                let mut data = (u32::from(self.half()) & 0x3ff).to_le_bytes().to_vec();
                let entries = [1, 2, 3, 16, 128, 256][self.below(6)];
                data.extend(u16::try_from(entries - 1).expect("small").to_le_bytes());
                data.extend((self.half() % 5).to_le_bytes());
                for _ in 0..entries {
                    let wrong = u8::from(self.below(200) == 0);
                    data.extend([self.byte() % 4, wrong]);
                }
                data.extend((self.half() % 6).to_le_bytes());
                let key = [0, 1, 40, 41, 255][self.below(5)];
                data.push(u8::try_from(key).expect("a byte"));
                data.extend(self.bytes(key));
                data
            }
            (5, 0) => (1u64 << self.below(64) | 1u64 << self.below(64))
                .to_le_bytes()
                .to_vec(),
            (0, _) => vec![self.byte() % 3],
            _ => self.bytes(24),
        };
        if self.below(4) == 0 {
            data.truncate(self.below(data.len() + 1));
        }
        data
    }
}

/// One life of a device.
struct Story {
    bench: Bench,
    random: Random,
    /// Set up, and running.
    queues: Vec<bool>,
    control: Option<usize>,
}

impl Story {
    fn bring_up(&mut self) {
        self.bench.tell(Command::Reset).expect("reset");
        self.queues = vec![false; CONTROL + 1];
        self.control = None;
        let mut features = Vec::new();
        for feature in FEATURES {
            let offered = self.bench.offered.contains(feature);
            if offered && self.random.below(5) > 0 {
                features.push(feature);
            }
        }
        if self.bench.negotiate(&features).is_err() {
            // Some need others.
            features = vec![bits::CTRL_VQ, bits::MQ, bits::MRG_RXBUF, bits::CTRL_RX];
            self.bench.negotiate(&features).expect("they go together");
        }
        let has = |bit| features.contains(&bit);
        let several = has(bits::MQ) || has(bits::RSS);
        let control = if several { CONTROL } else { 2 };
        let data = if several { CONTROL } else { 2 };
        for queue in 0..data {
            if self.random.below(8) > 0 {
                self.queues[queue] = self.bench.set_up(queue, None).is_ok();
            }
        }
        if has(bits::CTRL_VQ) {
            self.bench.set_up(control, None).expect("the control queue");
            self.control = Some(control);
        }
        self.bench.driver_ok();
    }

    /// One of the data queues that are set up: receive queues have even numbers.
    fn queue(&mut self, parity: usize) -> Option<usize> {
        let queue = 2 * self.random.below(usize::from(PAIRS)) + parity;
        (self.queues[queue] && self.bench.outstanding(queue) < 60).then_some(queue)
    }

    fn step(&mut self) {
        match self.random.below(24) {
            0..=3 => {
                if let Some(queue) = self.queue(0) {
                    let len = [64, 64, 300, 1526, 3000][self.random.below(5)];
                    let room = usize::from(60 - self.bench.outstanding(queue)).min(8);
                    let count = 1 + self.random.below(room);
                    self.bench.give(queue, count, len);
                }
            }
            4..=8 => {
                let frame = self.random.frame();
                let pair = self.random.half();
                let mut incoming = if self.random.below(2) == 0 {
                    Incoming::new(&frame)
                } else {
                    Incoming::on(pair, &frame)
                };
                incoming.header = self.random.header();
                self.bench.wire.push(incoming);
                self.bench.poll();
            }
            9..=13 => {
                if let Some(queue) = self.queue(1) {
                    let mut bytes = self.random.header().to_bytes().to_vec();
                    bytes.extend(self.random.bytes(self.bench.header - 10));
                    bytes.extend(self.random.frame());
                    if self.random.below(10) == 0 {
                        bytes.truncate(self.random.below(bytes.len()).max(1));
                    }
                    self.bench.send_raw(queue, &bytes);
                    self.bench.reclaim(queue);
                }
            }
            14..=17 => {
                if let Some(queue) = self.control {
                    let (class, code) = (self.random.byte() % 7, self.random.byte() % 4);
                    let data = self.random.command(class, code);
                    self.bench.control(queue, class, code, &data);
                }
            }
            18 => {
                let queue = self.random.below(CONTROL);
                if self.queues[queue] {
                    self.bench.tell(Command::ResetQueue(queue)).expect("reset");
                    self.queues[queue] =
                        self.random.below(3) > 0 && self.bench.set_up(queue, None).is_ok();
                }
            }
            19 => self.bench.wire.state().patience = [0, 1, 5, usize::MAX][self.random.below(4)],
            20 => {
                let up = self.random.below(3) > 0;
                let operation = [Operation::SetLink(up), Operation::Announce];
                let operation = operation[self.random.below(2)];
                let _ = self.bench.operate(operation);
            }
            21 => {
                let link = self.random.below(3) > 0;
                self.bench.wire.state().link = link;
                self.bench.poll();
            }
            22 => self.bench.poll(),
            _ => {
                for queue in (0..CONTROL).step_by(2) {
                    if self.queues[queue] {
                        self.bench.received(queue);
                    }
                }
            }
        }
        let mut state = self.bench.wire.state();
        state.sent.clear();
        // What nobody takes is somebody else's trouble.
        while state.incoming.len() > 64 {
            state.incoming.pop_front();
        }
        drop(state);
        assert!(!self.bench.is_broken(), "nothing of this is a broken queue");
        self.bench.notices.clear();
    }
}

#[test]
fn whatever_a_driver_does_with_sound_queues_the_device_works_on() {
    for seed in 1..=60 {
        let mut story = Story {
            bench: Bench::new(PAIRS),
            random: Random(0x9e37_79b9_7f4a_7c15 ^ seed << 17),
            queues: vec![false; CONTROL + 1],
            control: None,
        };
        for _ in 0..6 {
            story.bring_up();
            for _ in 0..150 {
                story.step();
            }
        }
        // As good as new.
        let Story { mut bench, .. } = story;
        {
            let mut state = bench.wire.state();
            (state.patience, state.link) = (usize::MAX, true);
            state.incoming.clear();
        }
        bench.tell(Command::Reset).expect("reset");
        let _ = bench.operate(Operation::SetLink(true));
        bench.bring_up(&[bits::MRG_RXBUF], &[0, 1]);
        bench.give(0, 4, 200);
        bench.send(1, &[7; 60]);
        assert_eq!(bench.wire.state().sent.len(), 1);
        bench.wire.push(Incoming::new(&[9; 250]));
        bench.poll();
        assert_eq!(bench.frames(0), [[9; 250]]);
    }
}

#[test]
fn a_pair_that_is_never_refilled_holds_up_no_other() {
    let mut bench = Bench::running(
        PAIRS,
        &[bits::CTRL_VQ, bits::MQ, bits::MRG_RXBUF],
        &[0, 1, 2, 3, 4, 5, 6, 7, 8],
    );
    assert_eq!(bench.control(CONTROL, 4, 0, &[4, 0]), 0);
    // The first has a little, the second nothing.
    bench.give(0, 1, 64);
    for round in 0..200u8 {
        for pair in 0..4 {
            let frame = [round, u8::try_from(pair).expect("small")].repeat(50);
            bench.wire.push(Incoming::on(pair, &frame));
        }
        for queue in [4, 6] {
            bench.give(queue, 1, 200);
        }
        bench.poll();
        for queue in [4usize, 6] {
            let pair = u8::try_from(queue / 2).expect("small");
            assert_eq!(
                bench.frames(queue),
                [[round, pair].repeat(50)],
                "round {round}"
            );
        }
    }
    assert_eq!((bench.outstanding(0), bench.outstanding(2)), (1, 0));
}
