// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_msg::{FeatureSet, QueueIndex};
use vmsg_bus::control::{Request, Status};

use super::super::core::AddError;
use super::super::stand::{self, House, NOW, queue};
use super::*;
use crate::device::{Device, DeviceError, Identity, Io, Progress};
use crate::stand::is_also;

/// What has happened to a device.
#[derive(Default)]
struct Life {
    resets: AtomicU32,
    removed: AtomicU32,
    dropped: AtomicU32,
}

/// Takes nothing from its queue: requests stay in flight.
struct Slow {
    life: Arc<Life>,
    panics: bool,
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.life.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

impl Device for Slow {
    fn identity(&self) -> Identity {
        Identity {
            device_id: 4,
            vendor_id: 1,
        }
    }
    fn features(&self) -> FeatureSet {
        FeatureSet::from_bits(&[virtio_msg::feature::VERSION_1])
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }
    fn config(&self) -> Vec<u8> {
        vec![1; 8]
    }
    fn activate(&mut self, _: &FeatureSet) {}
    fn reset(&mut self) {
        self.life.resets.fetch_add(1, Ordering::Relaxed);
        assert!(!self.panics, "a bad reset");
    }
    fn process(&mut self, _: usize, _: usize, _: &mut Io<'_>) -> Result<Progress, DeviceError> {
        Ok(Progress::Blocked)
    }
    fn removed(&mut self) {
        self.life.removed.fetch_add(1, Ordering::Relaxed);
    }
}

/// A host of such devices.
struct Bench(House);

is_also!(Bench, 0: House);

impl Bench {
    fn new() -> Self {
        Self(House::new())
    }

    fn add(&mut self, name: &str, num: Option<u16>, slot: u32) -> Result<DevNum, AddError> {
        self.add_with(name, num, slot, false).map(|(num, _)| num)
    }

    fn add_with(
        &mut self,
        name: &str,
        num: Option<u16>,
        slot: u32,
        panics: bool,
    ) -> Result<(DevNum, Arc<Life>), AddError> {
        let life = Arc::new(Life::default());
        let device = Slow {
            life: Arc::clone(&life),
            panics,
        };
        let num = self
            .core
            .add_device(name, num, 0, Slot(slot), Box::new(device))?;
        Ok((num, life))
    }

