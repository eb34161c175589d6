// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rules, captures and rates.

use serde_json::{Value, json};

use crate::process::{Serve, vmsg};
use crate::station::Station;

const SWITCH: [&str; 2] = ["--switch", "id=s0,allow=* <> *"];

/// Three devices on two buses at one switch, with the drivers.
fn three(more: &[&str]) -> (Serve, [Station; 3]) {
    let mut args = SWITCH.to_vec();
    for device in [
        "net,id=net0,bus=b0,switch=s0",
        "net,id=net1,bus=b1,switch=s0",
        "net,id=net2,bus=b0,switch=s0",
    ] {
        args.extend(["--device", device]);
    }
    args.extend(more);
    let serve = Serve::start(&args);
    let stations = [("b0", 0), ("b1", 0), ("b0", 1)];
    let stations = stations.map(|(bus, number)| Station::new(&serve, bus, number));
    (serve, stations)
}

fn drops(port: &Value, side: &str, reason: &str) -> u64 {
    port[side][reason].as_u64().unwrap_or(0)
}

#[test]
fn a_rule_cuts_one_pair_and_only_that_pair() {
    let (serve, [mut one, mut two, mut three]) = three(&["--workers", "2"]);
    one.ping(&mut two);
    two.ping(&mut three);
    three.ping(&mut one);
    serve.ctl(&["rule", "deny", "net0 <> net1"]);
    one.ping_in_vain(&mut two, &mut three);
    two.ping_in_vain(&mut one, &mut three);
    two.ping(&mut three);
    three.ping(&mut one);
    let port = serve.port("net0");
    assert!(
        drops(&port, "dropped-in", "acl") + drops(&port, "dropped-out", "acl") > 0,
        "{port}"
    );
    let rules = serve.json(&["switches"])[0]["rules"].clone();
    assert_eq!(
        rules,
        json!(["allow * > *", "deny net0 > net1", "deny net1 > net0"])
    );
    // One direction, and back again.
    serve.ctl(&["rule", "allow", "net0 > net1", "--switch", "s0"]);
    let number = one.send(two.mac, 60);
    two.wait_for(one.mac, number);
    two.ping_in_vain(&mut one, &mut three);
    serve.ctl(&["rule", "remove", "net0 <> net1"]);
    one.ping(&mut two);
    // The addresses are known where they are.
    let macs = serve.json(&["macs", "s0"]);
    let macs = macs.as_array().expect("a list");
    for (port, station) in [("net0", &one), ("net1", &two), ("net2", &three)] {
        let mac = station.mac.map(|byte| format!("{byte:02x}")).join(":");
        assert!(
            macs.iter()
                .any(|entry| entry["mac"] == *mac && entry["port"] == port),
            "{macs:?}"
        );
    }
    let text = serve.ctl(&["list"]);
    for words in ["net0", "net2", "SWITCH", "station (pid "] {
        assert!(text.contains(words), "{words}: {text}");
    }
    serve.ctl(&["flush"]);
    serve.ctl(&["flush", "s0/net0"]);
    serve.ctl(&["unknown", "drop"]);
    assert_eq!(serve.json(&["switches"])[0]["unknown"], "drop");
}

#[test]
fn a_port_s_frames_are_captured_from_when_to_when_it_is_said() {
    let (serve, [mut one, mut two, mut three]) = three(&[]);
    one.ping(&mut two);
    // Frames to an address that is not known would come to all.
    two.ping(&mut three);
    let path = serve.file("net0.pcap");
    let file = path.to_str().expect("text");
    serve.ctl(&["capture", "net0", file]);
    assert_eq!(serve.port("net0")["capture"], *file);
    for _ in 0..10 {
        one.ping(&mut two);
        two.ping(&mut three);
    }
    serve.ctl(&["capture", "net0", "off"]);
    assert_eq!(serve.port("net0")["capture"], Value::Null);
    one.ping(&mut two);
    let bytes = std::fs::read(&path).expect("a capture");
    assert_eq!(bytes[..4], 0xa1b2_c3d4_u32.to_ne_bytes());
    let mut records = &bytes[24..];
    let mut count = 0;
    while !records.is_empty() {
        let len = u32::from_ne_bytes(records[8..12].try_into().expect("four bytes")) as usize;
        let frame = &records[16..16 + len];
        let pair = (&frame[..6], &frame[6..12]);
        let (a, b) = (&one.mac[..], &two.mac[..]);
        assert!(pair == (a, b) || pair == (b, a), "a frame of others");
        records = &records[16 + len..];
        count += 1;
    }
    assert_eq!(count, 20);
}

