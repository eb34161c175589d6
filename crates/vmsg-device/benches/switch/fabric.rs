// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The switch without devices: what it takes to find out where frames go and to copy them, beside a loop that only does that.

use std::hint::black_box;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::switch::{Port, PortConfig, Rule, Switch, SwitchConfig};
use vmsg_net::{Backend, Closed, Guest, Offloads, Outlets, RxSink, Target, TxFrame, VnetHeader};

use crate::frames::mac;
use crate::measure::{Places, Plan, pace, sample, span};

pub(crate) const LEN: usize = 64;
/// Frames of a batch.
const BATCH: usize = 32;
/// Buffers of each port for either direction, and bytes between them.
const BUFFERS: usize = 128;
const STRIDE: usize = 256;
/// Bytes of a port's memory: what it sends, and what it gets.
const PART: usize = 2 * BUFFERS * STRIDE;

/// Ports' memory, with frames that go to random others.
pub(crate) struct Memory(Vec<AtomicU64>);

impl Memory {
    pub(crate) fn new(ports: usize) -> Self {
        let memory = Self((0..ports * PART / 8).map(|_| AtomicU64::new(0)).collect());
        let ram = memory.ram();
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        for from in 0..ports {
            for number in 0..BUFFERS {
                random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                let step = usize::try_from(random >> 33).expect("31 bits") % (ports - 1);
                let to = (from + 1 + step) % ports;
                let mut frame = [0x5a; LEN];
                frame[..6].copy_from_slice(&mac(to));
                frame[6..12].copy_from_slice(&mac(from));
                frame[12..14].copy_from_slice(&[0x88, 0xb5]);
                ram.write(from * PART + number * STRIDE, &frame);
            }
        }
        memory
    }

    fn ram(&self) -> RamSlice<'_> {
        RamSlice::from_atomics(&self.0)
    }
}

fn outgoing(ram: RamSlice<'_>, port: usize, number: usize) -> RamSlice<'_> {
    let at = port * PART + number % BUFFERS * STRIDE;
    ram.get(at, LEN).expect("inside")
}

fn incoming(ram: RamSlice<'_>, port: usize, number: usize) -> RamSlice<'_> {
    let at = port * PART + (BUFFERS + number % BUFFERS) * STRIDE;
    ram.get(at, LEN).expect("inside")
}

/// What a driver who always has buffers gets.
struct Receivers<'m> {
    ram: RamSlice<'m>,
    taken: Vec<usize>,
}

struct Receiver<'a, 'm> {
    ram: RamSlice<'m>,
    port: usize,
    taken: &'a mut usize,
    room: [RamSlice<'m>; 1],
}

impl RxSink for Receiver<'_, '_> {
    #[inline]
    fn offer(&mut self, _: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        self.room = [incoming(self.ram, self.port, *self.taken)];
        Some(Pieces::new(&self.room).take(len))
    }

    #[inline]
    fn commit(&mut self, header: &VnetHeader, _: usize) {
        black_box(header);
        *self.taken += 1;
    }
}

impl Outlets for Receivers<'_> {
    fn fill(&mut self, key: u64, fill: &mut dyn FnMut(&mut dyn RxSink)) -> Result<(), Closed> {
        let port = usize::try_from(key).expect("small");
        fill(&mut Receiver {
            ram: self.ram,
            port,
            taken: &mut self.taken[port],
            room: [RamSlice::EMPTY],
        });
        Ok(())
    }
}

/// The switch with nothing at its ports.
pub(crate) struct Bare<'m> {
    ports: Vec<Port>,
    receivers: Receivers<'m>,
    sent: Vec<usize>,
}

impl<'m> Bare<'m> {
    pub(crate) fn new(memory: &'m Memory, ports: usize) -> Self {
        let mut config = SwitchConfig::new("s0");
        config.rules = vec![Rule::allow_all()];
        let switch = Switch::new(config).expect("a switch");
        let mut bare = Self {
            ports: Vec::new(),
            receivers: Receivers {
                ram: memory.ram(),
                taken: vec![0; ports],
            },
            sent: vec![0; ports],
        };
        for number in 0..ports {
            let mut port = switch
                .add_port(PortConfig::new(format!("net{number}")))
                .expect("a port");
            port.set_key(number as u64);
            port.set_guest(&Guest {
                offloads: Offloads {
                    mtu: 1500,
                    ..Offloads::ALL
                },
                running: true,
                ..Guest::NONE
            });
            bare.ports.push(port);
        }
        // All addresses are known then.
        bare.round();
        bare
    }