    /// What came of the operator's removals.
    fn operated(&mut self) -> Vec<(u64, Result<(), String>)> {
        std::iter::from_fn(|| self.core.poll_operated()).collect()
    }
}

fn removed(num: u16) -> String {
    let (device, state) = (DevNum(num), DeviceState::Removed);
    format!("0: {:?}", Message::EventDevice { device, state })
}

fn ready(num: u16) -> String {
    let (device, state) = (DevNum(num), DeviceState::Ready);
    format!("0: {:?}", Message::EventDevice { device, state })
}

fn devices(bench: &mut Bench, conn: ConnId) -> Vec<u16> {
    bench.said(conn);
    let ask = Message::GetDevices {
        offset: 0,
        count: 32,
    };
    bench.say(conn, &Frame::bus(Token(1), ask));
    let bytes = stand::take(&mut bench.core, conn).expect("an answer");
    let Message::Devices(list) = decode(&bytes, stand::MESSAGE).expect("a message").message else {
        panic!("{bytes:?}");
    };
    list.iter().map(|num| num.0).collect()
}

#[test]
fn a_device_with_requests_in_flight_goes_and_its_driver_hears_of_it() {
    let mut bench = Bench::new();
    let (num, life) = bench.add_with("a", None, 0, false).expect("a number");
    bench.add("b", None, 1).expect("a number");
    let (holder, other) = (bench.connect(), bench.connect());
    bench.bring_up(holder, num.0);
    let users = Arc::strong_count(&bench.memory);
    let ticket = bench.core.remove_device(NOW, "a").expect("it is there");
    assert_eq!(bench.core.remove_device(NOW, "a"), None, "it is going");
    assert_eq!(bench.said(holder), [""; 0], "it has to be reset first");
    assert_eq!(devices(&mut bench, other), [0, 1]);
    bench.work();
    assert_eq!(life.resets.load(Ordering::Relaxed), 2, "once by its place");
    assert_eq!(life.removed.load(Ordering::Relaxed), 1);
    assert_eq!(life.dropped.load(Ordering::Relaxed), 1);
    assert_eq!(bench.said(holder), [removed(0)]);
    assert_eq!(bench.said(other), [removed(0)]);
    assert_eq!(bench.operated(), [(ticket, Ok(()))]);
    assert_eq!(bench.core.poll_freed(), Some((0, Slot(0))));
    assert_eq!(bench.core.poll_freed(), None);
    assert_eq!(devices(&mut bench, holder), [1]);
    assert_eq!(Arc::strong_count(&bench.memory), users);
    let window = Request::WindowRemove { id: 1, more: false };
    bench.request(holder, window);
    assert_eq!(
        bench.said(holder),
        ["Status(0)"],
        "nothing waits for the device"
    );
}

#[test]
fn a_number_and_what_drivers_know_of_it_is_never_used_again() {
    let mut bench = Bench::new();
    let conn = bench.connect();
    for round in 0..4 {
        let num = bench.add("a", None, 0).expect("a number");
        assert_eq!(num, DevNum(round));
        bench.core.remove_device(NOW, "a").expect("it is there");
        bench.work();
        assert_eq!(bench.said(conn), [ready(round), removed(round)]);
        let spent = bench.add("a", Some(round), 0);
        assert_eq!(spent, Err(AddError::NumberSpent(round)));
    }
    bench.core.gone.extend(0..=u16::MAX);
    assert_eq!(bench.add("a", None, 0), Err(AddError::NoNumber));
}

#[test]
fn whoever_waits_for_a_device_that_goes_is_answered() {
    let mut bench = Bench::new();
    bench.add("a", None, 0).expect("a number");
    let (holder, other) = (bench.connect(), bench.connect());
    bench.bring_up(holder, 0);
    // A reset is under way, and everything else waits for it.
    bench.status(holder, 0, DeviceStatus::RESET);
    bench.send(holder, 0, Message::GetDeviceStatus);
    bench.send(holder, 0, Message::GetVqueue(QueueIndex(0)));
    let config = Message::GetConfig { offset: 4, len: 4 };
    bench.send(holder, 0, config);
    bench.core.remove_device(NOW, "a").expect("it is there");
    bench.claim(other, 0, false);
    bench.send(other, 0, Message::GetDeviceInfo);
    bench.status(other, 0, DeviceStatus::ACKNOWLEDGE);
    bench.work();
    let said = bench.said(holder);
    assert_eq!(said.len(), 5, "{said:?}");
    assert_eq!(
        said[0],
        format!("7: {:?}", Message::DeviceStatusSet(DeviceStatus::RESET))
    );
    assert_eq!(said[4], removed(0));
    let said = bench.said(other);
    assert_eq!(
        said,
        [
            format!("7: {:?}", Message::DeviceInfo(DeviceInfo::ABSENT)),
            format!("7: {:?}", Message::DeviceStatusSet(DeviceStatus::RESET)),
            format!("{:?}", Status::NOT_FOUND),
            removed(0),
        ]
    );
    for conn in [holder, other] {
        assert!(bench.core.wants_input(conn));
        assert_eq!(bench.core.connections[&conn].deferred, 0);
    }
}

#[test]
fn requests_to_a_device_that_is_gone_are_answered_at_once() {
    let mut bench = Bench::new();
    bench.add("a", None, 0).expect("a number");
    let conn = bench.connect();
    bench.bring_up(conn, 0);
    bench.core.remove_device(NOW, "a").expect("it is there");
    bench.work();
    bench.said(conn);
    let requests = [
        Message::GetDeviceInfo,
        Message::GetDeviceFeatures {
            first: 0,
            count: u32::MAX,
        },
        Message::SetDriverFeatures(FeatureBlocks {
            first: 0,
            count: 1,
            words: &[U32::ZERO],
        }),
        Message::GetConfig {
            offset: u32::MAX,
            len: u32::MAX,
        },
        Message::SetConfig(ConfigData {
            generation: Generation(1),
            offset: 0,
            len: 1,
            data: &[1],
        }),
        Message::GetDeviceStatus,
        Message::SetDeviceStatus(DeviceStatus::DRIVER_OK),
        Message::GetVqueue(QueueIndex(u32::MAX)),
        queue(),
        Message::ResetVqueue(QueueIndex(0)),
        Message::GetShm { index: 1 },
    ];
    for request in requests {
        bench.send(conn, 0, request);
        let said = bench.said(conn);
        assert_eq!(said.len(), 1, "{request:?}: {said:?}");
        assert!(said[0].starts_with("7: "), "{said:?}");
        // A number that never was one of a device has but one answer.
        bench.send(conn, 9, request);
        let some = request == Message::GetDeviceInfo;
        assert_eq!(bench.said(conn).len(), usize::from(some), "{request:?}");
    }
    let kick = Message::EventAvail {
        queue: QueueIndex(0),
        next: 0,
    };
    bench.send(conn, 0, kick);
    bench.claim(conn, 0, true);
    bench.request(conn, Request::DeviceName(DevNum(0)));
    let missing = format!("{:?}", Status::NOT_FOUND);
    assert_eq!(bench.said(conn), [missing.clone(), missing]);
    assert!(!bench.work_once());
}

#[test]
fn a_device_goes_at_whatever_point_its_driver_is() {
    // After each number of commands that the worker has carried out.
    for steps in 0..12 {
        for leave in [false, true] {
            let mut bench = Bench::new();
            bench.add("a", None, 0).expect("a number");
            let conn = bench.connect();
            bench.work();
            bench.status(conn, 0, DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
            bench.status(conn, 0, DeviceStatus::FEATURES_OK);
            bench.status(conn, 0, DeviceStatus::DRIVER_OK);
            bench.status(conn, 0, DeviceStatus::RESET);
            bench.claim(conn, 0, true);
            for _ in 0..steps {
                bench.work_once();
            }
            let ticket = bench.core.remove_device(NOW, "a").expect("it is there");
            if leave {
                bench.core.disconnect(NOW, conn);
            }
            bench.work();
            assert_eq!(bench.operated(), [(ticket, Ok(()))], "{steps}");
            if !leave {
                let said = bench.said(conn);
                assert_eq!(said.last(), Some(&removed(0)), "{steps}: {said:?}");
                assert_eq!(said.len(), 6, "{steps}: {said:?}");
            }
        }
    }
}

#[test]
fn a_device_that_panics_when_it_is_reset_goes_all_the_same() {
    let mut bench = Bench::new();
    let (_, life) = bench.add_with("a", None, 0, true).expect("a number");
    let conn = bench.connect();
    bench.bring_up(conn, 0);
    let ticket = bench.core.remove_device(NOW, "a").expect("it is there");
    bench.work();
    assert_eq!(bench.operated(), [(ticket, Ok(()))]);
    assert_eq!(life.dropped.load(Ordering::Relaxed), 1);
    assert_eq!(bench.core.poll_freed(), Some((0, Slot(0))));
    assert_eq!(bench.said(conn).last(), Some(&removed(0)));
    // Its place and its name are another's.
    assert_eq!(bench.add("a", None, 0), Ok(DevNum(1)));
    bench.bring_up(conn, 1);
    bench.send(conn, 1, Message::GetDeviceStatus);
    assert_eq!(bench.said(conn).len(), 1);
}

#[test]
fn a_driver_that_does_not_listen_does_not_keep_a_device() {
    let mut bench = Bench::new();
    bench.add("a", None, 0).expect("a number");
    let conn = bench.connect();
    bench.bring_up(conn, 0);
    for data in 0..400 {
        bench.say(conn, &Frame::bus(Token(1), Message::Ping { data }));
    }
    let ticket = bench.core.remove_device(NOW, "a").expect("it is there");
    bench.work();
    assert_eq!(bench.operated(), [(ticket, Ok(()))]);
}
