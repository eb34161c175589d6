// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any bytes of an NBD server.

mod exercise;

use proptest::prelude::*;

fn answer(option: u32, kind: u32, data: Vec<u8>) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

/// A greeting and answers that are mostly what they should be.
fn negotiation() -> impl Strategy<Value = Vec<u8>> {
    let option = prop_oneof![9 => Just(7u32), 1 => any::<u32>()];
    let kind = prop_oneof![4 => Just(3u32), 2 => Just(1u32), 1 => 0x8000_0001u32..0x8000_000a];
    let info = prop_oneof![
        (any::<u64>(), any::<u16>()).prop_map(|(size, flags)| [
            &[0, 0],
            &size.to_be_bytes()[..],
            &flags.to_be_bytes()
        ]
        .concat()),
        (0u32..20, 0u32..34, any::<u32>()).prop_map(|(least, best, most)| {
            let sizes = [
                1u32.checked_shl(least).unwrap_or(0),
                1u32.checked_shl(best).unwrap_or(0),
                most,
            ];
            [&[0, 3][..], &sizes.map(u32::to_be_bytes).concat()].concat()
        }),
        prop::collection::vec(any::<u8>(), 0..30),
    ];
    let answers = prop::collection::vec((option, kind, info), 0..8);
    (any::<bool>(), answers).prop_map(|(structured, answers)| {
        let mut bytes = b"NBDMAGICIHAVEOPT\x00\x03".to_vec();
        bytes.extend(answer(8, if structured { 1 } else { 0x8000_0001 }, vec![]));
        for (option, kind, info) in answers {
            bytes.extend(answer(option, kind, if kind == 1 { vec![] } else { info }));
        }
        bytes
    })
}

/// Replies that are mostly what they should be.
fn replies() -> impl Strategy<Value = Vec<u8>> {
    let simple = (0u64..9, prop_oneof![Just(0u32), 0..200u32]).prop_map(|(cookie, error)| {
        [
            &0x6744_6698u32.to_be_bytes()[..],
            &error.to_be_bytes(),
            &cookie.to_be_bytes(),
        ]
        .concat()
    });
    let kind = prop::sample::select(vec![0u16, 1, 2, 0x8001, 0x8002, 5]);
    let chunk = (any::<bool>(), kind, 0u64..9, 0u64..5000, 0u32..5000).prop_map(
        |(last, kind, cookie, at, len)| {
            let offset = ((cookie << 12) + at).to_be_bytes();
            let payload = match kind {
                0 => vec![],
                1 => [&offset[..], &vec![7; len as usize]].concat(),
                2 => [&offset[..], &len.to_be_bytes()].concat(),
                _ => [&(len % 130).to_be_bytes()[..], &[0, 3], b"bad"].concat(),
            };
            let head = [
                &0x668e_33efu32.to_be_bytes()[..],
                &u16::from(last).to_be_bytes(),
                &kind.to_be_bytes(),
            ]
            .concat();
            let len = u32::try_from(payload.len()).unwrap();
            [
                head,
                cookie.to_be_bytes().to_vec(),
                len.to_be_bytes().to_vec(),
                payload,
            ]
            .concat()
        },
    );
    prop::collection::vec(prop_oneof![simple, chunk], 0..30).prop_map(|replies| replies.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_bytes_are_taken_or_refused(
        how in any::<[u8; 2]>(),
        greeting in negotiation(),
        replies in replies(),
        garbage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        alone: bool,
    ) {
        let mut bytes = how.to_vec();
        if !alone {
            bytes.extend(greeting);
        }
        bytes.extend(replies);
        for (at, byte) in garbage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        exercise::server(&bytes);
    }
}
