// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any bytes, for the adapters to the messages from before revision 1.

#![no_main]

#[path = "../../crates/virtio-msg/tests/support/exercise/mod.rs"]
#[allow(dead_code, reason = "each target runs one of the stories")]
mod exercise;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    exercise::r1_driver(bytes);
    exercise::r1_device(bytes);
    if let Ok(frame) = virtio_msg::r1::decode(bytes) {
        assert_eq!(virtio_msg::r1::decode(&frame.to_bytes()), Ok(frame));
    }
    if let Ok(frame) = virtio_msg::short::decode(bytes) {
        assert!(!frame.to_string().is_empty());
    }
});
