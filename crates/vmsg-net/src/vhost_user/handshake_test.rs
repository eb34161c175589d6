// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::*;

#[test]
fn features_are_chosen_with_those_that_they_need() {
    let all = !0;
    let offloads = feature::CSUM | feature::GUEST_CSUM | HOST | GUEST;
    assert_eq!(choose(all, true) & offloads, offloads);
    assert_eq!(choose(all, false) & offloads, 0);
    assert_eq!(choose(all & !feature::CSUM, true) & HOST, 0);
    assert_eq!(choose(all & !feature::GUEST_CSUM, true) & GUEST, 0);
    assert_eq!(
        choose(all & !feature::MRG_RXBUF, true) & GUEST,
        0,
        "no buffer is as large"
    );
    let no_tso = all & !(feature::HOST_TSO4 | feature::HOST_TSO6);
    assert_eq!(choose(no_tso, true) & HOST, feature::HOST_USO);
    let half = choose(all & !feature::GUEST_USO6, true);
    assert_eq!(half & feature::GUEST_USO4, 0);
    assert_eq!(choose(feature::VERSION_1, true), feature::VERSION_1);
}

#[test]
fn what_a_back_end_takes_is_what_it_agreed_to() {
    assert_eq!(
        takes(0),
        Offloads {
            mtu: u16::MAX,
            ..Offloads::NONE
        }
    );
    let takes = takes(feature::CSUM | feature::HOST_TSO6);
    assert!(takes.guest_csum && takes.guest_tso6);
    assert!(!takes.guest_tso4 && !takes.guest_uso4 && !takes.guest_ecn);
}
