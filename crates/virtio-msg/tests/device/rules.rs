// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device machine: what it is, configuration, features, status.

use super::bench::*;
use virtio_msg::device::{
    Action, ActionResult, Busy, DeviceMachine, Handled, Ignored, Options, QueueSlot, answer_absent,
};
use virtio_msg::{
    ConfigData, DevNum, DeviceInfo, DeviceStatus, FeatureSet, Frame, Generation, Instant, Message,
    QueueIndex, QueueSize, ShmInfo, Token, VqueueConfig,
};

#[test]
fn the_device_tells_what_it_is() {
    let mut b = Bench::new(&[0, 32]);
    let info = b.ask(Message::GetDeviceInfo, |answer| match answer {
        Message::DeviceInfo(info) => info,
        other => panic!("{other}"),
    });
    let expected = DeviceInfo {
        device_id: 2,
        vendor_id: 7,
        feature_bits: 64,
        config_size: 60,
        max_queues: 3,
        ..DeviceInfo::ABSENT
    };
    assert_eq!(info, expected);
    assert_eq!(Bench::new(&[]).machine.info().feature_bits, 64);
    assert_eq!(Bench::new(&[70]).machine.info().feature_bits, 96);
}

#[test]
fn an_absent_device_answers_one_message_with_zeros() {
    let mut out = [0xff; 48];
    let size = answer_absent(
        &Frame::new(DevNum(9), Token(3), Message::GetDeviceInfo),
        &mut out,
    )
    .expect("answered");
    assert_eq!(size, 32);
    assert_eq!(out[..8], [1, 2, 9, 0, 3, 0, 32, 0]);
    assert_eq!(out[8..32], [0; 24]);
    assert_eq!(
        answer_absent(
            &Frame::new(DevNum(9), Token(3), Message::GetDeviceStatus),
            &mut out
        ),
        None
    );
}

#[test]
fn feature_blocks_past_the_last_are_zero() {
    let mut b = Bench::new(&[1, 32, 255]);
    for (first, count, expected) in [
        (0, 2, vec![2, 1]),
        (1, 1, vec![1]),
        (6, 4, vec![0, 0x8000_0000, 0, 0]),
        (u32::MAX, 2, vec![0, 0]),
        (0, 0, vec![]),
    ] {
        let words = b.ask(
            Message::GetDeviceFeatures { first, count },
            |answer| match answer {
                Message::DeviceFeatures(f) if f.first == first && f.count == count => {
                    f.words.iter().map(|w| w.get()).collect::<Vec<_>>()
                }
                other => panic!("{other}"),
            },
        );
        assert_eq!(words, expected, "blocks {first}+{count}");
    }
}

#[test]
fn what_cannot_be_answered_in_one_message_is_dropped() {
    let mut b = Bench::new(&[]);
    let ignored = Ok(Handled::Ignored(Ignored::ResponseTooLong));
    assert_eq!(
        b.offer(Message::GetDeviceFeatures { first: 0, count: 9 }),
        ignored
    );
    assert_eq!(b.offer(Message::GetConfig { offset: 0, len: 29 }), ignored);
    assert_eq!(
        b.offer(Message::GetConfig {
            offset: 0,
            len: u32::MAX
        }),
        ignored
    );
    assert_eq!(b.sent(), None);
    assert_eq!(b.machine.counters().ignored, 3);
    assert_eq!(b.read(0, 28).1.len(), 28);
}

#[test]
fn config_is_read_with_its_generation_and_zeros_beyond_its_end() {
    let mut b = Bench::new(&[]);
    assert_eq!(b.read(5, 3), (0, vec![5, 6, 7]));
    assert_eq!(b.read(58, 4), (0, vec![58, 59, 0, 0]));
    assert_eq!(b.read(u32::MAX, 2), (0, vec![0, 0]));
    assert_eq!(b.machine.counters().config_reads_outside, 2);
    b.machine.update_config(0, &[9]);
    assert_eq!(b.read(0, 0), (1, vec![]));
    assert_eq!(b.read(1000, 0), (1, vec![]));
}

