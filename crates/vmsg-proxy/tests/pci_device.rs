// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver that does what the specification says, step by step, on a PCI function with an entropy device of a running host behind it.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod devices;
#[path = "../../vmsg-driver/tests/host/mod.rs"]
mod host;

use devices::{Memory, Seat};
use host::{PATIENCE, RNG};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;
use virtio_msg::QueueIndex;
use vmsg_driver::DmaBuffer;
use vmsg_driver::virtio_drivers::StaticPool;
use vmsg_proxy::session::Event;
use vmsg_proxy::transport::pci::{Function, Irq, Region, Route};
use vmsg_proxy::transport::{Direct, Options};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures};

const QUEUE: QueueIndex = QueueIndex(0);
const SIZE: u16 = 64;
const BAR: Region = Region::Bar(4);
const STATUS: u64 = 0x14;
const MSIX_CONTROL: u64 = 0x42;

/// What a VMM has of a function.
struct Vmm {
    seat: Seat,
    function: Function<Direct>,
}

impl Vmm {
    fn new() -> Vmm {
        let seat = Seat::new(RNG);
        let function = Function::new(seat.direct(), Options::default(), Vec::new());
        Vmm { seat, function }
    }

    fn get(&mut self, at: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.function.read(BAR, at, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    fn set(&mut self, at: u64, width: usize, value: u64) {
        let data = value.to_le_bytes();
        self.function.write(BAR, at, &data[..width]);
        self.follow_routes();
    }

    /// Who may ring the interrupt itself does so from now on.
    fn follow_routes(&mut self) {
        for (queue, route) in self.function.take_route_changes() {
            let call = match route {
                Route::Direct(call) => Some(call),
                Route::Through | Route::Nobody => None,
            };
            self.function.backend_mut().set_call(queue, call).unwrap();
        }
    }

    fn trigger(&mut self, irq: Irq) -> Arc<OwnedFd> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = Arc::new(eventfd(0, flags).unwrap());
        self.function.set_trigger(irq, Some(event.clone())).unwrap();
        self.follow_routes();
        event
    }

    /// The device says that it has used buffers, and the driver is to be told.
    fn used(&mut self) {
        let queue = self.seat.used();
        self.function.queue_used(queue);
    }
}

/// Waits until the interrupt has come.
#[track_caller]
fn interrupt(event: &OwnedFd) {
    let limit = Timespec::try_from(PATIENCE).unwrap();
    let ready = poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&limit)).unwrap();
    assert_eq!(ready, 1, "no interrupt");
    rustix::io::read(event, &mut [0; 8]).unwrap();
}

fn is_quiet(event: &OwnedFd) -> bool {
    rustix::io::read(event, &mut [0; 8]).is_err()
}

/// The driver's memory.
struct Driver<'m> {
    queue: DriverQueue<'m, Vec<DriverSlot>>,
    _ring: DmaBuffer<'m>,
    bytes: DmaBuffer<'m>,
}

impl Driver<'_> {
    /// Status, features, vectors, queue, DRIVER_OK (virtio 1.3 §3.1.1 and §4.1.5.1).
    fn bring_up(vmm: &mut Vmm, vectors: bool) -> Driver<'static> {
        vmm.set(STATUS, 1, 0);
        let end = Instant::now() + PATIENCE;
        while vmm.get(STATUS, 1) != 0 {
            assert!(Instant::now() < end, "not reset");
        }
        vmm.set(STATUS, 1, 1);
        vmm.set(STATUS, 1, 3);
        // EVENT_IDX; VERSION_1, ACCESS_PLATFORM, RING_RESET.
        for (block, wanted) in [(0, 1 << 29), (1, 0x103)] {
            vmm.set(0x0, 4, block);
            assert_eq!(vmm.get(0x4, 4) & wanted, wanted);
            vmm.set(0x8, 4, block);
            vmm.set(0xc, 4, wanted);
        }
        vmm.set(STATUS, 1, 0xb);
        assert_eq!(vmm.get(STATUS, 1), 0xb);
        if vectors {
            vmm.set(0x10, 2, 0);
        }
        let driver = Driver::queue(vmm, vectors);
        vmm.set(STATUS, 1, 0xf);
        assert_eq!(vmm.get(STATUS, 1), 0xf);
        driver
    }

    /// Sets the queue up in new memory.
    fn queue(vmm: &mut Vmm, vectors: bool) -> Driver<'static> {
        let layout = Layout::new(SIZE, 0).unwrap();
        let ring = Memory::pool().alloc(0x4000).unwrap();
        let bytes = Memory::pool().alloc(0x1000).unwrap();
        let features = QueueFeatures {
            event_idx: true,
            indirect: false,
        };
        let slots = vec![DriverSlot::default(); SIZE.into()];
        let queue = DriverQueue::new(layout, features, ring.ram(), ring.addr(), slots).unwrap();
        vmm.set(0x16, 2, 0);
        vmm.set(0x18, 2, SIZE.into());
        if vectors {
            vmm.set(0x1a, 2, 1);
            assert_eq!(vmm.get(0x1a, 2), 1);
        }
        let config = queue.config();
        for (at, area) in [
            (0x20, config.desc),
            (0x28, config.driver),
            (0x30, config.device),
        ] {
            vmm.set(at, 4, area.0 & 0xffff_ffff);
            vmm.set(at + 4, 4, area.0 >> 32);
        }
        vmm.set(0x1c, 2, 1);
        assert_eq!(vmm.get(0x1c, 2), 1);
        Driver {
            queue,
            _ring: ring,
            bytes,
        }
    }

    fn ask(&mut self, vmm: &mut Vmm) {
        self.bytes.ram().fill(0);
        self.queue.add(&[], &[(self.bytes.addr(), 64)]).unwrap();
        if self.queue.publish().unwrap() {
            vmm.set(0x3000, 2, 0);
        }
    }

    /// Takes the bytes, which must have come, and asks to be told of the next ones.
    #[track_caller]
    fn take(&mut self) {
        let used = self.queue.pop_used().unwrap().expect("random bytes");
        assert_eq!(used.written, 64);
        let mut bytes = [0; 64];
        self.bytes.ram().read(0, &mut bytes);
        assert_ne!(bytes, [0; 64]);
        self.queue.enable_notifications().unwrap();
    }

    /// Sleeps until there are bytes. A replay rings without any.
    #[track_caller]
    fn wait(&mut self, vector: &OwnedFd) {
        while !self.queue.enable_notifications().unwrap() {
            interrupt(vector);
        }
    }

    fn end(self, vmm: &mut Vmm) {
        vmm.set(STATUS, 1, 0);
        assert_eq!(vmm.get(STATUS, 1), 0, "nothing touches the memory any more");
    }
}

