// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One way, as fast as it goes.

use crate::measure::{Case, Places, Plan, compare, run_on};
use crate::other::{Other, POLL};
use crate::{Site, connect_to};
use std::hint::spin_loop;
use std::sync::Arc;
use std::time::Instant;
use virtio_msg::{Channel, ChannelError, DevNum, Frame, Message, QueueIndex, Token};
use vmsg_bus::DriverBus;
use vmsg_mem::amp::{self, Side, Start};
use vmsg_mem::spsc::{Consumer, Layout, Producer};
use vmsg_mem::{DeviceSlice, Mapping};

const SIZE: usize = 64;
/// Bytes of a page with a queue, and elements of an AMP layout, as on the bus.
const PAGE: usize = 4096;
const ELEMENTS: u16 = 60;

/// A queue's two ends.
trait Sender {
    fn push(&mut self, message: &[u8]) -> bool;
    fn publish(&mut self);
}

trait Receiver {
    fn pop(&mut self, message: &mut [u8; SIZE]) -> bool;
    fn release(&mut self);
}

impl Sender for Producer<DeviceSlice> {
    fn push(&mut self, message: &[u8]) -> bool {
        self.try_push(message).is_ok()
    }
    fn publish(&mut self) {
        let _ = self.publish();
    }
}

impl Receiver for Consumer<DeviceSlice> {
    fn pop(&mut self, message: &mut [u8; SIZE]) -> bool {
        self.try_pop(message).expect("a sound queue")
    }
    fn release(&mut self) {
        let _ = self.release();
    }
}

impl Sender for amp::Queue<DeviceSlice> {
    fn push(&mut self, message: &[u8]) -> bool {
        self.try_push(message).is_ok()
    }
    fn publish(&mut self) {
        let _ = self.publish();
    }
}

impl Receiver for amp::Queue<DeviceSlice> {
    fn pop(&mut self, message: &mut [u8; SIZE]) -> bool {
        let popped = self.try_pop_sized(message, |_| SIZE);
        popped.expect("a sound queue").is_some()
    }
    fn release(&mut self) {
        self.release();
    }
}

/// Nanoseconds for each of `count` messages; one in `batch` is shown, and given back, together with those before it.
fn one_way(
    places: &Places,
    count: u32,
    batch: u32,
    mut sender: impl Sender,
    mut receiver: impl Receiver + Send,
) -> f64 {
    let mut start = None;
    let other = || {
        let mut message = [0; SIZE];
        for number in 1..=count {
            while !receiver.pop(&mut message) {
                receiver.release();
                spin_loop();
            }
            std::hint::black_box(&message);
            if number % batch == 0 {
                receiver.release();
            }
        }
    };
    places.beside(other, || {
        start = Some(Instant::now());
        let mut message = [1; SIZE];
        for number in 1..=count {
            message[..4].copy_from_slice(&number.to_le_bytes());
            while !sender.push(&message) {
                sender.publish();
                spin_loop();
            }
            if number % batch == 0 {
                sender.publish();
            }
        }
        sender.publish();
    });
    let all = start.expect("begun").elapsed();
    all.as_secs_f64() * 1e9 / f64::from(count)
}

/// The queues alone, as they lie in the memory of the bus.
pub(crate) fn queues(plan: Plan, places: &Places) {
    run_on(&places.here);
    let count = plan.requests;
    let (memory, _file) = Mapping::memfd("queue", 1 << 16, true).expect("memory");
    let memory = Arc::new(memory);
    // By words, as the bus does it in memory of a device.
    let part = |len| DeviceSlice::of_ram(Arc::clone(&memory), 0, len).expect("room");
    let spsc = |batch| {
        memory.ram().fill(0);
        let producer = Producer::new(part(PAGE), Layout::PLAIN).expect("a page");
        let consumer = Consumer::new(part(PAGE), Layout::PLAIN).expect("a page");
        one_way(places, count, batch, producer, consumer)
    };
    let amp = |batch| {
        memory.ram().fill(0);
        let layout = amp::Layout::packed(ELEMENTS, 64).expect("a layout");
        let end = |side| {
            let memory = part(layout.len());
            amp::Queue::new(memory, &layout, side, Start::default()).expect("room")
        };
        one_way(places, count, batch, end(Side::Driver), end(Side::Device))
    };
    let cases = vec![
        Case::stream("spsc, each shown at once", 64, || spsc(1)),
        Case::stream("amp, each shown at once", 64, || amp(1)),
        Case::stream("spsc, 2 at a time", 64, || spsc(2)),
        Case::stream("amp, 2 at a time", 64, || amp(2)),
        Case::stream("spsc, 16 at a time", 64, || spsc(16)),
        Case::stream("amp, 16 at a time", 64, || amp(16)),
    ];
    compare(plan, places.name, cases);
}

/// Sends so many, each `batch` of them flushed, and waits until the last has come.
fn send(bus: &mut DriverBus, count: u32, batch: u32) -> f64 {
    let mut out = [0; 64];
    let kick = |number: u32| {
        let message = Message::EventAvail {
            queue: QueueIndex(number % 4),
            next: 0,
        };
        Frame::new(DevNum(0), Token(0), message)
    };
    let mut pass = |bus: &mut DriverBus, frame: &Frame<'_>| {
        let len = frame.encode(&mut out).expect("short");
        loop {
            match bus.try_send(&out[..len]) {
                Ok(()) => return,
                Err(ChannelError::Full) => spin_loop(),
                Err(error) => panic!("{error}"),
            }
        }
    };
    let mut buf = vec![0; bus.max_message_size()];
    let mut answer = |bus: &mut DriverBus| {
        bus.flush().expect("a bus");
        while bus.try_recv(&mut buf).expect("a bus").is_none() {
            spin_loop();
        }
    };
    let ping = Frame::bus(Token(1), Message::Ping { data: 1 });
    // Who has fallen asleep wakes.
    pass(bus, &ping);
    answer(bus);
    let start = Instant::now();
    for number in 1..=count {
        pass(bus, &kick(number));
        if number % batch == 0 {
            bus.flush().expect("a bus");
        }
    }
    pass(bus, &ping);
    answer(bus);
    start.elapsed().as_secs_f64() * 1e9 / f64::from(count)
}

/// Through the bus, with its doorbells.
pub(crate) fn buses(plan: Plan, places: &Places, site: &Site) {
    run_on(&places.here);
    let count = plan.requests / 5;
    let micros = POLL.as_micros().to_string();
    let open = |bus: &str| {
        let what = ["echo", bus, &micros];
        let other = Other::start(&places.there, &places.here, &what);
        (other, connect_to(bus))
    };
    let mut ends: Vec<(&str, Other, DriverBus)> = [
        ("unix", site.unix("rate")),
        ("ivshmem spsc", site.ivshmem("spsc", 0x6_0000)),
        ("ivshmem amp", site.ivshmem("amp", 0x7_0000)),
    ]
    .map(|(name, bus)| {
        let (other, end) = open(&bus);
        (name, other, end)
    })
    .into();
    let cases = ends.iter_mut().flat_map(|(name, _, bus)| {
        let bus = std::cell::RefCell::new(bus);
        let bus = std::rc::Rc::new(bus);
        [1, 16].map(|batch| {
            let bus = std::rc::Rc::clone(&bus);
            let name = format!("{name}, {batch} at a time");
            Case::stream(&name, 16, move || {
                std::thread::sleep(POLL);
                send(&mut bus.borrow_mut(), count, batch)
            })
        })
    });
    compare(plan, places.name, cases.collect());
}