#[test]
fn a_write_of_a_stale_generation_is_rejected() {
    let mut b = Bench::new(&[]);
    assert_eq!(b.write(1, 4, &[1, 2]), (0, 0, vec![]));
    assert_eq!(b.read(4, 2), (0, vec![4, 5]));
    assert_eq!(b.write(0, 4, &[1, 2]), (1, 2, vec![1, 2]));
    assert_eq!(b.write(0, 4, &[3, 4]), (1, 0, vec![]));
    assert_eq!(b.write(1, 59, &[3, 4]), (1, 0, vec![]));
    assert_eq!(b.write(1, u32::MAX, &[3, 4]), (1, 0, vec![]));
    assert_eq!(b.machine.counters().rejected_config_writes, 4);
    assert_eq!(b.read(4, 2), (1, vec![1, 2]));
    let mut lax = Bench::with(
        &[],
        Options {
            reject_stale_config: false,
            ..Options::new(48)
        },
    );
    assert_eq!(lax.write(77, 4, &[1]), (1, 1, vec![1]));
}

#[test]
fn a_device_can_refuse_a_write_or_let_the_driver_see_something_else() {
    let mut b = Bench::new(&[]);
    b.refuse = true;
    assert_eq!(b.write(0, 0, &[5]), (0, 0, vec![]));
    assert_eq!(b.actions, [Action::WriteConfig { offset: 0, len: 1 }]);
    b.offer(Message::SetConfig(ConfigData {
        generation: Generation(0),
        offset: 2,
        len: 2,
        data: &[8, 9],
    }))
    .expect("idle");
    assert_eq!(
        b.machine.poll_action(),
        Some(Action::WriteConfig { offset: 2, len: 2 })
    );
    assert_eq!(b.machine.pending_config(), [8, 9]);
    b.machine.pending_config_mut()[1] = 1;
    assert_eq!(b.machine.config()[2..4], [2, 3]);
    b.machine.complete(ActionResult::Done);
    assert_eq!(b.machine.config()[2..4], [8, 1]);
    assert!(b.machine.pending_config().is_empty());
}

#[test]
fn a_change_is_told_with_its_bytes_and_the_generation_survives_a_reset() {
    let mut b = Bench::new(&[]).running();
    b.machine.update_config(2, &[0xaa, 0xbb]);
    b.machine.update_config(5, &[0xcc]);
    let event = b.sent().expect("an event");
    // Exactly 24 bytes and the data; the generation is the one of the last change.
    assert_eq!(event[..8], [0, 0x40, 4, 0, 0, 0, 28, 0]);
    assert_eq!(
        event[8..24],
        [0xf, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0]
    );
    assert_eq!(event[24..], [0xaa, 0xbb, 4, 0xcc]);
    assert_eq!(b.sent(), None);
    assert_eq!(b.machine.update_config(5, &[0xcc]), Generation(2));
    assert_eq!(b.sent(), None, "nothing has changed");
    b.status(0);
    assert_eq!(b.read(0, 0).0, 2);
    b.machine.update_config(0, &[1]);
    assert_eq!(b.sent(), None, "nobody listens");
}

#[test]
fn a_change_too_long_for_a_message_is_told_without_bytes() {
    let mut b = Bench::new(&[]).running();
    b.machine.update_config(0, &[0xee; 25]);
    let event = b.sent().expect("an event");
    assert_eq!(event[4..8], [0, 0, 24, 0]);
    assert_eq!(event[20..], [0; 4]);
    b.machine.update_config(0, &[0xdd; 24]);
    assert_eq!(b.sent().expect("an event").len(), 48);
}

#[test]
fn a_change_before_driver_ok_is_told_after_it() {
    let mut b = Bench::new(&[]);
    b.status(3);
    b.machine.update_config(0, &[1]);
    b.status(0xb);
    b.machine.update_config(1, &[9]);
    assert_eq!(b.sent(), None);
    b.status(0xf);
    assert_eq!(
        b.events,
        ["dev 4 EVENT_CONFIG: status 0x0f, generation 2, offset 1, length 1: 09"]
    );
}

#[test]
fn a_change_that_was_not_told_before_a_reset_is_not_told_to_the_next_driver() {
    let mut b = Bench::new(&[]).running();
    b.machine.update_config(0, &[1]);
    assert_eq!(
        b.offer(Message::SetDeviceStatus(DeviceStatus::RESET)),
        Ok(Handled::Request)
    );
    b.work();
    let mut b = {
        assert_eq!(b.sent().map(|m| m[1]), Some(8));
        b.running()
    };
    assert_eq!((b.sent(), b.events), (None, vec![]));
}

