// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_msg::{FeatureSet, QueueIndex, VqueueConfig};
use vmsg_bus::control::{Request, Response, Status, WindowAdd};
use vmsg_mem::{BusAddr, Mapping};

use super::super::connection::Peer;
use super::super::core::{AddError, Order};
use super::*;
use crate::device::{Device, DeviceError, Identity, Io, Progress};
use crate::worker::{self, Fds};

const MESSAGE: usize = 320;
const NOW: Instant = Instant(0);
const BASE: u64 = 0x4000_0000;

struct NoFds;

impl Fds for NoFds {
    fn add_kick(&mut self, _slot: Slot, _queue: usize, _fd: BorrowedFd<'_>) {}
    fn add_device(&mut self, _slot: Slot, _fd: BorrowedFd<'_>) {}
    fn remove(&mut self, _fd: BorrowedFd<'_>) {}
}

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

/// A host whose only worker works when it is told to.
struct Bench {
    core: Core,
    worker: worker::Core,
    orders: VecDeque<Order>,
    memory: Arc<Mapping>,
    file: OwnedFd,
}

impl Bench {
    fn new() -> Self {
        let (memory, file) = Mapping::memfd("test", 1 << 16, true).expect("memory");
        Self {
            core: Core::new(MESSAGE, 0),
            worker: worker::Core::new(),
            orders: VecDeque::new(),
            memory: Arc::new(memory),
            file,
        }
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

    fn connect(&mut self) -> ConnId {
        self.core.connect(Peer::default(), MESSAGE)
    }

    fn say(&mut self, conn: ConnId, frame: &Frame<'_>, fds: Vec<OwnedFd>) {
        let mut bytes = [0; MESSAGE];
        let len = frame.encode(&mut bytes).expect("short");
        self.core.handle_message(NOW, conn, &bytes[..len], fds);
    }

    fn send(&mut self, conn: ConnId, num: u16, message: Message<'_>) {
        self.say(
            conn,
            &Frame::new(DevNum(num), Token(7), message),
            Vec::new(),
        );
    }

    fn request(&mut self, conn: ConnId, request: Request, fds: Vec<OwnedFd>) {
        let mut payload = [0; 64];
        let len = request.encode(&mut payload).expect("short");
        let message = Message::BusSpecific {
            id: request.id(),
            response: false,
            payload: &payload[..len],
        };
        self.say(conn, &Frame::bus(Token(9), message), fds);
    }

    /// The worker carries out one command; false if there is none.
    fn work_once(&mut self) -> bool {
        while let Some(order) = self.core.poll_order() {
            self.orders.push_back(order);
        }
        let Some(order) = self.orders.pop_front() else {
            return false;
        };
        self.worker
            .command(order.slot, order.ticket, order.command, &mut NoFds);
        let replies: Vec<_> = self.worker.take_replies().collect();
        for reply in replies {
            self.core.handle_reply(NOW, order.worker, reply);
        }
        true
    }

    fn work(&mut self) {
        while self.work_once() {}
    }

    /// What was said to `conn`, as a trace shows it.
    fn said(&mut self, conn: ConnId) -> Vec<String> {
        let mut all = Vec::new();
        while let Some(bytes) = self.core.poll_transmit(conn).map(<[u8]>::to_vec) {
            self.core.sent(conn);
            let frame = decode(&bytes, MESSAGE).expect("a message");
            all.push(match frame.message {
                Message::BusSpecific { id, payload, .. } => {
                    let answer = Response::decode(id, payload).expect("a response");
                    format!("{:?}", answer.status)
                }
                message => format!("{}: {message:?}", frame.token.0),
            });
        }
        all
    }

    fn status(&mut self, conn: ConnId, num: u16, status: DeviceStatus) {
        self.send(conn, num, Message::SetDeviceStatus(status));
    }

    /// Lends memory and brings the device up.
    fn bring_up(&mut self, conn: ConnId, num: u16) {
        let file = self.file.as_fd().try_clone_to_owned().expect("a file");
        let window = WindowAdd {
            id: 1,
            writable: true,
            more: false,
            base: BusAddr(BASE),
            len: 1 << 16,
            file_offset: 0,
        };
        self.request(conn, Request::WindowAdd(window), vec![file]);
        let queue = VqueueConfig {
            index: QueueIndex(0),
            size: QueueSize(16),
            descriptor: BASE,
            driver: BASE + 0x1000,
            device: BASE + 0x2000,
        };
        self.status(conn, num, DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
        self.status(conn, num, DeviceStatus::FEATURES_OK);
        self.send(conn, num, Message::SetVqueue(queue));
        self.status(conn, num, DeviceStatus::DRIVER_OK);
        self.work();
        self.said(conn);
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
    bench.say(conn, &Frame::bus(Token(1), ask), Vec::new());
    let bytes = bench.core.poll_transmit(conn).expect("an answer").to_vec();
    bench.core.sent(conn);
    let Message::Devices(list) = decode(&bytes, MESSAGE).expect("a message").message else {
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
    bench.request(holder, window, Vec::new());
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
    let claim = Request::Claim {
        dev: DevNum(0),
        release: false,
    };
    bench.request(other, claim, Vec::new());
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
        Message::SetVqueue(VqueueConfig {
            index: QueueIndex(0),
            size: QueueSize(16),
            descriptor: BASE,
            driver: BASE,
            device: BASE,
        }),
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
    let release = Request::Claim {
        dev: DevNum(0),
        release: true,
    };
    bench.request(conn, release, Vec::new());
    bench.request(conn, Request::DeviceName(DevNum(0)), Vec::new());
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
            let release = Request::Claim {
                dev: DevNum(0),
                release: true,
            };
            bench.request(conn, release, Vec::new());
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
        bench.say(
            conn,
            &Frame::bus(Token(1), Message::Ping { data }),
            Vec::new(),
        );
    }
    let ticket = bench.core.remove_device(NOW, "a").expect("it is there");
    bench.work();
    assert_eq!(bench.operated(), [(ticket, Ok(()))]);
}