#[test]
fn a_port_is_changed_while_it_is_in_use() {
    let (serve, [mut one, mut two, mut three]) = three(&[]);
    one.ping(&mut two);
    // One frame is all that is left of the rate for a long time.
    serve.ctl(&["port", "set", "net1", "rate-out=1K", "storm=5"]);
    let port = serve.port("net1");
    assert_eq!(
        (&port["rate-out"], &port["storm"]),
        (&json!(1000), &json!(5))
    );
    for _ in 0..200 {
        one.send(two.mac, 1000);
    }
    let number = one.send(three.mac, 60);
    three.wait_for(one.mac, number);
    let lost = drops(&serve.port("net1"), "dropped-out", "rate-out");
    assert!(lost > 0, "{}", serve.port("net1"));
    serve.ctl(&["port", "set", "s0/net1", "rate-out=off"]);
    one.ping(&mut two);
    // Pinned to its own address it may not take another's.
    serve.ctl(&["port", "set", "net0", "pin=on"]);
    one.ping(&mut two);
    let own = std::mem::replace(&mut one.mac, [0x52, 0x54, 0, 1, 2, 3]);
    one.send(two.mac, 60);
    one.mac = own;
    one.ping(&mut three);
    assert_eq!(drops(&serve.port("net0"), "dropped-in", "pin"), 1);
    serve.ctl(&["link", "net2", "down"]);
    assert_eq!(serve.json(&["list"])[1]["link"]["up"], false);
    serve.ctl(&["link", "net2", "up"]);
    serve.ctl(&["port", "set", "net2", "link=down"]);
    assert_eq!(serve.port("net2")["link"], false);
    assert_eq!(serve.json(&["list"])[1]["link"]["carrier"], false);
    serve.ctl(&["port", "set", "net2", "link=up", "vlan=7"]);
    one.ping_in_vain(&mut three, &mut two);
    serve.ctl(&["port", "set", "net2", "vlan=off"]);
    one.ping(&mut three);
}

#[test]
fn what_is_wrong_is_said_with_what_to_do() {
    let (serve, _stations) = three(&["--port", "id=net2,pin=on"]);
    for (args, words) in [
        (
            &["port", "set", "net9", "rate-in=1M"][..],
            "known: `net0`, `net1`, `net2`",
        ),
        (&["port", "set", "s9/net0", "rate-in=1M"], "known: `s0`"),
        (&["port", "set", "net0", "rate=1M"], "`rate-in`"),
        (&["port", "set", "net0", "rate-in=fast"], "100M"),
        (&["capture", "net9", "x"], "known: `net0`"),
        (&["capture", "net0", "/nowhere/x"], "/nowhere/x"),
        (&["rule", "deny", "net0"], "a > b"),
        (&["rule", "remove", "net0 > net1"], "`allow * > *`"),
        (&["unknown", "up9"], "flood"),
        (&["macs", "s9"], "known: `s0`"),
        (&["link", "net9", "up"], "known: `net0`, `net1`, `net2`"),
        (&["add-device", "net,id=net3,switch=s9"], "known: `s0`"),
        (&["add-device", "net,id=net0,switch=s0"], "already"),
        (&["add-device", "net,id=net1,switch=s0"], "already"),
        (&["add-device", "nett"], "`rng`"),
        (&["add-device", "net,bus=b9"], "b0, b1"),
        (&["add-device", "rng", "--guest", "vm1"], "vmsg up"),
        (&["remove-device", "net9"], "known: `net0`"),
        (&["add-uplink", "id=up0,switch=s0"], "backend="),
        (&["add-uplink", "id=net0,switch=s0,backend=user"], "already"),
        (&["add-uplink", "id=net2,switch=s0,backend=user"], "already"),
        (&["remove-uplink", "net0"], "remove-device"),
        (&["add-port", "id=net0,vlan=1"], "port set"),
        (&["add-port", "id=x"], "switch="),
        (&["remove-port", "net0"], "as by default"),
        (&["remove-port", "x"], "known: `net2`"),
    ] {
        let error = serve.refused(args);
        assert!(error.contains(words), "{args:?}: {error}");
    }
}

#[test]
fn a_description_that_contradicts_itself_is_wrong_usage() {
    for (args, words) in [
        (
            &["--device", "net,switch=s9"][..],
            "--device net,switch=s9: there is no switch `s9`",
        ),
        (
            &["--switch", "id=s0,unknown=x", "--device", "rng"],
            "--switch id=s0,unknown=x: ",
        ),
        (
            &[
                "--switch",
                "id=s0",
                "--device",
                "net,id=a,switch=s0,backend=tap",
            ],
            "contradict",
        ),
        (
            &["--port", "id=x", "--device", "rng"],
            "--port id=x: switch=",
        ),
        (
            &["--uplink", "id=x,backend=tap", "--device", "rng"],
            "--uplink id=x,backend=tap: ",
        ),
        (&["--switch", "id=s0,allow=x", "--device", "rng"], "allow="),
        (
            &["--port", "vlan=5", "--device", "rng"],
            "--port vlan=5: id= is missing",
        ),
        (&[], "--device"),
    ] {
        let mut all = vec!["serve", "--bus", "unix,path=/nonexistent/b0.sock"];
        all.extend(args);
        let output = vmsg(&all);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        assert!(error.contains(words), "{args:?}: {error}");
    }
}

#[test]
fn a_switch_that_lets_nothing_pass_and_a_port_of_nobody_are_remarked() {
    let serve = |rule: &str, port: &str| {
        let switch = format!("id=s0{rule}");
        let all = [
            ["--bus", "unix,path=/nonexistent/b0.sock"],
            ["--switch", &switch],
            ["--device", "net,id=a,switch=s0"],
            ["--port", port],
        ];
        let all: Vec<&str> = ["serve"].into_iter().chain(all.concat()).collect();
        String::from_utf8_lossy(&vmsg(&all).stderr).into_owned()
    };
    let (mute, nobody) = ("nobody reaches anybody", "the port is nobody's");
    let said = serve(",deny=a > *", "id=b,switch=s0");
    assert!(said.contains(mute) && said.contains(nobody), "{said}");
    let said = serve(",allow=* <> *", "id=a,switch=s0");
    assert!(!said.contains(mute) && !said.contains(nobody), "{said}");
}
