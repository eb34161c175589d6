// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver adapter against devices that behave in all kinds of ways.

use crate::recorded::Bytes;
use crate::stack::{Driver, bytes};
use std::cell::RefCell;
use virtio_msg::r1::{
    self, Busy, DriverAdapter, DriverOptions, Ignored, MESSAGE_SIZE, Message as R1, Outcome,
    Translate,
};
use virtio_msg::{
    ConfigData, DeviceStatus, FeatureBlocks, Generation, Message, QueueIndex, QueueSize, U32,
    VqueueConfig, decode,
};

/// A device as QEMU's: answers what it has a handler for, with what it has.
struct Qemu {
    status: DeviceStatus,
    config: Vec<u8>,
    generation: u32,
    /// Adds one to the generation at each of so many reads to come.
    unsteady: u32,
    features: u64,
    queues: u32,
    taken: Vec<R1>,
}

impl Qemu {
    fn new() -> Qemu {
        Qemu {
            status: DeviceStatus::RESET,
            config: (1..=10).collect(),
            generation: 7,
            unsteady: 0,
            features: 0x0000_0103_0000_0020,
            queues: 2,
            taken: Vec::new(),
        }
    }

    fn answer(&mut self, line: &Bytes) -> Vec<Bytes> {
        let message = r1::decode(line).expect("an r1 message").message;
        self.taken.push(message);
        let answer = match message {
            R1::GetDeviceInfo => R1::DeviceInfo {
                version: 1,
                device_id: 1,
                vendor_id: 0x554d_4551,
            },
            R1::GetFeatures { .. } => R1::Features {
                index: 0,
                features: self.features,
            },
            R1::SetFeatures { features, .. } => R1::FeaturesSet { index: 0, features },
            R1::GetConfig { offset, size } => {
                assert!([1, 2, 4].contains(&size) && offset % u32::from(size) == 0);
                if self.unsteady > 0 {
                    self.unsteady -= 1;
                    self.generation += 1;
                }
                let (from, size_) = (usize::try_from(offset).expect("small"), usize::from(size));
                let data = match self.config.get(from..from + size_) {
                    Some(bytes) => bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)),
                    None => (1 << (8 * u32::from(size))) - 1,
                };
                R1::Config { offset, size, data }
            }
            R1::SetConfig { offset, size, data } => {
                assert!([1, 2, 4].contains(&size) && offset % u32::from(size) == 0);
                self.generation += 1;
                R1::ConfigSet { offset, size, data }
            }
            R1::GetConfigGen => R1::ConfigGen(Generation(self.generation)),
            R1::GetDeviceStatus => R1::DeviceStatus(self.status),
            R1::SetDeviceStatus(status) => {
                self.status = status;
                return vec![];
            }
            R1::GetVqueue(index) => R1::Vqueue {
                index,
                max_size: QueueSize(if index.0 < self.queues { 1024 } else { 0 }),
            },
            R1::EventAvail { .. } => {
                assert!(
                    self.status.contains(DeviceStatus::DRIVER_OK),
                    "QEMU breaks the device"
                );
                return vec![];
            }
            _ => return vec![],
        };
        vec![bytes(answer)]
    }
}

fn driver(qemu: &RefCell<Qemu>) -> Driver<impl FnMut(&Bytes) -> Vec<Bytes> + '_> {
    Driver::new(|line| qemu.borrow_mut().answer(line))
}

fn queue(index: u32, size: u32) -> VqueueConfig {
    VqueueConfig {
        index: QueueIndex(index),
        size: QueueSize(size),
        descriptor: 0x4000_0000,
        driver: 0x4000_1000,
        device: 0x4000_2000,
    }
}

fn status(bits: u32) -> Message<'static> {
    Message::SetDeviceStatus(DeviceStatus::from_bits_retain(bits))
}

