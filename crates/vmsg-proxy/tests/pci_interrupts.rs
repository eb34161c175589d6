// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a PCI function interrupts: MSI-X with its masks, the line, and who may ring.
#![allow(missing_docs)]

mod function;
mod scripted;

use function::{DEVICE, Driver, ISR, MSIX, STATUS, VIRTIO, event, rings};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use virtio_msg::QueueIndex;
use vmsg_mem::Mapping;
use vmsg_proxy::session::OpError;
use vmsg_proxy::transport::pci::{Irq, Region, Route};

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
