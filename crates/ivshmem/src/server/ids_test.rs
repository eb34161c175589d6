// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

#[test]
fn ids_are_counted_up_and_not_given_again_at_once() {
    let mut ids = Ids::new(0, false, []);
    assert_eq!(ids.take(None), Some(PeerId(0)));
    assert_eq!(ids.take(Some(0)), Some(PeerId(1)));
    ids.give_back(PeerId(0), 5);
    assert_eq!(ids.take(Some(1)), Some(PeerId(2)));
    assert_eq!(ids.next(), 3);
}

#[test]
fn those_of_ports_are_left_out() {
    let mut ids = Ids::new(0, false, [PeerId(0), PeerId(2)]);
    let given: Vec<_> = (0..3).filter_map(|_| ids.take(None)).collect();
    assert_eq!(given, [PeerId(1), PeerId(3), PeerId(4)]);
}

#[test]
fn after_the_last_an_id_is_given_again_only_if_nobody_has_seen_it_leave() {
    let mut ids = Ids::new(65_534, false, [PeerId(65_535)]);
    assert_eq!(ids.take(Some(10)), Some(PeerId(65_534)));
    // Never given by this server, which knows that nobody has them.
    assert_eq!(ids.take(Some(10)), Some(PeerId(0)));
    for _ in 1..65_534 {
        assert!(ids.take(Some(10)).is_some());
    }
    assert_eq!(ids.take(Some(10)), None);
    ids.give_back(PeerId(7), 20);
    assert_eq!(
        ids.take(Some(10)),
        None,
        "one that came at 10 has seen it leave"
    );
    assert_eq!(ids.take(Some(21)), Some(PeerId(7)));
    ids.give_back(PeerId(8), 30);
    assert_eq!(ids.take(None), Some(PeerId(8)), "nobody is there");
}

#[test]
fn what_clients_of_a_server_before_may_have_is_never_given() {
    let mut ids = Ids::new(65_535, true, []);
    assert_eq!(ids.take(None), Some(PeerId(65_535)));
    assert_eq!(ids.take(None), None);
    ids.give_back(PeerId(65_535), 1);
    assert_eq!(ids.take(None), Some(PeerId(65_535)));
    assert_eq!(Ids::new(65_536, true, []).take(None), None);
}
