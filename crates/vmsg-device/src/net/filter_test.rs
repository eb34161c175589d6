// SPDX-License-Identifier: Apache-2.0 OR MIT

use proptest::prelude::*;

use super::*;

const OWN: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const OTHER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
const GROUP: [u8; 6] = [0x01, 0, 0x5e, 0, 0, 1];

fn frame(to: [u8; 6], vlan: Option<u16>) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend([0; 6]);
    if let Some(vlan) = vlan {
        frame.extend(TAGGED);
        frame.extend(vlan.to_be_bytes());
    }
    frame.extend([8, 0, 0, 0]);
    frame
}

/// Which of own, other unicast, multicast and broadcast come in.
fn admitted(filter: &Filter) -> [bool; 4] {
    [OWN, OTHER, GROUP, BROADCAST].map(|to| filter.wants(Mac(OWN), &frame(to, None)))
}

fn table(addresses: &[[u8; 6]]) -> Table {
    Table {
        addresses: addresses.to_vec(),
        overflow: false,
    }
}

#[test]
fn a_driver_that_says_nothing_gets_everything() {
    assert_eq!(admitted(&Filter::new(false)), [true; 4]);
    assert!(Filter::new(false).is_open());
}

#[test]
fn modes_do_what_they_are_called() {
    for (modes, expected) in [
        (vec![], [true, false, false, true]),
        (vec![Mode::Promiscuous], [true; 4]),
        (vec![Mode::AllMulticast], [true, false, true, true]),
        (vec![Mode::AllUnicast], [true, true, false, true]),
        (vec![Mode::NoUnicast], [false, false, false, true]),
        (vec![Mode::NoBroadcast], [true, false, false, false]),
        (
            vec![Mode::AllMulticast, Mode::NoMulticast],
            [true, false, false, true],
        ),
        (
            vec![Mode::AllUnicast, Mode::NoUnicast],
            [false, false, false, true],
        ),
        (
            vec![Mode::AllMulticast, Mode::NoBroadcast],
            [true, false, true, false],
        ),
        (
            vec![
                Mode::Promiscuous,
                Mode::NoUnicast,
                Mode::NoMulticast,
                Mode::NoBroadcast,
            ],
            [true; 4],
        ),
    ] {
        let mut filter = Filter::new(false);
        filter.set_mode(Mode::Promiscuous, false);
        for mode in &modes {
            filter.set_mode(*mode, true);
        }
        assert_eq!(admitted(&filter), expected, "{modes:?}");
        for mode in modes {
            filter.set_mode(mode, false);
        }
        assert_eq!(admitted(&filter), [true, false, false, true]);
    }
}

#[test]
fn listed_addresses_come_in_and_too_many_open_their_kind() {
    let mut filter = Filter::new(false);
    filter.set_tables(table(&[OTHER]), table(&[GROUP]));
    assert_eq!(admitted(&filter), [true; 4]);
    filter.set_tables(table(&[]), table(&[]));
    assert_eq!(admitted(&filter), [true, false, false, true]);
    let overflow = || Table {
        addresses: Vec::new(),
        overflow: true,
    };
    filter.set_tables(overflow(), table(&[]));
    assert_eq!(admitted(&filter), [true, true, false, true]);
    filter.set_tables(table(&[]), overflow());
    assert_eq!(admitted(&filter), [true, false, true, true]);
}

proptest! {
    #[test]
    fn vlans_come_in_if_they_were_added(changes in prop::collection::vec((0..5000_u16, any::<bool>()), 0..40)) {
        let mut filter = Filter::new(true);
        let mut model = std::collections::BTreeSet::new();
        for (vlan, admitted) in changes {
            prop_assert_eq!(filter.set_vlan(vlan, admitted), vlan < 4096);
            if vlan < 4096 && admitted {
                model.insert(vlan);
            } else {
                model.remove(&vlan);
            }
        }
        for vlan in 0..4096 {
            // The upper bits are priority and drop eligibility.
            let tag = vlan | 0xf000;
            prop_assert_eq!(filter.wants(Mac(OWN), &frame(OWN, Some(tag))), model.contains(&vlan));
        }
        prop_assert!(filter.wants(Mac(OWN), &frame(OWN, None)));
    }
}

#[test]
fn without_the_feature_all_vlans_come_in() {
    let mut filter = Filter::new(false);
    assert!(!filter.set_vlan(5, true));
    filter.set_mode(Mode::Promiscuous, false);
    assert!(filter.wants(Mac(OWN), &frame(OWN, Some(7))));
    // Too short for what it pretends to be.
    let mut filter = Filter::new(true);
    filter.set_mode(Mode::AllUnicast, true);
    assert!(!filter.wants(Mac(OWN), &frame(OWN, Some(7))[..15]));
    assert!(!filter.wants(Mac(OWN), &OWN[..5]));
}
