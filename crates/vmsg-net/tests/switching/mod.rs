// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A switch in one thread: senders whose frames lie in pieces, and receivers with few buffers and faults.
#![allow(dead_code, unreachable_pub, reason = "not everybody needs all of it")]

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::switch::{Control, Port, Pump, Switch};
use vmsg_net::{Backend, Closed, Guest, Offloads, Outlets, RxSink, Target, TxFrame, VnetHeader};

/// Numbers that look random and are the same each time.
#[derive(Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).expect("small")
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }
}

/// Memory that holds a frame.
pub struct Memory(Vec<AtomicU64>);

impl Memory {
    pub fn new(bytes: usize) -> Self {
        let words = bytes.div_ceil(8).max(1);
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    pub fn holding(bytes: &[u8]) -> Self {
        let memory = Self::new(bytes.len());
        memory.ram().write(0, bytes);
        memory
    }

    pub fn ram(&self) -> RamSlice<'_> {
        RamSlice::from_atomics(&self.0)
    }

    /// The first `len` bytes, cut at any places.
    pub fn pieces(&self, len: usize, dice: &mut Dice) -> Vec<RamSlice<'_>> {
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < len {
            let n = match dice.below(4) {
                0 => 1 + dice.below(20),
                _ => len,
            };
            let n = n.min(len - at);
            pieces.push(self.ram().get(at, n).expect("inside"));
            at += n;
        }
        pieces
    }
}

/// How a receiver is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// It has so many buffers.
    Buffers(usize),
    Closed(Closed),
    /// It breaks when all is there.
    Breaks,
}

/// A device as it looks from outside.
pub struct Receiver {
    pub mood: Mood,
    /// Buffers in one turn.
    pub turn: usize,
    pub got: Vec<(VnetHeader, Vec<u8>)>,
}

/// All devices.
pub struct World {
    pub receivers: HashMap<u64, Receiver>,
    memory: Memory,
    pub fills: u64,
}

impl World {
    pub fn new() -> Self {
        Self {
            receivers: HashMap::new(),
            memory: Memory::new(80 * 1024),
            fills: 0,
        }
    }
}

struct Sink<'a> {
    memory: &'a Memory,
    room: [RamSlice<'a>; 1],
    left: usize,
    got: Vec<(VnetHeader, Vec<u8>)>,
}

impl RxSink for Sink<'_> {
    fn offer(&mut self, _: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        if self.left == 0 {
            return None;
        }
        let room = self.memory.ram().get(0, len)?;
        room.fill(0xee);
        self.room = [room];
        Some(Pieces::new(&self.room))
    }

    fn commit(&mut self, header: &VnetHeader, len: usize) {
        let mut bytes = vec![0; len];
        assert_eq!(Pieces::new(&self.room).read(&mut bytes), len);
        self.got.push((*header, bytes));
        self.left -= 1;
    }
}

impl Outlets for World {
    fn fill(&mut self, key: u64, fill: &mut dyn FnMut(&mut dyn RxSink)) -> Result<(), Closed> {
        self.fills += 1;
        let receiver = self.receivers.get_mut(&key).ok_or(Closed::Gone)?;
        let buffers = match receiver.mood {
            Mood::Closed(why) => return Err(why),
            Mood::Buffers(count) => count,
            Mood::Breaks => usize::MAX,
        };
        let mut sink = Sink {
            memory: &self.memory,
            room: [RamSlice::EMPTY],
            left: buffers.min(receiver.turn),
            got: Vec::new(),
        };
        fill(&mut sink);
        match &mut receiver.mood {
            Mood::Buffers(left) => {
                *left -= sink.got.len();
                receiver.got.append(&mut sink.got);
                Ok(())
            }
            _ => Err(Closed::Broken),
        }
    }
}

/// What a receiver has settled on that takes all.
pub fn everything() -> Guest {
    Guest {
        offloads: Offloads::ALL,
        pairs: 1,
        running: true,
        heads: false,
    }
}

/// A switch, what is plugged into it, and a clock of its own.
pub struct Bench {
    pub switch: Switch,
    pub control: Control,
    pub pump: Pump,
    pub world: World,
    pub now: Instant,
    pub dice: Dice,
    next_key: u64,
}

impl Bench {
    pub fn new(switch: Switch, seed: u64) -> Self {
        Self {
            control: switch.control(),
            pump: switch.pump(),
            switch,
            world: World::new(),
            now: Instant::now(),
            dice: Dice::new(seed),
            next_key: 1 << 32,
        }
    }

    /// Brings a port up; returns the key of its receiver.
    pub fn bring_up(&mut self, port: &mut Port, guest: &Guest) -> u64 {
        self.next_key += 1;
        port.set_key(self.next_key);
        port.set_guest(guest);
        let receiver = Receiver {
            mood: Mood::Buffers(usize::MAX),
            turn: 96,
            got: Vec::new(),
        };
        self.world.receivers.insert(self.next_key, receiver);
        self.next_key
    }

