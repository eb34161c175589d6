// SPDX-License-Identifier: Apache-2.0 OR MIT

use vmsg_bus::keyval;

use super::*;

/// Reads specifications behind the option that each begins with; all have ids.
fn network(texts: &[&str]) -> Network {
    let mut network = Network {
        workers: 2,
        ..Network::default()
    };
    for text in texts {
        let (option, spec) = text.split_once(' ').expect("an option");
        match option {
            "switch" => network.switches.push(keyval::from_str(spec).expect(spec)),
            "port" => network.ports.push(keyval::from_str(spec).expect(spec)),
            "uplink" => network.uplinks.push(keyval::from_str(spec).expect(spec)),
            "device" => network.devices.push(keyval::from_str(spec).expect(spec)),
            other => panic!("{other}"),
        }
    }
    network
}

const SWITCH: &str = "switch id=s0,worker=1,unknown=up0,allow=* <> *,deny=net0 > net1";
const UPLINK: &str = "uplink id=up0,switch=s0,backend=tap,ifname=tap7";

#[test]
fn what_belongs_together_is_found_right() {
    let good = network(&[
        SWITCH,
        UPLINK,
        "switch id=s1",
        "device net,id=net0,switch=s0,worker=1",
        "device net,id=net1,switch=s0,pcap=x.pcap",
        "device net,id=net0,bus=b1,switch=s1,link=down,queues=2",
        "device net,id=net2",
        "device rng,id=rng0,worker=0",
        "port id=net0,switch=s0,vlan=10,pin=on,rate-in=10M",
        "port id=net0,switch=s1,trunk=10:20-30,native=1,capture=y",
        "port id=up0,pin=52:54:00:00:00:01",
        "port id=later,switch=s0",
    ]);
    assert_eq!(good.problems(), []);
    assert_eq!(good.switch("s1").ok(), Some(1));
    assert_eq!(
        good.port("s1", "net0").and_then(|port| port.native),
        Some(1)
    );
    assert_eq!(good.port("s1", "net1"), None);
}

#[test]
fn what_contradicts_is_found_where_it_stands_with_what_to_do() {
    for (more, place, words) in [
        ("switch id=s0", Place::Switch(1), "already"),
        ("switch id=a/b", Place::Switch(1), "letters"),
        ("switch id=flood", Place::Switch(1), "something else"),
        (
            "switch id=s2,worker=2",
            Place::Switch(1),
            "the last one is 1",
        ),
        (
            "switch id=s2,unknown=up0",
            Place::Switch(1),
            "uplink of this switch",
        ),
        ("switch id=s2,allow=a", Place::Switch(1), "allow=: `a`"),
        ("switch id=s2,deny=a ! b", Place::Switch(1), "deny="),
        ("switch id=s2,age=0", Place::Switch(1), "age=0"),
        ("switch id=s2,table=0", Place::Switch(1), "table=0"),
        (
            "uplink id=up1,backend=tap",
            Place::Uplink(1),
            "switch= is missing",
        ),
        (
            "uplink id=up1,switch=s9,backend=tap",
            Place::Uplink(1),
            "known: `s0`",
        ),
        (
            "uplink id=up1,switch=s0",
            Place::Uplink(1),
            "backend= is missing",
        ),
        (
            "uplink id=up1,switch=s0,backend=none",
            Place::Uplink(1),
            "nowhere",
        ),
        (
            "uplink id=up1,switch=s0,backend=tap,hostfwd=tcp::1-:1",
            Place::Uplink(1),
            "hostfwd= needs backend=user",
        ),
        (
            "uplink id=up0,switch=s0,backend=user",
            Place::Uplink(1),
            "already",
        ),
        ("device net,id=x,switch=s1", Place::Device(1), "known: `s0`"),
        (
            "device net,id=x,switch=s0,backend=user",
            Place::Device(1),
            "contradict",
        ),
        (
            "device net,id=x,switch=s0,ifname=tap0",
            Place::Device(1),
            "ifname=",
        ),
        (
            "device net,id=x,switch=s0,worker=0",
            Place::Device(1),
            "leave worker= out",
        ),
        (
            "device net,id=net0,bus=b1,switch=s0",
            Place::Device(1),
            "different ids",
        ),
        (
            "device net,id=up0,switch=s0",
            Place::Device(1),
            "of the uplink",
        ),
        (
            "device net,id=x,worker=2",
            Place::Device(1),
            "the last one is 1",
        ),
        (
            "device net,id=x,backend=tap,net=10.0.2.0/24",
            Place::Device(1),
            "net=",
        ),
        ("device net,id=x,mac=1", Place::Device(1), "mac="),
        (
            "port id=net0,vlan=10,trunk=10",
            Place::Port(0),
            "contradict",
        ),
        ("port id=net0,vlan=4095", Place::Port(0), "1 to 4094"),
        ("port id=net0,native=1", Place::Port(0), "needs trunk="),
        ("port id=x", Place::Port(0), "switch= is missing"),
        ("port id=x,switch=s9", Place::Port(0), "known: `s0`"),
        ("port id=up0,pin=on", Place::Port(0), "pin=MAC"),
    ] {
        let all = network(&[SWITCH, UPLINK, "device net,id=net0,switch=s0", more]);
        let problems = all.problems();
        assert_eq!(problems.len(), 1, "{more}: {problems:?}");
        assert_eq!(problems[0].place, place, "{more}");
        let message = &problems[0].message;
        assert!(message.contains(words), "{more}: {message}");
    }
    let twice = network(&[SWITCH, UPLINK, "port id=up0", "port id=up0,switch=s0"]);
    assert_eq!(twice.problems().len(), 1);
}

#[test]
fn all_that_is_wrong_is_said_at_once() {
    let bad = network(&[
        "switch id=on",
        "uplink id=u",
        "device net,id=n,switch=x",
        "port id=p",
    ]);
    assert_eq!(bad.problems().len(), 4);
}

#[test]
fn rules_in_their_order_come_behind_what_is_allowed_and_denied() {
    let read = |text: &str| vmsg_bus::keyval::from_str::<SwitchSpec>(text).expect("a switch");
    let spec = read("id=s0,rule=+a > b,deny=a > b,rule=-c <> d,allow=* <> *");
    let rules = spec.config().expect("rules").rules;
    let texts: Vec<String> = rules.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "allow * > *",
            "deny a > b",
            "allow a > b",
            "deny c > d",
            "deny d > c"
        ]
    );
    let text = vmsg_bus::keyval::to_string(&spec).expect("it has a text");
    assert_eq!(read(&text), spec);
    for (rule, words) in [("a > b", "begins neither"), ("+a", "is not a rule")] {
        let error = read(&format!("id=s0,rule={rule}"))
            .config()
            .expect_err("it is none");
        let error = error.to_string();
        assert!(
            error.starts_with("rule=: ") && error.contains(words),
            "{error}"
        );
    }
    let port: crate::spec::PortSpec =
        vmsg_bus::keyval::from_str("id=a,switch=s0,capture-append=on").expect("a port");
    assert!(port.check().is_err());
}
