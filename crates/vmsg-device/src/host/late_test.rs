// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that end what is under way before they do what their drivers ask for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_msg::{DevNum, DeviceStatus, FeatureSet, Message, QueueIndex};
use vmsg_bus::control::{Request, Status};

use super::connection::ConnId;
use super::stand::{House, NOW};
use crate::device::{Device, DeviceError, Identity, Io, Progress, Upcoming};
use crate::stand::is_also;
use crate::worker::Slot;

/// Requests are under way as long as `busy` is set.
#[derive(Default)]
struct Work {
    busy: AtomicBool,
    resets: AtomicU32,
}

struct Disk(Arc<Work>);

impl Device for Disk {
    fn identity(&self) -> Identity {
        Identity {
            device_id: 2,
            vendor_id: 1,
        }
    }
    fn features(&self) -> FeatureSet {
        FeatureSet::from_bits(&[virtio_msg::feature::VERSION_1])
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }
    fn activate(&mut self, _: &FeatureSet) {}
    fn reset(&mut self) {
        assert!(
            !self.0.busy.load(Ordering::Relaxed),
            "requests are under way"
        );
        self.0.resets.fetch_add(1, Ordering::Relaxed);
    }
    fn process(&mut self, _: usize, _: usize, _: &mut Io<'_>) -> Result<Progress, DeviceError> {
        Ok(Progress::Blocked)
    }
    fn is_touching_memory(&self) -> bool {
        self.0.busy.load(Ordering::Relaxed)
    }
    fn prepare(&mut self, _: Upcoming<'_>, _: &mut Io<'_>) -> bool {
        !self.is_touching_memory()
    }
}

/// A host with two disks, whose only worker works at once.
struct Bench {
    house: House,
    disks: [Arc<Work>; 2],
}

is_also!(Bench, house: House);

impl Bench {
    fn new() -> Self {
        let mut house = House::new();
        house.at_once = true;
        let disks: [Arc<Work>; 2] = Default::default();
        for (slot, name) in [(0, "a"), (1, "b")] {
            let device = Disk(Arc::clone(&disks[slot as usize]));
            let added = house
                .core
                .add_device(name, None, 0, Slot(slot), Box::new(device));
            assert_eq!(added, Ok(DevNum(u16::try_from(slot).expect("small"))));
        }
        house.work();
        Self { house, disks }
    }

    /// Brings the device up, and has requests under way.
    fn bring_up(&mut self, conn: ConnId, num: u16) {
        self.house.bring_up(conn, num);
        self.set_busy(num, true);
    }

    fn set_busy(&mut self, num: u16, busy: bool) {
        self.disks[usize::from(num)]
            .busy
            .store(busy, Ordering::Relaxed);
        let slot = Slot(num.into());
        self.worker.poll_device(slot, std::time::Instant::now());
        self.work();
    }
}

fn reset_done() -> String {
    format!("7: {:?}", Message::DeviceStatusSet(DeviceStatus::RESET))
}

fn ok() -> String {
    format!("{:?}", Status::OK)
}

#[test]
fn a_reset_is_answered_when_the_requests_have_ended_and_others_at_once() {
    let mut bench = Bench::new();
    let conn = bench.connect();
    bench.bring_up(conn, 0);
    bench.bring_up(conn, 1);
    bench.status(conn, 0, DeviceStatus::RESET);
    assert_eq!(bench.said(conn), [""; 0]);

    // The other device of the same driver, by the same connection.
    bench.set_busy(1, false);
    bench.status(conn, 1, DeviceStatus::RESET);
    assert_eq!(bench.said(conn), [reset_done()]);
    bench.bring_up(conn, 1);

    bench.set_busy(0, true);
    assert_eq!(bench.said(conn), [""; 0]);
    bench.set_busy(0, false);
    assert_eq!(bench.said(conn), [reset_done()]);
    assert_eq!(bench.disks[0].resets.load(Ordering::Relaxed), 1);
    bench.bring_up(conn, 0);
}

