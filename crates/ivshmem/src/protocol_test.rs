// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use proptest::prelude::*;

/// What was said in `bytes`, with a descriptor where `descriptors` has the number of the message.
fn decode(bytes: &[u8], descriptors: &[usize]) -> Result<Vec<Said>, ProtocolError> {
    let mut decoder = Decoder::new();
    let mut said = Vec::new();
    for (number, message) in bytes.chunks(MESSAGE_SIZE).enumerate() {
        decoder.room()[..message.len()].copy_from_slice(message);
        if let Some(value) = decoder.filled(message.len()) {
            said.push(decoder.said(value, descriptors.contains(&number))?);
        }
    }
    Ok(said)
}

#[test]
fn the_second_client_of_qemus_server_is_told_of_the_first() {
    // docs/specs/ivshmem-spec.rst: id 1 of a server with two vectors, where 0 is, and then goes.
    let bytes: [[u8; 8]; 8] = [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0xff; 8],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ];
    let (first, second) = (PeerId(0), PeerId(1));
    assert_eq!(
        decode(bytes.as_flattened(), &[2, 3, 4, 5, 6]).unwrap(),
        [
            Said::Version,
            Said::Id(second),
            Said::Memory,
            Said::Vector(first),
            Said::Vector(first),
            Said::Vector(second),
            Said::Vector(second),
            Said::Left(first),
        ]
    );
}

#[test]
fn the_largest_id_is_written_as_qemu_does() {
    assert_eq!(encode(65535), [0xff, 0xff, 0, 0, 0, 0, 0, 0]);
    assert_eq!(encode(MEMORY), [0xff; 8]);
    assert_eq!(encode(0x0102), [2, 1, 0, 0, 0, 0, 0, 0]);
}

fn numbers(list: &[(i64, bool)]) -> Result<Vec<Said>, ProtocolError> {
    let mut decoder = Decoder::new();
    list.iter()
        .map(|&(number, descriptor)| decoder.said(number, descriptor))
        .collect()
}

#[test]
fn each_mistake_has_its_name() {
    use ProtocolError::*;
    let cases: [(&[(i64, bool)], ProtocolError); 12] = [
        (&[(1, false)], Version(1)),
        (&[(-1, false)], Version(-1)),
        (&[(0, true)], UnexpectedDescriptor("the version")),
        (&[(0, false), (65536, false)], Number(65536)),
        (&[(0, false), (-1, false)], Number(-1)),
        (&[(0, false), (5, true)], UnexpectedDescriptor("the id")),
        (
            &[(0, false), (5, false), (-1, false)],
            MissingDescriptor("the memory"),
        ),
        (&[(0, false), (5, false), (-2, true)], Number(-2)),
        (
            &[(0, false), (5, false), (-1, true), (-1, true)],
            SecondMemory,
        ),
        (
            &[(0, false), (5, false), (-1, true), (5, false)],
            OwnId(PeerId(5)),
        ),
        (
            &[(0, false), (5, false), (-1, true), (i64::MIN, true)],
            Number(i64::MIN),
        ),
        (
            &[(0, false), (5, false), (-1, true), (70_000, false)],
            Number(70_000),
        ),
    ];
    for (messages, mistake) in cases {
        assert_eq!(numbers(messages), Err(mistake), "{messages:?}");
    }
}

#[test]
fn peers_may_come_before_the_memory() {
    let said = numbers(&[(0, false), (5, false), (3, true), (3, false), (-1, true)]).unwrap();
    assert_eq!(
        said[2..],
        [Said::Vector(PeerId(3)), Said::Left(PeerId(3)), Said::Memory]
    );
}

proptest! {
    #[test]
    fn any_bytes_in_any_pieces_mean_the_same(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        pieces in proptest::collection::vec(1usize..9, 1..100),
    ) {
        let mut decoder = Decoder::new();
        let mut rest = &bytes[..];
        let mut found = Vec::new();
        let mut pieces = pieces.iter().cycle();
        while !rest.is_empty() {
            let room = decoder.room();
            let count = room.len().min(rest.len()).min(*pieces.next().unwrap());
            room[..count].copy_from_slice(&rest[..count]);
            rest = &rest[count..];
            found.extend(decoder.filled(count));
        }
        let (whole, left) = bytes.as_chunks::<8>();
        prop_assert_eq!(found, whole.iter().map(|b| i64::from_le_bytes(*b)).collect::<Vec<_>>());
        prop_assert_eq!(decoder.is_within(), !left.is_empty());
    }

    #[test]
    fn no_sequence_of_numbers_is_understood_in_two_ways(
        messages in proptest::collection::vec(
            (prop_oneof![-2i64..4, Just(65535), Just(65536), any::<i64>()], any::<bool>()), 0..40),
    ) {
        let mut decoder = Decoder::new();
        let (mut own, mut memory) = (None, false);
        for (place, (number, descriptor)) in messages.into_iter().enumerate() {
            match decoder.said(number, descriptor) {
                Err(_) => break,
                Ok(Said::Version) => prop_assert!(place == 0 && number == 0 && !descriptor),
                Ok(Said::Id(id)) => {
                    prop_assert!(place == 1 && !descriptor);
                    own = Some(id);
                }
                Ok(Said::Memory) => {
                    prop_assert!(place > 1 && number == -1 && descriptor && !memory);
                    memory = true;
                }
                Ok(Said::Vector(id)) => prop_assert!(place > 1 && descriptor && i64::from(id.0) == number),
                Ok(Said::Left(id)) => {
                    prop_assert!(place > 1 && !descriptor && i64::from(id.0) == number && Some(id) != own);
                }
            }
        }
    }
}
