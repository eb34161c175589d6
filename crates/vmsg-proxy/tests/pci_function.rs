// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a driver and a VMM see in a PCI function, with a scripted device behind it.
#![allow(missing_docs)]

mod function;
mod scripted;

use function::{
    DEVICE, Driver, ENABLE, ISR, MSIX, NOTIFY, QUEUE_SIZE, SELECT, STATUS, VECTOR, VIRTIO,
};
use scripted::{Call, Scripted};
use std::sync::Arc;
use virtio_msg::QueueIndex;
use vmsg_mem::Mapping;
use vmsg_proxy::transport::pci::{Function, Region};
use vmsg_proxy::transport::{Options, SharedMemory};

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
