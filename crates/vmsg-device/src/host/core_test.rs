// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::os::fd::AsFd;

use virtio_msg::{ConfigEvent, DeviceStatus, FeatureBlocks, FeatureSet};
use vmsg_bus::control::{BackingAdd, Status, ViewAdd, WindowAdd};
use vmsg_mem::{BusAddr, Mapping};

use super::super::stand::{self, MESSAGE, NOW};
use super::*;
use crate::net::{Mac, Net, Settings};

const NET: DevNum = DevNum(0);

/// A host with a network device, whose worker is the test.
struct Bench {
    core: Core,
    outstanding: VecDeque<Order>,
}

impl Bench {
    fn new() -> Self {
        let mut core = Core::new(MESSAGE, 0);
        let settings = Settings::new(Mac([0x52, 0x54, 0, 0, 0, 1]));
        let net = Net::new(&settings, Box::new(vmsg_net::Null::default()));
        core.add_device("net0", Some(NET.0), 0, Slot(0), Box::new(net))
            .expect("an empty bus");
        let mut bench = Self {
            core,
            outstanding: VecDeque::new(),
        };
        bench.work();
        bench
    }

    fn connect(&mut self) -> ConnId {
        self.core.connect(Peer::default(), MESSAGE)
    }

    fn send(&mut self, conn: ConnId, message: Message<'_>) {
        let frame = if message.is_bus() {
            Frame::bus(Token(7), message)
        } else {
            Frame::new(NET, Token(7), message)
        };
        stand::say(&mut self.core, conn, &frame, Vec::new());
    }

    fn request(&mut self, conn: ConnId, request: Request, fds: Vec<OwnedFd>) {
        stand::ask(&mut self.core, conn, request, fds);
    }

    /// What the worker has been told and has not done.
    fn orders(&mut self) -> Vec<String> {
        while let Some(order) = self.core.poll_order() {
            self.outstanding.push_back(order);
        }
        self.outstanding
            .iter()
            .map(|order| format!("{:?}", order.command))
            .collect()
    }

    /// The worker does what it was told, kicks aside.
    fn work(&mut self) {
        while !self.orders().is_empty() {
            while let Some(Order {
                ticket, command, ..
            }) = self.outstanding.pop_front()
            {
                if let Command::Kick { pending, .. } = command {
                    pending.take();
                } else {
                    let result = Ok(());
                    self.core
                        .handle_reply(NOW, 0, Reply::Done { ticket, result });
                }
            }
        }
    }

    fn notice(&mut self, notice: Notice) {
        self.core
            .handle_reply(NOW, 0, Reply::Notice(Slot(0), notice));
    }

    /// The next message for `conn`.
    fn take(&mut self, conn: ConnId) -> Option<Vec<u8>> {
        stand::take(&mut self.core, conn)
    }

    /// The status in the next message for `conn`, an answer to a bus request.
    fn answer(&mut self, conn: ConnId) -> Option<Status> {
        let bytes = self.take(conn)?;
        Some(stand::response(&bytes).status)
    }

    /// Brings the device up with one queue.
    fn bring_up(&mut self, conn: ConnId) {
        let version = FeatureSet::from_bits(&[virtio_msg::feature::VERSION_1]);
        let words = [version.block(0).into(), version.block(1).into()];
        for message in [
            Message::SetDeviceStatus(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER),
            Message::SetDriverFeatures(FeatureBlocks {
                first: 0,
                count: 2,
                words: &words,
            }),
            Message::SetDeviceStatus(DeviceStatus::FEATURES_OK),
            stand::queue(),
            Message::SetDeviceStatus(DeviceStatus::DRIVER_OK),
        ] {
            self.send(conn, message);
            self.work();
        }
        while self.take(conn).is_some() {}
    }
}

fn claim(release: bool) -> Request {
    Request::Claim { dev: NET, release }
}