#[test]
fn features_must_be_offered_but_for_bits_32_and_33() {
    let mut b = Bench::new(&[0, 40]);
    b.status(3);
    b.accept(0, &[1, 0x3]);
    assert_eq!(b.status(0xb), 0xb);
    assert_eq!(
        b.actions.pop(),
        Some(Action::FeaturesOk(FeatureSet::from_bits(&[0])))
    );
    for words in [&[2, 0][..], &[0, 4], &[0, 0, 0, 0, 0, 0, 0, 0, 1]] {
        b.status(0);
        b.status(3);
        b.accept(0, words);
        assert_eq!(b.status(0xb), 3, "{words:?}");
        assert_eq!(b.machine.features(), FeatureSet::new());
    }
    assert_eq!(b.machine.counters().refused_status, 3);
    b.status(0);
    b.status(3);
    b.accept(0, &[1, 1]);
    assert_eq!(b.status(0xb), 0xb, "a reset takes the refused bits back");
}

#[test]
fn features_come_in_halves_and_not_after_features_ok() {
    let mut b = Bench::new(&[0, 40]);
    b.status(3);
    b.accept(0, &[1]);
    b.accept(1, &[1 << 8]);
    b.status(0xb);
    assert_eq!(b.machine.features(), FeatureSet::from_bits(&[0, 40]));
    b.accept(0, &[0, 0]);
    assert_eq!(b.machine.features(), FeatureSet::from_bits(&[0, 40]));
    assert_eq!(b.machine.counters().late_features, 1);
}

#[test]
fn a_refusal_of_the_device_leaves_features_ok_clear_and_can_be_tried_again() {
    let mut b = Bench::new(&[0]);
    b.status(3);
    b.refuse = true;
    assert_eq!(b.status(0xb), 3);
    b.refuse = false;
    assert_eq!(b.status(0xb), 0xb);
}

#[test]
fn status_goes_up_only_and_down_by_reset_only() {
    let mut b = Bench::new(&[]);
    assert_eq!(b.status(4), 0, "DRIVER_OK before FEATURES_OK");
    assert_eq!(b.status(0xf), 0xf, "all at once");
    assert_eq!(b.status(1), 0xf);
    assert_eq!(b.status(0xffff_ff5f), 0xf, "bits that are not the driver's");
    assert_eq!(b.status(0x80), 0x8f);
    assert_eq!(b.actions.last(), Some(&Action::Failed));
    assert_eq!(b.status(0), 0);
}

#[test]
fn a_reset_is_answered_when_it_is_complete_and_takes_everything_back() {
    let mut b = Bench::new(&[0, 32]).running();
    b.machine.notify_used(QueueIndex(0));
    b.offer(Message::SetDeviceStatus(DeviceStatus::RESET))
        .expect("idle");
    assert_eq!(b.machine.poll_action(), Some(Action::Reset));
    assert_eq!(b.offer(Message::GetDeviceStatus), Err(Busy));
    assert_eq!(
        b.offer(kick(0)),
        Ok(Handled::Ignored(Ignored::QueueNotReady))
    );
    assert_eq!(b.machine.poll_action(), None);
    b.machine.complete(ActionResult::Refused);
    let answer = b.sent().expect("the answer");
    assert_eq!(answer[8..], [0; 4]);
    assert_eq!(b.machine.queue(QueueIndex(0)), None);
    assert_eq!(b.machine.features(), FeatureSet::new());
    assert_eq!(b.sent(), None, "no event of before");
}

#[test]
fn eight_resets_in_a_row_are_eight_resets() {
    let mut b = Bench::new(&[]);
    for _ in 0..8 {
        assert_eq!(b.status(0), 0);
    }
    assert_eq!(b.actions, [Action::Reset; 8]);
}

