// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bringing devices up: one that behaves, and those that do not.

mod common;

use common::{ScriptedClient, World, client};
use virtio_msg::device::{Action, ActionResult, DeviceMachine, Identity, Options, QueueSlot};
use virtio_msg::{
    DevNum, DeviceStatus, FeatureSet, Frame, Message, QueueIndex, QueueSize, VqueueConfig,
    VqueueInfo, feature,
};
use vmsg_driver::{Device, Error, Fault, Wanted};

const DEVICE: DevNum = DevNum(3);

fn offered() -> FeatureSet {
    FeatureSet::from_bits(&[5, feature::VERSION_1, feature::ACCESS_PLATFORM])
}

fn config(index: u32, size: u32) -> VqueueConfig {
    VqueueConfig {
        index: QueueIndex(index),
        size: QueueSize(size),
        descriptor: 0x1000,
        driver: 0x2000,
        device: 0x3000,
    }
}

/// A client of a device with two queues and 8 bytes of configuration. `lie` may answer in its place.
fn with_device(lie: impl Fn(&mut World, &Frame<'_>) -> bool + 'static) -> ScriptedClient {
    let mut machine = DeviceMachine::new(
        DEVICE,
        Identity {
            device_id: 1,
            vendor_id: 2,
            ..Identity::default()
        },
        offered(),
        [QueueSlot::new(8), QueueSlot::new(4)],
        [1, 2, 3, 4, 5, 6, 7, 8],
        Options::new(48),
    );
    let (client, _) = client(48, move |world, frame| {
        if lie(world, frame) {
            return;
        }
        machine
            .handle_message(virtio_msg::Instant(0), frame)
            .expect("one request at a time");
        while let Some(action) = machine.poll_action() {
            if action.wants_completion() {
                let refused = matches!(action, Action::FeaturesOk(set) if set.bit(5) && !set.bit(feature::VERSION_1));
                machine.complete(if refused {
                    ActionResult::Refused
                } else {
                    ActionResult::Done
                });
            }
        }
        let mut out = [0; 48];
        while let Some(size) = machine.poll_transmit(&mut out) {
            world.deliver(std::time::Duration::ZERO, out[..size].to_vec());
        }
    });
    client
}

fn honest() -> ScriptedClient {
    with_device(|_, _| false)
}

/// Answers requests for which `wanted` holds with `answer`.
fn lying(
    wanted: impl Fn(&Message<'_>) -> bool + 'static,
    answer: impl Fn(&Message<'_>) -> Message<'static> + 'static,
) -> ScriptedClient {
    with_device(move |world, frame| {
        let lies = wanted(&frame.message);
        if lies {
            world.reply(&frame.response(answer(&frame.message)));
        }
        lies
    })
}

#[test]
fn a_device_is_brought_up_used_and_reset() {
    let mut client = honest();
    let wanted = Wanted {
        supported: FeatureSet::from_bits(&[5, 6]),
        ..Wanted::default()
    };
    let mut device = Device::open(&mut client, DEVICE, &wanted).unwrap();
    // ACCESS_PLATFORM is accepted wherever it is offered.
    assert_eq!(device.features(), offered());
    assert_eq!(
        (
            device.number(),
            device.info().device_id,
            device.info().max_queues
        ),
        (DEVICE, 1, 2)
    );
    assert_eq!(
        device.queue(&mut client, QueueIndex(0)).unwrap().max_size,
        QueueSize(8)
    );
    assert!(matches!(
        device.queue(&mut client, QueueIndex(2)),
        Err(Error::NoQueue(QueueIndex(2)))
    ));
    device.set_queue(&mut client, config(0, 8)).unwrap();
    device.set_queue(&mut client, config(1, 4)).unwrap();
    device.start(&mut client).unwrap();
    let running = DeviceStatus::ACKNOWLEDGE
        | DeviceStatus::DRIVER
        | DeviceStatus::FEATURES_OK
        | DeviceStatus::DRIVER_OK;
    assert_eq!(client.status(DEVICE).unwrap(), running);
    let mut bytes = [0; 4];
    device.read_config(&mut client, 4, &mut bytes).unwrap();
    assert_eq!(bytes, [5, 6, 7, 8]);
    device.write_config(&mut client, 0, &[9, 9]).unwrap();
    device.read_config(&mut client, 0, &mut bytes).unwrap();
    assert_eq!(bytes, [9, 9, 3, 4]);
    assert!(matches!(
        device.read_config(&mut client, 6, &mut bytes),
        Err(Error::ConfigRange { offset: 6, len: 4 })
    ));
    assert!(device.write_config(&mut client, u32::MAX, &[0; 2]).is_err());
    // Queues are for before the start.
    assert!(matches!(
        device.set_queue(&mut client, config(1, 4)),
        Err(Error::OutOfStep)
    ));
    device.reset(&mut client).unwrap();
    assert_eq!(client.status(DEVICE).unwrap(), DeviceStatus::RESET);
}

#[test]
fn a_device_without_what_the_driver_needs_is_given_up() {
    let mut client = honest();
    let wanted = Wanted {
        required: FeatureSet::from_bits(&[7]),
        ..Wanted::default()
    };
    let error = Device::open(&mut client, DEVICE, &wanted).unwrap_err();
    assert!(
        matches!(error, Error::MissingFeatures(missing) if missing == FeatureSet::from_bits(&[7]))
    );
    assert_eq!(error.fault(), Fault::Local);
    assert!(
        client
            .status(DEVICE)
            .unwrap()
            .contains(DeviceStatus::FAILED)
    );
}

#[test]
fn a_queue_that_the_device_cannot_have_is_refused() {
    let mut client = honest();
    let mut device = Device::open(&mut client, DEVICE, &Wanted::default()).unwrap();
    let error = device.set_queue(&mut client, config(1, 8)).unwrap_err();
    assert!(
        matches!(error, Error::QueueRefused(QueueIndex(1))),
        "{error}"
    );
    // And once it has failed, nothing more is tried.
    assert!(device.start(&mut client).is_err());
}

#[test]
fn a_device_that_does_not_reset_is_refused() {
    let mut client = lying(
        |message| matches!(message, Message::SetDeviceStatus(DeviceStatus::RESET)),
        |_| Message::DeviceStatusSet(DeviceStatus::DRIVER_OK),
    );
    let error = Device::open(&mut client, DEVICE, &Wanted::default()).unwrap_err();
    assert!(
        matches!(error, Error::StatusRefused(DeviceStatus::DRIVER_OK)),
        "{error}"
    );
}

#[test]
fn a_device_that_refuses_the_features_is_told_apart() {
    let mut client = lying(
        |message| matches!(message, Message::SetDeviceStatus(status) if status.contains(DeviceStatus::FEATURES_OK)),
        |_| Message::DeviceStatusSet(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER),
    );
    let error = Device::open(&mut client, DEVICE, &Wanted::default()).unwrap_err();
    assert!(matches!(error, Error::FeaturesRefused(_)), "{error}");
}

#[test]
fn a_device_that_tells_of_another_queue_is_refused() {
    let mut client = lying(
        |message| matches!(message, Message::GetVqueue(_)),
        |_| {
            Message::Vqueue(VqueueInfo {
                index: QueueIndex(77),
                max_size: QueueSize(8),
                ..VqueueInfo::default()
            })
        },
    );
    let mut device = Device::open(&mut client, DEVICE, &Wanted::default()).unwrap();
    assert_eq!(
        device
            .queue(&mut client, QueueIndex(0))
            .unwrap_err()
            .fault(),
        Fault::Peer
    );
}

#[test]
fn a_device_that_falls_silent_at_any_step_costs_one_timeout() {
    for step in 0..9 {
        let seen = std::cell::Cell::new(0);
        let mut client = with_device(move |_, _| {
            seen.set(seen.get() + 1);
            seen.get() > step
        });
        let before = client.now();
        let result =
            Device::open(&mut client, DEVICE, &Wanted::default()).and_then(|mut device| {
                device.set_queue(&mut client, config(0, 8))?;
                device.start(&mut client)
            });
        assert!(
            matches!(result, Err(Error::Timeout { .. })),
            "step {step}: {result:?}"
        );
        assert_eq!(
            client.now().saturating_since(before),
            client.timeout(),
            "step {step}"
        );
    }
}

#[cfg(feature = "virtio-drivers")]
mod transport {
    use std::cell::RefCell;

    use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};
    use vmsg_driver::virtio_drivers::MsgTransport;

    use super::*;

    #[test]
    fn a_transport_does_what_a_driver_asks() {
        let client = RefCell::new(honest());
        let mut transport = MsgTransport::new(&client, DEVICE).unwrap();
        assert_eq!(transport.device_type(), DeviceType::Network);
        transport.set_status(DeviceStatus::empty());
        transport.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
        assert_eq!(transport.read_device_features(), offered().low_u64());
        // The driver does not know ACCESS_PLATFORM; the transport accepts it all the same.
        transport.write_driver_features(1 << feature::VERSION_1);
        transport.set_status(
            DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK,
        );
        assert_eq!(
            (transport.max_queue_size(0), transport.max_queue_size(9)),
            (8, 0)
        );
        assert!(!transport.queue_used(0));
        transport.queue_set(0, 8, 0x1000, 0x2000, 0x3000);
        assert!(transport.queue_used(0));
        assert_eq!(transport.read_config_space::<u32>(4).unwrap(), 0x0807_0605);
        assert!(transport.read_config_space::<u32>(6).is_err());
        transport.write_config_space(0, 0x1234_u16).unwrap();
        assert_eq!(transport.read_config_space::<u16>(0).unwrap(), 0x1234);
        assert!(transport.error().is_none());
        transport.queue_unset(0);
        assert_eq!(transport.get_status(), DeviceStatus::empty());
    }

    #[test]
    fn a_transport_breaks_on_a_refused_status_or_queue_and_stays_broken() {
        let refuses_features = lying(
            |message| matches!(message, Message::SetDeviceStatus(status) if !status.is_empty()),
            |_| Message::DeviceStatusSet(virtio_msg::DeviceStatus::ACKNOWLEDGE),
        );
        let forgets_queues = lying(
            |message| matches!(message, Message::SetVqueue(_)),
            |_| Message::VqueueSet,
        );
        for lying in [refuses_features, forgets_queues] {
            let client = RefCell::new(lying);
            let mut transport = MsgTransport::new(&client, DEVICE).unwrap();
            transport.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
            transport.queue_set(0, 8, 0x1000, 0x2000, 0x3000);
            assert_eq!(transport.get_status(), DeviceStatus::FAILED);
            assert_eq!(transport.read_device_features(), 0);
            assert!(transport.read_config_space::<u8>(0).is_err());
            let error = transport.error().unwrap();
            assert!(
                matches!(error, Error::StatusRefused(_) | Error::QueueRefused(_)),
                "{error}"
            );
        }
    }

    #[test]
    fn a_transport_on_a_silent_bus_waits_once() {
        let silent = with_device(|_, frame| frame.message == Message::GetDeviceStatus);
        let client = RefCell::new(silent);
        let mut transport = MsgTransport::new(&client, DEVICE).unwrap();
        for _ in 0..5 {
            assert_eq!(transport.get_status(), DeviceStatus::FAILED);
        }
        transport.notify(0);
        let waited = client.borrow_mut().now();
        assert_eq!(
            u128::from(waited.0),
            vmsg_driver::DEFAULT_TIMEOUT.as_nanos()
        );
    }
}
