// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A function with a scripted device, and things that a driver, a VMM and the device may do to it in any order.
#![allow(dead_code, unreachable_pub, reason = "each program uses another part")]

use crate::scripted::Scripted;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use virtio_msg::QueueIndex;
use vmsg_proxy::session::OpError;
use vmsg_proxy::transport::pci::{Function, Irq, Region};
use vmsg_proxy::transport::{Options, SharedMemory};

/// Where an access goes.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub region: u8,
    pub offset: u16,
    pub len: usize,
}

impl Place {
    fn region(self) -> Region {
        match self.region % 10 {
            0 | 1 => Region::Config,
            2 => Region::Bar(1),
            3 => Region::Bar(2),
            9 => Region::Bar(self.region),
            _ => Region::Bar(4),
        }
    }

    /// Most often where registers are.
    fn offset(self) -> u64 {
        let offset = u64::from(self.offset);
        match self.region() {
            Region::Config => offset % 0x110,
            Region::Bar(4) => offset % 0x4 * 0x1000 + (offset >> 4) % 0x48,
            Region::Bar(1) if offset % 2 == 0 => 0x800 + (offset >> 1) % 0x20,
            Region::Bar(1) => (offset >> 1) % 0x60,
            _ => offset * 3,
        }
    }
}

/// What may happen.
#[derive(Clone, Copy, Debug)]
pub enum Act {
    Read(Place),
    Write(Place, u64),
    Step(u8),
    Event(u8),
    Device(u8),
}

pub struct Bench {
    function: Function<Scripted>,
    event: Arc<OwnedFd>,
}

impl Bench {
    pub fn new() -> Bench {
        let options = Options {
            retry: Duration::ZERO,
            ..Options::default()
        };
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = Arc::new(eventfd(0, flags).unwrap());
        let shared = SharedMemory {
            id: 1,
            len: 0x2000,
            file_offset: 0,
            // Not one that can be read at an offset: what comes then is defined, too.
            file: event.clone(),
        };
        let device = Scripted::new(1, &[256, 0, 64], 21);
        Bench {
            function: Function::new(device, options, vec![shared]),
            event,
        }
    }

    fn set(&mut self, at: u64, width: usize, value: u64) {
        let data = value.to_le_bytes();
        self.function.write(Region::Bar(4), at, &data[..width]);
    }

    fn status(&mut self) -> u8 {
        let mut status = [0];
        self.function.read(Region::Bar(4), 0x14, &mut status);
        status[0]
    }

    /// Whatever has happened: with a device that does its part, a driver that begins with a reset gets to DRIVER_OK with its queue.
    pub fn comes_up(&mut self) {
        let device = self.function.backend_mut();
        (device.fail, device.picky, device.breaks) = (None, false, false);
        self.set(0x14, 1, 0);
        assert_eq!(self.status(), 0);
        for (at, width, value) in [
            (0x14, 1, 3),
            (0x8, 4, 1),
            (0xc, 4, 1),
            (0x14, 1, 0xb),
            (0x16, 2, 2),
            (0x20, 8, 0x1000),
            (0x28, 8, 0x2000),
            (0x30, 8, 0x3000),
            (0x1c, 2, 1),
            (0x14, 1, 0xf),
        ] {
            self.set(at, width, value);
        }
        assert_eq!(self.status(), 0xf);
        let mut enabled = [0; 2];
        self.function.read(Region::Bar(4), 0x1c, &mut enabled);
        assert_eq!(enabled, [1, 0]);
        assert_eq!(self.function.backend().queues.len(), 1);
    }

    pub fn read(&mut self, place: Place) {
        let mut data = [0; 32];
        let len = place.len.min(32);
        self.function
            .read(place.region(), place.offset(), &mut data[..len]);
    }

