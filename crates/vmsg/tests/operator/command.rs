// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg top` where there is no terminal.

use serde_json::Value;

use crate::process::{Serve, vmsg};
use crate::station::Station;

#[test]
fn top_tells_rates_of_ports_and_devices() {
    let serve = Serve::start(&[
        "--switch",
        "id=s0,allow=net0 > net1",
        "--device",
        "net,id=net0,bus=b0,switch=s0",
        "--device",
        "net,id=net1,bus=b1,switch=s0",
        "--device",
        "rng",
    ]);
    let mut one = Station::new(&serve, "b0", 0);
    let mut two = Station::new(&serve, "b1", 0);
    let control = serve.control();
    let control = control.to_str().expect("text");
    let (text, json) = std::thread::scope(|scope| {
        let looks = scope.spawn(|| {
            let text = vmsg(&["top", control, "--once", "--interval", "0.5"]);
            let json = vmsg(&["top", control, "--once", "--json", "--interval", "0.5"]);
            (text, json)
        });
        while !looks.is_finished() {
            let number = one.send(two.mac, 1000);
            two.wait_for(one.mac, number);
            two.send(one.mac, 60);
        }
        looks.join().expect("no panic")
    });
    let text = String::from_utf8(text.stdout).expect("text");
    for words in ["SWITCH", "s0", "net1", "station (", "rng0", "acl"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let json: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    let port = json["ports"]
        .as_array()
        .expect("ports")
        .iter()
        .find(|port| port["port"] == "net1")
        .expect("a port");
    let rate = |value: &Value| value.as_f64().expect("a number");
    assert!(rate(&port["out"]["frames"]) > 1.0, "{port}");
    assert!(
        rate(&port["out"]["bits"]) > 8000.0 * rate(&port["out"]["frames"]) * 0.9,
        "{port}"
    );
    assert!(rate(&port["drops"]) > 0.0, "{port}");
    assert_eq!(port["reason"], "acl");
    let device = &json["devices"][0];
    assert_eq!(
        (&device["id"], &device["type"]),
        (&"net0".into(), &"net".into())
    );
    assert!(rate(&device["from-guest"]["frames"]) > 1.0, "{device}");
    // Its end is the end, where nobody can be told to wait.
    let gone = vmsg(&["top", "/nowhere/ctl", "--once"]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&gone.stderr).contains("nobody answers"));
    let usage = vmsg(&["top", control, "--interval", "0"]);
    assert_eq!(usage.status.code(), Some(2));
}
