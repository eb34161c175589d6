// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who gets a frame: what the switch learns, and what rules and pins say.

use std::time::Duration;

use vmsg_net::Mac;
use vmsg_net::switch::{PortChange, PortConfig, Reason, Rule, SwitchConfig, SwitchError, Unknown};

use crate::net::{DOT1Q, Net, all, open, plain, to};
use crate::switching::{EVERYBODY, frame, mac};

#[test]
fn strangers_are_sought_everywhere_and_then_found() {
    let mut net = Net::open(4);
    net.send(0, &[to(1, 0, 1)]);
    assert_eq!(net.numbers(), [vec![], vec![1], vec![1], vec![1]]);
    net.send(1, &[to(0, 1, 2)]);
    assert_eq!(net.numbers(), [vec![2], vec![], vec![], vec![]]);
    net.send(0, &[to(1, 0, 3), to(2, 0, 4), to(0, 0, 5)]);
    assert_eq!(net.numbers(), [vec![], vec![3, 4], vec![4], vec![4]]);
    assert_eq!(net.dropped_in(0, Reason::SamePort), 1);
    assert_eq!(net.report(0).macs, 1);
    let macs = net.bench.ask(|control| control.macs()).unwrap();
    assert_eq!(macs.len(), 2);
    assert_eq!((macs[0].mac, macs[0].port.as_str()), (Mac(mac(0)), "p0"));
    net.bench.ask(|control| control.flush(Some("p1"))).unwrap();
    net.send(0, &[to(1, 0, 6)]);
    assert_eq!(net.numbers(), [vec![], vec![6], vec![6], vec![6]]);
}

#[test]
fn bytes_arrive_as_they_were_sent() {
    let mut net = Net::open(2);
    let frames: Vec<Vec<u8>> = [14, 15, 17, 18, 60, 64, 1514, 9000, 65549]
        .into_iter()
        .map(|len| {
            let mut bytes = frame(mac(1), mac(0), &[], 9, len);
            bytes.truncate(len);
            bytes
        })
        .collect();
    net.send(0, &frames);
    assert_eq!(net.got(1), frames);
    let tagged = frame(mac(1), mac(0), &[(DOT1Q, 5), (0x88a8, 6)], 9, 80);
    net.send(0, std::slice::from_ref(&tagged));
    assert_eq!(net.got(1), [tagged], "plain ports look at no tags");
}

#[test]
fn without_a_rule_nobody_reaches_anybody() {
    let mut net = Net::new(SwitchConfig::new("s0"), (0..3).map(plain).collect());
    net.send(0, &[to(1, 0, 1), all(0, 2)]);
    assert_eq!(net.numbers(), [const { Vec::<u32>::new() }; 3]);
    assert_eq!(net.dropped_in(0, Reason::Acl), 2);
    assert_eq!(
        net.report(0).macs,
        0,
        "it cannot take anybody's address away"
    );
    let rules = Rule::parse(true, "p0 > p2").unwrap();
    net.bench.ask(|control| control.add_rules(rules)).unwrap();
    net.send(0, &[to(1, 0, 3), all(0, 4)]);
    net.send(2, &[to(0, 2, 5)]);
    assert_eq!(net.numbers(), [vec![], vec![], vec![3, 4]]);
    assert_eq!(net.dropped_in(2, Reason::Acl), 1);
}

#[test]
fn a_rule_cuts_one_pair_and_only_that_pair() {
    let mut net = Net::open(3);
    for port in 0..3 {
        net.send(port, &[all(port, 0)]);
    }
    net.numbers();
    let rules = Rule::parse(false, "p0 <> p1").unwrap();
    net.bench.ask(|control| control.add_rules(rules)).unwrap();
    for from in 0..3 {
        for receiver in (0..3).filter(|receiver| *receiver != from) {
            net.send(from, &[to(receiver, from, 1)]);
            let cut = from + receiver == 1;
            assert_eq!(net.got(receiver).is_empty(), cut, "{from} > {receiver}");
        }
    }
    assert_eq!(
        net.dropped_in(0, Reason::Acl) + net.dropped_in(1, Reason::Acl),
        2
    );
}

#[test]
fn strangers_may_be_dropped_or_sent_to_one_port() {
    let mut net = Net::open(3);
    net.bench
        .ask(|control| control.set_unknown(Unknown::Drop))
        .unwrap();
    net.send(0, &[to(9, 0, 1), all(0, 2)]);
    assert_eq!(net.numbers(), [vec![], vec![2], vec![2]]);
    assert_eq!(net.dropped_in(0, Reason::Unknown), 1);
    let up = Unknown::Uplink("p2".to_owned());
    net.bench.ask(|control| control.set_unknown(up)).unwrap();
    net.send(0, &[to(9, 0, 3)]);
    net.send(2, &[to(9, 2, 4)]);
    assert_eq!(net.numbers(), [vec![], vec![], vec![3]]);
    assert_eq!(net.dropped_in(2, Reason::Unknown), 1);
}

