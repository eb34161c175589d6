// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::*;

const SIZE: u16 = 8;

fn place(used: u16, avail: u16) -> Option<Place> {
    Some(Place {
        size: SIZE,
        used,
        avail,
    })
}

#[test]
fn each_ring_with_something_new_is_passed_on_at_once() {
    let now = Instant::now();
    let mut calls = Calls::default();
    // All around the indices, with requests made one by one or all at once.
    for made in [1, 3, SIZE] {
        let mut avail = 65_000u16;
        for _ in 0..2000 {
            let before = avail;
            avail = avail.wrapping_add(made);
            for done in 1..=made {
                let used = before.wrapping_add(done);
                assert_eq!(calls.rung(now, place(used, avail)), Ruling::Now);
            }
        }
    }
    assert_eq!(calls.due(), None);
}

#[test]
fn a_ring_with_nothing_new_follows_later_and_none_is_lost() {
    let begin = Instant::now();
    let mut calls = Calls::default();
    assert_eq!(calls.rung(begin, place(1, 1)), Ruling::Now);
    assert_eq!(calls.rung(begin, place(1, 1)), Ruling::Later);
    assert_eq!(calls.due(), Some(begin + PAUSE));
    assert_eq!(calls.is_due(begin, Some(1)), None);
    let later = begin + PAUSE;
    assert_eq!(calls.is_due(later, Some(1)), Some(false));
    assert_eq!(calls.due(), None);
    // What is new does not wait, and says what was to be said later.
    assert_eq!(calls.rung(later, place(1, 1)), Ruling::Later);
    assert_eq!(calls.rung(later, place(2, 2)), Ruling::Now);
    assert_eq!(calls.due(), None);
    // After a pause there is nothing to wait for.
    assert_eq!(calls.rung(later + PAUSE, place(2, 2)), Ruling::Now);
    // Nor where the queue cannot be looked at.
    assert_eq!(calls.rung(later + 2 * PAUSE, None), Ruling::Now);
    assert_eq!(calls.rung(later + 2 * PAUSE, None), Ruling::Later);
}

/// Has a daemon ring every microsecond of a second, with `used` where the queue stands; messages, and rings that were heard.
fn storm(calls: &mut Calls, mut used: impl FnMut(u16) -> u16) -> (u32, u32) {
    let begin = Instant::now();
    let (mut messages, mut heard) = (0, 0);
    let mut deaf = false;
    for micros in 0..1_000_000u32 {
        let now = begin + Duration::from_micros(micros.into());
        let turn = u16::try_from(micros % 65_536).expect("16 bits");
        let used = used(turn);
        if let Some(hears) = calls.is_due(now, Some(used)) {
            messages += 1;
            deaf &= !hears;
        }
        if deaf {
            continue;
        }
        heard += 1;
        match calls.rung(now, place(used, 100)) {
            Ruling::Now => messages += 1,
            Ruling::Later => {}
            Ruling::Deaf => deaf = true,
        }
    }
    assert!(calls.due().is_some(), "the last is followed by a message");
    (messages, heard)
}

#[test]
fn a_storm_costs_a_bounded_number_of_messages_and_of_looks() {
    let (messages, heard) = storm(&mut Calls::default(), |_| 100);
    assert!((90..=101).contains(&messages), "{messages}");
    assert!(heard <= 101 * (HEARD + 1), "{heard}");
    // Not more if it makes it look as if something were used.
    for step in [1, 7, 40_000] {
        let mut calls = Calls::default();
        let (messages, heard) = storm(&mut calls, |turn| turn.wrapping_mul(step));
        assert!(messages <= 101 + u32::from(SIZE), "{messages}");
        assert!(heard <= 110 * (HEARD + 1), "{heard}");
    }
}
