// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device machine: queues and kicks.

use super::bench::*;
use virtio_msg::device::{Action, ActionResult, Handled, Ignored, Options};
use virtio_msg::{
    ConfigData, DeviceStatus, Generation, Message, QueueIndex, QueueSize, VqueueConfig, feature,
};

#[test]
fn a_queue_is_set_up_between_features_ok_and_its_reset() {
    let mut b = Bench::new(&[]);
    b.status(3);
    assert!(!b.set_queue(QUEUE), "before FEATURES_OK");
    b.status(0xb);
    assert!(b.set_queue(QUEUE));
    assert!(b.set_queue(QUEUE), "the same again");
    assert!(
        !b.set_queue(VqueueConfig {
            size: QueueSize(32),
            ..QUEUE
        }),
        "another without reset"
    );
    assert_eq!(b.machine.queue(QueueIndex(0)), Some(QUEUE));
    b.status(0xf);
    assert!(
        b.set_queue(VqueueConfig {
            index: QueueIndex(1),
            size: QueueSize(16),
            ..QUEUE
        }),
        "while running"
    );
    let setups = b
        .actions
        .iter()
        .filter(|a| matches!(a, Action::SetQueue(..)))
        .count();
    assert_eq!((setups, b.machine.counters().bad_queue_setups), (2, 2));
}

#[test]
fn a_bad_queue_setup_is_answered_and_leaves_the_queue_as_it_was() {
    let bad = [
        VqueueConfig {
            size: QueueSize(0),
            ..QUEUE
        },
        VqueueConfig {
            size: QueueSize(48),
            ..QUEUE
        },
        VqueueConfig {
            size: QueueSize(128),
            ..QUEUE
        },
        VqueueConfig {
            size: QueueSize(65536 + 64),
            ..QUEUE
        },
        VqueueConfig {
            descriptor: 0x1008,
            ..QUEUE
        },
        VqueueConfig {
            driver: 0x2001,
            ..QUEUE
        },
        VqueueConfig {
            device: 0x3002,
            ..QUEUE
        },
        VqueueConfig {
            descriptor: u64::MAX - 15,
            ..QUEUE
        },
        VqueueConfig {
            driver: u64::MAX - 1,
            ..QUEUE
        },
        VqueueConfig {
            device: u64::MAX - 3,
            ..QUEUE
        },
        VqueueConfig {
            index: QueueIndex(2),
            ..QUEUE
        },
        VqueueConfig {
            index: QueueIndex(3),
            ..QUEUE
        },
        VqueueConfig {
            index: QueueIndex(u32::MAX),
            ..QUEUE
        },
    ];
    let mut b = Bench::new(&[]);
    b.status(0xb);
    b.actions.clear();
    for config in bad {
        assert!(!b.set_queue(config), "{config:?}");
    }
    assert_eq!(b.actions, []);
    assert_eq!(b.machine.counters().bad_queue_setups, 13);
    b.refuse = true;
    assert!(!b.set_queue(QUEUE), "the device refuses");
    b.refuse = false;
    assert!(b.set_queue(QUEUE));
}

#[test]
fn a_packed_queue_may_have_any_size() {
    let mut b = Bench::new(&[feature::RING_PACKED]);
    b.accept(1, &[1 << 2]);
    b.status(0xb);
    assert!(
        !b.set_queue(VqueueConfig {
            size: QueueSize(48),
            ..QUEUE
        }),
        "driver area on 2 bytes"
    );
    assert!(b.set_queue(VqueueConfig {
        size: QueueSize(48),
        driver: 0x2004,
        ..QUEUE
    }));
}

#[test]
fn a_larger_queue_than_allowed_is_taken_if_tolerated() {
    let mut b = Bench::with(
        &[],
        Options {
            tolerated_queue_size: 1024,
            ..Options::new(48)
        },
    );
    b.status(0xb);
    assert!(!b.set_queue(VqueueConfig {
        size: QueueSize(2048),
        ..QUEUE
    }));
    assert!(b.set_queue(VqueueConfig {
        size: QueueSize(1024),
        ..QUEUE
    }));
    assert!(
        !b.set_queue(VqueueConfig {
            index: QueueIndex(2),
            ..QUEUE
        }),
        "there is no such queue"
    );
}

