// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver of ours, over r1, with a device of ours.

use crate::stack::{Device, Driver};
use std::cell::RefCell;
use virtio_msg::{
    ConfigData, DeviceStatus, Generation, Message, QueueIndex, QueueSize, VqueueConfig,
};

fn queue(index: u32) -> VqueueConfig {
    VqueueConfig {
        index: QueueIndex(index),
        size: QueueSize(64),
        descriptor: 0x4000_0000,
        driver: 0x4000_1000,
        device: 0x4000_2000,
    }
}

#[test]
fn our_driver_and_our_device_understand_each_other_over_r1() {
    let device = RefCell::new(Device::net(
        0x3_0000_0020,
        64,
        &[2, 1, 2, 3, 4, 5, 1, 0, 9, 8],
    ));
    let mut driver = Driver::new(|line| device.borrow_mut().takes(line));
    let bringup = driver.bring_up(0x1_0000_0020, &[queue(0), queue(1)]);
    assert_eq!(bringup.features().low_u64(), 0x3_0000_0020);
    assert_eq!(bringup.info().max_queues, 3);
    assert_eq!(device.borrow().machine.status().bits(), 15);
    assert_eq!(device.borrow().machine.queue(QueueIndex(1)), Some(queue(1)));

    assert_eq!(
        driver.line(&Message::GetConfig { offset: 0, len: 10 }),
        "GET_CONFIG response: generation 0, offset 0, length 10: 02010203 04050100 0908"
    );
    let write = ConfigData {
        generation: Generation(0),
        offset: 8,
        len: 2,
        data: &[7, 7],
    };
    assert_eq!(
        driver.line(&Message::SetConfig(write)),
        "SET_CONFIG response: generation 1, offset 8, length 2: 0707"
    );
    assert_eq!(
        driver.line(&Message::SetConfig(write)),
        "SET_CONFIG response: rejected, generation 1, offset 8"
    );

    driver.event(Message::EventAvail {
        queue: QueueIndex(1),
        next: 0,
    });
    assert_eq!(device.borrow().kicks, [QueueIndex(1)]);
    device.borrow_mut().machine.notify_used(QueueIndex(1));
    device.borrow_mut().machine.update_config(6, &[3]);
    let said = device.borrow_mut().works();
    assert_eq!(said.len(), 2);
    for line in said {
        driver.adapter.handle_wire(&line).expect("room");
    }
    driver.line(&Message::GetDeviceStatus);
    assert_eq!(
        driver.events,
        [
            "dev 0 EVENT_CONFIG: status 0x0f, generation 2, offset 0, length 0",
            "dev 0 EVENT_USED: queue 1"
        ]
    );

    assert_eq!(
        driver.line(&Message::SetDeviceStatus(DeviceStatus::RESET)),
        "SET_DEVICE_STATUS response: 0x00"
    );
    assert_eq!(device.borrow().machine.queue(QueueIndex(1)), None);
    driver.bring_up(0x1_0000_0020, &[queue(0), queue(1), queue(2)]);
    assert_eq!(device.borrow().machine.counters().bad_queue_setups, 0);
}