#[test]
fn a_device_whose_driver_ends_in_the_middle_of_a_request_goes_to_the_next() {
    for status in [DeviceStatus::RESET, DeviceStatus::ACKNOWLEDGE] {
        let mut bench = Bench::new();
        let (first, second) = (bench.connect(), bench.connect());
        bench.bring_up(first);
        bench.send(first, Message::SetDeviceStatus(DeviceStatus::RESET));
        bench.send(first, Message::SetDeviceStatus(status));
        bench.core.disconnect(NOW, first);
        bench.request(second, claim(false), Vec::new());
        assert_eq!(bench.answer(second), None, "not yet");
        bench.work();
        assert_eq!(bench.answer(second), Some(Status::OK));
    }
}

/// Linux' driver for AMP systems gives a bus up that says nothing for a second.
#[test]
fn pings_are_answered_while_a_device_is_busy_with_its_reset() {
    let mut bench = Bench::new();
    let conn = bench.connect();
    bench.bring_up(conn);
    bench.send(conn, Message::SetDeviceStatus(DeviceStatus::RESET));
    // What follows for that device waits.
    bench.send(conn, Message::GetDeviceStatus);
    assert_eq!(bench.orders(), ["Reset"]);
    for data in 0..600 {
        assert!(bench.core.wants_input(conn), "after {data} seconds");
        bench.send(conn, Message::Ping { data });
        let answer = bench.take(conn).expect("an answer at once");
        let frame = decode(&answer, MESSAGE).expect("a message");
        assert_eq!(frame.message, Message::Pong { data });
    }
    bench.work();
    for id in [8, 7] {
        assert_eq!(bench.take(conn).map(|answer| answer[1]), Some(id));
    }
}

/// Linux' driver of 2026 does not bear a number that goes and comes back as another device.
#[test]
fn a_number_is_one_device_for_as_long_as_the_bus_lives() {
    let mut bench = Bench::new();
    let conn = bench.connect();
    let add = |core: &mut Core, name: &str, num| {
        let settings = Settings::new(Mac([0x52, 0x54, 0, 0, 0, 2]));
        let net = Net::new(&settings, Box::new(vmsg_net::Null::default()));
        core.add_device(name, num, 0, Slot(1), Box::new(net))
    };
    assert!(matches!(
        add(&mut bench.core, "other", Some(NET.0)),
        Err(AddError::NumberTaken(0, _))
    ));
    assert_eq!(add(&mut bench.core, "net1", None).ok(), Some(DevNum(1)));
    bench.work();
    // Neither a device that fails nor a driver that ends takes a number away.
    bench.bring_up(conn);
    bench.notice(Notice::Broken {
        why: "test".into(),
        unmapped: false,
    });
    bench.core.disconnect(NOW, conn);
    bench.work();
    let conn = bench.connect();
    bench.send(
        conn,
        Message::GetDevices {
            offset: 0,
            count: 32,
        },
    );
    let answer = bench.take(conn).expect("an answer");
    let Message::Devices(list) = decode(&answer, MESSAGE).expect("a message").message else {
        panic!("{answer:?}");
    };
    assert_eq!((list.offset, list.count, list.next), (0, 32, 0));
    assert_eq!(list.bitmap, [3, 0, 0, 0]);
    assert_eq!(bench.take(conn), None, "nothing else is said of them");
}

#[test]
fn a_release_is_answered_when_the_device_was_reset() {
    let mut bench = Bench::new();
    let conn = bench.connect();
    bench.bring_up(conn);
    bench.request(conn, claim(true), Vec::new());
    assert_eq!(bench.orders(), ["Reset"]);
    assert_eq!(bench.answer(conn), None, "not yet");
    bench.work();
    assert_eq!(bench.answer(conn), Some(Status::OK));
}

#[test]
fn memory_is_given_back_after_the_reset_of_a_released_device() {
    let mut bench = Bench::new();
    let conn = bench.connect();
    let (_, fd) = Mapping::memfd("test", 4096, true).expect("memory");
    let window = WindowAdd {
        id: 1,
        writable: true,
        base: BusAddr(0x1000),
        len: 4096,
        file_offset: 0,
        more: false,
    };
    let lent = fd.as_fd().try_clone_to_owned().expect("a descriptor");
    bench.request(conn, Request::WindowAdd(window), vec![lent]);
    assert_eq!(bench.answer(conn), Some(Status::OK));
    bench.bring_up(conn);
    bench.request(conn, claim(true), Vec::new());
    bench.request(
        conn,
        Request::WindowRemove { id: 1, more: false },
        Vec::new(),
    );
    assert_eq!(bench.orders(), ["Reset", "SetMemory"]);
    assert_eq!(bench.answer(conn), None, "the device may still use it");
    bench.work();
    assert_eq!(bench.answer(conn), Some(Status::OK));
    assert_eq!(bench.answer(conn), Some(Status::OK));
}