#[test]
fn a_device_says_what_r1_does_not() {
    let qemu = RefCell::new(Qemu::new());
    let mut driver = driver(&qemu);
    assert_eq!(
        driver.line(&Message::GetDeviceInfo),
        "GET_DEVICE_INFO response: device id 1, vendor 0x554d4551, 64 feature bits, 24 config bytes, 2 queues"
    );
    // RING_RESET is not shown, other blocks are empty.
    assert_eq!(
        driver.line(&Message::GetDeviceFeatures { first: 0, count: 3 }),
        "GET_DEVICE_FEATURES response: blocks 0+3: 0x00000020 0x00000003 0x00000000"
    );
    assert_eq!(
        driver.line(&Message::GetDeviceFeatures { first: 1, count: 1 }),
        "GET_DEVICE_FEATURES response: blocks 1+1: 0x00000003"
    );
    assert_eq!(
        driver.line(&Message::GetDeviceFeatures {
            first: u32::MAX,
            count: 2
        }),
        "GET_DEVICE_FEATURES response: blocks 4294967295+2: 0x00000000 0x00000000"
    );
    assert_eq!(
        driver.line(&Message::GetShm { index: 3 }),
        "GET_SHM response: region 3, no such region"
    );
    assert_eq!(
        driver.line(&Message::Ping { data: 0x1234_5678 }),
        "PING response: data 0x12345678"
    );
}

#[test]
fn a_device_with_endless_queues_has_as_many_as_the_adapter_holds() {
    let qemu = RefCell::new(Qemu {
        queues: u32::MAX,
        ..Qemu::new()
    });
    let mut driver = driver(&qemu);
    assert!(driver.line(&Message::GetDeviceInfo).ends_with("64 queues"));
    assert_eq!(driver.wire.len(), 65);
    assert_eq!(
        driver.line(&Message::GetVqueue(QueueIndex(64))),
        "GET_VQUEUE response: queue 64, no such queue"
    );
    assert_eq!(
        driver.line(&Message::SetVqueue(queue(64, 8))),
        "SET_VQUEUE response"
    );
    assert_eq!(
        driver.line(&Message::ResetVqueue(QueueIndex(u32::MAX))),
        "RESET_VQUEUE response"
    );
    assert_eq!(driver.wire.len(), 65, "QEMU looks at no index");
}

#[test]
fn configuration_is_read_in_natural_pieces_and_again_if_it_changes_meanwhile() {
    let qemu = RefCell::new(Qemu::new());
    let mut driver = driver(&qemu);
    assert_eq!(
        driver.line(&Message::GetConfig { offset: 1, len: 8 }),
        "GET_CONFIG response: generation 7, offset 1, length 8: 02030405 06070809"
    );
    let sizes: Vec<u8> = driver
        .wire
        .iter()
        .filter_map(|m| match m {
            R1::GetConfig { size, .. } => Some(*size),
            _ => None,
        })
        .collect();
    assert_eq!(sizes, [1, 2, 4, 1]);
    qemu.borrow_mut().unsteady = 2;
    assert_eq!(
        driver.line(&Message::GetConfig { offset: 0, len: 4 }),
        "GET_CONFIG response: generation 9, offset 0, length 4: 01020304"
    );
    // It never stays the same: the generation is one from before, so the next look finds another.
    qemu.borrow_mut().unsteady = u32::MAX;
    let line = driver.line(&Message::GetConfig { offset: 0, len: 4 });
    assert_eq!(
        line,
        "GET_CONFIG response: generation 11, offset 0, length 4: 01020304"
    );
    assert_eq!(qemu.borrow().generation, 12);
    assert_eq!(
        driver.line(&Message::GetConfig { offset: 0, len: 0 }),
        "GET_CONFIG response: generation 12, offset 0, length 0"
    );
}

#[test]
fn the_last_bytes_of_a_configuration_that_is_no_multiple_of_four_are_read_too() {
    let qemu = RefCell::new(Qemu::new());
    let mut driver = driver(&qemu);
    assert_eq!(
        driver.line(&Message::GetConfig { offset: 4, len: 12 }),
        "GET_CONFIG response: generation 7, offset 4, length 12: 05060708 090affff ffffffff"
    );
    let far = Message::GetConfig {
        offset: 0x00ff_fffc,
        len: 8,
    };
    assert_eq!(
        driver.line(&far),
        "GET_CONFIG response: generation 7, offset 16777212, length 8: 00000000 00000000"
    );
}