#[test]
fn needs_reset_is_told_and_stops_the_device() {
    let mut b = Bench::new(&[]).running();
    b.machine.set_needs_reset();
    b.machine.set_needs_reset();
    let event = b.sent().expect("an event");
    assert_eq!(
        event[4..],
        [
            0, 0, 24, 0, 0x4f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
        ]
    );
    assert_eq!(b.sent(), None);
    assert_eq!(b.offer(kick(0)), Ok(Handled::Event));
    assert_eq!(b.machine.poll_action(), None);
    assert!(!b.set_queue(VqueueConfig {
        index: QueueIndex(1),
        size: QueueSize(8),
        ..QUEUE
    }));
    assert_eq!(b.status(0x4f), 0x4f);
    assert_eq!(b.status(0), 0);
    let mut b = b.running();
    assert_eq!(b.sent(), None, "a new driver hears nothing of it");
}

#[test]
fn a_device_that_cannot_start_needs_a_reset() {
    let mut b = Bench::new(&[]);
    b.status(0xb);
    b.refuse = true;
    assert_eq!(b.status(0xf), 0x4b);
}

#[test]
fn a_request_waits_for_the_response_before() {
    let mut b = Bench::new(&[]);
    assert_eq!(b.offer(Message::GetDeviceStatus), Ok(Handled::Request));
    assert_eq!(b.offer(Message::GetDeviceInfo), Err(Busy));
    assert!(b.machine.is_busy());
    let mut small = [0; 11];
    assert_eq!(b.machine.poll_transmit(&mut small), None, "no room");
    assert_eq!(b.sent().map(|m| m[1]), Some(7));
    assert_eq!(b.offer(Message::GetDeviceInfo), Ok(Handled::Request));
    assert_eq!(b.machine.last_message(), Some(Instant(5)));
}

#[test]
fn a_completion_without_an_action_changes_nothing() {
    let mut b = Bench::new(&[]);
    b.machine.complete(ActionResult::Done);
    b.offer(Message::SetDeviceStatus(DeviceStatus::RESET))
        .expect("idle");
    b.machine.complete(ActionResult::Done);
    assert_eq!(b.sent(), None, "the action was not fetched yet");
    assert_eq!(b.machine.poll_action(), Some(Action::Reset));
}

#[test]
fn there_are_no_shared_memory_regions() {
    let mut b = Bench::new(&[]);
    b.ask(Message::GetShm { index: 3 }, |answer| {
        assert_eq!(
            answer,
            Message::Shm(ShmInfo {
                index: 3,
                ..ShmInfo::default()
            })
        );
    });
}

#[test]
fn shared_memory_regions_are_told_by_their_index() {
    let mut b = Bench::new(&[]);
    let region = |index, len| ShmInfo {
        index,
        len,
        address: 0,
    };
    assert!(b.machine.set_region(region(3, 0x1000)));
    assert!(b.machine.set_region(region(0, 0x2000)));
    assert!(b.machine.set_region(region(3, 0x4000)), "in its place");
    for (index, len) in [(3, 0x4000), (0, 0x2000), (1, 0)] {
        b.ask(Message::GetShm { index }, |answer| {
            assert_eq!(answer, Message::Shm(region(index, len)));
        });
    }
    let more = (10..20).filter(|index| b.machine.set_region(region(*index, 1)));
    assert_eq!(more.count(), virtio_msg::device::MAX_REGIONS - 2);
}

#[test]
fn messages_for_others_are_dropped() {
    let mut b = Bench::new(&[]);
    let mut drop = |frame| match b.machine.handle_message(Instant(0), &frame) {
        Ok(Handled::Ignored(why)) => why,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        drop(Frame::new(DevNum(5), Token(1), Message::GetDeviceInfo)),
        Ignored::OtherDevice
    );
    for message in [
        Message::Ping { data: 1 },
        Message::VqueueSet,
        Message::EventUsed {
            queue: QueueIndex(0),
        },
        Message::BusSpecific {
            id: 0x80,
            response: false,
            payload: &[],
        },
    ] {
        assert_eq!(
            drop(Frame::new(DEV, Token(1), message)),
            Ignored::NotForDevices,
            "{message}"
        );
    }
    assert_eq!(b.sent(), None);
}

#[test]
fn an_idle_machine_is_small() {
    type Hosted = DeviceMachine<Box<[QueueSlot]>, Box<[u8]>>;
    assert!(size_of::<Hosted>() < 512, "{} bytes", size_of::<Hosted>());
    assert!(
        size_of::<QueueSlot>() <= 48,
        "{} bytes",
        size_of::<QueueSlot>()
    );
}
