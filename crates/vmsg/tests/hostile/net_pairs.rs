// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Several queue pairs, all offloads, and frames larger than anything.

use std::os::fd::AsFd;

use crate::host::{Host, NET};
use crate::messages::Random;
use crate::peer::{GET_FEATURES, NEEDS_RESET, Peer, SET_FEATURES, words};
use crate::rings::{Memory, NEXT, Ring, WRITE};

const PAIRS: u32 = 4;
const CONTROL: u32 = 2 * PAIRS;
const SIZE: u16 = 256;

/// CSUM, GUEST_CSUM, the offloads of both sides, MRG_RXBUF, CTRL_VQ, CTRL_RX, MQ.
const LOW: u32 = 0b11 | 0b1111 << 7 | 0b1111 << 11 | 1 << 15 | 1 << 17 | 1 << 18 | 1 << 22;
/// VERSION_1, HOST_USO.
const HIGH: u32 = 1 | 1 << 24;

const FRAMES: u64 = 8 << 20;
const BUFFERS: u64 = 12 << 20;

struct Card<'m> {
    memory: &'m Memory,
    rings: Vec<Ring<'m>>,
}

impl<'m> Card<'m> {
    fn start(peer: &mut Peer, memory: &'m Memory) -> Self {
        memory.restart();
        assert_eq!(peer.set_status(NET, 0), 0);
        assert_eq!(peer.set_status(NET, 3), 3);
        // Of the offloads those that the back end has.
        let answer = peer.ask(GET_FEATURES, NET, &words(&[0, 2]));
        let offered =
            |at: usize| u32::from_le_bytes(answer[8 + at..12 + at].try_into().expect("a block"));
        let (low, high) = (LOW & offered(0), HIGH & offered(4));
        peer.ask(SET_FEATURES, NET, &words(&[0, 2, low, high]));
        assert_eq!(peer.set_status(NET, 11), 11, "{low:#x} {high:#x}");
        let rings = (0..=CONTROL)
            .map(|queue| memory.ring(peer, NET, queue, SIZE))
            .collect();
        assert_eq!(peer.set_status(NET, 15), 15);
        Self { memory, rings }
    }

    fn ring(&self, queue: u32) -> &Ring<'m> {
        &self.rings[queue as usize]
    }

    /// A command, whose answer nobody looks at.
    fn command(&self, peer: &mut Peer, bytes: &[u8]) {
        let (ring, base) = (self.ring(CONTROL), self.memory.base);
        ring.write(BUFFERS, bytes);
        let len = u32::try_from(bytes.len()).expect("short");
        ring.descriptor(0, base + BUFFERS, len, NEXT, 1);
        ring.descriptor(1, base + BUFFERS + 4096, 1, WRITE, 0);
        ring.offer(0);
        peer.kick(NET, CONTROL);
    }

    /// Gives receive buffers of pair `pair`.
    fn give(&self, peer: &mut Peer, pair: u32, count: u16) {
        let ring = self.ring(2 * pair);
        for index in 0..count {
            let addr = self.memory.base + BUFFERS + 8192 + u64::from(index) * 2048;
            ring.descriptor(index, addr, 2048, WRITE, 0);
            ring.offer(index);
        }
        peer.kick(NET, 2 * pair);
    }

    /// Sends what stands at [`FRAMES`], `count` times `len` bytes of it as one frame.
    fn send(&self, peer: &mut Peer, pair: u32, count: u16, len: u32) {
        let ring = self.ring(2 * pair + 1);
        for index in 0..count {
            let next = if index + 1 < count { NEXT } else { 0 };
            ring.descriptor(index, self.memory.base + FRAMES, len, next, index + 1);
        }
        ring.offer(0);
        peer.kick(NET, 2 * pair + 1);
    }
}

