// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a switch does with frames, one thing at a time.

mod switching;

use std::time::Duration;

use switching::{Bench, EVERYBODY, Mood, everything, frame, mac, number};
use vmsg_net::switch::{
    Mirror, Port, PortChange, PortConfig, PortReport, Reason, Rule, Switch, SwitchConfig,
    SwitchError, Unknown, VlanSet, Vlans,
};
use vmsg_net::{Backend, Closed, Guest, Mac, Offloads, VnetHeader};

/// Some ports, each with a device, and the keys of these.
struct Net {
    bench: Bench,
    ports: Vec<Port>,
    keys: Vec<u64>,
}

impl Net {
    fn new(config: SwitchConfig, ports: Vec<PortConfig>) -> Self {
        let mut bench = Bench::new(Switch::new(config).unwrap(), 7);
        let mut keys = Vec::new();
        let mut all = Vec::new();
        for config in ports {
            let mut port = bench.switch.add_port(config).unwrap();
            keys.push(bench.bring_up(&mut port, &everything()));
            all.push(port);
        }
        bench.pump();
        Self {
            bench,
            ports: all,
            keys,
        }
    }

    /// Plain ports that may all send to each other.
    fn open(ports: usize) -> Self {
        Self::new(open(), (0..ports).map(plain).collect())
    }

    fn send(&mut self, port: usize, frames: &[Vec<u8>]) {
        let taken = self.bench.send(&mut self.ports[port], frames);
        assert_eq!(taken, frames.len());
    }

    fn got(&mut self, port: usize) -> Vec<Vec<u8>> {
        self.bench.got(self.keys[port])
    }

    /// The numbers of the frames that each port has got.
    fn numbers(&mut self) -> Vec<Vec<u32>> {
        (0..self.ports.len())
            .map(|port| self.got(port).iter().map(|frame| number(frame)).collect())
            .collect()
    }

    fn report(&self, port: usize) -> PortReport {
        let name = self.ports[port].name();
        let report = self.bench.control.report();
        report
            .ports
            .into_iter()
            .find(|port| port.name == name)
            .unwrap()
    }

    fn dropped_in(&self, port: usize, reason: Reason) -> u64 {
        self.report(port).dropped_in.get(reason)
    }

    fn dropped_out(&self, port: usize, reason: Reason) -> u64 {
        self.report(port).dropped_out.get(reason)
    }

    fn set(&mut self, port: usize, change: PortChange) -> Result<(), SwitchError> {
        let name = self.ports[port].name().to_owned();
        self.bench
            .ask(move |control| control.set_port(&name, change))
    }
}

fn open() -> SwitchConfig {
    SwitchConfig {
        rules: vec![Rule::allow_all()],
        ..SwitchConfig::new("s0")
    }
}

fn plain(port: usize) -> PortConfig {
    PortConfig::new(format!("p{port}"))
}

fn access(port: usize, vlan: u16) -> PortConfig {
    PortConfig {
        vlan: Vlans::Access(vlan),
        ..plain(port)
    }
}

fn trunk(port: usize, allowed: &str, native: Option<u16>) -> PortConfig {
    PortConfig {
        vlan: Vlans::Trunk {
            allowed: allowed.parse().unwrap(),
            native,
        },
        ..plain(port)
    }
}

fn to(to: usize, from: usize, number: u32) -> Vec<u8> {
    frame(mac(to), mac(from), &[], number, 64)
}

fn all(from: usize, number: u32) -> Vec<u8> {
    frame(EVERYBODY, mac(from), &[], number, 64)
}

const DOT1Q: u16 = 0x8100;

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

#[test]
fn a_storm_is_held_back_and_nothing_else_is() {
    let stormy = PortConfig {
        storm: Some(100),
        ..plain(0)
    };
    let mut net = Net::new(open(), vec![stormy, plain(1), plain(2)]);
    net.send(1, &[all(1, 0)]);
    net.numbers();
    for n in 0..1000 {
        net.send(0, &[all(0, n), to(99, 0, n), to(1, 0, n)]);
        net.send(2, &[all(2, n)]);
    }
    assert_eq!(net.dropped_in(0, Reason::Storm), 1900);
    assert_eq!(net.got(1).len(), 100 + 1000 + 1000);
    assert_eq!(net.got(2).len(), 100);
    net.bench.pass(Duration::from_millis(500));
    for n in 0..100 {
        net.send(0, &[all(0, n)]);
    }
    assert_eq!(net.got(2).len(), 50);
}