#[test]
fn a_write_with_an_old_generation_is_rejected_and_another_is_told_the_new_one() {
    let qemu = RefCell::new(Qemu::new());
    let mut driver = driver(&qemu);
    let write = |generation| {
        Message::SetConfig(ConfigData {
            generation: Generation(generation),
            offset: 2,
            len: 7,
            data: &[1, 2, 3, 4, 5, 6, 7],
        })
    };
    assert_eq!(
        driver.line(&write(6)),
        "SET_CONFIG response: rejected, generation 7, offset 2"
    );
    assert_eq!(
        driver.line(&write(7)),
        "SET_CONFIG response: generation 10, offset 2, length 7: 01020304 050607"
    );
    let writes: Vec<R1> = driver
        .wire
        .iter()
        .copied()
        .filter(|m| matches!(m, R1::SetConfig { .. }))
        .collect();
    assert_eq!(
        writes,
        [
            R1::SetConfig {
                offset: 2,
                size: 2,
                data: 0x0201
            },
            R1::SetConfig {
                offset: 4,
                size: 4,
                data: 0x0605_0403
            },
            R1::SetConfig {
                offset: 8,
                size: 1,
                data: 7
            },
        ]
    );
}

#[test]
fn a_queue_is_shown_as_it_was_set_until_it_or_the_device_is_reset() {
    let qemu = RefCell::new(Qemu::new());
    let mut driver = driver(&qemu);
    driver.line(&Message::GetDeviceInfo);
    let get = Message::GetVqueue(QueueIndex(1));
    assert_eq!(
        driver.line(&get),
        "GET_VQUEUE response: queue 1, size 0 of 1024"
    );
    driver.line(&Message::SetVqueue(queue(1, 256)));
    let set = "GET_VQUEUE response: queue 1, size 256 of 1024, descriptor 0x40000000, driver 0x40001000, device 0x40002000";
    assert_eq!(driver.line(&get), set);
    assert_eq!(
        driver.line(&Message::ResetVqueue(QueueIndex(1))),
        "RESET_VQUEUE response"
    );
    assert_eq!(
        driver.line(&get),
        "GET_VQUEUE response: queue 1, size 0 of 1024"
    );
    driver.line(&Message::SetVqueue(queue(1, 256)));
    driver.line(&status(0));
    assert_eq!(
        driver.line(&get),
        "GET_VQUEUE response: queue 1, size 0 of 1024"
    );
    // Larger than the queue can be, or no queue at all: the device does not see it.
    let sent = driver.wire.len();
    driver.line(&Message::SetVqueue(queue(1, 2048)));
    driver.line(&Message::SetVqueue(queue(1, 0)));
    driver.line(&Message::SetVqueue(queue(2, 8)));
    assert_eq!(driver.wire.len(), sent);
    assert_eq!(
        driver.line(&get),
        "GET_VQUEUE response: queue 1, size 0 of 1024"
    );
}

#[test]
fn kicks_wait_for_driver_ok_and_are_forgotten_by_a_reset() {
    let qemu = RefCell::new(Qemu::new());
    let mut driver = driver(&qemu);
    let kick = |q| Message::EventAvail {
        queue: QueueIndex(q),
        next: 0x8000_0005,
    };
    driver.line(&Message::SetVqueue(queue(0, 8)));
    driver.line(&status(11));
    driver.event(kick(0));
    driver.event(kick(0));
    // A queue that is not set up.
    driver.event(kick(1));
    assert!(
        !driver
            .wire
            .iter()
            .any(|m| matches!(m, R1::EventAvail { .. }))
    );
    driver.line(&status(15));
    let kicks = |wire: &[R1]| {
        wire.iter()
            .filter(|m| matches!(m, R1::EventAvail { .. }))
            .count()
    };
    assert_eq!(kicks(&driver.wire), 1);
    assert_eq!(
        driver.wire.last(),
        Some(&R1::EventAvail {
            queue: QueueIndex(0),
            next_offset: 5,
            next_wrap: 1
        })
    );
    driver.line(&status(0));
    driver.event(kick(0));
    driver.line(&status(0));
    driver.line(&Message::SetVqueue(queue(0, 8)));
    driver.line(&status(15));
    assert_eq!(kicks(&driver.wire), 1);
}

