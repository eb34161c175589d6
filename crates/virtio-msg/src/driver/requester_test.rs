// SPDX-License-Identifier: Apache-2.0 OR MIT
extern crate std;
use super::{Received, RequestError, Requester, Unexpected};
use crate::{
    DevNum, DeviceBitmap, DeviceStatus, Duration, Frame, Instant, Message, QueueIndex, Token,
    decode,
};
use std::collections::HashSet;

const SECOND: Duration = Duration::from_secs(1);

fn start<const N: usize>(
    r: &mut Requester<N>,
    now: Instant,
    dev: u16,
    message: Message<'_>,
) -> (super::RequestId, Token) {
    let mut out = [0; 48];
    let (id, size) = r
        .start(now, DevNum(dev), &message, SECOND, &mut out)
        .expect("room");
    let frame = decode(&out[..size], 48).expect("own message");
    assert_eq!(frame.message, message);
    (id, frame.token)
}

#[test]
fn a_response_must_match_device_id_and_token() {
    let mut r = Requester::<4>::new();
    let (id, token) = start(&mut r, Instant(0), 3, Message::GetDeviceStatus);
    let status = Message::DeviceStatus(DeviceStatus::RESET);
    for wrong in [
        Frame::new(DevNum(2), token, status),
        Frame::new(DevNum(3), Token(token.0 + 1), status),
        Frame::new(DevNum(3), token, Message::VqueueSet),
        Frame::new(
            DevNum(3),
            token,
            Message::DeviceStatusSet(DeviceStatus::RESET),
        ),
    ] {
        assert_eq!(
            r.handle_frame(&wrong),
            Received::Dropped(Unexpected::Response),
            "{wrong}"
        );
    }
    let right = Frame::new(DevNum(3), token, status);
    assert_eq!(r.handle_frame(&right), Received::Response(id, status));
    assert_eq!(
        r.handle_frame(&right),
        Received::Dropped(Unexpected::Response)
    );
    assert_eq!(r.counters().dropped, 5);
}

#[test]
fn tokens_of_outstanding_requests_are_not_given_again() {
    let mut r = Requester::<8>::new();
    let (_, held) = start(&mut r, Instant(0), 0, Message::GetDeviceInfo);
    let mut others = HashSet::new();
    for _ in 0..70_000 {
        let (id, token) = start(&mut r, Instant(0), 0, Message::GetDeviceInfo);
        assert_ne!(token, held);
        assert_ne!(token, Token(0));
        others.insert(token);
        assert!(r.cancel(id));
    }
    assert_eq!(others.len(), 65534);
}

#[test]
fn no_more_than_n_are_outstanding_and_only_requests_start() {
    let mut r = Requester::<1>::new();
    let mut out = [0; 48];
    let now = Instant(0);
    let event = Message::EventAvail {
        queue: QueueIndex(0),
        next: 0,
    };
    assert_eq!(
        r.start(now, DevNum(0), &event, SECOND, &mut out),
        Err(RequestError::NotARequest)
    );
    assert!(matches!(
        r.start(
            now,
            DevNum(0),
            &Message::GetDeviceInfo,
            SECOND,
            &mut out[..7]
        ),
        Err(RequestError::Encode(_))
    ));
    assert_eq!(r.outstanding(), 0);
    start(&mut r, now, 0, Message::GetDeviceInfo);
    assert_eq!(
        r.start(now, DevNum(0), &Message::GetDeviceInfo, SECOND, &mut out),
        Err(RequestError::Full)
    );
}

#[test]
fn a_request_times_out_once_and_its_late_response_is_dropped() {
    let mut r = Requester::<4>::new();
    let (late, token) = start(&mut r, Instant(0), 1, Message::GetDeviceStatus);
    let (other, _) = start(&mut r, Instant(500_000_000), 1, Message::GetDeviceInfo);
    assert_eq!(r.poll_timeout(), Some(Instant(1_000_000_000)));
    assert_eq!(r.handle_timeout(Instant(999_999_999)), None);
    assert_eq!(r.handle_timeout(Instant(1_000_000_000)), Some(late));
    assert_eq!(r.handle_timeout(Instant(1_000_000_000)), None);
    let response = Frame::new(DevNum(1), token, Message::DeviceStatus(DeviceStatus::RESET));
    assert_eq!(
        r.handle_frame(&response),
        Received::Dropped(Unexpected::Response)
    );
    assert_eq!(r.handle_timeout(Instant(u64::MAX)), Some(other));
    assert_eq!(r.poll_timeout(), None);
    assert_eq!(r.counters().timeouts, 2);
}

#[test]
fn get_devices_and_ping_are_matched_with_token_0() {
    let mut r = Requester::<4>::new();
    let (first, _) = start(
        &mut r,
        Instant(0),
        0,
        Message::GetDevices {
            offset: 0,
            count: 32,
        },
    );
    let (second, token) = start(
        &mut r,
        Instant(0),
        0,
        Message::GetDevices {
            offset: 32,
            count: 32,
        },
    );
    let message = Message::Devices(DeviceBitmap {
        offset: 0,
        count: 32,
        next: 32,
        bitmap: &[1, 0, 0, 0],
    });
    assert_eq!(
        r.handle_frame(&Frame::bus(Token(0), message)),
        Received::Response(first, message)
    );
    assert_eq!(
        r.handle_frame(&Frame::bus(token, message)),
        Received::Response(second, message)
    );
    let pong = Message::Pong { data: 1 };
    let (ping, token) = start(&mut r, Instant(0), 0, Message::Ping { data: 1 });
    assert_eq!(
        r.handle_frame(&Frame::bus(Token(0), pong)),
        Received::Response(ping, pong)
    );
    assert_eq!(
        r.handle_frame(&Frame::bus(token, pong)),
        Received::Dropped(Unexpected::Response)
    );
    // Of devices the token must be right.
    let (_, _) = start(&mut r, Instant(0), 1, Message::GetDeviceStatus);
    let status = Message::DeviceStatus(crate::DeviceStatus::DRIVER);
    assert_eq!(
        r.handle_frame(&Frame::new(DevNum(1), Token(0), status)),
        Received::Dropped(Unexpected::Response)
    );
}

#[test]
fn events_and_pings_pass_and_messages_of_drivers_do_not() {
    let mut r = Requester::<1>::new();
    let used = Frame::new(
        DevNum(1),
        Token(0),
        Message::EventUsed {
            queue: QueueIndex(0),
        },
    );
    assert_eq!(r.handle_frame(&used), Received::Event(used));
    let ping = Frame::bus(Token(1), Message::Ping { data: 1 });
    assert_eq!(r.handle_frame(&ping), Received::Request(ping));
    let info = Frame::new(DevNum(1), Token(0), Message::GetDeviceInfo);
    assert_eq!(
        r.handle_frame(&info),
        Received::Dropped(Unexpected::FromDevice)
    );
    let avail = Frame::new(
        DevNum(1),
        Token(0),
        Message::EventAvail {
            queue: QueueIndex(0),
            next: 0,
        },
    );
    assert_eq!(
        r.handle_frame(&avail),
        Received::Dropped(Unexpected::FromDevice)
    );
}
