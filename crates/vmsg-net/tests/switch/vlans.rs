// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Networks that stay apart on one switch.

use vmsg_net::Mac;
use vmsg_net::switch::{PortConfig, Reason};

use crate::net::{DOT1Q, Net, access, all, open, plain, to, trunk};
use crate::switching::{EVERYBODY, frame, mac};

#[test]
fn vlans_stay_apart() {
    let ports = vec![
        access(0, 10),
        access(1, 10),
        access(2, 20),
        trunk(3, "10:20", None),
        plain(4),
        plain(5),
        trunk(6, "20", Some(10)),
    ];
    let mut net = Net::new(open(), ports);
    net.send(0, &[all(0, 1)]);
    let got: Vec<Vec<Vec<u8>>> = (0..7).map(|port| net.got(port)).collect();
    assert_eq!(got[1], [all(0, 1)]);
    assert_eq!(got[3], [frame(EVERYBODY, mac(0), &[(DOT1Q, 10)], 1, 68)]);
    assert_eq!(got[6], [all(0, 1)], "native");
    for port in [0, 2, 4, 5] {
        assert!(got[port].is_empty(), "{port}");
    }
    // With a priority, and for the other VLAN.
    net.send(3, &[frame(EVERYBODY, mac(3), &[(DOT1Q, 0x6014)], 2, 64)]);
    assert_eq!(net.got(2), [frame(EVERYBODY, mac(3), &[], 2, 60)]);
    assert_eq!(
        net.got(6),
        [frame(EVERYBODY, mac(3), &[(DOT1Q, 0x6014)], 2, 64)]
    );
    assert_eq!(net.numbers()[1], [] as [u32; 0]);
    // A tag with a priority only is none.
    net.send(0, &[frame(EVERYBODY, mac(0), &[(DOT1Q, 0xa000)], 3, 64)]);
    assert_eq!(net.got(1), [frame(EVERYBODY, mac(0), &[], 3, 60)]);
    assert_eq!(
        net.got(3),
        [frame(EVERYBODY, mac(0), &[(DOT1Q, 0xa00a)], 3, 64)]
    );
    net.numbers();
    // The same address may be somebody else in another VLAN.
    net.send(2, &[all(0, 4)]);
    net.numbers();
    net.send(1, &[to(0, 1, 5)]);
    assert_eq!(net.numbers()[0], [5]);
    net.send(4, &[all(4, 6)]);
    let mut wanted = vec![vec![]; 7];
    wanted[5] = vec![6];
    assert_eq!(net.numbers(), wanted);
    // Neither a tag of its own, nor one that is not carried, nor a frame without.
    net.send(0, &[frame(mac(1), mac(0), &[(DOT1Q, 10)], 7, 64)]);
    net.send(0, &[frame(mac(1), mac(0), &[(0x88a8, 10)], 7, 64)]);
    net.send(
        3,
        &[to(1, 3, 8), frame(mac(1), mac(3), &[(DOT1Q, 30)], 9, 64)],
    );
    assert_eq!(net.numbers(), vec![vec![]; 7] as Vec<Vec<u32>>);
    assert_eq!(net.dropped_in(0, Reason::Vlan), 2);
    assert_eq!(net.dropped_in(3, Reason::Vlan), 2);
}

#[test]
fn a_second_tag_does_not_become_the_first() {
    let ports = vec![
        access(0, 10),
        access(1, 10),
        trunk(2, "20", Some(10)),
        trunk(3, "all", None),
    ];
    let mut net = Net::new(open(), ports);
    net.send(
        0,
        &[frame(EVERYBODY, mac(0), &[(DOT1Q, 0), (DOT1Q, 20)], 1, 64)],
    );
    net.send(
        3,
        &[frame(
            EVERYBODY,
            mac(3),
            &[(DOT1Q, 10), (0x88a8, 20)],
            2,
            64,
        )],
    );
    net.send(
        3,
        &[frame(EVERYBODY, mac(3), &[(DOT1Q, 20), (DOT1Q, 5)], 3, 64)],
    );
    assert_eq!(net.numbers(), [vec![], vec![], vec![3], vec![1]]);
    assert_eq!(net.dropped_out(1, Reason::Vlan), 2);
    assert_eq!(net.dropped_out(2, Reason::Vlan), 2);
}

#[test]
fn an_address_that_is_fixed_at_a_trunk_is_there_in_all_its_vlans() {
    let fixed = PortConfig {
        statics: vec![Mac(mac(9))],
        ..trunk(2, "10:20", None)
    };
    let ports = vec![
        access(0, 10),
        access(1, 20),
        fixed,
        access(3, 30),
        access(4, 30),
    ];
    let mut net = Net::new(open(), ports);
    net.send(0, &[to(9, 0, 1)]);
    net.send(1, &[to(9, 1, 2), all(9, 3)]);
    net.send(3, &[to(9, 3, 4)]);
    assert_eq!(net.numbers(), [vec![], vec![], vec![1, 2], vec![], vec![4]]);
    assert_eq!(net.dropped_in(1, Reason::Pin), 1);
    net.send(2, &[frame(mac(0), mac(9), &[(DOT1Q, 10)], 5, 64)]);
    assert_eq!(net.numbers()[0], [5]);
    // Elsewhere it may be anybody.
    net.send(3, &[all(9, 6)]);
    assert_eq!(net.numbers()[4], [6]);
    let macs = net.bench.ask(|control| control.macs()).unwrap();
    assert!(macs.iter().any(|entry| entry.vlan.is_none() && entry.fixed));
}
