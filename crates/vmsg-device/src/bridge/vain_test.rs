// SPDX-License-Identifier: Apache-2.0 OR MIT
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use super::super::kind::Kind;
use super::super::{Settings, State};
use super::*;
use crate::device::Device;

#[test]
fn only_ends_with_something_to_do_and_nothing_done_count() {
    let mut ends = Ends::default();
    let mut end = |given, used, more| {
        ends.given(given);
        let done = ends.ended(used, more);
        (done, ends.in_vain)
    };
    assert_eq!(end(Some(7), Some(7), true), (false, 1));
    assert_eq!(end(Some(7), Some(7), true), (false, 2));
    // Something is done, and something is left.
    assert_eq!(end(Some(7), Some(8), true), (true, 0));
    assert_eq!(end(Some(8), Some(8), true), (false, 1));
    // Nothing is to be done.
    assert_eq!(end(Some(8), Some(8), false), (false, 0));
    // Around the end of the numbers.
    assert_eq!(end(Some(65_535), Some(2), true), (true, 0));
    // The memory is not there: nothing is known of what was done.
    assert_eq!(end(Some(2), None, false), (false, 0));
    assert_eq!(end(None, Some(2), true), (false, 1));
}

/// The device of a daemon that answers the first questions.
fn bridge() -> Bridge {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("daemon");
    let listener = UnixListener::bind(&path).expect("bound");
    std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("called");
        let mut request = [0; 12];
        while socket.read_exact(&mut request).is_ok() {
            // GET_FEATURES: VERSION_1 and nothing else.
            if request[..4] == 1u32.to_ne_bytes() {
                let answer = [1, 5, 8, 0, 1u32].map(u32::to_ne_bytes);
                let _ = socket.write_all(answer.as_flattened());
            }
        }
    });
    Bridge::connect(&Settings::new(&path, 4), Duration::from_secs(60)).expect("a device")
}

#[test]
fn a_driver_that_starts_over_does_not_wait_for_the_end_of_a_long_pause() {
    let mut bridge = bridge();
    let now = Instant::now();
    bridge.ends_in_vain = 9;
    bridge.state = State::Down(now + LONGEST_IN_VAIN);
    bridge.reset();
    assert_eq!(bridge.ends_in_vain, 0);
    let next = bridge.next_timeout().expect("it is called again");
    assert!(next <= Instant::now() + FIRST_PAUSE);
    // That of one that was cut off is not over sooner.
    bridge.pause = LONGEST_IN_VAIN;
    bridge.state = State::Down(now + LONGEST_IN_VAIN);
    bridge.reset();
    assert_eq!(bridge.next_timeout(), Some(now + LONGEST_IN_VAIN));
}

#[test]
fn in_queues_of_events_there_is_only_room() {
    let asked = |id| {
        (0..4)
            .map(|queue| Kind::of(id).is_asked(queue))
            .collect::<Vec<_>>()
    };
    assert_eq!(asked(18)[..2], [false, true]);
    assert_eq!(asked(1)[..2], [false, true]);
    assert_eq!(asked(2)[..2], [true, true]);
    assert_eq!(asked(8)[..3], [true, false, true]);
    assert_eq!(asked(19)[..3], [false, true, false]);
}
