// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a driver and a VMM see in a PCI function, with a scripted device behind it.
#![allow(missing_docs)]

mod scripted;

use rustix::event::{EventfdFlags, eventfd};
use scripted::{Call, Scripted};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use virtio_msg::QueueIndex;
use vmsg_mem::Mapping;
use vmsg_proxy::session::OpError;
use vmsg_proxy::transport::pci::{Function, Irq, Region, Route};
use vmsg_proxy::transport::{Options, SharedMemory};

const VIRTIO: Region = Region::Bar(4);
const MSIX: Region = Region::Bar(1);
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const STATUS: u64 = 0x14;
const SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const VECTOR: u64 = 0x1a;
const ENABLE: u64 = 0x1c;

/// A function and the driver of it.
struct Driver(Function<Scripted>);

fn event() -> Arc<OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
}

/// How often it was rung since the last time.
fn rings(event: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(event, &mut count) {
        Ok(8) => u64::from_ne_bytes(count),
        Err(rustix::io::Errno::AGAIN) => 0,
        other => panic!("{other:?}"),
    }
}

impl Driver {
    fn of(device: Scripted, shared: Vec<SharedMemory>) -> Driver {
        let options = Options {
            retry: Duration::ZERO,
            ..Options::default()
        };
        Driver(Function::new(device, options, shared))
    }

    fn net() -> Driver {
        Driver::of(Scripted::net(), Vec::new())
    }

