// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The rules about headers and sizes.

use virtio_msg::{
    ConfigData, DecodeError, DevNum, FeatureBlocks, Frame, Generation, Message, QueueIndex, Token,
    VqueueConfig, VqueueInfo, decode,
};

fn message(msg_type: u8, id: u8, payload: &[u8]) -> Vec<u8> {
    let size = u16::try_from(payload.len() + 8)
        .expect("short")
        .to_le_bytes();
    let mut bytes = vec![msg_type, id, 0, 0, 0, 0, size[0], size[1]];
    bytes.extend(payload);
    bytes
}

#[test]
fn a_message_is_whole_and_no_longer_than_the_bus_allows() {
    let ping = message(2, 3, &[1, 2, 3, 4]);
    assert!(decode(&ping, 12).is_ok());
    assert_eq!(
        decode(&ping, 11),
        Err(DecodeError::TooLong { size: 12, max: 11 })
    );
    assert_eq!(
        decode(&ping[..11], 48),
        Err(DecodeError::TooShort { have: 11, need: 12 })
    );
    assert_eq!(
        decode(&ping[..7], 48),
        Err(DecodeError::TooShort { have: 7, need: 8 })
    );
    let mut small = ping.clone();
    small[6] = 7;
    assert_eq!(
        decode(&small, 48),
        Err(DecodeError::TooShort { have: 7, need: 8 })
    );
}

#[test]
fn reserved_type_bits_are_ignored() {
    for bits in (0..=255u8).step_by(4) {
        let frame = decode(&message(bits | 2, 3, &[5, 0, 0, 0]), 48).map(|f| f.message.to_string());
        assert_eq!(frame, Ok("PING: data 0x00000005".to_owned()));
    }
}

#[test]
fn unknown_ids_are_told_from_wrong_sizes() {
    let unknown = |msg_type, id| {
        let e = decode(&message(msg_type, id, &[0; 4]), 48).map(|_| ());
        assert_eq!(
            e,
            Err(DecodeError::Unknown {
                msg_type,
                msg_id: id
            }),
            "type {msg_type}, id {id:#x}"
        );
    };
    for id in [0x00, 0x01, 0x0d, 0x3f, 0x43, 0x7f, 0x80, 0xc0, 0xff] {
        unknown(0, id);
        unknown(1, id);
    }
    // Nobody answers an event.
    for id in [0x40, 0x41, 0x42] {
        unknown(1, id);
    }
    for id in [0x00, 0x04, 0x41] {
        unknown(2, id);
    }
    for id in [0x40, 0xc0, 0xff] {
        unknown(3, id);
    }
    let wrong = decode(&message(0, 2, &[0]), 48).map(|_| ());
    assert_eq!(
        wrong,
        Err(DecodeError::WrongSize {
            msg_type: 0,
            msg_id: 2,
            size: 9
        })
    );
}

#[test]
fn a_list_of_devices_has_a_bit_for_each_or_qemus_bytes() {
    for (payload, good) in [
        (6, false),
        (9, false),
        (10, true),
        (11, false),
        (37, false),
        (38, true),
        (39, false),
    ] {
        let mut bytes = vec![0; payload];
        bytes[..6].copy_from_slice(&[0, 0, 32, 0, 32, 0]);
        if payload > 6 {
            bytes[6] = 3;
        }
        let bytes = message(3, 2, &bytes);
        match decode(&bytes, 48).map(|frame| frame.message) {
            Ok(Message::Devices(list)) => {
                assert!(good, "{payload} bytes");
                assert_eq!(list.bitmap, [3, 0, 0, 0]);
            }
            other => assert!(!good, "{payload} bytes: {other:?}"),
        }
    }
}