    /// Every port sends a batch; how many frames that were.
    pub(crate) fn round(&mut self) -> usize {
        let now = Instant::now();
        let ram = self.receivers.ram;
        for (number, port) in self.ports.iter_mut().enumerate() {
            let sent = &mut self.sent[number];
            let pieces: [[RamSlice<'_>; 1]; BATCH] =
                std::array::from_fn(|at| [outgoing(ram, number, *sent + at)]);
            let frames: [TxFrame<'_>; BATCH] = std::array::from_fn(|at| TxFrame {
                header: VnetHeader::default(),
                payload: Pieces::new(&pieces[at]),
            });
            let taken = port.transmit_to(now, 0, &frames, &mut self.receivers);
            assert_eq!(taken, BATCH, "a switch without limits");
            *sent += BATCH;
        }
        self.ports.len() * BATCH
    }
}

/// Where an address is, and when it was seen.
#[derive(Clone, Copy, Default)]
struct Place {
    mac: u64,
    port: u32,
    seen: u32,
}

/// The least that a learning switch does.
pub(crate) struct Floor<'m> {
    ram: RamSlice<'m>,
    places: Vec<Place>,
    sent: Vec<usize>,
    taken: Vec<usize>,
    now: u32,
}

/// A power of two.
const PLACES: usize = 16_384;

impl<'m> Floor<'m> {
    pub(crate) fn new(memory: &'m Memory, ports: usize) -> Self {
        Self {
            ram: memory.ram(),
            places: vec![Place::default(); PLACES],
            sent: vec![0; ports],
            taken: vec![0; ports],
            now: 0,
        }
    }

    /// The place of an address, or one for it.
    #[inline]
    fn place(&self, mac: u64) -> usize {
        let hash = mac.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        let mut at = usize::try_from(hash).unwrap_or(0) % PLACES;
        while self.places[at].mac != mac && self.places[at].mac != 0 {
            at = (at + 1) % PLACES;
        }
        at
    }

    /// Every port sends a batch; how many frames that were.
    pub(crate) fn round(&mut self) -> usize {
        self.now += 1;
        let ports = self.sent.len();
        for from in 0..ports {
            for number in self.sent[from]..self.sent[from] + BATCH {
                let frame = outgoing(self.ram, from, number);
                let mut head = [0; 16];
                frame.read(0, &mut head);
                let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = head;
                let source = u64::from_be_bytes([0, 0, g, h, i, j, k, l]);
                let at = self.place(source);
                self.places[at] = Place {
                    mac: source,
                    port: u32::try_from(from).expect("few"),
                    seen: self.now,
                };
                let target = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
                let found = &self.places[self.place(target)];
                if found.mac != target || found.seen + 1000 < self.now {
                    continue;
                }
                let to = found.port as usize;
                frame.copy_to(incoming(self.ram, to, self.taken[to]));
                self.taken[to] += 1;
            }
            self.sent[from] += BATCH;
        }
        ports * BATCH
    }
}

pub(crate) fn print(plan: &Plan, places: &Places) {
    println!(
        "| the switch alone, 64 B | ratio | target (floor to pass) | ours | bare loop | repetitions |"
    );
    println!("|---|---|---|---|---|---|");
    for ports in [2, 16, 64, 256] {
        let memory = Memory::new(ports);
        let mut floor = Floor::new(&memory, ports);
        floor.round();
        let mut bare = Bare::new(&memory, ports);
        let sampled = sample(
            plan,
            places,
            &mut [&mut || pace(plan, || floor.round())],
            &mut || pace(plan, || bare.round()),
        );
        match sampled {
            Some(sampled) => println!(
                "| {ports} ports | {:.2} | ≤ 1.3 (3) | {} | {} | {} |",
                sampled.floors[0].ratio,
                span(sampled.ours),
                span(sampled.floors[0].floor),
                sampled.counted
            ),
            None => {
                println!("| {ports} ports | – | ≤ 1.3 (3) | – | – | the machine is too restless |")
            }
        }
    }
    println!();
}
