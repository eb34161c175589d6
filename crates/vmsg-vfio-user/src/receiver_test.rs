// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use crate::wire::{begin_command, finish};

fn message(id: u16, len: usize) -> Vec<u8> {
    let mut out = Vec::new();
    begin_command(&mut out, id, 99);
    out.resize(len, 0x77);
    finish(&mut out);
    out
}

fn feed(receiver: &mut Receiver, bytes: &[u8]) -> usize {
    let space = receiver.space();
    let len = space.len().min(bytes.len());
    space[..len].copy_from_slice(&bytes[..len]);
    receiver.received(Received {
        bytes: len,
        fds: Vec::new(),
        lost_fds: false,
    });
    len
}

#[test]
fn messages_come_out_whole_however_they_are_cut() {
    let lengths = [16, 17, 4096, 16, 100, 5000, 70_000, 16];
    let stream: Vec<u8> = (0..)
        .zip(lengths)
        .flat_map(|(id, len)| message(id, len))
        .collect();
    for piece in [1, 2, 15, 16, 17, 1000, 4096, 100_000] {
        let mut receiver = Receiver::new(100_000, 1);
        let mut got = Vec::new();
        let mut rest = &stream[..];
        while got.len() < lengths.len() {
            match receiver.next().expect("sane") {
                Next::Message(message) => {
                    assert!(message.payload.iter().all(|byte| *byte == 0x77));
                    got.push((message.header.id, 16 + message.payload.len()));
                }
                Next::TooLong(header) => panic!("{header:?}"),
                Next::Nothing => {
                    let len = feed(&mut receiver, &rest[..piece.min(rest.len())]);
                    assert!(len > 0, "room for what is missing");
                    rest = &rest[len..];
                }
            }
        }
        assert!(!receiver.is_partial());
        assert_eq!(got, (0..).zip(lengths).collect::<Vec<_>>());
    }
}

#[test]
fn room_comes_with_bytes_and_not_with_claims() {
    let mut receiver = Receiver::new(64 << 20, 1);
    let long = message(1, 32 << 20);
    feed(&mut receiver, &long[..16]);
    assert!(matches!(receiver.next(), Ok(Next::Nothing)));
    receiver.space();
    assert!(receiver.buf.len() <= 16 + READ_MOST);
}

#[test]
fn a_message_too_long_is_told_once_and_takes_no_room() {
    let mut receiver = Receiver::new(5000, 1);
    let stream = [message(1, 5001), message(2, 1 << 20), message(3, 16)].concat();
    let mut rest = &stream[..];
    let mut got = Vec::new();
    while got.len() < 3 {
        match receiver.next().expect("sane") {
            Next::TooLong(header) => got.push((header.id, true)),
            Next::Message(message) => got.push((message.header.id, false)),
            Next::Nothing => {
                let len = feed(&mut receiver, rest);
                rest = &rest[len..];
            }
        }
        assert!(receiver.buf.len() <= 2 * READ_AHEAD);
    }
    assert_eq!(got, [(1, true), (2, true), (3, false)]);
}
