// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files of any bytes, for the reader of traces.

#![no_main]

use vmsg_bus::trace::{Item, Reader};

/// Reads a few bytes at a time, as from a file that grows.
struct Slowly<'a>(&'a [u8]);

impl std::io::Read for Slowly<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let len = self.0.len().min(out.len()).min(7);
        let (now, rest) = self.0.split_at(len);
        out[..len].copy_from_slice(now);
        self.0 = rest;
        Ok(len)
    }
}

/// What is found, as far as it goes.
fn story(mut reader: Reader<impl std::io::Read>) -> (usize, u64, u64, bool) {
    let (mut items, mut bytes, mut times) = (0, 0, 0u64);
    loop {
        match reader.next_item() {
            Ok(Some(item)) => {
                items += 1;
                if let Item::Message(message) = item {
                    bytes += message.message.len() as u64;
                    times = times.wrapping_add(message.time);
                    assert!(message.source.name.len() <= 1 << 16);
                }
            }
            Ok(None) => return (items, bytes, times, true),
            Err(error) => {
                assert!(!error.to_string().is_empty());
                return (items, bytes, times, false);
            }
        }
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let at_once = story(Reader::new(bytes));
    // No block is shorter than twelve bytes.
    assert!(at_once.0 <= bytes.len() / 12);
    assert_eq!(story(Reader::new(Slowly(bytes))), at_once);
});
