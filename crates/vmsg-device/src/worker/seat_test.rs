// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn table() -> Arc<WindowTable> {
    Arc::new(WindowTable::empty())
}

#[test]
fn a_table_in_use_is_not_replaced() {
    let seat = Seat::default();
    let (one, two) = (table(), table());
    seat.try_set(Arc::clone(&one)).expect("nobody is there");
    let held = seat.lock();
    assert!(Arc::ptr_eq(&held.table, &one));
    let back = seat.try_set(Arc::clone(&two)).expect_err("it is held");
    assert!(Arc::ptr_eq(&back, &two));
    drop(held);
    seat.try_set(two).expect("nobody is there any more");
    assert_eq!(Arc::strong_count(&one), 1, "the old one is let go");
}

#[test]
fn a_table_does_not_overtake_commands() {
    let seat = Seat::default();
    seat.command_sent();
    seat.command_sent();
    assert!(seat.try_set(table()).is_err());
    seat.command_done();
    assert!(seat.try_set(table()).is_err());
    seat.command_done();
    assert!(seat.try_set(table()).is_ok());
}

#[test]
fn slots_have_seats_of_their_own() {
    let seats = Seats::default();
    let one = seats.at(Slot(3));
    assert!(Arc::ptr_eq(&one, &seats.at(Slot(3))));
    assert!(!Arc::ptr_eq(&one, &seats.at(Slot(2))));
}
