// SPDX-License-Identifier: Apache-2.0 OR MIT
use std::time::Duration;

use super::{ping_counts, sequence};
use crate::scene::Line;

#[test]
fn lines_of_ping_are_read() {
    let line = |text: &str| Line {
        text: text.to_owned(),
        at: Duration::ZERO,
    };
    let answer = line("64 bytes from 10.0.2.2: seq=7 ttl=255 time=1.2 ms");
    assert_eq!(sequence(&answer), Some((7, Duration::ZERO)));
    assert_eq!(
        sequence(&line("64 bytes from 10.0.2.3: seq=7 ttl=255")),
        None
    );
    assert_eq!(
        ping_counts("10 packets transmitted, 9 packets received, 10% packet loss"),
        Some((10, 1))
    );
    assert_eq!(ping_counts("no statistics"), None);
}