#[test]
fn every_message_of_fixed_size_has_that_size_only() {
    let sizes: [(u8, u8, usize); 26] = [
        (0, 2, 0),
        (1, 2, 24),
        (0, 3, 8),
        (1, 4, 0),
        (0, 5, 8),
        (0, 7, 0),
        (1, 7, 4),
        (0, 8, 4),
        (1, 8, 4),
        (0, 9, 4),
        (1, 9, 40),
        (0, 10, 40),
        (1, 10, 0),
        (0, 11, 4),
        (1, 11, 0),
        (0, 12, 4),
        (1, 12, 12),
        (0, 0x41, 8),
        (0, 0x42, 4),
        (2, 2, 4),
        (3, 2, 6),
        (2, 3, 4),
        (3, 3, 4),
        (2, 0x40, 4),
        (0, 0x40, 16),
        (1, 6, 12),
    ];
    for (msg_type, id, right) in sizes {
        for size in 0..48 {
            let result = decode(&message(msg_type, id, &vec![0; size]), 64).map(|_| ());
            // Sizes of messages with data are checked against the length inside, which is 0 here; a rejected SET_CONFIG may carry more.
            let good = size == right || (msg_type, id) == (1, 6) && size > right;
            assert_eq!(
                result.is_ok(),
                good,
                "type {msg_type}, id {id:#x}, {size} bytes: {result:?}"
            );
        }
    }
}

#[test]
fn the_length_inside_is_the_length_of_the_data() {
    let config = |len: u8, data: usize| {
        let mut payload = vec![0, 0, 0, 0, 0, 0, 0, 0, len, 0, 0, 0];
        payload.resize(12 + data, 7);
        payload
    };
    for (len, data, get, set) in [
        (2, 2, true, true),
        (2, 0, false, true),
        (2, 1, false, false),
        (2, 3, false, false),
    ] {
        assert_eq!(
            decode(&message(1, 5, &config(len, data)), 48).is_ok(),
            get,
            "GET_CONFIG response {len} {data}"
        );
        assert_eq!(
            decode(&message(0, 6, &config(len, data)), 48).is_ok(),
            get,
            "SET_CONFIG {len} {data}"
        );
        assert_eq!(
            decode(&message(1, 6, &config(len, data)), 48).is_ok(),
            set,
            "SET_CONFIG response {len} {data}"
        );
    }
    let features = |count: u8, words: usize| {
        let mut payload = vec![0, 0, 0, 0, count, 0, 0, 0];
        payload.resize(8 + words, 0);
        decode(&message(1, 3, &payload), 48).is_ok()
    };
    assert!(features(2, 8) && features(0, 0));
    assert!(!features(2, 7) && !features(2, 4) && !features(2, 12) && !features(255, 0));
}

#[test]
fn the_longest_messages_of_fixed_size_fit_48_bytes() {
    for message in [
        Message::Vqueue(VqueueInfo {
            index: QueueIndex(1),
            device: u64::MAX,
            ..VqueueInfo::default()
        }),
        Message::SetVqueue(VqueueConfig {
            index: QueueIndex(1),
            device: u64::MAX,
            ..VqueueConfig::default()
        }),
    ] {
        let mut out = [0; 48];
        let frame = Frame::new(DevNum(1), Token(2), message);
        assert_eq!(frame.encode(&mut out), Ok(48));
        assert_eq!(decode(&out, 48), Ok(frame));
        assert!(frame.encode(&mut out[..47]).is_err());
    }
}

#[test]
fn a_message_has_65535_bytes_at_most() {
    let mut out = vec![0; 65536];
    let data = vec![1; 65516];
    let config = |len: usize| {
        let data = &data[..len];
        let len = u32::try_from(len).expect("short");
        Frame::new(
            DevNum(1),
            Token(2),
            Message::Config(ConfigData {
                generation: Generation(0),
                offset: 0,
                len,
                data,
            }),
        )
    };
    assert_eq!(config(65515).encode(&mut out), Ok(65535));
    assert_eq!(decode(&out, 65536), Ok(config(65515)));
    assert!(config(65516).encode(&mut out).is_err());
    // A count that no message can hold is no reason to overflow.
    let blocks = FeatureBlocks {
        first: 0,
        count: u32::MAX,
        words: &[],
    };
    assert!(
        Frame::new(DevNum(1), Token(2), Message::DeviceFeatures(blocks))
            .encode(&mut out)
            .is_err()
    );
}

#[test]
fn blocks_and_data_that_are_left_out_are_sent_as_zeros() {
    let mut out = [0xff; 48];
    let blocks = FeatureBlocks {
        first: 7,
        count: 2,
        words: &[5.into()],
    };
    let frame = Frame::new(DevNum(1), Token(2), Message::DeviceFeatures(blocks));
    assert_eq!(frame.encode(&mut out), Ok(24));
    assert_eq!(out[8..24], [7, 0, 0, 0, 2, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(decode(&out, 48), Ok(frame));
}