fn msix_on(vmm: &mut Vmm) -> Arc<OwnedFd> {
    let control = 0x8000u16.to_le_bytes();
    vmm.function.write(Region::Config, MSIX_CONTROL, &control);
    vmm.trigger(Irq::Msix(0));
    vmm.trigger(Irq::Msix(1))
}

#[test]
fn the_device_rings_the_vector_itself() {
    let mut vmm = Vmm::new();
    let vector = msix_on(&mut vmm);
    for _ in 0..20 {
        let mut driver = Driver::bring_up(&mut vmm, true);
        assert_eq!(vmm.function.route(QUEUE), Route::Direct(vector.clone()));
        for _ in 0..50 {
            driver.ask(&mut vmm);
            interrupt(&vector);
            driver.take();
        }
        driver.end(&mut vmm);
    }
}

#[test]
fn a_masked_vector_is_pending_until_it_is_unmasked() {
    let mut vmm = Vmm::new();
    let vector = msix_on(&mut vmm);
    let mut driver = Driver::bring_up(&mut vmm, true);
    let mask = |vmm: &mut Vmm, on: u8| {
        let control = [on, 0, 0, 0];
        vmm.function.write(Region::Bar(1), 16 + 12, &control);
        vmm.follow_routes();
    };
    for _ in 0..10 {
        mask(&mut vmm, 1);
        driver.ask(&mut vmm);
        vmm.used();
        assert!(is_quiet(&vector));
        let mut pending = [0; 8];
        vmm.function.read(Region::Bar(1), 0x800, &mut pending);
        assert_eq!(pending[0], 0b10);
        mask(&mut vmm, 0);
        interrupt(&vector);
        driver.take();
        driver.ask(&mut vmm);
        interrupt(&vector);
        driver.take();
    }
    driver.end(&mut vmm);
}

#[test]
fn the_line_tells_of_used_buffers_without_msix() {
    let mut vmm = Vmm::new();
    let line = vmm.trigger(Irq::Intx);
    let mut driver = Driver::bring_up(&mut vmm, false);
    for _ in 0..50 {
        driver.ask(&mut vmm);
        vmm.used();
        interrupt(&line);
        assert_eq!(vmm.get(0x1000, 1), 1);
        driver.take();
        vmm.function.unmask(Irq::Intx);
        assert!(is_quiet(&line));
    }
    driver.end(&mut vmm);
}

#[test]
fn a_queue_that_was_reset_alone_starts_again_in_other_memory() {
    let mut vmm = Vmm::new();
    let vector = msix_on(&mut vmm);
    let mut driver = Driver::bring_up(&mut vmm, true);
    for _ in 0..10 {
        driver.ask(&mut vmm);
        interrupt(&vector);
        driver.take();
        vmm.set(0x3a, 2, 1);
        assert_eq!(vmm.get(0x3a, 2), 0);
        assert_eq!(vmm.get(0x1c, 2), 0);
        driver = Driver::queue(&mut vmm, true);
    }
    driver.end(&mut vmm);
}

#[test]
fn a_host_that_restarts_is_not_noticed() {
    let mut vmm = Vmm::new();
    let vector = msix_on(&mut vmm);
    let mut driver = Driver::bring_up(&mut vmm, true);
    for _ in 0..3 {
        vmm.seat.stop_host();
        driver.ask(&mut vmm);
        vmm.seat.start_host();
        driver.wait(&vector);
        driver.take();
        vmm.seat
            .until(|event| matches!(event, Event::Ready { replayed: true, .. }));
        driver.ask(&mut vmm);
        driver.wait(&vector);
        driver.take();
        assert_eq!(vmm.get(STATUS, 1), 0xf);
    }
    driver.end(&mut vmm);
}
