// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use virtio_msg::{DevNum, Token};
use vmsg_bus::trace::{Source, Way};

fn decode(layout: Layout, message: &[u8]) -> Result<Decoded, String> {
    Decoded::new(&Captured {
        interface: 0,
        source: &Source::default(),
        time: 0,
        way: Way::ToDevice,
        layout,
        fds: 0,
        lost: 0,
        cut_from: None,
        message,
    })
}

fn bytes(message: Message<'_>) -> Vec<u8> {
    let mut out = vec![0; 320];
    let frame = Frame {
        dev_num: DevNum(0),
        token: Token(9),
        message,
    };
    let len = frame.encode(&mut out).expect("room");
    out.truncate(len);
    out
}

#[test]
fn messages_of_our_own_buses_have_names_and_devices() {
    let claim = |response, payload| {
        bytes(Message::BusSpecific {
            id: 0x84,
            response,
            payload,
        })
    };
    let request = decode(Layout::Revision1, &claim(false, &[3, 0, 1, 0])).expect("a request");
    assert_eq!(request.text, "bus #9 CLAIM: device 3, release");
    assert_eq!((request.name, request.about), ("CLAIM", Some(3)));
    let held = [&[3, 0, 0, 0, 5, 0, 0, 0][..], b"\x1b[2J"].concat();
    let response = decode(Layout::Revision1, &claim(true, &held)).expect("a response");
    assert_eq!(
        response.text,
        r#"bus #9 CLAIM response: device 3, held by another driver: "\u{1b}[2J""#
    );
    // Not of its length: the bytes are shown.
    let odd = decode(Layout::Revision1, &claim(false, &[3, 0, 1])).expect("a message");
    assert_eq!(odd.text, "bus #9 BUS_SPECIFIC: id 0x84: 030001");
    assert_eq!(odd.name, "CLAIM");
    let other = bytes(Message::BusSpecific {
        id: 0xa0,
        response: false,
        payload: &[],
    });
    let other = decode(Layout::Revision1, &other).expect("a message");
    assert_eq!((other.name, other.about), ("BUS_SPECIFIC", None));
}

#[test]
fn the_40_byte_messages_are_decoded() {
    let mut message = [0; 40];
    message[..8].copy_from_slice(&[0, 6, 0, 0, 4, 0, 0, 2]);
    let decoded = decode(Layout::R1, &message).expect("a message");
    assert_eq!((decoded.name, decoded.token), ("GET_CONFIG", None));
    assert!(decoded.text.contains("GET_CONFIG"), "{}", decoded.text);
    assert!(decode(Layout::R1, &message[..39]).is_err());
}

#[test]
fn the_44_byte_messages_are_decoded() {
    let mut message = vec![0; 44];
    message[..10].copy_from_slice(&[0, 9, 3, 0, 10, 0, 1, 0, 0, 0]);
    let decoded = decode(Layout::Short, &message).expect("a message");
    assert_eq!(
        (decoded.name, decoded.token, decoded.about),
        ("GET_VQUEUE", None, Some(3))
    );
    assert!(decode(Layout::Short, &message[..9]).is_err());
}

#[test]
fn every_message_can_be_selected_by_its_name() {
    for id in 0..=255 {
        if let Some(name) = control::name(id) {
            assert!(is_name(name), "{name}");
        }
        let kinds = [(0, [0; 36]), (1, [0; 36])];
        for (kind, payload) in kinds {
            let message = [&[kind, id, 0, 0][..], &payload].concat();
            if let Ok(decoded) = decode(Layout::R1, &message) {
                assert!(is_name(decoded.name), "{}", decoded.name);
            }
        }
        for kind in 0..4 {
            for len in 0..60u8 {
                let mut message = vec![0; usize::from(len) + 8];
                message[..8].copy_from_slice(&[kind, id, 0, 0, 0, 0, len + 8, 0]);
                if let Ok(decoded) = decode(Layout::Revision1, &message) {
                    assert!(is_name(decoded.name), "{}", decoded.name);
                }
            }
        }
    }
    assert!(is_name("get_config"));
    assert!(!is_name("GET_CONFIGS"));
}
