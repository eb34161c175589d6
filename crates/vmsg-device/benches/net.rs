// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the network device costs for each frame: one thread plays driver, worker and back end.
//!
//! `cargo bench -p vmsg-device --bench net` prints nanoseconds for each frame in both directions,
//! the driver's part and the copy included. Only figures of one run can be compared.
#![allow(missing_docs, reason = "a program")]

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use virtio_msg::FeatureSet;
use vmsg_device::net::{Mac, Net, Settings};
use vmsg_device::worker::{Command, Core, Fds, QueueStart, Slot};
use vmsg_mem::{Access, BusAddr, Mapping, TableEntry, WindowTable};
use vmsg_net::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures};

const BASE: u64 = 0x4000_0000;
const PART: usize = 1 << 21;
const BUFFERS: usize = 1 << 16;
const BUFFER: usize = 2048;
const SIZE: u16 = 256;
const SLOT: Slot = Slot(0);
const BATCH: usize = 64;
const MRG_RXBUF: u32 = 15;
const REPETITIONS: usize = 15;

struct NoFds;

impl Fds for NoFds {
    fn add_kick(&mut self, _: Slot, _: usize, _: BorrowedFd<'_>) {}
    fn add_device(&mut self, _: Slot, _: BorrowedFd<'_>) {}
    fn remove(&mut self, _: BorrowedFd<'_>) {}
}

/// Always has frames, and takes all.
struct Endless {
    frame: Vec<u8>,
    receiving: bool,
    head: bool,
}

impl Backend for Endless {
    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }
    fn set_guest(&mut self, _: &Guest) {}
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn next_timeout(&self) -> Option<Instant> {
        None
    }
    fn poll(&mut self, _: Instant) {}
    fn transmit(&mut self, _: Instant, _: u16, frames: &[TxFrame<'_>]) -> usize {
        frames.len()
    }
    fn receive(&mut self, _: Instant, sink: &mut dyn RxSink) -> usize {
        let mut count = 0;
        let head = &self.frame[..self.frame.len().min(Target::HEAD)];
        let target = if self.head {
            Target::Head(head)
        } else {
            Target::Pair(0)
        };
        while let Some(room) = sink.offer(target, self.frame.len()) {
            room.write(&self.frame);
            sink.commit(&VnetHeader::default(), self.frame.len());
            count += 1;
        }
        count
    }
    fn has_frames(&self) -> bool {
        self.receiving
    }
    fn shutdown(&mut self) {}
}

struct Bench {
    core: Core,
    mapping: &'static Arc<Mapping>,
    tickets: u64,
}

impl Bench {
    fn new(backend: Endless) -> Self {
        let bytes = 2 * PART as u64;
        let (mapping, _fd) = Mapping::memfd("bench", bytes, true).expect("memory");
        let mapping: &'static Arc<Mapping> = Box::leak(Box::new(Arc::new(mapping)));
        let entry = TableEntry {
            base: BusAddr(BASE),
            mapping: Arc::clone(mapping),
            offset: 0,
            len: 2 * PART,
            access: Access::ReadWrite,
        };
        let table = Arc::new(WindowTable::new(vec![entry]).expect("a window"));
        let net = Net::new(&Settings::new(Mac([2, 0, 0, 0, 0, 1])), Box::new(backend));
        let mut core = Core::new();
        core.command(SLOT, 0, Command::Add(Box::new(net)), &mut NoFds);
        let mut bench = Self {
            core,
            mapping,
            tickets: 0,
        };
        bench.tell(Command::SetMemory(table));
        bench
    }

    fn tell(&mut self, command: Command) {
        self.tickets += 1;
        self.core.command(SLOT, self.tickets, command, &mut NoFds);
        self.core.take_replies();
    }

    fn queue(&mut self, index: usize) -> DriverQueue<'static, Vec<DriverSlot>> {
        let layout = Layout::new(SIZE, 0).expect("a size");
        let ram = self.mapping.ram();
        let rings = ram.get(index * PART, layout.total_len()).expect("inside");
        let base = BusAddr(BASE + (index * PART) as u64);
        let slots = vec![DriverSlot::default(); usize::from(SIZE)];
        let queue = DriverQueue::new(layout, QueueFeatures::default(), rings, base, slots);
        let queue = queue.expect("a queue");
        self.tell(Command::StartQueue(QueueStart {
            queue: index,
            config: queue.config(),
            features: FeatureSet::EMPTY,
            resume: None,
            record: None,
        }));
        queue
    }

    fn go(&mut self, queue: usize) {
        self.core.kick(SLOT, queue);
        let now = Instant::now();
        while self.core.step(now) {}
        self.core.take_replies();
    }
}

fn buffer(queue: usize, index: usize) -> BusAddr {
    BusAddr(BASE + (queue * PART + BUFFERS + index % usize::from(SIZE) * BUFFER) as u64)
}

/// Nanoseconds for each frame of `len` bytes in one direction.
fn measure(len: usize, receiving: bool, head: bool, frames: usize) -> f64 {
    let mut bench = Bench::new(Endless {
        frame: vec![2; len],
        receiving,
        head,
    });
    let queue = usize::from(!receiving);
    let mut ring = bench.queue(queue);
    bench.tell(Command::DriverOk(FeatureSet::from_bits(&[MRG_RXBUF])));
    let bytes = u32::try_from(len + 12).expect("short");
    let buffer_len = u32::try_from(BUFFER).expect("short");
    let mut done = 0;
    let start = Instant::now();
    while done < frames {
        for index in 0..BATCH {
            let at = buffer(queue, done + index);
            let added = if receiving {
                ring.add_direct(&[], &[(at, buffer_len)])
            } else {
                ring.add_direct(&[(at, bytes)], &[])
            };
            added.expect("room");
        }
        ring.publish().expect("published");
        bench.go(queue);
        while ring.pop_used().expect("sound").is_some() {
            done += 1;
        }
    }
    start.elapsed().as_nanos() as f64 / done as f64
}

fn main() {
    let quick = std::env::args().any(|arg| arg == "--test");
    let (frames, repetitions) = if quick {
        (1000, 1)
    } else {
        (300_000, REPETITIONS)
    };
    for (name, len, receiving, head) in [
        ("receive 64 bytes, pair known", 64, true, false),
        ("receive 64 bytes, by its head", 64, true, true),
        ("receive 1500 bytes, by its head", 1500, true, true),
        ("transmit 64 bytes", 64, false, false),
    ] {
        let mut times: Vec<f64> = (0..repetitions)
            .map(|_| measure(len, receiving, head, frames))
            .collect();
        times.sort_by(f64::total_cmp);
        println!("{name:32} {:7.1} ns", times[times.len() / 2]);
    }
}
