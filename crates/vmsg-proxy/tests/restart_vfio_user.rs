// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices behind the vfio-user front whose requests overtake each other, and whose device host ends while some are under way.
#![allow(missing_docs)]

mod late;
mod vfio;

use late::{Late, Platter};
use std::time::{Duration, Instant};
use vfio::client::{Client, PATIENCE};
use vfio::place::Place;
use vfio::{Guest, NEEDS_RESET, Ram};

/// Requests, and how many of them are under way at a time.
const REQUESTS: u64 = 200;
const DEPTH: u64 = 12;

fn play(keys: &str, in_order: bool, ram: Ram) {
    let platter = Platter::default();
    let device = || Box::new(Late::new(in_order, platter.clone()));
    let mut place = Place::with_device(device(), keys);
    let mut guest: Guest<Client> = Guest::new(&place.socket(), ram);
    guest.use_msix(1);
    guest.start(1);
    let (mut asked, mut answered, mut killed) = (0, 0, 0);
    let end = Instant::now() + 3 * PATIENCE;
    while answered < REQUESTS {
        assert!(Instant::now() < end, "{keys}: {answered} of {asked}");
        if asked < REQUESTS && asked - answered < DEPTH {
            let sequence: u64 = asked;
            guest.tell(0, &sequence.to_le_bytes());
            asked += 1;
            // With many under way, with none looked at yet, and right after a kick.
            if asked % 23 == 0 {
                killed += 1;
                place.kill_host();
                place.start_host_with(device());
            }
            continue;
        }
        guest
            .answer_within(0, PATIENCE)
            .unwrap_or_else(|| panic!("{keys}: {answered} of {asked}, killed {killed} times"));
        answered += 1;
    }
    assert_eq!(guest.status() & NEEDS_RESET, 0);
    platter.check();
    // Nothing comes twice.
    assert!(guest.answer_within(0, Duration::from_millis(50)).is_none());
    assert!(killed > 5);
}

#[test]
fn requests_that_overtake_each_other_are_all_done_whoever_has_them() {
    for in_order in [false, true] {
        play("", in_order, Ram::shared());
    }
}

#[test]
fn copied_requests_are_too() {
    for in_order in [false, true] {
        play(",isolate=on,segment=1M", in_order, Ram::shared());
    }
    // Memory that is not shared is copied as well.
    play("", false, Ram::by_messages());
}