#[test]
fn a_kick_on_its_way_is_not_sent_again() {
    let mut bench = Bench::new();
    let conn = bench.connect();
    bench.bring_up(conn);
    let kick = Message::EventAvail {
        queue: QueueIndex(0),
        next: 0,
    };
    for _ in 0..1000 {
        bench.send(conn, kick);
    }
    assert_eq!(bench.orders(), ["Kick"]);
    bench.work();
    bench.send(conn, kick);
    assert_eq!(bench.orders(), ["Kick"]);
}

#[test]
fn a_driver_that_does_not_listen_gets_its_events_merged() {
    let mut bench = Bench::new();
    let conn = bench.connect();
    bench.bring_up(conn);
    for value in 0..10_000u32 {
        let data = value.to_le_bytes().to_vec();
        bench.notice(Notice::Config { offset: 0, data });
        bench.notice(Notice::Used { queue: 0 });
    }
    assert!(!bench.core.wants_input(conn));
    // Somebody else is answered meanwhile.
    let other = bench.connect();
    bench.send(other, Message::GetDeviceStatus);
    assert!(bench.take(other).is_some());
    let mut messages = 0;
    let mut last = None;
    while let Some(message) = bench.take(conn) {
        messages += 1;
        if let Message::EventConfig(ConfigEvent { data, .. }) =
            decode(&message, MESSAGE).expect("a message").message
        {
            last = Some(data[..4].to_vec());
        }
    }
    assert!(messages < 300, "{messages} messages");
    assert_eq!(last, Some(9_999u32.to_le_bytes().to_vec()));
}

#[test]
fn requests_that_wait_for_a_worker_are_counted_and_no_more_are_read() {
    let mut bench = Bench::new();
    let conn = bench.connect();
    bench.bring_up(conn);
    let mut sent = 0;
    while bench.core.wants_input(conn) {
        let notify = vmsg_bus::control::QueueNotify {
            dev: NET,
            queue: QueueIndex(0),
            kick: false,
            call: false,
        };
        bench.request(conn, Request::QueueNotify(notify), Vec::new());
        sent += 1;
        assert!(sent < 1000);
    }
    bench.work();
    assert!(bench.core.wants_input(conn));
    for _ in 0..sent {
        assert_eq!(bench.answer(conn), Some(Status::OK));
    }
}

#[test]
fn a_driver_cannot_crowd_out_others_that_wait_for_a_device() {
    let mut bench = Bench::new();
    let (first, greedy, third) = (bench.connect(), bench.connect(), bench.connect());
    bench.bring_up(first);
    bench.request(first, claim(true), Vec::new());
    for _ in 0..100 {
        bench.request(greedy, claim(false), Vec::new());
    }
    bench.request(third, claim(false), Vec::new());
    assert_eq!(bench.answer(greedy), Some(Status::TOO_MANY));
    assert_eq!(bench.answer(third), None, "in line");
    bench.work();
    assert_eq!(bench.answer(third), Some(Status::HELD));
}

#[test]
fn malformed_requests_of_our_own_are_answered_so() {
    let mut bench = Bench::new();
    let conn = bench.connect();
    for id in 0x80..=0x86 {
        let payload = [9; 5];
        let message = Message::BusSpecific {
            id,
            response: false,
            payload: &payload,
        };
        bench.send(conn, message);
        assert_eq!(bench.answer(conn), Some(Status::MALFORMED), "{id:#x}");
    }
    assert_eq!(bench.core.counters().malformed, 7);
}