#[test]
fn addresses_grow_old() {
    let config = SwitchConfig {
        age: Duration::from_secs(10),
        ..open()
    };
    let mut net = Net::new(config, (0..3).map(plain).collect());
    net.send(1, &[all(1, 0)]);
    net.numbers();
    for (seconds, known) in [(9, true), (9, false)] {
        net.bench.pass(Duration::from_secs(seconds));
        net.send(0, &[to(1, 0, 1)]);
        assert_eq!(net.got(2).is_empty(), known);
    }
    assert!(net.bench.pump.next_timeout().is_some());
    for _ in 0..200 {
        net.bench.pass(Duration::from_secs(1));
        net.bench.pump();
    }
    assert_eq!(net.bench.control.report().macs, 0, "and are forgotten");
}

#[test]
fn an_address_moves_with_its_frames_unless_it_is_fixed() {
    let fixed = PortConfig {
        statics: vec![Mac(mac(7))],
        ..plain(2)
    };
    let mut net = Net::new(open(), vec![plain(0), plain(1), fixed]);
    net.send(0, &[all(5, 0)]);
    net.send(1, &[all(5, 0)]);
    net.numbers();
    net.send(2, &[to(5, 2, 1)]);
    assert_eq!(net.numbers(), [vec![], vec![1], vec![]]);
    assert_eq!((net.report(1).moves, net.report(0).macs), (1, 0));
    net.send(0, &[all(7, 2)]);
    assert_eq!(net.dropped_in(0, Reason::Pin), 1);
    net.send(1, &[to(7, 1, 3)]);
    assert_eq!(net.numbers(), [vec![], vec![], vec![3]]);
}

#[test]
fn a_pinned_port_uses_its_own_addresses_only() {
    let pinned = PortConfig {
        pin: vec![Mac(mac(0))],
        ..plain(0)
    };
    let mut net = Net::new(open(), vec![pinned, plain(1)]);
    net.send(1, &[all(1, 0)]);
    net.send(0, &[to(1, 0, 1), to(1, 8, 2), all(8, 3), to(1, 1, 4)]);
    net.send(1, &[all(0, 5)]);
    assert_eq!(net.numbers(), [vec![0], vec![1]]);
    assert_eq!(net.dropped_in(0, Reason::Pin), 3);
    assert_eq!(net.dropped_in(1, Reason::Pin), 1, "nor do others use them");
    // Set again while it works.
    let change = PortChange {
        pin: Some(vec![Mac(mac(8))]),
        ..PortChange::default()
    };
    net.set(0, change).unwrap();
    net.send(0, &[to(1, 0, 6), to(1, 8, 7)]);
    assert_eq!(net.numbers(), [vec![], vec![7]]);
    let taken = PortChange {
        statics: Some(vec![Mac(mac(8))]),
        ..PortChange::default()
    };
    assert!(matches!(
        net.set(1, taken),
        Err(SwitchError::MacTaken { .. })
    ));
}

#[test]
fn a_flood_of_addresses_fills_no_more_than_its_port_may_have() {
    let few = PortConfig {
        macs: 10,
        ..plain(0)
    };
    let mut net = Net::new(open(), vec![few, plain(1), plain(2)]);
    net.send(1, &[all(1, 0)]);
    for n in 100..300 {
        net.send(0, &[all(n, 0)]);
    }
    // Not even by using it does it get an address beyond them.
    net.send(0, &[to(2, 1, 0)]);
    net.numbers();
    assert_eq!((net.report(0).macs, net.report(0).not_learned), (10, 191));
    net.send(2, &[to(1, 2, 1)]);
    assert_eq!(net.numbers(), [vec![], vec![1], vec![]]);
}

#[test]
fn what_cannot_be_a_frame_is_counted() {
    let mut net = Net::open(2);
    let group = [0x01, 0, 0x5e, 0, 0, 1];
    net.send(
        0,
        &[
            vec![0; 13],
            vec![],
            frame(mac(1), mac(0), &[(DOT1Q, 1)], 0, 0)[..17].to_vec(),
            vec![2; 70_000],
            frame(mac(1), group, &[], 0, 64),
            frame(mac(1), EVERYBODY, &[], 0, 64),
            frame(mac(1), [0; 6], &[], 0, 64),
            frame([1, 0x80, 0xc2, 0, 0, 0], mac(0), &[], 0, 64),
            frame([1, 0x80, 0xc2, 0, 0, 0x0f], mac(0), &[], 0, 64),
            frame([1, 0x80, 0xc2, 0, 0, 0x10], mac(0), &[], 1, 64),
            frame([0; 6], mac(0), &[], 2, 64),
        ],
    );
    assert_eq!(net.dropped_in(0, Reason::Malformed), 4);
    assert_eq!(net.dropped_in(0, Reason::BadSource), 3);
    assert_eq!(net.dropped_in(0, Reason::LinkLocal), 2);
    assert_eq!(net.numbers(), [vec![], vec![1, 2]]);
    assert_eq!(net.report(0).input.total().frames, 11);
}
