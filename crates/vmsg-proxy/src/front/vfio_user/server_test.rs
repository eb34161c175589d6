// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a mistake in this program costs a client.

#[path = "../../../tests/vfio/mod.rs"]
mod vfio;

use std::sync::atomic::{AtomicBool, Ordering};
use vfio::client::PATIENCE;
use vfio::place::Place;
use vfio::{DRIVER_OK, Guest, NEEDS_RESET, Ram, rung_within};

static STUMBLES: AtomicBool = AtomicBool::new(false);

/// A mistake, once, where the test below wants one.
pub(super) fn stumble() {
    assert!(
        !STUMBLES.swap(false, Ordering::SeqCst),
        "a mistake on purpose"
    );
}

#[test]
fn a_mistake_between_two_messages_costs_the_guest_a_reset_and_no_more() {
    for keys in ["", ",isolate=on"] {
        let place = Place::new("net0", keys);
        let mut guest = Guest::new(&place.socket(), Ram::shared());
        guest.start(2);
        assert_eq!(guest.status() & (DRIVER_OK | NEEDS_RESET), DRIVER_OK);
        STUMBLES.store(true, Ordering::SeqCst);
        // News for the front to pass on.
        place.host.as_ref().unwrap().set_link(false);
        assert!(rung_within(&guest.config_call, PATIENCE));
        assert!(!STUMBLES.load(Ordering::SeqCst));
        assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
        guest.start(2);
        assert_eq!(guest.status() & (DRIVER_OK | NEEDS_RESET), DRIVER_OK);
        guest.tell(1, &[0; 12 + 60]);
        assert!(guest.answer(1).is_empty());
        assert_eq!(place.stats().connections, 1, "the client was never let go");
    }
}
