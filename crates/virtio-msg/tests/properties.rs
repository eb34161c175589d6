// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What holds for any bytes. The fuzz targets run the same stories.

#[path = "support/exercise/mod.rs"]
mod exercise;

use proptest::collection::vec;
use proptest::prelude::*;

fn header() -> impl Strategy<Value = Vec<u8>> {
    // Headers that look right reach the payloads.
    (
        0u8..4,
        prop_oneof![0u8..0x14, 0x3e..0x48u8, any::<u8>()],
        vec(any::<u8>(), 0..80),
    )
        .prop_map(|(msg_type, id, payload)| {
            let size = u16::try_from(payload.len() + 8)
                .expect("short")
                .to_le_bytes();
            let mut bytes = vec![msg_type, id, 0, 0, 1, 0, size[0], size[1]];
            bytes.extend(payload);
            bytes
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_decode_or_are_refused(bytes in vec(any::<u8>(), 0..200)) {
        exercise::codec(&bytes);
    }

    #[test]
    fn any_payload_decodes_or_is_refused(bytes in header()) {
        exercise::codec(&bytes);
    }

    #[test]
    fn a_device_answers_each_request_once_in_order_and_keeps_its_status_true(bytes in vec(any::<u8>(), 0..600)) {
        exercise::device(&bytes);
    }

    #[test]
    fn a_driver_takes_any_answer(bytes in vec(any::<u8>(), 0..600)) {
        exercise::driver(&bytes);
    }

    #[test]
    fn an_r1_device_may_say_anything(bytes in vec(any::<u8>(), 0..600)) {
        exercise::r1_driver(&bytes);
    }

    #[test]
    fn an_r1_driver_may_say_anything(bytes in vec(any::<u8>(), 0..600)) {
        exercise::r1_device(&bytes);
    }
}