fn backing_and_view(bench: &mut Bench, conn: ConnId) {
    let (_, fd) = Mapping::memfd("test", 8192, true).expect("memory");
    let backing = BackingAdd {
        id: 5,
        writable: true,
        len: 8192,
        file_offset: 0,
    };
    bench.request(conn, Request::BackingAdd(backing), vec![fd]);
    assert_eq!(bench.answer(conn), Some(Status::OK));
    bench.request(conn, Request::ViewAdd(view(1, 0x1000)), Vec::new());
}

fn view(id: u32, base: u64) -> ViewAdd {
    ViewAdd {
        id,
        writable: true,
        backing: 5,
        base: BusAddr(base),
        len: 4096,
        offset: 4096,
        more: false,
    }
}

#[test]
fn a_change_of_views_is_answered_when_every_worker_has_the_table() {
    let mut bench = Bench::new();
    let conn = bench.connect();
    bench.bring_up(conn);
    backing_and_view(&mut bench, conn);
    assert_eq!(bench.orders(), ["SetMemory"]);
    assert_eq!(bench.answer(conn), None, "the device does not see it yet");
    bench.work();
    assert_eq!(bench.answer(conn), Some(Status::OK));
    let remove = Request::BackingRemove { id: 5 };
    bench.request(conn, remove, Vec::new());
    assert_eq!(bench.answer(conn), Some(Status::BAD_STATE));
    let window = Request::WindowRemove { id: 1, more: false };
    bench.request(conn, window, Vec::new());
    assert_eq!(bench.answer(conn), None, "the device may still use it");
    // The driver does not wait for that answer, and the worker may have the file mapped still.
    bench.request(conn, remove, Vec::new());
    assert_eq!(bench.answer(conn), None);
    assert_eq!(bench.orders(), ["SetMemory", "SetMemory"]);
    bench.work();
    assert_eq!(bench.answer(conn), Some(Status::OK));
    assert_eq!(bench.answer(conn), Some(Status::OK));
}

#[test]
fn views_and_backings_of_others_cannot_be_named() {
    let mut bench = Bench::new();
    let (one, two) = (bench.connect(), bench.connect());
    backing_and_view(&mut bench, one);
    assert_eq!(bench.answer(one), Some(Status::OK));
    bench.request(two, Request::ViewAdd(view(1, 0x1000)), Vec::new());
    assert_eq!(bench.answer(two), Some(Status::NOT_FOUND));
    bench.request(two, Request::BackingRemove { id: 5 }, Vec::new());
    assert_eq!(bench.answer(two), Some(Status::NOT_FOUND));
    let window = Request::WindowRemove { id: 1, more: false };
    bench.request(two, window, Vec::new());
    assert_eq!(bench.answer(two), Some(Status::NOT_FOUND));
    let none = BackingAdd {
        id: 6,
        writable: true,
        len: 4096,
        file_offset: 0,
    };
    bench.request(two, Request::BackingAdd(none), Vec::new());
    assert_eq!(bench.answer(two), Some(Status::BAD_FD), "without a file");
}

#[test]
fn a_device_without_regions_says_so_to_its_driver_and_nothing_to_others() {
    let mut bench = Bench::new();
    let conn = bench.connect();
    let ask = |dev| Request::SharedMemory {
        dev: DevNum(dev),
        id: 0,
    };
    bench.request(conn, ask(0), Vec::new());
    assert_eq!(bench.answer(conn), Some(Status::DENIED));
    bench.request(conn, ask(9), Vec::new());
    assert_eq!(bench.answer(conn), Some(Status::NOT_FOUND));
    bench.bring_up(conn);
    bench.request(conn, ask(0), Vec::new());
    assert_eq!(bench.answer(conn), Some(Status::NOT_FOUND));
}

#[test]
fn devices_stopped_by_an_unmapped_address_are_counted() {
    let mut bench = Bench::new();
    let conn = bench.connect();
    bench.bring_up(conn);
    for unmapped in [true, false] {
        let why = "queue 0: 16 bytes at bus address 0x1000 are outside every window".into();
        bench.notice(Notice::Broken { why, unmapped });
    }
    assert_eq!(bench.core.counters().unmapped, 1);
}