    /// All registers, without those whose reading does something: the ISR, what shows it, and the data of the access window.
    pub fn image(&mut self) -> Vec<u8> {
        let mut image = vec![0; 0x100 + 0x1000 + 0x60];
        let (config, rest) = image.split_at_mut(0x100);
        let (msix, common) = rest.split_at_mut(0x1000);
        self.function.read(Region::Config, 0, &mut config[..0xa0]);
        self.function.read(Region::Bar(1), 0, msix);
        self.function.read(Region::Bar(4), 0, &mut common[..0x40]);
        let device = &mut common[0x40..];
        self.function.read(Region::Bar(4), 0x2000, device);
        config[6] = 0;
        image
    }
}

pub fn act(bench: &mut Bench, act: &Act) {
    match *act {
        Act::Read(place) => bench.read(place),
        Act::Write(place, value) => {
            let mut data = value.to_le_bytes().repeat(4);
            data.truncate(place.len);
            bench.function.write(place.region(), place.offset(), &data);
        }
        Act::Step(step) => {
            let queue = u64::from(step >> 4);
            match step & 15 {
                0 => bench.set(0x14, 1, 0),
                1 => bench.set(0x14, 1, 3),
                2 => bench.set(0x8, 4, 1),
                3 => bench.set(0xc, 4, 0x101),
                4 => bench.set(0x14, 1, 0xb),
                5 => bench.set(0x14, 1, 0xf),
                6 => bench.set(0x16, 2, queue & 3),
                7 => bench.set(0x18, 2, 16 << (queue & 3)),
                8 => bench.set(0x20, 8, 0x1000),
                9 => bench.set(0x28, 8, 0x2000),
                10 => bench.set(0x30, 8, 0x3000),
                11 => bench.set(0x1c, 2, 1),
                12 => bench.set(0x3a, 2, 1),
                13 => bench.set(0x1a, 2, queue),
                14 => bench.set(0x10, 2, queue),
                _ => bench.set(0x3000 + 4 * queue, 2, queue),
            }
        }
        Act::Event(event) => {
            let vector = Irq::Msix(u16::from(event >> 4));
            match event & 15 {
                0 => drop(
                    bench
                        .function
                        .set_trigger(vector, Some(bench.event.clone())),
                ),
                1 => drop(bench.function.set_trigger(vector, None)),
                2 => drop(
                    bench
                        .function
                        .set_trigger(Irq::Intx, Some(bench.event.clone())),
                ),
                3 => bench.function.mask(vector),
                4 => bench.function.unmask(vector),
                5 => bench.function.unmask(Irq::Intx),
                6 => bench.function.reset(),
                7 => bench.function.trigger(vector),
                8 => bench.function.config_changed(),
                9 => bench.function.needs_reset(),
                _ => bench.function.queue_used(QueueIndex(u32::from(event >> 4))),
            }
            bench.function.take_route_changes();
        }
        Act::Device(how) => {
            let device = bench.function.backend_mut();
            match how & 7 {
                0 => device.fail = Some(OpError::TimedOut),
                1 => device.picky = how & 8 != 0,
                2 => device.breaks = how & 8 != 0,
                3 => device.config[usize::from(how >> 4)] ^= how,
                _ => device.fail = None,
            }
        }
    }
}

/// A story told by any bytes; in its end a driver comes up.
pub fn story(bytes: &[u8]) {
    let mut bench = Bench::new();
    for bytes in bytes.chunks(8) {
        let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
        let place = Place {
            region: byte(1),
            offset: u16::from_le_bytes([byte(2), byte(3)]),
            len: usize::from(byte(4)) % 17,
        };
        let value = u64::from_le_bytes([byte(5), byte(6), byte(7), 0, byte(5), byte(6), 0, 0]);
        let next = match byte(0) % 8 {
            0 | 1 => Act::Read(place),
            2..=4 => Act::Write(place, value),
            5 => Act::Step(byte(1)),
            6 => Act::Event(byte(1)),
            _ => Act::Device(byte(1)),
        };
        act(&mut bench, &next);
    }
    bench.comes_up();
}
