// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices and uplinks come and go.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde_json::json;

use crate::process::Serve;
use crate::station::{Ends, Station};

#[test]
fn devices_come_and_go_while_others_talk() {
    let serve = Serve::start(&[
        "--workers",
        "2",
        "--switch",
        "id=s0,worker=1,allow=* <> *",
        "--device",
        "net,id=net0,bus=b0,switch=s0",
        "--device",
        "net,id=net1,bus=b1,switch=s0",
        "--device",
        "net,id=net2,bus=b0,switch=s0",
    ]);
    let mut one = Station::new(&serve, "b0", 0);
    let mut two = Station::new(&serve, "b1", 0);
    let mut three = Station::new(&serve, "b0", 1);
    let stop = AtomicBool::new(false);
    let pings = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let talk = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                one.ping(&mut two);
                pings.fetch_add(1, Ordering::Relaxed);
            }
        });
        let ends = Ends(&stop);
        let mut client = serve.ask();
        let mut numbers = Vec::new();
        for round in 0..20 {
            let before = pings.load(Ordering::Relaxed);
            // Both ways to write it.
            let spec = match round % 2 {
                0 => json!("net,id=net9,bus=b1,switch=s0"),
                _ => json!({"type": "net", "id": "net9", "bus": "b1", "switch": "s0"}),
            };
            let added = client.ask(&json!({"command": "add-device", "spec": spec}));
            let number = added["added"]["number"].as_u64().expect("a number");
            assert_eq!(added["added"]["bus"], "b1", "{added}");
            let number = u16::try_from(number).expect("a device number");
            assert!(!numbers.contains(&number), "numbers are never used again");
            numbers.push(number);
            let mut guest = Station::new(&serve, "b1", number);
            guest.ping(&mut three);
            let removed = client.ask(&json!({"command": "remove-device", "device": "net9"}));
            assert_eq!(removed, json!({"done": {}}));
            assert!(
                Station::try_new(&serve, "b1", number).is_err(),
                "it is gone"
            );
            drop(guest);
            while pings.load(Ordering::Relaxed) == before {
                assert!(!talk.is_finished(), "they talk on");
                std::thread::yield_now();
            }
        }
        drop(ends);
    });
    let ports = serve.json(&["switches"])[0]["ports"].clone();
    assert_eq!(ports.as_array().map(Vec::len), Some(3), "{ports}");
}

#[test]
fn all_can_be_added_to_a_host_without_anything() {
    let serve = Serve::start(&["--switch", "id=s0,allow=* <> *"]);
    assert_eq!(serve.json(&["list"]), json!([]));
    let text = serve.ctl(&["add-device", "net,bus=b1,switch=s0"]);
    assert_eq!(text, "b1/net0 number 0\n");
    // What its port is to be like is known before it comes.
    serve.ctl(&["add-port", "id=late,switch=s0,rate-in=5M,pin=on"]);
    serve.ctl(&["add-device", "net,id=late,switch=s0,mac=52:54:00:00:00:77"]);
    let port = serve.port("late");
    assert_eq!(
        (&port["rate-in"], &port["pin"]),
        (&json!(5_000_000), &json!(["52:54:00:00:00:77"]))
    );
    let mut one = Station::new(&serve, "b1", 0);
    let mut two = Station::new(&serve, "b0", 0);
    one.ping(&mut two);
    assert!(serve.refused(&["remove-port", "late"]).contains("in use"));
    serve.ctl(&["remove-device", "b0/late"]);
    serve.ctl(&["remove-port", "late"]);
    serve.ctl(&["add-device", "rng"]);
    let kinds: Vec<_> = serve
        .json(&["list"])
        .as_array()
        .expect("a list")
        .iter()
        .map(|device| device["type"].clone())
        .collect();
    assert_eq!(kinds, ["rng", "net"]);
}

#[test]
fn an_uplink_leads_out_and_can_be_taken_away() {
    let serve = Serve::start(&[
        "--switch",
        "id=s0,allow=* <> *",
        "--device",
        "net,id=net0,bus=b0,switch=s0",
        "--uplink",
        "id=up0,switch=s0,backend=socket,path=peer,server=on",
        "--port",
        "id=up0,macs=3",
    ]);
    let up = serve.port("up0");
    assert_eq!(
        (&up["uplink"], &up["macs-limit"], &up["running"]),
        (&json!(true), &json!(3), &json!(false))
    );
    // The other end is another switch's way out.
    let other = Serve::start(&[
        "--switch",
        "id=s0,allow=* <> *",
        "--device",
        "net,id=net7,bus=b0,switch=s0",
    ]);
    let path = serve.file("peer");
    let spec = format!("id=up0,backend=socket,path={}", path.display());
    other.ctl(&["add-uplink", &spec]);
    let mut one = Station::new(&serve, "b0", 0);
    let mut two = Station::new(&other, "b0", 0);
    // Until both ends have met, frames are lost.
    let begun = std::time::Instant::now();
    while serve.port("up0")["running"] != json!(true) || other.port("up0")["running"] != json!(true)
    {
        assert!(begun.elapsed() < crate::process::PATIENCE, "no carrier");
    }
    for _ in 0..20 {
        one.ping(&mut two);
    }
    serve.ctl(&["link", "up0", "down"]);
    assert_eq!(serve.port("up0")["link"], false);
    serve.ctl(&["link", "up0", "up"]);
    serve.ctl(&["unknown", "up0"]);
    one.ping(&mut two);
    serve.ctl(&["unknown", "flood"]);
    serve.ctl(&["remove-uplink", "up0"]);
    assert_eq!(
        serve.json(&["switches"])[0]["ports"]
            .as_array()
            .map(Vec::len),
        Some(1)
    );
    // And there is room for another one of this name.
    serve.ctl(&["add-uplink", "id=up0,backend=user"]);
    assert_eq!(serve.port("up0")["macs-limit"], 3);
}

#[test]
fn the_first_device_with_connections_brings_their_keeper() {
    for (request, spec) in [
        ("add-device", "net,id=net7,bus=b1"),
        ("add-uplink", "id=up0,switch=s0,backend=user"),
    ] {
        let serve = Serve::start(&["--device", "rng", "--switch", "id=s0"]);
        let keeper = serve.file("b0.sock.keep");
        let mut client = serve.ask();
        let mut add = |command: &str, spec: &str| {
            let answer = client.ask(&json!({"command": command, "spec": spec}));
            assert!(answer.get("error").is_none(), "{answer}");
        };
        add("add-device", "rng,id=rng7,bus=b1");
        add("add-device", "net,id=net8,bus=b1,switch=s0");
        assert!(!keeper.exists(), "it has nothing to keep");
        add(request, spec);
        assert!(keeper.exists(), "{request}");
    }
}