#[test]
fn features_that_r1_cannot_carry_are_refused() {
    let qemu = RefCell::new(Qemu::new());
    let mut driver = driver(&qemu);
    let words = [U32::new(0), U32::new(1), U32::new(1)];
    let blocks = FeatureBlocks {
        first: 0,
        count: 3,
        words: &words,
    };
    driver.line(&Message::SetDriverFeatures(blocks));
    assert_eq!(driver.line(&status(11)), "SET_DEVICE_STATUS response: 0x03");
    driver.line(&status(0));
    let blocks = FeatureBlocks {
        first: 0,
        count: 2,
        words: &words[..2],
    };
    driver.line(&Message::SetDriverFeatures(blocks));
    assert_eq!(driver.line(&status(11)), "SET_DEVICE_STATUS response: 0x0b");
}

#[test]
fn events_are_merged_and_a_changed_configuration_comes_with_its_generation() {
    let qemu = RefCell::new(Qemu::new());
    let mut driver = driver(&qemu);
    driver.line(&Message::SetVqueue(queue(1, 8)));
    let used = |q| {
        bytes(R1::EventUsed {
            queue: QueueIndex(q),
        })
    };
    for _ in 0..3 {
        assert_eq!(driver.adapter.handle_wire(&used(1)), Ok(Outcome::Taken));
    }
    for nonsense in [0, 2, 64, u32::MAX] {
        assert_eq!(
            driver.adapter.handle_wire(&used(nonsense)),
            Ok(Outcome::Ignored(Ignored::OutOfRange))
        );
    }
    let changed = bytes(R1::EventConfig {
        status: DeviceStatus::from_bits_retain(0x4f),
        offset: 0,
        size: 0,
        value: [0; 16],
    });
    assert_eq!(driver.adapter.handle_wire(&changed), Ok(Outcome::Taken));
    driver.settle();
    let lines: Vec<String> = driver
        .messages()
        .iter()
        .map(|m| decode(m, MESSAGE_SIZE).expect("an event").to_string())
        .collect();
    assert_eq!(
        lines,
        [
            "dev 0 EVENT_CONFIG: status 0x4f, generation 7, offset 0, length 0",
            "dev 0 EVENT_USED: queue 1"
        ]
    );
}

#[test]
fn pages_are_where_they_are_asked_for_unless_the_owner_says_otherwise() {
    let translate = bytes(R1::IommuTranslate {
        va: 0x4000_3000,
        prot: 3,
    });
    let mut wire = [0; 40];
    let mut adapter: DriverAdapter = DriverAdapter::default();
    assert_eq!(adapter.handle_wire(&translate), Ok(Outcome::Taken));
    assert_eq!(adapter.handle_wire(&translate), Err(Busy));
    assert_eq!(adapter.poll_wire(&mut wire), Some(40));
    let answer = |pa, prot| R1::IommuTranslated {
        va: 0x4000_3000,
        pa,
        prot,
    };
    assert_eq!(wire, bytes(answer(0x4000_3000, 3)));
    assert_eq!(adapter.handle_wire(&translate), Ok(Outcome::Taken));

    let options = DriverOptions {
        ask_translate: true,
        ..DriverOptions::default()
    };
    let mut adapter: DriverAdapter = DriverAdapter::new(options);
    adapter.answer_translate(1, 1);
    assert_eq!(adapter.poll_wire(&mut wire), None);
    assert_eq!(adapter.handle_wire(&translate), Ok(Outcome::Taken));
    assert_eq!(adapter.poll_wire(&mut wire), None);
    assert_eq!(
        adapter.poll_translate(),
        Some(Translate {
            va: 0x4000_3000,
            prot: 3
        })
    );
    adapter.answer_translate(0, 0);
    assert_eq!(adapter.poll_wire(&mut wire), Some(40));
    assert_eq!(wire, bytes(answer(0, 0)));
}

#[test]
fn after_a_reset_of_the_adapter_nothing_is_left_of_the_peer() {
    let qemu = RefCell::new(Qemu::new());
    let mut driver = driver(&qemu);
    driver.bring_up(0x3_0000_0020, &[queue(0, 8)]);
    driver.adapter.reset();
    assert_eq!(driver.adapter.poll_wire(&mut [0; 40]), None);
    assert_eq!(
        driver.line(&Message::GetVqueue(QueueIndex(0))),
        "GET_VQUEUE response: queue 0, size 0 of 1024"
    );
    assert!(driver.adapter.counters().requests > 10);
}