#[test]
fn a_driver_that_asks_for_more_meanwhile_is_held_up_alone() {
    let mut bench = Bench::new();
    let (conn, other) = (bench.connect(), bench.connect());
    bench.bring_up(conn, 0);
    bench.status(conn, 0, DeviceStatus::RESET);
    let given = bench.given;
    let mut sent = 0;
    while bench.core.wants_input(conn) {
        bench.send(conn, 0, Message::GetDeviceStatus);
        let kick = Message::EventAvail {
            queue: QueueIndex(0),
            next: 0,
        };
        bench.send(conn, 0, kick);
        sent += 1;
        assert!(sent < 1000, "it is read for ever");
    }
    assert_eq!(bench.given, given, "the worker has no more to keep");
    bench.bring_up(other, 1);
    assert!(bench.core.wants_input(other));

    bench.set_busy(0, false);
    let said = bench.said(conn);
    assert_eq!(said.len(), sent + 1);
    assert_eq!(said[0], reset_done());
    assert!(bench.core.wants_input(conn));
}

#[test]
fn a_window_is_given_back_when_nothing_touches_it_any_more() {
    let mut bench = Bench::new();
    let conn = bench.connect();
    bench.bring_up(conn, 0);
    let given = bench.given;
    // As often as it likes.
    for _ in 0..10 {
        let window = Request::WindowRemove { id: 1, more: false };
        bench.request(conn, window);
    }
    let missing = format!("{:?}", Status::NOT_FOUND);
    assert_eq!(bench.said(conn), vec![missing; 9]);
    assert_eq!(bench.given, given + 1);
    bench.status(conn, 0, DeviceStatus::RESET);
    assert_eq!(bench.said(conn), [""; 0]);
    bench.set_busy(0, false);
    assert_eq!(bench.said(conn), [ok(), reset_done()]);
}

#[test]
fn the_next_driver_gets_the_device_when_the_last_ones_requests_have_ended() {
    for asked in [false, true] {
        let mut bench = Bench::new();
        let (lost, next) = (bench.connect(), bench.connect());
        bench.bring_up(lost, 0);
        let users = Arc::strong_count(&bench.memory);
        if asked {
            // It was waiting itself.
            bench.status(lost, 0, DeviceStatus::RESET);
        }
        bench.core.disconnect(NOW, lost);
        bench.work();
        bench.claim(next, 0, false);
        let given = bench.given;
        // Others come, ask and go again.
        for _ in 0..100 {
            let hasty = bench.connect();
            bench.claim(hasty, 0, false);
            bench.status(hasty, 0, DeviceStatus::ACKNOWLEDGE);
            bench.core.disconnect(NOW, hasty);
            bench.work();
        }
        assert_eq!(bench.given, given, "nothing piles up");
        assert_eq!(bench.said(next), [""; 0]);
        bench.set_busy(0, false);
        assert_eq!(bench.said(next), [ok()]);
        assert_eq!(Arc::strong_count(&bench.memory), users);
        bench.bring_up(next, 0);
    }
}

#[test]
fn a_device_is_removed_when_its_requests_have_ended() {
    let mut bench = Bench::new();
    let (conn, other) = (bench.connect(), bench.connect());
    bench.bring_up(conn, 0);
    let ticket = bench.core.remove_device(NOW, "a").expect("it is there");
    bench.work();
    bench.core.disconnect(NOW, conn);
    bench.work();
    assert_eq!(bench.core.poll_operated(), None);
    assert_eq!(bench.core.poll_freed(), None);
    bench.bring_up(other, 1);
    bench.set_busy(0, false);
    assert_eq!(bench.core.poll_operated(), Some((ticket, Ok(()))));
    assert_eq!(bench.core.poll_freed(), Some((0, Slot(0))));
    assert_eq!(Arc::strong_count(&bench.disks[0]), 1, "it is gone");
}