#[test]
fn what_a_port_may_not_send_yet_waits_with_it() {
    let slow = PortConfig {
        rate_in: Some("8M".parse().unwrap()),
        ..plain(0)
    };
    let mut net = Net::new(open(), vec![slow, plain(1)]);
    let frames = vec![frame(mac(1), mac(0), &[], 0, 1000); 32];
    let start = net.bench.now;
    let mut sent = 0;
    while net.bench.now - start < Duration::from_secs(2) {
        let taken = net.bench.send(&mut net.ports[0], &frames);
        sent += taken;
        if taken < frames.len() {
            let until = net.ports[0].next_timeout().expect("it says when");
            assert!(until > net.bench.now);
            net.bench.now = until;
            net.ports[0].poll(until);
        }
    }
    assert_eq!(net.got(1).len(), sent);
    assert!(
        (2000..2100).contains(&sent),
        "1000 frames each second: {sent}"
    );
    assert!(net.report(0).waits > 100);
    let free = PortChange {
        rate_in: Some(None),
        ..PortChange::default()
    };
    net.set(0, free).unwrap();
    for _ in 0..100 {
        net.send(0, &frames);
    }
    assert_eq!(net.got(1).len(), 3200);
}

#[test]
fn what_a_port_is_sent_too_much_is_dropped() {
    let slow = PortConfig {
        rate_out: Some("8M".parse().unwrap()),
        ..plain(1)
    };
    let mut net = Net::new(open(), vec![plain(0), slow, plain(2)]);
    let frames = vec![frame(EVERYBODY, mac(0), &[], 0, 1000); 20];
    for _ in 0..1000 {
        net.send(0, &frames);
        net.bench.pass(Duration::from_millis(1));
    }
    let got = net.got(1).len();
    assert!((1000..1100).contains(&got), "{got}");
    assert_eq!(net.dropped_out(1, Reason::RateOut), 20_000 - got as u64);
    assert_eq!(net.got(2).len(), 20_000);
}

#[test]
fn a_receiver_loses_its_own_frames_only() {
    let mut net = Net::open(7);
    for port in 1..7 {
        net.send(port, &[all(port, 0)]);
    }
    net.numbers();
    let moods = [
        Mood::Buffers(3),
        Mood::Closed(Closed::NoDriver),
        Mood::Closed(Closed::LinkDown),
        Mood::Breaks,
        Mood::Closed(Closed::Gone),
    ];
    for (port, mood) in (1..).zip(moods) {
        let key = net.keys[port];
        net.bench.world.receivers.get_mut(&key).unwrap().mood = mood;
    }
    let frames: Vec<Vec<u8>> = (0..10).map(|n| all(0, n)).collect();
    net.send(0, &frames);
    let numbers = net.numbers();
    assert_eq!(numbers[1], [0, 1, 2]);
    assert_eq!(numbers[6], (0..10).collect::<Vec<u32>>());
    assert_eq!(net.dropped_out(1, Reason::NoBuffers), 7);
    assert_eq!(net.dropped_out(2, Reason::NoDriver), 10);
    assert_eq!(net.dropped_out(3, Reason::LinkDown), 10);
    assert_eq!(net.dropped_out(4, Reason::Broken), 10);
    assert_eq!(net.dropped_out(5, Reason::Gone), 10);
    // Those who went by themselves.
    net.ports[6].set_guest(&Guest::NONE);
    assert_eq!(net.report(6).macs, 0, "its addresses are forgotten");
    net.send(0, &[all(0, 11)]);
    assert_eq!(net.dropped_out(6, Reason::NoDriver), 1);
}

