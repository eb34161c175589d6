// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What switching one frame costs, against the least that it can: two look-ups in a table and one copy.
//!
//! `cargo bench -p vmsg-net --bench switch` prints nanoseconds for each frame. Frames come in batches of 32 from one port after
//! another, each to any other port. Every repetition measures floor, subject, floor; it counts if the floor moved by less than
//! 30 %. Only ratios within one run mean anything.
#![allow(missing_docs, reason = "a program")]

use std::sync::atomic::AtomicU64;
use std::time::Instant;

use rustix::time::{ClockId, clock_gettime};
use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::switch::{Port, PortConfig, Rule, Switch, SwitchConfig};
use vmsg_net::{Backend, Closed, Guest, Offloads, Outlets, RxSink, Target, TxFrame, VnetHeader};

const BATCH: usize = 32;
const BUFFERS: usize = 64;
const BUFFER: usize = 2048;
const ENOUGH: usize = 15;
const TRIES: usize = 200;

/// Time of this thread alone, in nanoseconds: others may have the machine, too.
fn clock() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

/// Buffers of all ports; and as many frames as a port sends at a time, for each.
struct Memory {
    buffers: Vec<AtomicU64>,
    frames: Vec<AtomicU64>,
}

fn words(bytes: usize) -> Vec<AtomicU64> {
    (0..bytes / 8).map(|_| AtomicU64::new(0)).collect()
}

fn mac(port: usize) -> [u8; 6] {
    let [.., a, b] = port.to_be_bytes();
    [2, 0, 0, 0, a, b]
}

/// All frames of a benchmark.
struct Traffic {
    memory: Memory,
    ports: usize,
    len: usize,
}

impl Traffic {
    fn new(ports: usize, len: usize) -> Self {
        let memory = Memory {
            buffers: words(ports * BUFFERS * BUFFER),
            frames: words(ports * BATCH * BUFFER),
        };
        let all = RamSlice::from_atomics(&memory.frames);
        let mut random = 1u64;
        for from in 0..ports {
            for frame in 0..BATCH {
                random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                let to = usize::try_from(random >> 40).expect("64 bits") % (ports - 1);
                let to = if to >= from { to + 1 } else { to };
                let mut bytes = vec![0x55; len];
                bytes[..6].copy_from_slice(&mac(to));
                bytes[6..12].copy_from_slice(&mac(from));
                bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
                all.write((from * BATCH + frame) * BUFFER, &bytes);
            }
        }
        Self { memory, ports, len }
    }

    fn slices(&self) -> Vec<RamSlice<'_>> {
        let all = RamSlice::from_atomics(&self.memory.frames);
        (0..self.ports * BATCH)
            .map(|frame| all.get(frame * BUFFER, self.len).expect("inside"))
            .collect()
    }
}

/// The ports' buffers, used one after another.
struct Rings<'a> {
    memory: RamSlice<'a>,
    next: Vec<usize>,
    delivered: u64,
}

impl<'a> Rings<'a> {
    fn new(traffic: &'a Traffic) -> Self {
        Self {
            memory: RamSlice::from_atomics(&traffic.memory.buffers),
            next: vec![0; traffic.ports],
            delivered: 0,
        }
    }

    #[inline]
    fn buffer(&self, port: usize, len: usize) -> RamSlice<'a> {
        let buffer = port * BUFFERS + self.next[port] % BUFFERS;
        self.memory.get(buffer * BUFFER, len).expect("inside")
    }
}

struct Ring<'r, 'a> {
    rings: &'r mut Rings<'a>,
    port: usize,
    room: [RamSlice<'a>; 1],
}

impl RxSink for Ring<'_, '_> {
    fn offer(&mut self, _: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        self.room = [self.rings.buffer(self.port, len)];
        Some(Pieces::new(&self.room))
    }

    fn commit(&mut self, _: &VnetHeader, _: usize) {
        self.rings.next[self.port] += 1;
        self.rings.delivered += 1;
    }
}

impl Outlets for Rings<'_> {
    fn fill(&mut self, key: u64, fill: &mut dyn FnMut(&mut dyn RxSink)) -> Result<(), Closed> {
        let port = usize::try_from(key).expect("64 bits");
        fill(&mut Ring {
            rings: self,
            port,
            room: [RamSlice::EMPTY],
        });
        Ok(())
    }
}

/// The least: an open table of addresses, one copy.
struct Floor {
    table: Vec<(u64, u32, u32)>,
}