#[test]
fn a_queue_is_reset_without_ring_reset_and_can_be_set_up_again() {
    let mut b = Bench::new(&[]).running();
    b.offer(kick(0)).expect("an event");
    b.machine.notify_used(QueueIndex(0));
    b.offer(Message::ResetVqueue(QueueIndex(0))).expect("idle");
    assert_eq!(
        b.machine.poll_action(),
        Some(Action::ResetQueue(QueueIndex(0)))
    );
    assert_eq!(
        b.offer(kick(0)),
        Ok(Handled::Ignored(Ignored::QueueNotReady))
    );
    b.machine.complete(ActionResult::Done);
    assert_eq!(b.sent().map(|m| m[1]), Some(0x0b));
    assert_eq!((b.sent(), b.machine.poll_action()), (None, None));
    assert!(b.set_queue(VqueueConfig {
        size: QueueSize(8),
        ..QUEUE
    }));
    for missing in [1, 2, 7, u32::MAX] {
        b.ask(Message::ResetVqueue(QueueIndex(missing)), |answer| {
            assert_eq!(answer, Message::VqueueReset)
        });
    }
    assert_eq!(b.machine.counters().bad_queue_resets, 3);
}

#[test]
fn kicks_pass_a_busy_machine_and_come_once_for_each_queue() {
    let mut b = Bench::new(&[]).running();
    b.set_queue(VqueueConfig {
        index: QueueIndex(1),
        size: QueueSize(16),
        ..QUEUE
    });
    b.offer(Message::SetConfig(ConfigData {
        generation: Generation(0),
        offset: 0,
        len: 1,
        data: &[1],
    }))
    .expect("idle");
    assert!(matches!(
        b.machine.poll_action(),
        Some(Action::WriteConfig { .. })
    ));
    for queue in [1, 0, 1, 1] {
        assert_eq!(b.offer(kick(queue)), Ok(Handled::Event));
    }
    assert_eq!(
        b.machine.poll_action(),
        Some(Action::Avail {
            queue: QueueIndex(1),
            next: 0
        })
    );
    assert_eq!(
        b.machine.poll_action(),
        Some(Action::Avail {
            queue: QueueIndex(0),
            next: 0
        })
    );
    assert_eq!(b.machine.poll_action(), None);
    assert_eq!(b.offer(kick(1)), Ok(Handled::Event));
    assert_eq!(
        b.machine.poll_action(),
        Some(Action::Avail {
            queue: QueueIndex(1),
            next: 0
        })
    );
    b.machine.notify_used(QueueIndex(1));
    assert_eq!(
        b.sent().expect("an event"),
        [0, 0x42, 4, 0, 0, 0, 12, 0, 1, 0, 0, 0]
    );
    for queue in [2, 3, u32::MAX] {
        assert_eq!(
            b.offer(kick(queue)),
            Ok(Handled::Ignored(Ignored::QueueNotReady))
        );
        b.machine.notify_used(QueueIndex(queue));
    }
    assert_eq!(b.sent(), None);
}

#[test]
fn a_kick_before_driver_ok_is_kept() {
    let mut b = Bench::new(&[]);
    b.status(0xb);
    b.set_queue(QUEUE);
    b.offer(Message::SetDeviceStatus(DeviceStatus::from_bits_retain(
        0xf,
    )))
    .expect("idle");
    assert_eq!(b.machine.poll_action(), Some(Action::DriverOk));
    assert_eq!(b.offer(kick(0)), Ok(Handled::Event));
    assert_eq!(b.machine.poll_action(), None);
    b.machine.complete(ActionResult::Done);
    assert_eq!(
        b.machine.poll_action(),
        Some(Action::Avail {
            queue: QueueIndex(0),
            next: 0
        })
    );
}

#[test]
fn notification_data_passes_only_if_negotiated() {
    let offered = [feature::VERSION_1, feature::NOTIFICATION_DATA];
    for allowed in [false, true] {
        let mut b = Bench::with(
            &offered,
            Options {
                notification_data: allowed,
                ..Options::new(48)
            },
        );
        assert_eq!(b.machine.offered().bit(feature::NOTIFICATION_DATA), allowed);
        b.accept(1, &[if allowed { 0x41 } else { 1 }]);
        let mut b = b.running_as_is();
        b.offer(Message::EventAvail {
            queue: QueueIndex(0),
            next: 0x8000_0001,
        })
        .expect("an event");
        let next = if allowed { 0x8000_0001 } else { 0 };
        assert_eq!(
            b.machine.poll_action(),
            Some(Action::Avail {
                queue: QueueIndex(0),
                next
            })
        );
    }
}