#[test]
fn more_frames_than_one_turn_has_buffers_for_arrive_in_order() {
    let mut net = Net::open(2);
    let key = net.keys[1];
    net.bench.world.receivers.get_mut(&key).unwrap().turn = 5;
    let frames: Vec<Vec<u8>> = (0..200).map(|n| all(0, n)).collect();
    net.send(0, &frames);
    assert_eq!(net.numbers()[1], (0..200).collect::<Vec<u32>>());
}

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

#[test]
fn frames_are_recorded_in_both_directions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p1.pcap");
    let mut net = Net::new(open(), vec![access(0, 5), trunk(1, "all", None)]);
    let mirror = Mirror::new(&path);
    net.bench
        .ask(|control| control.capture("p1", Some(mirror)))
        .unwrap();
    assert!(net.report(1).capture.is_some());
    net.send(0, &[all(0, 1)]);
    let back = frame(mac(0), mac(1), &[(DOT1Q, 5)], 2, 100);
    net.send(1, std::slice::from_ref(&back));
    let file = std::fs::read(&path).unwrap();
    let mut records = Vec::new();
    let mut rest = &file[24..];
    while !rest.is_empty() {
        let len = u32::from_ne_bytes(rest[8..12].try_into().unwrap()) as usize;
        records.push(rest[16..16 + len].to_vec());
        rest = &rest[16 + len..];
    }
    let there = frame(EVERYBODY, mac(0), &[(DOT1Q, 5)], 1, 68);
    assert_eq!(records, [there, back]);
    net.bench
        .ask(|control| control.capture("p1", None))
        .unwrap();
    net.send(0, &[all(0, 3)]);
    assert_eq!(std::fs::read(&path).unwrap(), file);
}

#[test]
fn a_capture_that_fails_ends_and_nothing_else_does() {
    let mut net = Net::open(2);
    let full = Mirror::new("/dev/full");
    // The header cannot be written: it is refused at once.
    let refused = net.bench.ask(|control| control.capture("p1", Some(full)));
    assert!(matches!(refused, Err(SwitchError::Capture { .. })));
    // A pipe that nobody empties.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let _reader = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let mirror = Mirror::new(&path);
    net.bench
        .ask(|control| control.capture("p1", Some(mirror)))
        .unwrap();
    for n in 0..200 {
        net.send(0, &[frame(mac(1), mac(0), &[], n, 1500)]);
    }
    assert_eq!(net.got(1).len(), 200);
    assert_eq!(net.report(1).capture, None);
}

#[test]
fn a_large_segment_is_cut_for_one_who_cannot_take_it_and_crosses_whole_to_others() {
    let mut net = Net::open(3);
    let small = Guest {
        offloads: Offloads::NONE,
        ..everything()
    };
    net.ports[2].set_guest(&small);
    let mut bytes = frame(EVERYBODY, mac(0), &[], 0, 14 + 20 + 20 + 4000);
    bytes[12..14].copy_from_slice(&[8, 0]);
    let ip = [
        0x45, 0, 0x0f, 0xc8, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ];
    bytes[14..34].copy_from_slice(&ip);
    let tcp = [
        0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
    ];
    bytes[34..54].copy_from_slice(&tcp);
    let header = VnetHeader {
        flags: VnetHeader::NEEDS_CSUM,
        gso_type: VnetHeader::GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1000,
        csum_start: 34,
        csum_offset: 16,
    };
    let sent = net
        .bench
        .send_with(&mut net.ports[0], &[(header, bytes.clone())]);
    assert_eq!(sent, 1);
    let key = net.keys[1];
    let whole = &net.bench.world.receivers[&key].got;
    assert_eq!(whole.len(), 1);
    assert_eq!((whole[0].0.gso_type, &whole[0].1[54..]), (1, &bytes[54..]));
    let cut = net.got(2);
    assert_eq!(cut.len(), 4);
    assert!(cut.iter().all(|frame| frame.len() == 1054));
    let report = net.report(2);
    assert_eq!((report.segmented, report.segments), (1, 4));
    assert_eq!(report.output.broadcast.frames, 1);
}