impl Floor {
    fn new() -> Self {
        Self {
            table: vec![(0, 0, 0); 16384],
        }
    }

    #[inline]
    fn place(&self, key: u64) -> usize {
        let mut at =
            usize::try_from(key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 50).expect("64 bits");
        while self.table[at].0 != key && self.table[at].0 != 0 {
            at = (at + 1) & 16383;
        }
        at
    }

    #[inline]
    fn forward(&mut self, from: u32, frame: Pieces<'_>, now: u32, rings: &mut Rings<'_>) {
        let mut head = [0; 16];
        frame.read(&mut head);
        let word = |at: usize| {
            let mut word = [0; 8];
            word[..6].copy_from_slice(&head[at..at + 6]);
            u64::from_le_bytes(word)
        };
        let source = self.place(word(6));
        self.table[source] = (word(6), from, now);
        let (key, to, _) = self.table[self.place(word(0))];
        if key != 0 {
            let to = to as usize;
            let room = [rings.buffer(to, frame.len())];
            frame.copy_to(Pieces::new(&room));
            rings.next[to] += 1;
            rings.delivered += 1;
        }
    }
}

fn time_floor(traffic: &Traffic, rounds: usize) -> f64 {
    let slices = traffic.slices();
    let mut floor = Floor::new();
    let mut rings = Rings::new(traffic);
    let mut run = |rounds: usize| {
        for round in 0..rounds {
            for (from, batch) in (0u32..).zip(slices.chunks(BATCH)) {
                let now = u32::try_from(round).expect("few");
                for frame in batch.chunks(1) {
                    floor.forward(from, Pieces::new(frame), now, &mut rings);
                }
            }
        }
        rings.delivered
    };
    let before = run(2);
    let start = clock();
    let delivered = run(rounds) - before;
    (clock() - start) / delivered as f64
}

fn time_switch(traffic: &Traffic, rounds: usize) -> f64 {
    let mut config = SwitchConfig::new("bench");
    config.rules = vec![Rule::allow_all()];
    let switch = Switch::new(config).expect("a switch");
    let mut ports: Vec<Port> = (0..traffic.ports)
        .map(|port| {
            let name = format!("p{port}");
            let mut plug = switch.add_port(PortConfig::new(name)).expect("a port");
            plug.set_key(port as u64);
            plug.set_guest(&Guest {
                offloads: Offloads::ALL,
                pairs: 1,
                running: true,
                heads: false,
            });
            plug
        })
        .collect();
    let slices = traffic.slices();
    let mut rings = Rings::new(traffic);
    let mut pump = switch.pump();
    pump.poll(Instant::now(), &mut rings);
    let mut frames = Vec::with_capacity(BATCH);
    let mut run = |rounds: usize| {
        for _ in 0..rounds {
            for (port, batch) in ports.iter_mut().zip(slices.chunks(BATCH)) {
                frames.clear();
                frames.extend(batch.chunks(1).map(|piece| TxFrame {
                    header: VnetHeader::default(),
                    payload: Pieces::new(piece),
                }));
                // As a worker does before it works.
                let now = Instant::now();
                port.transmit_to(now, 0, &frames, &mut rings);
            }
        }
        rings.delivered
    };
    let before = run(2);
    let start = clock();
    let delivered = run(rounds) - before;
    (clock() - start) / delivered as f64
}

fn main() {
    let quick = std::env::args().any(|arg| arg == "--test");
    println!("| ports | bytes | floor, ns | switch, ns | ratio |");
    println!("|---|---|---|---|---|");
    for len in [64, 1514] {
        for ports in [2, 16, 64, 256] {
            let traffic = Traffic::new(ports, len);
            let frames = if quick { 10_000 } else { 1_000_000 };
            let rounds = (frames / BATCH / ports).max(4);
            let mut kept = Vec::new();
            for _ in 0..TRIES {
                let before = time_floor(&traffic, rounds);
                let subject = time_switch(&traffic, rounds);
                let after = time_floor(&traffic, rounds);
                if quick || (before - after).abs() < 0.3 * before.min(after) {
                    kept.push((subject / ((before + after) / 2.0), subject));
                }
                if kept.len() >= ENOUGH || quick {
                    break;
                }
            }
            kept.sort_by(|one, other| one.0.total_cmp(&other.0));
            let (ratio, subject) = kept[kept.len() / 2];
            println!(
                "| {ports} | {len} | {:.1} | {subject:.1} | {ratio:.2} |",
                subject / ratio
            );
        }
    }
}
