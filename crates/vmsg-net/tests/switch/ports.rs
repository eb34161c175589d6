// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ports that come and go, and what cannot be.

use std::time::Duration;

use vmsg_net::switch::{
    Mirror, PortChange, PortConfig, Reason, Switch, SwitchConfig, SwitchError, VlanSet, Vlans,
};
use vmsg_net::{Backend, Guest, Mac};

use crate::net::{Net, access, all, open, plain, to, trunk};
use crate::switching::everything;

#[test]
fn the_cable_of_a_port_can_be_pulled_out() {
    let mut net = Net::open(3);
    net.send(1, &[all(1, 0)]);
    net.numbers();
    let down = PortChange {
        link: Some(false),
        ..PortChange::default()
    };
    assert!(net.ports[1].link_is_up());
    net.set(1, down).unwrap();
    assert!(!net.ports[1].link_is_up());
    assert_eq!(net.report(1).macs, 0);
    net.send(0, &[to(1, 0, 1)]);
    net.send(1, &[all(1, 2)]);
    assert_eq!(net.numbers(), [vec![], vec![], vec![1]]);
    assert_eq!(net.dropped_out(1, Reason::LinkDown), 1);
    assert_eq!(net.dropped_in(1, Reason::LinkDown), 1);
}

#[test]
fn a_port_can_be_taken_away_and_another_put_in_its_place() {
    let mut net = Net::open(3);
    net.send(1, &[all(1, 0)]);
    net.numbers();
    net.bench.ask(|control| control.remove_port("p1")).unwrap();
    assert!(!net.ports[1].link_is_up());
    net.send(0, &[to(1, 0, 1), all(0, 2)]);
    net.send(1, &[all(1, 3)]);
    assert_eq!(net.numbers(), [vec![], vec![], vec![1, 2]]);
    let mut port = net.bench.switch.add_port(plain(1)).unwrap();
    net.keys[1] = net.bench.bring_up(&mut port, &everything());
    // The new one has the old one's number; the old one says its last words after that.
    let mut old = std::mem::replace(&mut net.ports[1], port);
    net.send(1, &[all(1, 4)]);
    old.set_guest(&Guest::NONE);
    old.shutdown();
    drop(old);
    net.send(0, &[to(1, 0, 5)]);
    assert_eq!(net.numbers(), [vec![4], vec![5], vec![4]]);
    assert!(matches!(
        net.bench.ask(|control| control.remove_port("p9")),
        Err(SwitchError::NoSuchPort(_))
    ));
}

#[test]
fn a_port_whose_device_is_gone_goes_too() {
    let mut net = Net::open(3);
    let gone = net.ports.remove(1);
    drop(gone);
    net.send(0, &[all(0, 1)]);
    assert_eq!(net.bench.control.report().ports.len(), 2);
    net.bench.pump();
    net.bench.switch.add_port(plain(1)).unwrap();
}

#[test]
fn what_cannot_be_is_refused() {
    let switch = Switch::new(open()).unwrap();
    let _port = switch.add_port(plain(0)).unwrap();
    let none = Vlans::Trunk {
        allowed: VlanSet::none(),
        native: None,
    };
    for (config, wanted) in [
        (plain(0), "there is a port `p0` already"),
        (PortConfig::new("a b"), "name: `a b` is no name for a port"),
        (access(1, 0), "vlan: 0 is not a VLAN from 1 to 4094"),
        (access(1, 4095), "vlan: 4095 is not a VLAN from 1 to 4094"),
        (
            trunk(1, "all", Some(4095)),
            "native: 4095 is not a VLAN from 1 to 4094",
        ),
        (
            PortConfig {
                vlan: none,
                ..plain(1)
            },
            "trunk: it carries no VLAN",
        ),
        (
            PortConfig {
                pin: vec![Mac([1; 6])],
                ..plain(1)
            },
            "mac: 01:01:01:01:01:01 is not the address of a single interface",
        ),
        (
            PortConfig {
                capture: Some(Mirror::new("/nowhere/at/all")),
                ..plain(1)
            },
            "capture to /nowhere/at/all: No such file or directory (os error 2)",
        ),
    ] {
        assert_eq!(switch.add_port(config).unwrap_err().to_string(), wanted);
    }
    for config in [
        SwitchConfig { table: 0, ..open() },
        SwitchConfig {
            age: Duration::ZERO,
            ..open()
        },
    ] {
        Switch::new(config).unwrap_err();
    }
}
