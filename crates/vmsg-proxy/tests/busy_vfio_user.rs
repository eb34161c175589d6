// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest behind the vfio-user front resets a device whose requests do not end.
#![allow(missing_docs)]

mod stuck;
mod vfio;

use std::time::{Duration, Instant};
use stuck::{Medium, Stuck};
use vfio::client::PATIENCE;
use vfio::place::Place;
use vfio::{Guest, NEEDS_RESET, Ram};

/// No message takes longer, whatever the device does: QEMU gives up then.
const BOUND: Duration = Duration::from_secs(5);

/// A guest whose device has a request under way that does not end.
fn hung(medium: &Medium, keys: &str) -> (Place, Guest<vfio::client::Client>) {
    let place = Place::with_device(Box::new(Stuck::new(medium, 1)), keys);
    let mut guest = Guest::new(&place.socket(), Ram::shared());
    guest.use_msix(1);
    guest.start(1);
    guest.ask(0, 64);
    let end = Instant::now() + PATIENCE;
    while medium.taken() == 0 {
        assert!(Instant::now() < end, "the device has the request");
        std::thread::sleep(Duration::from_millis(1));
    }
    (place, guest)
}

#[test]
fn a_reset_lasts_as_long_as_the_device_and_holds_nobody_up() {
    for keys in ["", ",isolate=on,segment=1M"] {
        let medium = Medium::new();
        let (place, mut guest) = hung(&medium, keys);
        let began = Instant::now();
        guest.set_status(0);
        assert_ne!(guest.status(), 0, "{keys}");
        assert!(began.elapsed() < BOUND, "{keys}: {:?}", began.elapsed());
        // A driver looks again and again.
        let looked = Instant::now();
        let mut looks = 0;
        while looked.elapsed() < Duration::from_millis(2500) {
            assert_eq!(guest.status(), NEEDS_RESET, "{keys}");
            looks += 1;
            std::thread::sleep(Duration::from_millis(10));
        }
        // If each waited for the device, there would be one or two.
        assert!(looks > 3, "{keys}: {looks}");
        medium.release();
        let end = Instant::now() + PATIENCE;
        while guest.status() != 0 {
            assert!(Instant::now() < end, "{keys}: the reset has no end");
            std::thread::sleep(Duration::from_millis(10));
        }
        // And all is well.
        guest.forget();
        guest.start(1);
        guest.ask(0, 64);
        guest.answer(0);
        drop(place);
    }
}

#[test]
fn a_client_that_ends_meanwhile_is_followed_by_another_when_the_device_lets_go() {
    let medium = Medium::new();
    let (place, guest) = hung(&medium, "");
    drop(guest);
    medium.release();
    let mut guest = Guest::new(&place.socket(), Ram::shared());
    guest.use_msix(1);
    guest.start(1);
    guest.ask(0, 64);
    guest.answer(0);
}