    fn get(&mut self, region: Region, at: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.0.read(region, at, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    fn set(&mut self, region: Region, at: u64, width: usize, value: u64) {
        self.0.write(region, at, &value.to_le_bytes()[..width]);
    }

    fn config(&mut self, at: u64, width: usize) -> u64 {
        self.get(Region::Config, at, width)
    }

    fn calls(&mut self) -> Vec<Call> {
        self.0.backend_mut().take_calls()
    }

    /// Offsets of the capabilities of this kind; of virtio by their types.
    fn capabilities(&mut self) -> BTreeMap<(u64, u64), Vec<u64>> {
        let mut found: BTreeMap<_, Vec<u64>> = BTreeMap::new();
        assert_eq!(self.config(6, 2) & 0x10, 0x10);
        let mut at = self.config(0x34, 1);
        while at != 0 {
            assert!((0x40..0x100).contains(&at) && at.is_multiple_of(4));
            let id = self.config(at, 1);
            let kind = if id == 9 { self.config(at + 3, 1) } else { 0 };
            found.entry((id, kind)).or_default().push(at);
            at = self.config(at + 1, 1);
        }
        found
    }

    fn msix_capability(&mut self) -> u64 {
        self.capabilities()[&(0x11, 0)][0]
    }

    /// As a driver of the specification does it, up to DRIVER_OK.
    fn bring_up(&mut self, queues: u64, vectors: bool) {
        self.set(VIRTIO, STATUS, 1, 0);
        assert_eq!(self.get(VIRTIO, STATUS, 1), 0);
        self.set(VIRTIO, STATUS, 1, 1);
        self.set(VIRTIO, STATUS, 1, 3);
        self.set(VIRTIO, 0x0, 4, 1);
        assert_eq!(self.get(VIRTIO, 0x4, 4) & 1, 1);
        self.set(VIRTIO, 0x8, 4, 1);
        self.set(VIRTIO, 0xc, 4, 0x101);
        self.set(VIRTIO, STATUS, 1, 0xb);
        assert_eq!(self.get(VIRTIO, STATUS, 1), 0xb);
        if vectors {
            self.set(VIRTIO, 0x10, 2, 0);
            assert_eq!(self.get(VIRTIO, 0x10, 2), 0);
        }
        for queue in 0..queues {
            self.set(VIRTIO, SELECT, 2, queue);
            self.set(VIRTIO, QUEUE_SIZE, 2, 32);
            if vectors {
                self.set(VIRTIO, VECTOR, 2, queue + 1);
                assert_eq!(self.get(VIRTIO, VECTOR, 2), queue + 1);
            }
            // One as halves, the others whole.
            self.set(VIRTIO, 0x20, 4, 0x1000);
            self.set(VIRTIO, 0x24, 4, queue);
            self.set(VIRTIO, 0x28, 8, 0x2000);
            self.set(VIRTIO, 0x30, 8, 0x3000);
            self.set(VIRTIO, ENABLE, 2, 1);
            assert_eq!(self.get(VIRTIO, ENABLE, 2), 1);
        }
        self.set(VIRTIO, STATUS, 1, 0xf);
        assert_eq!(self.get(VIRTIO, STATUS, 1), 0xf);
    }

    fn enable_msix(&mut self, on: bool) {
        let at = self.msix_capability();
        self.set(Region::Config, at + 2, 2, u64::from(on) << 15);
    }

    fn with_vectors(&mut self) -> Vec<Arc<OwnedFd>> {
        let events: Vec<_> = (0..self.0.vectors()).map(|_| event()).collect();
        self.enable_msix(true);
        for (vector, event) in (0..).zip(&events) {
            let trigger = Some(event.clone());
            self.0.set_trigger(Irq::Msix(vector), trigger).unwrap();
        }
        events
    }
}

#[test]
fn the_header_says_what_the_function_is() {
    let mut driver = Driver::net();
    let table: &[(u64, usize, u64)] = &[
        (0x00, 4, 0x1041_1af4),
        (0x04, 2, 0),
        (0x06, 2, 0x10),
        (0x08, 4, 0x0200_0001),
        (0x0e, 1, 0),
        (0x10, 4, 0),
        (0x14, 4, 0),
        (0x18, 4, 0),
        (0x20, 4, 4),
        (0x24, 4, 0),
        (0x2c, 4, 0x1100_1af4),
        (0x30, 4, 0),
        (0x34, 1, 0x40),
        (0x3d, 1, 1),
        (0x100, 4, 0xffff_ffff),
    ];
    for &(at, width, expected) in table {
        assert_eq!(driver.config(at, width), expected, "{at:#x}");
    }
    for (device, id, class) in [
        (2, 0x1042, 0x01_0000),
        (3, 0x1043, 0x07_8000),
        (4, 0x1044, 0x00_ff00),
        (16, 0x1050, 0x03_8000),
        (26, 0x105a, 0x01_8000),
    ] {
        let mut driver = Driver::of(Scripted::new(device, &[8], 0), Vec::new());
        assert_eq!(driver.config(2, 2), id);
        assert_eq!(driver.config(8, 4) >> 8, class);
    }
}

#[test]
fn bars_are_sized_and_placed() {
    let (_, file) = Mapping::memfd("shm", 0x3_0000, false).unwrap();
    let shared = |id, len| SharedMemory {
        id,
        len,
        file_offset: 0,
        file: Arc::new(file.try_clone().unwrap()),
    };
    let mut driver = Driver::of(
        Scripted::net(),
        vec![shared(0, 0x1000), shared(1, 0x2_0000)],
    );
    for (bar, flags, size) in [(1u64, 0u64, 0x1000u64), (2, 0xc, 0x4_0000), (4, 4, 0x4000)] {
        let at = 0x10 + 4 * bar;
        assert_eq!(
            driver
                .0
                .region_size(Region::Bar(u8::try_from(bar).unwrap())),
            size
        );
        let wide = flags & 4 != 0;
        let width = if wide { 8 } else { 4 };
        let all = if wide { u64::MAX } else { 0xffff_ffff };
        driver.set(Region::Config, at, width, all);
        assert_eq!(driver.config(at, width), all & !(size - 1) | flags);
        let base = 0x1234_5678_9abc_def0 & all & !(size - 1);
        for half in 0..width as u64 / 4 {
            driver.set(Region::Config, at + 4 * half, 4, base >> (32 * half));
        }
        assert_eq!(driver.config(at, width), base | flags);
    }
    for bar in [0, 3, 5] {
        assert_eq!(driver.0.region_size(Region::Bar(bar)), 0);
    }
    for at in [0x10, 0x30] {
        driver.set(Region::Config, at, 4, 0xffff_ffff);
        assert_eq!(driver.config(at, 4), 0, "not there");
    }
    driver.0.reset();
    assert_eq!(driver.config(0x20, 8), 4);
}

#[test]
fn capabilities_lead_to_the_structures() {
    let mut driver = Driver::net();
    let found = driver.capabilities();
    for (kind, offset, len) in [(1, 0, 0x40), (2, NOTIFY, 12), (3, ISR, 1), (4, DEVICE, 24)] {
        let at = found[&(9, kind)][0];
        assert_eq!(driver.config(at + 4, 1), 4, "BAR");
        assert_eq!(driver.config(at + 8, 4), offset);
        assert_eq!(driver.config(at + 12, 4), len);
        assert!(offset + len <= driver.0.region_size(VIRTIO));
    }
    assert_eq!(driver.config(found[&(9, 2)][0] + 16, 4), 4);
    let msix = found[&(0x11, 0)][0];
    assert_eq!(driver.config(msix + 2, 2), 3, "four vectors");
    assert_eq!(driver.config(msix + 4, 4), 1);
    assert_eq!(driver.config(msix + 8, 4), 0x801);
    assert_eq!(found.len(), 6);
    // Without configuration there is no structure for it.
    let mut rng = Driver::of(Scripted::new(4, &[64], 0), Vec::new());
    assert!(!rng.capabilities().contains_key(&(9, 4)));
    assert_eq!(rng.get(VIRTIO, DEVICE, 8), 0);
}

#[test]
fn the_largest_function_has_room_for_everything() {
    let sizes = vec![8; 3000];
    let driver = Driver::of(Scripted::new(3, &sizes, 4), Vec::new());
    assert_eq!(driver.0.core().queue_count(), 1024);
    assert_eq!(driver.0.vectors(), 1025);
    assert_eq!(driver.0.region_size(MSIX), 0x1_0000);
}

#[test]
fn what_is_read_only_stays_as_it_is() {
    let mut driver = Driver::net();
    let mut before = [0; 256];
    driver.0.read(Region::Config, 0, &mut before);
    driver.0.write(Region::Config, 0, &[0xff; 256]);
    let mut after = [0; 256];
    driver.0.read(Region::Config, 0, &mut after);
    assert_eq!(
        driver.config(4, 2),
        0x546,
        "memory, bus master, parity, SERR#, INTx"
    );
    for at in [
        0x00, 0x02, 0x06, 0x08, 0x09, 0x2c, 0x34, 0x3d, 0x40, 0x44, 0x50,
    ] {
        assert_eq!(before[at], after[at], "{at:#x}");
    }
    driver.0.reset();
    driver.0.read(Region::Config, 0, &mut after);
    assert_eq!(before, after);
}

#[test]
fn a_driver_comes_up_in_the_order_of_the_specification() {
    let mut driver = Driver::net();
    assert_eq!(driver.get(VIRTIO, 0x12, 2), 3);
    for (queue, size) in [(0, 256), (1, 128), (2, 64), (3, 0), (0xffff, 0)] {
        driver.set(VIRTIO, SELECT, 2, queue);
        assert_eq!(driver.get(VIRTIO, SELECT, 2), queue);
        assert_eq!(driver.get(VIRTIO, QUEUE_SIZE, 2), size);
        let there = size != 0;
        assert_eq!(driver.get(VIRTIO, 0x1e, 2), if there { queue } else { 0 });
        assert_eq!(driver.get(VIRTIO, 0x38, 2), if there { queue } else { 0 });
        assert_eq!(driver.get(VIRTIO, VECTOR, 2), 0xffff);
    }
    driver.bring_up(2, false);
    let starts: Vec<Call> = driver.calls().split_off(5);
    assert_eq!(
        starts,
        [
            Call::Start(0, 32, [0x1000, 0x2000, 0x3000]),
            Call::Start(1, 32, [0x1_0000_1000, 0x2000, 0x3000]),
            Call::Status(0xf)
        ]
    );
    assert_eq!(driver.get(VIRTIO, 0x20, 8), 0x1_0000_1000, "reads back");
    assert_eq!(driver.get(VIRTIO, 0x3c, 4), 0, "no administration queues");
    // With and without notification data, and where nothing is.
    driver.set(VIRTIO, NOTIFY, 2, 0);
    driver.set(VIRTIO, NOTIFY + 4, 4, 0x8003_0001);
    driver.set(VIRTIO, NOTIFY + 8, 2, 2);
    driver.set(VIRTIO, NOTIFY + 12, 2, 3);
    driver.set(VIRTIO, NOTIFY + 6, 2, 0);
    driver.set(VIRTIO, NOTIFY, 1, 0);
    assert_eq!(driver.calls(), [Call::Kick(0), Call::Kick(1)]);
    driver.set(VIRTIO, NOTIFY, 8, 0);
    assert_eq!(driver.calls(), [Call::Kick(0), Call::Kick(1)]);
    // Configuration.
    assert_eq!(driver.get(VIRTIO, DEVICE + 2, 2), 0x0403);
    driver.set(VIRTIO, DEVICE + 20, 8, 0x1111_2222);
    assert_eq!(driver.get(VIRTIO, DEVICE + 20, 8), 0x1111_2222);
    assert_eq!(
        driver.calls(),
        [
            Call::Read(2, 2),
            Call::Write(20, vec![0x22, 0x22, 0x11, 0x11]),
            Call::Read(20, 4)
        ]
    );
}

#[test]
fn queue_reset_and_status_0_bring_the_defaults_back() {
    let mut driver = Driver::net();
    driver.bring_up(2, false);
    driver.set(VIRTIO, SELECT, 2, 0);
    driver.set(VIRTIO, ENABLE, 2, 0);
    assert_eq!(driver.get(VIRTIO, ENABLE, 2), 1, "0 has no meaning there");
    driver.set(VIRTIO, 0x3a, 2, 1);
    assert_eq!(driver.get(VIRTIO, 0x3a, 2), 0);
    assert_eq!(driver.get(VIRTIO, ENABLE, 2), 0);
    assert_eq!(driver.get(VIRTIO, QUEUE_SIZE, 2), 256);
    assert_eq!(driver.get(VIRTIO, 0x20, 8), 0);
    driver.set(VIRTIO, STATUS, 1, 0);
    driver.set(VIRTIO, SELECT, 2, 1);
    assert_eq!(driver.get(VIRTIO, ENABLE, 2), 0);
    assert_eq!(driver.get(VIRTIO, QUEUE_SIZE, 2), 128);
    assert_eq!(driver.get(VIRTIO, 0x0, 4), 0);
    assert_eq!(driver.get(VIRTIO, 0xc, 4), 0);
}

#[test]
fn a_register_that_is_only_partly_covered_is_not_written() {
    let mut driver = Driver::net();
    driver.set(VIRTIO, SELECT, 1, 1);
    assert_eq!(driver.get(VIRTIO, SELECT, 2), 0);
    // Status, generation (read-only), and the selector at once; then the selector and the size, not aligned.
    driver.set(VIRTIO, STATUS, 4, 0x0001_0003);
    assert_eq!(driver.get(VIRTIO, STATUS, 4), 0x0001_0003);
    driver.set(VIRTIO, SELECT, 4, 0x0010_0002);
    assert_eq!(driver.get(VIRTIO, SELECT, 4), 0x0010_0002);
    assert_eq!(driver.get(VIRTIO, SELECT + 1, 2), 0x1000, "across both");
    // Across structures: the end of the common one, and the ISR.
    assert_eq!(driver.get(VIRTIO, ISR - 4, 8), 0);
    // Across the end of the BAR.
    assert_eq!(driver.get(VIRTIO, 0x3ffc, 8), 0xffff_ffff_0000_0000);
    assert_eq!(driver.get(VIRTIO, u64::MAX, 8), u64::MAX);
    assert_eq!(driver.get(Region::Bar(0), 0, 4), 0xffff_ffff);
    assert_eq!(driver.get(Region::Bar(77), 0, 4), 0xffff_ffff);
}

#[test]
fn vectors_that_do_not_exist_read_back_as_none() {
    let mut driver = Driver::net();
    assert_eq!(driver.get(VIRTIO, 0x10, 2), 0xffff);
    for (written, read) in [(3, 3), (4, 0xffff), (0, 0), (0xffff, 0xffff), (2, 2)] {
        driver.set(VIRTIO, 0x10, 2, written);
        assert_eq!(driver.get(VIRTIO, 0x10, 2), read);
        driver.set(VIRTIO, VECTOR, 2, written);
        assert_eq!(driver.get(VIRTIO, VECTOR, 2), read);
    }
    driver.set(VIRTIO, SELECT, 2, 3);
    driver.set(VIRTIO, VECTOR, 2, 1);
    assert_eq!(driver.get(VIRTIO, VECTOR, 2), 0xffff, "no such queue");
    driver.set(VIRTIO, STATUS, 1, 0);
    assert_eq!(driver.get(VIRTIO, 0x10, 2), 0xffff);
}

#[test]
fn a_vector_is_rung_masked_pending_and_rung_when_unmasked() {
    let mut driver = Driver::net();
    let events = driver.with_vectors();
    driver.bring_up(2, true);
    // A client that keeps the table to itself: nothing is masked.
    driver.0.queue_used(QueueIndex(0));
    driver.0.config_changed();
    assert_eq!(
        events.iter().map(|e| rings(e)).collect::<Vec<_>>(),
        [1, 1, 0, 0]
    );
    assert_eq!(
        driver.get(VIRTIO, ISR, 1),
        0,
        "messages do not show in the ISR"
    );

    // By the entry's own bit.
    driver.set(MSIX, 16 + 12, 4, 1);
    driver.0.queue_used(QueueIndex(0));
    driver.0.queue_used(QueueIndex(0));
    driver.0.queue_used(QueueIndex(1));
    assert_eq!((rings(&events[1]), rings(&events[2])), (0, 1));
    assert_eq!(driver.get(MSIX, 0x800, 8), 1 << 1);
    driver.set(MSIX, 16 + 12, 4, 0);
    assert_eq!(rings(&events[1]), 1);
    assert_eq!(driver.get(MSIX, 0x800, 8), 0);

    // An entry that is written for the first time is masked until it says otherwise.
    driver.set(MSIX, 32, 8, 0x8_fee0_0003);
    assert_eq!(driver.get(MSIX, 32, 8), 0x8_fee0_0000);
    driver.0.queue_used(QueueIndex(1));
    assert_eq!(rings(&events[2]), 0);
    driver.set(MSIX, 40, 8, 0x55);
    assert_eq!(rings(&events[2]), 1);
    assert_eq!(driver.get(MSIX, 40, 8), 0x55);

    // By the function mask.
    let at = driver.msix_capability();
    driver.set(Region::Config, at + 2, 2, 0xc000);
    driver.0.queue_used(QueueIndex(0));
    driver.0.config_changed();
    assert_eq!(driver.get(MSIX, 0x800, 4), 0b11);
    assert_eq!(driver.get(MSIX, 0x801, 2), 0);
    driver.set(Region::Config, at + 2, 2, 0x8000);
    assert_eq!((rings(&events[0]), rings(&events[1])), (1, 1));

    // By the client's call, and for want of an eventfd.
    driver.0.mask(Irq::Msix(1));
    driver.0.queue_used(QueueIndex(0));
    assert_eq!(rings(&events[1]), 0);
    driver.0.unmask(Irq::Msix(1));
    assert_eq!(rings(&events[1]), 1);
    driver.0.set_trigger(Irq::Msix(1), None).unwrap();
    driver.0.queue_used(QueueIndex(0));
    let other = event();
    driver
        .0
        .set_trigger(Irq::Msix(1), Some(other.clone()))
        .unwrap();
    assert_eq!((rings(&events[1]), rings(&other)), (0, 1));
    // The pending bits cannot be written.
    driver.set(MSIX, 0x800, 8, u64::MAX);
    assert_eq!(driver.get(MSIX, 0x800, 8), 0);
    driver.0.trigger(Irq::Msix(1));
    assert_eq!(rings(&other), 1, "a test of the client");
}

#[test]
fn what_was_pending_ends_with_a_reset() {
    let mut driver = Driver::net();
    let events = driver.with_vectors();
    driver.bring_up(1, true);
    driver.set(MSIX, 16 + 12, 4, 1);
    driver.0.queue_used(QueueIndex(0));
    driver.set(VIRTIO, STATUS, 1, 0);
    driver.set(MSIX, 16 + 12, 4, 0);
    assert_eq!(rings(&events[1]), 0);
    driver.bring_up(1, true);
    driver.set(MSIX, 16 + 12, 4, 1);
    driver.0.queue_used(QueueIndex(0));
    driver.0.reset();
    assert_eq!(driver.get(MSIX, 0, 8), 0);
    assert_eq!(driver.get(MSIX, 28, 4), 1, "masked, as after power-on");
    assert_eq!(rings(&events[1]), 0);
    assert_eq!(driver.get(VIRTIO, STATUS, 1), 0);
}

#[test]
fn the_line_follows_the_isr() {
    let mut driver = Driver::net();
    let line = event();
    driver.0.set_trigger(Irq::Intx, Some(line.clone())).unwrap();
    driver.bring_up(1, false);
    driver.0.queue_used(QueueIndex(0));
    assert_eq!(rings(&line), 1);
    assert_eq!(driver.config(6, 2), 0x18, "interrupt status");
    // Masked since it rang.
    driver.0.config_changed();
    assert_eq!(rings(&line), 0);
    // Still raised: rings again.
    driver.0.unmask(Irq::Intx);
    assert_eq!(rings(&line), 1);
    assert_eq!(driver.get(VIRTIO, ISR, 1), 3);
    assert_eq!(driver.get(VIRTIO, ISR, 1), 0, "reading lowers it");
    assert_eq!(driver.config(6, 2), 0x10);
    driver.0.unmask(Irq::Intx);
    assert_eq!(rings(&line), 0);
    // While masked by the client.
    driver.0.mask(Irq::Intx);
    driver.0.queue_used(QueueIndex(0));
    assert_eq!(rings(&line), 0);
    driver.0.unmask(Irq::Intx);
    assert_eq!(rings(&line), 1);
    driver.get(VIRTIO, ISR, 1);
    driver.0.unmask(Irq::Intx);
    // While disabled by the driver: the status tells nevertheless.
    driver.set(Region::Config, 4, 2, 1 << 10 | 6);
    driver.0.queue_used(QueueIndex(0));
    assert_eq!(rings(&line), 0);
    assert_eq!(driver.config(4, 4), 0x0018_0406);
    driver.set(Region::Config, 4, 2, 6);
    assert_eq!(rings(&line), 1);
    // A new eventfd finds the line raised.
    let other = event();
    driver
        .0
        .set_trigger(Irq::Intx, Some(other.clone()))
        .unwrap();
    assert_eq!((rings(&line), rings(&other)), (0, 1));
    driver.set(VIRTIO, STATUS, 1, 0);
    driver.0.unmask(Irq::Intx);
    assert_eq!(rings(&other), 0, "a reset lowers it");
}

#[test]
fn routes_say_who_may_ring_and_tell_when_they_change() {
    let mut driver = Driver::net();
    let of = |event: &Arc<OwnedFd>| Route::Direct(event.clone());
    assert_eq!(driver.0.take_route_changes(), []);
    assert_eq!(driver.0.route(QueueIndex(0)), Route::Through);
    driver.enable_msix(true);
    let changes = driver.0.take_route_changes();
    assert_eq!(changes.len(), 3);
    assert!(changes.iter().all(|(_, route)| *route == Route::Nobody));
    let events = driver.with_vectors();
    driver.bring_up(2, true);
    let direct = [
        (QueueIndex(0), of(&events[1])),
        (QueueIndex(1), of(&events[2])),
    ];
    assert_eq!(driver.0.take_route_changes(), direct);
    assert_eq!(driver.0.take_route_changes(), []);
    driver.set(MSIX, 16 + 12, 4, 1);
    let through = [(QueueIndex(0), Route::Through)];
    assert_eq!(driver.0.take_route_changes(), through);
    driver.set(MSIX, 16 + 12, 4, 0);
    assert_eq!(driver.0.take_route_changes(), direct[..1]);
    let other = event();
    driver
        .0
        .set_trigger(Irq::Msix(1), Some(other.clone()))
        .unwrap();
    let changed = [(QueueIndex(0), of(&other))];
    assert_eq!(driver.0.take_route_changes(), changed);
    driver.0.reset();
    // The triggers are there still.
    assert_eq!(driver.0.take_route_changes().len(), 2);
    assert_eq!(driver.0.route(QueueIndex(7)), Route::Nobody);
    for vector in 0..4 {
        driver.0.set_trigger(Irq::Msix(vector), None).unwrap();
    }
    assert_eq!(driver.0.route(QueueIndex(0)), Route::Through);
}

#[test]
fn descriptors_that_are_no_eventfds_are_refused() {
    let mut driver = Driver::net();
    let (_, file) = Mapping::memfd("no eventfd", 4096, false).unwrap();
    let file = Arc::new(file);
    for irq in [Irq::Intx, Irq::Msix(0), Irq::Err, Irq::Req] {
        assert!(driver.0.set_trigger(irq, Some(file.clone())).is_err());
        driver.0.set_trigger(irq, Some(event())).unwrap();
    }
    assert!(driver.0.set_trigger(Irq::Msix(4), Some(event())).is_err());
    assert!(driver.0.set_trigger(Irq::Msix(4), None).is_err());
    driver.0.mask(Irq::Msix(4));
    driver.0.trigger(Irq::Msix(4));
    driver.0.trigger(Irq::Req);
}

#[test]
fn a_failure_is_told_by_the_configuration_vector() {
    let mut driver = Driver::net();
    let events = driver.with_vectors();
    driver.bring_up(1, true);
    driver.0.backend_mut().fail = Some(OpError::TimedOut);
    driver.get(VIRTIO, DEVICE, 4);
    assert_eq!(rings(&events[0]), 1);
    assert_eq!(driver.get(VIRTIO, STATUS, 1), 0x4f);
    driver.get(VIRTIO, DEVICE, 4);
    assert_eq!(rings(&events[0]), 0, "once");
    driver.0.backend_mut().fail = None;
    driver.bring_up(1, true);
    driver.0.needs_reset();
    assert_eq!(rings(&events[0]), 1);
    assert_eq!(driver.get(VIRTIO, STATUS, 1), 0x4f);
}

#[test]
fn everything_can_be_reached_through_the_access_window() {
    let mut driver = Driver::net();
    driver.bring_up(1, false);
    let window = driver.capabilities()[&(9, 5)][0];
    let place = |driver: &mut Driver, bar, offset, len| {
        driver.set(Region::Config, window + 4, 1, bar);
        driver.set(Region::Config, window + 8, 4, offset);
        driver.set(Region::Config, window + 12, 4, len);
    };
    assert_eq!(driver.config(window + 16, 4), 0);
    for (offset, len, expected) in [(STATUS, 1, 0xf), (0x12, 2, 3), (DEVICE + 4, 4, 0x0807_0605)] {
        place(&mut driver, 4, offset, len);
        assert_eq!(driver.config(window + 16, 4), expected);
    }
    place(&mut driver, 4, SELECT, 2);
    driver.set(Region::Config, window + 16, 2, 1);
    assert_eq!(driver.get(VIRTIO, SELECT, 2), 1);
    driver.set(Region::Config, window + 16, 1, 0);
    assert_eq!(driver.get(VIRTIO, SELECT, 2), 1, "too short");
    driver.calls();
    place(&mut driver, 4, NOTIFY, 2);
    driver.set(Region::Config, window + 16, 2, 0);
    assert_eq!(driver.calls(), [Call::Kick(0)]);
    // What the window cannot be.
    for (bar, offset, len) in [
        (4, SELECT, 3),
        (4, SELECT, 0),
        (4, SELECT + 1, 2),
        (1, 0, 4),
        (0, 0, 4),
        (4, SELECT, 8),
    ] {
        place(&mut driver, bar, offset, len);
        driver.set(Region::Config, window + 16, 4, 0x0002_0002);
        assert_eq!(driver.config(window + 16, 4), 0x0002_0002);
    }
    assert_eq!(driver.get(VIRTIO, SELECT, 2), 1);
    place(&mut driver, 4, 0xffff_fffc, 4);
    assert_eq!(driver.config(window + 16, 4), 0xffff_ffff);
    // Reading the ISR through it lowers the line, too; looking at the rest of the capability does not.
    driver.0.queue_used(QueueIndex(0));
    place(&mut driver, 4, ISR, 1);
    driver.config(window + 8, 8);
    assert_eq!(driver.config(6, 2), 0x18);
    assert_eq!(driver.config(window + 16, 1), 1);
    assert_eq!(driver.config(6, 2), 0x10);
}

#[test]
fn shared_memory_has_capabilities_and_a_bar() {
    let (ram, file) = Mapping::memfd("shm", 0x3_0000, false).unwrap();
    let file = Arc::new(file);
    let regions = [
        (0, 0x1000, 0x1000),
        (5, 0x2_0000, 0x8000),
        (5, 1, 0),
        (6, 0, 0),
        (7, 1 << 41, 0),
    ];
    let shared = regions.map(|(id, len, file_offset)| SharedMemory {
        id,
        len,
        file_offset,
        file: file.clone(),
    });
    let mut driver = Driver::of(Scripted::net(), shared.to_vec());
    let found = driver.capabilities()[&(9, 8)].clone();
    let mut seen = Vec::new();
    for at in found {
        assert_eq!(driver.config(at + 2, 1), 24);
        assert_eq!(driver.config(at + 4, 1), 2);
        let high = driver.config(at + 16, 8);
        assert_eq!(high, 0);
        let (id, offset) = (driver.config(at + 5, 1), driver.config(at + 8, 4));
        seen.push((id, offset, driver.config(at + 12, 4)));
    }
    // What is there twice, empty, or too large has no place.
    assert_eq!(seen, [(0, 0, 0x1000), (5, 0x1_0000, 0x2_0000)]);
    let layout = driver.0.shared_layout();
    assert_eq!(
        layout.iter().map(|at| at.offset).collect::<Vec<_>>(),
        [0, 0x1_0000]
    );
    ram.ram().write(0x8004, &[1, 2, 3, 4]);
    assert_eq!(driver.get(Region::Bar(2), 0x1_0004, 4), 0x0403_0201);
    driver.set(Region::Bar(2), 8, 4, 0x5566_7788);
    let mut bytes = [0; 4];
    ram.ram().read(0x1008, &mut bytes);
    assert_eq!(bytes, [0x88, 0x77, 0x66, 0x55]);
    assert_eq!(
        driver.get(Region::Bar(2), 0xfffc, 4),
        0,
        "between the regions"
    );
}

#[test]
fn with_and_without_the_features_of_the_registers() {
    for on in [true, false] {
        let options = Options {
            access_platform: on,
            notification_data: on,
            ..Options::default()
        };
        let mut function = Function::new(Scripted::net(), options, Vec::new());
        function.write(VIRTIO, 0, &[1, 0, 0, 0]);
        let mut features = [0; 4];
        function.read(VIRTIO, 4, &mut features);
        assert_eq!(u32::from_le_bytes(features) & 0x42 == 0x42, on);
    }
}