/// A header and a frame of IP whose fields say anything.
fn frame(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; 12];
    let kinds = [0, 1, 3, 4, 5, 0x81, 0x84, 0xff];
    let pick = |random: &mut Random, from: &[u8]| {
        from[usize::try_from(random.below(from.len() as u64)).expect("small")]
    };
    bytes[0] = pick(random, &[0, 1, 1, 2, 0xff]);
    bytes[1] = pick(random, &kinds);
    for at in [2, 4, 6, 8] {
        let value: u16 =
            [0, 1, 14, 34, 54, 74, 1448, 0xffff][usize::try_from(random.below(8)).expect("small")];
        bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    let v6 = random.below(2) == 0;
    bytes.extend([0x52, 0x55, 0x0a, 0, 2, 2, 0x52, 0x54, 0, 9, 9, 9]);
    if v6 {
        bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        bytes.extend([0xff, 0xff, pick(random, &[6, 17, 58, 44, 0]), 64]);
        for last in [0x15, 2] {
            bytes.extend([0xfd, 0, 0, 0x10, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, last]);
        }
    } else {
        bytes.extend([8, 0, 0x45, 0, 0xff, 0xff, 0, 0, 0, 0, 64]);
        bytes.push(pick(random, &[6, 17, 1]));
        bytes.extend([0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
    }
    let len = usize::try_from(random.below(4000)).expect("small");
    bytes.extend(random.bytes(len));
    bytes
}

#[test]
fn frames_of_gigabytes_are_dropped_without_being_read() {
    for net in ["queues=4,restrict=on,pcap=t.pcap", "queues=4,restrict=on"] {
        let mut host = Host::start_with(net);
        let before = host.resident();
        let mut peer = Peer::connect(&host.path());
        let memory = Memory::lend(&mut peer, 16 << 20);
        let card = Card::start(&mut peer, &memory);
        let mut random = Random::new(8);
        for round in 0..300u32 {
            let frame = frame(&mut random);
            card.ring(1).write(FRAMES, &frame);
            // The same 8 MiB 255 times over: 2 GiB in a frame.
            card.send(&mut peer, round % PAIRS, SIZE - 1, 8 << 20);
            if round % 8 == 7 {
                peer.barrier();
            }
            while peer.pop().is_some() {}
        }
        peer.barrier();
        assert_eq!(peer.status(NET) & NEEDS_RESET, 0);
        assert!(host.resident() < before + (24 << 10), "{before} KiB before");
        host.assert_idle();
        drop(peer);
        host.finish();
    }
}

#[test]
fn pairs_that_are_set_and_reset_under_traffic_lose_nothing_but_frames() {
    let host = Host::start_with("queues=4,restrict=on");
    let mut peer = Peer::connect(&host.path());
    let memory = Memory::lend(&mut peer, 16 << 20);
    let mut random = Random::new(9);
    for round in 0..40u32 {
        let card = Card::start(&mut peer, &memory);
        for step in 0..60u32 {
            let pair = u32::try_from(random.below(PAIRS.into())).expect("small");
            match step % 6 {
                // Only some pairs are ever refilled.
                0 if pair != 1 => card.give(&mut peer, pair, 16),
                1 => {
                    let pairs = random.bytes(1)[0] % 6;
                    card.command(&mut peer, &[4, 0, pairs, 0]);
                }
                _ => {
                    let mut frame = frame(&mut random);
                    if step % 3 == 0 {
                        frame = vec![0; 12];
                        frame.extend(crate::host::arp_request());
                    }
                    card.ring(1).write(FRAMES, &frame);
                    let len = u32::try_from(frame.len()).expect("short");
                    card.send(&mut peer, pair, 1, len);
                }
            }
            if round % 4 == 0 {
                peer.barrier();
            }
            while peer.pop().is_some() {}
        }
        // A reset while all that is on its way.
        if round % 2 == 0 {
            assert_eq!(peer.set_status(NET, 0), 0);
        }
        peer.events.clear();
    }
    drop(peer);
    host.finish();
}

#[test]
fn memory_that_vanishes_under_large_frames_breaks_the_device_only() {
    let host = Host::start_with("queues=4,restrict=on");
    for round in 0..6u64 {
        let mut peer = Peer::connect(&host.path());
        let memory = Memory::lend(&mut peer, 16 << 20);
        let card = Card::start(&mut peer, &memory);
        card.give(&mut peer, 0, 64);
        let mut random = Random::new(round + 1);
        let bytes = frame(&mut random);
        card.ring(1).write(FRAMES, &bytes);
        // The frames, or the buffers, or all but the rings.
        let len = [FRAMES, BUFFERS, FRAMES + 4096][usize::try_from(round % 3).expect("small")];
        let file = memory
            .fd
            .as_fd()
            .try_clone_to_owned()
            .expect("a descriptor");
        let cutting = std::thread::spawn(move || {
            rustix::fs::ftruncate(&file, len).expect("not sealed");
        });
        for pair in 0..PAIRS {
            for _ in 0..20 {
                card.send(&mut peer, pair, 16, 4096);
            }
        }
        cutting.join().expect("cut");
        for pair in 0..PAIRS {
            card.send(&mut peer, pair, 16, 4096);
        }
        // It answers, whatever has become of it.
        peer.status(NET);
        peer.ping();
    }
    host.finish();
}