    pub fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    /// Sends frames; returns how many were taken.
    pub fn send_with(&mut self, port: &mut Port, frames: &[(VnetHeader, Vec<u8>)]) -> usize {
        let memories: Vec<Memory> = frames
            .iter()
            .map(|(_, bytes)| Memory::holding(bytes))
            .collect();
        let pieces: Vec<Vec<RamSlice<'_>>> = frames
            .iter()
            .zip(&memories)
            .map(|((_, bytes), memory)| memory.pieces(bytes.len(), &mut self.dice))
            .collect();
        let frames: Vec<TxFrame<'_>> = frames
            .iter()
            .zip(&pieces)
            .map(|((header, _), pieces)| TxFrame {
                header: *header,
                payload: Pieces::new(pieces),
            })
            .collect();
        port.transmit_to(self.now, 0, &frames, &mut self.world)
    }

    pub fn send(&mut self, port: &mut Port, frames: &[Vec<u8>]) -> usize {
        let frames: Vec<_> = frames
            .iter()
            .map(|bytes| (VnetHeader::default(), bytes.clone()))
            .collect();
        self.send_with(port, &frames)
    }

    /// What a receiver has got since this was asked last.
    pub fn got(&mut self, key: u64) -> Vec<Vec<u8>> {
        let receiver = self.world.receivers.get_mut(&key).expect("a receiver");
        receiver.got.drain(..).map(|(_, bytes)| bytes).collect()
    }

    /// Has another thread ask something of the switch, while this one is its worker.
    pub fn ask<R: Send>(&mut self, ask: impl FnOnce(&Control) -> R + Send) -> R {
        let control = self.control.clone();
        let (pump, world, now) = (&mut self.pump, &mut self.world, self.now);
        thread::scope(|scope| {
            let asking = scope.spawn(move || ask(&control));
            while !asking.is_finished() {
                wait(pump, Duration::from_millis(1));
                pump.poll(now, world);
            }
            asking.join().expect("it does not panic")
        })
    }

    pub fn pump(&mut self) {
        self.pump.poll(self.now, &mut self.world);
    }
}

/// Waits until the pump has something to do.
pub fn wait(pump: &Pump, most: Duration) {
    let fd = pump.event_fd();
    let fd = fd.as_fd();
    let timeout = Timespec::try_from(most).expect("short");
    let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout));
}

/// A frame of `len` bytes with a number in it.
pub fn frame(to: [u8; 6], from: [u8; 6], tags: &[(u16, u16)], number: u32, len: usize) -> Vec<u8> {
    let mut bytes = [to, from].concat();
    for (tpid, tci) in tags {
        bytes.extend(tpid.to_be_bytes());
        bytes.extend(tci.to_be_bytes());
    }
    bytes.extend([0x88, 0xb5]);
    bytes.extend(number.to_be_bytes());
    let filler = (0u8..=255).cycle().skip(number as usize % 256);
    let missing = len.saturating_sub(bytes.len());
    bytes.extend(filler.take(missing));
    bytes
}

/// A large segment of TCP over IPv4 with so many bytes, to be cut every `size`.
pub fn segment(to: [u8; 6], payload: usize, size: u16) -> (VnetHeader, Vec<u8>) {
    let mut bytes = frame(to, mac(0), &[], 0, 54 + payload);
    bytes[12..14].copy_from_slice(&[8, 0]);
    let [high, low] = u16::try_from(40 + payload).expect("short").to_be_bytes();
    let ip = [
        0x45, 0, high, low, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ];
    bytes[14..34].copy_from_slice(&ip);
    let tcp = [
        0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
    ];
    bytes[34..54].copy_from_slice(&tcp);
    (gso(size), bytes)
}

/// What is said of such a segment.
pub const fn gso(size: u16) -> VnetHeader {
    VnetHeader {
        flags: VnetHeader::NEEDS_CSUM,
        gso_type: VnetHeader::GSO_TCPV4,
        hdr_len: 54,
        gso_size: size,
        csum_start: 34,
        csum_offset: 16,
    }
}

/// The number in a frame.
pub fn number(frame: &[u8]) -> u32 {
    let at = (12..frame.len() - 5)
        .step_by(4)
        .find(|at| frame[*at..at + 2] == [0x88, 0xb5])
        .expect("one of ours");
    u32::from_be_bytes(frame[at + 2..at + 6].try_into().expect("four"))
}

pub const EVERYBODY: [u8; 6] = [0xff; 6];

/// The address of somebody.
pub fn mac(number: usize) -> [u8; 6] {
    let [.., a, b, c] = number.to_be_bytes();
    [0x02, 0, 0, a, b, c]
}
